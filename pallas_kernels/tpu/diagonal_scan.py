"""Real diagonal recurrence on TPU: blocks of T walked in order, the state of a block of channels in VMEM.

Inside a block the pairs (decay, input) are combined by doubling: log2(block) element-wise steps on whole tiles.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import interpreted
from pallas_kernels.xla import diagonal_scan as xla

BLOCK_T, BLOCK_D = 128, 512


def supports(x, log_decay, **_):
    """None when the kernel can serve the call, else the reason."""
    if any(jnp.issubdtype(a.dtype, jnp.complexfloating) for a in (x, log_decay)):
        return "complex channels: real ones only"
    return None if x.dtype in (jnp.float32, jnp.bfloat16) else f"dtype {x.dtype}: float32 or bfloat16"


def diagonal_scan(x, log_decay, *, initial_state=None, segment_ids=None, reverse=False, chunk_size=None,
                  interpret=None):
    """See `pallas_kernels.api.diagonal_scan`. Returns (h, final state)."""
    run = xla.differentiable(lambda decay, x, state: _scan(decay, x, state, interpret))
    return xla.diagonal_scan(x, log_decay, initial_state=initial_state, segment_ids=segment_ids, reverse=reverse,
                             scan=run)


def _scan(decay, x, state, interpret):
    """h [B, T, D] for float32 decay, x [B, T, D] and state [B, D]."""
    batch, length, width = x.shape
    rows = min(BLOCK_T, 1 << (length - 1).bit_length())
    columns = BLOCK_D if width % BLOCK_D == 0 else 128 if width % 128 == 0 else width
    pad = [(0, 0), (0, -length % rows), (0, 0)]
    tile = pl.BlockSpec((None, rows, columns), lambda b, d, t: (b, t, d))
    h = pl.pallas_call(
        _kernel, grid=(batch, width // columns, -(-length // rows)),
        in_specs=[tile, tile, pl.BlockSpec((None, 1, columns), lambda b, d, t: (b, 0, d))], out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((batch, length + pad[1][1], width), jnp.float32),
        scratch_shapes=[pltpu.VMEM((1, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreted(interpret), name="diagonal_scan",
    )(jnp.pad(decay, pad), jnp.pad(x, pad), state[:, None])
    return h[:, :length]


def _kernel(decay_ref, x_ref, initial_ref, h_ref, state_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    decay, h = decay_ref[...], x_ref[...]
    rows = h.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, h.shape, 0)
    for shift in (1 << s for s in range(rows.bit_length() - 1)):
        within = row >= shift
        h = h + decay * jnp.where(within, pltpu.roll(h, shift, 0), 0.0)
        decay = decay * jnp.where(within, pltpu.roll(decay, shift, 0), 1.0)
    h = h + decay * state_ref[...]
    h_ref[...] = h
    state_ref[...] = h[rows - 1:]
