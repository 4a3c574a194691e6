"""Gradient steps whose learning rate is a traced scalar, so that members of a population may differ in it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def descend(
    optimizer: optax.GradientTransformation,
    params: Any,
    grads: Any,
    opt_state: optax.OptState,
    learning_rate: jax.Array | float,
) -> tuple[Any, optax.OptState]:
    """One step of `optimizer` (without a rate of its own, e.g. `optax.scale_by_adam()`), at `learning_rate`."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state


def cosine_decay(step: jax.Array, horizon: int) -> jax.Array:
    """Factor from 1 at step 0 to 0 at `horizon`, and 0 after it; constantly 1 for a horizon of 0."""
    if horizon == 0:
        return jnp.ones(())
    return 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / horizon, 1.0)))
