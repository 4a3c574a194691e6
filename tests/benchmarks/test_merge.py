"""Runs in parts: put together they are the files of one process, and what is missing is said."""

import csv
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rows_of

from benchmarks import merge, report
from common.cli import UsageError
from common.report import load_policy


@pytest.mark.parametrize(
    ("package", "name", "more"),
    [
        ("benchmarks", "bc", ["--grid", "actor_learning_rate=1e-4,3e-4,1e-3,1e-2"]),
        pytest.param("algorithms", "iql", ["--grid", "beta=1,3,10", "--online-steps", "20"], marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_run_are_the_files_of_one(
    package: str, name: str, more: list[str], tmp_path: Path, small_run: list[str], script: Callable, capfd: Any
) -> None:
    flags = [*small_run, "--num-updates", "20", "--eval-every", "10", "--max-episode-steps", "50", *more]
    shared = tmp_path / "parts"
    runs = [["--run-dir", shared, "--shard", "0/2"], ["--run-dir", shared, "--shard", "1/2"]]
    runs.append(["--run-dir", tmp_path / "one"])
    for where in runs:
        outcome = script(name, *flags, *where, package=package)
        assert outcome.status == 0, outcome.err
    report.main([str(shared)])
    out, err = capfd.readouterr()
    assert err == "" and more[1].partition("=")[0] in out
    for table in ("metrics.csv", "evaluations.csv", "returns.csv"):
        assert (shared / table).read_text() == (tmp_path / "one" / table).read_text(), table
        assert {int(row["member"]) for row in rows_of(shared / table)} == set(range(1 + more[1].count(",")))
    ours, theirs = (json.loads((folder / "final.json").read_text()) for folder in (shared, tmp_path / "one"))
    measured = ("wall_clock_seconds", "updates_per_second", "online_steps_per_second")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name not in measured)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (shared, tmp_path / "one"))
    assert ours["members"] == theirs["members"] and ours["flags"]["shard"] == "" and ours["run_dir"] == str(shared)
    kept = shutil.copytree(shared / "part-1", shared / "part-1-old")
    (kept / "checkpoint" / "state.npz").unlink()  # a copy is none of the run's
    policies = [load_policy(folder, member=1)(np.ones(11)) for folder in (shared, tmp_path / "one")]
    np.testing.assert_array_equal(*policies)
    for name in ("curves.png", "grid.png"):
        assert (shared / name).read_bytes()[:4] == b"\x89PNG"


def member(index: int, score: float | None) -> dict[str, Any]:
    """An entry of final.json; without a score it diverged."""
    scores = {"score_mean": score, "score_std": score and 1.0, "return_mean": score, "return_std": score and 1.0}
    diverged = {"step": 3, "metric": "actor/loss"} if score is None else None
    return {"member": index, "seed": index, "swept": {}, "diverged": diverged, "episodes": 2} | scores


def write_part(run_dir: Path, part: int, scores: dict[int, float | None], finished: bool = True, **flags: Any) -> Path:
    """A part of two of a run, whose members are numbered by `scores`."""
    path = run_dir / f"part-{part}"
    path.mkdir(parents=True)
    flags = {"shard": f"{part}/2", "dataset": "easy", "num_updates": 10, "quiet": part == 0} | flags
    config = {"algorithm": "emaq", "flags": flags, "dataset_sha256": "abc", "git_commit": "1", "git_dirty": False}
    config |= {"members": [{"member": i} for i in scores], "dataset_returns": {"score_mean": 1.0, "mean": 2.0}}
    (path / "config.json").write_text(json.dumps(config))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in merge.ORDER}
    for i, score in scores.items():
        for phase, step in (("offline", 0), ("offline", 10), ("online", 0)):
            row = {"phase": phase, "step": step, "member": i, "return_mean": step, "score_mean": step}
            rows["evaluations.csv"].append(row)
        for name in ("metrics.csv", "pretraining.csv"):
            rows[name] += [{"step": step, "member": i, "loss": 0.5} for step in (9, 10)]
        rows["returns.csv"] += [{"member": i, "episode": episode, "return": score} for episode in (0, 1)]
    for name, lines in rows.items():
        with open(path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    if finished:
        final = {"members": [member(i, score) for i, score in scores.items()], "updates": 10, "online_steps": 0}
        final |= {"wall_clock_seconds": 5.0 + part, "updates_per_second": 7.0, "online_steps_per_second": None}
        (path / "final.json").write_text(json.dumps(final))
    return path


def test_rows_are_by_phase_step_and_member(tmp_path: Path) -> None:
    write_part(tmp_path, 0, {0: 1.0, 2: 3.0})
    write_part(tmp_path, 1, {1: 2.0, 10: None})
    assert merge.merge(tmp_path) == []
    rows = {name: rows_of(tmp_path / name) for name in merge.ORDER}
    evaluations = [(row["phase"], row["step"], row["member"]) for row in rows["evaluations.csv"]]
    points = [("offline", "0"), ("offline", "10"), ("online", "0")]
    assert evaluations == [(*point, index) for point in points for index in ("0", "1", "2", "10")]
    steps = [(row["step"], row["member"]) for row in rows["metrics.csv"]]
    assert steps == [(step, index) for step in ("9", "10") for index in ("0", "1", "2", "10")]
    assert rows["pretraining.csv"] == rows["metrics.csv"]
    assert [row["member"] for row in rows["returns.csv"]] == ["0", "0", "1", "1", "2", "2", "10", "10"]
    final = json.loads((tmp_path / "final.json").read_text())
    assert [entry["member"] for entry in final["members"]] == [0, 1, 2, 10]
    assert final["aggregate"]["score"]["iqm"] == 2.0 and final["aggregate"]["score"]["count"] == 3
    assert (final["wall_clock_seconds"], final["updates_per_second"]) == (6.0, 14.0)
    assert final["online_steps_per_second"] is None


def test_the_length_is_not_that_of_a_part_whose_members_all_diverged(tmp_path: Path) -> None:
    lost = write_part(tmp_path, 0, {0: None}) / "final.json"
    lost.write_text(json.dumps(json.loads(lost.read_text()) | {"updates": 3}))
    write_part(tmp_path, 1, {1: 2.0})
    assert merge.merge(tmp_path) == []
    assert json.loads((tmp_path / "final.json").read_text())["updates"] == 10


def test_what_is_missing_is_said_and_the_rest_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = write_part(tmp_path / "a", 1, {1: 2.0}, finished=False)
    with open(half / "metrics.csv", "a") as file:
        file.write("11,1,0.")  # a row that is being written
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path / "a")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("part 0 of 2 has not begun") and lines[1].endswith("part 1 of 2 has not finished")
    assert lines[2].startswith("error: no part of ") and "curves.png" in lines[2] and len(lines) == 3
    assert [row["step"] for row in rows_of(tmp_path / "a" / "metrics.csv")] == ["9", "10"]
    assert (tmp_path / "a" / "curves.png").exists()

    write_part(tmp_path / "a", 0, {0: 1.0})
    shutil.copytree(half, half.with_name("part-1-old"))  # none of the run's
    report.main([str(tmp_path / "a")])
    out, err = capsys.readouterr()
    assert err.endswith("part 1 of 2 has not finished\n") and err.count("\n") == 1
    assert "seed 0" in out and "seed 1" not in out
    assert {row["member"] for row in rows_of(tmp_path / "a" / "evaluations.csv")} == {"0", "1"}


def test_a_merge_that_waited_takes_what_ended_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lock(path: Path, held: str) -> Iterator[None]:
        write_part(tmp_path, 1, {1: 2.0})  # while this one waits for the lock
        yield

    monkeypatch.setattr(merge, "lock", lock)
    write_part(tmp_path, 0, {0: 1.0})
    with merge.merging(tmp_path):
        assert merge.merge(tmp_path) == []
    assert len(json.loads((tmp_path / "final.json").read_text())["members"]) == 2


def test_no_other_process_draws_the_figures_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that end together each report on the whole run."""
    for part in (0, 1):
        write_part(tmp_path, part, {part: 1.0})
    drawn = []

    def draw(run_dir: Path) -> None:
        with open(run_dir / ".merge.lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        drawn.append(run_dir)

    monkeypatch.setattr(report.curves, "draw", draw)
    report.of_run(tmp_path)
    assert drawn == [tmp_path]


def test_a_run_by_itself_is_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_part(tmp_path, 1, {0: 1.0}, shard="")
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 2 and "part-1 is a run by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "what"), [({"num_updates": 20}, "num_updates 20"), ({"shard": "1/3"}, "shard 3"), ({"beta": 1}, "beta 1")]
)
def test_parts_of_different_runs_are_refused(tmp_path: Path, flags: dict[str, Any], what: str) -> None:
    write_part(tmp_path, 0, {0: 1.0}, beta=3)
    write_part(tmp_path, 1, {1: 2.0}, **{"beta": 3} | flags)
    with pytest.raises(UsageError, match=f"part-1 and .*part-0 are not of one run: {what} and "):
        merge.merge(tmp_path)
    assert not (tmp_path / "final.json").exists()


@pytest.mark.parametrize(("name", "value", "other"), [("algorithm", "iql", "emaq"), ("dataset_sha256", "def", "abc")])
def test_parts_of_other_data_or_another_algorithm_are_refused(
    tmp_path: Path, name: str, value: str, other: str
) -> None:
    """As where an .npz was written anew between the two."""
    write_part(tmp_path, 0, {0: 1.0})
    config = write_part(tmp_path, 1, {1: 2.0}) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(UsageError, match=f"part-1 and .*part-0 are not of one run: {name} {value} and {other}"):
        merge.merge(tmp_path)
    assert not (tmp_path / "final.json").exists()
