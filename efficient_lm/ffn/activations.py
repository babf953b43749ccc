"""Activations: modules y = act(x) over [..., d_ff], learnable scalars where the definition has them.

A config names one as 'relu', or as 'polynorm:4' where it takes an argument (here the order).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.layers import recomputed, wide
from efficient_lm.registry import Registry
from efficient_lm.schema import ConfigError

ACTIVATIONS = Registry("activation")


@dataclass(frozen=True)
class Argument:
    """The number after the colon: what it is, its default (of the right type) and its limits, both included."""

    what: str
    default: int | float
    low: float
    high: float


class Activation(nnx.Module):
    """Base class. `make` (layers.Maker) creates parameters, `argument` is the number from the config."""

    argument: Argument | None = None

    def __init__(self, make, argument=None):
        pass

    def __call__(self, x):
        raise NotImplementedError

    @staticmethod
    def param_count(argument) -> int:
        return 0


def find_activation(name: str, path: str):
    """(class, argument) of 'name' or 'name:argument'; `path` is the config field. Raises ConfigError."""
    kind, colon, text = name.partition(":")
    cls = ACTIVATIONS.find(kind, path)
    limits = cls.argument
    if not colon:
        return cls, limits and limits.default
    if limits is None:
        raise ConfigError(f"{path} = {name!r}: {kind} takes no argument")
    try:
        value = type(limits.default)(text)
    except ValueError:
        value = None
    if value is None or not limits.low <= value <= limits.high:
        raise ConfigError(f"{path} = {name!r}: {limits.what} must be a number in {limits.low}..{limits.high}")
    return cls, value


def make_activation(name: str, make) -> Activation:
    """The module for a name that `find_activation` accepts."""
    cls, argument = find_activation(name, "activation")
    return cls(make, argument)


def activation_params(name: str) -> int:
    """Parameters of an activation."""
    cls, argument = find_activation(name, "activation")
    return cls.param_count(argument)


def _pointwise(name, function):
    function = recomputed(function)
    ACTIVATIONS.register(name)(type(name, (Activation,), {"__call__": lambda self, x: function(x), "__doc__": name}))


_pointwise("identity", lambda x: x)
_pointwise("sigmoid", jax.nn.sigmoid)
_pointwise("relu", jax.nn.relu)
_pointwise("relu2", lambda x: jnp.square(jax.nn.relu(x)))
_pointwise("gelu", lambda x: jax.nn.gelu(x, approximate=True))
_pointwise("silu", jax.nn.silu)
_pointwise("elu", jax.nn.elu)
_pointwise("selu", jax.nn.selu)
_pointwise("softplus", jax.nn.softplus)


@ACTIVATIONS.register("crrelu")
class CRReLU(Activation):
    """ReLU(x) + e x exp(-x^2 / 2) with a learnable e, 0.01 at the start (2405.12954)."""

    def __init__(self, make, argument=None):
        self.e = make.vector(0.01)

    def __call__(self, x):
        return recomputed(self._bump)(x, self.e[...])

    @staticmethod
    def _bump(x, e):
        y = wide(x)
        return (jax.nn.relu(y) + e * y * jnp.exp(-0.5 * jnp.square(y))).astype(x.dtype)

    @staticmethod
    def param_count(argument):
        return 1


@ACTIVATIONS.register("fatrelu")
class FATReLU(Activation):
    """x where x >= t, else 0 (2402.13516); t is the argument."""

    argument = Argument("the threshold", 0.1, 0.0, 100.0)

    def __init__(self, make, argument):
        self.threshold = argument

    def __call__(self, x):
        return recomputed(lambda x: jnp.where(x >= self.threshold, jax.nn.relu(x), 0))(x)


@ACTIVATIONS.register("topk")
class TopK(Activation):
    """ReLU, then the largest entries of each token only (2210.06313); the argument is the share of d_ff kept.

    Entries that equal the smallest kept one stay as well.
    """

    argument = Argument("the share kept", 0.125, 1e-4, 1.0)

    def __init__(self, make, argument):
        self.share = argument

    def __call__(self, x):
        x = jax.nn.relu(x)
        kept = max(1, round(self.share * x.shape[-1]))
        threshold = jax.lax.top_k(jax.lax.stop_gradient(x), kept)[0][..., -1:]
        return jnp.where(x >= threshold, x, 0)


class PolyCom(Activation):
    """Polynomial composition (2411.03884): scalars a_1..a_r = 1/r, a_0 = 0 at the start; the argument is the order r.

    Computed in float32, since x^3 overflows float16 and loses digits in bfloat16.
    """

    argument = Argument("the order", 3, 1, 8)

    def __init__(self, make, argument=3):
        self.a = make.vector([1 / argument] * argument)
        self.a0 = make.vector(0.0)

    @staticmethod
    def param_count(argument):
        return argument + 1

    def __call__(self, x):
        return recomputed(self._compose)(x, self.a[...], self.a0[...])

    @classmethod
    def _compose(cls, x, a, a0):
        terms = cls._terms(wide(x), a.shape[0])
        return (sum(a[i] * term for i, term in enumerate(terms)) + a0).astype(x.dtype)

    @staticmethod
    def _terms(x, order: int):
        """The terms of order 1, 2, ..., `order`."""
        raise NotImplementedError


@ACTIVATIONS.register("polyrelu")
class PolyReLU(PolyCom):
    """sum_i a_i ReLU(x)^i + a_0."""

    @staticmethod
    def _terms(x, order):
        return [jax.nn.relu(x) ** i for i in range(1, order + 1)]


@ACTIVATIONS.register("polynorm")
class PolyNorm(PolyCom):
    """sum_i a_i x^i / RMS(x^i) + a_0 with 1e-6 added to the mean squares, RMS over the last axis.

    That is all of d_ff: where the axis is sharded, XLA makes the mean a reduction over devices.
    """

    @staticmethod
    def _terms(x, order):
        # (x / s)^i with eps / s^(2 i) is x^i with eps for any s, so s needs no gradient; powers of x itself overflow
        # (x^8 squared does from 256 on).
        size = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True), 1.0)))
        x = x / size
        for i in range(1, order + 1):
            power = x**i
            yield power * jax.lax.rsqrt(jnp.mean(jnp.square(power), axis=-1, keepdims=True) + 1e-6 / size ** (2 * i))
