"""Network parts shared by the algorithms: MLP, vmapped ensemble, Gaussian policy heads, behaviour models.

Shapes are written `[batch, dim]`. Every module takes unbatched leading axes as they come, so the same parameters
act on `[dim]`, `[batch, dim]` or `[samples, batch, dim]`.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Orthonormal columns (rows, where they are fewer) times sqrt(2), as the official IQL and jaxrl start every layer.

    The matrices are those of flax's `orthogonal`, up to rounding: Gram-Schmidt, done twice for accuracy, gives the
    factor Q of the QR decomposition with a positive diagonal of R. JAX's own decomposition is avoided because on a CPU
    its LAPACK calls wait inside the thread pool they need: as many at once as there are cores hang the process.
    """
    rows, columns = max(shape), min(shape)
    random = jax.random.normal(key, (rows, columns), dtype)

    def orthonormalise(i: jax.Array, q: jax.Array) -> jax.Array:
        column = random[:, i]  # columns of q from i on are still zero
        for _ in range(2):
            column = column - q @ (q.T @ column)
        return q.at[:, i].set(column / jnp.linalg.norm(column))

    q = jax.lax.fori_loop(0, columns, orthonormalise, jnp.zeros_like(random))
    return math.sqrt(2.0) * (q if shape[0] >= shape[1] else q.T)


# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for nn.Linear, so that of TD3+BC, CORL and CleanRL.
uniform_fan_in = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")

# U(-sqrt(6 / (fan_in + fan_out)), ...): the default of TensorFlow's layers, so that of the authors of AWR and EMaQ.
glorot = nn.initializers.glorot_uniform()


class MLP(nn.Module):
    """`num_layers` hidden ReLU layers of width `hidden_dim`, then a linear layer to `output_dim`.

    Dropout follows each hidden activation and needs a "dropout" rng when `training` and `dropout_rate > 0`.
    """

    hidden_dim: int
    num_layers: int
    output_dim: int
    kernel_init: Initializer = orthogonal
    layer_norm: bool = False
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        for _ in range(self.num_layers):
            x = nn.Dense(self.hidden_dim, kernel_init=self.kernel_init)(x)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
            x = nn.relu(x)
            if self.dropout_rate > 0.0:
                x = nn.Dropout(self.dropout_rate, deterministic=not training)(x)
        return nn.Dense(self.output_dim, kernel_init=self.kernel_init)(x)


class QEnsemble(nn.Module):
    """K independent Q-functions, vmapped over a leading parameter axis.

    `(observations [batch, obs_dim], actions [batch, action_dim]) -> [K, batch]`, and with n actions for each state
    `(observations [batch, obs_dim], actions [n, batch, action_dim]) -> [K, n, batch]`.
    """

    num_critics: int
    hidden_dim: int
    num_layers: int
    kernel_init: Initializer = orthogonal
    layer_norm: bool = False

    @nn.compact
    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        members = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.num_critics,
        )
        q = members(self.hidden_dim, self.num_layers, 1, self.kernel_init, layer_norm=self.layer_norm)
        # States are repeated, in the rows of one matrix. Sharing their part of the first layer between the n actions
        # is slower on a CPU, CQL's updates by a quarter: its gradient is a sum over n in large strides.
        *leading, action_dim = actions.shape
        observations = jnp.broadcast_to(observations, (*leading, observations.shape[-1]))
        rows = jnp.concatenate([observations, actions], axis=-1).reshape(-1, observations.shape[-1] + action_dim)
        return q(rows).reshape(self.num_critics, *leading)


class GaussianHead(nn.Module):
    """MLP to the mean and a state-dependent log standard deviation, each `[batch, action_dim]`.

    The log standard deviation is clipped to `[log_std_min, log_std_max]`. Whether the Gaussian is squashed by tanh
    is decided by the functions below that take its output.
    """

    action_dim: int
    hidden_dim: int
    num_layers: int
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    kernel_init: Initializer = orthogonal

    @nn.compact
    def __call__(self, observations: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = MLP(self.hidden_dim, self.num_layers, 2 * self.action_dim, self.kernel_init)(observations)
        mean, log_std = jnp.split(outputs, 2, axis=-1)
        return mean, jnp.clip(log_std, self.log_std_min, self.log_std_max)


def gaussian_log_prob(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density of a diagonal Gaussian, summed over the last axis: `[..., action_dim] -> [...]`."""
    z = (x - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * z**2 - log_std - 0.5 * jnp.log(2.0 * jnp.pi), axis=-1)


def squashed_sample(key: jax.Array, mean: jax.Array, log_std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reparameterised sample of tanh(N(mean, std)) and its log-density, `[..., action_dim]` and `[...]`.

    The density is computed from the value before the squashing, so it stays finite where tanh saturates:
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)).
    """
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)
    log_det = jnp.sum(2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u)), axis=-1)
    return jnp.tanh(u), gaussian_log_prob(u, mean, log_std) - log_det


class SplitDense(nn.Module):
    """A dense layer on features of states and of n actions for each, side by side; the state's part is computed once.

    `(states [batch, s], actions [n, batch, a]) -> [n, batch, features]`.
    """

    features: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, states: jax.Array, actions: jax.Array) -> jax.Array:
        split = states.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (split + actions.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (states @ kernel[:split] + bias) + actions @ kernel[split:]


class BinHead(nn.Module):
    """Logits `[n, batch, num_bins]` of one action dimension, from states' embeddings and the dimensions before it.

    `(embedding [batch, dim], prefix [n, batch, i])`; with `prefix_dim` the prefix goes through a linear map first.
    """

    num_bins: int
    hidden_dim: int
    num_layers: int
    prefix_dim: int

    @nn.compact
    def __call__(self, embedding: jax.Array, prefix: jax.Array) -> jax.Array:
        if self.prefix_dim and prefix.shape[-1]:
            prefix = nn.Dense(self.prefix_dim, kernel_init=glorot)(prefix)
        x = nn.relu(SplitDense(self.hidden_dim, glorot)(embedding, prefix))
        for _ in range(self.num_layers - 1):
            x = nn.relu(nn.Dense(self.hidden_dim, kernel_init=glorot)(x))
        return nn.Dense(self.num_bins, kernel_init=glorot)(x)


class AutoregressivePolicy(nn.Module):
    """Density of actions in [-1, 1], one dimension after the other, each uniform within one of `num_bins` equal bins.

    p(a|s) = prod_i p(bin of a_i | s, a_0, ..., a_i-1) / width of a bin, each factor the softmax of an MLP of its own on
    the state's embedding and the continuous values before it (Ghasemipour et al., 2021, appendix B). It can represent
    several modes and dependence between dimensions.
    """

    action_dim: int
    num_bins: int
    hidden_dim: int
    """Width of the state's embedding and of its `num_layers` hidden layers."""
    num_layers: int
    head_dim: int
    head_layers: int
    prefix_dim: int = 0

    def setup(self) -> None:
        """The embedding, and a head for each dimension."""
        self.embed = MLP(self.hidden_dim, self.num_layers, self.hidden_dim, glorot)
        sizes = (self.num_bins, self.head_dim, self.head_layers, self.prefix_dim)
        self.heads = [BinHead(*sizes) for _ in range(self.action_dim)]

    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        """Log-density `[batch]` of `actions [batch, action_dim]`, those beyond [-1, 1] taken as on its edge."""
        embedding, prefixes = self.embed(observations), actions[None]
        bins = self.bins_of(actions)
        total = jnp.zeros(len(actions))
        for i, head in enumerate(self.heads):
            log_probs = jax.nn.log_softmax(head(embedding, prefixes[..., :i])[0])
            total += jnp.take_along_axis(log_probs, bins[:, i : i + 1], axis=-1)[:, 0]
        return total + self.action_dim * jnp.log(self.num_bins / 2.0)

    def sample(
        self, observations: jax.Array, key: jax.Array, num_samples: int, temperature: jax.Array | float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """Actions and their bins, `[num_samples, batch, action_dim]` each; logits are divided by the temperature."""
        embedding = self.embed(observations)
        actions = jnp.zeros((num_samples, len(observations), 0))
        bins = []
        for i, head in enumerate(self.heads):
            bin_key, place_key = jax.random.split(jax.random.fold_in(key, i))
            probs = jax.nn.softmax(head(embedding, actions) / temperature)  # of the first [1, ...]: it has no prefix
            # By the distribution function: a random number for each sample, where jax.random.categorical takes one for
            # each bin. XLA is slow at cumsum on a CPU.
            below = jax.lax.associative_scan(jnp.add, probs, axis=-1)
            place = jax.random.uniform(bin_key, (num_samples, len(observations), 1)) * below[..., -1:]
            bins.append(jnp.sum(below[..., :-1] <= place, axis=-1))
            actions = jnp.concatenate([actions, self.within(bins[-1], place_key)[..., None]], axis=-1)
        return actions, jnp.stack(bins, axis=-1)

    def bins_of(self, actions: jax.Array) -> jax.Array:
        """The bin, from 0 on, of each number."""
        return jnp.clip(jnp.floor((actions + 1.0) / 2.0 * self.num_bins), 0, self.num_bins - 1).astype(jnp.int32)

    def within(self, bins: jax.Array, key: jax.Array) -> jax.Array:
        """A number for each bin, uniform within it."""
        return (bins + jax.random.uniform(key, bins.shape)) * (2.0 / self.num_bins) - 1.0


class VAEPolicy(nn.Module):
    """Variational autoencoder of actions given states, as Wu et al. (2019) have it (BRAC's code).

    A Gaussian latent of twice the actions' dimensions; the decoder's Gaussian has mean tanh(v) and unit variance.
    """

    action_dim: int
    hidden_dim: int
    num_layers: int

    def setup(self) -> None:
        """Encoder to mean and log standard deviation of the latent, and decoder."""
        self.encoder = MLP(self.hidden_dim, self.num_layers, 4 * self.action_dim, glorot)
        self.decoder = MLP(self.hidden_dim, self.num_layers, self.action_dim, glorot)

    def __call__(self, observations: jax.Array, actions: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Squared error of the reconstruction and KL divergence of the latent from the prior, `[batch]` each."""
        mean, log_std = jnp.split(self.encoder(jnp.concatenate([observations, actions], axis=-1)), 2, axis=-1)
        log_std = jnp.clip(log_std, -5.0, 5.0)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        error = jnp.sum((self.decode(observations, latent) - actions) ** 2, axis=-1)
        return error, 0.5 * jnp.sum(mean**2 + jnp.exp(2.0 * log_std) - 1.0 - 2.0 * log_std, axis=-1)

    def decode(self, observations: jax.Array, latent: jax.Array) -> jax.Array:
        """The decoder's mean action."""
        return jnp.tanh(self.decoder(jnp.concatenate([observations, latent], axis=-1)))

    def sample(self, observations: jax.Array, key: jax.Array, num_samples: int) -> jax.Array:
        """Actions `[num_samples, batch, action_dim]`: mean actions of latents clipped to [-0.5, 0.5]."""
        latent = jax.random.normal(key, (num_samples, len(observations), 2 * self.action_dim))
        states = jnp.broadcast_to(observations, (num_samples, *observations.shape))
        return self.decode(states, jnp.clip(latent, -0.5, 0.5))
