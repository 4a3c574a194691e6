"""The maximum over actions of the minimum over Q-functions, to the same result with fewer evaluations."""

from typing import Any

import jax
import jax.numpy as jnp

from common.networks import QEnsemble


def max_of_min(
    params: Any, critic: QEnsemble, observations: jax.Array, actions: jax.Array, screens: int
) -> tuple[jax.Array, jax.Array]:
    """max_n min_k Q_k(s, a_n) `[batch]`, and the share of the pairs (s, a_n) for which all Q-functions were evaluated.

    `observations [batch, obs_dim]`, `actions [n, batch, action_dim]`. The first `screens` of the K Q-functions (at
    least one, fewer than K) are evaluated for all pairs: their minimum is an upper bound of the minimum over all. The
    others are evaluated only for pairs whose bound is above the best minimum that their state has so far, `batch` pairs
    at a time, the highest bounds of all states first, until no such pair is left; none of the others can win.
    """
    num_actions, batch, action_dim = actions.shape
    first, others = critic.clone(num_critics=screens), critic.clone(num_critics=critic.num_critics - screens)
    bounds = first.apply(jax.tree.map(lambda p: p[:screens], params), observations, actions).min(axis=0)
    params_of_others = jax.tree.map(lambda p: p[screens:], params)
    order = jnp.argsort(-bounds, axis=0)
    bounds = jnp.take_along_axis(bounds, order, axis=0).ravel()  # pair i is of state i % batch
    actions = jnp.take_along_axis(actions, order[..., None], axis=0).reshape(-1, action_dim)
    best, evaluated = jnp.full(batch, -jnp.inf), jnp.zeros(num_actions * batch, bool)

    def open_pairs(best: jax.Array, evaluated: jax.Array) -> jax.Array:
        return ~evaluated & (bounds > jnp.tile(best, num_actions))

    def evaluate(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, evaluated = carry
        pairs = jnp.nonzero(open_pairs(best, evaluated), size=batch, fill_value=num_actions * batch)[0]
        states = pairs % batch
        q = others.apply(params_of_others, observations[states], actions.at[pairs].get(mode="clip")).min(axis=0)
        minima = jnp.minimum(q, bounds.at[pairs].get(mode="fill", fill_value=-jnp.inf))
        return best.at[states].max(minima), evaluated.at[pairs].set(True, mode="drop")

    best, evaluated = jax.lax.while_loop(lambda carry: open_pairs(*carry).any(), evaluate, (best, evaluated))
    return best, evaluated.mean()
