"""Mosaic GPU kernels (Hopper) for DeltaNet and the gated delta rule.

One head and one chunk of 64 tokens, c the in-chunk cumulative log2 decay, P_ij = 2^(c_i - c_j), S the entering state:
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
    later_scores,
    launch,
    present,
    products,
    rows,
    tile,
)

INVERSE_GROUP = 4  # chunks that one program of `chunk_inverses` inverts, a warpgroup each: 128 registers a thread


def chunk_inverses(k, gates, *, decay, interpret=None):
    """T [B, H, N, 64, 64] bf16 of every chunk of k [B, T, H, K], from gates [B, H, N, 2, 64].

    The inverse of the diagonal blocks of size 2b comes from those of size b: X <- X - X (diag(beta) M)_off X, with _off
    the lower left b x b blocks. Only inverses are multiplied, never powers of M. Operands are fp16: entries of T stay
    moderate for beta |k|^2 <= 2, and three more bits than bf16 keep the error below that of storing T.
    """
    b_size, t_size, heads, k_size = k.shape
    chunks = t_size // CHUNK
    scratch = dict(k=tile((INVERSE_GROUP, CHUNK, k_size), k.dtype),
                   gates=plgpu.SMEM((INVERSE_GROUP, 2, CHUNK), jnp.float32),
                   right=tile((INVERSE_GROUP, CHUNK, CHUNK), jnp.float16),
                   out=tile((INVERSE_GROUP, CHUNK, CHUNK), k.dtype))

    def body(k_ref, gates_ref, out_ref, smem, loaded):
        group, head, batch = lax.axis_index("group"), lax.axis_index("head"), lax.axis_index("batch")
        wg = lax.axis_index("wg")
        chunk = group * INVERSE_GROUP + wg

        @pl.when(chunk < chunks)
        def _():
            k_tile, gate_tile, right_tile, out = (smem[name].at[wg] for name in ("k", "gates", "right", "out"))
            plgpu.copy_gmem_to_smem(k_ref.at[batch, pl.ds(chunk * CHUNK, CHUNK), head], k_tile, loaded.at[wg])
            plgpu.copy_gmem_to_smem(gates_ref.at[batch, head, chunk], gate_tile, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            lower, = products((k_tile, k_tile.transpose(T_CONTRACT)))
            row = plgpu.broadcasted_iota(jnp.int32, lower.shape, 0, layout=WGMMA)
            col = plgpu.broadcasted_iota(jnp.int32, lower.shape, 1, layout=WGMMA)
            c_tile = smem["gates"].at[wg, 0] if decay else None
            c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
            lower = jnp.where(row > col, decayed_scores(lower, c_row, c_tile, False), 0.0)
            lower = lower * rows(plgpu.load(smem["gates"].at[wg, 1], layout=WGMMA.reduce(1)), lower.shape)

            def times(left, right):
                """left @ right, both float32 in registers."""
                right_tile[...] = right.astype(jnp.float16)
                plgpu.commit_smem()
                zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
                return add_products((zero, left.astype(jnp.float16), right_tile), interpret=interpret)[0]

            x = jnp.where(row == col, 1.0, jnp.where((row ^ col) == 1, -lower, 0.0))
            for size in (2, 4, 8, 16, 32):
                differ = row ^ col
                off = jnp.where((differ >= size) & (differ < 2 * size), lower, 0.0)
                x = x - times(x, times(off, x))
            out[...] = x.astype(k.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[batch, head, chunk])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((b_size, heads, chunks, CHUNK, CHUNK), k.dtype),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=2, num_barriers=INVERSE_GROUP)),
        grid=(pl.cdiv(chunks, INVERSE_GROUP), heads, b_size), grid_names=("group", "head", "batch"),
        num_threads=INVERSE_GROUP, thread_name="wg", compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(k, gates)


def delta_forward(q, k, v, inverse, gates, total, init, *, scale, split, stages=2, interpret=None):
    """Outputs and final state, or, where q is None, what the backward pass needs.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V] bf16, T a multiple of 64, K and V in {64, 128}.
      inverse: [B, H, N, 64, 64] from `chunk_inverses`; gates: [B, H, N, 2, 64]; total: [B, H, N] log2 decay of each
        chunk, or None without decay; init: float32 [B, H, K, V] or None.
      split: programs per head, each with its own value columns (independent in a delta rule).
    Returns: dict with state [B, H, K, V] float32 and o [B, T, H, V], or instead of o, u [B, T, H, V] and the states
      entering the chunks, entering [B, H, N, K, V] bf16.
    """
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = v.shape[-1], v.dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    with_output = q is not None
    operands = present(q=q, k=k, v=v, inverse=inverse, gates=gates, total=total, init=init)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, k_size, v_size), jnp.float32)}
    own = tile((n_wg, CHUNK, BLOCK), dtype)
    scratch = dict(k=tile((stages, CHUNK, k_size), dtype), v=tile((stages, n_wg, CHUNK, BLOCK), dtype),
                   inverse=tile((stages, CHUNK, CHUNK), dtype), gates=plgpu.SMEM((stages, 2, CHUNK), jnp.float32),
                   s16=tile((n_wg, k_size, BLOCK), dtype), u=own, us=own)
    if with_output:
        outs["o"] = jax.ShapeDtypeStruct(v.shape, dtype)
        scratch["q"] = scratch["k"]
    else:
        outs["u"] = jax.ShapeDtypeStruct(v.shape, dtype)
        outs["entering"] = jax.ShapeDtypeStruct((b_size, heads, chunks, k_size, v_size), dtype)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        walk = Walk(chunks, 1, stages, False, 0)
        first_block = lax.axis_index("piece") * n_wg

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n].at[slot]) for n in ("k", "q") if n in scratch]
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
                k_tile, s16 = smem["k"].at[slot], smem["s16"].at[wg]
                u_tile = us_tile = smem["u"].at[wg]
                if with_output:
                    q_tile = smem["q"].at[slot]
                    ks, qs, a = products((k_tile, s16), (q_tile, s16), (q_tile, k_tile.transpose(T_CONTRACT)))
                else:
                    plgpu.copy_smem_to_gmem(s16, gmem["entering"].at[batch, head, i, :, cols])
                    ks, = products((k_tile, s16))
                c_tile, c_row = smem["gates"].at[slot, 0], None
                if total is not None:
                    us_tile = smem["us"].at[wg]
                    tot = gmem["total"][batch, head, i]
                    c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1))
                    entering = rows(jnp.exp2(c_row), ks.shape)
                    ks = ks * entering
                    qs = qs * entering if with_output else None
                    state = state * jnp.exp2(tot)
                beta = rows(plgpu.load(smem["gates"].at[slot, 1], layout=WGMMA.reduce(1)), ks.shape)
                wanted = plgpu.load(smem["v"].at[slot, wg], layout=WGMMA).astype(jnp.float32)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk wrote has left shared memory
                us_tile[...] = ((wanted - ks) * beta).astype(dtype)
                plgpu.commit_smem()
                u, = products((smem["inverse"].at[slot], us_tile))
                u_tile[...] = u.astype(dtype)
                if total is not None:
                    us_tile[...] = (u * rows(jnp.exp2(tot - c_row), u.shape)).astype(dtype)
                plgpu.commit_smem()
                write = state, k_tile.transpose(T_CONTRACT), us_tile
                if with_output:
                    a = decayed_scores(a, c_row, c_tile if total is not None else None, False).astype(dtype)
                    o, state = add_products((qs, a, u_tile), write, interpret=interpret)
                else:
                    plgpu.copy_smem_to_gmem(u_tile, gmem["u"].at[batch, here, head, cols])
                    state, = add_products(write, interpret=interpret)
                plgpu.barrier_arrive(empty.at[slot])
                s16[...] = state.astype(dtype)
                if with_output:
                    us_tile[...] = (o * scale).astype(dtype)
                plgpu.commit_smem()
                if with_output:
                    plgpu.copy_smem_to_gmem(us_tile, gmem["o"].at[batch, here, head, cols])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[batch, head, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    return launch(body, operands, outs, arrivals=3 + with_output + n_wg, consumers=n_wg, stages=stages,
                  extra_scratch=(), grid=(heads, split, b_size), scratch=scratch, interpret=interpret)


def delta_backward(q, k, do, u, inverse, entering, gates, total, dfinal, *, scale, interpret=None):
    """All gradients, in one walk from the end of the sequence with R, the gradient of the state, in registers.

    With M, T, U, S as above and R the gradient of the state leaving the chunk:
      dU  = A^T dO + diag(2^(total - c)) K R,    A = scale lower(Q K^T * P)
      dR_ = T^T dU,   dV = diag(beta) dR_,   dbeta = rowsum(dR_ * U) / beta,   E = -diag(2^c) dV
      dA  = scale lower(dO U^T * P),   G = -strictly lower(dV U^T * P)
      dQ  = dA K + scale diag(2^c) dO S^T
      dK  = [dA^T Q + diag(2^(total - c)) U R^T + G^T K]   (as written)   + [G K + E S^T]   (as erased with)
      R  <- 2^total R + scale (diag(2^c) Q)^T dO + K^T E
      dc  = rowsum(Q * dQ + K * dK_erased - K * dK_written), and <S, R> at every chunk's start for the gradient of total
    Warpgroup w owns column block w of every tile and row block w of R; score matrices and R pass through SMEM.

    Args: q, k [B, T, H, D], do, u [B, T, H, D], entering [B, H, N, D, D], dfinal float32 [B, H, D, D] or None.
    Returns: dict with dq, dk, dv, partial row sums dbeta and dc [B, H, D/64, T], inner [B, H, N, D] = rowsum(S * R) and
      state [B, H, D, D], the gradient of the initial state.
    """
    b_size, t_size, heads, size = k.shape
    dtype = k.dtype
    chunks = t_size // CHUNK
    n = size // BLOCK
    decay = total is not None
    operands = present(q=q, k=k, do=do, u=u, inverse=inverse, entering=entering, gates=gates, total=total,
                       dfinal=dfinal)
    outs = {name: jax.ShapeDtypeStruct(k.shape, dtype) for name in ("dq", "dk", "dv")}
    outs |= {name: jax.ShapeDtypeStruct((b_size, heads, n, t_size), jnp.float32) for name in ("dbeta", "dc")}
    outs["inner"] = jax.ShapeDtypeStruct((b_size, heads, chunks, size), jnp.float32)
    outs["state"] = jax.ShapeDtypeStruct((b_size, heads, size, size), jnp.float32)
    stages = 2 if n == 1 else 1
    columns_of = ("q", "k", "do", "u")
    scratch = {name: tile((stages, n, CHUNK, BLOCK), dtype) for name in columns_of}
    scratch |= {name: tile((n, CHUNK, BLOCK), dtype) for name in ("du", "dv", "erase", "dos")}
    scratch |= {"inverse": tile((stages, CHUNK, CHUNK), dtype), "entering": tile((stages, n, n, BLOCK, BLOCK), dtype),
                "r16": tile((n, n, BLOCK, BLOCK), dtype), "da": tile((CHUNK, CHUNK), dtype),
                "g": tile((CHUNK, CHUNK), dtype), "gates": plgpu.SMEM((stages, 2, CHUNK), jnp.float32)}
    blocks = range(n)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, meet = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        walk = Walk(chunks, 1, stages, True, 0)

        def block(b):
            return pl.ds(b * BLOCK, BLOCK)

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[name].at[batch, here, head, block(b)], smem[name].at[slot, b])
                     for name in columns_of for b in blocks]
            pairs += [(gmem[name].at[batch, head, chunk], smem[name].at[slot]) for name in ("gates", "inverse")]
            states = gmem["entering"].at[batch, head, chunk]
            return pairs + [(states.at[block(a), block(b)], smem["entering"].at[slot, a, b])
                            for a in blocks for b in blocks]

        def together():
            """The compute warpgroups meet: what each wrote to shared memory before is visible to all after."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(meet)
            plgpu.barrier_wait(meet)

        def turned(ref):
            return ref.transpose(T_CONTRACT)

        @pl.when(wg == n)
        def _():
            walk.load(copies, full, empty)

        @pl.when(wg < n)
        def _():
            plgpu.set_max_registers(232 if n == 2 else 216, action="increase")
            # Block indices, own first; constants would do but cannot index an operand of an accumulating wgmma.
            turns = [lax.rem(wg + b, jnp.int32(n)) for b in blocks]
            if dfinal is not None:
                r = [plgpu.load(gmem["dfinal"].at[batch, head, block(wg), block(b)], layout=WGMMA, optimized=False)
                     for b in turns]
            else:
                r = [plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), jnp.float32), WGMMA) for b in turns]
            for b, x in zip(turns, r, strict=True):
                smem["r16"].at[wg, b][...] = x.astype(dtype)
            together()

            def step(i, r):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                t = {name: tuple(smem[name].at[slot, b] for b in turns) for name in columns_of}
                mine = {name: smem[name].at[slot, wg] for name in columns_of}
                du, dv, erase, dos = (smem[name].at[wg] for name in ("du", "dv", "erase", "dos"))
                c_tile = smem["gates"].at[slot, 0] if decay else None
                c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
                shape = (CHUNK, BLOCK)
                if decay:
                    tot = gmem["total"][batch, head, chunk]
                    from_start = jnp.exp2(c_row)
                    to_end = jnp.exp2(tot - c_row)
                # gradient of what was written
                at, kr = products((t["k"], tuple(map(turned, t["q"]))),
                                  (t["k"], tuple(smem["r16"].at[b, wg] for b in turns)))
                at = later_scores(at, c_row, c_tile) * scale
                if decay:
                    kr = kr * rows(to_end, shape)
                d_u, = add_products((kr, at.astype(dtype), mine["do"]), interpret=interpret)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                du[...] = d_u.astype(dtype)
                out = plgpu.load(mine["do"], layout=WGMMA).astype(jnp.float32) * scale
                dos[...] = (out * rows(from_start, shape) if decay else out).astype(dtype)
                plgpu.commit_smem()
                dr, = products((turned(smem["inverse"].at[slot]), du))
                beta = plgpu.load(smem["gates"].at[slot, 1], layout=WGMMA.reduce(1))
                u_mine = plgpu.load(mine["u"], layout=WGMMA).astype(jnp.float32)
                gmem["dbeta"].at[batch, head, wg, here][...] = jnp.sum(dr * u_mine, axis=1) / beta
                dr = dr * rows(beta, shape)
                dv[...] = dr.astype(dtype)
                erase[...] = (-dr * rows(from_start, shape) if decay else -dr).astype(dtype)
                together()
                plgpu.copy_smem_to_gmem(dv, gmem["dv"].at[batch, here, head, block(wg)])

                @pl.when(wg == 0)
                def _():
                    da, = products((t["do"], tuple(map(turned, t["u"]))))
                    smem["da"][...] = (decayed_scores(da, c_row, c_tile, False) * scale).astype(dtype)

                @pl.when(wg == n - 1)
                def _():
                    g, = products((tuple(smem["dv"].at[b] for b in turns), tuple(map(turned, t["u"]))))
                    row = plgpu.broadcasted_iota(jnp.int32, g.shape, 0, layout=WGMMA)
                    col = plgpu.broadcasted_iota(jnp.int32, g.shape, 1, layout=WGMMA)
                    g = jnp.where(row > col, decayed_scores(g, c_row, c_tile, False), 0.0)
                    smem["g"][...] = (-g).astype(dtype)

                together()
                s_turned = tuple(turned(smem["entering"].at[slot, wg, b]) for b in turns)
                dq, written, erased = products(
                    (t["do"], s_turned),
                    (t["u"], tuple(turned(smem["r16"].at[wg, b]) for b in turns)),
                    (tuple(smem["erase"].at[b] for b in turns), s_turned))
                dq = dq * scale
                if decay:
                    dq, written = dq * rows(from_start, shape), written * rows(to_end, shape)
                    r = [x * jnp.exp2(tot) for x in r]
                da, g = smem["da"], smem["g"]
                grow = [(x, (turned(mine["q"]), turned(mine["k"])), (smem["dos"].at[b], smem["erase"].at[b]))
                        for b, x in zip(turns, r, strict=True)]
                dq, written, erased, *r = add_products(
                    (dq, da, mine["k"]), (written, (turned(da), turned(g)), (mine["q"], mine["k"])),
                    (erased, g, mine["k"]), *grow, interpret=interpret)
                inner = [jnp.sum(plgpu.load(smem["entering"].at[slot, wg, b], layout=WGMMA).astype(jnp.float32) * x,
                                 axis=1) for b, x in zip(turns, r, strict=True)]
                gmem["inner"].at[batch, head, chunk, block(wg)][...] = sum(inner[1:], inner[0])
                q_mine = plgpu.load(mine["q"], layout=WGMMA).astype(jnp.float32)
                k_mine = plgpu.load(mine["k"], layout=WGMMA).astype(jnp.float32)
                gmem["dc"].at[batch, head, wg, here][...] = jnp.sum(q_mine * dq + k_mine * (erased - written), axis=1)
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.barrier_arrive(meet)
                plgpu.barrier_wait(meet)  # all are done reading R of this chunk
                for b, x in zip(turns, r, strict=True):
                    smem["r16"].at[wg, b][...] = x.astype(dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                du[...] = dq.astype(dtype)
                dv[...] = (erased + written).astype(dtype)
                together()
                plgpu.copy_smem_to_gmem(du, gmem["dq"].at[batch, here, head, block(wg)])
                plgpu.copy_smem_to_gmem(dv, gmem["dk"].at[batch, here, head, block(wg)])
                return r

            r = lax.fori_loop(0, walk.steps, step, r)
            for b, x in zip(turns, r, strict=True):
                gmem["state"].at[batch, head, block(wg), block(b)][...] = x
            plgpu.wait_smem_to_gmem(0)

    return launch(body, operands, outs, arrivals=4 * n + 2 + n * n, consumers=n, stages=stages,
                  extra_scratch=(plgpu.Barrier(num_arrivals=n),), grid=(heads, 1, b_size), scratch=scratch,
                  interpret=interpret)
