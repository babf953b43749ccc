"""Normalisations. Statistics in float32 or wider, result in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.layers import wide
from efficient_lm.registry import Registry

NORMS = Registry("norm")


@NORMS.register("srmsnorm")
class SimpleRMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) over the last axis, without weights (2307.14995)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps

    @staticmethod
    def param_count(width: int) -> int:
        return 0

    def __call__(self, x):
        y = wide(x)
        return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)).astype(x.dtype)


@NORMS.register("rmsnorm")
class RMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) * w over the last axis (1910.07467)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = make.vector(jnp.ones(width))

    @staticmethod
    def param_count(width: int) -> int:
        return width

    def __call__(self, x):
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


@NORMS.register("layernorm")
class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis (1607.06450)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = make.vector(jnp.ones(width))
        self.bias = make.vector(jnp.zeros(width))

    @staticmethod
    def param_count(width: int) -> int:
        return 2 * width

    def __call__(self, x):
        y = wide(x)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
