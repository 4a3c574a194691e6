"""Every family of environments that has settings or scores of its own: one of it is made, stepped and scored."""

import importlib.util
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from algorithms import iql
from benchmarks import families
from benchmarks.families import REFERENCE_RETURNS, domain_of, normalized_score, returns_of_data
from common.cli import FAMILIES, UsageError, preset_name
from common.environments import Evaluator, make_environment
from common.members import make_members
from common.replay import Transform, Transitions, empty_ring, record

robotics = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None, reason='needs pip install ".[adroit]"'
)
NAMED = {  # id: preset, domain
    "Hopper-v5": ("locomotion", "hopper"),
    "HalfCheetah-v5": ("locomotion", "halfcheetah"),
    "Walker2d-v5": ("locomotion", "walker2d"),
    "Ant-v5": ("locomotion", "ant"),
    "Humanoid-v5": ("locomotion", None),
    "Swimmer-v5": ("locomotion", None),
}
NAMED_OF_ROBOTICS = {
    "AntMaze_UMaze-v4": ("antmaze", "antmaze"),
    "AntMaze_Medium_Diverse_GR-v5": ("antmaze", "antmaze"),
    "AdroitHandPen-v1": ("adroit", "pen"),
    "AdroitHandDoor-v1": ("adroit", "door"),
    "AdroitHandHammer-v1": ("adroit", "hammer"),
    "AdroitHandRelocate-v1": ("adroit", "relocate"),
}
TASKS = ["microwave", "kettle", "light switch", "slide cabinet"]
MINARIS_KITCHEN = {  # as its sets store it
    "tasks_to_complete": TASKS,
    "remove_task_when_completed": False,
    "terminate_on_tasks_completed": False,
}


def test_no_family_is_left_out() -> None:
    named = [*NAMED.values(), *NAMED_OF_ROBOTICS.values(), ("kitchen", "kitchen")]
    assert {preset for preset, _ in named} == set(FAMILIES) - {"ogbench"}  # which test_ogbench_sets.py makes
    assert {domain for _, domain in named} - {None} == set(REFERENCE_RETURNS)


def test_episodes_are_as_long_as_those_of_the_reference_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """D4RL's pen ends after 100 steps and its kitchen after 280; --max-episode-steps has the last word."""
    limits = {
        name: families.ready(name)[1].get("max_episode_steps") for name in ("AdroitHandPen-v1", "FrankaKitchen-v1")
    }
    assert limits == {"AdroitHandPen-v1": 100, "FrankaKitchen-v1": 280}
    monkeypatch.setitem(families.D4RL_TASKS, "pendulum", {"max_episode_steps": 50})
    made = [make_environment("Pendulum-v1", steps).spec.max_episode_steps for steps in (0, 7)]
    assert made == [50, 7]


@pytest.mark.parametrize(
    "env_id", [*NAMED, *(pytest.param(name, marks=robotics) for name in (*NAMED_OF_ROBOTICS, "PointMaze_UMaze-v3"))]
)
def test_it_can_be_made_and_stepped(env_id: str) -> None:
    preset, domain = (NAMED | NAMED_OF_ROBOTICS).get(env_id, ("none", None))
    assert (preset_name("x.npz", env_id), domain_of(env_id)) == (preset, domain)
    env = make_environment(env_id)
    observation, _ = env.reset(seed=0)
    assert observation.shape == env.observation_space.shape and np.isfinite(observation).all()
    observation, reward, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
    assert np.isfinite(observation).all() and np.isfinite(reward) and not (terminated or truncated)


def placed_on_the_goal(env_id: str) -> gym.Env:
    env = make_environment(env_id)
    env.reset(seed=0)
    maze = env.unwrapped
    position = maze.ant_env.data.qpos if hasattr(maze, "ant_env") else maze.point_env.data.qpos
    maze.goal = position[:2].copy()
    return env


@robotics
@pytest.mark.parametrize("env_id", ["AntMaze_UMaze-v4", "AntMaze_Large_Diverse_GR-v5"])
def test_antmaze_ends_at_the_goal_with_100(env_id: str) -> None:
    env = placed_on_the_goal(env_id)
    _, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
    assert terminated and info["success"]
    assert normalized_score(domain_of(env_id), np.array([reward])) == 100.0


@robotics
def test_pointmaze_goes_on_at_the_goal_and_has_no_score() -> None:
    """The reward of D4RL's maze2d goes on too; but its mazes and episodes are others, so that no reference fits."""
    env = placed_on_the_goal("PointMaze_UMaze-v3")
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(3)]
    assert [step[1] for step in steps] == [1.0, 1.0, 1.0] and not any(step[2] for step in steps)
    assert normalized_score(domain_of("PointMaze_UMaze-v3"), np.ones(1)) is None


def score_of_data(env_spec: Any, *episodes: list[float]) -> Any:
    rewards = np.concatenate(episodes).astype(np.float32)
    ends = np.zeros(len(rewards), np.float32)
    ends[np.cumsum([len(episode) for episode in episodes]) - 1] = 1.0
    rows, zeros = np.zeros((len(rewards), 1), np.float32), np.zeros(len(rewards), np.float32)
    transitions = Transitions(rows, rows, rewards, rows, zeros, ends)
    return returns_of_data(env_spec, transitions)["score_mean"]


def kitchen(tasks: list[str]) -> Any:
    kwargs = MINARIS_KITCHEN | {"tasks_to_complete": tasks}
    return gym.envs.registration.EnvSpec("FrankaKitchen-v1", "absent:Kitchen", kwargs=kwargs)


def test_data_that_go_on_at_the_goal_are_scored_by_success() -> None:
    assert score_of_data("AntMaze_UMaze-v4", [0, 0, 1, 1, 1], [0, 0], [1], [0, 0, 0]) == 50.0


def test_no_data_have_no_returns() -> None:
    """As online from scratch, in tasks that are scored by success too."""
    none = record(Transitions(*map(np.asarray, empty_ring(0, 3, 1).data)))
    for env_id in ("Hopper-v5", "cube-single-singletask-v0"):
        assert returns_of_data(env_id, none) == {"episodes": 0}


def test_kitchens_data_have_no_score() -> None:
    """They reward two finished tasks by 2 at every later step: no sum of that is D4RL's number of tasks."""
    assert score_of_data(kitchen(TASKS), [0, 1, 2, 2, 2]) is None


def test_kitchen_is_scored_where_it_has_four_tasks() -> None:
    assert preset_name("D4RL/kitchen/mixed-v2", None) == "kitchen"
    assert domain_of(kitchen(TASKS)) == "kitchen" and domain_of(kitchen(TASKS[:3])) is None


def test_kitchen_says_which_mujoco_it_needs() -> None:
    def fail(**_: Any) -> None:
        raise AssertionError

    for name in ("FrankaKitchen", "FetchReach", "HandReach", "Else"):
        gym.register(f"OffaxFamilies/{name}-v0", entry_point=fail)
        with pytest.raises(UsageError) as refused:
            make_environment(f"OffaxFamilies/{name}-v0")
        assert ("mujoco<3.10" in str(refused.value)) == (name != "Else")


@robotics
def test_kitchen_rewards_a_task_once_and_ends_after_the_last() -> None:
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    spec = gym.spec("FrankaKitchen-v1")
    spec.kwargs |= MINARIS_KITCHEN
    try:
        env = make_environment(spec)
    except UsageError as error:
        assert "mujoco<3.10" in str(error)
        pytest.skip('needs pip install "mujoco<3.10"')
    env.reset(seed=0)
    kitchen = env.unwrapped
    for task in TASKS[:2]:
        kitchen.goal[task] = kitchen._get_obs(kitchen.robot_env._get_obs())["achieved_goal"][task].copy()
    steps = [env.step(np.zeros(9, np.float32)) for _ in range(3)]
    assert [step[1] for step in steps] == [2.0, 0.0, 0.0] and not any(step[2] for step in steps)
    for task in TASKS[2:]:
        kitchen.goal[task] = kitchen._get_obs(kitchen.robot_env._get_obs())["achieved_goal"][task].copy()
    _, reward, terminated, _, _ = env.step(np.zeros(9, np.float32))
    assert reward == 2.0 and terminated


class Own(gym.Env):
    """Breaks the API in one way."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        observation = np.zeros(3 if self.fault == "width" else 2, np.float32)
        return observation if self.fault == "old reset" else (observation, {})

    def step(self, action: np.ndarray) -> tuple:
        if self.fault == "raises":
            raise KeyError("torso")
        rest = (False, {}) if self.fault == "old step" else (False, False, {})
        return np.zeros((1, 2) if self.fault == "batched" else 2, np.float32), 0.0, *rest


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("", None),
        ("old reset", "its reset fails"),
        ("width", r"observations are \(3,\), not \(2,\)"),
        ("old step", "its step fails"),
        ("raises", "its step fails .*KeyError: 'torso'"),
        ("batched", r"observations are \(1, 2\), not \(2,\)"),
    ],
)
def test_an_environment_is_tried_out_before_a_run_trains(
    monkeypatch: pytest.MonkeyPatch, fault: str, words: str | None
) -> None:
    """Where nothing is evaluated on the way its faults would end the run after all of its updates."""
    monkeypatch.setitem(gym.registry, "Own-v0", gym.envs.registration.EnvSpec("Own-v0", Own, kwargs={"fault": fault}))
    transform = Transform(np.zeros(2, np.float32), np.ones(2, np.float32), 1.0, 0.0)
    arguments = partial(make_environment, "Own-v0"), make_members(iql.Args()), transform
    if not words:
        Evaluator(*arguments)
        return
    with pytest.raises(UsageError, match=f"environment Own-v0: .*{words}"):
        Evaluator(*arguments)


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("Hopper-v5", "hopper"),
        ("gymnasium.envs.mujoco:Hopper-v5", "hopper"),
        ("gymnasium_robotics:AdroitHandDoor-v1", "door"),
        ("ogbench:cube-single-singletask-v0", "success"),
        ("lab:Hopper-v5", None),
        ("lab.robots:Hopper-v0", None),
        ("Lab/Hopper-v0", None),
    ],
)
def test_an_environment_of_ones_own_has_no_score_whatever_its_name(name: str, domain: str | None) -> None:
    assert domain_of(name) == domain


@pytest.mark.parametrize("name", ["lab:AdroitHandPen-v1", "Lab/FrankaKitchen-v1", "lab.mazes:AntMaze_UMaze-v4"])
def test_an_environment_of_ones_own_is_made_without_d4rls_options(name: str) -> None:
    assert families.ready(name) == (name, {})
