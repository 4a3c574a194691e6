"""The Adroit door: rewards and data against the simulator's own state, the commands, and the page by hand."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, parsed

from benchmarks import adroit_door as door
from benchmarks import sac_prior
from benchmarks.adroit_door import Episode
from common.cli import UsageError
from common.data import load
from common.environments import make_environment


@pytest.fixture
def simulator() -> gym.Env:
    """The door of AWAC's protocol with its time limit."""
    pytest.importorskip("gymnasium_robotics")
    env = make_environment("benchmarks.adroit_door:door-binary-1.35-v1")
    yield env
    env.close()


def angle(env: gym.Env) -> float:
    """The joint's own, by its name."""
    return float(env.unwrapped.data.joint("door_hinge").qpos[0])


def open_to(env: gym.Env, value: float) -> np.ndarray:
    """The observation after the door was set to an angle in radians."""
    env.reset(seed=0)
    state = env.unwrapped.get_env_state()
    state["qpos"][env.unwrapped.model.joint("door_hinge").qposadr[0]] = value
    env.unwrapped.set_env_state(state)
    return env.unwrapped._get_obs()


def record(env: gym.Env, start: float, steps: int, seed: int) -> tuple[Episode, np.ndarray]:
    """Observations and actions, some beyond their bounds, from a door at an angle; and its angle after each step."""
    rng = np.random.default_rng(seed)
    observations, actions = [open_to(env, start)], 1.3 * rng.uniform(-1, 1, (steps, 28))
    angles = []
    for action in actions:
        observations.append(env.unwrapped.step(action)[0])  # which clips by itself
        angles.append(angle(env))
    return (np.array(observations), actions), np.array(angles)


# The environments


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_an_episode_of_the_papers_has_200_steps_and_no_termination(simulator: gym.Env, start: float) -> None:
    """Rewards against the joint in the simulator, of a closed door and of an open one."""
    open_to(simulator, start)
    rng, rewards, wanted = np.random.default_rng(0), [], []
    for step in range(200):
        _, reward, terminated, truncated, info = simulator.step(rng.uniform(-1, 1, 28))
        rewards.append(reward)
        wanted.append(0.0 if angle(simulator) >= 1.35 else -1.0)
        assert info["success"] == (angle(simulator) >= 1.35)
        assert not terminated and truncated == (step == 199)
    assert rewards == wanted
    assert set(rewards) == ({-1.0} if start == 0.0 else {0.0})


def test_success_ends_an_episode_of_the_other_protocol() -> None:
    """A door that is let go at 1.2 rad swings on: the first step past 1.35 has reward 0 and is a termination."""
    pytest.importorskip("gymnasium_robotics")
    env = make_environment("benchmarks.adroit_door:door-success-1.35-v1")
    open_to(env, 1.2)
    env.unwrapped.data.joint("door_hinge").qvel[0] = 10.0
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, info = env.step(np.zeros(28))
        success = angle(env) >= 1.35
        assert (terminated, truncated, info["success"]) == (success, False, success)
        rewards.append(reward)
    assert 1 < len(rewards) < 200 and rewards == [-1.0] * (len(rewards) - 1) + [0.0]


@pytest.mark.parametrize(("least", "wanted"), [("1.35", [-1, 0, 0, 0, 0]), ("1.4", [-1, -1, -1, 0, 0])])
def test_the_threshold_is_itself_open(least: str, wanted: list[int]) -> None:
    observations = np.zeros((6, 39))
    observations[1:, door.DOOR_ANGLE] = [1.349, 1.35, 1.399, 1.4, 1.5]
    data = door.to_transitions([(observations, np.zeros((5, 28)))], float(least), "binary")
    assert data.rewards.tolist() == wanted
    spec = gym.spec(door.env_name("binary", float(least)))
    assert spec.kwargs == {"angle": float(least), "terminates": False} and spec.max_episode_steps == 200


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_without_the_package_there_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium_robotics.envs.adroit_hand.adroit_door", None)
    with pytest.raises(SystemExit) as stop, door.exit_status():
        door.main([command])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert err.endswith('the door needs gymnasium-robotics: install with `pip install -e ".[adroit]"`\n')


# The demonstrations


@pytest.fixture
def recorded(simulator: gym.Env) -> tuple[list[Episode], list[np.ndarray]]:
    """A closed door, an open one, and one that was let go near the threshold; and their angles."""
    found = [record(simulator, start, steps, seed) for seed, (start, steps) in enumerate([(0, 6), (1.5, 9), (1.2, 4)])]
    return [episode for episode, _ in found], [angles for _, angles in found]


def as_npz(path: Path, episodes: list[Episode]) -> Path:
    observations, actions = (np.concatenate(parts) for parts in zip(*episodes, strict=True))
    np.savez(path, replay_observations=observations, actions=actions, lengths=[len(a) for _, a in episodes])
    return path


def test_demonstrations_replay_in_the_simulator(simulator, recorded, tmp_path: Path) -> None:
    """Their clipped actions lead from row to row, with the rewards of the environment itself."""
    episodes, angles = recorded
    data = door.to_transitions(door.read_demonstrations(str(as_npz(tmp_path / "human.npz", episodes))), 1.35, "binary")
    assert data.observations.shape == (19, 39) and np.abs(data.actions).max() == 1.0
    assert np.flatnonzero(data.truncations).tolist() == [5, 14, 18] and not data.terminations.any()
    row = 0
    for start, of_episode in zip([0, 1.5, 1.2], angles, strict=True):
        np.testing.assert_allclose(data.observations[row], open_to(simulator, start), atol=1e-6)
        for value in of_episode:
            observation, reward, *_ = simulator.step(data.actions[row])
            np.testing.assert_allclose(data.next_observations[row], observation, atol=1e-6)
            assert data.rewards[row] == reward == (0.0 if value >= 1.35 else -1.0)
            row += 1
    assert set(data.rewards.tolist()) == {-1.0, 0.0}


def test_minari_gives_the_same_data(recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions beyond the bounds of its action space included."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes, _ = recorded
    flags = [np.zeros(len(actions), bool) for _, actions in episodes]
    buffers = [
        EpisodeBuffer(observations=o, actions=np.float32(a), rewards=np.ones(len(a)), terminations=f, truncations=f)
        for (o, a), f in zip(episodes, flags, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spaces = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64), gym.spaces.Box(-1, 1, (28,), np.float32)
        minari.create_dataset_from_buffers(
            "test/door-v0", buffers, observation_space=spaces[0], action_space=spaces[1], data_format="hdf5"
        )
    ours = door.to_transitions(door.read_demonstrations("test/door-v0"), 1.35, "binary")
    source = str(as_npz(tmp_path / "human.npz", episodes))
    theirs = door.to_transitions(door.read_demonstrations(source), 1.35, "binary")
    for name, array in ours._asdict().items():
        np.testing.assert_allclose(array, getattr(theirs, name), atol=1e-6, err_msg=name)


def test_bad_demonstrations_are_one_line(tmp_path: Path) -> None:
    good: Episode = (np.zeros((4, 39)), np.zeros((3, 28)))
    cases = {
        "wide.npz": [(np.zeros((4, 40)), np.zeros((3, 28)))],
        "short.npz": [good, (np.zeros((3, 39)), np.zeros((3, 28)))],
        "thin.npz": [(np.zeros((4, 39)), np.zeros((3, 27)))],
    }
    for name, episodes in cases.items():
        said = "its lengths are not" if name == "short.npz" else "demonstration 0 has shapes"
        with pytest.raises(UsageError, match=f"{name}: {said}"):
            door.read_demonstrations(str(as_npz(tmp_path / name, episodes)))
    np.savez(tmp_path / "other.npz", actions=np.zeros((3, 28)))
    np.savez(tmp_path / "lengths.npz", replay_observations=good[0], actions=good[1], lengths=[2])
    np.savez(tmp_path / "scalar.npz", replay_observations=good[0], actions=1.0, lengths=[3])
    (tmp_path / "text.npz").write_text("no zip")
    as_npz(tmp_path / "nan.npz", [(good[0], np.full((3, 28), np.nan))])
    for source, message in {
        "other.npz": "has no array lengths",
        "absent.npz": "no file",
        "lengths.npz": "its lengths",
        "scalar.npz": "its lengths",
        "text.npz": "is no .npz",
        "nan.npz": "demonstration 0 has NaN",
    }.items():
        with pytest.raises(UsageError, match=message):
            door.read_demonstrations(str(tmp_path / source))


def test_episodes_without_success_are_left_out_and_the_others_end_at_it() -> None:
    """Of three: open after steps 2 and 3 of 6, never, and after the last of 4."""
    episodes = []
    for number, (length, opened) in enumerate([(6, [2, 3]), (5, []), (4, [3])]):
        observations = np.zeros((length + 1, 39))
        observations[:, 0] = 100 * number + np.arange(length + 1)
        observations[[step + 1 for step in opened], door.DOOR_ANGLE] = 1.38
        episodes.append((observations, np.full((length, 28), number / 10)))
    data = door.to_transitions(episodes, 1.35, "success")
    assert data.observations[:, 0].tolist() == [0, 1, 2, 200, 201, 202, 203]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 201, 202, 203, 204]
    assert data.actions[:, 0].tolist() == pytest.approx([0, 0, 0, 0.2, 0.2, 0.2, 0.2])
    assert data.rewards.tolist() == [-1, -1, 0, -1, -1, -1, 0]
    assert data.terminations.tolist() == [0, 0, 1, 0, 0, 0, 1] and not data.truncations.any()
    with pytest.raises(UsageError, match="none of 1 episodes opens the door"):
        door.to_transitions(episodes[1:2], 1.35, "success")
    whole = door.to_transitions(episodes, 1.35, "binary")
    assert whole.rewards.tolist() == [-1, -1, 0, 0, -1, -1, *[-1] * 5, -1, -1, -1, 0]
    assert np.flatnonzero(whole.truncations).tolist() == [5, 10, 14] and not whole.terminations.any()


def test_prepare_refuses_before_it_clones(tmp_path: Path, recorded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "1")  # which it sets, and this takes back
    monkeypatch.setattr(door, "clone", lambda *_: pytest.fail("it cloned"))
    source, new = as_npz(tmp_path / "human.npz", recorded[0]), tmp_path / "new"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "door-success.npz").touch()
    for flags, message in {
        f"--out {tmp_path / 'there'}": "door-success.npz exists",
        f"--out {new} --seed -1": "--seed -1",
        f"--out {new} --trajectories 4": "--trajectories",
        f"--out {new} --clone-updates 5 0": "--clone-updates",
    }.items():
        with pytest.raises(UsageError, match=message):
            door.main(["prepare", "--demonstrations", str(source), *flags.split()])
    assert not new.exists()


def test_about_counts_by_hand() -> None:
    """Past 1 rad, 1.35 and 1.4 at some step, and at one of the first 200."""
    angles = [({199: 1.5, 209: 1.36}, 210), ({200: 1.4, 204: 1.01}, 205), ({3: 1.39, 4: 1.1}, 6), ({}, 7)]
    episodes = []
    for steps, length in angles:
        observations = np.zeros((length + 1, 39))
        for step, value in steps.items():
            observations[step + 1, door.DOOR_ANGLE] = value
        episodes.append((observations, np.zeros((length, 28))))
    assert door.about(episodes) == {
        "episodes": 4, "steps": 428, "shortest": 6, "longest": 210,
        "past": {"1": 3, "1.35": 3, "1.4": 2}, "past_within_200": {"1": 2, "1.35": 2, "1.4": 1},
    }  # fmt: skip


# The clones and their trajectories


def mean_actions(layers: door.Layers, observations: np.ndarray) -> np.ndarray:
    """The tanh of a network of ReLUs, written out."""
    for weights, bias in layers[:-1]:
        observations = np.maximum(observations @ weights + bias, 0.0)
    return np.tanh(observations @ layers[-1][0][:, :28] + layers[-1][1][:28])


def test_the_clone_imitates_on_raw_observations() -> None:
    rng = np.random.default_rng(0)
    scaled, actions = rng.normal(size=(20, 39)), rng.uniform(-0.9, 0.9, (19, 28))
    data = door.to_transitions([(50.0 + 10.0 * scaled, actions)], 1.35, "binary")
    layers = door.clone(data, 100, seed=0)
    error = np.mean((mean_actions(layers, data.observations.astype(float)) - actions) ** 2)
    assert error < 0.1 * actions.var()


def random_layers() -> door.Layers:
    """A network on observations that moves the hand."""
    rng = np.random.default_rng(3)
    return [(rng.normal(size=(39, 8)), rng.normal(size=8)), (rng.normal(size=(8, 56)), np.zeros(56))]


def test_trajectories_are_whole_and_the_policys_own(simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean actions to within their rounding; the simulator goes from row to row; each starts elsewhere."""
    monkeypatch.setattr(door.offax_sets, "NUM_ENVS", 2)
    episodes = door.collect(random_layers(), 3, seed=5)
    assert [(o.shape, a.shape) for o, a in episodes] == [((201, 39), (200, 28))] * 3
    for observations, actions in episodes:
        np.testing.assert_allclose(actions, mean_actions(random_layers(), observations[:-1]), atol=2.0**-17 + 1e-6)
    assert len({tuple(observations[0]) for observations, _ in episodes}) == 3
    monkeypatch.setattr(door.offax_sets, "NUM_ENVS", 3)
    for (observations, _), (others, _) in zip(episodes, door.collect(random_layers(), 3, seed=5), strict=True):
        np.testing.assert_array_equal(observations, others)


def test_a_script_takes_the_prepared_data_as_they_are(
    recorded: tuple[list[Episode], list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAC evaluates in the door of the data's protocol, steps it, without --env, and reports its success rate."""
    updates = []
    monkeypatch.setenv("NPROC", "1")  # which prepare sets, and this takes back
    monkeypatch.setattr(door, "clone", lambda data, *numbers: updates.append(numbers) or random_layers())
    source, folder = as_npz(tmp_path / "human.npz", recorded[0]), tmp_path / "data"
    words = f"prepare --demonstrations {source} --out {folder} --clone-updates 7 9 --trajectories 3 --seed 4"
    assert door.main(words.split()) == 0
    assert updates == [(7, 4), (9, 5)], "the clones' lengths and seeds"
    about = json.loads((folder / "data.json").read_text())
    assert [(one["updates"], one["seed"], one["episodes"]) for one in about["clones"]] == [(7, 4, 1), (9, 5, 2)]
    assert about["angle"] == 1.35 and about["trajectories"]["steps"] == 600
    opened = sum(door.first_open(episode, 1.35) is not None for episode in recorded[0])
    assert about["demonstrations"]["past"]["1.35"] == opened >= 1
    for protocol, rows in (("binary", 19 + 600), ("success", about["protocols"]["success"]["transitions"])):
        loaded = load(str(folder / f"door-{protocol}.npz"))
        assert loaded.env_spec == f"benchmarks.adroit_door:door-{protocol}-1.35-v1"
        assert len(loaded.transitions.rewards) == rows
        assert loaded.describe()["dataset_sha256"] == about["protocols"][protocol]["digest"]

    data = folder / "door-binary.npz"
    command = f"python benchmarks/sac_prior.py --dataset {data} --num-updates 1 --online-steps 2 --hidden-dim 8"
    command += f" --eval-episodes 1 --final-eval-episodes 1 --batch-size 8 --run-dir {tmp_path / 'run'}"
    sac_prior.main(parsed(command.split()))
    with open(tmp_path / "run" / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["step"]) for row in rows] == [("offline", "0"), ("online", "0"), ("online", "2")]
    for row in rows:
        assert -200.0 <= float(row["return_mean"]) <= 0.0
        assert (float(row["success_mean"]) > 0.0) == (float(row["return_mean"]) > -200.0)


@pytest.mark.slow
def test_the_data_are_the_same_for_any_number_of_threads(recorded: tuple, tmp_path: Path) -> None:
    source, digests = as_npz(tmp_path / "human.npz", recorded[0]), []
    for threads in ("1", "2"):
        words = f"prepare --demonstrations {source} --out {tmp_path / threads} --clone-updates 20 --trajectories 1"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.adroit_door", *words.split()],
            cwd=ROOT,
            env=os.environ | {"NPROC": threads, "OPENBLAS_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        digests.append(json.loads((tmp_path / threads / "data.json").read_text())["protocols"])
    assert digests[0] == digests[1]


# The runs and the page


@pytest.fixture
def prepared(tmp_path: Path) -> list[str]:
    """Words of `run` for data that exist, and are not read."""
    pytest.importorskip("gymnasium_robotics")
    for protocol in door.PROTOCOLS:
        (tmp_path / f"door-{protocol}.npz").touch()
    (tmp_path / "data.json").write_text('{"protocols": 1}')
    return ["run", "--name", "here", "--data", str(tmp_path), "--results-dir", str(tmp_path / "results")]


def test_each_algorithm_runs_by_its_own_script_on_both_protocols(
    prepared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {}

    def remember(args: door.suite.Args) -> int:
        (job,) = door.suite.plan(args)
        commands[Path(args.datasets[0]).stem, args.algorithms[0]] = parsed(shlex.split(job.command))
        return 0

    monkeypatch.setattr(door.suite, "main", remember)
    assert door.main(prepared) == 0
    algorithms = ["awac", "iql", "cql", "td3_bc", "awr", "sac_prior", "bc"]
    assert list(commands) == [(f"door-{protocol}", name) for protocol in door.PROTOCOLS for name in algorithms]
    for (stem, algorithm), args in commands.items():
        assert args.dataset == str(tmp_path / f"{stem}.npz")
        assert (args.num_updates, args.num_seeds) == (25_000, 5)
        assert args.online_steps == (0 if algorithm == "bc" else 100_000)
    commands = {algorithm: args for (stem, algorithm), args in commands.items() if stem == "door-success"}
    assert commands["awac"].weights == "softmax" and commands["awac"].hp.softmax_temperature == 0.5
    assert commands["iql"].hp.beta == 0.5 and commands["cql"].hp.conservative_weight == 1.0, "their Adroit settings"
    assert commands["awr"].buffer_size == 100_000
    assert json.loads((tmp_path / "results" / "here" / "data.json").read_text()) == {"protocols": 1}


def test_runs_are_refused_before_any_starts(
    prepared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.suite, "main", lambda _: pytest.fail("it started"))
    with pytest.raises(UsageError, match="nosuch"):
        door.main([*prepared, "--algorithms", "awac", "nosuch"])
    (tmp_path / "results" / "here").mkdir(parents=True)
    (tmp_path / "results" / "here" / "data.json").write_text('{"protocols": 2}')
    with pytest.raises(UsageError, match="results on other data than"):
        door.main(prepared)
    (tmp_path / "door-success.npz").unlink()
    with pytest.raises(UsageError, match=r"there is no .*door-success.npz: run"):
        door.main(prepared)


@pytest.mark.parametrize(("statuses", "status", "called"), [((0, 1, 0), 1, 3), ((0, 143, 0), 143, 2)])
def test_a_failure_is_passed_on_and_a_signal_ends_the_rest(
    prepared: list[str], monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, ...], status: int, called: int
) -> None:
    calls: list[str] = []

    def fail(args: door.suite.Args) -> int:
        calls.append(args.algorithms[0])
        return statuses[len(calls) - 1]

    monkeypatch.setattr(door.suite, "main", fail)
    words = [*prepared, "--protocols", "binary", "--algorithms", "awac", "iql", "bc"]
    assert door.main(words) == status
    assert len(calls) == called


def test_a_door_that_counts_as_open_is_success_from_the_first_step(
    simulator: gym.Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards, returns and success rates where every angle is enough: through the collector and the evaluator."""
    for protocol, steps in (("binary", 200), ("success", 1)):
        monkeypatch.setitem(gym.spec(door.env_name(protocol, 1.35)).kwargs, "angle", -10.0)
        own = door.to_transitions(door.collect(random_layers(), 1, seed=0), -10.0, protocol)
        assert (own.rewards == 0.0).all() and len(own.rewards) == steps
        env = f"benchmarks.adroit_door:{door.env_name(protocol, 1.35)}"
        np.savez(tmp_path / "open.npz", env=env, **own._asdict())
        command = f"python benchmarks/sac_prior.py --dataset {tmp_path / 'open.npz'} --num-updates 1 --hidden-dim 8"
        command += f" --eval-episodes 1 --final-eval-episodes 1 --batch-size 8 --run-dir {tmp_path / protocol}"
        sac_prior.main(parsed(command.split()))
        with open(tmp_path / protocol / "evaluations.csv") as file:
            rows = {(float(row["return_mean"]), float(row["success_mean"])) for row in csv.DictReader(file)}
        assert rows == {(0.0, 1.0)}


def write_run(
    folder: Path,
    algorithm: str,
    phases: dict[str, dict[int, list[float]]],
    online_steps: int,
    diverged: int = 0,
    environment: str = "door-binary-1.35-v1",
    digest: str = "1",
) -> None:
    """What a suite keeps of a run; success rates of each seed by phase and step; the last seeds may have diverged."""
    run = folder / f"{algorithm}_{environment}"
    run.mkdir(parents=True)
    rows = [
        {"phase": phase, "step": step, "member": seed, "seed": seed, "return_mean": -150.0, "score_mean": "",
         "episodes": 10, "success_mean": value}
        for phase, by_step in phases.items() for step, values in by_step.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    with open(run / "evaluations.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    members = [
        {"member": i, "seed": i, "swept": {}, "diverged": {"step": 9} if i >= 4 - diverged else None, "episodes": 10}
        for i in range(4)
    ]
    contents = {
        "config": {"algorithm": algorithm, "environment": environment, "dataset_sha256": digest,
                   "flags": {"dataset": environment, "num_updates": 100, "preset": "mine", "batch_size": 32,
                             "eval_episodes": 10, "final_eval_episodes": 40},
                   "git_commit": "abc123", "cpu": None, "versions": {"jax": "9.9"},
                   "device": {"count": 1, "kind": "cpu"}},
        "final": {"members": members, "updates": 100, "online_steps": online_steps, "wall_clock_seconds": 1.0,
                  "updates_per_second": None},
        "command": {"command": f"python algorithms/{algorithm}.py"},
    }  # fmt: skip
    for name, content in contents.items():
        (run / f"{name}.json").write_text(json.dumps(content))


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of every row of the page's tables, by the first of them."""
    rows = ([word.strip() for word in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| "))
    return {first: rest for first, *rest in rows}


def test_the_page_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = {0: [0.0, 0.0, 0.1, 0.3], 50: [0.0, 0.2, 0.4, 1.0]}
    write_run(tmp_path, "awac", {"offline": {0: [0.9] * 4}, "online": online}, 50)
    write_run(tmp_path, "bc", {"offline": {0: [0.0] * 4, 100: [0.3] * 4}}, 0)
    # A seed of IQL diverges after 50 steps: the line ends there. All of TD3+BC do.
    write_run(tmp_path, "iql", {"online": {0: [0.0] * 4, 50: [0.1] * 4, 100: [0.6] * 3}}, 100, diverged=1)
    write_run(tmp_path, "td3_bc", {"online": {0: [0.0] * 4}}, 100, diverged=4)
    other = {"online": {0: [0.5] * 4, 50: [0.7, 0.8, 0.9, 1.0]}}
    write_run(tmp_path, "cql", other, 50, environment="door-success-1.35-v1", digest="2")
    human = door.about([(np.zeros((4, 39)), np.zeros((3, 28)))])
    human |= {"source": "some.npz", "actions_beyond_bounds": 0.125, "largest_action": 1.5}
    clones = [{"updates": 7000, "seed": 3} | human | {"past": {"1": 21, "1.35": 11, "1.4": 2}}]
    about = {"angle": 1.35, "demonstrations": human, "clones": clones, "trajectories": clones[0]}
    about["protocols"] = {"binary": {"digest": "1"}, "success": {"digest": "2", "episodes": 12, "transitions": 3456}}
    (tmp_path / "data.json").write_text(json.dumps(about))
    (tmp_path / "notes.md").write_text("What is known.\n")
    lines: dict[str, tuple[list[int], list[float]]] = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot",
        lambda axes, x, y, *mark, color, linestyle="", label="": lines.update({label or f"{color}{mark[0]}": (x, y)}),
    )
    assert door.main(["report", "--results", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    cells = rows_of(page)
    assert cells["awac"] == ["mine", "32", "100", "50", "10 [0, 30]", "40 [0, 100]", "4"]
    assert cells["bc"][3:] == ["0", "-", "30 [30, 30]", "4"]
    assert cells["iql"][4:] == ["0 [0, 0]", "60 [60, 60]", "4, 1 diverged"]
    assert cells["td3_bc"][4:] == ["0 [0, 0]", "-", "4, 4 diverged"]
    assert cells["cql"][4:] == ["50 [50, 50]", "85 [70, 100]", "4"]
    assert page.index("What is known.") < page.index("| td3_bc |") < page.index("`success`") < page.index("| cql |")
    assert "40 for each seed at the last policy and 10 elsewhere" in page
    assert "## Speed" not in page, "none of these measured a rate"
    assert cells["demonstrations"] == ["1", "3", "0", "0", "0", "0", "0", "0"]
    assert cells["clone of 7,000 updates, seed 3"] == ["1", "3", "21", "0", "11", "0", "2", "0"]
    assert "those of some.npz" in page and "12.5 % were beyond" in page and "12 episodes with 3,456 steps" in page
    assert lines["awac"] == ([0, 50], [pytest.approx(10.0), pytest.approx(40.0)])
    assert lines["iql"] == ([0, 50], [0.0, 10.0]) and lines["C2x"] == ([50], [10.0])
    assert set(lines) == {"awac", "iql", "td3_bc", "C2x", "cql"}
    assert (tmp_path / "binary.png").exists() and (tmp_path / "success.png").exists()
    with open(tmp_path / "success.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (4 + 8) + 8 + (8 + 3) + 4 + 8
    wanted = {"protocol": "binary", "algorithm": "awac", "phase": "online", "step": "50", "seed": "2"}
    assert [row for row in rows if wanted.items() <= row.items()] == [
        wanted | {"success_mean": "0.4", "return_mean": "-150.0", "episodes": "10"}
    ]


def test_pages_that_would_mislead_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"adroit_door.py run"):
        door.main(["report", "--results", str(tmp_path)])
    write_run(tmp_path, "awac", {"offline": {0: [0.9] * 4}}, 0)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(UsageError, match=r"data.json is damaged"):
        door.main(["report", "--results", str(tmp_path)])
    (tmp_path / "data.json").write_text('{"protocols": {"binary": {"digest": "2"}}}')
    with pytest.raises(UsageError, match="results of binary on different data"):
        door.main(["report", "--results", str(tmp_path)])
    (tmp_path / "data.json").unlink()
    write_run(tmp_path, "iql", {"offline": {0: [0.9] * 4}}, 0, digest="3")
    with pytest.raises(UsageError, match="learned from other data than another run"):
        door.main(["report", "--results", str(tmp_path)])
    shutil.rmtree(tmp_path / "iql_door-binary-1.35-v1")
    write_run(tmp_path, "iql", {"offline": {0: [0.9] * 4}}, 0, environment="Hopper-v5")
    with pytest.raises(UsageError, match="iql is no run of this experiment: it was in Hopper-v5"):
        door.main(["report", "--results", str(tmp_path)])
    write_run(tmp_path, "bc", {"offline": {0: [""] * 4}}, 0)  # of an environment that reports no success
    with pytest.raises(UsageError, match="bc has no success rates"):
        door.main(["report", "--results", str(tmp_path)])
