"""Weights & Biases, and everything that can go wrong in it."""

import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import rows_of, smaller

from benchmarks import intervals
from benchmarks.tracking import Tracker
from common import runs
from common.cli import RunArgs


class FakeRun:
    def __init__(self, options: dict[str, Any], broken: str) -> None:
        self.options, self.broken, self.id = options, broken, options.get("id", f"id-{options['name']}")
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


def config_of(path: Path, betas: Sequence[float] = (1, 2)) -> dict[str, Any]:
    """A run's record, as much of it as is needed here."""
    members = [
        {"member": i, "seed": i, "swept": {"beta": beta}, "hyperparameters": {"beta": beta}}
        for i, beta in enumerate(betas)
    ]
    flags = {"run_dir": None, "discount": 0.9}  # as given: the default directory is named by the run
    return {"algorithm": "iql", "run_dir": str(path), "flags": flags, "members": members}


@pytest.fixture
def short(small_run: list[str]) -> list[str]:
    return [*small_run, *smaller("iql"), "--num-updates", "20", "--num-seeds", "2"]


@pytest.mark.slow
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
        assert run.options["job_type"] == "iql" and run.options["config"]["run_dir"] == str(tmp_path / "run")
    assert len({run.options["name"] for run in wandb.runs}) == 4


def test_under_a_sweep_agent_rows_are_means_over_the_members_that_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    tracker = Tracker(RunArgs(), config_of(tmp_path, betas=[2, 2]), ["first", "second"], "label")
    rows = [{"step": 10, "member": 0, "seed": 0, "loss": 1.0, "odd": 7.0}, {"member": 1, "loss": 2.0, "odd": None}]
    tracker.log("metrics.csv", rows, 10, 3.0)
    tracker.log("evaluations.csv", [{"phase": "offline", "member": 1, "score_mean": 4.0}], 20, 3.0)
    (run,) = wandb.runs
    assert run.logged == [
        (10, {"loss": 1.5, "odd": 7.0, "updates_per_second": 3.0}),
        (20, {"evaluation/score_mean": 4.0}),
    ]
    assert (run.options["name"], run.options["config"]["beta"], run.options["config"]["members"]) == ("label", 2.0, 2)


@pytest.mark.slow
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
    monkeypatch.chdir(tmp_path)  # an agent gives no --run-dir
    assert iql(*short, "--grid=critic_learning_rate=3e-4,2e-4,1e-4,1e7").status == 0
    (run,), (run_dir,) = wandb.runs, (path.parent for path in tmp_path.glob("runs/**/final.json"))
    assert Path(run.options["dir"]).absolute() == run_dir
    final = json.loads((run_dir / "final.json").read_text())
    survivors = [member["score_mean"] for member in final["members"] if member["diverged"] is None]
    assert len(survivors) == 6 and run.final["diverged_members"] == 2
    assert run.final["final_score_iqm"] == final["aggregate"]["score"]["iqm"]
    assert min(survivors) <= run.final["final_score_iqm"] <= max(survivors)
    (logged,) = [(step, row) for step, row in run.logged if "final_score_iqm" in row]
    assert logged == (20, run.final)
    assert run.exit_code == 0


@pytest.mark.parametrize(("lost", "reported"), [(0, True), (1, True), (2, False)])
def test_a_population_of_which_over_a_quarter_diverged_is_no_good_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, reported: bool
) -> None:
    """A search would take the mean of the members that are left for that of the setting."""
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    tracker = Tracker(RunArgs(), config_of(tmp_path), ["first", "second"], "label")
    members = [{"diverged": {"step": 1} if i < lost else None} for i in range(5)]
    tracker.finish({"members": members, "aggregate": {"score": {"iqm": 80.0}}}, 0)
    (run,) = wandb.runs
    assert run.final == {"diverged_members": lost} | ({"final_score_iqm": 80.0} if reported else {})
    assert run.exit_code == (0 if reported else 3)


def test_long_names_and_groups_are_cut_to_what_wandb_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, names = fake(monkeypatch), [200 * "a" + one for one in ("first", "second")]
    Tracker(RunArgs(), config_of(tmp_path), names, 200 * "b" + "label")
    found = [(run.options["name"], run.options["group"]) for run in wandb.runs]
    assert found == [(name[-128:], (200 * "b" + "label")[-128:]) for name in names]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"group": "g"}'])
def test_a_damaged_record_of_the_wandb_runs_is_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    wandb, checkpoint = fake(monkeypatch), tmp_path / "checkpoint" / "state.npz"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    (tmp_path / "wandb.json").write_text(damaged)
    Tracker(RunArgs(resume=True), config_of(tmp_path), ["only"], "label")
    (run,) = wandb.runs
    assert "id" not in run.options and run.options["group"] == "label"


def test_a_resumed_run_goes_on_in_wandb_and_parts_share_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, names = fake(monkeypatch), ["first", "second"]
    checkpoint = tmp_path / "run" / "checkpoint" / "state.npz"
    Tracker(RunArgs(), config_of(tmp_path / "run"), names, "label 1")
    checkpoint.parent.mkdir()
    checkpoint.touch()
    Tracker(RunArgs(resume=True), config_of(tmp_path / "run"), names, "label 2")
    begun, resumed = wandb.runs[:2], wandb.runs[2:]
    assert [run.id for run in resumed] == [run.id for run in begun] == ["id-first", "id-second"]
    assert all("id" not in run.options for run in begun)
    assert {run.options["resume"] for run in resumed} == {"allow"}
    assert {run.options["group"] for run in wandb.runs} == {"label 1"}
    checkpoint.unlink()  # then it starts anew, perhaps with other members
    Tracker(RunArgs(resume=True), config_of(tmp_path / "run", (5,)), names, "label 3")
    assert "id" not in wandb.runs[-1].options and wandb.runs[-1].options["group"] == "label 3"
    for part in (0, 1):
        config = config_of(tmp_path / "parts" / f"part-{part}")
        config["flags"]["run_dir"] = str(tmp_path / "parts")
        Tracker(RunArgs(shard=f"{part}/2"), config, names, f"label {part}")
        assert (tmp_path / "parts" / f"part-{part}" / "wandb.json").exists()
    assert {run.options["group"] for run in wandb.runs[5:]} == {str(tmp_path / "parts")}


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    fake(monkeypatch, broken)
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)


every_call = pytest.mark.parametrize("broken", ["missing", "init", "log", "update", "finish"])


@every_call
def test_whatever_raises_in_wandb_is_said_once_and_not_raised(
    tmp_path: Path, raising: None, capfd: pytest.CaptureFixture[str], broken: str
) -> None:
    tracker = Tracker(RunArgs(track=True), config_of(tmp_path), ["first", "second"], "label")
    for step in (10, 20):
        tracker.log("metrics.csv", [{"member": 0, "loss": 1.0}, {"member": 1, "loss": 2.0}], step, None)
    tracker.finish({"members": [{"score_mean": 3.0, "return_mean": 1.0}] * 2}, 0)
    err = capfd.readouterr().err
    assert err.startswith("wandb: ") and err.count("\n") == 1


@pytest.mark.slow
@every_call
def test_whatever_raises_in_wandb_training_goes_on(
    tmp_path: Path, short: list[str], iql: Any, raising: None, broken: str
) -> None:
    outcome = iql(*short, "--track", "True", "--run-dir", tmp_path / "run")
    assert outcome.status == 0
    assert outcome.err.startswith("wandb: ") and outcome.err.count("\n") == 1, "said once"
    assert len(rows_of(tmp_path / "run/metrics.csv")) == 2
    assert (tmp_path / "run/final.json").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_crash_under_an_agent_leaves_nothing_that_a_sweep_could_take_for_a_result(
    tmp_path: Path, short: list[str], iql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")

    def crash(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(intervals, "summarise", crash)
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
    args = RunArgs(track=True, wandb_project="project", wandb_group="the-group-of-both", preset="none")
    tracker = Tracker(args, config_of(tmp_path), ["one member", "another member"], "label")
    tracker.log("metrics.csv", [{"member": 0, "loss": 1.0}, {"member": 1, "loss": 2.0, "missing": None}], 10, 3.0)
    finals = [{"score_mean": 3.0, "return_mean": 1.0}, {"score_mean": None, "return_mean": None}]
    tracker.finish({"members": finals}, 0)
    assert "tracking is off" not in capfd.readouterr().err
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # wandb's own process writes them, on a busy machine a little later
    while not all(b"the-group-of-both" in file.read_bytes() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(b"the-group-of-both" in file.read_bytes() for file in files)
    assert sum(b"another member" in file.read_bytes() for file in files) == 1
