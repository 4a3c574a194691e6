import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import networks


@pytest.mark.parametrize("shape", [(17, 64), (64, 6), (64, 64), (5, 1)])
def test_orthogonal_is_that_of_flax(shape):
    ours = networks.orthogonal(jax.random.key(3), shape)
    theirs = nn.initializers.orthogonal(math.sqrt(2.0))(jax.random.key(3), shape)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_orthogonal_has_orthonormal_columns_times_the_gain_under_vmap():
    kernels = jax.jit(jax.vmap(lambda key: networks.orthogonal(key, (256, 256))))(
        jax.random.split(jax.random.key(0), 2)
    )
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01
    for kernel in kernels:
        np.testing.assert_allclose(kernel.T @ kernel, 2.0 * np.eye(256), atol=1e-5)
