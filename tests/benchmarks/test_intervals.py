"""The statistics of the reports, by hand; intervals where the resamples can be counted."""

import numpy as np
import pytest

from benchmarks import intervals


def test_the_interval_is_over_seeds_within_each_task() -> None:
    assert intervals.interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert intervals.bootstrap_interval([[1.0], [5.0]]) == (3.0, 3.0), "a stratum of one seed has no spread"
    low, high = intervals.bootstrap_interval([[0.0, 10.0]])
    assert (low, high) == (0.0, 10.0) == intervals.bootstrap_interval([[10.0, 0.0]])


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
