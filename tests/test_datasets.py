"""Loading: hand-built files whose rows are known, and every bad input in one line."""

import io
import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces

from common import datasets, offax_sets
from common.buffers import Transitions
from common.errors import UsageError

UNIT = spaces.Box(-1, 1, (1,), np.float32)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def episode(
    observations: Any, rewards: Any, terminated: bool = False, truncated: bool = False, actions: Any = None
) -> dict:
    steps = len(rewards)
    last = np.arange(steps) == steps - 1
    return {
        "observations": observations,
        "actions": np.linspace(-1, 1, steps, dtype=np.float32)[:, None] if actions is None else actions,
        "rewards": np.array(rewards, float),
        "terminations": last & terminated,
        "truncations": last & truncated,
    }


def column(*values: float) -> np.ndarray:
    return np.array(values, float)[:, None]


def write_minari(
    name: str,
    episodes: list[dict],
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space = UNIT,
    **options: Any,
) -> Path:
    import minari
    from minari.data_collector import EpisodeBuffer

    space = observation_space or spaces.Box(-np.inf, np.inf, (1,), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            name,
            [EpisodeBuffer(**one) for one in episodes],
            observation_space=space,
            action_space=action_space,
            **{"data_format": "hdf5"} | options,
        )
    return offax_sets.datasets_root() / name


TWO_ENDINGS = [
    episode(column(0, 1, 2, 3), [1, 2, 3], terminated=True),
    episode(column(10, 11, 12), [4, 5], truncated=True),
    episode(column(20, 21), [6]),
]


def good_npz(size: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(size, 3)),
        "actions": rng.uniform(-1, 1, (size, 2)),
        "rewards": rng.normal(size=size),
        "next_observations": rng.normal(size=(size, 3)),
        "terminations": np.zeros(size, bool),
        "truncations": np.zeros(size, bool),
    }


def usage_error(name: str, env: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        datasets.load(name, env)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Episodes and scores


def test_episodes_end_at_flags_and_at_the_end_of_the_data() -> None:
    zeros = np.zeros((6, 1), np.float32)
    terminations, truncations = np.float32([0, 1, 0, 0, 0, 0]), np.float32([0, 0, 0, 1, 0, 0])
    data = Transitions(zeros, zeros, np.float32([1, 2, 3, 4, 5, 6]), zeros, terminations, truncations)
    assert datasets.episode_slices(data).tolist() == [[0, 2], [2, 4], [4, 6]]
    assert datasets.episode_returns(data).tolist() == [3, 7, 11]


@pytest.mark.parametrize(
    ("domain", "low", "high"),
    [("hopper", -20.272305, 3234.3), ("halfcheetah", -280.178953, 12135.0), ("walker2d", 1.629008, 4592.3),
     ("door", -56.512833, 2880.5693087298737), ("antmaze", 0.0, 1.0), ("kitchen", 0.0, 4.0)],
)  # fmt: skip
def test_reference_scores(domain: str, low: float, high: float) -> None:
    scores = datasets.normalized_score(domain, np.array([low, high, (low + high) / 2]))
    np.testing.assert_allclose(scores, [0, 100, 50], atol=1e-9)


def test_no_reference_no_score() -> None:
    assert datasets.normalized_score(None, np.ones(1)) is None
    assert datasets.normalized_score("pusher", np.ones(1)) is None


@pytest.mark.parametrize(
    ("env_id", "domain"),
    [("Hopper-v5", "hopper"), ("Walker2d-v4", "walker2d"), ("Ant-v5", "ant"), ("AntMaze_UMaze-v4", "antmaze"),
     ("AntMaze_Medium_Diverse_GR-v4", "antmaze"), ("AntMaze_UMazeDense-v4", None), ("AdroitHandDoor-v1", "door"),
     ("AdroitHandDoorSparse-v1", None), ("FrankaKitchen-v1", "kitchen"), ("PointMaze_UMaze-v3", None),
     ("Humanoid-v5", None), (None, None)],
)  # fmt: skip
def test_domain_of_environment(env_id: str | None, domain: str | None) -> None:
    assert datasets._domain_of_env(env_id) == domain


# Minari


def test_minari_rows() -> None:
    write_minari("test/two-v0", TWO_ENDINGS)
    for _ in range(2):  # the second time from the cache
        data = datasets.load("test/two-v0").transitions
        assert data.observations[:, 0].tolist() == [0, 1, 2, 10, 11, 20]
        assert data.next_observations[:, 0].tolist() == [1, 2, 3, 11, 12, 21]
        assert data.actions[:, 0].tolist() == [-1, 0, 1, -1, 1, -1]
        assert data.rewards.tolist() == [1, 2, 3, 4, 5, 6]
        assert data.terminations.tolist() == [0, 0, 1, 0, 0, 0]
        assert data.truncations.tolist() == [0, 0, 0, 0, 1, 1]  # the last had no flag
        assert all(array.dtype == np.float32 for array in data)


def test_minari_arrow_format_has_the_same_rows() -> None:
    pytest.importorskip("pyarrow")
    write_minari("test/arrow-v0", TWO_ENDINGS, data_format="arrow")
    write_minari("test/hdf5-v0", TWO_ENDINGS)
    a, b = (datasets.load(f"test/{name}-v0").transitions for name in ("arrow", "hdf5"))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_environment_comes_from_the_dataset_and_may_be_replaced() -> None:
    env = gym.make("Hopper-v5")
    observations = np.stack([env.reset(seed=i)[0] for i in range(3)])
    recorded = episode(observations, [1, 1], truncated=True, actions=np.zeros((2, 3), np.float32))
    write_minari("test/hopper-v0", [recorded], env.observation_space, env.action_space, env="Hopper-v5")
    dataset = datasets.load("test/hopper-v0")
    assert (dataset.env_id, dataset.domain, dataset.env_spec.id) == ("Hopper-v5", "hopper", "Hopper-v5")
    assert gym.make(dataset.env_spec).spec.max_episode_steps == 1000
    other = datasets.load("test/hopper-v0", env="Hopper-v4")
    assert (other.env_spec, other.env_id, other.domain) == ("Hopper-v4", "Hopper-v4", "hopper")
    assert "11 numbers and Walker2d-v5 gives 17" in usage_error("test/hopper-v0", "Walker2d-v5")
    assert "cannot make the environment Nothing-v0" in usage_error("test/hopper-v0", "Nothing-v0")


def test_dictionaries_are_flattened_as_gymnasium_does() -> None:
    class Goal(gym.Env):
        action_space = UNIT
        observation_space = spaces.Dict(
            [  # a list keeps this order, which is not the alphabetical one
                ("position", spaces.Box(-9, 9, (2,), np.float64)),
                ("goal", spaces.Dict({"y": spaces.Box(-9, 9, (1,)), "x": spaces.Box(-9, 9, (2,))})),
                ("achieved", spaces.Box(-9, 9, (1,), np.float64)),
            ]
        )

    samples = [Goal.observation_space.sample() for _ in range(4)]

    def stacked(items: list[Any]) -> Any:
        if isinstance(items[0], dict):
            return {key: stacked([item[key] for item in items]) for key in items[0]}
        return np.stack(items)

    write_minari("test/goal-v0", [episode(stacked(samples), [1, 2, 3], True)], Goal.observation_space)
    wrapper = gym.wrappers.FlattenObservation(Goal())
    expected = np.stack([wrapper.observation(sample) for sample in samples]).astype(np.float32)
    data = datasets.load("test/goal-v0").transitions
    np.testing.assert_array_equal(data.observations, expected[:3])
    np.testing.assert_array_equal(data.next_observations, expected[1:])


def test_actions_are_rescaled_from_the_bounds() -> None:
    space = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    actions = np.float32([[-2, 0], [0, 5], [2, 10], [1, 2.5]])
    write_minari("test/scaled-v0", [episode(column(*range(5)), [0] * 4, True, actions=actions)], action_space=space)
    dataset = datasets.load("test/scaled-v0")
    np.testing.assert_allclose(dataset.transitions.actions, [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]], atol=1e-6)
    assert dataset.action_low.tolist() == [-2, 0] and dataset.action_high.tolist() == [2, 10]


@pytest.mark.parametrize(
    ("what", "observation_space", "action_space", "observations", "actions"),
    [
        ("actions are a Discrete space", None, spaces.Discrete(3), column(0, 1, 2), np.array([0, 1])),
        ("observations are a Box space of uint8", spaces.Box(0, 255, (8, 8, 3), np.uint8), UNIT,
         np.zeros((3, 8, 8, 3), np.uint8), None),
        ("observations are a Discrete space", spaces.Discrete(3), UNIT, np.array([0, 1, 2]), None),
        ("observations are a Discrete space", spaces.Dict(a=spaces.Discrete(3)), UNIT, {"a": np.array([0, 1, 2])},
         None),
    ],
)  # fmt: skip
def test_continuous_vectors_only(what, observation_space, action_space, observations, actions) -> None:
    recorded = episode(observations, [1, 2], True, actions=actions)
    write_minari("test/odd-v0", [recorded], observation_space, action_space)
    message = usage_error("test/odd-v0")
    assert what in message and "continuous vectors only" in message


def test_minari_malformed_episodes() -> None:
    write_minari("test/short-v0", [TWO_ENDINGS[0], episode(column(0, 1), [1, 2], True)])
    assert "episode 1: observations has 2 rows, not the 2 of rewards and one more" in usage_error("test/short-v0")
    write_minari("test/nan-v0", [TWO_ENDINGS[0], episode(column(0, np.nan, 3), [1, 2], True)])
    assert "observations has NaN or infinity, first in row 4" in usage_error("test/nan-v0")
    write_minari("test/none-v0", [])
    assert "empty" in usage_error("test/none-v0")
    unbounded = spaces.Box(-np.inf, np.inf, (1,))
    write_minari("test/unbounded-v0", TWO_ENDINGS, action_space=unbounded)
    assert "finite bounds" in usage_error("test/unbounded-v0")


def test_minari_damaged_file() -> None:
    directory = write_minari("test/cut-v0", TWO_ENDINGS)
    file = directory / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    assert "test/cut-v0 is damaged" in usage_error("test/cut-v0")
    (directory / "data" / "metadata.json").write_text("{")
    assert "test/cut-v0 is damaged" in usage_error("test/cut-v0")
    assert not list(directory.glob("*flat*"))


# The cache


def test_cache_follows_the_source() -> None:
    import minari

    directory = write_minari("test/two-v0", TWO_ENDINGS)
    datasets.load("test/two-v0")
    (cache,) = directory.glob("flat-*")
    assert list(minari.list_local_datasets()) == ["test/two-v0"]
    np.save(cache / "rewards.npy", np.float32([9] * 6))
    assert datasets.load("test/two-v0").transitions.rewards.tolist() == [9] * 6  # it is what is read
    with h5py.File(directory / "data" / "main_data.hdf5", "a") as file:
        file["episode_0/rewards"][0] = 100.0
    os.utime(directory / "data" / "main_data.hdf5", ns=(1, 1))
    assert datasets.load("test/two-v0").transitions.rewards[0] == 100.0
    (new,) = directory.glob("*flat-*")
    assert new != cache


@pytest.mark.parametrize("damage", ["short", "gone", "json"])
def test_damaged_cache_is_replaced(damage: str) -> None:
    directory = write_minari("test/two-v0", TWO_ENDINGS)
    datasets.load("test/two-v0")
    (cache,) = directory.glob("flat-*")
    if damage == "short":
        (cache / "rewards.npy").write_bytes((cache / "rewards.npy").read_bytes()[:-3])
    elif damage == "gone":
        (cache / "actions.npy").unlink()
    else:
        (cache / "about.json").write_text("")
    for _ in range(2):
        assert datasets.load("test/two-v0").transitions.rewards.tolist() == [1, 2, 3, 4, 5, 6]
    assert datasets._read_cache(directory, cache.name.removeprefix("flat-")) is not None


def test_no_cache_where_none_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_minari("test/two-v0", TWO_ENDINGS)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(datasets.load("test/two-v0").transitions.rewards) == 6
    assert [path.name for path in directory.iterdir()] == ["data"]


def test_loading_is_fast() -> None:
    """100 episodes of 1,000 steps, a tenth of what is to take 2 s, or 0.3 s from the cache; time of the processor."""
    observations, rewards = np.zeros((1001, 17)), np.zeros(1000)
    recorded = episode(observations, rewards, truncated=True, actions=np.zeros((1000, 6), np.float32))
    space, actions = spaces.Box(-np.inf, np.inf, (17,), np.float64), spaces.Box(-1, 1, (6,))
    write_minari("test/long-v0", [recorded] * 100, space, actions)
    start = time.process_time()
    assert len(datasets.load("test/long-v0").transitions.rewards) == 100_000
    cold = time.process_time() - start
    datasets.load("test/long-v0")
    assert cold < 1.0 and time.process_time() - start - cold < 0.1


# .npz


def test_npz_rows(tmp_path: Path) -> None:
    arrays = good_npz() | {"terminations": np.array([0, 1, 0, 0, 0]), "truncations": np.array([0, 0, 0, 1, 0])}
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = datasets.load(str(tmp_path / "mine.npz"))
    for name, array in dataset.transitions._asdict().items():
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))
    assert (dataset.env_spec, dataset.env_id, dataset.domain) == (None, None, None)
    assert len(datasets.episode_slices(dataset.transitions)) == 3


def test_npz_without_truncations(tmp_path: Path) -> None:
    arrays = good_npz()
    del arrays["truncations"]
    np.savez(tmp_path / "mine.npz", **arrays)
    assert datasets.load(str(tmp_path / "mine.npz")).transitions.truncations.tolist() == [0] * 5


def test_npz_actions_are_rescaled_from_the_environment(tmp_path: Path) -> None:
    arrays = good_npz() | {"actions": np.full((5, 1), 1.5)}
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = datasets.load(str(tmp_path / "mine.npz"), env="Pendulum-v1")  # bounded by 2
    np.testing.assert_allclose(dataset.transitions.actions, 0.75)
    assert dataset.action_high.tolist() == [2] and dataset.env_id == "Pendulum-v1" and dataset.domain is None
    assert "actions are out of the environment's bounds" in usage_error(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": np.array([0, 1, np.nan, 0, np.nan])}, "rewards has NaN or infinity, first in row 2"),
        ({"next_observations": np.full((5, 3), np.inf)}, "next_observations has NaN or infinity, first in row 0"),
        ({"observations": np.full((5, 3), 1e300)}, "observations has NaN or infinity"),  # infinite as float32
        ({"actions": np.zeros((4, 2))}, "actions has 4 rows and rewards has 5"),
        ({"next_observations": np.zeros((5, 2))}, "must be equal"),
        ({"actions": np.zeros(5)}, "actions has shape [5]"),
        ({"observations": np.zeros((5, 8, 8, 3), np.uint8)}, "continuous vectors only"),
        ({"rewards": np.zeros((5, 1))}, "rewards has shape [5, 1]"),
        ({"rewards": np.array(1.0)}, "rewards has shape []"),
        ({"rewards": np.array(["a"] * 5)}, "not numbers"),
        ({"actions": np.zeros((5, 0))}, "at least one number"),
        ({"terminations": np.array([0, 0, 2, 0, 0])}, "terminations must be 0 or 1, row 2 is 2"),
        ({"actions": np.full((5, 2), -1.01)}, "first in row 0: -1.01 is not in [-1, 1]; clip them"),
    ],
)
def test_npz_bad_arrays(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **good_npz() | change)
    assert message in usage_error(str(tmp_path / "bad.npz"))


def test_bounds_have_a_float_tolerance(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **good_npz() | {"actions": np.full((5, 2), 1 + 1e-6)})
    assert datasets.load(str(tmp_path / "mine.npz")).transitions.actions.max() == 1.0


def test_npz_that_names_its_environment(tmp_path: Path) -> None:
    arrays = good_npz() | {"actions": np.full((5, 1), 1.5), "env": np.array("Pendulum-v1")}  # bounded by 2
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = datasets.load(str(tmp_path / "mine.npz"))
    assert dataset.env_spec == dataset.env_id == "Pendulum-v1"
    assert dataset.transitions.actions.tolist() == [[0.75]] * 5
    other = usage_error(str(tmp_path / "mine.npz"), "MountainCarContinuous-v0")
    assert "1.5 is not in [-1, 1]" in other, "--env comes first"


def test_npz_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    assert "there is no file" in usage_error(str(path))
    np.savez(path, **good_npz(0))
    assert "is empty" in usage_error(str(path))
    np.savez(path, **good_npz() | {"rewards": np.array([{}] * 5)})
    assert "pickled objects, which are never loaded" in usage_error(str(path))
    path.write_bytes(pickle.dumps(good_npz()))
    assert "not an .npz file" in usage_error(str(path))
    arrays = good_npz(500)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue()[:-2000])
    assert "damaged" in usage_error(str(path))
    path.write_bytes(buffer.getvalue().replace(arrays["rewards"].tobytes(), bytes(8 * 500)))
    assert "damaged" in usage_error(str(path))  # another content than the archive's checksum says
    path.write_bytes(b"")
    assert "damaged" in usage_error(str(path))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert "not an .npz file" in usage_error(str(path))
    del arrays["next_observations"]
    np.savez(path, **arrays)
    assert "no array next_observations" in usage_error(str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["bad.npz"]


# D4RL


def write_d4rl(path: Path, **arrays: Any) -> str:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["infos/qpos"] = np.zeros((len(arrays["rewards"]), 2))
    return str(path)


def d4rl_arrays(terminals: list[int], timeouts: list[int] | None) -> dict[str, np.ndarray]:
    size = len(terminals)
    arrays = {
        "observations": column(*range(size)),
        "actions": np.zeros((size, 1), np.float32),
        "rewards": np.arange(size, dtype=np.float32),
        "terminals": np.array(terminals, bool),
    }
    return arrays if timeouts is None else arrays | {"timeouts": np.array(timeouts, bool)}


def test_d4rl_without_next_observations(tmp_path: Path) -> None:
    #               rows: 0  1  2 | 3  4  5 | 6 | 7  8 | 9 | 10 11
    terminals, timeouts = [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0]
    dataset = datasets.load(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", **d4rl_arrays(terminals, timeouts)))
    data = dataset.transitions
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 7, 8, 10]  # not those with a timeout, nor the last, unfinished one
    assert data.observations[:, 0].tolist() == data.rewards.tolist()
    assert data.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 11]  # a terminal row's own, never the next's
    assert data.terminations.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert data.truncations.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert datasets.episode_slices(data).tolist() == [[0, 3], [3, 5], [5, 7], [7, 8]]
    assert (dataset.env_spec, dataset.env_id, dataset.domain) == ("Hopper-v4", "Hopper-v4", "hopper")


def test_d4rl_terminal_last_row_is_kept(tmp_path: Path) -> None:
    data = datasets.load(write_d4rl(tmp_path / "a.hdf5", **d4rl_arrays([0, 0, 1], [0, 0, 0]))).transitions
    assert data.rewards.tolist() == [0, 1, 2] and data.terminations.tolist() == [0, 0, 1]


def test_d4rl_with_next_observations(tmp_path: Path) -> None:
    arrays = d4rl_arrays([0, 1, 0, 0], [0, 0, 0, 1]) | {"next_observations": column(100, 101, 102, 103)}
    data = datasets.load(write_d4rl(tmp_path / "a.hdf5", **arrays)).transitions
    assert data.next_observations[:, 0].tolist() == [100, 101, 102, 103]
    assert data.terminations.tolist() == [0, 1, 0, 0] and data.truncations.tolist() == [0, 0, 0, 1]


def test_d4rl_version_0_counts_to_1000(tmp_path: Path) -> None:
    terminals = np.zeros(3500, int)
    terminals[[499, 1999]] = 1  # episodes: 500 to a terminal, 1,000, 500 to a terminal, 1,000, an unfinished 500
    data = datasets.load(
        write_d4rl(tmp_path / "walker2d_medium.hdf5", **d4rl_arrays(list(terminals), None))
    ).transitions
    assert len(data.rewards) == 3500 - 3
    assert data.rewards[np.flatnonzero(data.terminations)].tolist() == [499, 1999]
    assert data.rewards[np.flatnonzero(data.truncations)].tolist() == [1498, 2998, 3498 - 0]


def test_d4rl_terminal_at_step_1000_is_a_terminal(tmp_path: Path) -> None:
    terminals = [0] * 999 + [1] + [0] * 5
    with_next = d4rl_arrays(terminals, None) | {"next_observations": column(*range(1, 1006))}
    data = datasets.load(write_d4rl(tmp_path / "a.hdf5", **with_next)).transitions
    assert np.flatnonzero(data.terminations).tolist() == [999] and data.truncations.sum() == 0


@pytest.mark.parametrize(
    ("name", "env_id", "domain"),
    [("halfcheetah_medium_expert-v2", "HalfCheetah-v4", "halfcheetah"), ("walker2d_random", "Walker2d-v4", "walker2d"),
     ("ant_medium-v2", "Ant-v4", "ant"), ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse", None,
     "antmaze"), ("antmaze-umaze-v2", None, "antmaze"), ("maze2d-umaze-sparse-v1", None, "maze2d-umaze"),
     ("maze2d-umaze-dense-v1", None, None), ("door-human-v1", None, "door"), ("pen_cloned", None, "pen"),
     ("mini_kitchen_microwave_kettle_light_slider-v0", None, "kitchen"), ("hoppers", None, None)],
)  # fmt: skip
def test_d4rl_file_names(tmp_path: Path, name: str, env_id: str | None, domain: str | None) -> None:
    dataset = datasets.load(write_d4rl(tmp_path / f"{name}.hdf5", **d4rl_arrays([0, 0, 1], [0, 0, 0])))
    assert (dataset.env_id, dataset.domain) == (env_id, domain)


def test_d4rl_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.hdf5"
    assert "there is no file" in usage_error(str(path))
    path.write_text("hello")
    assert "not an HDF5 file" in usage_error(str(path))
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0])
    write_d4rl(path, **arrays)
    path.write_bytes(path.read_bytes()[:2500])
    assert "bad.hdf5" in usage_error(str(path))
    write_d4rl(path, **{name: array for name, array in arrays.items() if name != "terminals"})
    assert "no array terminals" in usage_error(str(path))
    write_d4rl(path, **arrays | {"actions": np.zeros((2, 1))})
    assert "actions has shape [2, 1] and rewards [3]" in usage_error(str(path))
    write_d4rl(path, **arrays | {"timeouts": np.zeros(2, bool)})
    assert "timeouts has shape [2] and rewards [3]" in usage_error(str(path))
    write_d4rl(path, **arrays | {"terminals": np.zeros((3, 2), bool)})
    assert "terminals must have one flag per row" in usage_error(str(path))
    write_d4rl(path, **{name: array[:0] for name, array in arrays.items()})
    assert "is empty" in usage_error(str(path))
    write_d4rl(path, **arrays | {"observations": np.array([[0], [np.nan], [0]])})
    assert "observations has NaN or infinity, first in row 1" in usage_error(str(path))
    write_d4rl(path, **arrays | {"next_observations": np.zeros((2, 1))})
    assert "next_observations has shape [2, 1] and rewards [3]" in usage_error(str(path))


# Ids and the network


@pytest.mark.parametrize(
    "name", ["", "hopper", "mujoco/hopper/medium", "a b-v0", "../x-v0", "x.txt", "hopper-v", "/a-v0"]
)
def test_malformed_ids(name: str) -> None:
    assert "neither a dataset id" in usage_error(name)


def test_no_network_is_said_within_seconds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server here takes the connection and never answers, as a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "*")
        start = time.perf_counter()
        message = usage_error("mujoco/hopper/medium-v0")
        assert time.perf_counter() - start < 5
    assert "cannot be reached" in message and "offax/..." in message
    assert not root.exists()


def test_failed_download_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    def download(dataset_id: str) -> None:
        path = Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id / "data"
        path.mkdir(parents=True)
        (path / "part").write_text("x")
        raise ValueError("Couldn't find any version")

    monkeypatch.setattr(datasets, "_server_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", download)
    assert "cannot download mujoco/hopper/none-v0: Couldn't find" in usage_error("mujoco/hopper/none-v0")
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["mujoco-hopper-none-v0.lock"]


def test_download_is_moved_into_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    monkeypatch.setattr(datasets, "_server_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", lambda dataset_id: write_minari(dataset_id, TWO_ENDINGS))
    assert len(datasets.load("far/away-v0").transitions.rewards) == 6
    assert list(minari.list_local_datasets()) == ["far/away-v0"]


# Command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.main([])
    assert "offax/walker2d/mixed-v0" in capsys.readouterr().out
    np.savez(tmp_path / "mine.npz", **good_npz() | {"rewards": np.arange(5.0), "terminations": np.arange(5) == 4})
    datasets.main(["stats", str(tmp_path / "mine.npz")])
    row = capsys.readouterr().out.splitlines()[3].split()
    assert [cell for cell in row if cell != "│"][1:] == ["-", "5", "1", "10.0", "10.0", "10.0", "-", "1.000"]
    with pytest.raises(SystemExit, match="2"):
        datasets.main(["stats", "nothing"])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: 'nothing' is neither") and captured.err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        datasets.main(["build", "offax/nothing-v0"])


def test_help_is_quick() -> None:
    """In time of the processor: a busy machine is no fault of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "common.datasets", "stats", "--help"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(datasets.__file__).parent.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_metadata_of_older_gymnasium_is_understood() -> None:
    text = json.loads(gym.spec("Hopper-v5").to_json()) | {"autoreset": False, "apply_api_compatibility": False}
    spec = datasets._env_spec(json.dumps(text))
    assert spec is not None and spec.id == "Hopper-v5" and spec.max_episode_steps == 1000
