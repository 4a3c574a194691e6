"""Network parts shared by the algorithms: MLP, vmapped ensemble, Gaussian density, gradient steps.

Shapes are written `[batch, dim]`. Every module takes leading axes as they come, so the same parameters
act on `[dim]`, `[batch, dim]` or `[samples, batch, dim]`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@partial(jax.jit, static_argnames=("shape", "dtype", "gain"))  # traced once for each shape
def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32, gain: float = 2**0.5) -> jax.Array:
    """Orthonormal columns (rows, where they are fewer) times `gain`, as the official IQL and jaxrl start every layer.

    Equal to flax's `orthogonal` up to rounding. By Gram-Schmidt, each column projected twice for accuracy. Not by JAX's
    QR: on a CPU its LAPACK calls wait in the thread pool that they need; one on each core at once hangs the process.
    """
    rows, columns = max(shape), min(shape)
    random = jax.random.normal(key, (rows, columns), dtype)

    def orthonormalise(i: jax.Array, q: jax.Array) -> jax.Array:
        column = random[:, i]  # columns of q from i on are still zero
        for _ in range(2):
            column = column - q @ (q.T @ column)
        return q.at[:, i].set(column / jnp.linalg.norm(column))

    q = jax.lax.fori_loop(0, columns, orthonormalise, jnp.zeros_like(random))
    return gain * (q if shape[0] >= shape[1] else q.T)


# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for nn.Linear, hence that of TD3+BC, CORL and CleanRL.
uniform_fan_in = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
# U(-sqrt(6 / (fan_in + fan_out)), ...): the default of TensorFlow's layers, hence that of AWR's and BRAC's authors.
glorot = nn.initializers.glorot_uniform()


class MLP(nn.Module):
    """`num_layers` hidden ReLU layers of width `hidden_dim`, then a linear layer to `output_dim`.

    Layer normalisation precedes each activation, dropout follows it and needs a "dropout" rng when `training`.
    """

    hidden_dim: int
    num_layers: int
    output_dim: int
    kernel_init: nn.initializers.Initializer = orthogonal
    layer_norm: bool = False
    last_init: nn.initializers.Initializer | None = None  # of the linear layer, where it is not kernel_init
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        for _ in range(self.num_layers):
            x = nn.Dense(self.hidden_dim, kernel_init=self.kernel_init)(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = nn.relu(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not training)(x)
        return nn.Dense(self.output_dim, kernel_init=self.last_init or self.kernel_init)(x)


class QEnsemble(nn.Module):
    """K independent Q-functions, vmapped over a leading parameter axis.

    `(observations [batch, obs_dim], actions [batch, action_dim]) -> [K, batch]`, and with n actions for each state
    `(observations [batch, obs_dim], actions [n, batch, action_dim]) -> [K, n, batch]`.
    """

    num_critics: int
    hidden_dim: int
    num_layers: int
    kernel_init: nn.initializers.Initializer = orthogonal
    layer_norm: bool = False
    last_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        ensemble = nn.vmap(MLP, **axes, axis_size=self.num_critics)
        q = ensemble(self.hidden_dim, self.num_layers, 1, self.kernel_init, self.layer_norm, last_init=self.last_init)
        # States are repeated, in the rows of one matrix. Sharing their part of the first layer between the n actions
        # is slower on a CPU, CQL's updates by a quarter: its gradient is a sum over n in large strides.
        *leading, action_dim = actions.shape
        observations = jnp.broadcast_to(observations, (*leading, observations.shape[-1]))
        rows = jnp.concatenate([observations, actions], axis=-1).reshape(-1, observations.shape[-1] + action_dim)
        return q(rows).reshape(self.num_critics, *leading)


def gaussian_log_prob(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density of a diagonal Gaussian, summed over the last axis: `[..., action_dim] -> [...]`."""
    z = (x - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * z**2 - log_std - 0.5 * jnp.log(2.0 * jnp.pi), axis=-1)


def descend(
    optimizer: optax.GradientTransformation, params: Any, grads: Any, opt_state: Any, learning_rate: jax.Array | float
) -> tuple[Any, optax.OptState]:
    """One step down by `optimizer`, which has no rate and no sign of its own (`optax.scale_by_adam()`)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state
