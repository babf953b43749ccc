"""Feature maps phi of linear attention: modules from queries or keys [..., H, K] to features [..., H, width(K)].

    elu1          1 + ELU(x)                                       2006.16236
    relu          ReLU(x)
    identity      x                                                signed: can't be normalised
    t2r           ReLU(W x + b)                                    2103.13076
    hadamard      (W_1 x + b_1) * (W_2 x + b_2)                    signed
    dpfp          r_i r_{i+j}, r = [ReLU(x), ReLU(-x)], j = 1..4   2102.11174
    hedgehog      [softmax(W x), softmax(-W x)]                    2402.04347 in the bounded form of 2410.10254
    hedgehog_exp  [exp(W x + b), exp(-W x - b)]                    2402.04347
    taylor        phi(q).phi(k) = 1 + s + s^2/2, s = q.k/sqrt(K)   Based, 2402.18668
    rebased       phi(q).phi(k) = (q.k)^2/K after a LayerNorm      2402.10644

W is a K x K matrix per head, the identity at the start in both Hedgehog maps. Queries and keys have maps of their own.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.layers import wide
from efficient_lm.registry import Registry

FEATURE_MAPS = Registry("feature map")
# Rolled copies of DPFP, nu.
DPFP_ROLLS = 4


class FeatureMap(nnx.Module):
    """Base class, for maps without parameters. `role` is that of matrices whose fan-in is K (layers.ROLES)."""

    signed = False  # weights phi(q).phi(k) may be negative

    def __init__(self, make, heads: int, width: int, role="hidden"):
        pass

    @staticmethod
    def width(width: int) -> int:
        """Features of one head with K = `width` channels."""
        return width

    @staticmethod
    def weights(heads: int, width: int) -> int:
        """Elements of its matrices."""
        return 0

    @staticmethod
    def vectors(heads: int, width: int) -> int:
        """Elements of its other parameters."""
        return 0


def _pointwise(name, function, signed=False):
    methods = {"__call__": lambda self, x: function(x), "signed": signed, "__doc__": name}
    FEATURE_MAPS.register(name)(type(name, (FeatureMap,), methods))


_pointwise("elu1", lambda x: 1 + jax.nn.elu(x))
_pointwise("relu", jax.nn.relu)
_pointwise("identity", lambda x: x, signed=True)


class HeadLinear(nnx.Module):
    """W x (+ b), one matrix per head; rows of `kernel` are the channels within a head, columns those of all heads."""

    def __init__(self, make, heads: int, width: int, role, *, identity=False, bias=True):
        self.kernel = make.matrix(width, heads * width, role=role)
        if identity:
            self.kernel[...] = jnp.tile(jnp.eye(width), (1, heads))
        self.bias = make.vector(jnp.zeros((heads, width))) if bias else None

    def __call__(self, x):
        kernel = self.kernel[...].reshape(x.shape[-1], *x.shape[-2:]).astype(x.dtype)
        y = jnp.einsum("...hi,ihj->...hj", x, kernel)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Learned(FeatureMap):
    """A map with one matrix per head."""

    bias, identity = True, False

    def __init__(self, make, heads, width, role="hidden"):
        self.linear = HeadLinear(make, heads, width, role, identity=self.identity, bias=self.bias)

    @staticmethod
    def weights(heads, width):
        return heads * width**2

    @classmethod
    def vectors(cls, heads, width):
        return heads * width if cls.bias else 0


@FEATURE_MAPS.register("t2r")
class T2R(Learned):
    def __call__(self, x):
        return jax.nn.relu(self.linear(x))


@FEATURE_MAPS.register("hadamard")
class Hadamard(Learned):
    signed = True

    def __init__(self, make, heads, width, role="hidden"):
        super().__init__(make, heads, width, role)
        self.factor = HeadLinear(make, heads, width, role)

    def __call__(self, x):
        return self.linear(x) * self.factor(x)

    @staticmethod
    def weights(heads, width):
        return 2 * heads * width**2

    @staticmethod
    def vectors(heads, width):
        return 2 * heads * width


@FEATURE_MAPS.register("dpfp")
class DPFP(FeatureMap):
    def __call__(self, x):
        r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], -1)
        return jnp.concatenate([r * jnp.roll(r, j, -1) for j in range(1, DPFP_ROLLS + 1)], -1)

    @staticmethod
    def width(width):
        return 2 * width * DPFP_ROLLS


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(Learned):
    bias, identity = False, True

    def __call__(self, x):
        y = self.linear(x)
        return jnp.concatenate([jax.nn.softmax(wide(y)), jax.nn.softmax(-wide(y))], -1).astype(x.dtype)

    @staticmethod
    def width(width):
        return 2 * width


@FEATURE_MAPS.register("hedgehog_exp")
class HedgehogExp(Hedgehog):
    bias = True

    def __call__(self, x):
        y = wide(self.linear(x))
        return jnp.exp(jnp.concatenate([y, -y], -1))


@FEATURE_MAPS.register("taylor")
class Taylor(FeatureMap):
    """e^s up to order 2. The symmetric half of the products is kept: 1 + K + K (K + 1) / 2 features."""

    def __call__(self, x):
        return taylor(x, 2)

    @staticmethod
    def width(width):
        return math.comb(width + 2, 2)


@FEATURE_MAPS.register("rebased")
class ReBased(FeatureMap):
    """LayerNorm over the channels with scale and shift shared by the heads, then all products of two channels."""

    eps = 1e-5

    def __init__(self, make, heads, width, role="hidden"):
        self.scale = make.vector(jnp.ones(width))
        self.shift = make.vector(jnp.zeros(width))

    def __call__(self, x):
        y = wide(x)
        y = (y - jnp.mean(y, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(y, -1, keepdims=True) + self.eps)
        y = self.scale[...] * y + self.shift[...]
        return monomials(y * (2 / y.shape[-1]) ** 0.25, 2)

    @staticmethod
    def width(width):
        return math.comb(width + 1, 2)

    @staticmethod
    def vectors(heads, width):
        return 2 * width


def taylor(x, order: int):
    """Features of x [..., K], all monomials up to `order`: inner products are sum_p s^p / p! with s = x.y / sqrt(K).

    In float32, since sums of many squares follow.
    """
    x = wide(x) * x.shape[-1] ** -0.25
    return jnp.concatenate([monomials(x, p) for p in range(order + 1)], -1)


def monomials(x, degree: int):
    """x^alpha / sqrt(alpha!) of x [..., K] for all |alpha| = degree: inner products are (x.y)^degree / degree!."""
    alphas = list(itertools.combinations_with_replacement(range(x.shape[-1]), degree))
    factorials = [math.prod(math.factorial(alpha.count(i)) for i in set(alpha)) for alpha in alphas]
    y = jnp.broadcast_to(jnp.asarray(np.power(factorials, -0.5), x.dtype), (*x.shape[:-1], len(alphas)))
    for factor in np.array(alphas, int).reshape(len(alphas), degree).T:
        y = y * x[..., factor]
    return y
