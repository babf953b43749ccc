"""Normalisations. Statistics in float32, result in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.registry import Registry

NORMS = Registry("norm")


@NORMS.register("rmsnorm")
class RMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) * w over the last axis (1910.07467)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = make.vector(jnp.ones(width))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


@NORMS.register("layernorm")
class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis (1607.06450)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = make.vector(jnp.ones(width))
        self.bias = make.vector(jnp.zeros(width))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...] + self.bias[...]).astype(x.dtype)
