"""The run directory's tables and records."""

import csv
import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offax_sets
from common import report
from common.report import append_rows, write_json


def content(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_rows_are_on_disk_at_once_and_numbers_survive(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    append_rows(path, [{"step": 10, "loss": 0.1, "note": None}, {"step": 20, "loss": float("nan"), "note": "a,b"}])
    assert content(path) == [["step", "loss", "note"], ["10", "0.1", ""], ["20", "nan", "a,b"]]
    append_rows(path, [{"step": 30, "loss": 1 / 3}])
    assert content(path)[-1] == ["30", "0.3333333", ""]


def test_the_first_row_fixes_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An environment that reports success only later on must not shift what is in the table."""
    path = tmp_path / "table.csv"
    append_rows(path, [{"step": 10, "loss": 0.5}])
    append_rows(path, [{"loss": 1.5, "step": 20, "success": 1.0}])
    assert content(path) == [["step", "loss"], ["10", "0.5"], ["20", "1.5"]]
    assert capsys.readouterr().err == "table.csv is without success: its first row had none, and fixes the columns\n"


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5, {"b": math.inf}], 3: (None, True)})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {"a": [None, 1.5, {"b": None}], "3": [None, True]}


def test_a_file_system_without_locks_holds_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cluster's that is mounted without flock."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    report.claim(tmp_path / "run", resume=False).close()
    with offax_sets.lock(tmp_path / ".lock", "held"):
        pass
