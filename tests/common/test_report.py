"""The run directory's tables, and the statistics of its report."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import report
from common.report import append_rows, write_json

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
    assert [c["swept"] for c in summary["combinations"]] == [{"beta": 2.0}, {"beta": 1.0}, {"beta": 3.0}], "best first"
    assert [c["score"]["iqm"] for c in summary["combinations"]] == [20, 2, None]
    assert [c["return"]["count"] for c in summary["combinations"]] == [2, 3, 0]
    assert summary["aggregate"]["score"]["count"] == 5
