"""D(s, N) from a pool against enumeration, and the command on a small run."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from conftest import ROOT, Outcome, arrays_of, hopper_like, signalled_after, smaller
from finite_max import expected_max

from algorithms import emaq
from benchmarks import complexity
from benchmarks.complexity import difficulty_of_pool, expected_max_of_pool
from common.cli import exit_status, parse

# ---- the estimate from a pool ----


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_expected_maximum_of_a_pool_is_the_mean_over_its_subsets(size: int) -> None:
    rng = np.random.default_rng(size)
    pool = rng.integers(-2, 3, (3, size)) + np.array([[0.0], [0.5], [1e6]])  # with ties
    for n in range(1, size + 1):
        subsets = pool[:, list(itertools.combinations(range(size), n))]
        np.testing.assert_allclose(expected_max_of_pool(pool, n), subsets.max(-1).mean(-1), rtol=1e-14)
        expected = (pool.max(-1)[:, None] - subsets.max(-1)).mean(-1)
        np.testing.assert_allclose(difficulty_of_pool(pool, n), expected, rtol=1e-12, atol=1e-12)
    for n in (0, size + 1):
        with pytest.raises(ValueError, match="subset"):
            expected_max_of_pool(pool, n)


def test_expected_maximum_of_a_pool_is_unbiased_and_that_of_its_distribution_is_not() -> None:
    """Over all pools of five draws from three actions, each with its probability."""
    values, probabilities = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.3, 0.2])
    draws = np.array(list(itertools.product(range(3), repeat=5)))
    weights = probabilities[draws].prod(-1)
    for n in range(1, 6):
        truth = float(expected_max(values, probabilities, n))
        assert weights @ expected_max_of_pool(values[draws], n) == pytest.approx(truth, rel=1e-12)
        with_replacement = weights @ expected_max(values[draws], None, n)
        assert with_replacement == pytest.approx(truth, rel=1e-12) if n == 1 else with_replacement < truth - 0.05


def test_difficulty_of_a_large_pool_falls_to_zero_and_keeps_its_precision() -> None:
    pool = np.random.default_rng(0).normal(size=(4, 400))
    curve = np.array([difficulty_of_pool(pool, n) for n in range(1, 401)])
    assert np.all(np.diff(curve, axis=0) < 0) and np.all(np.diff(curve, 2, axis=0) > -1e-12), "falling and convex"
    np.testing.assert_array_equal(curve[-1], 0.0)
    np.testing.assert_allclose(curve[0], pool.max(-1) - pool.mean(-1), rtol=1e-12)
    gaps = pool.max(-1) - np.sort(pool)[:, -2]  # one subset of 399 in 400 lacks the best, and has the second
    np.testing.assert_allclose(difficulty_of_pool(1e-6 * pool + 1e3, 399), 1e-6 * gaps / 400, rtol=1e-4)


def test_figures_of_a_member_by_hand() -> None:
    values = np.array([[0.0, 4.0], [2.0, 2.0], [1.0, 3.0]])
    after = np.array([[0.0, 2.0], [0.0, 20.0], [5.0, 1.0]])
    result = complexity.measure(values, after, np.array([0.0, 1.0, 0.0]), 0.9, [1, 2])
    assert result["spread"] == pytest.approx(np.sqrt((4 + 0 + 1) / 3)) and result["q_mean"] == pytest.approx(2.0)
    one, two = result["rows"]
    assert one["mean"] == pytest.approx(1.0) and one["max"] == 2.0 and one["quantile_50"] == 1.0
    assert one["mean_in_spreads"] == pytest.approx(1 / np.sqrt(5 / 3)) and one["share_left"] == 1.0
    assert one["bound_eq_9"] == pytest.approx(9 * 10.0), "the largest D is that of a next state"
    assert one["bound_eq_8"] == pytest.approx(9 * 2.0), "but nothing follows a termination"
    assert [two[name] for name in ("mean", "max", "share_left", "bound_eq_9", "bound_eq_8")] == [0.0] * 5


def test_numbers_of_proposals() -> None:
    assert complexity.counts(400, 100) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert complexity.counts(12, 7) == [1, 2, 5, 7, 10] and complexity.counts(2, 100) == [1, 2]


# ---- the command ----


def numpy_mlp(layers: dict, x: np.ndarray) -> np.ndarray:
    for i in range(len(layers)):
        x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
        x = np.maximum(x, 0.0) if i < len(layers) - 1 else x
    return x


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`command(*words)`: `python -m benchmarks.complexity ...`, in this process."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        status = 0
        try:
            with exit_status():
                complexity.main(tyro.cli(complexity.Args, args=list(map(str, words))))
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capfd.readouterr())

    return call


def train(folder: Path) -> Path:
    """A run of two members with different discounts, on data with a single action, which is fast to compile."""
    data = hopper_like()
    data |= {name: data[name][:, :4] for name in ("observations", "next_observations")}
    np.savez(folder / "data.npz", **data | {"actions": data["actions"][:, :1]})
    flags = ["--dataset", folder / "data.npz", "--env", "InvertedPendulum-v5", "--preset", "none", *smaller("emaq")]
    flags += ["--num-updates", 2, "--hidden-dim", 8, "--num-layers", 1, "--num-critics", 3, "--proposal-pool", 0]
    flags += ["--screening", "False", "--batch-size", 16, "--final-eval-episodes", 1, "--eval-every", 0]
    flags += ["--quiet", "True", "--run-dir", folder / "run", "--grid", "discount=0.9,0.95", "--reward-scale", 10.0]
    emaq.main(parse(emaq.Args, emaq.PRESETS, list(map(str, flags))))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("complexity"))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was stopped as soon as there was a checkpoint."""
    with signalled_after(1), pytest.raises(SystemExit):
        train(tmp_path)
    return tmp_path / "run"


@pytest.mark.slow
def test_command_measures_each_member(run: Path, command: Callable[..., Outcome]) -> None:
    """Its figures from pools redrawn here, Q-functions in numpy, and all subsets of the pools."""
    outcome = command(run, "--num-states", 7, "--pool", 5, "--seed", 3)
    assert outcome.status == 0 and outcome.err == ""
    content = json.loads((run / "complexity.json").read_text())
    assert (run / "complexity.png").read_bytes().startswith(b"\x89PNG")
    assert content["pool"] == 5 and content["states"] == 7 and content["num_proposals_of_run"] == 4
    assert [member["discount"] for member in content["members"]] == pytest.approx([0.9, 0.95])
    assert outcome.out.count("D(s, N) on") == 2 and "discount=0.95" in outcome.out

    with np.load(run.parent / "data.npz") as file:
        data = dict(file)
    rows = np.sort(np.random.default_rng(3).choice(400, 7, replace=False))
    states = np.concatenate([data["observations"][rows], data["next_observations"][rows]])
    flags = json.loads((run / "config.json").read_text())["flags"]
    args = replace(complexity.read(run, None).args, num_proposals=5)
    assert args.num_bins == flags["num_bins"] and args.head_dim == flags["head_dim"] == 8
    propose = jax.jit(lambda mu, state, key: emaq.propose(mu, state[None], key, args, 1)[:, 0])
    for i, member in enumerate(content["members"]):
        arrays = {name: array[i] for name, array in arrays_of(run).items() if "'state'" in name}

        def tree(part: str, arrays: dict[str, np.ndarray] = arrays) -> dict:
            """The parameters of a network from the checkpoint's arrays by name."""
            nested: dict = {}
            for name, array in arrays.items():
                if name.startswith(f"['state'].{part}['"):
                    *path, last = re.findall(r"\['(\w+)'\]", name.removeprefix(f"['state'].{part}"))
                    inner = nested
                    for key in path:
                        inner = inner.setdefault(key, {})
                    inner[last] = array
            return nested

        (layers,) = tree("critic")["params"].values()
        pools = []
        for number, state in enumerate(states):
            key = jax.random.fold_in(jax.random.key(3), number)
            actions = np.asarray(propose(tree("behavior"), state, key))
            inputs = np.concatenate([np.broadcast_to(state, (5, 4)), actions], axis=1)
            critics = [jax.tree.map(lambda p, k=k: np.asarray(p[k], float), layers) for k in range(3)]
            pools.append(np.min([numpy_mlp(critic, inputs)[:, 0] for critic in critics], axis=0))
        pools = np.array(pools)
        assert member["spread"] == pytest.approx(np.sqrt(pools[:7].var(axis=1).mean()), rel=1e-3)
        assert [row["n"] for row in member["rows"]] == [1, 2, 4, 5]
        for row in member["rows"]:
            subsets = pools[:, list(itertools.combinations(range(5), row["n"]))]
            gaps = pools.max(axis=1) - subsets.max(axis=-1).mean(axis=-1)
            factor = member["discount"] / (1 - member["discount"])
            after = np.where(data["terminations"][rows], 0.0, gaps[7:])
            expected = {"mean": gaps[:7].mean(), "quantile_90": np.percentile(gaps[:7], 90), "max": gaps[:7].max()}
            expected |= {"bound_eq_9": factor * gaps.max(), "bound_eq_8": factor * after.max()}
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


def test_what_does_not_fit_is_said_in_one_line(begun: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    def copy(name: str, **changes: object) -> Path:
        shutil.copytree(begun, tmp_path / name)
        config = json.loads((begun / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    data = dict(np.load(begun.parent / "data.npz"))
    np.savez(tmp_path / "other.npz", **data | {"rewards": data["rewards"] + 1})
    (tmp_path / "file").write_text("no run")
    without, broken = copy("without"), copy("broken")
    shutil.rmtree(without / "checkpoint")
    (broken / "config.json").write_text("{")
    for words, message in (
        ([tmp_path / "none"], "holds no run"),
        ([tmp_path / "file"], "holds no run"),
        ([copy("iql", algorithm="iql")], "a run of iql"),
        ([broken], "damaged"),
        ([copy("flags", flags={})], "another version"),
        ([without], "there is no file"),
        ([begun, "--dataset", tmp_path / "other.npz"], "not the dataset of the run"),
        ([begun], "have not been trained"),
        ([begun, "--pool", 1], "--pool 1"),
        ([begun, "--num-states", 0], "--num-states 0"),
    ):
        outcome = command(*words)
        assert outcome.status == 2 and message in outcome.err and outcome.err.startswith("error: "), words
        assert outcome.err.count("\n") == 1


def test_the_module_runs_from_the_root(spawn: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    process = spawn("-m", "benchmarks.complexity", tmp_path, cwd=ROOT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err == f"error: {tmp_path} holds no run: it has no config.json\n"
