"""OGBench's single tasks: arrays as the package's own loader gives them, seeded environments, sets made here."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.response import addinfourl

import gymnasium as gym
import numpy as np
import pytest

from benchmarks import datasets, ogbench_sets
from benchmarks.datasets import plain_id
from benchmarks.families import domain_of
from benchmarks.ogbench_sets import Goal, relabel, transitions
from common.cli import UsageError
from common.data import Dataset, check
from common.environments import make_environment, make_raw
from common.replay import episode_returns

MAZE = "ogbench/pointmaze-medium-navigate-local-v0"


@pytest.fixture
def package() -> Any:
    return pytest.importorskip("ogbench")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(ogbench_sets, "LENGTH", 40)
    monkeypatch.setattr(ogbench_sets, "SIZES", {None: 80, "-1m": 120})
    return tmp_path / "minari"


def two_trajectories() -> dict[str, np.ndarray]:
    """States 0, 1, 2 and 3, 4 at x = 0, 10, 20 and 30, 40."""
    numbers = np.arange(5, dtype=np.float32)
    return {
        "observations": numbers[:, None],
        "actions": -numbers[:, None],
        "terminals": np.array([False, False, True, False, True]),
        "qpos": 10.0 * np.stack([numbers, 0 * numbers], axis=1),
    }


def test_the_last_state_of_a_trajectory_is_a_successor_and_no_row() -> None:
    goal = Goal([(slice(0, 2), (11.0, 0.0), 1.5)])
    found = transitions("x", two_trajectories(), goal)
    assert found["observations"].tolist() == [[0], [1], [3]]
    assert found["next_observations"].tolist() == [[1], [2], [4]]
    assert found["actions"].tolist() == [[0], [-1], [-3]]
    assert found["rewards"].tolist() == [-1, 0, -1], "of the current state, which is the goal at 10"
    assert found["terminations"].tolist() == [False, True, False]
    assert found["truncations"].tolist() == [False, False, True], "row 1 is its trajectory's last, but terminal"
    elsewhere = transitions("x", two_trajectories(), Goal([(slice(0, 2), (20.0, 0.0), 1.5)]))
    assert not elsewhere["terminations"].any(), "only a last state, which is no row, is there"
    assert elsewhere["truncations"].tolist() == [False, True, True], "ends of trajectories bootstrap"


def test_the_datas_own_score_is_of_whole_trajectories() -> None:
    """The first is at the goal, x = 10, on its way, and goes on; the second is not."""
    arrays = transitions("x", two_trajectories(), Goal([(slice(0, 2), np.array([10.0, 0.0]), 0.5)]))
    bounds = np.full(1, -5.0, np.float32), np.full(1, 5.0, np.float32)
    dataset = Dataset("x", check("x", arrays, *bounds), "cube-single-singletask-v0", *bounds)
    about = dataset.describe()["dataset_returns"]
    assert about == {"episodes": 2, "mean": -1.0, "min": -1.0, "max": -1.0, "score_mean": 50.0}


def test_the_table_has_the_share_of_trajectories_with_a_terminal_step() -> None:
    """Both rows of the first are terminal, at x = 0 and 10, and none of the second: one of two, not two of two."""
    arrays = transitions("x", two_trajectories(), Goal([(slice(0, 2), np.array([5.0, 0.0]), 6.0)]))
    assert arrays["terminations"].tolist() == [True, True, False]
    bounds = np.full(1, -5.0, np.float32), np.full(1, 5.0, np.float32)
    dataset = Dataset("x", check("x", arrays, *bounds), "cube-single-singletask-v0", *bounds)
    row = dict(zip(datasets.STATISTICS, datasets.statistics(dataset), strict=False))
    assert (row["episodes"], row["score"], row["terminated"]) == ("2", "50.0", "0.500")


def test_the_reward_counts_the_subgoals_that_are_missed() -> None:
    at = (slice(1, 4), np.array([0.4, 0.1, 0.02]), 0.04)
    slide = (slice(4, 5), -0.16, 0.04)
    goal = Goal([at, slide], np.array([1, 0]))
    qpos = np.zeros((4, 5), np.float32)
    qpos[:, 1:4] = [(0.4, 0.1, 0.02), (0.4, 0.13, 0.02), (0.4, 0.15, 0.02), (0.43, 0.13, 0.02)]  # 0, 3, 5 and 4.2 cm
    qpos[:, 4] = [-0.16, -0.13, -0.16, 0.0]
    buttons = np.array([[1, 0], [1, 0], [0, 0], [0, 1]])
    rewards, terminations = relabel(goal, qpos, buttons)
    assert rewards.tolist() == [0, 0, -2, -4]
    assert terminations.tolist() == [True, True, False, False]
    only_buttons = relabel(Goal([], np.array([1, 0])), qpos, buttons)
    assert only_buttons[0].tolist() == [0, 0, -1, -2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qpos": None}, "has no array qpos"),
        ({"actions": np.zeros((4, 1))}, r"actions has the shape \[4, 1\], terminals 5 rows"),
        ({"actions": np.zeros(())}, r"actions has the shape \[\], terminals 5 rows"),
        ({"terminals": np.array([0, 0, 1, 0, 0])}, "terminals must mark"),
        ({"terminals": np.ones(5)}, "terminals must mark"),
    ],
)
def test_a_malformed_file_is_refused(change: dict[str, Any], message: str) -> None:
    arrays = {key: value for key, value in (two_trajectories() | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        transitions("x", arrays, Goal([(slice(0, 2), (0.0, 0.0), 1.0)]))


def test_names_and_files_are_recognised(tmp_path: Path) -> None:
    for name in ("cube-single-play-singletask-v0", "antmaze-large-navigate-singletask-task3-v0", MAZE):
        assert ogbench_sets.recognises(name)
    for name in ("offax/hopper/medium-v1", "D4RL/antmaze/umaze-v1", "cube-single-play-v0", str(tmp_path / "no.npz")):
        assert not ogbench_sets.recognises(name)
    np.savez(tmp_path / "theirs.npz", **two_trajectories())
    np.savez(tmp_path / "ours.npz", **two_trajectories(), rewards=np.zeros(5))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    assert [ogbench_sets.recognises(str(path)) for path in sorted(tmp_path.glob("*.npz"))] == [False, False, True]


@pytest.mark.parametrize("name", ["cube-single-play-singletask-v0", MAZE])
def test_without_the_package_the_extra_is_named(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(UsageError, match=r'pip install -e "\.\[ogbench\]"'):
        ogbench_sets.load(name)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the server; files go into `data` beside it."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(ogbench_sets, "FOLDER", str(tmp_path / "data"))
    monkeypatch.setattr(
        ogbench_sets, "_package", lambda: SimpleNamespace(utils=SimpleNamespace(DATASET_URL=folder.as_uri()))
    )
    return folder


def test_a_published_file_is_downloaded_once(server: Path, tmp_path: Path) -> None:
    (server / "scene-play-v0.npz").write_bytes(b"x" * 3_000_000)
    path = ogbench_sets.download("scene-play")
    assert path == tmp_path / "data" / "scene-play-v0.npz"
    assert path.stat().st_size == 3_000_000
    (server / "scene-play-v0.npz").unlink()
    assert ogbench_sets.download("scene-play") == path
    assert list(path.parent.iterdir()) == [path]


def test_where_there_is_no_download_a_set_made_here_is_offered(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--dataset ogbench/scene-play-local-v0 is made on this machine"):
        ogbench_sets.download("scene-play")
    with pytest.raises(UsageError, match=f"put it in {tmp_path}"):
        ogbench_sets.download("antmaze-large-navigate")

    def cut_off(*_: Any, **__: Any) -> Any:
        return addinfourl(io.BytesIO(b"12345"), {"Content-Length": "9"}, "")

    monkeypatch.setattr(ogbench_sets.urllib.request, "urlopen", cut_off)
    with pytest.raises(UsageError, match="5 of 9 bytes"):
        ogbench_sets.download("scene-play")
    monkeypatch.setattr(ogbench_sets.urllib.request, "urlopen", lambda *_, **__: addinfourl(io.BytesIO(b"1"), {}, ""))
    with pytest.raises(UsageError, match="does not say how many bytes"):
        ogbench_sets.download("scene-play")
    assert not list((tmp_path / "data").iterdir())


def test_the_scenes_cube_must_stay_in_reach() -> None:
    """On the table, or beyond its edge only at the height of the drawer."""
    table, drawer = (0.4, 0.0, 0.02), (0.4, -0.33, 0.07)
    assert ogbench_sets.visible(np.array([table, drawer]))
    for gone in ((0.4, 0.29, 0.02), (0.4, -0.31, 0.02), (0.4, -0.31, 0.2)):
        assert not ogbench_sets.visible(np.array([table, gone, table]))


def test_numpys_global_state_is_lent_and_given_back() -> None:
    np.random.seed(1)
    expected = np.random.RandomState(1).uniform(size=2)
    own, reference = np.random.RandomState(5), np.random.RandomState(5)
    first = np.random.uniform()
    for _ in range(2):  # it goes on where it was
        with ogbench_sets.drawing_from(own):
            assert np.random.uniform() == reference.uniform()
    assert [first, np.random.uniform()] == expected.tolist()


WORLDS = {  # with the number of positions, and of buttons
    "pointmaze-medium-navigate": (2, 0),
    "antmaze-large-stitch": (15, 0),
    "humanoidmaze-medium-navigate": (28, 0),
    "antsoccer-arena-navigate": (22, 0),
    "cube-single-play": (21, 0),
    "cube-double-noisy": (28, 0),
    "scene-play": (25, 2),
    "puzzle-3x3-play": (23, 9),
    "puzzle-4x4-noisy": (30, 16),
}


def file_like(path: Path, world: str, spec: Any, lengths: tuple[int, ...] = (30, 2, 40, 25)) -> None:
    """Files in the package's layout with made-up states, some of which meet some or all subgoals, or nearly do."""
    width, buttons = WORLDS[world]
    env = make_raw(spec)
    goal, obs_dim, actions = ogbench_sets.goal_of(env), env.observation_space.shape[0], env.action_space
    assert (getattr(env.unwrapped, "_data", None) or env.unwrapped.data).qpos.size == width
    for file, seed in ((path, 0), (path.with_name(f"{path.stem}-val.npz"), 1)):
        rng, rows = np.random.default_rng(seed), sum(lengths)
        terminals = np.zeros(rows, bool)
        terminals[np.cumsum(lengths) - 1] = True
        qpos = rng.normal(size=(rows, width)).astype(np.float32)
        for at, where, tolerance in goal.places:
            direction = rng.normal(size=(rows, at.stop - at.start))
            distance = tolerance * rng.uniform(0.9, 1.1, (rows, 1))
            near = where + distance * direction / np.linalg.norm(direction, axis=1, keepdims=True)
            qpos[:, at] = np.where(rng.random((rows, 1)) < 0.8, near, qpos[:, at])
        arrays = {
            "observations": rng.normal(size=(rows, obs_dim)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (rows, actions.shape[0])).astype(np.float32),
            "terminals": terminals,
            "qpos": qpos,
            "qvel": qpos,
        }
        if buttons:
            states = rng.integers(0, 2, (rows, buttons))
            states[rng.random(rows) < 0.5] = goal.buttons
            arrays["button_states"] = states
        np.savez(file, **arrays)
    env.close()


@pytest.mark.parametrize(
    ("world", "task"),
    [*((world, "") for world in WORLDS), ("pointmaze-medium-navigate", "-task5"), ("scene-play", "-task4")],
)
def test_arrays_are_those_of_the_packages_loader(world: str, task: str, package: Any, tmp_path: Path) -> None:
    name = world.rpartition("-")[0] + f"-singletask{task}-v0"
    path = tmp_path / f"{world}-v0.npz"
    file_like(path, world, ogbench_sets.environment(name))
    env, theirs, _ = package.make_env_and_datasets(f"{world}-singletask{task}-v0", dataset_path=str(path))
    env.close()
    ours = ogbench_sets.load(str(path), name if task else None)
    assert ours.env_spec.id == name
    found = ours.transitions
    for field in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(getattr(found, field), theirs[field], strict=True)
    np.testing.assert_array_equal(found.terminations, 1.0 - theirs["masks"])
    np.testing.assert_array_equal(
        np.maximum(found.terminations, found.truncations), np.maximum(theirs["terminals"], 1.0 - theirs["masks"])
    )
    assert 0 < found.terminations.sum() < len(found.terminations), "some states must be the goal"
    assert found.truncations.sum() > 0


@pytest.mark.parametrize("name", ["pointmaze-medium-singletask-v0", "cube-single-singletask-v0"])
def test_rewards_are_the_environments_own(name: str, package: Any) -> None:
    """A rollout near the goal: reward and termination are of the state before the action."""
    env = make_raw(ogbench_sets.environment(name))
    goal = ogbench_sets.goal_of(env)
    env.reset(seed=0)
    world, rng, seen = env.unwrapped, np.random.default_rng(0), set()
    for _ in range(30):
        env.reset(seed=0)
        if "maze" in name:
            world.set_xy(np.array(world.cur_goal_xy) + rng.uniform(-1.5, 1.5, 2))
        else:
            world._data.qpos[14:17] = world._data.mocap_pos[0] + rng.uniform((-0.05, -0.05, 0), (0.05, 0.05, 0))
            world.post_step()
        _, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape))
        rewards, terminations = relabel(goal, info["prev_qpos"][None], None)
        assert (reward, terminated, bool(info["success"])) == (rewards[0], terminations[0], terminations[0])
        seen.add(terminated)
    env.close()
    assert seen == {True, False}


def episode(env: Any, seed: int, disturb: bool) -> np.ndarray:
    """Observations under fixed actions; `disturb`: numpy's global state is another one."""
    np.random.seed(seed + disturb)
    observations, rng = [env.reset(seed=seed)[0]], np.random.default_rng(0)
    for _ in range(50):
        observations.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0])
    return np.array(observations)


@pytest.mark.parametrize("name", ["pointmaze-teleport-singletask-task3-v0", "scene-singletask-v0"])
def test_the_seed_decides_an_episode(name: str, package: Any) -> None:
    first, second = (make_environment(ogbench_sets.environment(name)) for _ in range(2))
    assert first.spec.max_episode_steps == {"scene-singletask-v0": 750}.get(name, 1000), "the package's limits"
    before = np.random.get_state()[1].copy()
    first.reset(seed=1)
    assert np.array_equal(np.random.get_state()[1], before), "numpy's global state is the user's"
    expected = episode(first, 3, disturb=False)
    np.testing.assert_array_equal(episode(second, 3, disturb=True), expected)
    np.testing.assert_array_equal(episode(first, 3, disturb=True), expected)
    assert not np.array_equal(episode(first, 4, disturb=False), expected)


def test_an_id_by_itself_makes_the_same_environment(package: Any) -> None:
    """As --env gives it without data, and as an exported file names it."""
    name, firsts = "pointmaze-medium-singletask-v0", []
    assert plain_id(ogbench_sets.environment(name)) == f"ogbench:{name}"
    for spec in (ogbench_sets.environment(name), name, f"ogbench:{name}"):
        np.random.seed(100 + len(firsts))  # which nothing may depend on
        assert domain_of(spec) == "success"
        firsts.append(make_environment(spec).reset(seed=2)[0])
    np.testing.assert_array_equal(firsts[0], firsts[1])
    np.testing.assert_array_equal(firsts[0], firsts[2])


@pytest.mark.parametrize("name", ["cube-double-singletask-v0", "scene-singletask-v0", "puzzle-3x3-singletask-v0"])
def test_an_environment_that_is_not_drawn_moves_as_the_packages_own(name: str, package: Any) -> None:
    theirs = gym.make(name, disable_env_checker=True)
    first, second = (make_raw(ogbench_sets.environment(name)) for _ in range(2))
    drawn = make_raw(ogbench_sets.environment(name), render_mode="rgb_array")
    rng = np.random.default_rng(0)
    states = [env.reset(seed=2)[0] for env in (theirs, first, second, drawn)][:2]
    meshes = [env.unwrapped.model.nmesh for env in (theirs, first, drawn)]
    assert meshes[0] == meshes[2] > meshes[1]
    np.testing.assert_array_equal(*states)
    for _ in range(100):  # the second one moves in between
        action = rng.uniform(-1, 1, 5) - [0, 0, 0.3, 0, 0]
        ours, expected = first.step(action), theirs.step(action)
        second.step(-action)
        np.testing.assert_array_equal(ours[0], expected[0])
        assert ours[1:4] == expected[1:4]


MEDIUM = (
    "########",
    "#oo##oo#",
    "#oo#ooo#",
    "##o-o###",
    "#oo#o-o#",
    "#-#oo#-#",
    "#o-o#oo#",
    "########",
)
"""The medium maze: walls, corridors (cells with walls on two sides, which face each other), and other free cells."""


def cells(kinds: str) -> set[tuple[int, int]]:
    return {(i, j) for i, row in enumerate(MEDIUM) for j, kind in enumerate(row) if kind in kinds}


class Noting(gym.Wrapper):
    """Notes where episodes start, and their first goals."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.starts, self.goals = [], []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.starts.append(options["task_info"]["init_ij"])
        self.goals.append(options["task_info"]["goal_ij"])
        return self.env.reset(seed=seed, options=options)


def test_a_point_starts_anywhere_and_has_no_goal_in_a_corridor(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere is near enough to the goal here: each step is a success, which draws the next goal."""
    env = Noting(gym.make("pointmaze-medium-v0", terminate_at_goal=False, max_episode_steps=2))
    world, later = env.unwrapped, []
    set_goal = world.set_goal

    def noting(goal_ij: Any = None, goal_xy: Any = None) -> None:
        later.extend([] if goal_ij is None else [goal_ij])
        set_goal(goal_ij, goal_xy)

    monkeypatch.setattr(world, "_goal_tol", 1000.0)
    monkeypatch.setattr(world, "set_goal", noting)
    for seed in range(60):
        ogbench_sets._navigate(env, seed)
    assert {tuple(cell) for cell in np.argwhere(world.maze_map)} == cells("#")
    assert set(env.starts) <= cells("o-") and set(env.starts) & cells("-")
    assert set(env.goals + later) == cells("o") and len(later) == 2 * 60


class Table(gym.Env):
    """What an oracle needs of an environment; an episode has 500 steps."""

    info: ClassVar[dict] = {"privileged/target_task": "cube", "prev_qpos": np.zeros(1), "prev_qvel": np.zeros(1)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.time = 0
        return np.zeros(1), self.info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        return np.zeros(1), 0.0, False, self.time == 500, self.info


def test_noisy_experts_have_noise_whose_level_each_trajectory_draws() -> None:
    """As OGBench's own scripts: x normal, x uniform in 0 to 0.1, of three times that in yaw and ten in the gripper."""
    wanted, levels = np.array([0.2, -0.2, 0.1, 0.0, 0.0]), []
    oracle = SimpleNamespace(reset=lambda *_: None, select_action=lambda *_: wanted, done=False)

    def actions(noisy: bool, uniform: float, seed: int) -> np.ndarray:
        return ogbench_sets._manipulate(Table(), {"cube": oracle}, noisy, uniform, seed)["actions"]

    for seed in range(10):
        distances = np.abs(actions(True, 0.0, seed) - wanted)
        assert distances.max() <= 1.0, "what is beyond the action space is clipped"
        sizes = np.median(distances, axis=0)  # which clipping leaves as they are: 0.67 standard deviations
        np.testing.assert_allclose(sizes / sizes[:3].mean(), [1, 1, 1, 3, 10], rtol=0.25)
        levels.append(sizes[:3].mean() / 0.6745)
    assert 0 < min(levels) < 0.02 and 0.08 < max(levels) < 0.105
    assert (actions(False, 0.0, 0) == wanted.astype(np.float32)).all()
    uniform = (drawn := actions(False, 0.25, 0)) != wanted.astype(np.float32)
    assert 0.2 < uniform.mean() < 0.3 and np.array_equal(uniform.any(axis=1), uniform.all(axis=1))
    assert drawn[uniform].min() < -0.95 and drawn[uniform].max() > 0.95


def sums(path: Path) -> dict[str, str]:
    with np.load(path) as file:
        return {name: hashlib.sha256(file[name].tobytes()).hexdigest() for name in file.files}


@pytest.mark.parametrize("dataset_id", [name for name in ogbench_sets.ids() if "large" not in name])
def test_every_set_can_be_made_and_read(
    dataset_id: str, package: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 20 if "giant" in dataset_id else 40
    monkeypatch.setattr(ogbench_sets, "LENGTHS", {"pointmaze-giant": 20})
    monkeypatch.setattr(ogbench_sets, "SIZES", {None: 2 * length})
    dataset = ogbench_sets.load(dataset_id)
    rows = dataset.transitions
    assert len(rows.rewards) == 2 * length
    assert rows.truncations.sum() + rows.terminations.sum() == len(episode_returns(rows)) >= 2
    assert set(np.flatnonzero(rows.truncations)) <= {length - 1, 2 * length - 1}
    inside = np.ones(2 * length - 1, bool)
    inside[length - 1] = False
    np.testing.assert_array_equal(rows.next_observations[:-1][inside], rows.observations[1:][inside])
    folder = root / dataset_id
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == sums(folder / f"{folder.name}.npz")
    assert manifest["rows"] == 2 * (length + 1)
    assert domain_of(dataset.env_spec) == "success"


@pytest.mark.parametrize("dataset_id", ["ogbench/scene-play-local-v0", MAZE])
def test_a_build_that_was_stopped_goes_on_to_the_same_arrays(
    dataset_id: str, package: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sums(ogbench_sets.ensure(dataset_id))
    other = root.with_name("other")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(other))
    trajectory = ogbench_sets._trajectory

    def stopped(record: Any, name: str, index: int) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return trajectory(record, name, index)

    monkeypatch.setattr(ogbench_sets, "_trajectory", stopped)
    with pytest.raises(KeyboardInterrupt):
        ogbench_sets.ensure(dataset_id)
    assert not (other / dataset_id).exists()
    made = []

    def second(record: Any, name: str, index: int) -> Any:
        made.append(index)
        return trajectory(record, name, index)

    monkeypatch.setattr(ogbench_sets, "_trajectory", second)
    assert sums(ogbench_sets.ensure(dataset_id)) == whole
    assert made == [1], "the first was kept"
    task = dataset_id.replace("-v0", "-task2-v0")
    assert ogbench_sets.ensure(task) == other / dataset_id / f"{Path(dataset_id).name}.npz"
    assert made == [1], "a task is no other file"
    ogbench_sets.ensure(dataset_id.replace("-v0", "-1m-v0"))
    assert made == [1, 0, 1, 2]


def test_a_stale_set_is_deleted_after_the_new_one_is_in_its_place(
    package: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that is killed at the last moment has both, and goes on from there."""
    path = ogbench_sets.ensure(MAZE)
    stale, folder, rename = path.read_bytes(), path.parent, os.rename

    def killed(source: Path, target: Path) -> None:
        if target == folder:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(ogbench_sets, "FORMAT", 2)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        ogbench_sets.ensure(MAZE)
    building = folder.with_name(".offax-building") / folder.name
    assert (building / "stale" / path.name).read_bytes() == stale and (building / "done" / path.name).exists()
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(ogbench_sets, "_trajectory", lambda *_: pytest.fail("collected again"))
    assert ogbench_sets.ensure(MAZE) == path
    assert json.loads((folder / "manifest.json").read_text())["recipe"]["format"] == 2
    assert [left.name for left in building.parent.iterdir()] == [f"{folder.name}.lock"]


def test_a_task_changes_rewards_only(package: Any, root: Path) -> None:
    first, second = (ogbench_sets.load(MAZE.replace("-v0", f"-task{n}-v0")) for n in (1, 2))
    assert (first.env_spec.id, second.env_spec.id) == tuple(f"pointmaze-medium-singletask-task{n}-v0" for n in (1, 2))
    np.testing.assert_array_equal(first.transitions.observations, second.transitions.observations)
    chosen = ogbench_sets.load(MAZE, "ogbench:pointmaze-medium-singletask-task2-v0")
    np.testing.assert_array_equal(chosen.transitions.rewards, second.transitions.rewards)


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("ogbench/antmaze-medium-navigate-local-v0", None, "cannot be made here"),
        ("ogbench/nonsense", None, "there is no dataset"),
        ("visual-scene-play-singletask-v0", None, "without images"),
        (MAZE, "Hopper-v5", "none of OGBench's environments with a task"),
        (MAZE, "pointmaze-medium-v0", "none of OGBench's environments with a task"),
        (MAZE, "puzzle-3x3-singletask-v0", "has no array button_states"),
        (MAZE, "cube-single-singletask-v0", "has 2 columns of qpos"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, env: str | None, message: str, package: Any, root: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ogbench_sets.load(name, env)


def test_the_buttons_of_another_task_are_refused() -> None:
    arrays = two_trajectories()
    arrays["button_states"] = np.zeros((len(arrays["terminals"]), 2))
    with pytest.raises(UsageError, match=r"x has \[2\] buttons; the task looks at \[9\]"):
        transitions("x", arrays, Goal([], np.zeros(9)))


def test_a_file_without_a_manifest_is_left_alone(package: Any, root: Path) -> None:
    (root / MAZE).mkdir(parents=True)
    with pytest.raises(UsageError, match="move it away"):
        ogbench_sets.ensure(MAZE)


def test_the_command_line_builds_and_lists(package: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.main(["build", MAZE])
    out, err = capsys.readouterr()
    assert out.split() == [str(root / MAZE / f"{Path(MAZE).name}.npz")]
    assert "collecting" in err and "100 %" in err
    datasets.main([])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines.pop(MAZE) == "on disk"
    assert {lines[name] for name in ogbench_sets.ids() if name != MAZE} == {
        "collected on first use, with the extra ogbench"
    }
