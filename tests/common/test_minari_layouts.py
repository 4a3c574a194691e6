"""AntMaze, PointMaze and Kitchen as Minari's sets of them are recorded: small ones, made by the same rules, are read.

They need gymnasium-robotics. FrankaKitchen-v1 besides needs a MuJoCo older than 3.10.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest

from benchmarks.families import domain_of, normalized_score
from common.cli import UsageError
from common.data import Dataset, load
from common.environments import make_environment
from common.replay import episode_returns

robotics = pytest.importorskip("gymnasium_robotics")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register_envs(robotics)
    return tmp_path


def check_flattened(dataset: Dataset, dataset_id: str) -> None:
    """Every row is what Minari's own iterator has, flattened by gymnasium, and its successor is the next step."""
    stored, at = minari.load_dataset(dataset_id), 0
    rows = dataset.transitions
    for episode in stored.iterate_episodes():
        steps = len(episode.rewards)
        flat = [gym.spaces.flatten(stored.observation_space, _step(episode.observations, t)) for t in range(steps + 1)]
        np.testing.assert_allclose(rows.observations[at : at + steps], flat[:-1], rtol=1e-6)
        np.testing.assert_allclose(rows.next_observations[at : at + steps], flat[1:], rtol=1e-6)
        np.testing.assert_allclose(rows.rewards[at : at + steps], episode.rewards)
        at += steps
    assert at == len(rows.rewards)
    env = make_environment(dataset.env_spec)
    assert env.observation_space.shape == rows.observations.shape[1:]
    assert env.action_space.shape == rows.actions.shape[1:]
    env.close()


def _step(value: Any, t: int) -> Any:
    return {key: _step(x, t) for key, x in value.items()} if isinstance(value, dict) else value[t]


class SuccessAlone(minari.StepDataCallback):
    """Keeps the one number that every step informs of."""

    def __call__(self, env: gym.Env, obs: Any, info: Any, *rest: Any, **named: Any) -> Any:
        step = super().__call__(env, obs, info, *rest, **named)
        return step | {"info": {"success": info["success"]}}


class EndAtGoal(SuccessAlone):
    """Cuts an episode at its goal, where the environment goes on to the next one."""

    def __call__(self, env: gym.Env, obs: Any, info: Any, *rest: Any, **named: Any) -> Any:
        step = super().__call__(env, obs, info, *rest, **named)
        return step | ({"truncated": True} if info["success"] else {})


def test_antmaze() -> None:
    """Episodes go on at the goal, a reward of 1 each step, until the time limit; only evaluation ends at the goal."""
    goal, start = "g", "r"
    maze = [[1] * 5, [1, goal, 0, 0, 1], [1, 1, 1, 0, 1], [1, start, 0, 0, 1], [1] * 5]
    evaluation = [[1] * 5, [1, 0, 0, start, 1], [1, 0, 1, 1, 1], [1, 0, 0, goal, 1], [1] * 5]
    options = {"continuing_task": True, "reset_target": False}
    env = gym.make("AntMaze_UMaze-v4", maze_map=maze, max_episode_steps=12, **options)
    collector = minari.DataCollector(env, step_data_callback=SuccessAlone, record_infos=True)
    rng = np.random.default_rng(0)
    for episode in range(3):
        collector.reset(seed=episode)
        if episode == 1:  # begin at the goal
            inner = env.unwrapped
            inner.goal = inner.ant_env.data.qpos[:2].copy()
        truncated = False
        while not truncated:
            _, _, terminated, truncated, _ = collector.step(rng.uniform(-0.1, 0.1, 8).astype(np.float32))
            assert not terminated
    spec = gym.make("AntMaze_UMaze-v4", maze_map=evaluation, **options).spec
    collector.create_dataset("tests/antmaze/umaze-v0", eval_env=spec)
    dataset = load("tests/antmaze/umaze-v0")
    check_flattened(dataset, "tests/antmaze/umaze-v0")
    rows = dataset.transitions
    assert rows.observations.shape == (36, 31)
    np.testing.assert_array_equal(np.flatnonzero(rows.truncations), [11, 23, 35])
    assert not rows.terminations.any()
    returns = episode_returns(rows)
    assert returns[1] > 1 and returns[0] == returns[2] == 0
    assert domain_of(dataset.env_spec) == "antmaze"
    np.testing.assert_array_equal(normalized_score(domain_of(dataset.env_spec), returns), [0, 100, 0])
    evaluated = make_environment(dataset.env_spec)
    assert evaluated.unwrapped.maze.maze_map == evaluation
    evaluated.reset(seed=0)
    evaluated.unwrapped.goal = evaluated.unwrapped.ant_env.data.qpos[:2].copy()
    _, reward, terminated, _, info = evaluated.step(np.zeros(8))
    assert (reward, terminated, info["success"]) == (1.0, True, True)


def test_pointmaze() -> None:
    """One long walk from goal to goal, cut at each: the reward of 1 is in an episode's last row, which bootstraps."""
    env = gym.make("PointMaze_Open-v3", continuing_task=True, reset_target=True, max_episode_steps=400)
    collector = minari.DataCollector(env, step_data_callback=EndAtGoal, record_infos=True)
    observation, _ = collector.reset(seed=0)
    for _ in range(400):
        towards = observation["desired_goal"] - observation["achieved_goal"]
        action = np.clip(10 * towards - observation["observation"][2:], -1, 1).astype(np.float32)
        observation = collector.step(action)[0]
    collector.create_dataset("tests/pointmaze/open-v0")
    dataset = load("tests/pointmaze/open-v0")
    check_flattened(dataset, "tests/pointmaze/open-v0")
    rows = dataset.transitions
    ends = np.flatnonzero(rows.truncations)
    assert len(rows.rewards) == 400 and len(ends) > 2 and ends[-1] == 399
    np.testing.assert_array_equal(rows.rewards[ends[:-1]], 1.0)
    assert rows.rewards.sum() - rows.rewards[-1] == len(ends) - 1
    assert not rows.terminations.any()
    assert dataset.env_spec.id == "PointMaze_Open-v3"


def test_kitchen() -> None:
    """Observations are dictionaries in dictionaries; a met task is not taken off the list, and nothing terminates."""
    tasks = ["microwave", "kettle", "light switch", "slide cabinet"]
    options = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
    try:
        make_environment("FrankaKitchen-v1").close()
    except UsageError as error:
        pytest.skip(str(error))
    env = gym.make("FrankaKitchen-v1", tasks_to_complete=tasks, max_episode_steps=8, **options)
    collector = minari.DataCollector(env)
    rng = np.random.default_rng(0)
    for episode in range(2):
        collector.reset(seed=episode)
        if episode == 1:  # the kettle is where it should be
            inner = env.unwrapped
            at = robotics.envs.franka_kitchen.kitchen_env.OBS_ELEMENT_INDICES["kettle"]
            goal = robotics.envs.franka_kitchen.kitchen_env.OBS_ELEMENT_GOALS["kettle"]
            qpos = inner.data.qpos.copy()
            qpos[at] = goal
            inner.robot_env.set_state(qpos, inner.data.qvel)
        for _ in range(8):
            collector.step(rng.uniform(-0.1, 0.1, 9))
    collector.create_dataset("tests/kitchen/complete-v0")
    dataset = load("tests/kitchen/complete-v0")
    check_flattened(dataset, "tests/kitchen/complete-v0")
    rows = dataset.transitions
    np.testing.assert_array_equal(np.flatnonzero(rows.truncations), [7, 15])
    assert not rows.terminations.any()
    returns = episode_returns(rows)
    assert returns[0] == 0 and returns[1] >= 1
    assert domain_of(dataset.env_spec) == "kitchen"
