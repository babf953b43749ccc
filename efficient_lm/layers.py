"""What every block is made of: parameter creation with roles, linear maps, the per-call context.

A parameter has a role, which decides its initial scale and its learning-rate multiplier under muP
(2203.03466; depth part 2505.01618):
  embedding  token table                         std const, lr x 1
  hidden     matrix whose fan_in grows with d     std 1/sqrt(fan_in), lr x 1/m
  fixed      matrix whose fan_in does not grow    std 1/sqrt(fan_in), lr x 1
  output     logits head                          std const, logits x 1/m, lr x 1
  vector     norms, biases, gates, decays         lr x 1, no weight decay
  state      no parameter: never trained, its module's `next_state` changes it after each step
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

ROLES = ("embedding", "hidden", "fixed", "output", "vector", "state")


@dataclass(frozen=True)
class Context:
    """What a block sees beside x: segment_ids [B, T] (0 = padding), positions [B, T], and a carry.

    `carry` is a dict passed from block to block for information that crosses layers.
    """

    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
    carry: dict[str, Any] = field(default_factory=dict)


jax.tree_util.register_dataclass(Context, data_fields=["segment_ids", "positions", "carry"], meta_fields=[])


def layer_specs(model) -> list[tuple[str, str]]:
    """(mixer name, ffn name) of each of the `n_layers` blocks."""
    prefix = list(model.prefix)
    body = [model.pattern[i % len(model.pattern)] for i in range(model.n_layers - len(prefix))]
    return [_split(name) for name in prefix + body]


def _split(name):
    mixer, _, ffn = name.partition("/")
    return mixer, ffn or "dense"


def width_multiplier(model) -> float:
    """muP's m = d_model / base_width; 1 under the standard parametrisation."""
    return model.d_model / model.base_width if model.parametrization == "mup" else 1.0


def branch_multiplier(model) -> float:
    """CompleteP's (L / L0)^-alpha on residual branches; 1 when depth scaling is off."""
    return (model.n_layers / model.base_depth) ** -model.depth_alpha if model.base_depth else 1.0


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32, the precision of statistics, states and accumulations."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def recomputed(function):
    """`function`, of which a backward pass keeps the arguments alone and computes the rest again.

    For what lies between matrix products: in a layer scan its intermediates would be written to memory and read back,
    which takes longer. (Without a scan XLA finds the values of the forward pass and takes them.)
    """
    return jax.checkpoint(function, prevent_cse=False)


class Maker:
    """Creates the parameters of one block: `make.matrix(...)`, `make.vector(...)` from a key of its own."""

    def __init__(self, key: jax.Array, model, layer: int = 0):
        self.key, self.model, self.layer = key, model, layer

    def next_key(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def matrix(
        self, d_in: int, d_out: int, *, role: str = "hidden", scale: float = 1.0, copies: int = 0, cast: bool = False
    ) -> nnx.Param:
        """[d_in, d_out] normal; std `init_std`, or 1/sqrt(d_in) when that is 0, times `scale`.

        `copies` independent ones give [copies, d_in, d_out]. `cast`: it is used in the compute dtype only (`LM.cast`).
        """
        if self.model.init_std and role == "hidden":
            std = self.model.init_std / width_multiplier(self.model) ** 0.5
        else:
            std = d_in**-0.5
        shape = (copies, d_in, d_out) if copies else (d_in, d_out)
        return nnx.Param(scale * std * jax.random.normal(self.next_key(), shape), role=role, cast=cast)

    def table(self, rows: int, width: int, role: str) -> nnx.Param:
        """[rows, width] normal with std 1/sqrt(width), of the base width under muP."""
        std = (self.model.base_width if self.model.parametrization == "mup" else width) ** -0.5
        return nnx.Param(std * jax.random.normal(self.next_key(), (rows, width)), role=role)

    def vector(self, value) -> nnx.Param:
        """A parameter with a given initial value, without weight decay."""
        return nnx.Param(jnp.asarray(value, jnp.float32), role="vector")

    def state(self, value) -> nnx.Param:
        """An array that is no parameter but lives among them, so that whatever stores, shards or passes parameters
        needs no second tree. The optimizer leaves it alone; gradients must not reach it."""
        return nnx.Param(jnp.asarray(value, jnp.float32), role="state")


class Linear(nnx.Module):
    """y = x W (+ b). W is cast to the dtype of x.

    With parametrization 'sigma' (sigma-reparam, 2303.06296) gain / sigma(W) W takes the place of W: sigma(W), the
    largest singular value, is |W u| for the right singular vector u that `power_iteration` keeps up after each step.
    """

    def __init__(self, make: Maker, d_in: int, d_out: int, *, role="hidden", scale=1.0, bias=False):
        sigma = make.model.parametrization == "sigma"
        self.kernel = make.matrix(d_in, d_out, role=role, scale=scale, cast=not sigma)
        self.bias = make.vector(jnp.zeros(d_out)) if bias else None
        self.sigma_gain = make.vector(jnp.ones(())) if sigma else None
        self.sigma_vector = make.state(first_singular(self.kernel[...], make.next_key())) if sigma else None

    def weight(self, dtype):
        """The matrix [d_in, d_out] that multiplies x."""
        kernel = self.kernel[...]
        if self.sigma_gain is not None:
            u = jax.lax.stop_gradient(self.sigma_vector[...])
            u = u / jnp.linalg.norm(u)  # averages of unit vectors are shorter
            sigma = jnp.linalg.norm(jnp.matmul(kernel, u, precision="highest"))
            kernel = self.sigma_gain[...] / sigma * kernel
        return kernel.astype(dtype)

    def __call__(self, x):
        y = x @ self.weight(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def logits_product(x, table):
    """x [..., d] times table [vocab_size, d]: logits [..., vocab_size] in float32.

    Their gradient is rounded to the dtype of x before it is multiplied, as in every other layer: left in float32 it
    makes both products of the backward pass run at the rate of float32.
    """
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)


def _logits_backward(residuals, gradient):
    x, table = residuals
    gradient = gradient.astype(x.dtype)
    dtable = jnp.einsum("...v,...d->vd", gradient, x, preferred_element_type=jnp.float32)
    return gradient @ table, dtable.astype(table.dtype)


logits_product.defvjp(lambda x, table: (logits_product(x, table), (x, table)), _logits_backward)


def first_singular(kernel, key):
    """A unit vector [d_out] whose |W u| is the largest singular value of [d_in, d_out] to a few per cent."""
    u = jax.random.normal(key, kernel.shape[1:])
    return jax.lax.fori_loop(0, 30, lambda _, u: next_singular(kernel, u), u)


def next_singular(kernel, u):
    """One power iteration, W^T W u / |W^T W u|: matrices [..., d_in, d_out], vectors [..., d_out] -> unit vectors."""
    v = jnp.einsum("...io,...o->...i", kernel, u, precision="highest")
    u = jnp.einsum("...io,...i->...o", kernel, v, precision="highest")
    return u / jnp.linalg.norm(u, axis=-1, keepdims=True)


def power_iteration(params: dict) -> dict:
    """Parameters with the singular vector of every `Linear` brought nearer to that of its present kernel."""
    new = {name: power_iteration(value) if isinstance(value, dict) else value for name, value in params.items()}
    if "sigma_vector" in new:
        new["sigma_vector"] = next_singular(new["kernel"], new["sigma_vector"])
    return new
