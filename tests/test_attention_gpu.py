"""cuDNN attention on a GPU (run there with JAX_PLATFORMS=cuda): the values and gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("window", (None, 100))
@pytest.mark.parametrize("documents", (False, True))
@pytest.mark.parametrize("kv_heads", (8, 2))
def test_cudnn_equals_plain(window, documents, kv_heads):
    batch, length, heads, width = 2, 512, 8, 64
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(batch, length, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, cotangent = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=False))
    segments = 1 + jnp.cumsum(jax.random.bernoulli(keys[4], 4 / length, (batch, length)), axis=1) if documents else None

    def grads(implementation):
        def loss(q, k, v):
            out = api.attention(q, k, v, window=window, segment_ids=segments, implementation=implementation)
            return jnp.sum((out * cotangent).astype(jnp.float32)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    got, want = (jax.tree.leaves(grads(name)) for name in ("cudnn", "xla"))
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
