"""Normalisations. Statistics in float32 or wider, result in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.layers import recomputed, wide
from efficient_lm.registry import Registry

NORMS = Registry("norm")


def _unit_rms(y, eps):
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)


@NORMS.register("srmsnorm")
class SimpleRMSNorm(nnx.Module):
    """x / sqrt(mean x^2 + eps) over the last axis, without weights (2307.14995)."""

    def __init__(self, make, width: int, eps: float = 1e-6):
        self.eps = eps

    @staticmethod
    def param_count(width: int) -> int:
        return 0

    def __call__(self, x):
        return recomputed(lambda x: _unit_rms(wide(x), self.eps).astype(x.dtype))(x)


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
        return recomputed(lambda x, scale: (_unit_rms(wide(x), self.eps) * scale).astype(x.dtype))(x, self.scale[...])


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
        @recomputed
        def normed(x, scale, bias):
            y = wide(x)
            y = _unit_rms(y - jnp.mean(y, axis=-1, keepdims=True), self.eps)
            return (y * scale + bias).astype(x.dtype)

        return normed(x, self.scale[...], self.bias[...])
