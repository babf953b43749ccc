"""Mosaic GPU kernel (Hopper) that carries the delta rule's states from piece to piece of T.

A piece takes a state S to F + M S; the next one starts there. The steps are few and small, but follow one another: one
kernel for all of them spares several launches a step. Products of float32 matrices are three products of their bf16
halves, hi hi + lo hi + hi lo, so that what is carried keeps 16 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import BLOCK, T_CONTRACT, WGMMA, add_products, present, tile

PARTS = "high", "low"


def carry_states(first, local, moves, *, reverse=False, interpret=None):
    """State [B, H, P, K, V] entering each piece, float32: next = local + move @ state, from `first`.

    Args: first [B, H, K, V] or None for zero; local [B, H, P, K, V] and moves [B, H, P, K, K], float32; those of the
      last piece are not used. With `reverse`, from the last piece to the first, moves transposed.
    """
    b_size, heads, pieces, k_size, v_size = local.shape
    n = k_size // BLOCK
    operands = present(first=first, local=local, moves=moves)
    out = jax.ShapeDtypeStruct(local.shape, jnp.float32)
    half = jnp.bfloat16
    scratch = {f"move {part}": tile((2, k_size, k_size), half) for part in PARTS}
    scratch |= {f"state {part}": tile((2, k_size, BLOCK), half) for part in PARTS}

    def body(*refs):
        gmem = dict(zip(operands, refs, strict=False))
        entering, smem, written = refs[len(operands):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        mine, cols = pl.ds(wg * BLOCK, BLOCK), pl.ds(lax.axis_index("column") * BLOCK, BLOCK)

        def load(ref):
            return plgpu.load(ref, layout=WGMMA, optimized=False)

        def split(x, name, *place):
            high = x.astype(half)
            for part, value in zip(PARTS, (high, (x - high.astype(jnp.float32)).astype(half)), strict=True):
                smem[f"{name} {part}"].at[place][...] = value

        def step(i, state):
            piece, slot = (pieces - 1 - i if reverse else i), lax.rem(i, jnp.int32(2))
            entering.at[batch, head, piece, mine, cols][...] = state
            split(state, "state", slot, mine)
            for block in range(n):
                into = pl.ds(block * BLOCK, BLOCK)
                split(load(gmem["moves"].at[batch, head, piece, mine, into]), "move", slot, mine, into)
            grown = load(gmem["local"].at[batch, head, piece, mine, cols])
            plgpu.commit_smem()
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)
            high, low = (smem[f"move {part}"].at[slot] for part in PARTS)
            if reverse:
                high, low = (move.at[:, mine].transpose(T_CONTRACT) for move in (high, low))
            else:
                high, low = (move.at[mine] for move in (high, low))
            state_high, state_low = (smem[f"state {part}"].at[slot] for part in PARTS)
            grown, = add_products((grown, (high, low, high), (state_high, state_high, state_low)), interpret=interpret)
            return grown

        if first is None:
            state = plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), jnp.float32), WGMMA)
        else:
            state = load(gmem["first"].at[batch, head, mine, cols])
        state = lax.fori_loop(0, pieces - 1, step, state)
        entering.at[batch, head, 0 if reverse else pieces - 1, mine, cols][...] = state

    return plgpu.kernel(
        body, out_type=out, scratch_types=(scratch, plgpu.Barrier(num_arrivals=n)),
        grid=(heads, v_size // BLOCK, b_size), grid_names=("head", "column", "batch"), num_threads=n, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True), interpret=interpret,
    )(*operands.values())
