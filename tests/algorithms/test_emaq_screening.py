"""The screened maximum of minima against all critics on all actions, where screening is easy and where it is not."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.emaq import max_of_min
from common.networks import QEnsemble

OBS, ACT, BATCH, NUM = 3, 2, 40, 12
every_size = pytest.mark.parametrize(
    "num_critics", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
screened = jax.jit(max_of_min, static_argnums=1)


def ensemble(num_critics: int) -> QEnsemble:
    return QEnsemble(num_critics, 8, 1)


@cache
def random_critics(num_critics: int) -> Any:
    params = ensemble(num_critics).init(jax.random.key(0), jnp.zeros((1, OBS)), jnp.zeros((1, ACT)))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + noise.normal(size=x.shape).astype(np.float32), params)


def changed(params: Any, k: int, slope: float, offset: float) -> Any:
    """With Q_k(s, a) = `slope` a_0 + `offset` in place of the k-th critic, for a_0 in [-1, 1]."""
    layers = jax.tree.map(np.copy, params["params"]["VmapMLP_0"])
    for layer in layers.values():
        layer["kernel"][k], layer["bias"][k] = 0.0, 0.0
    layers["Dense_0"]["kernel"][k, OBS, 0], layers["Dense_0"]["bias"][k, 0] = 1.0, 2.0
    layers["Dense_1"]["kernel"][k, 0], layers["Dense_1"]["bias"][k] = slope, offset - 2.0 * slope
    return {"params": {"VmapMLP_0": layers}}


def linear_critics(*lines: tuple[float, float]) -> Any:
    params = random_critics(len(lines))
    for k, line in enumerate(lines):
        params = changed(params, k, *line)
    return params


@cache
def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, OBS)).astype(np.float32), rng.uniform(-1, 1, (NUM, BATCH, ACT)).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def values(num_critics: int, params: Any, observations: Any, actions: Any) -> jax.Array:
    """Q of every critic for every action, [K, NUM, BATCH]: states repeated, one critic after the other."""
    states = jnp.repeat(observations[None], NUM, axis=0)
    layers, x = params["params"]["VmapMLP_0"], jnp.concatenate([states, actions], axis=-1)
    members = [jax.tree.map(lambda x, k=k: x[k], layers) for k in range(num_critics)]
    hidden = [jax.nn.relu(x @ m["Dense_0"]["kernel"] + m["Dense_0"]["bias"]) for m in members]
    out = [h @ m["Dense_1"]["kernel"] + m["Dense_1"]["bias"] for m, h in zip(members, hidden, strict=True)]
    return jnp.stack(out)[..., 0]


def check(params: Any, num_critics: int, observations: Any = None, actions: Any = None) -> float:
    """The result is the maximum of minima; the share of all evaluations that were done."""
    observations = inputs()[0] if observations is None else observations
    actions = inputs()[1] if actions is None else actions
    expected = np.asarray(values(num_critics, params, observations, actions)).min(axis=0).max(axis=0)
    found, share = screened(params, ensemble(num_critics), observations, actions)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return float(share)


@every_size
def test_the_maximum_of_minima(num_critics: int) -> None:
    """Random critics; actions in pairs of equals; all actions equal; all states too; one critic below or above all."""
    params, (observations, actions) = random_critics(num_critics), inputs()
    check(params, num_critics)
    check(params, num_critics, actions=np.repeat(actions[::2], 2, axis=0))
    alike = np.repeat(actions[:1], NUM, axis=0)
    check(params, num_critics, actions=alike)
    check(params, num_critics, np.zeros_like(observations), np.zeros_like(actions))
    for k in {0, num_critics - 1}:
        check(changed(params, k, 0.0, -2.0), num_critics)
        check(changed(params, k, 0.0, -1000.0), num_critics)
        check(changed(params, k, 0.0, 1000.0), num_critics)
    # The last critic's order is the opposite of all others', and only it decides.
    check(linear_critics(*[(0.01, 9.0)] * (num_critics - 1), (-1.0, 7.0)), num_critics)
    check(linear_critics(*[(0.0, 0.0)] * num_critics), num_critics)


@pytest.mark.parametrize("num_critics", [2, 8])
def test_work_is_saved_where_the_first_bounds_decide(num_critics: int) -> None:
    """One critic is far below the others, wherever it stands: its best action is the best."""
    for k in (0, num_critics - 1):
        lines = [(0.0, 9.0)] * num_critics
        lines[k] = (1.0, 0.0)
        # That one for all actions; beside it the order, and the leading action with each group of critics.
        share = check(linear_critics(*lines), num_critics)
        assert 1 / num_critics < share < 1 / num_critics + 3 / NUM
        assert share < 0.8


def test_all_work_is_done_where_no_bound_decides() -> None:
    """The critic of lower mean prefers the actions that the other puts last, by so little that none is ruled out."""
    actions = inputs()[1].copy()
    actions[0] = 0.9  # of these the means are taken
    params = linear_critics((1.0, -0.5), (-0.001, 0.0))
    assert check(params, 2, actions=actions) >= 1


@pytest.mark.parametrize("num_critics", [2, 8])
def test_numbers_that_are_not_finite_end_and_are_seen(num_critics: int) -> None:
    """Equal to what numpy makes of them, state by state."""
    params, (observations, actions) = random_critics(num_critics), inputs()
    for k in (0, num_critics - 1):
        for bad in (np.nan, np.inf, -np.inf):
            check(changed(params, k, 0.0, bad), num_critics)
    broken_state, broken_action = observations.copy(), actions.copy()
    broken_state[3] = broken_action[4, 2] = np.nan
    check(params, num_critics, observations=broken_state)
    check(params, num_critics, actions=broken_action)
    check(jax.tree.map(lambda x: np.full_like(x, np.nan), params), num_critics)
    check(linear_critics(*[(0.0, -np.inf)] * num_critics), num_critics)
