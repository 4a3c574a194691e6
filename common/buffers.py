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


def end_episodes(rings: Ring) -> Ring:
    """Rings `[members, capacity, ...]` whose newest row is the last of its episode: what follows starts another one."""
    members, newest = jnp.arange(len(rings.size)), (rings.position - 1) % rings.data.rewards.shape[1]
    cut = jnp.where(rings.size > 0, 1.0 - rings.data.terminations[members, newest], 0.0)
    truncations = jnp.asarray(rings.data.truncations).at[members, newest].set(cut)
    return rings._replace(data=rings.data._replace(truncations=truncations))


class Replay(NamedTuple):
    """What minibatches are drawn from: the shared offline rows, a member's online ring, or their union.

    With a `member` the ring is that of a population, `[members, capacity, ...]`, and that member's part is meant:
    rows are then picked from the whole, because slicing the part out would copy it.
    """

    offline: Transitions | None
    ring: Ring | None = None
    member: jax.Array | None = None


def sample(key: jax.Array, replay: Replay, batch_size: int) -> Transitions:
    """A minibatch `[batch_size, ...]`, uniform with replacement over all rows of the offline data and the ring."""
    offline, ring, member = replay
    num_offline = 0 if offline is None else len(offline.rewards)
    if ring is None:
        assert num_offline, "nothing to sample from"
        rows = jax.random.randint(key, (batch_size,), 0, num_offline)
        return jax.tree.map(lambda x: x[rows], offline)
    size = ring.size if member is None else ring.size[member]
    rows = jax.random.randint(key, (batch_size,), 0, num_offline + size)
    from_ring, ring_rows = rows >= num_offline, jnp.maximum(rows - num_offline, 0)
    new = jax.tree.map(lambda x: x[ring_rows] if member is None else x[member, ring_rows], ring.data)
    if offline is None:
        return new

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(from_ring.reshape(-1, *[1] * (new.ndim - 1)), new, old[jnp.minimum(rows, num_offline - 1)])

    return jax.tree.map(pick, offline, new)
