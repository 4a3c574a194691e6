"""The datasets that are always there: the same every time, whole or absent, and true to the environment."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import ROOT, hopper_like

from benchmarks import behavior_policies, datasets, offax_sets, ogbench_sets
from benchmarks.families import domain_of, quiet_mujoco
from common.cli import UsageError
from common.data import Dataset, load
from common.replay import Transitions, episode_returns, record

TRANSITIONS = 480
RANDOM = "offax/hopper/random-v1"
SET = ("manifest.json", "data/metadata.json", "data/main_data.hdf5")  # the files of one
OGBENCH = [*ogbench_sets.ids(), *(name.replace("-local-", "-local-1m-") for name in ogbench_sets.ids())]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(offax_sets, "SIZES", {"": TRANSITIONS, "-1m": 2 * TRANSITIONS})
    return tmp_path / "minari"


def random_layers(seed: int, obs_dim: int = 11, action_dim: int = 3) -> offax_sets.Layers:
    rng = np.random.default_rng(seed)
    sizes = [obs_dim, 32, 32, 2 * action_dim]
    return [
        (rng.normal(0, 0.3, (m, n)).astype(np.float16), rng.normal(0, 0.1, n).astype(np.float16))
        for m, n in itertools.pairwise(sizes)
    ]


def write_policies(folder: Path, seed: int) -> None:
    arrays = {}
    for number, name in enumerate([*(f"mixed_{i}" for i in range(16)), "expert"]):
        for i, (w, b) in enumerate(random_layers(100 * seed + number)):
            arrays |= {f"{name}/w{i}": w, f"{name}/b{i}": b}
        arrays[f"{name}/steps"] = np.array(number)
    directory = folder / "behavior_policies_v1"
    directory.mkdir(exist_ok=True)
    np.savez_compressed(directory / "hopper.npz", **arrays)


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_policies(tmp_path, seed=2)
    monkeypatch.setattr(offax_sets, "FOLDER", tmp_path)
    return tmp_path


def arrays_of(directory: Path) -> dict[str, np.ndarray]:
    out = {}
    with h5py.File(directory / "data" / "main_data.hdf5") as file:
        file.visititems(lambda name, node: out.update({name: node[()]} if isinstance(node, h5py.Dataset) else {}))
    return out


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def in_the_making(root: Path) -> list[str]:
    """What is in the hidden folder beside Hopper's sets."""
    return sorted(path.name for path in (root / "offax" / "hopper" / ".offax-building").iterdir())


def child(code: str, **env: str) -> subprocess.Popen:
    """Another process that has the small size."""
    text = f"from benchmarks import offax_sets\noffax_sets.SIZES[''] = {TRANSITIONS}\n{code}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | env,
    )


def test_policy_outputs_are_those_of_the_network() -> None:
    layers = [(w.astype(float), b.astype(float)) for w, b in random_layers(0)]
    observations = np.random.default_rng(0).normal(size=(7, 11))
    mean, std = offax_sets.policy_outputs(layers, observations)
    for row in range(7):
        x = observations[row]
        x = np.maximum(layers[0][0].T @ x + layers[0][1], 0)
        x = np.maximum(layers[1][0].T @ x + layers[1][1], 0)
        x = layers[2][0].T @ x + layers[2][1]
        np.testing.assert_allclose(mean[row], x[:3], rtol=1e-12)
        np.testing.assert_allclose(std[row], np.exp(np.clip(x[3:], -5, 2)), rtol=1e-12)
    noise = np.random.default_rng(1).normal(size=(7, 3))
    actions = offax_sets.sample_actions(layers, observations, noise)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, np.tanh(mean + std * noise), atol=1e-5)
    np.testing.assert_array_equal(actions * 2**16, np.rint(actions * 2**16))  # last bits cannot make a difference


@pytest.mark.parametrize("uniform", [True, False])
def test_episodes_do_not_depend_on_how_many_are_stepped_together(uniform: bool) -> None:
    layers = None if uniform else [(w.astype(float), b.astype(float)) for w, b in random_layers(0)]
    runs = [offax_sets.collect("Hopper-v5", layers, 700, [5, 6], num_envs) for num_envs in (1, 3, 32)]
    assert sum(len(episode.rewards) for episode in runs[0]) == 700
    assert all(same_episodes(run, runs[0]) for run in runs[1:])


def same_episodes(a: list[offax_sets.Episode], b: list[offax_sets.Episode]) -> bool:
    fields = [[field for episode in episodes for field in episode] for episodes in (a, b)]
    return len(a) == len(b) and all(map(np.array_equal, *fields))


def test_episodes_do_not_depend_on_the_number_of_processes_and_one_that_dies_is_a_usage_error() -> None:
    layers = [(w.astype(float), b.astype(float)) for w, b in random_layers(0)]
    collect = partial(offax_sets.collect, "Hopper-v5", layers, 300, [5, 6], num_envs=3)
    alone = collect()
    with pytest.raises(UsageError, match="has died"), offax_sets.process_map(2) as run:
        assert run is not map and same_episodes(collect(run=run), alone)
        list(run(os._exit, [1]))
    assert not same_episodes(alone, offax_sets.collect("Hopper-v5", layers, 300, [5, 7], num_envs=3))


def test_an_episode_is_dropped_where_those_before_it_suffice() -> None:
    """Of 10, 20 and 5 steps, for 30: no episode is cut to nothing, and the second one keeps its own end."""
    lengths = iter((10, 20, 5))

    def run(_: Any, groups: Sequence[Sequence[int]]) -> list[list[offax_sets.Episode]]:
        return [[terminated_after(next(lengths)) for _ in group] for group in groups]

    episodes = offax_sets.collect("Hopper-v5", None, 30, [1], run=run)
    assert next(lengths, None) is None, "all three were collected, as two more of 10 steps would have been needed"
    assert [(len(e.rewards), e.terminated, e.truncated) for e in episodes] == [(10, True, False), (20, True, False)]


def terminated_after(steps: int) -> offax_sets.Episode:
    actions = np.zeros((steps, 3), np.float32)
    return offax_sets.Episode(0, np.zeros((steps + 1, 11)), actions, np.zeros(steps), terminated=True, truncated=False)


def test_the_mean_action_is_that_without_noise() -> None:
    layers = [(w.astype(float), b.astype(float)) for w, b in random_layers(0)]
    first, _ = offax_sets.run_episodes("Hopper-v5", layers, [5], [0, 1], mean_action=True)
    mean, _ = offax_sets.policy_outputs(layers, first.observations[:-1])
    np.testing.assert_allclose(first.actions, np.tanh(mean), atol=1e-5)


def test_replaying_the_actions_gives_the_recorded_observations_rewards_and_endings() -> None:
    episodes = offax_sets.collect("Hopper-v5", None, 300, [1])
    env = gym.make("Hopper-v5")
    for number, episode in enumerate(episodes):
        observation, _ = env.reset(seed=episode.seed)
        np.testing.assert_array_equal(observation, episode.observations[0])
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(observation, episode.observations[t + 1])
            assert reward == episode.rewards[t]
            last = t == len(episode.actions) - 1
            assert not truncated
            assert terminated == (last and number < len(episodes) - 1)  # the last episode is cut
        assert episode.terminated != episode.truncated


def test_time_limit_is_a_truncation() -> None:
    quiet_mujoco()
    episodes = offax_sets.collect("HalfCheetah-v5", None, 1500, [1])
    assert [(len(e.rewards), e.terminated, e.truncated) for e in episodes] == [(1000, False, True), (500, False, True)]


def test_set_has_every_row_and_is_the_same_when_made_again(root: Path, tmp_path: Path, monkeypatch) -> None:
    first = load(RANDOM)
    assert first.env_spec.id == "Hopper-v5" and domain_of(first.env_spec) == "hopper"
    columns = [getattr(first.transitions, name) for name in Transitions._fields]
    assert all(len(array) == TRANSITIONS and array.dtype == np.float32 for array in columns)
    ends = np.flatnonzero(first.transitions.terminations + first.transitions.truncations)
    assert ends[-1] == TRANSITIONS - 1
    inside = np.setdiff1d(np.arange(TRANSITIONS), ends)
    np.testing.assert_array_equal(
        first.transitions.next_observations[inside], first.transitions.observations[inside + 1]
    )
    manifest = json.loads((root / RANDOM / "manifest.json").read_text())
    returns = episode_returns(first.transitions)
    assert manifest["statistics"]["episodes"] == len(returns)
    assert manifest["statistics"]["return_mean"] == pytest.approx(returns.mean(), rel=1e-5)
    assert set(manifest["versions"]) >= {"gymnasium", "minari", "mujoco", "numpy"} and len(manifest["sha256"]) == 5
    before = arrays_of(root / RANDOM)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    assert same(before, arrays_of(offax_sets.ensure(RANDOM)))
    again = json.loads((tmp_path / "elsewhere" / RANDOM / "manifest.json").read_text())
    assert again["sha256"] == manifest["sha256"]


def test_minari_knows_the_set(root: Path) -> None:
    import minari

    load(RANDOM)
    assert list(minari.list_local_datasets()) == [RANDOM]
    loaded = minari.load_dataset(RANDOM)
    assert loaded.total_steps == TRANSITIONS and loaded.env_spec.id == "Hopper-v5"
    assert minari.get_normalized_score(loaded, np.array([-20.272305, 3234.3])) == pytest.approx([0.0, 1.0])
    assert "offax/hopper" in minari.namespace.list_local_namespaces()


def test_qualities_are_made_by_their_policies(root: Path, policies: Path) -> None:
    def parts(dataset_id: str, transitions: int) -> list[offax_sets.Part]:
        return offax_sets.parts_of(offax_sets.parse(dataset_id), transitions)

    assert parts("offax/hopper/medium-expert-v1", 100) == [("mixed_15", 50), ("expert", 50)]
    assert parts("offax/hopper/mixed-1m-v1", 1600) == [(f"mixed_{i}", 100) for i in range(16)]
    assert parts("offax/hopper/medium-v1", 9) == [("mixed_15", 9)]
    data = load("offax/hopper/mixed-v1").transitions
    assert len(data.rewards) == TRANSITIONS
    ends = data.terminations + data.truncations
    assert ends[29::30].all()  # each part ends with the end of an episode


def test_a_larger_set_goes_on_where_the_smaller_one_ends(root: Path, policies: Path) -> None:
    small, large = (load(f"offax/hopper/{quality}-v1").transitions for quality in ("medium", "medium-1m"))
    assert (len(small.rewards), len(large.rewards)) == (TRANSITIONS, 2 * TRANSITIONS)
    np.testing.assert_array_equal(small.actions, large.actions[:TRANSITIONS])
    assert not np.array_equal(large.actions[:TRANSITIONS], large.actions[TRANSITIONS:])


def test_set_of_older_policies_is_made_again(root: Path, policies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(offax_sets.SIZES, "", 200)
    dataset_id = "offax/hopper/expert-v1"
    old = arrays_of(offax_sets.ensure(dataset_id))
    stamp = (root / dataset_id / "manifest.json").stat().st_mtime_ns
    offax_sets.ensure(dataset_id)
    assert (root / dataset_id / "manifest.json").stat().st_mtime_ns == stamp
    before = load(dataset_id).transitions.actions
    write_policies(policies, seed=3)
    after = load(dataset_id).transitions.actions
    assert not np.array_equal(before, after)
    assert not same(old, arrays_of(root / dataset_id))
    write_policies(policies, seed=2)
    assert same(old, arrays_of(offax_sets.ensure(dataset_id)))
    assert in_the_making(root) == ["expert-v1.lock"]


@pytest.mark.slow
def test_two_processes_at_once_make_one_set(root: Path) -> None:
    slow = (
        "import time\noriginal = offax_sets._write\noffax_sets._write = lambda *a: (time.sleep(2), original(*a))[1]\n"
    )
    ensure = f"offax_sets.ensure({RANDOM!r})\nprint('made', flush=True)"
    processes = [child(slow + ensure) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    waited = ["another process is collecting" in error for _, error in outputs]
    assert sorted(waited) == [False, True]
    assert len(load(RANDOM).transitions.rewards) == TRANSITIONS
    assert len(arrays_of(root / RANDOM)["episode_0/rewards"]) > 0


def test_killed_build_leaves_no_set_and_is_made_again(root: Path) -> None:
    hang = "import time\noriginal = offax_sets._write\n"
    hang += "def write(*a):\n    original(*a)\n    print('written', flush=True)\n    time.sleep(60)\n"
    process = child(f"{hang}offax_sets._write = write\noffax_sets.ensure({RANDOM!r})")
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (root / RANDOM).exists()
    assert in_the_making(root) == ["random-v1", "random-v1.lock"] and not datasets.on_disk()
    assert len(load(RANDOM).transitions.rewards) == TRANSITIONS
    assert in_the_making(root) == ["random-v1.lock"] and list(datasets.on_disk()) == [RANDOM]


def test_full_disk_is_a_usage_error_and_leaves_nothing(root: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot write offax/hopper/random-v1 under .*MINARI_DATASETS_PATH"):
            offax_sets.ensure(RANDOM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (root / RANDOM).exists()
    assert in_the_making(root) == ["random-v1.lock"]
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)


def test_too_little_space_is_said_before_collecting(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(offax_sets, "collect", lambda *_, **__: pytest.fail("collected"))
    with pytest.raises(UsageError, match="No space left on device; make room or set MINARI_DATASETS_PATH"):
        offax_sets.ensure(RANDOM)
    assert in_the_making(root) == ["random-v1.lock"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system, where this machine has one to write to; else of the same."""
    memory = Path("/dev/shm")
    other = memory.is_dir() and os.access(memory, os.W_OK) and memory.stat().st_dev != tmp_path.stat().st_dev
    with tempfile.TemporaryDirectory(prefix="offax-tests-", dir=memory if other else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("linked", ["offax", "offax/hopper"])
def test_a_folder_of_sets_may_be_a_link_to_another_disk(
    root: Path, disk: Path, linked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / linked).parent.mkdir(parents=True)
    (root / linked).symlink_to(disk)
    with offax_sets.building_place(RANDOM, "collecting") as place:
        assert place.parent.stat().st_dev == disk.stat().st_dev and place.parent.parent.samefile((root / RANDOM).parent)
    made = offax_sets.ensure(RANDOM)
    assert made == root / RANDOM and made.resolve().is_relative_to(disk.resolve())
    first = (made / "manifest.json").read_text()
    monkeypatch.setattr(offax_sets, "FORMAT", 2)
    offax_sets.ensure(RANDOM)
    assert (made / "manifest.json").read_text() != first, "a stale one gives way to a new one"
    assert in_the_making(root) == ["random-v1.lock"]
    datasets.main(["list"])
    assert f"{RANDOM:50}on disk, {TRANSITIONS} transitions, {size_of(made):.1f} MB" in capsys.readouterr().out


def size_of(directory: Path) -> float:
    return sum((directory / name).stat().st_size for name in SET) / 1e6


@pytest.mark.parametrize("there", [True, False])
def test_a_stale_set_that_is_a_link_is_left_where_it_is(
    root: Path, disk: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is a link to a disk that is away: the new set takes the link's place."""
    made = offax_sets.ensure(RANDOM)
    shutil.move(made, disk / "kept")
    made.symlink_to(disk / ("kept" if there else "away"))
    before = {name: (disk / "kept" / name).read_bytes() for name in SET}
    monkeypatch.setattr(offax_sets, "FORMAT", 2)
    offax_sets.ensure(RANDOM)
    assert not made.is_symlink() and len(load(RANDOM).transitions.rewards) == TRANSITIONS
    assert {name: (disk / "kept" / name).read_bytes() for name in SET} == before


def test_the_size_of_a_set_counts_what_is_linked(root: Path, disk: Path) -> None:
    made = offax_sets.ensure(RANDOM)
    size = size_of(made)
    assert size > 0.05 and datasets.megabytes(RANDOM) == pytest.approx(size)
    shutil.move(made / "data", disk / "data")
    (made / "data").symlink_to(disk / "data")
    assert list(datasets.on_disk()) == [RANDOM] and datasets.megabytes(RANDOM) == pytest.approx(size)
    shutil.move(made, disk / "whole")
    made.symlink_to(disk / "whole")
    assert list(datasets.on_disk()) == [RANDOM] and datasets.megabytes(RANDOM) == pytest.approx(size)
    assert datasets.megabytes("no/such-v0") is None


def test_unwritable_directory_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    with pytest.raises(UsageError, match="Not a directory"):
        offax_sets.ensure(RANDOM)


def test_what_is_not_ours_is_left_alone(root: Path) -> None:
    (root / RANDOM / "data").mkdir(parents=True)
    with pytest.raises(UsageError, match="no manifest"):
        offax_sets.ensure(RANDOM)
    assert (root / RANDOM / "data").exists()


@pytest.mark.parametrize(
    "name",
    [
        "offax/hopper/great-v1",
        "offax/humanoid/medium-v1",
        "offax/hopper/medium-v2",
        "offax/hopper/medium-v0",
        "offax/x-v1",
    ],
)
def test_unknown_set_names_the_sets_there_are(name: str) -> None:
    with pytest.raises(UsageError, match=r"medium-expert") as caught:
        load(name)
    assert "\n" not in str(caught.value) and "walker2d" in str(caught.value)


def test_shipped_policies_are_complete_and_small() -> None:
    for env, env_id in offax_sets.ENVS.items():
        path = offax_sets.policy_file(env)
        assert path.stat().st_size < behavior_policies.MAX_BYTES
        policies = offax_sets.read_policies(env)
        assert set(policies) == {"expert", *(f"mixed_{i}" for i in range(16))}
        spaces = gym.make(env_id)
        for layers in policies.values():
            assert layers[0][0].shape[0] == spaces.observation_space.shape[0]
            assert layers[-1][1].shape[0] == 2 * spaces.action_space.shape[0]
            assert all(w.dtype == np.float16 and np.isfinite(w).all() and np.isfinite(b).all() for w, b in layers)
        assert path.with_name(f"{env}_training.csv").exists()


@pytest.mark.slow
def test_collection_is_fast_enough() -> None:
    """In at most twice the processor's time that the steps alone take: hardly more is needed, on any machine."""
    env, rng, start = gym.make("Hopper-v5"), np.random.default_rng(0), time.process_time()
    env.reset(seed=0)
    for _ in range(5000):
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 3))
        if terminated or truncated:
            env.reset()
    alone, start = time.process_time() - start, time.process_time()
    offax_sets.collect("Hopper-v5", None, 5000, [0])
    assert time.process_time() - start < 2 * alone


# The choice of policies


def make_run(directory: Path, returns: list[float]) -> None:
    """A SAC run whose snapshot i is recognised by its first bias, `returns[i]`."""
    (directory / "snapshots").mkdir(parents=True)
    lines = ["steps,return_mean"]
    for number, value in enumerate(returns, 1):
        arrays = {}
        for i, (w, b) in enumerate(random_layers(number)):
            arrays |= {f"w{i}": w.astype(np.float32), f"b{i}": b.astype(np.float32)}
        arrays["b0"][0] = value
        np.savez(directory / "snapshots" / f"{5000 * number:09d}.npz", **arrays)
        lines.append(f"{5000 * number},{value}")
    (directory / "training.csv").write_text("\n".join(lines))


CHOICE = behavior_policies.Args(Path("run"), episodes=50, screening=5, finalists=3)


def choose(sampled: dict[int, float], mean_action: dict[int, float], error: float, target: float) -> dict[str, int]:
    """Steps of the policies chosen among snapshots 1 to 50 of returns that are `10 * step`, but for those given."""

    def measure(steps: Sequence[int], episodes: int) -> list[behavior_policies.Measured]:
        return [
            behavior_policies.Measured(
                step, episodes, sampled.get(step, 10.0 * step), mean_action.get(step, 10.0 * step), error
            )
            for step in steps
        ]

    return {
        name: found.steps for name, found in behavior_policies.choose(range(1, 51), measure, target, CHOICE).items()
    }


def test_expert_has_the_highest_smaller_return_of_the_last_part() -> None:
    assert choose({}, {}, 0.0, 200.0)["expert"] == 50
    assert choose({45: 900.0}, {45: 100.0}, 0.0, 200.0)["expert"] == 50
    assert choose({45: 510.0}, {45: 505.0, 50: 400.0}, 0.0, 200.0)["expert"] == 45
    assert choose({30: 900.0}, {30: 900.0}, 0.0, 200.0)["expert"] == 50  # too early
    assert choose({31: 900.0}, {31: 900.0}, 0.0, 250.0)["expert"] == 31


def test_medium_is_the_nearest_to_its_target_whose_mean_action_is_no_poorer() -> None:
    assert choose({}, {}, 0.0, 200.0)["mixed_15"] == 20
    assert choose({}, {}, 0.0, 300.0)["mixed_15"] == 25  # the edge: half of the expert's 500
    assert choose({}, {20: 190.0}, 0.0, 201.0)["mixed_15"] == 21  # a perfect clone would be poorer than the data
    assert choose({}, {20: 190.0}, 10.0, 201.0)["mixed_15"] == 20  # by no more than the standard error
    assert choose({}, {20: 400.0}, 0.0, 201.0)["mixed_15"] == 21  # a perfect clone would be no medium
    assert choose({2: 200.0}, {2: 200.0, 20: 0.0}, 0.0, 204.0)["mixed_15"] == 21  # after fifteen others


def test_what_medium_violates_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    poor = {step: 6.0 * step for step in range(1, 31)}
    assert choose({}, poor, 0.0, 200.0)["mixed_15"] == 25
    said = capsys.readouterr().out.splitlines()
    assert "medium: mean action's return outside the band by 17" in said
    assert "medium: mean action poorer than samples by 100" in said
    choose({}, {}, 0.0, 200.0)
    assert "by" not in capsys.readouterr().out


def test_mixed_is_evenly_spaced_up_to_medium() -> None:
    steps = [choose({}, {}, 0.0, 245.0)[f"mixed_{i}"] for i in range(16)]
    assert steps[0] == 1 and steps[-1] == 24 and set(np.diff(steps)) == {1, 2}


def test_the_choice_trusts_the_longer_measurement_and_goes_on_from_its_table(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "Hopper-v5", tmp_path / "behavior_policies_v1"
    make_run(run, [10.0 * i for i in range(1, 51)])
    calls: list[tuple[int, int]] = []

    def measure(env_id: str, path: Path, episodes: int, run: Any = map) -> behavior_policies.Measured:
        value, step = float(behavior_policies.read_snapshot(path)[0][1][0]), int(path.stem)
        calls.append((step, episodes))
        lucky = 100.0 if step == 240_000 and episodes == 5 else 0.0
        return behavior_policies.Measured(step, episodes, value + lucky, value + 1.0, 0.5)

    monkeypatch.setattr(behavior_policies, "measure", measure)
    monkeypatch.setitem(behavior_policies.MEDIUM_SCORES, "hopper", 7.0)  # a return of 207.5
    behavior_policies.main(behavior_policies.Args(run, out_dir=out))
    with np.load(out / "hopper.npz") as file:
        kept = {name: file[name].item() for name in file.files if file[name].ndim == 0}
    assert kept["expert/steps"] == 250_000 and kept["mixed_0/steps"] == 5_000 and kept["mixed_15/steps"] == 105_000
    assert [kept[f"expert/{name}"] for name in ("sampled", "mean_action", "episodes")] == [500.0, 501.0, 50]
    assert kept["mixed_3/episodes"] == 5
    assert (out / "hopper_training.csv").read_text() == (run / "training.csv").read_text()
    monkeypatch.setattr(offax_sets, "FOLDER", tmp_path)
    stored = offax_sets.read_policies("hopper")["expert"]
    with np.load(run / "snapshots" / "000250000.npz") as file:
        for i, (w, b) in enumerate(stored):
            np.testing.assert_array_equal(w, file[f"w{i}"].astype(np.float16))
            np.testing.assert_array_equal(b, file[f"b{i}"].astype(np.float16))
    assert len(load("offax/hopper/medium-expert-v1").transitions.rewards) == TRANSITIONS
    assert len(calls) == len(set(calls))
    before, count = (out / "hopper.npz").read_bytes(), len(calls)
    behavior_policies.main(behavior_policies.Args(run, out_dir=out))
    assert len(calls) == count and (out / "hopper.npz").read_bytes() == before
    other = tmp_path / "again" / "Hopper-v5"
    make_run(other, [20.0 * i for i in range(1, 51)])
    behavior_policies.main(behavior_policies.Args(other, out_dir=out))  # into the same folder, the same steps
    with np.load(out / "hopper.npz") as file:
        assert file["expert/sampled"] == 1000.0
    assert (out / "hopper_snapshots.csv").read_text() == (other / "snapshots.csv").read_text()


def test_a_snapshot_is_measured_by_both_its_returns(tmp_path: Path) -> None:
    make_run(tmp_path, [0.5])
    path = tmp_path / "snapshots" / "000005000.npz"
    found = behavior_policies.measure("Hopper-v5", path, 4)
    layers = [(w.astype(float), b.astype(float)) for w, b in behavior_policies.read_snapshot(path)]
    for value, mean_action in ((found.sampled, False), (found.mean_action, True)):
        episodes = offax_sets.run_episodes("Hopper-v5", layers, [4], range(4), mean_action)
        assert value == pytest.approx(np.mean([episode.rewards.sum() for episode in episodes]))
    assert found.sampled != found.mean_action and found.standard_error > 0 and found[:2] == (5000, 4)


def test_the_choice_refuses_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the directory of a SAC run"):
        behavior_policies.main(behavior_policies.Args(tmp_path, env="Hopper-v5", out_dir=tmp_path))
    with pytest.raises(UsageError, match="--env"):
        behavior_policies.main(behavior_policies.Args(tmp_path))
    make_run(tmp_path / "Hopper-v5", [1.0, 2.0])
    with pytest.raises(UsageError, match="2 snapshots are too few: 27 are needed"):
        behavior_policies.main(behavior_policies.Args(tmp_path / "Hopper-v5", out_dir=tmp_path))


# The command line


def test_the_command_line_lists_and_describes(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*offax_sets.ids(), *OGBENCH]
    assert "ogbench/scene-play-local-1m-v0" in "".join(lines)
    assert all("collected on first use" in line for line in lines)
    arrays = hopper_like(60) | {"rewards": np.ones(60)}  # of three episodes the second terminates, the others are cut
    np.savez(tmp_path / "mine.npz", env="Hopper-v5", **arrays)
    datasets.main(["stats", str(tmp_path / "mine.npz")])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == list(datasets.STATISTICS)
    size = (tmp_path / "mine.npz").stat().st_size / 1e6
    returns = ["20.0", "20.0", "20.0", "1.2", "-", "-"]
    spread = f"{arrays['actions'].std(axis=0).mean():.3f}"
    assert row.split()[1:-2] == ["Hopper-v5", "60", "3", *returns, "0.333", spread]
    assert row.split()[-1] == f"{size:.1f}"


def test_scores_in_the_table_are_those_in_config_json() -> None:
    """The mean of the episodes' scores, which on AntMaze is not the score of the mean."""
    fields = hopper_like(20) | {"rewards": np.repeat([0.0, 0.5], 10), "terminations": np.zeros(20)}
    fields["truncations"] = np.tile(np.eye(10)[9], 2)
    ones = np.ones(3, np.float32)
    dataset = Dataset("x", record(Transitions(**fields)), "AntMaze_UMaze-v5", -ones, ones)
    row = dict(zip(datasets.STATISTICS, datasets.statistics(dataset), strict=False))
    assert (row["return"], row["score"], row["terminated"]) == ("2.5", "50.0", "0.000")
    assert dataset.describe()["dataset_returns"]["score_mean"] == 50.0


def test_a_file_is_exported_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    np.savez(tmp_path / "sets" / "mine.npz", env="Hopper-v5", **hopper_like(40))
    datasets.main(["export", str(tmp_path / "sets" / "mine.npz")])
    written = (tmp_path / "mine.npz").read_bytes()
    for name in ("mine.npz", "mine.npz+sets/mine.npz"):
        with pytest.raises(SystemExit, match="2"):
            datasets.main(["export", name, "mine.npz"])
    assert (tmp_path / "mine.npz").read_bytes() == written, "not over the set itself, nor a part of it"


def test_coverage_is_the_side_of_the_box_whichever_way_it_is_turned() -> None:
    box = np.stack(np.meshgrid([-1.0, 1.0], [-2.0, 2.0], [-4.0, 4.0]), -1).reshape(-1, 3)
    assert datasets.coverage(box) == pytest.approx(2.0)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert datasets.coverage(np.repeat(box @ turn, 3, axis=0) + 5.0) == pytest.approx(2.0)
    assert datasets.coverage(np.insert(box, 1, 3.0, axis=1)) == pytest.approx(2.0), "a constant is no axis"
    assert datasets.coverage(box[:, [0, 1, 1]]) == pytest.approx(0.0, abs=1e-4)
    assert datasets.coverage(box[:, :1]) == pytest.approx(1.0)
    assert datasets.coverage(np.ones((5, 2))) == 0.0


def test_a_page_has_the_table_and_the_returns_of_the_mean_action(
    root: Path, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(offax_sets.policy_file("hopper")) as file:
        arrays = dict(file)
    arrays |= {"mixed_15/mean_action": np.array(1607.0), "expert/mean_action": np.array(3207.0)}
    np.savez(offax_sets.policy_file("hopper"), **arrays)
    datasets.main(["stats", "offax/hopper/medium-expert-v1", RANDOM, "--page", str(root / "page.md")])
    text, shown = (root / "page.md").read_text(), capsys.readouterr().out
    assert shown in text and "- `coverage`: " in text and "- commit: " in text
    cells = [dict(zip(datasets.STATISTICS, row.split(), strict=True)) for row in shown.splitlines()[1:]]
    assert [row["mode"] for row in cells] == ["2407.0", "-"]
    assert cells[0]["mode_score"] == f"{100 * (2407.0 + 20.272305) / (3234.3 + 20.272305):.1f}"


def test_the_command_line_builds_and_refuses(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.main(["build", RANDOM])
    assert capsys.readouterr().out == f"{root / RANDOM}\n"
    datasets.main(["list"])
    assert f"{RANDOM:50}on disk, {TRANSITIONS} transitions" in capsys.readouterr().out
    for words, message in (
        (["stats", "x/y"], "'x/y' is neither"),
        (["build", "offax/x-v0"], "no dataset"),
    ):
        with pytest.raises(SystemExit, match="2"):
            datasets.main(words)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_own_sets_are_listed_and_described_without_their_environment(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose environment cannot be made has its returns; one that cannot be read, what its metadata say."""
    datasets.main(["build", RANDOM])
    for name, change in (("mine/unmade-v0", {}), ("pictures-v1", {"total_steps": 77, "total_episodes": 3})):
        shutil.copytree(root / RANDOM / "data", root / name / "data")
        file = root / name / "data" / "metadata.json"
        about = json.loads(file.read_text()) | {"dataset_id": name} | change
        spec = json.loads(about["env_spec"]) | {"id": "Nowhere-v0", "entry_point": "nowhere:Environment"}
        file.write_text(json.dumps(about | dict.fromkeys(("env_spec", "eval_env_spec"), json.dumps(spec))))
    (root / "pictures-v1" / "data" / "main_data.hdf5").write_bytes(bytes(3_000_000))
    capsys.readouterr()
    datasets.main([])
    listed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert listed.keys() == {*offax_sets.ids(), *OGBENCH, "mine/unmade-v0", "pictures-v1"}
    assert listed["pictures-v1"] == ["on", "disk,", "77", "transitions,", "3.0", "MB"]
    datasets.main(["stats"])
    out, error = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert rows.keys() == {RANDOM, "mine/unmade-v0", "pictures-v1"}
    assert rows["pictures-v1"] == ["Nowhere-v0", "77", "3", "3.0"]
    assert error.startswith("pictures-v1 cannot be read") and error.count("\n") == 1
    assert rows[RANDOM][:2] == ["Hopper-v5", str(TRANSITIONS)]
    without_score = [*rows[RANDOM][1:6], "-", *rows[RANDOM][7:-1]]
    assert rows["mine/unmade-v0"][:-1] == ["Nowhere-v0", *without_score]


def test_help_is_quick() -> None:
    """In time of the processor: a busy machine is no fault of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "benchmarks.datasets", "stats", "--help"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
