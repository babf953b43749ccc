"""Grouped matmul by the Mosaic GPU kernels that come with JAX: one for both products with rhs, one for its gradient."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.tiles import not_hopper

# The fastest of those tried on an H100 (docs/log.md).
NARROW = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=1)
WIDE = NARROW | dict(block_m=64, block_n=256)


def supports(*, lhs, rhs, **_):
    """None where `grouped_matmul` takes these arrays, else why not, in one line."""
    if reason := not_hopper():
        return reason
    if not lhs.dtype == rhs.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"lhs and rhs must both be bfloat16 or float16, got {lhs.dtype}, {rhs.dtype}"
    if rhs.shape[1] % 128 or rhs.shape[2] % 128:
        return f"K and N must be multiples of 128, got {rhs.shape[1]}, {rhs.shape[2]}"
    return None


def grouped_matmul(lhs, rhs, group_sizes):
    """See `pallas_kernels.api.grouped_matmul`."""
    return _product(lhs, rhs, group_sizes.astype(jnp.int32))


def _rows_times(lhs, rhs, group_sizes, transpose):
    # Imported here: the module needs a JAX with GPU support.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    tiles = WIDE if rhs.shape[1 if transpose else 2] % 256 == 0 else NARROW
    y = ragged_dot(lhs, rhs, group_sizes=group_sizes, transpose_rhs=transpose, **tiles)
    # The kernel leaves rows of no group as it found them.
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < jnp.sum(group_sizes), y, 0)


@jax.custom_vjp
def _product(lhs, rhs, group_sizes):
    return _rows_times(lhs, rhs, group_sizes, transpose=False)


def _forward(lhs, rhs, group_sizes):
    return _product(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(residuals, dy):
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    lhs, rhs, group_sizes = residuals
    dlhs = _rows_times(dy, rhs, group_sizes, transpose=True)
    return dlhs, transposed_ragged_dot(lhs, dy, group_sizes=group_sizes, **NARROW), None


_product.defvjp(_forward, _backward)
