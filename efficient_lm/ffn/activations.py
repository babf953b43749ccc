"""Activations: modules y = act(x), learnable scalars where the definition has them."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.layers import wide
from efficient_lm.registry import Registry

ACTIVATIONS = Registry("activation")


class Pointwise(nnx.Module):
    """An activation without parameters."""

    params = 0

    def __init__(self, make):
        pass


def _pointwise(name, function):
    ACTIVATIONS.register(name)(type(name, (Pointwise,), {"__call__": lambda self, x: function(x), "__doc__": name}))


_pointwise("identity", lambda x: x)
_pointwise("relu", jax.nn.relu)
_pointwise("relu2", lambda x: jnp.square(jax.nn.relu(x)))
_pointwise("gelu", lambda x: jax.nn.gelu(x, approximate=True))
_pointwise("silu", jax.nn.silu)


class PolyCom(nnx.Module):
    """Polynomial composition of order 3 (2411.03884): scalars a_1..a_3 = 1/3, a_0 = 0 at the start.

    Computed in float32, since x^3 overflows float16 and loses digits in bfloat16.
    """

    params = 4

    def __init__(self, make):
        self.a = make.vector([1 / 3, 1 / 3, 1 / 3])
        self.a0 = make.vector(0.0)

    def _combine(self, powers, dtype):
        total = sum(self.a[...][i] * p for i, p in enumerate(powers))
        return (total + self.a0[...]).astype(dtype)


@ACTIVATIONS.register("polyrelu")
class PolyReLU(PolyCom):
    """sum_i a_i ReLU(x)^i + a_0."""

    def __call__(self, x):
        r = jax.nn.relu(wide(x))
        return self._combine([r, r**2, r**3], x.dtype)


@ACTIVATIONS.register("polynorm")
class PolyNorm(PolyCom):
    """sum_i a_i x^i / RMS(x^i) + a_0, RMS over the last axis (all of d_ff, whatever the sharding)."""

    def __call__(self, x):
        y = wide(x)

        def normed(p):
            return p * jax.lax.rsqrt(jnp.mean(jnp.square(p), axis=-1, keepdims=True) + 1e-6)

        return self._combine([normed(y), normed(y**2), normed(y**3)], x.dtype)
