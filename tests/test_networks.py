"""Densities of the policy heads against numerical integration and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from common import networks


def test_gaussian_log_prob_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, mean, log_std = rng.standard_normal((3, 7, 4))
    expected = stats.norm(mean, np.exp(log_std)).logpdf(x).sum(axis=-1)
    np.testing.assert_allclose(networks.gaussian_log_prob(x, mean, log_std), expected, rtol=1e-4)


def test_squashed_density_integrates_to_one() -> None:
    """The density at tanh(u), by change of variables from u, integrates to one over (-1, 1)."""
    mean, log_std = jnp.array([0.4]), jnp.array([-0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    actions, log_prob = jax.vmap(lambda key: networks.squashed_sample(key, mean, log_std))(keys)
    order = np.argsort(np.asarray(actions)[:, 0])
    a, density = np.asarray(actions)[order, 0], np.exp(np.asarray(log_prob))[order]
    assert np.abs(a).max() < 1.0
    assert abs(np.trapezoid(density, a) - 1.0) < 0.02
    expected = stats.norm(0.4, np.exp(-0.3)).pdf(np.arctanh(a)) / (1 - a**2)
    inner = np.abs(a) < 0.99  # arctanh in float32 is coarse beyond
    np.testing.assert_allclose(density[inner], expected[inner], rtol=1e-3)


def test_squashed_density_stays_finite_where_tanh_saturates() -> None:
    actions, log_prob = networks.squashed_sample(jax.random.key(0), jnp.full((3,), 40.0), jnp.zeros(3))
    assert np.isfinite(log_prob) and np.abs(actions).max() <= 1.0


def test_ensemble_members_are_independent_networks() -> None:
    """Each row of the ensemble equals an MLP run alone with that row's parameters, whatever the batch's axes."""
    ensemble = networks.QEnsemble(3, 16, 2)
    observations, actions = jax.random.normal(jax.random.key(1), (5, 4)), jnp.ones((5, 2))
    params = ensemble.init(jax.random.key(0), observations, actions)
    q = ensemble.apply(params, observations, actions)
    for k in range(3):
        alone = jax.tree.map(lambda x, k=k: x[k], params["params"]["VmapMLP_0"])
        out = networks.MLP(16, 2, 1).apply({"params": alone}, jnp.concatenate([observations, actions], axis=-1))
        np.testing.assert_allclose(q[k], out[:, 0], rtol=1e-5, atol=1e-6)
    more = ensemble.apply(params, observations[None].repeat(2, 0), actions[None].repeat(2, 0))
    assert more.shape == (3, 2, 5)
    np.testing.assert_allclose(more[:, 1], q, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(q[0] - q[1]).max()) > 1e-3


def test_many_actions_for_each_state_equal_one_by_one() -> None:
    rng = np.random.default_rng(3)
    observations, actions = rng.normal(size=(5, 4)), rng.normal(size=(7, 5, 2))
    critic = networks.QEnsemble(3, 16, 2)
    params = critic.init(jax.random.key(0), observations, actions[0])
    together = critic.apply(params, observations, actions)
    assert together.shape == (3, 7, 5)
    for n in range(7):
        np.testing.assert_allclose(together[:, n], critic.apply(params, observations, actions[n]), rtol=1e-4, atol=1e-6)
