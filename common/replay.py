"""Transitions: their transforms, the offline arrays that a population shares, and a ring of online ones per member."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.cli import RunArgs, UsageError


class Transitions(NamedTuple):
    """Flat transitions, leading axis N. A termination masks the bootstrap, a truncation does not.

    `observations, next_observations [N, obs_dim]`, `actions [N, action_dim]` in [-1, 1] (AWR collects any), `rewards,
    terminations, truncations [N]`; all float32, flags 0 or 1. Rows are time-ordered and episodes are contiguous.
    """

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array
    next_observations: jax.Array
    terminations: jax.Array
    truncations: jax.Array

    def at(self, rows: jax.Array) -> "Transitions":
        return Transitions(*(x[rows] for x in self))


class Recorded(NamedTuple):
    """The transitions of a dataset with each state stored once, in half the memory.

    `states [N + E, obs_dim]`: those of the N rows, then the E next states that are not the state of the following row;
    `successors [N]`, int32: where each row's next state is. The rest is as in `Transitions`.
    """

    states: jax.Array
    actions: jax.Array
    rewards: jax.Array
    successors: jax.Array
    terminations: jax.Array
    truncations: jax.Array

    @property
    def observations(self) -> jax.Array:
        return self.states[: len(self.rewards)]

    @property
    def next_observations(self) -> jax.Array:  # a copy
        return self.states[self.successors]

    def at(self, rows: jax.Array) -> Transitions:
        return Transitions(*(x[rows] for x in self))._replace(next_observations=self.states[self.successors[rows]])


def record(transitions: Transitions) -> Recorded:
    """`transitions` of numpy arrays, each state once."""
    observations, following, size = transitions.observations, transitions.next_observations, len(transitions.rewards)
    differs = np.ones(size, bool)
    differs[:-1] = (observations[1:] != following[:-1]).any(axis=1)
    successors = np.arange(1, size + 1, dtype=np.int32)
    successors[differs] = size + np.arange(differs.sum())
    states = np.concatenate([observations, following[differs]])
    return Recorded(states, transitions.actions, transitions.rewards, successors, *transitions[4:])


def episode_returns(transitions: Transitions | Recorded) -> np.ndarray:
    """Undiscounted return of each episode, float64 `[episodes]`; one ends at either flag, or where the data ends."""
    starts = np.flatnonzero(np.append(True, np.logical_or(transitions.terminations, transitions.truncations))[:-1])
    return np.add.reduceat(np.asarray(transitions.rewards, np.float64), starts)


class Transform(NamedTuple):
    """observations -> (observations - mean) / std, `[obs_dim]` each; rewards -> scale * rewards + shift; in float32."""

    observation_mean: np.ndarray
    observation_std: np.ndarray
    reward_scale: float
    reward_shift: float

    def observations(self, observations: np.ndarray) -> np.ndarray:  # not copied where there is nothing to do
        if not self.observation_mean.any() and (self.observation_std == 1.0).all():
            return np.asarray(observations, np.float32)
        return ((observations - self.observation_mean) / self.observation_std).astype(np.float32)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return (self.reward_scale * np.asarray(rewards) + self.reward_shift).astype(np.float32)

    def transitions(self, data: Recorded) -> Recorded:
        return data._replace(states=self.observations(data.states), rewards=self.rewards(data.rewards))


def fit_transform(transitions: Recorded, args: RunArgs) -> Transform:
    """Constants from the dataset, for evaluation and the online phase too; without rows, nothing is normalised.

    Observations by their mean and their standard deviation + 1e-3 (TD3+BC, section 5); rewards are multiplied by
    1000 / (largest - smallest episode return) (IQL's code). UsageError where all returns are the same.
    """
    obs_dim, scale = transitions.observations.shape[-1], args.reward_scale
    if not len(transitions.rewards) and (args.normalize_observations or args.normalize_returns):
        print("no data are read, so neither observations nor rewards are normalised", file=sys.stderr)
    mean, std = np.zeros(obs_dim, np.float32), np.ones(obs_dim, np.float32)
    if args.normalize_observations and len(transitions.rewards):
        mean = transitions.observations.mean(axis=0, dtype=np.float64).astype(np.float32)
        std = transitions.observations.std(axis=0, dtype=np.float64).astype(np.float32) + np.float32(1e-3)
    if args.normalize_returns and len(transitions.rewards):
        if (spread := float(np.ptp(episode_returns(transitions)))) <= 0.0:
            raise UsageError("every episode of the dataset has the same return; pass --normalize-returns False")
        scale *= (factor := 1000.0 / spread)
        if factor > 1.0:
            print(f"--normalize-returns enlarges rewards by {factor:.3g}: it is meant to shrink them", file=sys.stderr)
    return Transform(mean, std, scale, args.reward_shift)


class Ring(NamedTuple):
    """The newest online transitions of one member; the i-th of all `written` so far is in row i % capacity."""

    data: Transitions
    written: jax.Array

    @property
    def capacity(self) -> int:
        return self.data.rewards.shape[-1]


def empty_ring(capacity: int, obs_dim: int, action_dim: int) -> Ring:
    """A ring of `capacity` zero rows, none written; of numpy arrays without memory of their own."""
    shapes = ((obs_dim,), (action_dim,), (), (obs_dim,), (), ())
    return Ring(Transitions(*(np.broadcast_to(np.float32(0), (capacity, *x)) for x in shapes)), np.zeros((), np.int32))


def insert(ring: Ring, transitions: Transitions) -> Ring:
    """Write the transitions, at most `capacity` rows, after the newest ones; the oldest are overwritten."""
    rows = len(transitions.rewards)
    assert rows <= ring.capacity, f"{rows} rows do not fit a ring of {ring.capacity}"
    places = (ring.written + jnp.arange(rows)) % ring.capacity
    data = jax.tree.map(lambda old, new: jnp.asarray(old).at[places].set(new), ring.data, transitions)
    return Ring(data, ring.written + rows)


class Replay(NamedTuple):
    """What minibatches are drawn from: the shared offline rows, a member's online ring, or their union.

    If `member` is given, `ring` is that of several members, `[members, capacity, ...]`, and single rows of this member
    are gathered from it, because slicing out the member's whole ring would copy it.
    """

    offline: Recorded | None
    ring: Ring | None = None
    member: jax.Array | None = None
    extra: Any = None  # likewise [members, rows, ...]: what an algorithm keeps for each offline row


def sample_rows(key: jax.Array, replay: Replay, batch_size: int) -> jax.Array:
    """Row numbers `[batch_size]`, uniform with replacement over all rows of the offline data and the ring.

    Offline rows come first; those of the ring follow in the order in which it stores them.
    """
    offline, ring, member, _ = replay
    num_rows = 0 if offline is None else len(offline.rewards)
    assert num_rows or ring is not None, "nothing to sample from"
    if ring is not None:  # its later rows are not yet written
        num_rows += jnp.minimum(ring.written if member is None else ring.written[member], ring.capacity)
    return jax.random.randint(key, (batch_size,), 0, num_rows)


def take(replay: Replay, rows: jax.Array) -> Transitions:
    """The transitions `[len(rows), ...]` of row numbers that `sample_rows` drew."""
    offline, ring, member, _ = replay
    if ring is None:
        return offline.at(rows)
    num_offline = 0 if offline is None else len(offline.rewards)
    from_ring, ring_rows = rows >= num_offline, jnp.maximum(rows - num_offline, 0)
    new = jax.tree.map(lambda x: x[ring_rows] if member is None else x[member, ring_rows], ring.data)
    if offline is None:
        return new
    old = offline.at(jnp.minimum(rows, num_offline - 1))
    return jax.tree.map(lambda x, y: jax.vmap(jnp.where)(from_ring, x, y), new, old)


def sample(key: jax.Array, replay: Replay, batch_size: int) -> Transitions:
    """A minibatch `[batch_size, ...]`, uniform with replacement over all rows of the offline data and the ring."""
    return take(replay, sample_rows(key, replay, batch_size))
