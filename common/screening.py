"""The maximum over actions of the minimum over Q-functions, to the same result with fewer evaluations."""

from typing import Any

import jax
import jax.numpy as jnp

from common.networks import QEnsemble

STATES_FOR_ORDER = 32
"""States, of a minibatch with one action each, from which the order of the Q-functions is taken."""


def max_of_min(
    params: Any, critic: QEnsemble, observations: jax.Array, actions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """max_n min_k Q_k(s, a_n) `[batch]`, and the share of all evaluations Q_k(s, a_n) that were done for it.

    `observations [batch, obs_dim]`, `actions [n, batch, action_dim]`. The minimum over some of the Q-functions is an
    upper bound of the minimum over all, so that an action whose bound is not above the best minimum known for its
    state cannot win, and needs no more Q-functions. One is evaluated for all actions, then 1, 2, 4, ... more at a time
    for those that are still open; before each time, the action of highest bound in each state gets all that it lacks,
    which raises the best minimum. The Q-functions of lowest mean come first: theirs are the tightest bounds.
    """
    num_actions, batch, action_dim = actions.shape
    num_critics, num_pairs = critic.num_critics, num_actions * batch
    some = slice(min(batch, STATES_FOR_ORDER))
    order = jnp.argsort(critic.apply(params, observations[some], actions[0, some]).mean(axis=1))
    params = jax.tree.map(lambda p: p[order], params)
    pairs = actions.reshape(num_pairs, action_dim)  # pair i is of state i % batch

    def minimum(first: int, last: int, states: jax.Array, actions: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda p: p[first:last], params)
        return critic.clone(num_critics=last - first).apply(part, states, actions).min(axis=0)

    bounds = minimum(0, 1, observations, actions)
    best = jnp.full(batch, -jnp.inf)
    done, evaluations = 1, jnp.float32(num_pairs + num_critics * len(observations[some]))
    while done < num_critics:
        leader = bounds.argmax(axis=0)[None]
        exact = minimum(done, num_critics, observations, jnp.take_along_axis(actions, leader[..., None], axis=0)[0])
        exact = jnp.minimum(exact, jnp.take_along_axis(bounds, leader, axis=0)[0])
        best = jnp.maximum(best, exact)
        bounds = jnp.put_along_axis(bounds, leader, exact[None], axis=0, inplace=False)

        group = min(done, num_critics - done)
        is_open = (bounds > best).ravel()
        number = is_open.sum()
        chosen = jnp.nonzero(is_open, size=num_pairs, fill_value=num_pairs)[0]
        chosen = jnp.concatenate([chosen, jnp.full(batch, num_pairs)])  # so that the last block is a whole one

        def block(i: jax.Array, flat: jax.Array, first: int = done, last: int = done + group) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(chosen, i * batch, batch)  # noqa: B023
            q = minimum(first, last, observations[own % batch], pairs.at[own].get(mode="clip"))
            return flat.at[own].min(q, mode="drop")

        blocks = -(-number // batch)
        bounds = jax.lax.fori_loop(0, blocks, block, bounds.ravel()).reshape(num_actions, batch)
        evaluations += batch * ((num_critics - done) + group * blocks)
        done += group
    return jnp.maximum(best, bounds.max(axis=0)), evaluations / (num_critics * num_pairs)
