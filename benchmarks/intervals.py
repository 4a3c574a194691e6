"""Statistics over tasks and seeds, with intervals: means, profiles, comparisons, and the price of tuning.

Definitions of Agarwal et al., 2021, arXiv:2108.13264, and of Kurenkov and Kolesnikov, 2022, arXiv:2110.04156. `strata`
are the scores of an algorithm's runs, a sequence for each task. Runs are drawn with replacement within each task, by a
fixed seed: the same scores give the same interval.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Strata = Sequence[Sequence[float] | np.ndarray]
BLOCKS, BLOCK = 25, 2000  # resamples: 50,000, as many at a time as fit beside a large population


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of the middle half: a quarter of the values, rounded down, is cut at each end."""
    x = np.sort(np.asarray(values, float), axis=axis)
    cut = x.shape[axis or 0] // 4
    return np.take(x, range(cut, x.shape[axis or 0] - cut), axis=axis or 0).mean(axis=axis)


def percentile_interval(
    strata: Strata, statistic: Callable[[list[np.ndarray]], np.ndarray], blocks: int | None = None
) -> np.ndarray:
    """Where 95 % of the resamples have `statistic`, `[2, ...]`: the runs of each task drawn with replacement (4.1).

    `statistic` is of the tasks' draws, `[resamples, runs]` each, and has the resamples first.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(values, float) for values in strata]
    draws = [statistic([x[rng.integers(0, len(x), (BLOCK, len(x)))] for x in arrays]) for _ in range(blocks or BLOCKS)]
    return np.percentile(np.concatenate(draws), [2.5, 97.5], axis=0)


def bootstrap_interval(strata: Strata) -> tuple[float, float]:
    """95 % stratified percentile-bootstrap interval of the interquartile mean over the runs of all tasks."""
    low, high = percentile_interval(strata, lambda tasks: interquartile_mean(np.concatenate(tasks, axis=1), axis=1))
    return float(low), float(high)


def performance_profile(strata: Strata, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs above each threshold, averaged over tasks (section 4.2), and its pointwise interval."""

    def shares(tasks: Sequence[np.ndarray]) -> np.ndarray:
        """`[..., thresholds]` of tasks `[..., runs]`."""
        return np.mean([(x[..., None] > thresholds).mean(axis=-2) for x in tasks], axis=0)

    low, high = percentile_interval(strata, shares, blocks=1)  # a figure shows no more
    return shares([np.asarray(x, float) for x in strata]), low, high


def probability_of_improvement(ours: Strata, theirs: Strata) -> tuple[float, float, float]:
    """P(a run of ours is above one of theirs), ties by half, averaged over tasks (section 4.3), and its interval."""

    def probability(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
        """`[...]` of tasks `[..., runs]`."""
        above = [np.sign(a[..., :, None] - b[..., None, :]).mean(axis=(-2, -1)) for a, b in zip(x, y, strict=True)]
        return (1 + np.mean(above, axis=0)) / 2

    point = probability([np.asarray(x, float) for x in ours], [np.asarray(y, float) for y in theirs])
    # Both sides in one stream, or equal ones would be drawn alike.
    low, high = percentile_interval([*ours, *theirs], lambda x: probability(x[: len(ours)], x[len(ours) :]))
    return float(point), float(low), float(high)


def expected_best(settings: Strata) -> tuple[np.ndarray, np.ndarray]:
    """Expected Online Performance: of the best of k = 1, 2, ... settings, each drawn uniformly and evaluated online.

    `settings` has the scores of each setting's seeds; a setting's score is their mean. As in the paper (and Dodge et
    al., 2019) settings are drawn with replacement, so that the last of the curve is below the best one. Mean and
    standard deviation over the draws, `[settings]` each. An interval over the seeds would mislead: the maximum of noisy
    means is too high, and the more so in each resample.
    """
    below = np.arange(len(settings) + 1)[:, None] / len(settings)
    budgets = np.arange(1, len(settings) + 1)
    weights = np.diff(below**budgets, axis=0)  # P(the best of k is the i-th lowest), [settings, budgets]
    scores = np.sort([np.mean(x) for x in settings])
    means = scores @ weights
    return means, np.sqrt(((scores[:, None] - means) ** 2 * weights).sum(axis=0))


def regret(steps: Sequence[float], scores: Sequence[float]) -> float:
    """How far below an expert's 100 the scores were, averaged over the steps between the evaluations."""
    return float(100.0 - np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def aggregate(values: Sequence[float | None]) -> dict[str, Any]:
    """Interquartile mean with its interval, of the values that there are; None where they are too few."""
    x = [value for value in values if value is not None and np.isfinite(value)]
    low, high = bootstrap_interval([x]) if len(x) > 1 else (None, None)
    return {"iqm": float(interquartile_mean(x)) if x else None, "ci_low": low, "ci_high": high, "count": len(x)}


def rank(values: Sequence[float | None]) -> tuple[float, float]:
    """Sort key of a setting by its runs, the best first: a run without a value, as it diverged, is below all others.

    Up to a quarter of the runs may so be lost at no cost; a setting that lost more comes after all that did not.
    """
    x = [value for value in values if value is not None and np.isfinite(value)]
    lost = [-np.inf] * (len(values) - len(x))
    return -float(interquartile_mean([*x, *lost])), -float(interquartile_mean(x)) if x else np.inf


def by_setting(members: Sequence[dict[str, Any]]) -> dict[tuple[tuple[str, float], ...], list[dict[str, Any]]]:
    """The members of each setting."""
    groups: dict[tuple[tuple[str, float], ...], list[dict[str, Any]]] = {}
    for member in members:
        groups.setdefault(tuple(member["swept"].items()), []).append(member)
    return groups


def ranked(members: Sequence[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    """The members of each setting, the best setting first, by their last `name`: score or return."""
    return sorted(by_setting(members).values(), key=lambda group: rank([member[f"{name}_mean"] for member in group]))


def summarise(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`aggregate` of all members' final scores and returns, and `combinations`: of each swept setting, best first."""

    def of(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: aggregate([member[f"{name}_mean"] for member in group]) for name in ("score", "return")}

    whole = of(members)
    groups = ranked(members, "return" if whole["score"]["iqm"] is None else "score")
    return {"combinations": [{"swept": group[0]["swept"]} | of(group) for group in groups], "aggregate": whole}
