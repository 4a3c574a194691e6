"""Interquartile means over tasks and seeds, and their intervals. Agarwal et al., 2021, arXiv:2108.13264."""

from collections.abc import Sequence

import numpy as np


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut at each end."""
    ordered = np.sort(np.asarray(values, float).ravel())
    cut = int(0.25 * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(strata: Sequence[Sequence[float] | np.ndarray], resamples: int = 2000) -> tuple[float, float]:
    """95 % stratified percentile-bootstrap interval of the interquartile mean over all strata (e.g. tasks) of runs.

    Within each stratum the runs are drawn with replacement (section 4.1), by a fixed seed: the same values give the
    same interval.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(values, float) for values in strata]
    drawn = np.concatenate([x[rng.integers(0, len(x), (resamples, len(x)))] for x in arrays], axis=1)
    low, high = np.percentile([interquartile_mean(row) for row in drawn], [2.5, 97.5])
    return float(low), float(high)
