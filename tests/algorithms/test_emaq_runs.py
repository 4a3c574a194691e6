"""Whole runs of EMaQ: the phase of the behaviour model, its reuse by other runs, the pool, rounds of online steps.

All runs have two members of the same sizes, so that few programs are compiled.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    Outcome,
    arrays_of,
    assert_refused,
    assert_same_arrays,
    done_in,
    edit_metadata,
    hopper_like,
    rows_of,
    signalled_after,
    smaller,
)

from common import members, runs
from common.runs import Run

SIZES = ["--num-layers", "1", "--num-critics", "3", "--num-bins", "4", "--behavior-learning-rate", "0.05"]
LENGTH = ["--num-updates", "60", "--behavior-updates", "120", "--pool-uses", "1"]  # 400 rows / 16: anew at 25 and 50
Emaq = Callable[..., Outcome]


@pytest.fixture
def emaq(script: Callable[..., Outcome], small_run: list[str]) -> Emaq:
    """`emaq(*flags)`: a small run with two members."""
    sizes = [*small_run, *smaller("emaq"), *SIZES, "--num-seeds", "2", "--eval-every", "0"]
    return lambda *flags: script("emaq", *sizes, *flags)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is that others are compared with; the first test that needs it makes it."""
    return tmp_path_factory.mktemp("source") / "run"


@pytest.fixture
def through(source: Path, emaq: Emaq) -> Path:
    """A run without interruption."""
    if not source.exists():
        outcome = emaq(*LENGTH, "--run-dir", source)
        assert (outcome.status, outcome.err) == (0, "")
    return source


def part_of(directory: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one part of the members' states, `[members, ...]`."""
    found = {key: value for key, value in arrays_of(directory).items() if key.startswith(f"['state'].{name}")}
    assert found
    return found


def behavior_of(directory: Path) -> list[np.ndarray]:
    return list(part_of(directory, "behavior[").values())


def count_of(directory: Path, what: str) -> list[int]:
    return part_of(directory, what)[f"['state'].{what}"].tolist()


def test_the_behavior_model_has_a_phase_of_its_own(through: Path) -> None:
    rows = rows_of(through / "pretraining.csv")
    assert [(row["step"], row["seed"]) for row in rows] == [("120", "0"), ("120", "1")]
    assert set(rows[0]) == {"step", "member", "seed", "behavior/loss"}
    assert [row["step"] for row in rows_of(through / "metrics.csv")[-2:]] == ["60", "60"]
    assert done_in(through) == {"pretraining": 120, "offline": 60, "online": 0}
    assert count_of(through, "behavior_opt.count") == [120, 120], "frozen offline"
    assert count_of(through, "critic_opt.count") == count_of(through, "step") == [60, 60]


@pytest.mark.slow
def test_interrupted_in_both_phases_and_in_other_chunks_it_ends_the_same(
    tmp_path: Path, emaq: Emaq, through: Path
) -> None:
    """To the last bit: the pool is drawn again as it was, and anew at the same updates, wherever chunks end."""
    run = tmp_path / "run"
    with signalled_after(1):
        assert emaq(*LENGTH, "--run-dir", run).status == 143
    assert done_in(run) == {"pretraining": 100, "offline": 0, "online": 0}
    again = [*LENGTH, "--checkpoint-every", "40", "--run-dir", run, "--resume", "True"]
    with signalled_after(1):
        assert emaq(*again).status == 143
    assert [row["step"] for row in rows_of(run / "pretraining.csv")[::2]] == ["100", "120"]
    with signalled_after(1):
        assert emaq(*again).status == 143
    assert done_in(run)["offline"] == 25
    assert emaq(*again).status == 0
    assert_same_arrays(run, through)


def test_the_pool_is_drawn_anew_whenever_its_states_have_been_used(
    tmp_path: Path, emaq: Emaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that tells pools apart, in place of training; after 25 and 50 updates of 60 there is another one."""

    def number(state: Any, hp: Any, data: Any, num_updates: Any, **_: Any) -> tuple[Any, members.Metrics]:
        pool, n = data.extra[data.member].astype(jnp.float32), jnp.int32(num_updates)
        weights = jnp.linspace(0.0, 1.0, pool.size).reshape(pool.shape)
        return state, members.Metrics({"pool": n * (pool * weights).mean()}, {"pool": n})

    monkeypatch.setattr("algorithms.emaq.train", number)
    assert emaq(*LENGTH, "--checkpoint-every", "5", "--run-dir", tmp_path / "run").status == 0
    found: dict[str, list[str]] = {}
    for row in rows_of(tmp_path / "run/metrics.csv"):
        found.setdefault(row["seed"], []).append(row["pool"])
    pools = [[set(x[:5]), set(x[5:10]), set(x[10:])] for x in found.values()]
    assert [len(x) for x in found.values()] == [12, 12] and all(len(x) == 1 for three in pools for x in three)
    assert len(set().union(*pools[0], *pools[1])) == 6, "each member draws its own"


def test_the_behavior_models_of_another_run(
    tmp_path: Path, emaq: Emaq, through: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Member of seed 1 takes that of seed 1; of seed 2, the first. They are used at once, and do not change."""
    used, save = [], Run.save

    def seen(self: Run, trees: dict[str, Any]) -> None:
        used.append([np.asarray(x) for x in jax.tree.leaves(trees["state"].behavior)])
        save(self, trees)

    monkeypatch.setattr(Run, "save", seen)
    flags = [
        "--num-updates",
        "5",
        "--eval-every",
        "5",
        "--seed",
        "1",
        "--pool-uses",
        "1",
        "--run-dir",
        tmp_path / "run",
    ]
    outcome = emaq(*flags, "--behavior-checkpoint", through)
    assert (outcome.status, outcome.err) == (0, "")
    theirs = [x[[1, 0]] for x in behavior_of(through)]
    assert all(np.array_equal(a, b) for a, b in zip(behavior_of(tmp_path / "run"), theirs, strict=True))
    assert len(used) >= 2
    for arrays in used:
        assert sorted(x.tobytes() for x in arrays) == sorted(x.tobytes() for x in theirs)
    assert any((x[0] != x[1]).any() for x in theirs)
    assert not (tmp_path / "run/pretraining.csv").exists()
    assert count_of(tmp_path / "run", "behavior_opt.count") == [120, 120], "Adam's moments come along"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--behavior-checkpoint", "{nothing}"], ["there is no file"]),
        (["--behavior-checkpoint", "{empty}"], ["there is no file"]),
        (["--dataset", "{other}"], ["another dataset"]),
        (["--normalize-observations", "True"], ["--normalize-observations"]),
        (["--embedding-dim", "7"], ["is of another run or script"]),
        pytest.param(["--embedding-layers", "2"], ["is of another run or script"], marks=pytest.mark.slow),
        pytest.param(["--behavior", "vae"], ["is of another run or script"], marks=pytest.mark.slow),
    ],
    ids=["missing", "empty", "dataset", "normalisation", "sizes", "layers", "kind"],
)
def test_behavior_models_that_do_not_fit_are_refused(
    tmp_path: Path, emaq: Emaq, through: Path, flags: list[str], words: list[str]
) -> None:
    other = hopper_like()
    other["rewards"] += 1
    np.savez(tmp_path / "other.npz", **other)
    (tmp_path / "empty").mkdir()
    names = {"{nothing}": "nothing", "{empty}": "empty", "{other}": "other.npz"}
    places = {name: str(tmp_path / file) for name, file in names.items()}
    flags = [places.get(flag, flag) for flag in flags]
    outcome = emaq("--num-updates", "5", "--run-dir", tmp_path / "run", "--behavior-checkpoint", through, *flags)
    assert_refused(outcome, *words)
    assert not (tmp_path / "run/config.json").exists(), "so that the corrected command may use it"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"done": {"pretraining": 50, "offline": 0, "online": 0}}, "pretraining phase"),
        ({"done": {"pretraining": 120, "offline": 60, "online": 3}}, "online phase"),
        ({"diverged": {"1": {"step": 3}}}, "seed 1 diverged"),
        ({"seeds": None}, "damaged or was edited"),
    ],
    ids=["unfinished", "online", "diverged", "edited"],
)
def test_behavior_models_of_a_run_that_went_wrong_are_refused(
    tmp_path: Path, emaq: Emaq, through: Path, changes: dict[str, Any], words: str
) -> None:
    shutil.copytree(through / "checkpoint", tmp_path / "source" / "checkpoint")
    edit_metadata(tmp_path / "source", **changes)
    outcome = emaq("--num-updates", "5", "--run-dir", tmp_path / "run", "--behavior-checkpoint", tmp_path / "source")
    assert_refused(outcome, words)


@pytest.mark.slow
def test_without_memory_for_the_pool_updates_draw_their_own_proposals(
    tmp_path: Path, emaq: Emaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message, and the same run as without a pool."""
    flags = ["--num-updates", "20", "--behavior-updates", "4"]
    outcome = emaq(*flags, "--proposal-pool", "0", "--run-dir", tmp_path / "none")
    assert (outcome.status, outcome.err) == (0, "")
    # 400 rows, 300 sets of 4 proposals in 3 dimensions for two members: 2.9 MB.
    monkeypatch.setattr(members.Members, "memory", lambda self: 5_000_000)
    outcome = emaq(*flags, "--proposal-pool", "300", "--run-dir", tmp_path / "short")
    assert outcome.status == 0
    assert outcome.err.count("\n") == 1 and "more than half of the memory" in outcome.err
    assert_same_arrays(tmp_path / "none", tmp_path / "short")
    monkeypatch.undo()
    again = [*flags, "--proposal-pool", "300", "--run-dir", tmp_path / "short", "--resume", "True"]
    assert_refused(emaq(*again, "--num-updates", "40"), "--proposal-pool 0, not 300")


@pytest.mark.slow
def test_online_in_rounds_of_steps_and_as_many_updates(
    tmp_path: Path, emaq: Emaq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From scratch, five steps at a time, the first three at random; mu learns with every update."""
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    run = tmp_path / "run"
    flags = ["--num-updates", "0", "--online-steps", "12", "--steps-per-iteration", "5", "--run-dir", run]
    outcome = emaq(*flags, "--random-steps", "3")
    assert (outcome.status, outcome.err) == (0, "")
    assert [row["step"] for row in rows_of(run / "metrics.csv")[::2]] == ["5", "10", "12"]
    arrays = arrays_of(run)
    assert arrays["['ring'].written"].tolist() == [12, 12]
    observations, following = (arrays[f"['ring'].data.{name}"] for name in ("observations", "next_observations"))
    assert observations.shape[1] == 12 and (np.abs(observations).sum(axis=-1) > 0).all(), "all rows are written"
    ends = arrays["['ring'].data.terminations"] + arrays["['ring'].data.truncations"]
    np.testing.assert_array_equal(observations[:, 1:][ends[:, :-1] == 0], following[:, :-1][ends[:, :-1] == 0])
    assert all(float(row["behavior/loss"]) for row in rows_of(run / "metrics.csv"))
    for name in ("step", "critic_opt.count", "behavior_opt.count"):
        assert count_of(run, name) == [9, 9]
    assert not (run / "pretraining.csv").exists()


@pytest.mark.slow
def test_the_vae_as_behavior_model(tmp_path: Path, emaq: Emaq) -> None:
    outcome = emaq(
        "--behavior", "vae", "--num-updates", "20", "--behavior-updates", "10", "--run-dir", tmp_path / "run"
    )
    assert (outcome.status, outcome.err) == (0, "")
    (row, _) = rows_of(tmp_path / "run/pretraining.csv")
    assert float(row["behavior/loss"]) == pytest.approx(
        float(row["behavior/error"]) + 0.5 * float(row["behavior/divergence"]), rel=1e-5
    )
    assert "critic/loss" in rows_of(tmp_path / "run/metrics.csv")[0]
