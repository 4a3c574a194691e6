"""Loading: hand-built files whose rows are known, and every bad input in one line."""

import copy
import io
import json
import os
import pickle
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from test_environments import UNFIT

from benchmarks import offax_sets, sources
from benchmarks.datasets import on_disk, plain_id, write_npz
from benchmarks.families import domain_of
from common.cli import UsageError
from common.data import load
from common.replay import Transitions, episode_returns

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
    return sources.datasets_root() / name


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


class Any1(gym.Env):
    """One observation, one action in [-1, 1]: where datasets name no environment."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,), np.float64), UNIT


class Any32(gym.Env):
    """Three observations, two actions."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(gym.registry)
    for kind in (Any1, Any32):
        gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=100)
    yield
    for name in gym.registry.keys() - before.keys():
        del gym.registry[name]


def usage_error(name: str, env: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load(name, env)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Minari


def test_minari_rows() -> None:
    write_minari("test/two-v0", TWO_ENDINGS)
    data = load("test/two-v0", "Any1-v0").transitions
    assert data.observations[:, 0].tolist() == [0, 1, 2, 10, 11, 20]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 11, 12, 21]
    assert data.actions[:, 0].tolist() == [-1, 0, 1, -1, 1, -1]
    assert data.rewards.tolist() == [1, 2, 3, 4, 5, 6]
    assert data.terminations.tolist() == [0, 0, 1, 0, 0, 0]
    assert data.truncations.tolist() == [0, 0, 0, 0, 1, 1]  # the last had no flag
    assert all(getattr(data, name).dtype == np.float32 for name in Transitions._fields)


def test_environment_comes_from_the_dataset_and_may_be_replaced() -> None:
    env = gym.make("Hopper-v5")
    observations = np.stack([env.reset(seed=i)[0] for i in range(3)])
    recorded = episode(observations, [1, 1], truncated=True, actions=np.zeros((2, 3), np.float32))
    write_minari("test/hopper-v0", [recorded], env.observation_space, env.action_space, env="Hopper-v5")
    dataset = load("test/hopper-v0")
    assert (domain_of(dataset.env_spec), dataset.env_spec.id, dataset.id) == ("hopper", "Hopper-v5", "test/hopper-v0")
    assert gym.make(dataset.env_spec).spec.max_episode_steps == 1000
    other = load("test/hopper-v0", env="Hopper-v4")
    assert (other.env_spec, domain_of(other.env_spec)) == ("Hopper-v4", "hopper")
    message = usage_error("test/hopper-v0", "Walker2d-v5")
    assert "11 observations" in message and "Walker2d-v5 has 17" in message
    assert "Nothing-v0" in usage_error("test/hopper-v0", "Nothing-v0")


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
    gym.register("Goal-v0", entry_point=Goal, max_episode_steps=9)
    data = load("test/goal-v0", "Goal-v0").transitions
    np.testing.assert_array_equal(data.observations, expected[:3])
    np.testing.assert_array_equal(data.next_observations, expected[1:])


def test_actions_are_rescaled_from_the_bounds() -> None:
    space = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    actions = np.float32([[-2, 0], [0, 5], [2, 10], [1, 2.5]])
    write_minari("test/scaled-v0", [episode(column(*range(5)), [0] * 4, True, actions=actions)], action_space=space)

    class Scaled(Any1):
        action_space = space

    gym.register("Scaled-v0", entry_point=Scaled, max_episode_steps=9)
    dataset = load("test/scaled-v0", "Scaled-v0")
    np.testing.assert_allclose(dataset.transitions.actions, [[-1, -1], [0, 0], [1, 1], [0.5, -0.5]], atol=1e-6)
    assert dataset.low.tolist() == [-2, 0] and dataset.high.tolist() == [2, 10]


@pytest.mark.parametrize("name", [name for name in UNFIT if name != "sequence"])  # Minari has no such sets
def test_spaces_that_do_not_fit(name: str) -> None:
    """The same as of environments, whatever is in the files."""
    actions, observations, words = UNFIT[name]
    directory = write_minari("test/odd-v0", TWO_ENDINGS)
    from minari.serialization import serialize_space

    path = directory / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    for key, space in (("action_space", actions), ("observation_space", observations)):
        if space is not None:
            metadata[key] = serialize_space(space)
    path.write_text(json.dumps(metadata))
    message = usage_error("test/odd-v0", "Any1-v0")
    assert words in message and "test/odd-v0" in message


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_minari_flags_may_be_numbers(dtype: type) -> None:
    """As of sets made from one's own buffers; an episode without a flag at its end is cut there."""
    flags = ("terminations", "truncations")
    episodes = [one | {name: one[name].astype(dtype) for name in flags} for one in TWO_ENDINGS]
    write_minari("test/numbers-v0", episodes)
    found = load("test/numbers-v0", "Any1-v0").transitions
    assert found.terminations.tolist() == [0, 0, 1, 0, 0, 0] and found.truncations.tolist() == [0, 0, 0, 0, 1, 1]


def test_minari_malformed_episodes() -> None:
    write_minari("test/short-v0", [TWO_ENDINGS[0], episode(column(0, 1), [1, 2], True)])
    message = usage_error("test/short-v0", "Any1-v0")
    assert "episode 1" in message and "observations" in message
    write_minari("test/nan-v0", [TWO_ENDINGS[0], episode(column(0, np.nan, 3), [1, 2], True)])
    assert "observations has NaN or infinity, first in row 4" in usage_error("test/nan-v0", "Any1-v0")
    write_minari("test/none-v0", [])
    assert "test/none-v0" in usage_error("test/none-v0", "Any1-v0")


def test_minari_damaged_file() -> None:
    directory = write_minari("test/cut-v0", TWO_ENDINGS)
    file = directory / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    assert "damaged" in usage_error("test/cut-v0", "Any1-v0")
    (directory / "data" / "metadata.json").write_text("{")
    assert "damaged" in usage_error("test/cut-v0", "Any1-v0")


def test_a_dataset_without_its_environment_needs_one() -> None:
    write_minari("test/two-v0", TWO_ENDINGS)
    assert "--env" in usage_error("test/two-v0")


def test_loading_is_fast() -> None:
    """100 episodes of 1,000 steps, a tenth of what is to take seconds; time of the processor."""
    observations, rewards = np.zeros((1001, 11)), np.zeros(1000)
    recorded = episode(observations, rewards, truncated=True, actions=np.zeros((1000, 3), np.float32))
    space, actions = spaces.Box(-np.inf, np.inf, (11,), np.float64), spaces.Box(-1, 1, (3,))
    write_minari("test/long-v0", [recorded] * 100, space, actions)
    start = time.process_time()
    assert len(load("test/long-v0", "Hopper-v5").transitions.rewards) == 100_000
    assert time.process_time() - start < 1.5


# .npz


def test_npz_rows(tmp_path: Path) -> None:
    arrays = good_npz() | {"terminations": np.array([0, 1, 0, 0, 0]), "truncations": np.array([0, 0, 0, 1, 0])}
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = load(str(tmp_path / "mine.npz"), "Any32-v0")
    for name in Transitions._fields:
        np.testing.assert_array_equal(getattr(dataset.transitions, name), arrays[name].astype(np.float32))
    assert (dataset.env_spec, domain_of(dataset.env_spec)) == ("Any32-v0", None)
    assert len(episode_returns(dataset.transitions)) == 3
    about = dataset.describe()
    assert (about["environment"], about["transitions"], about["dataset_returns"]["episodes"]) == ("Any32-v0", 5, 3)
    assert about["dataset_returns"]["mean"] == pytest.approx(arrays["rewards"].sum() / 3, rel=1e-5)


def test_a_checksum_tells_two_datasets_of_one_name_apart(tmp_path: Path) -> None:
    arrays, found = good_npz(), []
    flags = [{name: 1 - arrays[name]} for name in ("terminations", "truncations")]
    for changed in ({}, {}, {"rewards": arrays["rewards"] + 1}, {"actions": -arrays["actions"]}, *flags):
        np.savez(tmp_path / "mine.npz", **arrays | changed)
        found.append(load(str(tmp_path / "mine.npz"), "Any32-v0").describe()["dataset_sha256"])
    assert found[0] == found[1] and len(set(found)) == 5


def test_without_the_dataset_an_environment_is_enough() -> None:
    """What training online from scratch needs: nothing is read."""
    dataset = load("no/such/set-v0", "Pendulum-v1", only_env=True)
    assert dataset.transitions.observations.shape == (0, 3) and dataset.transitions.actions.shape == (0, 1)
    assert (dataset.env_spec, dataset.low.tolist(), dataset.high.tolist()) == ("Pendulum-v1", [-2], [2])
    assert dataset.describe()["transitions"] == 0


def test_npz_without_truncations_is_cut_where_rows_do_not_follow_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that returns are those of episodes; the last row, without an end, is cut as well."""
    x = np.arange(18.0).reshape(6, 3)
    arrays = {name: array[:1].repeat(5, axis=0) for name, array in good_npz().items() if name != "truncations"}
    arrays |= {"observations": x[:5].copy(), "next_observations": x[1:].copy(), "terminations": np.zeros(5)}
    arrays["terminations"][1] = 1
    arrays["next_observations"][[1, 3]] = -1  # a terminal state, and the last of a cut episode
    np.savez(tmp_path / "mine.npz", **arrays)
    transitions = load(str(tmp_path / "mine.npz"), "Any32-v0").transitions
    assert transitions.truncations.tolist() == [0, 0, 0, 1, 1] and transitions.truncations.dtype == np.float32
    assert "no truncations: 2 found" in capsys.readouterr().err
    np.savez(tmp_path / "mine.npz", **arrays, truncations=np.zeros(5))
    assert not load(str(tmp_path / "mine.npz"), "Any32-v0").transitions.truncations.any()
    assert "1 rows are not followed by their next observation" in capsys.readouterr().err
    np.savez(tmp_path / "mine.npz", **arrays, truncations=transitions.truncations)
    load(str(tmp_path / "mine.npz"), "Any32-v0")
    assert capsys.readouterr().err == ""
    np.savez(tmp_path / "mine.npz", **arrays | {"next_observations": x[1:], "terminations": np.zeros(5)})
    transitions = load(str(tmp_path / "mine.npz"), "Any32-v0").transitions
    assert transitions.truncations.tolist() == [0, 0, 0, 0, 1], "one episode from the first row to the last"


def test_npz_actions_are_rescaled_from_the_environment(tmp_path: Path) -> None:
    arrays = good_npz() | {"actions": np.full((5, 1), 1.5)}
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = load(str(tmp_path / "mine.npz"), env="Pendulum-v1")  # bounded by 2
    np.testing.assert_allclose(dataset.transitions.actions, 0.75)
    assert dataset.high.tolist() == [2] and domain_of(dataset.env_spec) is None


def test_no_time_limit_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gym.register("OffaxTest/Endless-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv")
    np.savez(tmp_path / "mine.npz", **good_npz() | {"actions": np.zeros((5, 1))})
    load(str(tmp_path / "mine.npz"), env="OffaxTest/Endless-v0")
    load(str(tmp_path / "mine.npz"), env="Pendulum-v1")
    load("none", env="OffaxTest/Endless-v0", only_env=True)
    del gym.registry["OffaxTest/Endless-v0"]
    assert capsys.readouterr().err.count("no time limit") == 2, "once for each that has none"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": np.array([0, 1, np.nan, 0, np.nan])}, ["rewards", "NaN or infinity", "row 2"]),
        ({"next_observations": np.full((5, 3), np.inf)}, ["next_observations", "NaN or infinity", "row 0"]),
        ({"observations": np.full((5, 3), 1e300)}, ["observations", "infinity"]),  # infinite as float32
        ({"actions": np.zeros((4, 2))}, ["actions", "4"]),
        ({"next_observations": np.zeros((5, 2))}, ["next_observations"]),
        ({"actions": np.zeros(5)}, ["actions", "[5]"]),
        ({"observations": np.zeros((5, 8, 8, 3), np.uint8)}, ["observations", "[5, 8, 8, 3]"]),
        ({"rewards": np.zeros((5, 1))}, ["rewards", "[5, 1]"]),
        ({"rewards": np.array(1.0)}, ["bad.npz"]),
        ({"rewards": np.zeros(4)}, ["observations is", "[5, 3]", "numbers [4, width], a row for each reward"]),
        ({"rewards": np.array(["a"] * 5)}, ["rewards", "numbers"]),
        ({"actions": np.zeros((5, 0))}, ["actions", "[5, 0]"]),
        ({"actions": np.zeros((5, 3))}, ["actions", "3"]),
        ({"terminations": np.array([0, 0, 2, 0, 0])}, ["terminations must be 0 or 1, row 2 is 2"]),
        ({"actions": np.full((5, 2), -1.01)}, ["row 0: -1.01 is not in [-1, 1]"]),
    ],
)
def test_npz_bad_arrays(tmp_path: Path, change: dict[str, np.ndarray], words: list[str]) -> None:
    np.savez(tmp_path / "bad.npz", **good_npz() | change)
    message = usage_error(str(tmp_path / "bad.npz"), "Any32-v0")
    assert all(word in message for word in words), message


def test_bounds_have_a_float_tolerance(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **good_npz() | {"actions": np.full((5, 2), 1 + 1e-6)})
    assert load(str(tmp_path / "mine.npz"), "Any32-v0").transitions.actions.max() == 1.0


def test_npz_that_names_its_environment(tmp_path: Path) -> None:
    arrays = good_npz() | {"actions": np.full((5, 1), 1.5), "env": np.array("Pendulum-v1")}  # bounded by 2
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = load(str(tmp_path / "mine.npz"))
    assert dataset.env_spec == "Pendulum-v1"
    assert dataset.transitions.actions.tolist() == [[0.75]] * 5
    other = usage_error(str(tmp_path / "mine.npz"), "MountainCarContinuous-v0")
    assert "1.5 is not in [-1, 1]" in other, "--env comes first"
    np.savez(tmp_path / "nameless.npz", **good_npz(), env=np.array([]))
    assert "--env" in usage_error(str(tmp_path / "nameless.npz"))


def test_a_folder_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    assert "there is no file" in usage_error(str(tmp_path / "folder.npz"))


def test_npz_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.npz"
    assert "there is no file" in usage_error(str(path))
    with monkeypatch.context() as patch:  # a path of the user's home
        patch.setenv("HOME", str(tmp_path / "none"))
        assert str(tmp_path / "none") in usage_error("~/bad.npz")
    np.savez(path, **good_npz(0))
    assert "bad.npz" in usage_error(str(path))
    np.savez(path, **good_npz() | {"rewards": np.array([{}] * 5)})
    assert "pickled objects, which are never loaded" in usage_error(str(path))
    path.write_bytes(pickle.dumps(good_npz()))
    assert "no .npz" in usage_error(str(path))
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
    assert "no .npz" in usage_error(str(path))
    del arrays["next_observations"]
    np.savez(path, **arrays)
    assert "no array next_observations" in usage_error(str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["bad.npz"]


# D4RL


def read_d4rl(path: str) -> Transitions:
    return load(path, "Any1-v0").transitions


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
    data = read_d4rl(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", **d4rl_arrays(terminals, timeouts)))
    assert data.rewards.tolist() == [0, 1, 2, 3, 4, 7, 8, 10]  # not those with a timeout, nor the last, unfinished one
    assert data.observations[:, 0].tolist() == data.rewards.tolist()
    assert data.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 8, 8, 11]  # a terminal row's own, never the next's
    assert data.terminations.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert data.truncations.tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    assert episode_returns(data).tolist() == [3, 7, 15, 10]


def test_d4rl_terminal_last_row_is_kept(tmp_path: Path) -> None:
    data = read_d4rl(write_d4rl(tmp_path / "a.hdf5", **d4rl_arrays([0, 0, 1], [0, 0, 0])))
    assert data.rewards.tolist() == [0, 1, 2] and data.terminations.tolist() == [0, 0, 1]


def test_d4rl_terminal_rows_with_a_timeout_are_kept(tmp_path: Path) -> None:
    """As where timeouts mark every end of an episode."""
    data = read_d4rl(write_d4rl(tmp_path / "a.hdf5", **d4rl_arrays([0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1])))
    assert data.terminations.tolist() == [0, 0, 1, 0, 0, 1] and not data.truncations.any()
    assert data.next_observations[:, 0].tolist() == [1, 2, 2, 4, 5, 5]


def test_d4rl_with_next_observations(tmp_path: Path) -> None:
    arrays = d4rl_arrays([0, 1, 0, 0], [0, 0, 0, 1]) | {"next_observations": column(100, 101, 102, 103)}
    data = read_d4rl(write_d4rl(tmp_path / "a.hdf5", **arrays))
    assert data.next_observations[:, 0].tolist() == [100, 101, 102, 103]
    assert data.terminations.tolist() == [0, 1, 0, 0] and data.truncations.tolist() == [0, 0, 0, 1]


def test_d4rl_rows_that_break_off_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where two files with next_observations were joined in the middle of an episode."""
    arrays = d4rl_arrays([0, 0, 0, 0], [0, 0, 0, 1]) | {"next_observations": column(1, 7, 3, 4)}
    assert not read_d4rl(write_d4rl(tmp_path / "a.hdf5", **arrays)).truncations[1]
    assert "1 rows are not followed by their next observation" in capsys.readouterr().err


def test_d4rl_files_without_timeouts_are_refused(tmp_path: Path) -> None:
    """Those of version 0: where their episodes were cut is not on record."""
    path = write_d4rl(tmp_path / "walker2d_medium.hdf5", **d4rl_arrays([0] * 9 + [1], None))
    assert "timeouts" in usage_error(path, "Any1-v0")


def test_a_timeout_at_a_terminal_is_a_terminal(tmp_path: Path) -> None:
    arrays = d4rl_arrays([0, 1, 0, 1], [0, 1, 0, 0]) | {"next_observations": column(1, 2, 3, 4)}
    data = read_d4rl(write_d4rl(tmp_path / "a.hdf5", **arrays))
    assert data.terminations.tolist() == [0, 1, 0, 1] and data.truncations.tolist() == [0, 0, 0, 0]


SIZES = {"HalfCheetah-v4": (17, 6), "Hopper-v4": (11, 3), "Walker2d-v4": (17, 6), "Ant-v4": (27, 8)}


def sized_d4rl(obs_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0])
    return arrays | {"observations": np.zeros((3, obs_dim)), "actions": np.zeros((3, action_dim))}


@pytest.mark.parametrize(
    ("name", "env_id", "domain"),
    [("halfcheetah_medium_expert-v2", "HalfCheetah-v4", "halfcheetah"), ("walker2d_random", "Walker2d-v4", "walker2d"),
     ("Hopper_medium", "Hopper-v4", "hopper"), ("ant_medium-v2", "Ant-v4", "ant")],
)  # fmt: skip
def test_d4rl_files_that_name_their_environment(tmp_path: Path, name: str, env_id: str, domain: str) -> None:
    dataset = load(write_d4rl(tmp_path / f"{name}.hdf5", **sized_d4rl(*SIZES[env_id])))
    assert (getattr(dataset.env_spec, "id", dataset.env_spec), domain_of(dataset.env_spec)) == (env_id, domain)


def test_d4rls_ant_has_contact_forces(tmp_path: Path) -> None:
    dataset = load(write_d4rl(tmp_path / "ant_medium-v2.hdf5", **sized_d4rl(111, 8)))
    assert dataset.env_spec.id == "Ant-v4" and dataset.env_spec.kwargs["use_contact_forces"] is True
    env = gym.make(dataset.env_spec)
    assert env.observation_space.shape == (111,) and domain_of(dataset.env_spec) == "ant"
    assert "use_contact_forces" not in gym.spec("Ant-v4").kwargs, "gymnasium's own is as it was"


@pytest.mark.parametrize(
    "name",
    ["Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse", "antmaze-umaze-v2", "ant-maze-umaze",
     "maze2d-umaze-sparse-v1", "door-human-v1", "pen_cloned", "mini_kitchen_microwave_kettle_light_slider-v0",
     "hoppers", "other"],
)  # fmt: skip
def test_d4rl_files_without_an_environment(tmp_path: Path, name: str) -> None:
    path = write_d4rl(tmp_path / f"{name}.hdf5", **d4rl_arrays([0, 0, 1], [0, 0, 0]))
    assert "--env" in usage_error(path)
    assert load(path, "Any1-v0").env_spec == "Any1-v0"


def test_d4rl_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.hdf5"

    def refused(*words: str, **changed: Any) -> None:
        kept = {name: array for name, array in (arrays | changed).items() if array is not None}
        write_d4rl(path, **kept)
        message = usage_error(str(path), "Any1-v0")
        assert all(word in message for word in (*words, "bad.hdf5")), message

    assert "there is no file" in usage_error(str(path))
    path.write_text("hello")
    assert "bad.hdf5" in usage_error(str(path))
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0])
    write_d4rl(path, **arrays)
    path.write_bytes(path.read_bytes()[:2500])
    assert "bad.hdf5" in usage_error(str(path))
    refused("no array terminals", terminals=None)
    refused("actions", actions=np.zeros((2, 1)))
    refused("timeouts", timeouts=np.zeros(2, bool))
    refused("terminals", terminals=np.zeros((3, 2), bool))
    refused(**{name: array[:0] for name, array in arrays.items()})
    refused("observations has NaN or infinity, first in row 1", observations=np.array([[0], [np.nan], [0]]))
    refused("next_observations", next_observations=np.zeros((2, 1)))


# Ids and the network


@pytest.mark.parametrize(
    "name", ["", "hopper", "mujoco/hopper/medium", "a b-v0", "../x-v0", "x.txt", "hopper-v", "/a-v0"]
)
def test_malformed_ids(name: str) -> None:
    assert "neither a Minari id" in usage_error(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hopper-medium-v2", "D4RL's sets are, which are read from their files"),
        ("halfcheetah-medium-expert-v2", "the path of its .hdf5"),
        ("Hopper-v5", "--env Hopper-v5 --num-updates 0 --online-steps"),
    ],
)
def test_names_of_habit_lead_on_without_a_server(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(sources, "_server_answers", pytest.fail)
    assert words in usage_error(name) and not root.exists()


def test_no_network_is_said_within_seconds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server here takes the connection and never answers, as a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "*")
        assert offax_sets.NETWORK_SECONDS < 5
        monkeypatch.setattr(offax_sets, "NETWORK_SECONDS", 0.2)
        start = time.perf_counter()
        message = usage_error("mujoco/hopper/medium-v0")
        assert time.perf_counter() - start < 2
    assert "cannot be had" in message and "offax/..." in message
    assert not root.exists()


def test_failed_download_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    def download(dataset_id: str, force_download: bool) -> None:
        raise ValueError("Couldn't find any version\nof it")

    monkeypatch.setattr(sources, "_server_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", download)
    assert "cannot download mujoco/hopper/none-v0: Couldn't find" in usage_error("mujoco/hopper/none-v0")


def test_what_is_missing_is_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    def download(name: str, force_download: bool) -> None:
        assert os.environ["MINARI_DATASETS_PATH"] == str(root), "Minari knows no ~"
        write_minari(name, TWO_ENDINGS)

    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("MINARI_DATASETS_PATH", f"~/{root.name}")
    monkeypatch.setattr(sources, "_server_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", download)
    assert len(load("far/away-v0", "Any1-v0").transitions.rewards) == 6
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    assert list(minari.list_local_datasets()) == ["far/away-v0"]
    (root / "far").rename(root.parent / "scratch")  # a link to it, as where home is small
    (root / "far").symlink_to(root.parent / "scratch")
    (root.parent / "data").symlink_to(root)  # as the folders within a set are called
    for folder in (root.parent / "data", root):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
        assert list(on_disk()) == ["far/away-v0"]
    metadata = root / "far" / "away-v0" / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"hdf5"', '"arrow"'))
    assert "only sets in HDF5 are read" in usage_error("far/away-v0", "Any1-v0")


def test_of_processes_that_miss_a_set_one_downloads_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files come one by one, and those of a download that was cut off are completed."""
    import minari

    write_minari("near/by-v0", TWO_ENDINGS)
    far, calls = root / "far" / "away-v0" / "data", []
    far.mkdir(parents=True)  # what an earlier download left

    def download(dataset_id: str, force_download: bool) -> None:
        calls.append((dataset_id, force_download))
        for name in ("metadata.json", "main_data.hdf5"):
            shutil.copyfile(root / "near" / "by-v0" / "data" / name, far / name)
            time.sleep(0.2)

    monkeypatch.setattr(sources, "_server_answers", lambda: True)
    monkeypatch.setattr(minari, "download_dataset", download)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(load, ["far/away-v0"] * 3, ["Any1-v0"] * 3))
    assert [len(x.transitions.rewards) for x in found] == [6, 6, 6]
    assert calls == [("far/away-v0", True)], "unforced, Minari takes a directory for the set"


def test_sets_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Minari's and files alike; the first one names the environment, and all must be of it."""
    write_minari("test/two-v0", TWO_ENDINGS)
    one = {name: x[:, :1] if x.ndim == 2 else x for name, x in good_npz().items()}
    np.savez(tmp_path / "mine.npz", **one, env="Any1-v0")
    joined = load(f"{tmp_path / 'mine.npz'}+test/two-v0")
    assert (joined.env_spec, len(joined.transitions.rewards)) == ("Any1-v0", 5 + 6)
    np.testing.assert_array_equal(joined.transitions.rewards[:5], one["rewards"].astype(np.float32))
    assert joined.transitions.rewards[5:].tolist() == [1, 2, 3, 4, 5, 6]
    np.savez(tmp_path / "other.npz", **good_npz(), env="Any32-v0")
    assert "takes 1 actions" in usage_error(f"test/two-v0+{tmp_path / 'other.npz'}", "Any1-v0")
    gym.register("Else1-v0", entry_point=Any1, max_episode_steps=100)
    np.savez(tmp_path / "alike.npz", **one, env="Else1-v0")
    unlike = f"{tmp_path / 'mine.npz'}+{tmp_path / 'alike.npz'}"
    assert "sets of Any1-v0 and Else1-v0" in usage_error(unlike, None)
    assert len(load(unlike, "Any1-v0").transitions.rewards) == 10, "by --env they are of one"
    gym.register("Any1-v1", entry_point=Any1, max_episode_steps=100)
    np.savez(tmp_path / "later.npz", **one, env=np.array(["Any1-v1"]))
    capsys.readouterr()
    load(f"{tmp_path / 'mine.npz'}+{tmp_path / 'later.npz'}")
    assert "joins sets of Any1-v0 and Any1-v1: evaluated in the first" in capsys.readouterr().err
    whole = one | {name: np.zeros(5) for name in ("terminations", "truncations")}  # one episode, without an end
    for name, flags in (("a", whole), ("b", whole | {"terminations": np.eye(5)[4]})):
        np.savez(tmp_path / f"{name}.npz", **flags, env="Any1-v0")
    clipped = gym.wrappers.ClipReward(gym.make("Pendulum-v1"), -1, 1).spec
    for name, spec in (("plain", gym.spec("Pendulum-v1")), ("clipped", clipped)):
        write_minari(f"test/{name}-v0", TWO_ENDINGS, env=spec)
    assert "in other wrappers: none, and ClipReward" in usage_error("test/plain-v0+test/clipped-v0")
    found = load(f"{tmp_path / 'a.npz'}+{tmp_path / 'b.npz'}").transitions
    assert found.truncations.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0], "none goes on in the next set"
    np.savez(tmp_path / "a+b.npz", **one, env="Any1-v0")
    assert len(load(str(tmp_path / "a+b.npz")).transitions.rewards) == 5, "a file's own name"


def test_an_exported_set_is_the_same(tmp_path: Path) -> None:
    space = spaces.Box(np.float32([-2]), np.float32([6]))

    class Wide(Any1):
        action_space = space

    gym.register("Wide-v0", entry_point=Wide, max_episode_steps=9)
    recorded = episode(column(*range(4)), [1, 2, 3], True, actions=np.float32([[-2], [0], [6]]))
    write_minari("test/wide-v0", [recorded], action_space=space)
    whole = replace(load("test/wide-v0", "Wide-v0"), env_spec=gym.spec("Wide-v0"))
    exported = load(str(write_npz(whole, tmp_path / "wide.npz")))
    named = (f"{__name__.partition('.')[0]}:Wide-v0", [-2], [6])  # with the module to import
    assert (exported.env_spec, exported.low.tolist(), exported.high.tolist()) == named
    for ours, theirs in zip(exported.transitions, whole.transitions, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    actions, one = np.float32([[0.1], [-0.7], [1 / 3]]), np.ones(1, np.float32)
    unit = replace(whole, low=-one, high=one, transitions=whole.transitions._replace(actions=actions))
    with np.load(write_npz(unit, tmp_path / "unit.npz")) as file:
        assert file["actions"].tobytes() == actions.tobytes(), "there is nothing to rescale"
    with pytest.raises(UsageError, match=r"is a directory; name an \.npz"):
        write_npz(whole, tmp_path)
    with pytest.raises(UsageError, match=r"mine is no \.npz"):  # which nothing would read
        write_npz(whole, tmp_path / "mine")


def test_an_export_names_no_environment_whose_options_the_id_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as D4RL's Ant, whose observations have contact forces."""
    np.savez(tmp_path / "mine.npz", **good_npz(), env="Any32-v0")
    whole, spec = load(str(tmp_path / "mine.npz")), copy.deepcopy(gym.spec("Ant-v4"))
    assert plain_id(spec) == "Ant-v4"
    spec.kwargs["use_contact_forces"] = True
    assert plain_id(spec) is None
    exported = write_npz(replace(whole, env_spec=spec), tmp_path / "ant.npz")
    said = capsys.readouterr().err
    assert "Ant-v4 has options here" in said and "load it with --env" in said
    assert "pass --env ID" in usage_error(str(exported), None)
    wrapped = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1)).spec
    write_npz(replace(whole, env_spec=wrapped), tmp_path / "wrapped.npz")
    assert "Pendulum-v1 has RescaleAction here" in capsys.readouterr().err
    assert "pass --env ID" in usage_error(str(tmp_path / "wrapped.npz"), None)
    assert len(load(str(exported), "Any32-v0").transitions.rewards) == len(whole.transitions.rewards)


def test_without_benchmarks_one_line_says_how_to_read_other_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a copied algorithm."""
    monkeypatch.setitem(sys.modules, "benchmarks.sources", None)
    for name in ("offax/hopper/medium-v1", "hopper.hdf5"):
        message = usage_error(name)
        assert "copy benchmarks/ too" in message and f"benchmarks.datasets export {name}" in message


def test_no_home_directory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME and no entry in the system's list of users: `~` stays as it is."""
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "MINARI_DATASETS_PATH" in usage_error("offax/hopper/medium-v1")


def test_metadata_of_older_gymnasium_is_understood() -> None:
    directory = write_minari("test/old-v0", TWO_ENDINGS)
    path = directory / "data" / "metadata.json"
    spec = gym.envs.registration.EnvSpec("Any1-v0", entry_point=f"{__name__}:Any1", max_episode_steps=100)
    text = json.loads(spec.to_json()) | {"autoreset": False, "apply_api_compatibility": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_spec": json.dumps(text)}))
    dataset = load("test/old-v0")
    assert dataset.env_spec.id == "Any1-v0" and dataset.env_spec.max_episode_steps == 100
