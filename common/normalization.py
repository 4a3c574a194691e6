"""Running mean and standard deviation of the states that one member has seen, as part of its state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common import buffers
from common.buffers import Replay


class Normalizer(NamedTuple):
    """Mean and sum of squared deviations, `[obs_dim]` each, of `count` states; how many rows of each data they are."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    seen_offline: jax.Array
    seen_online: jax.Array


def empty(obs_dim: int) -> Normalizer:
    """A normaliser that has seen nothing and changes nothing."""
    none = jnp.zeros((), jnp.int32)
    return Normalizer(jnp.zeros(()), jnp.zeros(obs_dim), jnp.zeros(obs_dim), none, none)


def observe(normalizer: Normalizer, data: Replay, limit: int) -> Normalizer:
    """The normaliser with the states that came since it was last called, until it has `limit` of them."""

    def add(normalizer: Normalizer) -> Normalizer:
        for rows, start, written, online in buffers.parts(data):
            age = (start - 1 - jnp.arange(len(rows.rewards))) % len(rows.rewards)
            seen = normalizer.seen_online if online else normalizer.seen_offline
            new = (age < written - seen)[:, None].astype(jnp.float32)
            count = jnp.minimum(written - seen, len(rows.rewards)).astype(jnp.float32)
            total = normalizer.count + count
            mean = jnp.sum(new * rows.observations, axis=0) / jnp.maximum(count, 1.0)
            squares = jnp.sum(new * (rows.observations - mean) ** 2, axis=0)
            change, share = mean - normalizer.mean, count / jnp.maximum(total, 1.0)
            normalizer = Normalizer(
                count=total,
                mean=normalizer.mean + change * share,
                squares=normalizer.squares + squares + change**2 * normalizer.count * share,
                seen_offline=normalizer.seen_offline if online else jnp.asarray(written, jnp.int32),
                seen_online=jnp.asarray(written, jnp.int32) if online else normalizer.seen_online,
            )
        return normalizer

    return jax.lax.cond(normalizer.count < limit, add, lambda same: same, normalizer)


def normalize(normalizer: Normalizer, observations: jax.Array) -> jax.Array:
    """States in standard deviations, at least 0.01, from the mean; as they are, before any was seen."""
    std = jnp.sqrt(normalizer.squares / jnp.maximum(normalizer.count, 1.0))
    return (observations - normalizer.mean) / jnp.where(normalizer.count > 0, jnp.maximum(std, 0.01), 1.0)
