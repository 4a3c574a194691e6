"""The run directory's tables, the report's statistics, and Weights & Biases with everything that can go wrong in it."""

import csv
import errno
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import rows_of

from common import report, runs
from common.cli import RunArgs
from common.report import Tracker, append_rows, write_json

# Tables


def content(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_are_on_disk_at_once_and_numbers_survive(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    append_rows(path, [{"step": 10, "loss": 0.1, "note": None}, {"step": 20, "loss": float("nan"), "note": "a,b"}])
    assert content(path) == [["step", "loss", "note"], ["10", "0.1", ""], ["20", "nan", "a,b"]]
    append_rows(path, [{"step": 30, "loss": 1 / 3}])
    assert content(path)[-1] == ["30", "0.3333333", ""]


def test_the_first_row_fixes_the_columns(tmp_path: Path) -> None:
    """An environment that reports success only later on must not shift what is in the table."""
    path = tmp_path / "table.csv"
    append_rows(path, [{"step": 10, "loss": 0.5}])
    append_rows(path, [{"loss": 1.5, "step": 20, "success": 1.0}])
    assert content(path) == [["step", "loss"], ["10", "0.5"], ["20", "1.5"]]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5, {"b": math.inf}], 3: (None, True)})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {"a": [None, 1.5, {"b": None}], "3": [None, True]}


# Statistics


def test_interquartile_mean_by_hand() -> None:
    for values, mean in (
        ([5.0], 5),
        ([1, 2, 6], 3),  # a quarter of three, rounded down, is none
        ([100, 1, 3, -50], 2),
        ([0, 1, 2, 3, 4, 5, 6, 70], 3.5),
    ):
        assert report.aggregate(values)["iqm"] == mean


def test_bootstrap_interval() -> None:
    # Two draws of {0, 1}: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    found = report.aggregate([0.0, 1.0])
    assert (found["ci_low"], found["ci_high"], found["count"]) == (0.0, 1.0, 2)
    # For many runs: mean +- 1.96 standard errors of the interquartile mean, by simulation.
    rng = np.random.default_rng(1)
    values = rng.normal(size=200)
    middle = np.sort(rng.normal(size=(4000, 200)), axis=1)[:, 50:150].mean(axis=1)
    found = report.aggregate(values)
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * middle.std(), rel=0.2)
    assert found["ci_low"] < found["iqm"] < found["ci_high"]
    assert report.aggregate(values) == found, "the same values give the same interval"


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert report.aggregate([3.0, 3.0, 3.0]) == {"iqm": 3.0, "ci_low": 3.0, "ci_high": 3.0, "count": 3}


def test_aggregate_leaves_out_what_is_missing() -> None:
    assert report.aggregate([None, math.nan]) == {"iqm": None, "ci_low": None, "ci_high": None, "count": 0}
    # One value says nothing about the spread: no interval of width zero.
    assert report.aggregate([3.0, None]) == {"iqm": 3.0, "ci_low": None, "ci_high": None, "count": 1}


def members_of(scores: dict[float, list[float | None]]) -> list[dict[str, Any]]:
    """Members of a sweep of beta: for each value a list of scores, returns ten times as large; None diverged."""
    return [
        {"seed": seed, "swept": {"beta": beta}, "score_mean": score, "return_mean": score and 10 * score}
        for beta, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_members_are_summarised_by_their_setting() -> None:
    summary = report.summarise(members_of({1.0: [1, 2, 3], 2.0: [10, None, 30], 3.0: [None] * 3}))
    assert [c["swept"] for c in summary["combinations"]] == [{"beta": 1.0}, {"beta": 2.0}, {"beta": 3.0}]
    assert [c["score"]["iqm"] for c in summary["combinations"]] == [2, 20, None]
    assert [c["return"]["count"] for c in summary["combinations"]] == [3, 2, 0]
    assert summary["aggregate"]["score"]["count"] == 5


def test_the_table_ranks_the_settings_of_a_sweep() -> None:
    members = members_of({1.0: [1, 2], 2.0: [None, None], 3.0: [50, 70]})
    text = report.table("iql, data", {"members": members} | report.summarise(members), 33.3)
    order = [text.index(word) for word in ("beta=3", "beta=1", "beta=2", "33.3")]
    assert order == sorted(order) and "60.0" in text
    for member in members:
        member["swept"] = {}
    seeds = report.table("iql, data", {"members": members[:2]} | report.summarise(members[:2]), None)
    assert "seed 0" in seeds and "seed 1" in seeds and "1.5" in seeds


def curve(phase: str, step: int, member: int, score: float | None) -> dict[str, Any]:
    return {"phase": phase, "step": step, "member": member, "score_mean": score, "return_mean": 7.0}


@pytest.mark.parametrize("score", [1.0, None])
def test_curves_of_both_phases_and_of_members_that_end_early(tmp_path: Path, score: float | None) -> None:
    rows = [curve("offline", step, member, score) for step, member in ((0, 0), (0, 1), (10, 0))]
    report.plot_curves(tmp_path / "a.png", [*rows, curve("online", 0, 0, score)], "title", 3.0)
    report.plot_curves(tmp_path / "b.png", rows, "title", None)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# Weights & Biases


class FakeRun:
    def __init__(self, options: dict[str, Any], broken: str) -> None:
        self.options, self.broken = options, broken
        self.logged: list[tuple[int, dict]] = []
        self.exit_code: int | None = None
        self.summary = self

    def _maybe(self, what: str) -> None:
        if self.broken == what or self.exit_code is not None:
            raise RuntimeError(f"{what}:\n the network is dead")

    def log(self, row: dict, step: int) -> None:
        self._maybe("log")
        assert None not in row.values()
        self.logged.append((step, dict(row)))

    def update(self, row: dict) -> None:
        self._maybe("update")
        self.final = dict(row)

    def finish(self, exit_code: int) -> None:
        self._maybe("finish")
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    """Stands in for the module; `broken` names the call that raises."""

    def __init__(self, broken: str = "") -> None:
        super().__init__(runs=[], broken=broken, Settings=dict)

    def init(self, **options: Any) -> FakeRun:
        if self.broken == "init":
            raise RuntimeError("init:\n the network is dead")
        self.runs.append(FakeRun(options, self.broken))
        return self.runs[-1]


def fake(monkeypatch: pytest.MonkeyPatch, broken: str = "") -> FakeWandb:
    module = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def short(small_run: list[str]) -> list[str]:
    return [*small_run, "--num-updates", "20", "--num-seeds", "2"]


def test_off_by_default_and_never_imported(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    outcome = iql(*short, "--run-dir", tmp_path / "run")
    assert (outcome.status, outcome.err) == (0, "")


def test_one_run_for_each_member_in_one_group(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    flags = ["--track=True", "--wandb-project", "p", "--wandb-group", "g", "--wandb-entity", "e", "--grid", "beta=1,2"]
    outcome = iql(*short, *flags, "--run-dir", tmp_path / "run")
    assert (outcome.status, outcome.err) == (0, "")
    assert len(wandb.runs) == 4
    final = json.loads((tmp_path / "run/final.json").read_text())
    rows = rows_of(tmp_path / "run/metrics.csv")
    for i, run in enumerate(wandb.runs):
        assert [run.options[name] for name in ("project", "group", "entity")] == ["p", "g", "e"]
        assert (run.options["config"]["beta"], run.options["config"]["seed"]) == ([1, 1, 2, 2][i], [0, 1, 0, 1][i])
        losses = [row["value/loss"] for _, row in run.logged if "value/loss" in row]
        assert losses == pytest.approx([float(row["value/loss"]) for row in rows if row["member"] == str(i)], rel=1e-6)
        assert [step for step, row in run.logged if "evaluation/return_mean" in row] == [0, 20]
        assert run.final["final_score"] == final["members"][i]["score_mean"]
        assert run.exit_code == 0
    assert len({run.options["name"] for run in wandb.runs}) == 4


def test_under_a_sweep_agent_one_run_reports_the_population(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    outcome = iql(*short, "--beta=2.0", f"--run_dir={tmp_path / 'run'}")
    assert (outcome.status, outcome.err) == (0, "")
    (run,) = wandb.runs
    assert run.options["config"]["beta"] == 2
    final = json.loads((tmp_path / "run/final.json").read_text())
    assert run.final["final_score_iqm"] == final["aggregate"]["score"]["iqm"]
    assert run.final["final_score_iqm"] == pytest.approx(np.mean([m["score_mean"] for m in final["members"]]))
    (losses,) = [row["value/loss"] for _, row in run.logged if "value/loss" in row]
    rows = rows_of(tmp_path / "run/metrics.csv")
    assert losses == pytest.approx(np.mean([float(row["value/loss"]) for row in rows]), rel=1e-5)


def test_the_metric_of_a_sweep_is_in_history_and_summary_and_says_what_it_leaves_out(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    grid = ["--grid", "critic_learning_rate=3e-4,1e7"]
    assert iql(*short, *grid, "--run-dir", tmp_path / "run").status == 0
    (run,) = wandb.runs
    final = json.loads((tmp_path / "run/final.json").read_text())
    survivors = [member["score_mean"] for member in final["members"] if member["diverged"] is None]
    assert len(survivors) == 2 and run.final["diverged_members"] == 2
    assert run.final["final_score_iqm"] == pytest.approx(np.mean(survivors))
    (logged,) = [(step, row) for step, row in run.logged if "final_score_iqm" in row]
    assert logged == (20, run.final)
    assert run.exit_code == 0


@pytest.mark.parametrize("broken", ["missing", "init", "log", "update", "finish"])
def test_whatever_raises_in_wandb_training_goes_on(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    fake(monkeypatch, broken)
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = iql(*short, "--track", "True", "--run-dir", tmp_path / "run")
    assert outcome.status == 0
    assert outcome.err.startswith("wandb: ") and outcome.err.count("\n") == 1, "said once"
    assert len(content(tmp_path / "run/metrics.csv")) == 3
    assert (tmp_path / "run/final.json").exists()


def test_a_diverged_population_is_finished_once(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    outcome = iql(*short, "--critic-learning-rate", "1e7", "--track", "True", "--run-dir", tmp_path / "run")
    assert outcome.status == 3
    assert [run.exit_code for run in wandb.runs] == [3, 3]
    assert "wandb" not in outcome.err


def test_an_error_closes_the_runs_as_failed(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, "append_rows", full)
    assert iql(*short, "--track", "True", "--run-dir", tmp_path / "run").status == 2
    assert [run.exit_code for run in wandb.runs] == [1, 1]


def test_a_crash_under_an_agent_leaves_nothing_that_a_sweep_could_take_for_a_result(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")

    def crash(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(report, "summarise", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        iql(*short, "--run-dir", tmp_path / "run")
    (run,) = wandb.runs
    assert run.exit_code == 1 and not hasattr(run, "final")
    assert not any({"final_score_iqm", "diverged_members"} & row.keys() for _, row in run.logged)


def test_offline_mode_writes_a_run_for_each_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real wandb, without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    tracker = Tracker(RunArgs(track=True, wandb_project="project", wandb_group="the-group-of-both"), "label")
    tracker.start([{"beta": 1.0}, {"beta": 2.0}], ["first", "second"], tmp_path)
    tracker.log(10, [{"loss": 1.0}, {"loss": 2.0, "missing": None}])
    tracker.finish([{"final_score": 3.0}, {"final_score": None}], {}, 0)
    assert "tracking is off" not in capfd.readouterr().err
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # wandb's own process writes them, on a busy machine a little later
    while not all(b"the-group-of-both" in file.read_bytes() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(b"the-group-of-both" in file.read_bytes() for file in files)
    assert sum(b"second" in file.read_bytes() for file in files) == 1
