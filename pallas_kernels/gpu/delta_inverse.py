"""Mosaic GPU kernel (Hopper) for the chunks' triangular inverses of the delta rule, all chunks in parallel.

With c the in-chunk cumulative log2 decay: T = (I + diag(beta) M)^-1, M = strictly lower (K K^T * 2^(c_i - c_j)). The
inverse of the diagonal blocks of size 2b comes from those of size b: X <- X - (X L X)_off, with _off the lower left
b x b blocks. Only inverses are multiplied, never powers of L. Operands are fp16: entries of the inverse stay moderate
for beta |k|^2 <= 2. One step of Newton's at the end, X <- X + X (I - X - L X) with L in two fp16 parts, leaves no more
than the rounding of the result: where keys look alike and beta is above 1, T alternates in sign, and sums of T times
anything cancel. Up to 1 it is left out: X as it is has the smaller residual, an exact inverse of a rounded L.

Every multiprocessor holds one program, whose warpgroups take chunks in turn on their own: what bounds them is issuing
instructions, so the masks of a level come from one comparison, and the next chunk is on its way meanwhile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import (
    BLOCK,
    CHUNK,
    T_CONTRACT,
    WGMMA,
    add_products,
    decayed_scores,
    products,
    rows,
    tile,
    two_parts,
)

PROGRAMS = 132  # multiprocessors of an H100 or H200
GROUP = 3  # warpgroups of a program: 168 registers a thread; four spill


def chunk_inverses(k, v, gates, *, decay, refine, group=GROUP, interpret=None):
    """T of every chunk of k [B, T, H, K], and the largest magnitude of each token's v [B, T, H, V] while at it.

    Args: gates float32 [B, H, N, 2, 64], c and beta; refine: whether to take Newton's step.
    Returns: T [B, H, N, 64, 64] fp16, peaks float32 [B, H, N, 64].
    """
    b_size, t_size, heads, k_size = k.shape
    chunks = t_size // CHUNK
    blocks, value_blocks = range(k_size // BLOCK), range(v.shape[-1] // BLOCK)
    items = b_size * heads * chunks
    programs = min(PROGRAMS, pl.cdiv(items, group))
    workers = programs * group
    square = tile((group, CHUNK, CHUNK), jnp.float16)
    scratch = dict(
        k=tile((group, len(blocks), CHUNK, BLOCK), k.dtype),
        v=tile((group, len(value_blocks), CHUNK, BLOCK), v.dtype),
        x=square,
        y=square,
        gates=plgpu.SMEM((group, 2, CHUNK), jnp.float32),
        out=square,
    )

    def invert(k_ref, v_ref, gates_ref, out_ref, peaks_ref, smem, loaded):
        wg = lax.axis_index("wg")
        worker = lax.axis_index("program") * group + wg
        mine = lax.div(items - worker + workers - 1, jnp.int32(workers))
        k_tiles, v_tiles = (tuple(smem[n].at[wg, b] for b in r) for n, r in (("k", blocks), ("v", value_blocks)))
        loaded = loaded.at[wg]
        c_tile, out = smem["gates"].at[wg, 0], smem["out"].at[wg]

        def place(i):
            item = worker + i * workers
            head = lax.div(item, jnp.int32(chunks))
            return lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads)), lax.rem(item, jnp.int32(chunks))

        def load(i):
            batch, head, chunk = place(i)
            for ref, tiles in ((k_ref, k_tiles), (v_ref, v_tiles)):
                for b, dst in enumerate(tiles):
                    src = ref.at[batch, pl.ds(chunk * CHUNK, CHUNK), head, pl.ds(b * BLOCK, BLOCK)]
                    plgpu.copy_gmem_to_smem(src, dst, loaded)
            plgpu.copy_gmem_to_smem(gates_ref.at[batch, head, chunk], smem["gates"].at[wg], loaded)

        def times(left, right, ref):  # `ref` was last read before another tile was committed: no barrier is needed here
            ref[...] = right
            plgpu.commit_smem()
            zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
            first, *more = add_products(*((zero, part, ref) for part in left), interpret=interpret)
            return sum(more, first)  # from nothing, `sum` adds a zero

        @pl.when(mine > 0)
        def _():
            load(0)

        @pl.loop(0, mine)
        def _(i):
            plgpu.barrier_wait(loaded)
            (scores,) = products((k_tiles, tuple(k.transpose(T_CONTRACT) for k in k_tiles)))
            row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=WGMMA)
            col = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
            c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
            scores = jnp.where(row > col, decayed_scores(scores, c_row, c_tile if decay else None, False), 0.0)
            scores = -(scores * rows(plgpu.load(smem["gates"].at[wg, 1], layout=WGMMA.reduce(1)), scores.shape))
            minus, minus_low = (plgpu.layout_cast(part, WGMMA) for part in two_parts(scores, jnp.float16))
            x = jnp.where(row == col, 1.0, jnp.where((row == col + 1) & ((row & 1) == 1), scores, 0.0))
            x = plgpu.layout_cast(x, WGMMA)
            peaks = (jnp.max(jnp.abs(plgpu.load(ref, layout=WGMMA)), axis=1).astype(jnp.float32) for ref in v_tiles)
            peaks_ref.at[place(i)][...] = functools.reduce(jnp.maximum, peaks)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if refine:
                out[...] = minus_low  # read from shared memory when needed: registers are scarce
            plgpu.commit_smem()  # all have read this chunk

            @pl.when(i + 1 < mine)
            def _():
                load(i + 1)

            for level in range(1, 6):  # x stays float32: selects of fp16 are converted one by one
                half = x.astype(jnp.float16)
                z = times((minus,), half, smem["x"].at[wg]).astype(jnp.float16)
                z = times((half,), z, smem["y"].at[wg])
                left_block = jnp.where(((row >> level) & 1) == 1, (row >> level) - 1, -1)
                x = plgpu.layout_cast(jnp.where(left_block == (col >> level), z, x), WGMMA)
            x = x.astype(jnp.float16)
            if refine:
                x32 = x.astype(jnp.float32)
                rest = jnp.where(row == col, 1.0, 0.0) - x32 + times((minus, out), x, smem["x"].at[wg])
                x = (x32 + times((x,), rest.astype(jnp.float16), smem["y"].at[wg])).astype(jnp.float16)
            out[...] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[place(i)])

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        invert,
        out_type=(
            jax.ShapeDtypeStruct((b_size, heads, chunks, CHUNK, CHUNK), jnp.float16),
            jax.ShapeDtypeStruct((b_size, heads, chunks, CHUNK), jnp.float32),
        ),
        scratch_types=(
            scratch,
            plgpu.Barrier(num_arrivals=1 + len(blocks) + len(value_blocks), num_barriers=group),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=group,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(k, v, gates)
