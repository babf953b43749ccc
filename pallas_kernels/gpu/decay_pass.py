"""Mosaic GPU kernels (Hopper) behind the scalar-decay family: the decayed causal pass and its two-output form.

For one head, with x, y [T, K] and z [T, V] and in-chunk log2 decays c, the pass computes
    o_i = scale * sum_{j <= i} 2^(c_i - c_j) (x_i . y_j) z_j     (and the part of earlier chunks, through the state)
    S  <- 2^total S + sum_j 2^(total - c_j) y_j z_j^T            ([K, V], float32, once per chunk of 64 tokens)
The forward of linear attention is pass(q, k, v); its gradients are the same pass with the roles changed:
dq = pass(do, v, k), dv = reversed pass(k, q, do), dk = reversed pass(v, do, q), the last two over one shared state
(`decay_pass_pair`).  All exponents are differences <= 0, so nothing overflows.

mLSTM is the same with weights 2^(c_i - d_j): d holds the input gates too, and in the backward passes c or d the
normaliser, which is one more value channel of ones. What that channel adds is computed in float32: the sums of y (or z)
over earlier chunks are given as `norms`, its scores in the backward passes are a constant `delta` per query.

A program owns one (head, piece of T, batch) and walks its chunks with the state in registers; one warpgroup loads tiles
through TMA into a ring of stages, the others compute.
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
    columns,
    decayed_scores,
    launch,
    present,
    products,
    release,
    rows,
    split_diagonal,
    tile,
)


def decay_pass(x, y, z, c, total, init, u, *, scale, reverse, pieces, stages, d=None, floor=None, delta=None,
               norms=None, emit="output", save_every=0, interpret=None):
    """One pass over [B, T, H, D] tensors of bf16 or fp16, T a multiple of 64, K and V in {64, 128}.

    Args:
      x, y: [B, T, H, K] "query" and "key" (x is None when only states are wanted).
      z: [B, T, H, V] "value".
      c, total: float32 [B, H, N, 64] and [B, H, N], in-chunk cumulative log2 decay and its total per chunk, or None.
      init: float32 [B, H, P, K, V] state entering each of the P pieces, or None for zero.
      u: [B, T, H, V] or None; with it the row sums of o * u are returned as well, in float32, without what a token
        gives to itself.
      emit: "output" also writes the state leaving each piece; "state" writes nothing else, and skips the last piece.
      d: float32 [B, H, N, 64], the exponents of y and z where those are not c.
      floor: float32 [B, H, N, 64]; o_i is divided by max(|m_i|, floor_i), m_i being o_i for z = 1.
      delta: float32 [B, H, N, 64], subtracted from all scores x_i . y_j of row i.
      norms: the weighted sums of the tokens before each chunk; with `floor` those of y, in eight bf16 parts
        [B, H, N, 8, K]; with `delta` those of z, float32 [B, H, N, V].
      save_every: chunks of a span; without u, also write the state before every span, in the dtype of z (0 = never).
    Returns: dict with o [B, T, H, V], m [B, H, T] float32, state [B, H, P or P-1, K, V], saved [B, H, M, K, V] for M
      spans and, with u, r [B, H, V/64, T] (partial row sums) and entered [B, H, V/64, M, 64], the part of r that comes
      through the state in the first chunk of every span.
    """
    b_size, t_size, heads, k_size = y.shape
    v_size, dtype = z.shape[-1], z.dtype
    n_wg = v_size // BLOCK
    chunks = t_size // CHUNK
    with_output = emit == "output"
    n_pieces = pieces if with_output else pieces - 1
    piece_offset = 1 if reverse and not with_output else 0
    operands = present(x=x, y=y, z=z, c=c, total=total, init=init, u=u, d=d, floor=floor, delta=delta, norms=norms)
    columns_as = "c" if d is None else "d"
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, n_pieces, k_size, v_size), jnp.float32)}
    scratch = {"y": tile((stages, CHUNK, k_size), dtype), "z": tile((stages, n_wg, CHUNK, BLOCK), dtype)}
    if with_output:
        outs["o"] = jax.ShapeDtypeStruct(z.shape, dtype)
        scratch |= {"x": tile((stages, CHUNK, k_size), dtype), "o": tile((n_wg, CHUNK, BLOCK), dtype),
                    "s16": tile((n_wg, k_size, BLOCK), dtype)}
    if u is not None:
        outs["r"] = jax.ShapeDtypeStruct((b_size, heads, n_wg, t_size), jnp.float32)
        outs["entered"] = jax.ShapeDtypeStruct((b_size, heads, n_wg, pl.cdiv(chunks, save_every), CHUNK), jnp.float32)
        scratch |= {"u": tile((stages, n_wg, CHUNK, BLOCK), dtype), "r": plgpu.SMEM((n_wg, CHUNK), jnp.float32)}
    elif save_every:
        outs["saved"] = jax.ShapeDtypeStruct((b_size, heads, pl.cdiv(chunks, save_every), k_size, v_size), dtype)
    if c is not None:
        scratch["zs"] = tile((n_wg, CHUNK, BLOCK), dtype)
    vectors = list(present(c=c, d=d, floor=floor, delta=delta))
    scratch |= {name: plgpu.SMEM((stages, CHUNK), jnp.float32) for name in vectors}
    if floor is not None:
        outs["m"] = jax.ShapeDtypeStruct((b_size, heads, t_size), jnp.float32)
        scratch |= {"norms": tile((stages, 8, k_size), dtype), "m": plgpu.SMEM((CHUNK,), jnp.float32)}
    if delta is not None:
        scratch["norms"] = plgpu.SMEM((stages, n_wg, BLOCK), jnp.float32)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        out_piece = lax.axis_index("piece")
        piece = out_piece + piece_offset
        walk = Walk(chunks, pieces, stages, reverse, piece)

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n].at[slot]) for n in ("x", "y") if n in scratch]
            pairs += [(gmem[n].at[batch, here, head, pl.ds(w * BLOCK, BLOCK)], smem[n].at[slot, w])
                      for n in ("z", "u") if n in scratch for w in range(n_wg)]
            if delta is not None:
                pairs += [(gmem["norms"].at[batch, head, chunk, pl.ds(w * BLOCK, BLOCK)], smem["norms"].at[slot, w])
                          for w in range(n_wg)]
            whole = vectors + (["norms"] if floor is not None else [])
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in whole]

        @pl.when(wg == n_wg)
        def _():
            walk.load(copies, full, empty)

        @pl.when(wg < n_wg)
        def _():  # every compute warpgroup owns 64 value columns and never waits for another
            plgpu.set_max_registers(232 if n_wg == 2 else 216, action="increase")
            cols = pl.ds(wg * BLOCK, BLOCK)
            if init is not None:
                state = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            if with_output:
                smem["s16"].at[wg][...] = state.astype(dtype)
                plgpu.commit_smem()

            def u_dots(o, slot):
                return jnp.sum(o * plgpu.load(smem["u"].at[slot, wg], layout=WGMMA).astype(jnp.float32), axis=1)

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                if save_every and u is None:
                    @pl.when(lax.rem(chunk, jnp.int32(save_every)) == 0)
                    def _():
                        span = lax.div(chunk, jnp.int32(save_every))
                        gmem["saved"].at[batch, head, span, :, cols][...] = state.astype(dtype)
                plgpu.barrier_wait(full.at[slot])
                y_tile, z_tile = smem["y"].at[slot], smem["z"].at[slot, wg]
                z_state, c_row, c_tile = z_tile, None, None
                if c is not None:
                    c_tile, z_state = smem[columns_as].at[slot], smem["zs"].at[wg]
                    tot = gmem["total"][batch, head, chunk]
                    c_row = plgpu.load(smem["c"].at[slot], layout=WGMMA.reduce(1))
                    d_row = c_row if d is None else plgpu.load(c_tile, layout=WGMMA.reduce(1))
                    zs = plgpu.load(z_tile, layout=WGMMA).astype(jnp.float32)
                    z_state[...] = (zs * rows(jnp.exp2(tot - d_row), zs.shape)).astype(dtype)
                    plgpu.commit_smem()
                    state = state * jnp.exp2(tot)
                if not with_output:
                    state, = add_products((state, y_tile.transpose(T_CONTRACT), z_state), interpret=interpret)
                    release(empty.at[slot])
                    return state
                x_tile = smem["x"].at[slot]
                pairs = [(x_tile, y_tile.transpose(T_CONTRACT)), (x_tile, smem["s16"].at[wg])]
                if floor is not None:
                    pairs.append((x_tile, smem["norms"].at[slot].transpose(T_CONTRACT)))
                a, o, *earlier = products(*pairs)
                if delta is not None:
                    delta_row = plgpu.load(smem["delta"].at[slot], layout=WGMMA.reduce(1))
                    norm = plgpu.load(smem["norms"].at[slot, wg], layout=WGMMA.reduce(0))
                    a = a - rows(delta_row, a.shape)
                    o = o - rows(delta_row, o.shape) * columns(norm, o.shape)
                a = decayed_scores(a, c_row, c_tile, reverse)
                if floor is not None:
                    m = scale * (jnp.sum(a, axis=1) + jnp.exp2(c_row) * jnp.sum(earlier[0], axis=1))
                if u is not None:
                    own, a = split_diagonal(a)
                if c is not None:
                    o = o * rows(jnp.exp2(c_row), o.shape)
                if u is not None:
                    @pl.when(lax.rem(chunk, jnp.int32(save_every)) == 0)
                    def _():
                        span = lax.div(chunk, jnp.int32(save_every))
                        gmem["entered"].at[batch, head, wg, span][...] = scale * u_dots(o, slot)
                o, state = add_products((o, a.astype(dtype), z_tile), (state, y_tile.transpose(T_CONTRACT), z_state),
                                         interpret=interpret)
                if floor is None:
                    o = o * scale
                else:
                    least = plgpu.load(smem["floor"].at[slot], layout=WGMMA.reduce(1))
                    o = o * rows(scale / jnp.maximum(jnp.abs(m), least), o.shape)
                if u is not None:
                    r = u_dots(o, slot)
                    o = o + rows(own * scale, o.shape) * plgpu.load(z_tile, layout=WGMMA).astype(jnp.float32)
                release(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem["o"].at[wg][...] = o.astype(dtype)
                smem["s16"].at[wg][...] = state.astype(dtype)
                if u is not None:
                    smem["r"].at[wg][...] = r
                if floor is not None:  # every warpgroup has the same m
                    @pl.when(wg == 0)
                    def _():
                        smem["m"][...] = m
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["o"].at[wg], gmem["o"].at[batch, here, head, cols])
                if u is not None:
                    plgpu.copy_smem_to_gmem(smem["r"].at[wg], gmem["r"].at[batch, head, wg, here])
                if floor is not None:
                    @pl.when(wg == 0)
                    def _():
                        plgpu.copy_smem_to_gmem(smem["m"], gmem["m"].at[batch, head, here])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[batch, head, out_piece, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    arrivals = sum({"x": 1, "y": 1, "z": n_wg, "u": n_wg}.get(name, 0) for name in scratch) + len(vectors)
    arrivals += (floor is not None) + (delta is not None) * n_wg
    return launch(body, operands, outs, arrivals=arrivals, consumers=n_wg, stages=stages, extra_scratch=(),
                   grid=(heads, n_pieces, b_size), scratch=scratch, interpret=interpret)


def decay_pass_pair(q, k, v, do, c, total, init, saved, *, scale, pieces, d=None, delta=None, norms=None, save_every=0,
                    stages=2, interpret=None):
    """Gradients of keys and values in one walk from the end of the sequence, with R = sum of decayed q do^T as state.

    dv_j = scale * sum_{i >= j} 2^(c_j - c_i) (k_j . q_i) do_i
    dk_j = scale * sum_{i >= j} 2^(c_j - c_i) (v_j . do_i) q_i
    with c the *exclusive* in-chunk log2 decay counted from the chunk's end. One compute warpgroup makes dv, the other
    dk, and each owns one block of 64 rows of R (the first owns all of it when K is 64); bf16 R is shared through SMEM.

    Args: as `decay_pass`, with d the exponents of q and do; init float32 [B, H, P, K, V] is R entering each piece from
      its end; saved are the states S that the forward pass saved every `save_every` chunks, or None; delta is
      subtracted from the scores v_j . do_i of column i, norms float32 [B, H, N, K] are the sums of delta * q over the
      tokens behind each chunk.
    Returns: dict with dk, dv, state [B, H, P, K, V] and, where `saved` is given, r [B, H, T] = sum over K of k * dk but
      for what a token gives to itself, and f [B, H, M, K], the sums over V of S * R for what passes the first chunk of
      every span; where `delta` is given, own and qk [B, H, T], whose product is what r lacks.
    """
    row_sums = saved is not None
    columns_as = "c" if d is None else "d"
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = v.shape[-1], v.dtype
    chunks = t_size // CHUNK
    n_blocks = k_size // BLOCK
    operands = present(q=q, k=k, v=v, do=do, c=c, total=total, init=init, saved=saved, d=d, delta=delta, norms=norms)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32),
            "dk": jax.ShapeDtypeStruct(k.shape, dtype), "dv": jax.ShapeDtypeStruct(v.shape, dtype)}
    sizes = {"q": k_size, "k": k_size, "v": v_size, "do": v_size}
    scratch = {name: tile((stages, CHUNK, size), dtype) for name, size in sizes.items()}
    scratch |= {"dk": tile((CHUNK, k_size), dtype), "dv": tile((CHUNK, v_size), dtype),
                "s16": tile((k_size, v_size), dtype)}
    if row_sums:
        outs["r"] = jax.ShapeDtypeStruct((b_size, heads, t_size), jnp.float32)
        outs["f"] = jax.ShapeDtypeStruct(saved.shape[:4], jnp.float32)
        scratch["r"] = plgpu.SMEM((CHUNK,), jnp.float32)
    if c is not None:
        scratch["qs"] = tile((n_blocks, CHUNK, BLOCK), dtype)
    vectors = present(c=c, d=d, delta=delta, norms=norms)
    scratch |= {name: plgpu.SMEM((stages, x.shape[-1]), jnp.float32) for name, x in vectors.items()}
    if delta is not None:
        for name in ("own", "qk"):
            outs[name] = jax.ShapeDtypeStruct((b_size, heads, t_size), jnp.float32)
            scratch[name] = plgpu.SMEM((CHUNK,), jnp.float32)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, written, free = refs[len(names):]
        head, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        wg = lax.axis_index("wg")
        walk = Walk(chunks, pieces, stages, True, piece)

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n].at[slot]) for n in sizes]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in vectors]

        @pl.when(wg == 2)
        def _():
            walk.load(copies, full, empty)

        def compute(me, out, left, right, other, transposed):
            """The warpgroup that makes `out` = scores(left, right) @ other + left @ (R or R^T)."""
            plgpu.set_max_registers(232, action="increase")
            owns_state = me < n_blocks
            block = pl.ds(me * BLOCK, BLOCK)
            state = ()
            if owns_state:
                if init is not None:
                    state = plgpu.load(gmem["init"].at[batch, head, piece, block], layout=WGMMA, optimized=False)
                else:
                    state = plgpu.layout_cast(jnp.zeros((BLOCK, v_size), jnp.float32), WGMMA)
                smem["s16"].at[block][...] = state.astype(dtype)
                plgpu.commit_smem()
            plgpu.barrier_arrive(written)

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                c_row = c_tile = None
                if c is not None:
                    c_tile = smem[columns_as].at[slot]
                    c_row = plgpu.load(smem["c"].at[slot], layout=WGMMA.reduce(1))
                    d_row = c_row if d is None else plgpu.load(c_tile, layout=WGMMA.reduce(1))
                if owns_state:
                    q_state = smem["q"].at[slot, :, block]
                    if c is not None:
                        tot = gmem["total"][batch, head, chunk]
                        qs = plgpu.load(q_state, layout=WGMMA).astype(jnp.float32)
                        q_state = smem["qs"].at[wg]
                        q_state[...] = (qs * rows(jnp.exp2(tot - d_row), qs.shape)).astype(dtype)
                        plgpu.commit_smem()
                        state = state * jnp.exp2(tot)
                if owns_state and row_sums:
                    @pl.when(lax.rem(chunk, jnp.int32(save_every)) == 0)
                    def _():
                        place = batch, head, lax.div(chunk, jnp.int32(save_every)), block
                        s = plgpu.load(gmem["saved"].at[place], layout=WGMMA, optimized=False).astype(jnp.float32)
                        gmem["f"].at[place][...] = jnp.sum(s * state, axis=1)
                plgpu.barrier_wait(written)
                s16 = smem["s16"].transpose(T_CONTRACT) if transposed else smem["s16"]
                a, o = products((smem[left].at[slot], smem[right].at[slot].transpose(T_CONTRACT)),
                                 (smem[left].at[slot], s16))
                plgpu.barrier_arrive(free)
                if out == "dv" and delta is not None:
                    qk, _ = split_diagonal(a)
                if out == "dk" and delta is not None:
                    a = a - columns(plgpu.load(smem["delta"].at[slot], layout=WGMMA.reduce(0)), a.shape)
                    o = o - columns(plgpu.load(smem["norms"].at[slot], layout=WGMMA.reduce(0)), o.shape)
                a = decayed_scores(a, c_row, c_tile, True)
                if out == "dk" and row_sums:
                    own, a = split_diagonal(a)
                if c is not None:
                    o = o * rows(jnp.exp2(c_row), o.shape)
                terms = [(o, a.astype(dtype), smem[other].at[slot])]
                if owns_state:
                    terms.append((state, q_state.transpose(T_CONTRACT), smem["do"].at[slot]))
                o, *state = add_products(*terms, interpret=interpret)
                state = state[0] if owns_state else ()
                o = o * scale
                if out == "dk" and row_sums:
                    r = jnp.sum(o * plgpu.load(smem["k"].at[slot], layout=WGMMA).astype(jnp.float32), axis=1)
                    self_given = plgpu.load(smem[other].at[slot], layout=WGMMA).astype(jnp.float32)
                    own = own * scale
                    o = o + rows(own, o.shape) * self_given
                release(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem[out][...] = o.astype(dtype)
                plgpu.barrier_wait(free)  # both are done reading R of this chunk
                if owns_state:
                    smem["s16"].at[block][...] = state.astype(dtype)
                if out == "dk" and row_sums:
                    smem["r"][...] = r
                if delta is not None:
                    extra, vector = ("qk", qk) if out == "dv" else ("own", own)
                    smem[extra][...] = vector
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.copy_smem_to_gmem(smem[out], gmem[out].at[batch, here, head])
                if out == "dk" and row_sums:
                    plgpu.copy_smem_to_gmem(smem["r"], gmem["r"].at[batch, head, here])
                if delta is not None:
                    plgpu.copy_smem_to_gmem(smem[extra], gmem[extra].at[batch, head, here])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            plgpu.barrier_wait(written)
            if owns_state:
                gmem["state"].at[batch, head, piece, block][...] = state
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def _():
            compute(0, "dv", "k", "q", "do", transposed=False)

        @pl.when(wg == 1)
        def _():
            compute(1, "dk", "v", "do", "q", transposed=True)

    extra = (plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=2))
    return launch(body, operands, outs, arrivals=4 + len(vectors), consumers=2, stages=stages, extra_scratch=extra,
                   grid=(heads, pieces, b_size), scratch=scratch, interpret=interpret)
