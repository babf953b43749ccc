"""Mosaic GPU kernels (Hopper) for DeltaNet and the gated delta rule.

One head and one chunk of 64 tokens, with c the in-chunk cumulative log2 decay, P_ij = 2^(c_i - c_j), S the entering state:
    M  = strictly lower part of (K K^T * P),   T = (I + diag(beta) M)^-1         `chunk_inverses`, parallel over chunks
    U  = T diag(beta) (V - diag(2^c) K S)
    O  = scale (diag(2^c) Q S + lower(Q K^T * P) U)
    S <- 2^total S + (diag(2^(total - c)) K)^T U                                 `delta_forward`, chunk after chunk
Gates travel as one float32 array [B, H, N, 2, 64]: c and beta.
"""
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
    Walk,
    add_products,
    decayed_scores,
    launch,
    present,
    products,
    rows,
    tile,
)


def _split(x):
    """float32 -> two bf16 whose sum keeps 16 bits of mantissa."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def chunk_inverses(k, gates, *, decay, interpret=None):
    """T [B, H, N, 64, 64] bf16 of every chunk of k [B, T, H, K], from gates [B, H, N, 2, 64].

    The inverse of the diagonal blocks of size 2b comes from those of size b: X <- X - X (diag(beta) M)_off X, with _off the
    lower left b x b blocks. Only inverses are multiplied, never powers of M, and each product keeps 16 bits.
    """
    b_size, t_size, heads, k_size = k.shape
    chunks = t_size // CHUNK
    square = tile((CHUNK, CHUNK), jnp.bfloat16)
    scratch = dict(k=tile((CHUNK, k_size), k.dtype), gates=plgpu.SMEM((2, CHUNK), jnp.float32), high=square, low=square,
                   out=square)

    def body(k_ref, gates_ref, out_ref, smem, loaded):
        chunk, head, batch = lax.axis_index("chunk"), lax.axis_index("head"), lax.axis_index("batch")
        plgpu.copy_gmem_to_smem(k_ref.at[batch, pl.ds(chunk * CHUNK, CHUNK), head], smem["k"], loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[batch, head, chunk], smem["gates"], loaded)
        plgpu.barrier_wait(loaded)
        lower, = products((smem["k"], smem["k"].transpose(T_CONTRACT)))
        row = plgpu.broadcasted_iota(jnp.int32, lower.shape, 0, layout=WGMMA)
        col = plgpu.broadcasted_iota(jnp.int32, lower.shape, 1, layout=WGMMA)
        c_tile = smem["gates"].at[0] if decay else None
        c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
        lower = jnp.where(row > col, decayed_scores(lower, c_row, c_tile, False), 0.0)
        lower = lower * rows(plgpu.load(smem["gates"].at[1], layout=WGMMA.reduce(1)), lower.shape)

        def times(left, right):
            """left @ right, both float32 in registers."""
            smem["high"][...], smem["low"][...] = _split(right)
            plgpu.commit_smem()
            high, low = _split(left)
            zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
            return add_products((zero, (high, low, high), (smem["high"], smem["high"], smem["low"])),
                                interpret=interpret)[0]

        x = jnp.where(row == col, 1.0, jnp.where((row ^ col) == 1, -lower, 0.0))
        for size in (2, 4, 8, 16, 32):
            differ = row ^ col
            off = jnp.where((differ >= size) & (differ < 2 * size), lower, 0.0)
            x = x - times(x, times(off, x))
        smem["out"][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out"], out_ref.at[batch, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((b_size, heads, chunks, CHUNK, CHUNK), jnp.bfloat16),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=2)), grid=(chunks, heads, b_size),
        grid_names=("chunk", "head", "batch"), compiler_params=plgpu.CompilerParams(approx_math=True), interpret=interpret,
    )(k, gates)


def delta_forward(q, k, v, inverse, gates, total, init, *, scale, split, stages=2, interpret=None):
    """Outputs and final state.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V] bf16, T a multiple of 64, K and V in {64, 128}.
      inverse: [B, H, N, 64, 64] from `chunk_inverses`; gates: [B, H, N, 2, 64]; total: [B, H, N] log2 decay of each chunk,
        or None without decay; init: float32 [B, H, K, V] or None.
      split: programs per head, each with its own value columns (independent in a delta rule).
    Returns: dict with o [B, T, H, V], state [B, H, K, V] float32.
    """
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = v.shape[-1], v.dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    operands = present(q=q, k=k, v=v, inverse=inverse, gates=gates, total=total, init=init)
    outs = {"o": jax.ShapeDtypeStruct(v.shape, dtype),
            "state": jax.ShapeDtypeStruct((b_size, heads, k_size, v_size), jnp.float32)}
    own = tile((n_wg, CHUNK, BLOCK), dtype)
    scratch = dict(q=tile((stages, CHUNK, k_size), dtype), k=tile((stages, CHUNK, k_size), dtype),
                   v=tile((stages, n_wg, CHUNK, BLOCK), dtype), inverse=tile((stages, CHUNK, CHUNK), dtype),
                   gates=plgpu.SMEM((stages, 2, CHUNK), jnp.float32), s16=tile((n_wg, k_size, BLOCK), dtype),
                   u=own, us=own)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        walk = Walk(chunks, 1, stages, False, 0)
        first_block = lax.axis_index("piece") * n_wg

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n].at[slot]) for n in ("k", "q")]
            pairs += [(gmem["v"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)], smem["v"].at[slot, w])
                      for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in ("inverse", "gates")]

        @pl.when(wg == n_wg)
        def _():
            walk.load(copies, full, empty)

        @pl.when(wg < n_wg)
        def _():
            plgpu.set_max_registers(232 if n_wg == 2 else 216, action="increase")
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            if init is not None:
                state = plgpu.load(gmem["init"].at[batch, head, :, cols], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            smem["s16"].at[wg][...] = state.astype(dtype)
            plgpu.commit_smem()

            def step(i, state):
                slot = walk.slot(i)
                here = pl.ds(i * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                q_tile, k_tile, s16 = smem["q"].at[slot], smem["k"].at[slot], smem["s16"].at[wg]
                u_tile = us_tile = smem["u"].at[wg]
                ks, qs, a = products((k_tile, s16), (q_tile, s16), (q_tile, k_tile.transpose(T_CONTRACT)))
                c_tile, c_row = smem["gates"].at[slot, 0], None
                if total is not None:
                    us_tile = smem["us"].at[wg]
                    tot = gmem["total"][batch, head, i]
                    c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1))
                    entering = rows(jnp.exp2(c_row), ks.shape)
                    ks, qs = ks * entering, qs * entering
                    state = state * jnp.exp2(tot)
                beta = rows(plgpu.load(smem["gates"].at[slot, 1], layout=WGMMA.reduce(1)), ks.shape)
                wanted = plgpu.load(smem["v"].at[slot, wg], layout=WGMMA).astype(jnp.float32)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the outputs of the last chunk left from us_tile
                us_tile[...] = ((wanted - ks) * beta).astype(dtype)
                plgpu.commit_smem()
                u, = products((smem["inverse"].at[slot], us_tile))
                u_tile[...] = u.astype(dtype)
                if total is not None:
                    us_tile[...] = (u * rows(jnp.exp2(tot - c_row), u.shape)).astype(dtype)
                plgpu.commit_smem()
                a = decayed_scores(a, c_row, c_tile if total is not None else None, False).astype(dtype)
                o, state = add_products((qs, a, u_tile), (state, k_tile.transpose(T_CONTRACT), us_tile),
                                        interpret=interpret)
                plgpu.barrier_arrive(empty.at[slot])
                s16[...] = state.astype(dtype)
                us_tile[...] = (o * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(us_tile, gmem["o"].at[batch, here, head, cols])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[batch, head, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    return launch(body, operands, outs, arrivals=4 + n_wg, consumers=n_wg, stages=stages, extra_scratch=(),
                  grid=(heads, split, b_size), scratch=scratch, interpret=interpret)
