"""Transitions on the device: the offline arrays shared by a population, and a ring of online transitions per member."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """The last online transitions of one member: row i of all that were ever `written` is at i modulo the capacity."""

    data: Transitions
    written: jax.Array

    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
        return self.data.rewards.shape[-1]

    @property
    def position(self) -> jax.Array:
        """Where the next row goes; once the ring is full, the oldest one is there."""
        return self.written % self.capacity

    @property
    def size(self) -> jax.Array:
        """How many rows there are; the rows from there on are not yet written."""
        return jnp.minimum(self.written, self.capacity)


def empty_ring(capacity: int, obs_dim: int, action_dim: int) -> Ring:
    """A ring of `capacity` zero rows, none written."""
    widths = {"observations": (obs_dim,), "actions": (action_dim,), "next_observations": (obs_dim,)}
    data = Transitions(*(jnp.zeros((capacity, *widths.get(name, ()))) for name in Transitions._fields))
    return Ring(data, jnp.zeros((), jnp.int32))


def insert(ring: Ring, transitions: Transitions, count: jax.Array | int | None = None) -> Ring:
    """Write rows after the newest ones, over the oldest ones when the ring is full: all, or the first `count`.

    `transitions` must not have more rows than the ring; `count` may be traced, so that members of a population can
    write different numbers of rows.
    """
    rows = len(transitions.rewards)
    assert rows <= ring.capacity, f"{rows} rows do not fit a ring of {ring.capacity}"
    places = (ring.position + jnp.arange(rows)) % ring.capacity
    if count is not None:
        places = jnp.where(jnp.arange(rows) < count, places, ring.capacity)  # beyond the end: dropped
    data = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), ring.data, transitions)
    return Ring(data, ring.written + (rows if count is None else count))


def end_episodes(rings: Ring) -> Ring:
    """Rings `[members, capacity, ...]` whose newest row is the last of its episode: what follows starts another one."""
    members, newest = jnp.arange(len(rings.written)), (rings.position - 1) % rings.capacity
    cut = jnp.where(rings.written > 0, 1.0 - rings.data.terminations[members, newest], 0.0)
    truncations = jnp.asarray(rings.data.truncations).at[members, newest].set(cut)
    return rings._replace(data=rings.data._replace(truncations=truncations))


class Replay(NamedTuple):
    """What minibatches are drawn from: the shared offline rows, a member's online ring, or their union.

    With a `member` the ring is that of a population, `[members, capacity, ...]`, and that member's part is meant:
    rows are then picked from the whole, because slicing the part out would copy it. What was `precomputed` for the
    offline rows, `[members, rows, ...]`, is to be read in the same way.
    """

    offline: Transitions | None
    ring: Ring | None = None
    member: jax.Array | None = None
    precomputed: Any = None


def sample_rows(key: jax.Array, replay: Replay, batch_size: int) -> jax.Array:
    """Row numbers `[batch_size]`, uniform with replacement over all rows of the offline data and the ring.

    Offline rows come first; those of the ring follow in the order in which it stores them.
    """
    offline, ring, member, _ = replay
    num_offline = 0 if offline is None else len(offline.rewards)
    assert num_offline or ring is not None, "nothing to sample from"
    written = 0 if ring is None else ring.size if member is None else ring.size[member]
    return jax.random.randint(key, (batch_size,), 0, num_offline + written)


def take(replay: Replay, rows: jax.Array) -> Transitions:
    """The transitions `[len(rows), ...]` of row numbers that `sample_rows` drew."""
    offline, ring, member, _ = replay
    if ring is None:
        return jax.tree.map(lambda x: x[rows], offline)
    num_offline = 0 if offline is None else len(offline.rewards)
    from_ring, ring_rows = rows >= num_offline, jnp.maximum(rows - num_offline, 0)
    new = jax.tree.map(lambda x: x[ring_rows] if member is None else x[member, ring_rows], ring.data)
    if offline is None:
        return new

    def pick(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(from_ring.reshape(-1, *[1] * (new.ndim - 1)), new, old[jnp.minimum(rows, num_offline - 1)])

    return jax.tree.map(pick, offline, new)


def sample(key: jax.Array, replay: Replay, batch_size: int) -> Transitions:
    """A minibatch `[batch_size, ...]`, uniform with replacement over all rows of the offline data and the ring."""
    return take(replay, sample_rows(key, replay, batch_size))


class Part(NamedTuple):
    """The offline data or a member's ring as a whole, `[rows, ...]`.

    From row `start` on, round the end, the rows are time-ordered: those not yet written first, the newest one last.
    """

    data: Transitions
    start: jax.Array | int
    written: jax.Array | int
    """How many rows there ever were, those that are overwritten too."""
    online: bool


def parts(replay: Replay) -> list[Part]:
    """Offline data and ring, whichever are there, in the order of the row numbers."""
    offline, ring, member, _ = replay
    found = [] if offline is None else [Part(offline, 0, len(offline.rewards), online=False)]
    if ring is not None:
        own = ring if member is None else jax.tree.map(lambda x: x[member], ring)
        found.append(Part(own.data, own.position, own.written, online=True))
    return found


def map_blocks(function: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array, size: int) -> jax.Array:
    """`function(block [size, ...], start)` of one block of rows after the other; its results `[len(rows), ...]`.

    Where `size` does not divide the rows, the last block begins earlier and its results replace the first ones.
    """
    count, size = len(rows), min(size, len(rows))

    def fill(results: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        block = function(jax.lax.dynamic_slice_in_dim(rows, start, size), start)
        return jax.lax.dynamic_update_slice_in_dim(results, block, start, axis=0), None

    one = jax.eval_shape(function, rows[:size], jnp.zeros((), jnp.int32))
    starts = jnp.minimum(jnp.arange(0, count, size), count - size)
    return jax.lax.scan(fill, jnp.zeros((count, *one.shape[1:]), one.dtype), starts)[0]
