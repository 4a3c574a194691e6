"""Densities against scipy, ensembles against their members alone, initial kernels against flax."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common import networks


def test_gaussian_log_prob_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, mean, log_std = rng.standard_normal((3, 7, 4))
    expected = stats.norm(mean, np.exp(log_std)).logpdf(x).sum(axis=-1)
    np.testing.assert_allclose(networks.gaussian_log_prob(x, mean, log_std), expected, rtol=1e-4)


def test_ensemble_members_are_independent_networks() -> None:
    """Each row of the ensemble equals an MLP run alone with that row's parameters, whatever the batch's axes."""
    ensemble = networks.QEnsemble(3, 16, 2)
    observations, actions = jax.random.normal(jax.random.key(1), (5, 4)), jnp.ones((5, 2))
    params = jax.jit(ensemble.init)(jax.random.key(0), observations, actions)
    apply, alone = jax.jit(ensemble.apply), jax.jit(networks.MLP(16, 2, 1).apply)
    q = apply(params, observations, actions)
    for k in range(3):
        own = jax.tree.map(lambda x, k=k: np.asarray(x)[k], params["params"]["VmapMLP_0"])
        out = alone({"params": own}, np.concatenate([observations, actions], axis=-1))
        np.testing.assert_allclose(q[k], out[:, 0], rtol=1e-5, atol=1e-6)
    more = apply(params, *(np.asarray(x)[None].repeat(2, 0) for x in (observations, actions)))
    assert more.shape == (3, 2, 5)
    np.testing.assert_allclose(more[:, 1], q, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(q[0] - q[1]).max()) > 1e-3


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_layer_is_linear_then_normalised_then_relu(layer_norm: bool) -> None:
    rng = np.random.default_rng(2)
    mlp, x = networks.MLP(16, 2, 3, layer_norm=layer_norm), rng.standard_normal((5, 4), np.float32)
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), x)
    params = jax.tree.map(lambda like: rng.standard_normal(like.shape, np.float32), shapes)
    own, hidden = params["params"], x
    for i in range(2):
        hidden = hidden @ own[f"Dense_{i}"]["kernel"] + own[f"Dense_{i}"]["bias"]
        if layer_norm:
            hidden = (hidden - hidden.mean(axis=1, keepdims=True)) / hidden.std(axis=1, keepdims=True)
            hidden = hidden * own[f"LayerNorm_{i}"]["scale"] + own[f"LayerNorm_{i}"]["bias"]
        hidden = np.maximum(hidden, 0)
    expected = hidden @ own["Dense_2"]["kernel"] + own["Dense_2"]["bias"]
    np.testing.assert_allclose(jax.jit(mlp.apply)(params, x), expected, rtol=1e-4, atol=1e-4)


def test_many_actions_for_each_state_equal_one_by_one() -> None:
    rng = np.random.default_rng(3)
    observations, actions = rng.normal(size=(5, 4)), rng.normal(size=(7, 5, 2))
    critic = networks.QEnsemble(3, 16, 2)
    params, apply = jax.jit(critic.init)(jax.random.key(0), observations, actions[0]), jax.jit(critic.apply)
    together = apply(params, observations, actions)
    assert together.shape == (3, 7, 5)
    for n in range(7):
        np.testing.assert_allclose(together[:, n], apply(params, observations, actions[n]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(17, 64), (64, 6), *(pytest.param(x, marks=pytest.mark.slow) for x in ((64, 64), (5, 1)))]
)
def test_orthogonal_is_that_of_flax(shape: tuple[int, int]) -> None:
    ours = networks.orthogonal(jax.random.key(3), shape)
    theirs = nn.initializers.orthogonal(math.sqrt(2.0))(jax.random.key(3), shape)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    small = networks.orthogonal(jax.random.key(3), shape, gain=0.01)
    np.testing.assert_allclose(small, nn.initializers.orthogonal(0.01)(jax.random.key(3), shape), atol=2e-7)


def test_the_last_layer_alone_has_an_initializer_of_its_own() -> None:
    zeros, x = nn.initializers.zeros, jnp.ones((1, 4))
    mlp = networks.MLP(8, 1, 2, last_init=zeros).init(jax.random.key(0), x)["params"]
    ensemble = networks.QEnsemble(2, 8, 1, last_init=zeros).init(jax.random.key(0), x, x)["params"]["VmapMLP_0"]
    for layers in (mlp, ensemble):
        assert np.any(layers["Dense_0"]["kernel"]) and not np.any(layers["Dense_1"]["kernel"])


def test_orthogonal_has_orthonormal_columns_times_the_gain_under_vmap() -> None:
    kernels = jax.jit(jax.vmap(lambda key: networks.orthogonal(key, (256, 256))))(
        jax.random.split(jax.random.key(0), 2)
    )
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01
    for kernel in kernels:
        np.testing.assert_allclose(kernel.T @ kernel, 2.0 * np.eye(256), atol=1e-5)
