"""Megablox, the grouped matmul for TPUs that comes with JAX."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops

from pallas_kernels.tpu.common import interpreted

TILES = (128, 128, 128)  # of rows, K, N


def supports(*, lhs, rhs, **_):
    """None where the kernel serves the call, else why not."""
    for x in (lhs, *rhs):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"dtype {x.dtype}: float32 or bfloat16"
    return None


def grouped_matmul(lhs, rhs, group_sizes, *, interpret=None):
    """See `pallas_kernels.api.grouped_matmul`."""
    rhs = jnp.concatenate(rhs, axis=2)
    rows, total = lhs.shape[0], jnp.sum(group_sizes)
    # The kernel wants whole tiles of rows, each in some group: rows of none go to the last group as zeros.
    lhs = jnp.where(jnp.arange(rows)[:, None] < total, lhs, 0)
    lhs = jnp.pad(lhs, ((0, -rows % TILES[0]), (0, 0)))
    sizes = group_sizes.at[-1].add(lhs.shape[0] - total).astype(jnp.int32)
    return ops.gmm(lhs, rhs, sizes, lhs.dtype, TILES, interpret=interpreted(interpret))[:rows]
