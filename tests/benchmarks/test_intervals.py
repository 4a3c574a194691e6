"""The statistics of the reports, by hand; intervals where the resamples can be counted."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from benchmarks import intervals

BLOCKS = intervals.BLOCKS  # before conftest.py makes it fewer


def test_the_interval_is_over_seeds_within_each_task() -> None:
    assert intervals.interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert intervals.bootstrap_interval([[1.0], [5.0]]) == (3.0, 3.0), "a stratum of one seed has no spread"
    low, high = intervals.bootstrap_interval([[0.0, 10.0]])
    assert (low, high) == (0.0, 10.0) == intervals.bootstrap_interval([[10.0, 0.0]])


def test_an_interval_is_that_of_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds have 5^5 resamples, few enough to list: no interval is narrower for want of resamples."""
    monkeypatch.setattr(intervals, "BLOCKS", BLOCKS)
    for scores in ([0.9, 1.1, 6.8, 67.3, 84.0], [17.0, 14.4, 47.8, 50.0, 52.6], [31.0, 30.3, 43.4, 78.9, 90.0]):
        every = np.array(list(itertools.product(scores, repeat=5)))
        low, high = np.percentile(np.sort(every, axis=1)[:, 1:4].mean(axis=1), [2.5, 97.5])
        assert intervals.bootstrap_interval([scores]) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_a_profile_is_the_share_above_averaged_over_tasks() -> None:
    share, low, high = intervals.performance_profile([[1.0, 3.0], [2.0, 2.0, 2.0, 5.0]], np.array([0.0, 2.0, 4.0, 9.0]))
    assert share.tolist() == [1.0, (1 / 2 + 1 / 4) / 2, (0 + 1 / 4) / 2, 0.0], "above, not at; tasks count alike"
    assert low.tolist() == [1.0, 0.0, 0.0, 0.0] and high[0] == 1.0 and high[3] == 0.0
    assert (low <= share).all() and (share <= high).all() and high[1] > share[1]


def test_a_profile_of_one_seed_has_no_spread() -> None:
    share, low, high = intervals.performance_profile([[1.0], [3.0]], np.array([2.0]))
    assert share == low == high == [0.5]


def test_improvement_counts_pairs_within_a_task_and_ties_by_half() -> None:
    ours, theirs = [[1.0, 5.0], [0.0]], [[1.0, 2.0, 7.0], [3.0]]
    point, low, high = intervals.probability_of_improvement(ours, theirs)
    assert point == pytest.approx((2.5 / 6 + 0) / 2)  # 1 = 1; 5 > 1, 2
    assert low == pytest.approx(0.0) and high == pytest.approx(0.5)
    back, *_ = intervals.probability_of_improvement(theirs, ours)
    assert point + back == pytest.approx(1.0)
    assert intervals.probability_of_improvement([[2.0]], [[1.0]]) == (1.0, 1.0, 1.0)
    same, low, high = intervals.probability_of_improvement([[0.0, 1.0]], [[0.0, 1.0]])
    assert same == 0.5 and low == 0.0 and high == 1.0, "the two sides are drawn by themselves"


def test_the_expected_best_of_one_setting_is_the_mean_and_of_many_nears_the_best() -> None:
    mean, deviation = intervals.expected_best([[1.0, 3.0], [8.0], [5.0]])  # settings of 2, 8 and 5
    assert mean == pytest.approx([5.0, (2 * 1 + 5 * 3 + 8 * 5) / 9, (2 * 1 + 5 * 7 + 8 * 19) / 27])
    second = (4 * 1 + 25 * 3 + 64 * 5) / 9 - mean[1] ** 2
    assert deviation[:2] == pytest.approx([np.std([2, 5, 8]), np.sqrt(second)])
    one, none = intervals.expected_best([[4.0, 6.0]])
    assert (one, none) == ([5.0], [0.0])


def test_regret_is_the_area_above_the_curve() -> None:
    assert intervals.regret([0, 10, 40], [100.0, 50.0, 50.0]) == pytest.approx((10 * 25 + 30 * 50) / 40)
    assert intervals.regret([0, 5], [80.0, 80.0]) == pytest.approx(20.0)


def test_interquartile_mean_by_hand() -> None:
    for values, mean in (
        ([5.0], 5),
        ([1, 2, 6], 3),  # a quarter of three, rounded down, is none
        ([100, 1, 3, -50], 2),
        ([0, 1, 2, 3, 4, 5, 6, 70], 3.5),
    ):
        assert intervals.aggregate(values)["iqm"] == mean


def test_bootstrap_interval() -> None:
    # Two draws of {0, 1}: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    found = intervals.aggregate([0.0, 1.0])
    assert (found["ci_low"], found["ci_high"], found["count"]) == (0.0, 1.0, 2)
    # For many runs: mean +- 1.96 standard errors of the interquartile mean, by simulation.
    rng = np.random.default_rng(1)
    values = rng.normal(size=200)
    middle = np.sort(rng.normal(size=(4000, 200)), axis=1)[:, 50:150].mean(axis=1)
    found = intervals.aggregate(values)
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * middle.std(), rel=0.2)
    assert found["ci_low"] < found["iqm"] < found["ci_high"]
    assert intervals.aggregate(values) == found, "the same values give the same interval"


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert intervals.aggregate([3.0, 3.0, 3.0]) == {"iqm": 3.0, "ci_low": 3.0, "ci_high": 3.0, "count": 3}


def test_aggregate_leaves_out_what_is_missing() -> None:
    assert intervals.aggregate([None, math.nan]) == {"iqm": None, "ci_low": None, "ci_high": None, "count": 0}
    # One value says nothing about the spread: no interval of width zero.
    assert intervals.aggregate([3.0, None]) == {"iqm": 3.0, "ci_low": None, "ci_high": None, "count": 1}


def members_of(scores: dict[float, list[float | None]]) -> list[dict[str, Any]]:
    """Members of a sweep of beta: for each value a list of scores, returns ten times as large; None diverged."""
    return [
        {"seed": seed, "swept": {"beta": beta}, "score_mean": score, "return_mean": score and 10 * score}
        for beta, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_members_are_summarised_by_their_setting() -> None:
    summary = intervals.summarise(members_of({1.0: [1, 2, 3], 2.0: [10, None, 30], 3.0: [None] * 3}))
    assert [c["swept"] for c in summary["combinations"]] == [{"beta": 1.0}, {"beta": 2.0}, {"beta": 3.0}], "best first"
    assert [c["score"]["iqm"] for c in summary["combinations"]] == [2, 20, None]
    assert [c["return"]["count"] for c in summary["combinations"]] == [3, 2, 0]
    assert summary["aggregate"]["score"]["count"] == 5


def test_a_setting_that_mostly_diverges_is_not_the_best_one() -> None:
    """Of five seeds the lowest is cut off, so one that diverged costs nothing more than the lowest would."""
    lucky, steady, one_lost = [80.0, *[None] * 4], [70.0] * 5, [75.0, 74.0, 73.0, 72.0, None]
    worse, none_left = [90.0, None, None], [None] * 3
    settings = [none_left, worse, lucky, steady, one_lost]
    assert sorted(settings, key=intervals.rank) == [one_lost, steady, worse, lucky, none_left]
