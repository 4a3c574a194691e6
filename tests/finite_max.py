"""The maximum of n draws from finitely many values, exactly: what EMaQ's proposals are compared with."""

import numpy as np


def expected_max(values: np.ndarray, probabilities: np.ndarray | None, n: int) -> np.ndarray:
    """E max of `n` independent draws, exactly: [...] from `values` and `probabilities` [..., actions] in float64.

    With the values in ascending order and F_i the probability of the first i of them, the largest draw is the i-th with
    probability F_i^n - F_{i-1}^n. Equal values need no care. Values of probability zero play no part and may be
    infinite or NaN. Axes before the last broadcast. `probabilities` are divided by their sum, for those of float32.

    Without probabilities all values are equally likely.

    Raises ValueError for `n` below 1 and for probabilities that are negative, NaN or do not sum to 1.
    """
    if not n >= 1:
        raise ValueError(f"the maximum of {n} draws is not defined: draw at least one")
    values = np.asarray(values, np.float64)
    if probabilities is None:
        probabilities = np.full(values.shape[-1], 1 / values.shape[-1])
    values, probabilities = np.broadcast_arrays(values, np.asarray(probabilities, np.float64))
    total = probabilities.sum(-1, keepdims=True)
    if not (np.all(probabilities >= 0) and np.allclose(total, 1)):
        raise ValueError("probabilities must not be negative and must sum to 1 over the last axis")

    order = np.argsort(values, axis=-1)
    probabilities = np.take_along_axis(probabilities / total, order, -1)
    values = np.where(probabilities > 0, np.take_along_axis(values, order, -1), 0.0)
    # F_i^n from 1 - F_i, summed from the top: for large n all depends on tails that a sum from the bottom rounds away.
    above = np.cumsum(probabilities[..., :0:-1], axis=-1)[..., ::-1]
    with np.errstate(divide="ignore"):  # log 0 = -inf, of a probability 0 that comes first
        below = np.exp(n * np.log1p(-np.minimum(above, 1.0)))
    weights = np.diff(below, axis=-1, prepend=0.0, append=1.0)
    return (weights * values).sum(-1)


def difficulty(values: np.ndarray, probabilities: np.ndarray | None, n: int) -> np.ndarray:
    """D(s, `n`) of Theorem 3.5, [...] in the unit of `values`: the largest value in the support minus `expected_max`.

    Arguments and errors are those of `expected_max`. It is not negative, and for fixed values it decreases and is
    convex in `n`.
    """
    values = np.asarray(values, np.float64)
    supported = np.asarray(1.0 if probabilities is None else probabilities) > 0
    best = np.where(supported, values, -np.inf).max(-1, keepdims=True)
    # Distances are summed rather than two large numbers subtracted: what is left stays precise however small it is.
    return 0.0 - expected_max(values - best, probabilities, n)  # a minus sign would write zero as -0.0
