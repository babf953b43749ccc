"""Diagonal recurrence on TPU: blocks of T walked in order, the state of a block of channels in VMEM.

Inside a block the pairs (decay, input) are combined by doubling: log2(block) element-wise steps on whole tiles. A TPU
has no complex numbers: complex channels travel as two planes of real and imaginary parts.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.common import interpreted
from pallas_kernels.xla import diagonal_scan as xla

BLOCK_T, BLOCK_D = 128, 512


def supports(x, log_decay, **_):
    """None when the kernel can serve the call, else the reason."""
    for a in (x, log_decay):
        if a.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return f"dtype {a.dtype}: float32, bfloat16 or complex64"
    return None


def diagonal_scan(x, log_decay, *, initial_state=None, segment_ids=None, reverse=False, chunk_size=None,
                  interpret=None):
    """See `pallas_kernels.api.diagonal_scan`. Returns (h, final state)."""
    run = xla.differentiable(lambda decay, x, state: _scan(decay, x, state, interpret))
    return xla.diagonal_scan(x, log_decay, initial_state=initial_state, segment_ids=segment_ids, reverse=reverse,
                             scan=run)


def _planes(x):
    """x as real arrays: (x,) or its real and imaginary parts."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _times(a, b):
    """Product of numbers given as planes."""
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _plus(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _scan(decay, x, state, interpret):
    """h [B, T, D] for decay, x [B, T, D] and state [B, D], all float32 or all complex64."""
    batch, length, width = x.shape
    rows = min(BLOCK_T, 1 << (length - 1).bit_length())
    columns = BLOCK_D if width % BLOCK_D == 0 else 128 if width % 128 == 0 else width
    pad = [(0, 0), (0, -length % rows), (0, 0)]
    tile = pl.BlockSpec((None, rows, columns), lambda b, d, t: (b, t, d))
    before = pl.BlockSpec((None, 1, columns), lambda b, d, t: (b, 0, d))
    planes = len(_planes(x))
    inputs = *_planes(jnp.pad(decay, pad)), *_planes(jnp.pad(x, pad)), *_planes(state[:, None])
    h = pl.pallas_call(
        functools.partial(_kernel, planes), grid=(batch, width // columns, -(-length // rows)),
        in_specs=[tile] * (2 * planes) + [before] * planes, out_specs=[tile] * planes,
        out_shape=[jax.ShapeDtypeStruct((batch, length + pad[1][1], width), jnp.float32)] * planes,
        scratch_shapes=[pltpu.VMEM((1, columns), jnp.float32)] * planes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreted(interpret), name="diagonal_scan",
    )(*inputs)
    return (h[0] if planes == 1 else jax.lax.complex(*h))[:, :length]


def _kernel(planes, *refs):
    decay_refs, x_refs, initial_refs, h_refs, state_refs = (refs[i * planes:(i + 1) * planes] for i in range(5))

    @pl.when(pl.program_id(2) == 0)
    def _():
        for state, initial in zip(state_refs, initial_refs, strict=True):
            state[...] = initial[...]

    decay, h, state = (tuple(ref[...] for ref in group) for group in (decay_refs, x_refs, state_refs))
    rows = h[0].shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, h[0].shape, 0)
    ones = (1.0, 0.0)[:planes]
    for shift in (1 << s for s in range(rows.bit_length() - 1)):
        within = row >= shift
        h = _plus(h, _times(decay, tuple(jnp.where(within, pltpu.roll(x, shift, 0), 0.0) for x in h)))
        decay = _times(decay, tuple(jnp.where(within, pltpu.roll(x, shift, 0), one)
                                    for x, one in zip(decay, ones, strict=True)))
    h = _plus(h, _times(decay, state))
    for h_ref, state_ref, plane in zip(h_refs, state_refs, h, strict=True):
        h_ref[...] = plane
        state_ref[...] = plane[rows - 1:]
