"""Transitions on the device: the offline arrays shared by a population, and a ring of online transitions per member."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Transitions(NamedTuple):
    """Flat transitions, leading axis N. A termination masks the bootstrap, a truncation does not.

    `observations, next_observations [N, obs_dim]`, `actions [N, action_dim]` in [-1, 1], `rewards, terminations,
    truncations [N]`; all float32, flags 0 or 1. Rows are time-ordered and episodes are contiguous.
    """

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array
    next_observations: jax.Array
    terminations: jax.Array
    truncations: jax.Array


class Ring(NamedTuple):
    """The last `capacity` online transitions of one member; rows at and beyond `size` are not yet written."""

    data: Transitions
    position: jax.Array
    size: jax.Array


def empty_ring(capacity: int, obs_dim: int, action_dim: int) -> Ring:
    """A ring of `capacity` zero rows, `size` 0."""
    widths = {"observations": (obs_dim,), "actions": (action_dim,), "next_observations": (obs_dim,)}
    data = Transitions(*(jnp.zeros((capacity, *widths.get(name, ()))) for name in Transitions._fields))
    return Ring(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def insert(ring: Ring, transitions: Transitions) -> Ring:
    """Write n rows after the newest ones, over the oldest ones when the ring is full; n must not exceed capacity."""
    capacity, count = len(ring.data.rewards), len(transitions.rewards)
    assert count <= capacity, f"{count} rows do not fit a ring of {capacity}"
    rows = (ring.position + jnp.arange(count)) % capacity
    data = jax.tree.map(lambda old, new: old.at[rows].set(new), ring.data, transitions)
    return Ring(data, (ring.position + count) % capacity, jnp.minimum(ring.size + count, capacity))


class Replay(NamedTuple):
    """What minibatches are drawn from: the shared offline rows, a member's online ring, or their union."""

    offline: Transitions | None
    ring: Ring | None = None


def sample(key: jax.Array, replay: Replay, batch_size: int) -> Transitions:
    """A minibatch `[batch_size, ...]`, uniform with replacement over all rows of the offline data and the ring."""
    offline, ring = replay
    if ring is None:
        assert offline is not None, "nothing to sample from"
        rows = jax.random.randint(key, (batch_size,), 0, len(offline.rewards))
        return jax.tree.map(lambda x: x[rows], offline)
    if offline is None:
        rows = jax.random.randint(key, (batch_size,), 0, ring.size)
        return jax.tree.map(lambda x: x[rows], ring.data)
    num_offline = len(offline.rewards)
    rows = jax.random.randint(key, (batch_size,), 0, num_offline + ring.size)
    from_ring = rows >= num_offline
    old_rows, new_rows = jnp.minimum(rows, num_offline - 1), jnp.maximum(rows - num_offline, 0)

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        mask = from_ring.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(mask, new[new_rows], old[old_rows])

    return jax.tree.map(pick, offline, ring.data)
