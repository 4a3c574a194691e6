"""The run directory: files, columns, exit statuses, bad input, signals, resuming, two processes at once."""

import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ROOT,
    arrays_of,
    assert_refused,
    assert_same_arrays,
    assert_same_tables,
    done_in,
    edit_metadata,
    hopper_like,
    rows_of,
    signalled_after,
    smaller,
)

from algorithms.iql import PRESETS, Args, main
from benchmarks import curves
from common import environments, members, report, runs
from common.cli import UsageError, optional, parse
from common.data import load
from common.members import Metrics
from common.replay import fit_transform
from common.runs import Run

IQL = ROOT / "algorithms" / "iql.py"
EVALUATIONS = "phase,step,member,seed,return_mean,return_std,score_mean,score_std,episodes"
HOPPER_LOW, HOPPER_HIGH = -20.272305, 3234.3  # D4RL's reference returns


@pytest.fixture(scope="module")
def small_run(small_run: list[str]) -> list[str]:
    return [*small_run, *smaller("iql")]


# A finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Six members with evaluations and checkpoints along the way."""
    directory, out, err = tmp_path_factory.mktemp("finished") / "new" / "run", io.StringIO(), io.StringIO()
    flags = ["--dataset", tiny, "--env", "Hopper-v5", "--hidden-dim", 8, "--batch-size", 16, "--grid", "beta=1,2"]
    flags += ["--num-seeds", 3, "--seed", 4, "--num-updates", 50, "--eval-every", 20, "--checkpoint-every", 30]
    flags += ["--eval-episodes", 2, "--final-eval-episodes", 3, "--run-dir", directory]
    with redirect_stdout(out), redirect_stderr(err):
        main(parse(Args, PRESETS, list(map(str, flags))))
    assert all(line.startswith(("iql offline ", "--normalize-returns")) for line in err.getvalue().splitlines())
    assert str(directory) in out.getvalue()
    return directory


def test_files_of_a_run(finished: Path) -> None:
    names = {"config.json", "metrics.csv", "evaluations.csv", "final.json", "returns.csv", "curves.png", "grid.png"}
    assert {path.name for path in finished.iterdir()} - {".lock"} == {*names, "checkpoint"}
    assert [path.name for path in (finished / "checkpoint").iterdir()] == ["state.npz"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_have_a_row_for_each_chunk_and_member(finished: Path) -> None:
    header = (finished / "metrics.csv").read_text().split("\n")[0].split(",")
    assert header[:3] == ["step", "member", "seed"] and len(header) > 3
    rows = rows_of(finished / "metrics.csv")
    found = [(int(row["step"]), int(row["member"]), int(row["seed"])) for row in rows]
    assert found == [(step, i, 4 + i % 3) for step in (20, 30, 40, 50) for i in range(6)]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def test_evaluations_are_at_their_steps(finished: Path) -> None:
    assert (finished / "evaluations.csv").read_text().split("\n")[0] == EVALUATIONS
    rows = rows_of(finished / "evaluations.csv")
    found = [(row["phase"], int(row["step"]), int(row["member"]), int(row["seed"]), row["episodes"]) for row in rows]
    steps = [(0, "2"), (20, "2"), (40, "2"), (50, "3")]
    assert found == [("offline", step, i, 4 + i % 3, episodes) for step, episodes in steps for i in range(6)]
    for row in rows:
        score = 100 * (float(row["return_mean"]) - HOPPER_LOW) / (HOPPER_HIGH - HOPPER_LOW)
        assert float(row["score_mean"]) == pytest.approx(score, rel=1e-5)
        spread = 100 * float(row["return_std"]) / (HOPPER_HIGH - HOPPER_LOW)
        assert float(row["score_std"]) == pytest.approx(spread, rel=1e-5)


@pytest.mark.slow
def test_how_long_each_phase_takes_is_said_as_soon_as_there_is_a_rate(
    tmp_path: Path, small_run: list[str], iql: Any
) -> None:
    """Not on a terminal; the first stretch compiles, and is in no rate."""
    flags = [*small_run, "--num-updates", "400", "--online-steps", "300", "--eval-every", "0"]
    outcome = iql(*flags, "--quiet", "False", "--run-dir", tmp_path / "loud")
    lines = [line for line in outcome.err.splitlines() if line.endswith("left")]
    assert [line.split(",")[0] for line in lines] == [
        *("iql offline 200/400", "iql offline 400/400", "iql online 200/300", "iql online 300/300")
    ]
    assert iql(*flags, "--run-dir", tmp_path / "quiet") == (0, outcome.out.replace("loud", "quiet"), "")


def test_config_tells_how_it_was_made(finished: Path, tiny: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["algorithm"] == "iql" and config["environment"] == "Hopper-v5" and config["transitions"] == 400
    flags = config["flags"]
    assert {*Args.__dataclass_fields__, *Args().hp._fields} - {"hp"} <= flags.keys()
    assert (flags["dataset"], flags["num_updates"], flags["grid"]) == (str(tiny), 50, "beta=1,2")
    members = config["members"]
    assert [(m["member"], m["seed"]) for m in members] == [(i, 4 + i % 3) for i in range(6)]
    assert [m["hyperparameters"]["beta"] for m in members] == [1, 1, 1, 2, 2, 2]
    assert all(m["hyperparameters"].keys() == set(Args().hp._fields) for m in members)
    assert [m["swept"] for m in members] == [{"beta": 1.0}] * 3 + [{"beta": 2.0}] * 3
    for package in ("jax", "flax", "gymnasium", "mujoco"):
        assert config["versions"][package] == importlib.metadata.version(package)
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (config["git_commit"] or "") == head.stdout.strip() or len(config["git_commit"]) == 40
    assert config["device"]["platform"] == os.environ["JAX_PLATFORMS"]
    returns = hopper_like()["rewards"].reshape(20, 20).sum(axis=1, dtype=float)  # the preset of locomotion
    assert config["transform"]["reward_scale"] == pytest.approx(1000 / (returns.max() - returns.min()), rel=1e-5)


def test_final_json_follows_from_its_members(finished: Path) -> None:
    final = json.loads((finished / "final.json").read_text())
    last = [row for row in rows_of(finished / "evaluations.csv") if row["step"] == "50"]
    for member, row in zip(final["members"], last, strict=True):
        for name in ("return_mean", "return_std", "score_mean", "score_std", "episodes"):
            assert member[name] == pytest.approx(float(row[name]), rel=1e-5)
        assert member["diverged"] is None
    for what in ("score", "return"):
        values = sorted(member[f"{what}_mean"] for member in final["members"])
        aggregate = final["aggregate"][what]
        assert aggregate["iqm"] == pytest.approx(sum(values[1:5]) / 4)  # a quarter of six, rounded down, is one
        assert values[0] <= aggregate["ci_low"] <= aggregate["iqm"] <= aggregate["ci_high"] <= values[-1]
        assert aggregate["count"] == 6
        for i, combination in enumerate(final["combinations"]):
            assert combination["swept"] == {"beta": i + 1.0}
            three = [member[f"{what}_mean"] for member in final["members"][3 * i : 3 * i + 3]]
            assert combination[what]["iqm"] == pytest.approx(sum(three) / 3)
    assert len(final["combinations"]) == 2
    episodes = rows_of(finished / "returns.csv")
    assert [(row["member"], row["episode"]) for row in episodes] == [
        (str(m), str(e)) for m in range(6) for e in range(3)
    ]
    for member in final["members"]:
        own = [float(row["return"]) for row in episodes if row["member"] == str(member["member"])]
        assert member["return_mean"] == pytest.approx(np.mean(own), rel=1e-5)
    assert final["updates"] == 50 and final["online_steps"] == 0
    assert final["wall_clock_seconds"] > 0 and final["updates_per_second"] > 0


def test_who_diverges_as_a_signal_comes_has_ended(tmp_path: Path, tiny: Path) -> None:
    """There is nothing to go on with: status 3 and a final.json, as without the signal."""
    args = Args(dataset=str(tiny), env="Hopper-v5", quiet=True, run_dir=str(tmp_path), num_updates=30)
    population, dataset = members.make_members(args), load(str(tiny), "Hopper-v5")
    with Run("iql", args, population) as run, pytest.raises(SystemExit, match="3"):
        run.restore({"state": {}}, dataset, fit_transform(dataset.transitions, args))
        for _, stop in run.chunks("offline", args.num_updates):
            run.signal = signal.SIGTERM
            run.record(stop, Metrics({"loss": np.array([np.inf])}, {"loss": np.array([1])}), np.array([False]))
    assert json.loads((tmp_path / "final.json").read_text())["members"][0]["diverged"]["metric"] == "loss"


def test_rows_are_of_their_members_and_of_those_that_have_not_diverged(tmp_path: Path, tiny: Path) -> None:
    """Without any training: half of six members on two devices; the first of them breaks in the second stretch."""
    shape = {"num_updates": 30, "eval_every": 10, "num_seeds": 6, "seed": 4, "shard": "1/2"}
    args = Args(dataset=str(tiny), env="Hopper-v5", quiet=True, run_dir=str(tmp_path), **shape)
    population, dataset = members.make_members(args), load(str(tiny), "Hopper-v5")
    places = np.arange(len(population.seeds))
    returns = np.float64([[1, 3], [10, 30], [100, 300]])
    result = environments.Returns(returns, np.float64([[0, 1], [1, 1], [0, 0]]))
    with Run("iql", args, population) as run:
        run.restore({"state": {}}, dataset, fit_transform(dataset.transitions, args))
        for start, stop in run.chunks("offline", args.num_updates):
            if run.evaluation_due():
                run.record_evaluation(result)
            sums = {"often": 60.0 + 10 * places + start, "seldom": 6.0 + places}
            counts = {"often": np.full_like(places, 10), "seldom": np.full_like(places, 2)}
            run.record(stop, Metrics(sums, counts), np.array(places != 0) | (start != 10))
            time.sleep(0.5 * (stop == 30))  # the last checkpoint, which is in no rate
        assert run.rate("offline", members=1) > 20 / 0.5
        run.clock["offline"] = [(10, 100.0), (30, 105.0)]
        run.finish(result)
    part, who = tmp_path / "part-1", [("1", "5"), ("3", "7"), ("5", "9")]
    rows = [
        (int(row["step"]), (row["member"], row["seed"]), float(row["often"]), float(row["seldom"]))
        for row in rows_of(part / "metrics.csv")
    ]
    of_step = {
        step: [(step, who[i], 6.0 + i + (step - 10) / 10, 3.0 + i / 2) for i in range(3)] for step in (10, 20, 30)
    }
    assert rows == [*of_step[10], *of_step[20], *of_step[30][1:]]
    found = [
        (
            row["step"],
            (row["member"], row["seed"]),
            *(float(row[x]) for x in ("return_mean", "return_std", "success_mean")),
        )
        for row in rows_of(part / "evaluations.csv")
    ]
    values = [(2.0, 1.0, 0.5), (20.0, 10.0, 1.0), (200.0, 100.0, 0.0)]
    living = {"0": (0, 1, 2), "10": (0, 1, 2), "20": (1, 2), "30": (1, 2)}
    assert found == [(step, who[i], *values[i]) for step, alive in living.items() for i in alive]
    final = json.loads((part / "final.json").read_text())
    assert [(x["member"], x["return_mean"]) for x in final["members"]] == [(1, None), (3, 20.0), (5, 200.0)]
    assert [x["diverged"] and x["diverged"]["step"] for x in final["members"]] == [10, None, None]
    episodes = [(row["member"], row["episode"], float(row["return"])) for row in rows_of(part / "returns.csv")]
    assert episodes == [("3", "0", 10.0), ("3", "1", 30.0), ("5", "0", 100.0), ("5", "1", 300.0)]
    assert final["updates_per_second"] == 2 * 20 / 5, "of both that live"


# Interruption and resuming

LONG = [
    "--num-updates",
    "120",
    "--eval-every",
    "50",
    "--checkpoint-every",
    "20",
    "--num-seeds",
    "3",
]  # on two cores the last is padded


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small_run: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    main(parse(Args, PRESETS, [*small_run, *LONG, "--run-dir", str(directory)]))
    return directory


KILLED = '''
"""Run IQL, and end this process by SIGKILL at the n-th event of a kind."""
import os, signal, sys
kind, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
from common.runs import Run
replace, record, record_evaluation = os.replace, Run.record, Run.record_evaluation

def die_at(event, path=None):
    global count
    count -= event == kind
    if event == kind and count == 0:
        if path:  # half of the last row reached the disk
            os.truncate(path, path.stat().st_size - 5)
        os.kill(os.getpid(), signal.SIGKILL)

def renamed(source, target):
    replace(source, target)
    if str(target).endswith("state.npz"):
        die_at("written")

def recorded(run, *arguments):
    record(run, *arguments)
    die_at("metrics", run.path / "metrics.csv")

def evaluated(run, *arguments):
    record_evaluation(run, *arguments)
    die_at("evaluations", run.path / "evaluations.csv")

os.replace, Run.record, Run.record_evaluation = renamed, recorded, evaluated
from algorithms import iql
from common.cli import launch
launch(iql.main, iql.Args, iql.PRESETS)
'''


@pytest.mark.parametrize(
    ("kind", "count", "done"),
    [
        ("metrics", 2, 20),
        pytest.param("metrics", 1, 0, marks=pytest.mark.slow),
        pytest.param("evaluations", 2, 50, marks=pytest.mark.slow),
        pytest.param("written", 2, 20, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_resumes_bit_for_bit(
    tmp_path: Path,
    small_run: list[str],
    iql: Any,
    spawn: Callable[..., subprocess.Popen],
    uninterrupted: Path,
    kind: str,
    count: int,
    done: int,
) -> None:
    """In the middle of a row, or as a checkpoint has taken its place."""
    program, run = tmp_path / "killed.py", tmp_path / "run"
    program.write_text(KILLED)
    flags = [*small_run, *LONG, "--run-dir", run, "--resume", "True"]
    process = spawn(program, kind, count, *flags)
    _, err = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL, err
    assert done_in(run)["offline"] == done
    assert iql(*flags).status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["state.npz"]


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # Python's own, but for a job in the background, which ignores it
    run = tmp_path / "run"
    with signalled_after(3, signal.SIGINT):
        outcome = iql(*small_run, *LONG, "--run-dir", run)
    assert outcome.status == 130
    assert [line.split()[0] for line in outcome.err.splitlines()] == ["stopping", "stopped;"]
    assert done_in(run)["offline"] == 50, "between two regular checkpoints"
    assert not (run / "final.json").exists()
    outcome = iql(*small_run, *LONG, "--run-dir", run, "--resume", "True")
    assert (outcome.status, outcome.err) == (0, "")
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)
    assert signal.getsignal(signal.SIGINT) is handler, "handlers are given back"


def test_a_signal_between_two_stretches_leaves_a_checkpoint(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too late for the checkpoint of the stretch before: that of the next has it."""
    calls: list[int] = []
    monkeypatch.setattr(Run, "_progress", lambda *_: calls or calls.append(1) or signal.raise_signal(signal.SIGTERM))
    run = tmp_path / "run"
    outcome = iql(*small_run, "--num-updates", 300, "--eval-every", 0, "--run-dir", run)
    assert outcome.status == 143 and "--resume True" in outcome.err
    assert done_in(run)["offline"] == 200


@pytest.mark.parametrize("notebook", [False, True])
def test_a_second_signal_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: bool) -> None:
    """JAX would wait for its updates at an ordinary exit; but a notebook's kernel shall live."""
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(("at once", status)))
    monkeypatch.setattr(sys, "exit", lambda status: ended.append(("in order", status)))
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    if not notebook:
        monkeypatch.delattr(sys, "ps1")
    with Run("iql", Args(run_dir=str(tmp_path / "run")), members.make_members(Args())) as run:
        signal.raise_signal(signal.SIGTERM)
        assert run.stopping() and not ended
        signal.raise_signal(signal.SIGINT)
    assert ended == [("in order" if notebook else "at once", 130)]


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_ends_a_run_as_a_signal_does_unless_nohup_keeps_it(tmp_path: Path, handler: Any) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with Run("iql", Args(run_dir=str(tmp_path / "run")), members.make_members(Args())) as run:
            signal.raise_signal(signal.SIGHUP)
            assert run.stopping() == (handler == signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_signals_to_the_main_one(tmp_path: Path) -> None:
    """As a search over hyperparameters starts it: Python lets no other thread set handlers."""
    before, steps = signal.getsignal(signal.SIGINT), []

    def one() -> None:
        with Run("iql", Args(run_dir=str(tmp_path / "run")), members.make_members(Args())) as run:
            steps.append((run.steps(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=one)
    thread.start()
    thread.join()
    assert steps == [(0, before)] and signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    """In the last one too: without it the run is not finished."""
    run, original, calls = tmp_path / "run", environments.Evaluator.run, []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 5):
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(environments.Evaluator, "run", interrupted)
        for done in (50, 120):
            outcome = iql(*small_run, *LONG, "--run-dir", run, "--resume", "True")
            assert (outcome.status, done_in(run)["offline"]) == (143, done)
            assert not (run / "final.json").exists()
    assert iql(*small_run, *LONG, "--run-dir", run, "--resume", "True").status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


@pytest.mark.slow
def test_a_signal_from_outside_ends_the_process(
    tmp_path: Path, small_run: list[str], spawn: Callable[..., subprocess.Popen]
) -> None:
    run = tmp_path / "run"
    process = spawn(IQL, *small_run, "--num-updates", 10**8, "--eval-every", 0, "--run-dir", run)
    until = time.monotonic() + 200
    while not (run / "metrics.csv").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143
    assert [line.split()[0] for line in err.splitlines()] == ["stopping", "stopped;"]
    done = done_in(run)["offline"]
    assert done > 0 and done == int(rows_of(run / "metrics.csv")[-1]["step"])


def test_where_chunks_end_does_not_matter(tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    others = ["--num-updates", "120", "--eval-every", "0", "--checkpoint-every", "7", "--num-seeds", "3"]
    assert iql(*small_run, *others, "--run-dir", run).status == 0
    assert_same_arrays(run, uninterrupted)
    final = [json.loads((path / "final.json").read_text())["members"] for path in (run, uninterrupted)]
    assert final[0] == final[1]
    assert [row["step"] for row in rows_of(run / "evaluations.csv")] == ["120"] * 3


def test_the_time_before_a_resumption_counts(small_run: list[str], iql: Any, taken: Path) -> None:
    edit_metadata(taken, seconds=10_000.0)
    before = (taken / "final.json").read_bytes()
    assert iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True").status == 0
    assert (taken / "final-120.json").read_bytes() == before, "what the run had, also where it is then interrupted"
    assert 10_000 < json.loads((taken / "final.json").read_text())["wall_clock_seconds"] < 11_000


def test_once_an_online_step_was_made_lengths_are_fixed(small_run: list[str], iql: Any, taken: Path) -> None:
    """As a slow test shows of a whole run: here the checkpoint says so."""
    edit_metadata(taken, done={"pretraining": 0, "offline": 120, "online": 3})
    for flag, value in (("--online-steps", 9), ("--num-updates", 130), ("--max-episode-steps", 3)):
        outcome = iql(*small_run, *LONG, flag, value, "--run-dir", taken, "--resume", "True")
        assert_refused(outcome, flag, f"not {value}")


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, small_run: list[str], iql: Any, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert iql(*small_run, *LONG, "--run-dir", run, "--resume", "True").status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


@pytest.mark.slow
def test_what_died_before_its_first_checkpoint_starts_again(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    short = [*small_run, "--num-updates", "10", "--eval-every", "0"]

    def dies(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", dies)
        with pytest.raises(RuntimeError, match="out of memory"):
            iql(*short, "--run-dir", run)
    assert not (run / "checkpoint").exists()
    assert_refused(iql(*short, "--run-dir", run), "--resume True")
    assert iql(*short, "--run-dir", run, "--resume", "True").status == 0
    assert iql(*short, "--run-dir", fresh).status == 0
    assert_same_arrays(run, fresh)
    assert_same_tables(run, fresh)


@pytest.mark.parametrize("resume", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_do_not_share_a_directory(
    tmp_path: Path, small_run: list[str], iql: Any, spawn: Callable[..., subprocess.Popen], resume: bool
) -> None:
    run = tmp_path / "run"
    flags = ["--num-updates", "10", "--eval-every", "0", "--run-dir", run, "--resume", str(resume)]
    code = f"""
import sys
from algorithms.iql import Args
from common.members import make_members
from common.runs import Run
args = Args(run_dir={str(run)!r}, resume={resume})
run = Run("iql", args, make_members(args))
print("held", flush=True)
sys.stdin.read()
"""
    holder = spawn("-c", code, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    before = snapshot(run)
    assert_refused(iql(*small_run, *flags), "another process", str(run))
    assert snapshot(run) == before
    holder.communicate("")
    args = Args(run_dir=str(run), resume=resume)
    Run("iql", args, members.make_members(args)).lock.close()  # the other one has ended


@pytest.mark.slow
def test_without_a_checkpoint_the_tables_start_anew(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    """What a run killed before its first checkpoint left behind may be of other seeds."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    short = [*small_run, "--num-updates", "10"]
    assert iql(*short, "--seed", "7", "--run-dir", run).status == 0
    shutil.rmtree(run / "checkpoint")
    (run / "final.json").unlink()
    before = snapshot(run)
    assert_refused(iql(*short, "--run-dir", run), "--resume True", str(run))
    assert snapshot(run) == before, "results without a checkpoint are not overwritten unasked"
    (run / "mine.csv").write_text("a,b\n1,2\n")
    for directory in (run, fresh):
        assert iql(*short, "--run-dir", directory, "--resume", "True").status == 0
    assert_same_tables(run, fresh)
    assert (run / "mine.csv").read_text() == "a,b\n1,2\n", "no table of the run's"


def test_a_full_disk_and_a_failing_evaluation_leave_a_checkpoint(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch, uninterrupted: Path
) -> None:
    """The disk the last one; the evaluation that of its step, which is no multiple of --checkpoint-every.

    And no row is there twice.
    """
    run, original, calls = tmp_path / "run", runs.save_tree, []

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(*arguments: Any) -> None:
        calls.append(1)
        with monkeypatch.context() as this:
            if len(calls) == 4:  # after those of steps 0, 20 and 40
                this.setattr(os, "fsync", full)
            original(*arguments)

    def failing(*_: Any) -> None:
        raise RuntimeError("the simulation is unstable")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_tree", save)
        outcome = iql(*small_run, *LONG, "--run-dir", run)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1 and "No space left" in outcome.err
    assert done_in(run)["offline"] == 40
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["state.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(environments.Evaluator, "run", failing)
        with pytest.raises(RuntimeError, match="unstable"):
            iql(*small_run, *LONG, "--run-dir", run, "--resume", "True")
    assert done_in(run)["offline"] == 50
    assert iql(*small_run, *LONG, "--run-dir", run, "--resume", "True").status == 0
    assert_same_arrays(run, uninterrupted)
    assert_same_tables(run, uninterrupted)


# Policies


def test_what_is_saved_is_on_no_device() -> None:
    """Cut off there, the padding of rings on several devices would put all rings on each of them."""
    three = members.make_members(Args(num_seeds=3))
    trees = {"ring": three.shard(np.arange(4.0)), "state": three.keys(0)}
    run = Run.__new__(Run)
    run.members, run.done = three, {"online": 1}
    kept = run._kept(trees)
    assert kept["ring"].tolist() == [0, 1, 2] and isinstance(kept["ring"], np.ndarray) and len(kept["state"]) == 3


def test_the_best_policy_of_each_member_is_kept_beside_the_last(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Returns at 0, 10 and 20 updates: the first member is best at 10, the second at 0: NaN is no return."""
    found = iter(([1.0, 9.0], [5.0, np.nan], [5.0, 2.0]))  # the later of two that are level is not better
    states: list[np.ndarray] = []

    def run(self: environments.Evaluator, policy: Any, episodes: int, *_: Any) -> environments.Returns:
        returns = np.array(next(found))[:, None]
        (name,) = (name for name in arrays_of(tmp_path / "run") if name.endswith("actor['params']['log_std']"))
        states.append(arrays_of(tmp_path / "run")[name])
        return environments.Returns(returns, np.full_like(returns, np.nan))

    monkeypatch.setattr(environments.Evaluator, "run", run)
    flags = ["--num-seeds", "2", "--keep-best", "True", "--eval-every", "10", "--num-updates", "20"]
    assert iql(*small_run, *flags, "--run-dir", tmp_path / "run").status == 0
    best = report.read_tree(tmp_path / "run" / "checkpoint" / "best.npz")[0]
    (kept,) = (array for name, array in best.items() if name.endswith("actor['params']['log_std']"))
    assert not np.array_equal(states[0], states[1]) and not np.array_equal(states[1], states[2])
    np.testing.assert_array_equal(kept, [states[1][0], states[0][1]])
    assert not any("ring" in name for name in best)


def test_the_best_policy_stays_the_best_where_a_finished_run_goes_on(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation, 20 after 20 updates, leaves the tables when the run goes on."""
    found = iter([1.0, 2.0, 20.0, 19.0, 12.0, 3.0, 21.0, 22.0])

    def run(self: environments.Evaluator, *_: Any) -> environments.Returns:
        return environments.Returns(np.full((1, 1), next(found)), np.full((1, 1), np.nan))

    monkeypatch.setattr(environments.Evaluator, "run", run)
    flags = ["--eval-every", "10", "--run-dir", tmp_path / "run", "--resume", "True"]
    assert iql(*small_run, *flags, "--keep-best", "True", "--num-updates", "20").status == 0
    best = tmp_path / "run" / "checkpoint" / "best.npz"
    first = report.read_tree(best)
    assert first[0]["returns"] == [20.0] and first[1]["done"]["offline"] == 20
    assert iql(*small_run, *flags, "--keep-best", "True", "--num-updates", "40").status == 0
    assert [row["return_mean"] for row in rows_of(tmp_path / "run" / "evaluations.csv")] == ["1", "2", "19", "12", "3"]
    assert report.read_tree(best)[0].keys() == first[0].keys()
    for name, array in report.read_tree(best)[0].items():
        np.testing.assert_array_equal(array, first[0][name])
    assert iql(*small_run, *flags, "--num-updates", "50").status == 0, "the flag may change: it is no part of training"
    assert report.read_tree(best)[0]["returns"] == [20.0]


def test_an_edited_script_goes_on_and_says_so(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*small_run, "--eval-every", "0", "--run-dir", tmp_path / "run", "--resume", "True"]
    assert iql(*flags, "--num-updates", "10").status == 0
    assert iql(*flags, "--num-updates", "20").err == ""
    monkeypatch.setattr(runs, "script_of", lambda module: {"script": "iql", "script_sha256": "0" * 16})
    outcome = iql(*flags, "--num-updates", "20")
    assert outcome.status == 0
    assert outcome.err == f"iql.py or common/ was edited since {tmp_path / 'run'} was saved, or is another one\n"


def test_stretches_that_are_whole_have_rows_no_more_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of AWR's and EMaQ's iterations; a row has the mean over all stretches since the last."""
    monkeypatch.setattr(runs, "LOG_EVERY", 10)
    args = Args(dataset="tiny.npz", run_dir=str(tmp_path / "run"), num_updates=25, eval_every=0, checkpoint_every=0)
    with Run("iql", args, members.make_members(args)) as run:
        for start, stop in run.chunks("offline", 25, every=4, whole=True):
            count = np.full(1, stop - start)
            run.record(stop, Metrics({"loss": count * start}, {"loss": count}), np.ones(1, bool))
    rows = [(row["step"], float(row["loss"])) for row in rows_of(tmp_path / "run" / "metrics.csv")]
    means = [np.repeat(starts, [min(4, 25 - s) for s in starts]).mean() for starts in ([0, 4, 8], [12, 16], [20, 24])]
    assert rows == list(zip(("12", "20", "25"), map(pytest.approx, means), strict=True))


@pytest.mark.parametrize(("first", "then", "word"), [("", "0/2", "without"), ("00/2", "", "with")])
def test_a_whole_run_and_parts_do_not_share_a_directory(tmp_path: Path, first: str, then: str, word: str) -> None:
    args = Args(run_dir=str(tmp_path / "run"), num_seeds=2, shard=first)
    begun = Run("iql", args, members.make_members(args))
    report.write_json(begun.path / "config.json", {})  # and no checkpoint yet, or any more
    begun.lock.close()
    assert begun.path.name == ("part-0" if first else "run")
    args = Args(run_dir=str(tmp_path / "run"), num_seeds=2, shard=then, resume=True)
    with pytest.raises(UsageError, match=f"holds a run {word} --shard"):
        Run("iql", args, members.make_members(args))


def test_a_policy_that_is_not_there_is_one_line(finished: Path, tmp_path: Path) -> None:
    for call, words in (
        (lambda: report.load_policy(tmp_path), "config.json"),
        (lambda: report.load_policy(finished, 6), "no member 6; it has [0, 1, 2, 3, 4, 5]"),
        (lambda: report.load_policy(finished, best=True), "there is no file"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert words in str(caught.value)


def test_a_policy_has_the_hyperparameters_of_its_member(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the grid, which the finished run swept in combinations with three seeds."""

    def act(state: Any, hp: Any, observations: Any, *_: Any) -> Any:
        return jnp.full((len(observations), 3), hp.beta / 10)

    monkeypatch.setattr(sys.modules["algorithms.iql"], "act", act)
    for member in range(6):
        np.testing.assert_allclose(report.load_policy(finished, member)(np.zeros(11)), 0.1 if member < 3 else 0.2)


def test_a_policy_gives_actions_between_the_bounds_of_its_environment(finished: Path, tmp_path: Path) -> None:
    run, raw = shutil.copytree(finished, tmp_path / "run"), np.random.default_rng(0).normal(size=(50, 11))
    low, high = np.array([-3.0, 0.0, 1.0]), np.array([5.0, 0.5, 2.0])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"action_low": low.tolist(), "action_high": high.tolist()}))
    inner = report.load_policy(finished)(raw)  # Hopper's bounds are -1 and 1
    assert np.ptp(inner) > 0.1
    for rows in (slice(None), 7):
        outer = low + (high - low) * (inner[rows] + 1.0) / 2.0
        np.testing.assert_allclose(report.load_policy(run)(raw[rows]), outer, rtol=1e-5)
    bounds = {"action_low": [0.1] * 3, "action_high": [1.4] * 3}  # which rescaling by itself leaves
    (run / "config.json").write_text(json.dumps(config | bounds))
    outer = report.load_policy(run)(raw * 1e9)
    assert outer.min() == np.float32(0.1) and outer.max() == np.float32(1.4)


def test_a_policy_says_whether_its_file_is_missing_or_what_it_imports(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a run by an algorithm of one's own, whose file is not there, and then needs a package that is not."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"script": "my_own"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"no my_own\.py to import"):
        report.load_policy(run)
    (tmp_path / "my_own.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        report.load_policy(run)


def test_a_folder_named_as_the_algorithm_is_no_algorithm(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `runs/iql` is, seen from `runs`."""
    (tmp_path / "iql").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "iql", raising=False)
    assert report.load_policy(finished)(np.zeros(11)).shape == (3,)
    assert sys.modules.pop("iql").__file__ is None, "it was found first"


def test_a_policy_of_an_edited_copy_is_not_that_of_the_file_at_hand(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["members"][0]["hyperparameters"]["imitation"] = 0.1
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"of another iql\.py than .*put that one's folder on PYTHONPATH"):
        report.load_policy(run)


def test_a_policy_is_that_of_the_file_that_trained_it_whatever_its_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An edited copy under a name of its own; and of the same name, where nothing else tells the two apart."""
    report.load_policy(finished)
    assert capsys.readouterr().err == ""
    text = (ROOT / "algorithms" / "iql.py").read_text().replace("jnp.tanh(trunk(", "0.5 * jnp.tanh(trunk(")
    (tmp_path / "halved.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sha256 = report.script_of(SimpleNamespace(__file__=tmp_path / "halved.py"))["script_sha256"]
    named, same = (shutil.copytree(finished, tmp_path / name) for name in ("named", "same"))
    for run, script in ((named, "halved"), (same, "iql")):
        config = json.loads((run / "config.json").read_text())
        assert config["script"] == "iql" and config["script_sha256"] != sha256
        (run / "config.json").write_text(json.dumps(config | {"script": script, "script_sha256": sha256}))
    raw = np.random.default_rng(0).normal(size=(5, 11))
    np.testing.assert_allclose(report.load_policy(named)(raw), 0.5 * report.load_policy(finished)(raw), rtol=1e-6)
    assert capsys.readouterr().err == ""
    report.load_policy(same)
    assert "iql.py or common/ is not what trained" in capsys.readouterr().err


def test_what_trained_a_run_is_its_file_and_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(ROOT / "common", tmp_path / "common")
    file = shutil.copy(ROOT / "algorithms" / "iql.py", tmp_path)
    own = report.script_of(SimpleNamespace(__file__=IQL))
    monkeypatch.setattr(report, "__file__", str(copy / "report.py"))
    assert report.script_of(SimpleNamespace(__file__=file)) == own, "where they lie is nothing to them"
    text = (copy / "networks.py").read_text()
    (copy / "networks.py").write_text(text.replace("nn.relu(x)", "nn.tanh(x)"))
    assert report.script_of(SimpleNamespace(__file__=file))["script_sha256"] != own["script_sha256"]
    assert report.script_of(SimpleNamespace(__file__="<stdin>")) == report.script_of(SimpleNamespace()) == {}


def test_a_policy_of_a_notebooks_cells_is_theirs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells with another policy; and without them the file at hand, which may be another."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({k: x for k, x in config.items() if not k.startswith("script")}))
    raw = np.random.default_rng(0).normal(size=(5, 11))
    np.testing.assert_array_equal(report.load_policy(run)(raw), report.load_policy(finished)(raw))
    assert "iql.py or common/ is not what trained" in capsys.readouterr().err
    cells = ModuleType("__main__")
    text = IQL.read_text().replace("jnp.tanh(trunk(", "0.5 * jnp.tanh(trunk(").partition("if __name__")[0]
    monkeypatch.setitem(sys.modules, "__main__", cells)
    exec(text, vars(cells))
    np.testing.assert_allclose(report.load_policy(run)(raw), 0.5 * report.load_policy(finished)(raw), rtol=1e-6)
    assert capsys.readouterr().err == ""


def test_a_run_does_not_go_on_with_fewer_updates_than_it_has(small_run: list[str], iql: Any, taken: Path) -> None:
    """With none it would be one from scratch: without its data, and with random steps first."""
    before = snapshot(taken)
    for flags in (["--num-updates", "60"], ["--num-updates", "0", "--online-steps", "10", "--random-steps", "0"]):
        outcome = iql(*small_run, *LONG, *flags, "--run-dir", taken, "--resume", "True")
        assert_refused(outcome, "has 120 updates: --num-updates must not be fewer")
    assert snapshot(taken) == before


def test_a_run_that_goes_on_is_not_finished(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError

    run = shutil.copytree(finished, tmp_path / "run")
    flags = json.loads((run / "config.json").read_text())["flags"]
    same = {f.name: flags[f.name] for f in dataclasses.fields(Args) if f.name != "hp"}
    monkeypatch.setattr(Run, "chunks", killed)
    with pytest.raises(RuntimeError):
        main(Args(**same | {"run_dir": str(run), "resume": True, "num_updates": 1000}))
    assert (run / "config.json").exists() and not (run / "final.json").exists()


def test_a_policy_transforms_in_float32_as_its_run_did_and_takes_new_flags_at_their_defaults(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    mean, std = np.float32(np.linspace(-1, 1, 11) / 3), np.float32(np.linspace(0.1, 2, 11) / 7)
    config["transform"] |= {"observation_mean": mean.tolist(), "observation_std": std.tolist()}
    del config["flags"]["dropout"]
    (run / "config.json").write_text(json.dumps(config))
    raw = np.random.default_rng(0).normal(size=(50, 11)).astype(np.float32)
    np.testing.assert_array_equal(report.load_policy(run)(raw), report.load_policy(finished)((raw - mean) / std))


# Divergence


def test_divergence_is_remembered_after_a_resume(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    flags = [*small_run, "--grid", "critic_learning_rate=3e-4,1e7", "--run-dir", tmp_path / "run"]
    assert iql(*flags, "--num-updates", "20").status == 0
    outcome = iql(*flags, "--num-updates", "40", "--resume", "True")
    assert (outcome.status, outcome.err) == (0, "")
    final = json.loads((tmp_path / "run/final.json").read_text())
    diverged = final["members"][1]["diverged"]
    assert diverged["step"] == 0 and diverged["metric"] in rows_of(tmp_path / "run/metrics.csv")[0]
    assert [row["member"] for row in rows_of(tmp_path / "run/metrics.csv")] == ["0", "1", "0"]


# The online phase


@pytest.mark.slow
def test_online_after_offline(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    run = tmp_path / "run"
    flags = [*small_run, "--num-updates", "20", "--online-steps", "30", "--num-seeds", "3", "--reward-shift", "-1"]
    outcome = iql(*flags, "--eval-every", "10", "--checkpoint-every", "25", "--run-dir", run)
    assert (outcome.status, outcome.err) == (0, "")
    found = [(row["phase"], row["step"]) for row in rows_of(run / "evaluations.csv")][::3]
    offline, online = [("offline", str(s)) for s in (0, 10)], [("online", str(s)) for s in (0, 10, 20, 30)]
    assert found == offline + online
    assert [row["step"] for row in rows_of(run / "metrics.csv")][::3] == ["10", "20", "30", "40", "45", "50"]
    final = json.loads((run / "final.json").read_text())
    assert (final["updates"], final["online_steps"]) == (20, 30)
    arrays = arrays_of(run)
    assert next(array for name, array in arrays.items() if name.endswith(".step")).tolist() == [50, 50, 50]
    ring = {name.rpartition(".")[2]: array for name, array in arrays.items() if "'ring'" in name}
    assert ring["written"].tolist() == [30, 30, 30]
    # Rows follow each other but where an episode ended, and no two members share an environment.
    for i in range(3):
        ended = (ring["terminations"][i] + ring["truncations"][i]) > 0
        follows = (ring["observations"][i, 1:] == ring["next_observations"][i, :-1]).all(axis=1)
        assert (follows | ended[:-1]).all() and (~follows | ~ended[:-1]).all()
        assert (np.abs(ring["actions"][i]) <= 1).all() and ring["actions"][i].std() > 0.05
        assert (ring["rewards"][i] < 3).all(), "the shift: Hopper's reward is about 1 a step"
    assert not np.array_equal(ring["observations"][0], ring["observations"][1])


@pytest.mark.slow
def test_a_signal_within_a_row_ends_it_early(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    """At a stretch of 100 updates, though a row is due after 1,000 only."""
    flags = [*small_run, "--num-updates", "250", "--eval-every", "0", "--resume", "True"]
    with signalled_after(1, signal.SIGINT):
        assert iql(*flags, "--run-dir", tmp_path / "run").status == 130
    assert done_in(tmp_path / "run")["offline"] == 100
    assert iql(*flags, "--run-dir", tmp_path / "run").status == 0
    assert [row["step"] for row in rows_of(tmp_path / "run/metrics.csv")] == ["100", "250"]
    assert iql(*flags, "--run-dir", tmp_path / "whole").status == 0
    assert_same_arrays(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_once_the_online_phase_has_begun_lengths_are_fixed(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    flags = [*small_run, "--num-updates", "10", "--eval-every", "0", "--run-dir", tmp_path / "run"]
    assert iql(*flags, "--online-steps", "5").status == 0
    assert_refused(iql(*flags, "--online-steps", "9", "--resume", "True"), "--online-steps", "5")
    shorter = ["--online-steps", "5", "--max-episode-steps", "3"]
    assert_refused(iql(*flags, *shorter, "--resume", "True"), "--max-episode-steps 0", "3")


# Bad input


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--num-seeds", "0"], "--num-seeds 0"),
        (["--grid", "alpha=1,2"], "alpha"),
        (["--shard", "2/2", "--num-seeds", "2"], "--shard"),
        (["--dataset", "no/such/file.npz"], "no/such/file.npz"),
        (["--dataset", "offax/hopper/excellent-v1"], "offax/hopper/excellent-v1"),
        (["--dataset", "offax/../x"], "offax/../x"),
        (["--dataset", "what is this?"], "what is this?"),
        (["--dataset", ""], "Minari id"),
        (["--env", "Walker2d-v5"], "actions"),
        (["--env", "CartPole-v1"], "Discrete"),
        (["--env", "NoSuchThing-v3"], "NoSuchThing"),
        (["--preset", "none", "--hidden-dim", "100000000"], "the networks of 1 member"),
        (["--preset", "none", "--online-steps", "2000000000"], "the online transitions of 1 member"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny: Path, iql: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--dataset": str(tiny), "--env": "Hopper-v5", "--num-updates": "10"}
    given = [part for name, value in given.items() if name not in flags for part in (name, value)]
    for _ in range(2):
        assert_refused(iql(*given, *flags, "--run-dir", "run"), word)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_with_nan_says_where(tmp_path: Path, iql: Any, bad: float) -> None:
    arrays = hopper_like()
    arrays["rewards"][123] = bad
    np.savez(tmp_path / "bad.npz", **arrays)
    run = tmp_path / "run"
    assert_refused(iql("--dataset", tmp_path / "bad.npz", "--env", "Hopper-v5", "--run-dir", run), "rewards", "123")
    assert not (run / "config.json").exists()


def test_data_without_an_environment(tmp_path: Path, tiny: Path, iql: Any) -> None:
    assert_refused(iql("--dataset", tiny, "--run-dir", tmp_path / "run"), "--env")


def test_stderr_has_that_line_alone(tmp_path: Path, spawn: Callable[..., subprocess.Popen]) -> None:
    """In a process of its own, where first imports may speak too."""
    arrays = hopper_like()
    arrays["observations"][5, 2] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    process = spawn(IQL, "--dataset", "bad.npz", "--env", "Hopper-v5", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_unwritable_run_directory(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    (tmp_path / "file").write_text("a file")
    for run in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "further" / "below"):
        assert_refused(iql(*small_run, "--num-updates", "10", "--run-dir", run), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "a file"
    if os.geteuid() != 0:  # to root everything is writable
        (tmp_path / "locked").mkdir(mode=0o500)
        run = tmp_path / "locked" / "run"
        assert_refused(iql(*small_run, "--num-updates", "10", "--run-dir", run), "locked")


@pytest.fixture
def taken(tmp_path: Path, uninterrupted: Path) -> Path:
    """A run directory with a finished run in it."""
    shutil.copytree(uninterrupted, tmp_path / "taken")
    return tmp_path / "taken"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_results_without_a_checkpoint_are_not_lost_by_resuming(small_run: list[str], iql: Any, taken: Path) -> None:
    shutil.rmtree(taken / "checkpoint")  # to save space
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True"), "no checkpoint", str(taken))
    assert snapshot(taken) == before
    for file in ("config.json", "final.json"):
        (taken / file).unlink()  # what is left are tables that may be anyone's
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True"), "no checkpoint", str(taken))
    assert snapshot(taken) == before


def test_a_run_directory_is_not_overwritten(small_run: list[str], iql: Any, taken: Path) -> None:
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken), "--resume True", str(taken))
    assert snapshot(taken) == before
    (taken / "config.json").unlink()
    (taken / "returns.csv").rename(taken / "mine.csv")  # anyone's tables
    for name in runs.TABLES:
        (taken / name).unlink(missing_ok=True)
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken), str(taken))
    assert snapshot(taken) == before
    for path in taken.glob("*.*"):
        path.unlink()
    before = snapshot(taken)
    assert [path.name for path in taken.iterdir()] == ["checkpoint"]
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken), "--resume True", str(taken))
    assert snapshot(taken) == before | {str(taken / ".lock"): b""}


def test_what_a_copy_lacks_is_said_before_a_finished_run_loses_anything(
    small_run: list[str], iql: Any, taken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "optional", partial(without, "benchmarks.tracking"))
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True", "--track", "True"), "copy it too")
    assert snapshot(taken) == before
    new = taken.parent / "new"
    assert_refused(iql(*small_run, *LONG, "--run-dir", new, "--track", "True"), "copy it too")
    assert not new.exists()


def without(missing: str, module: str, needed_for: str = "") -> Any:
    """`optional` where a module was not copied."""
    if module == missing:
        raise UsageError(f"{needed_for} needs {module}; copy it too")
    return optional(module, needed_for)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--seed", "3"], "--seed"),
        pytest.param(["--beta", "5"], "--beta", marks=pytest.mark.slow),
        (["--batch-size", "32"], "--batch-size"),
        pytest.param(["--hidden-dim", "16"], "--hidden-dim", marks=pytest.mark.slow),
        pytest.param(["--grid", "beta=1,2"], "--grid", marks=pytest.mark.slow),
        pytest.param(["--normalize-observations", "True"], "--normalize-observations", marks=pytest.mark.slow),
    ],
)
def test_another_configurations_checkpoint(
    small_run: list[str], iql: Any, taken: Path, flags: list[str], word: str
) -> None:
    before = snapshot(taken)
    given = [part for i, part in enumerate(small_run) if small_run[i - i % 2] not in flags]
    assert_refused(iql(*given, *LONG, *flags, "--run-dir", taken, "--resume", "True"), word, str(taken))
    assert snapshot(taken) == before


def test_runs_that_start_at_once_get_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = Args(dataset="../x/../../../y.npz")
    population = members.make_members(args)
    begun = [Run("iql", args, population) for _ in range(3)]
    assert len({run.path for run in begun}) == 3
    assert all(run.path.resolve().is_relative_to(tmp_path / "runs" / "iql") for run in begun)
    for run in begun:
        run.lock.close()


def test_another_dataset_of_the_same_name(tmp_path: Path, tiny: Path, small_run: list[str], iql: Any) -> None:
    data, run = tmp_path / "data.npz", tmp_path / "run"
    shutil.copy(tiny, data)
    flags = ["--num-updates", "10", "--num-seeds", "2", "--dataset", data, "--run-dir", run, "--resume", "True"]
    assert iql(*small_run, *flags).status == 0
    with np.load(tiny) as file:
        np.savez(data, **dict(file) | {"rewards": file["rewards"] + np.float32(1)})
    assert_refused(iql(*small_run, *flags), "holds a run with dataset-sha256")


def test_every_flag_that_differs_from_the_checkpoints_is_named(small_run: list[str], iql: Any, taken: Path) -> None:
    """Who forgot the flags of a run would otherwise learn them one by one."""
    flags = ["--run-dir", taken, "--resume", "True", "--beta", "2", "--batch-size", "8", "--seed", "1"]
    words = ("--seed 0, not 1; ", "--batch-size 16, not 8; ", "--beta 3.0, not 2.0; ")
    assert_refused(iql(*small_run, *LONG, *flags), *words)


def test_a_run_from_before_a_flag_existed_goes_on(small_run: list[str], iql: Any, taken: Path) -> None:
    """As where a copy is given a hyperparameter more before it is fine-tuned."""
    with np.load(taken / "checkpoint" / "state.npz") as file:
        identity = json.loads(file["metadata"].tobytes())["identity"]
    assert identity.pop("layer_norm") is False
    edit_metadata(taken, identity=identity)
    assert iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True").status == 0
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True", "--beta", "2"), "--beta 3.0, not 2.0")


def test_a_part_of_another_run_is_refused_before_it_trains(tmp_path: Path, small_run: list[str], iql: Any) -> None:
    """A job array whose tasks have flags of their own; lengths may differ, as parts are extended one by one."""
    run = [*small_run, "--num-seeds", "2", "--eval-every", "0", "--run-dir", tmp_path]
    assert iql(*run, "--num-updates", "10", "--shard", "0/2").status == 0
    outcome = iql(*run, "--num-updates", "10", "--shard", "1/2", "--beta", "1")
    assert_refused(outcome, "part-1", "part-0", "not be of one run: beta 1.0 and 3.0")
    assert {path.name for path in (tmp_path / "part-1").iterdir()} == {".lock"}
    config = json.loads((tmp_path / "part-0" / "config.json").read_text())
    del config["flags"]["layer_norm"]  # a part from before the flag existed
    (tmp_path / "part-0" / "config.json").write_text(json.dumps(config))
    assert iql(*run, "--num-updates", "20", "--shard", "1/2").status == 0


def test_who_diverged_while_its_behavior_model_was_fitted_made_no_offline_update(tmp_path: Path, tiny: Path) -> None:
    """So figures and tables, which compare the step with the offline phase's length, count it as lost there."""
    args = Args(dataset=str(tiny), env="Hopper-v5", quiet=True, run_dir=str(tmp_path), num_seeds=2)
    population, dataset = members.make_members(args), load(str(tiny), "Hopper-v5")
    with Run("emaq", args, population) as run:
        run.restore({"state": {}}, dataset, fit_transform(dataset.transitions, args))
        for _, stop in run.chunks("pretraining", 300):
            metrics = members.Metrics({"behavior/loss": np.array([1.0, np.nan])}, {"behavior/loss": np.ones(2)})
            run.record(stop, metrics, np.array([True, stop < 200]))
        assert run.diverged == {1: {"step": 0, "metric": "behavior/loss"}}
    lost = [{"member": i, "diverged": run.diverged.get(i)} for i in range(2)]
    assert curves.lost_by("offline", lost, length=(100, 50)) == {"1"}


def test_returns_that_are_not_finite_are_said(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Args(dataset=str(tiny), env="Hopper-v5", quiet=True, run_dir=str(tmp_path), num_seeds=2)
    population, dataset = members.make_members(args), load(str(tiny), "Hopper-v5")
    returns = np.array([[1.0, 3.0], [1.0, np.nan]])
    with Run("iql", args, population) as run:
        run.restore({"state": {}}, dataset, fit_transform(dataset.transitions, args))
        run.record_evaluation(environments.Returns(returns, np.full((2, 2), np.nan)))
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(said) == 1 and said[0].startswith("member 1 (seed 1): ")
    assert [row["return_mean"] for row in rows_of(tmp_path / "evaluations.csv")] == ["2", "nan"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other shapes", "other names", "no steps"])
def test_a_damaged_checkpoint(small_run: list[str], iql: Any, taken: Path, damage: str) -> None:
    path = taken / "checkpoint" / "state.npz"
    content = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    largest = max((name for name in arrays if "'state'" in name), key=lambda name: arrays[name].size)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = content.index(arrays[largest].tobytes()) + arrays[largest].nbytes // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no steps":
        metadata = json.loads(arrays["metadata"].tobytes())
        del metadata["done"]
        np.savez(path, **arrays | {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)})
    else:
        changed = {largest: arrays[largest][..., :1]} if damage == "other shapes" else {"['odd']": arrays[largest]}
        np.savez(path, **arrays | changed)
    before = snapshot(taken)
    assert_refused(iql(*small_run, *LONG, "--run-dir", taken, "--resume", "True"), "checkpoint", str(path))
    assert snapshot(taken) == before


# Surroundings


def test_a_signal_ends_a_run_that_only_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As benchmarks/at_once.py does: without a stretch of updates before."""
    args = Args(run_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as caught, Run("iql", args, members.make_members(args)) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        run.record_evaluation(None)
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped" in capsys.readouterr().err


def test_args_made_without_parse_are_checked_and_their_run_says_that_they_have_no_preset(
    finished: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="must be from 0 to 1"):
        main(Args(dataset=str(tiny), env="Hopper-v5", hp=Args().hp._replace(polyak=2.0), run_dir=str(tmp_path / "bad")))
    assert not (tmp_path / "bad").exists()
    run = shutil.copytree(finished, tmp_path / "run")
    flags = json.loads((run / "config.json").read_text())["flags"]
    same = {f.name: flags[f.name] for f in dataclasses.fields(Args) if f.name != "hp"}
    hp = Args().hp._replace(**{name: flags[name] for name in Args().hp._fields})
    for preset, named in (("none", "preset none:"), ("auto", "preset none (Args made without common.cli.parse):")):
        main(Args(**same | {"hp": hp, "preset": preset, "run_dir": str(run), "resume": True}))
        assert named in capsys.readouterr().out


@pytest.mark.parametrize(("updates", "said"), [(0, "iql on Hopper-v5, no data, preset "), (9, "iql on {}, preset ")])
def test_a_run_says_whether_it_reads_data(tmp_path: Path, tiny: Path, updates: int, said: str, capsys: Any) -> None:
    """With --env and no offline updates it does not, whatever --dataset says."""
    args = Args(dataset=str(tiny), env="Hopper-v5", num_updates=updates, online_steps=9999, run_dir=str(tmp_path))
    population, dataset = members.make_members(args), load(str(tiny), "Hopper-v5", only_env=not updates)
    with Run("iql", args, population) as run:
        run.restore({"state": {}}, dataset, fit_transform(dataset.transitions, args))
    assert capsys.readouterr().out.startswith(said.format(tiny))


def test_a_run_directory_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = Args(run_dir="~/x")
    run = Run("iql", args, members.make_members(args))
    run.lock.close()
    assert run.path == tmp_path / "x" and run.path.is_dir() and not (tmp_path / "~").exists()


def test_without_a_home_directory_there_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry in the system's list of users, as in some containers: `~` stays as it is."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    args = Args(run_dir="run")
    Run("iql", args, members.make_members(args)).lock.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("encoding", ["ascii", "closed", "a notebook's"])
def test_a_terminal_that_cannot_show_what_is_printed(
    tmp_path: Path, small_run: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Letters that it does not have; nobody who reads; what a notebook has in its place."""

    class Closed(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    run = tmp_path / "gelände"
    flags = [*small_run, "--num-updates", "5", "--num-seeds", "2", "--eval-every", "0", "--run-dir", run]
    streams = {"closed": Closed(io.BytesIO()), "ascii": io.TextIOWrapper(io.BytesIO(), encoding="ascii")}
    streams |= {"a notebook's": io.StringIO()}
    monkeypatch.setattr(sys, "stdout", streams[encoding])
    assert iql(*flags).status == 0
    assert (run / "final.json").exists() and (run / "curves.png").exists()


@pytest.mark.slow
def test_a_pipe_that_is_closed_does_not_end_a_run(
    tmp_path: Path, small_run: list[str], spawn: Callable[..., subprocess.Popen]
) -> None:
    """As by `| head -1`: it trains on, and ends with 0."""
    reading, writing = os.pipe()
    os.close(reading)
    process = spawn(
        IQL, *small_run, "--num-updates", 5, "--eval-every", 2, "--run-dir", tmp_path / "run", stdout=writing
    )
    os.close(writing)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "Traceback" not in err and "BrokenPipe" not in err, err
    assert (tmp_path / "run" / "final.json").exists()
