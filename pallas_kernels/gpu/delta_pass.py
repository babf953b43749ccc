"""Mosaic GPU kernels (Hopper) for the two walks and the gradients of DeltaNet and the gated delta rule.

One head and one chunk of 64 tokens, c the in-chunk cumulative log2 decay, P_ij = 2^(c_i - c_j), S the entering state,
T = (I + diag(beta) M)^-1 with M = strictly lower (K K^T * P), see `delta_inverse`:
    U  = T diag(beta) (V - diag(2^c) K S)
    O  = scale (diag(2^c) Q S + lower(Q K^T * P) U)
    S <- 2^c_63 S + (diag(2^(c_63 - c)) K)^T U                                   `delta_forward`, chunk after chunk
Gates travel as one float32 array [B, H, N, 2, 64]: c and beta.

In a walk one warpgroup brings the tiles and makes the scores Q K^T * P while the others begin the chunk; each of those
owns 64 value columns of the state, and never waits for its neighbours. The compiler's own barriers around every access
to shared memory are off (`unsafe_no_auto_barriers`): `plgpu.commit_smem` stands where one is needed. Every accumulator
takes one product at a time, of stacked tiles where there would be two: ptxas serialises all wgmma of a group where one
accumulator is given twice.
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
    present,
    products,
    release,
    rows,
    split_diagonal,
    tile,
    two_parts,
)

TINY = 1e-36  # makes 0 / beta^2 a 0 where beta is 0
OPTIONS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256, unsafe_no_auto_barriers=True)


def _feed(walk, copies, smem, full, empty, scores, halved, scored):
    """The loading warpgroup: `copies(chunk, slot)` lists (source, destination) pairs, `scores(slot)` makes a tile.

    T arrives in fp16, but its products have bf16 operands: two bf16 tiles, whose sum it is, take its place.
    """
    def load(i):
        slot = walk.slot(i)
        for src, dst in copies(walk.chunk(i), slot):
            plgpu.copy_gmem_to_smem(src, dst, full.at[slot])

    @pl.loop(0, jnp.minimum(walk.stages, walk.steps))
    def _(i):
        load(i)

    @pl.loop(0, walk.steps)
    def _(i):
        slot = walk.slot(i)
        plgpu.barrier_wait(full.at[slot])
        inverse = plgpu.load(smem["inverse"].at[slot], layout=WGMMA).astype(jnp.float32)
        smem["t_high"][...], smem["t_low"][...] = two_parts(inverse, smem["t_high"].dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(halved)
        if scores is not None:
            scores(slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scored)
        plgpu.barrier_wait(empty.at[slot])

        @pl.when(i + walk.stages < walk.steps)
        def _():
            load(i + walk.stages)


def _launch(body, operands, outs, scratch, *, n_wg, stages, arrivals, grid, interpret):
    ring = [plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (arrivals, n_wg)]
    ring += [plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=1)]
    run = plgpu.kernel(body, out_type=tuple(outs.values()), scratch_types=(scratch, *ring), grid=grid,
                       grid_names=("head", "piece", "batch"), num_threads=n_wg + 1, thread_name="wg",
                       compiler_params=OPTIONS, interpret=interpret)
    return dict(zip(outs, run(*operands.values()), strict=True))


def delta_forward(q, k, v, inverse, gates, init, *, decay, scale, pieces=1, split=1, save=False, stages=2,
                  interpret=None):
    """Outputs and final state, and where `save` what the backward pass needs; or, where q is None, states only.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V] bf16, T a multiple of 64, K and V in {64, 128}.
      inverse: fp16 [B, H, N, 64, 64] from `chunk_inverses`; gates: [B, H, N, 2, 64]; decay: whether c is not all zero.
      init: float32 [B, H, P, K, V], the state entering each of the `pieces` of T, or None for zero (P = 1).
      split: programs per head, each with its own value columns (independent in a delta rule).
    Returns: dict with o [B, T, H, V] and state [B, H, K, V] float32; if `save` also u [B, T, H, V] and the states
      entering the chunks, entering [B, H, N, K, V] bf16. Where q is None: local and moves [B, H, P, K, V] float32
      for K = V, the state leaving each piece when it enters as zero, and the piece's transition, so that
      leaving = local + moves @ entering.
    """
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = v.shape[-1], v.dtype
    chunks = t_size // CHUNK
    with_output = q is not None
    groups = split if with_output else 2  # programs of a head and piece
    n_wg = v_size // BLOCK // split
    operands = present(q=q, k=k, v=v, inverse=inverse, gates=gates, init=init)
    own, square = tile((n_wg, CHUNK, BLOCK), dtype), tile((CHUNK, CHUNK), dtype)
    scratch = dict(k=tile((stages, CHUNK, k_size), dtype), v=tile((stages, n_wg, CHUNK, BLOCK), dtype),
                   inverse=tile((stages, CHUNK, CHUNK), jnp.float16), gates=plgpu.SMEM((stages, 2, CHUNK), jnp.float32),
                   s16=tile((n_wg, k_size, BLOCK), dtype), us=own, t_high=square, t_low=square)
    if with_output:
        outs = {"o": jax.ShapeDtypeStruct(v.shape, dtype),
                "state": jax.ShapeDtypeStruct((b_size, heads, k_size, v_size), jnp.float32)}
        scratch |= dict(q=scratch["k"], a=square, u=own, o=own)
    else:
        local = jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32)
        outs = {"local": local, "moves": local}
    if save:
        outs["u"] = jax.ShapeDtypeStruct(v.shape, dtype)
        outs["entering"] = jax.ShapeDtypeStruct((b_size, heads, chunks, k_size, v_size), dtype)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, halved, scored = refs[len(names):]
        program, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        head, group, wg = lax.div(program, jnp.int32(groups)), lax.rem(program, jnp.int32(groups)), lax.axis_index("wg")
        walk = Walk(chunks, pieces, stages, False, piece)
        first_block = group * n_wg if with_output else 0

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n].at[slot]) for n in ("k", "q") if n in scratch]
            pairs += [(gmem["v"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)], smem["v"].at[slot, w])
                      for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in ("inverse", "gates")]

        def gate(slot, index):
            return plgpu.load(smem["gates"].at[slot, index], layout=WGMMA.reduce(1))

        def scores(slot):
            a, = products((smem["q"].at[slot], smem["k"].at[slot].transpose(T_CONTRACT)))
            c_row, c_tile = (gate(slot, 0), smem["gates"].at[slot, 0]) if decay else (None, None)
            smem["a"][...] = decayed_scores(a, c_row, c_tile, False).astype(dtype)

        @pl.when(wg == n_wg)
        def _():
            _feed(walk, copies, smem, full, empty, scores if with_output else None, halved, scored)

        @pl.when(wg < n_wg)
        def _():
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            if not with_output:  # the second program of a piece walks from the identity without values
                row = plgpu.broadcasted_iota(jnp.int32, (k_size, BLOCK), 0, layout=WGMMA)
                col = plgpu.broadcasted_iota(jnp.int32, (k_size, BLOCK), 1, layout=WGMMA)
                state = jnp.where((row == col + wg * BLOCK) & (group == 1), 1.0, 0.0)
            elif init is not None:
                state = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            s16, us_tile = smem["s16"].at[wg], smem["us"].at[wg]
            s16[...] = state.astype(dtype)
            plgpu.commit_smem()

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                k_tile = smem["k"].at[slot]
                if save:
                    plgpu.copy_smem_to_gmem(s16, gmem["entering"].at[batch, head, chunk, :, cols])
                if with_output:
                    ks, qs = products((k_tile, s16), (smem["q"].at[slot], s16))
                else:
                    ks, = products((k_tile, s16))
                wanted = plgpu.load(smem["v"].at[slot, wg], layout=WGMMA).astype(jnp.float32)
                if not with_output:
                    wanted = wanted * (1 - group).astype(jnp.float32)
                if decay:
                    c_row, last = gate(slot, 0), smem["gates"][slot, 0, CHUNK - 1]
                    from_start = rows(jnp.exp2(c_row), ks.shape)
                    ks = ks * from_start
                    qs = qs * from_start if with_output else None
                    state = state * jnp.exp2(last)
                us_tile[...] = ((wanted - ks) * rows(gate(slot, 1), ks.shape)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(halved)
                u = sum(products((smem["t_high"], us_tile), (smem["t_low"], us_tile)))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but `entering`; a barrier too: all have read `us`
                us_tile[...] = (u * rows(jnp.exp2(last - c_row), u.shape) if decay else u).astype(dtype)
                write = state, k_tile.transpose(T_CONTRACT), us_tile
                if with_output:
                    u_tile = smem["u"].at[wg]
                    u_tile[...] = u.astype(dtype)
                    plgpu.commit_smem()
                    if save:
                        plgpu.copy_smem_to_gmem(u_tile, gmem["u"].at[batch, here, head, cols])
                    plgpu.barrier_wait(scored)
                    o, state = add_products((qs, smem["a"], u_tile), write, interpret=interpret)
                    plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)  # all but `u`
                    smem["o"].at[wg][...] = (o * scale).astype(dtype)
                else:
                    plgpu.commit_smem()
                    state, = add_products(write, interpret=interpret)
                s16[...] = state.astype(dtype)
                release(empty.at[slot])
                if with_output:
                    plgpu.copy_smem_to_gmem(smem["o"].at[wg], gmem["o"].at[batch, here, head, cols])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            if with_output:
                @pl.when(piece == pieces - 1)
                def _():
                    gmem["state"].at[batch, head, :, cols][...] = state
            else:
                for n, name in enumerate(outs):
                    @pl.when(group == n)
                    def _():
                        gmem[name].at[batch, head, piece, :, cols][...] = state  # noqa: B023
            plgpu.wait_smem_to_gmem(0)

    return _launch(body, operands, outs, scratch, n_wg=n_wg, stages=stages, arrivals=3 + with_output + n_wg,
                   grid=(heads * groups, pieces, b_size), interpret=interpret)


def delta_reverse(q, k, do, inverse, gates, init, *, decay, scale, pieces=1, split=1, emit="output", stages=2,
                  interpret=None):
    """dV, in a walk from the end of the sequence with R, the gradient of the state, in registers.

    With T as above and R the gradient of the state leaving the chunk:
      dV  = diag(beta) T^T (A^T dO + diag(2^(c_63 - c)) K R),    A = scale lower(Q K^T * P)
      R  <- 2^c_63 R + scale (diag(2^c) Q)^T dO - (diag(2^c) K)^T dV

    Args: q, k, do [B, T, H, D]; init float32 [B, H, P, D, D], R of the last chunk of each piece, or None for zero;
      emit: "output", or "state" for nothing but `state`; the rest as `delta_forward`.
    Returns: dict with state float32 [B, H, P, D, D], R entering each piece from its first chunk; dv; and leaving
      [B, H, N, D, D] bf16 = R of every chunk.
    """
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = do.shape[-1], k.dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    with_output = emit == "output"
    operands = present(q=q, k=k, do=do, inverse=inverse, gates=gates, init=init)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32)}
    if with_output:
        outs |= {"dv": jax.ShapeDtypeStruct(do.shape, dtype),
                 "leaving": jax.ShapeDtypeStruct((b_size, heads, chunks, k_size, v_size), dtype)}
    own, square = tile((n_wg, CHUNK, BLOCK), dtype), tile((CHUNK, CHUNK), dtype)
    first, second = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
    scratch = dict(qk=tile((stages, 2 * CHUNK, k_size), dtype), pair=tile((n_wg, 2 * CHUNK, BLOCK), dtype),
                   do=tile((stages, n_wg, CHUNK, BLOCK), dtype), inverse=tile((stages, CHUNK, CHUNK), jnp.float16),
                   a=square, t_high=square, t_low=square, gates=plgpu.SMEM((stages, 2, CHUNK), jnp.float32),
                   r16=tile((n_wg, k_size, BLOCK), dtype), dv=own)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, halved, scored = refs[len(names):]
        program, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        head, group, wg = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split)), lax.axis_index("wg")
        walk = Walk(chunks, pieces, stages, True, piece)
        first_block = group * n_wg

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[name].at[batch, here, head], smem["qk"].at[slot, half])
                     for name, half in (("q", first), ("k", second))]
            pairs += [(gmem["do"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)],
                       smem["do"].at[slot, w]) for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in ("inverse", "gates")]

        def gate(slot, index):
            return plgpu.load(smem["gates"].at[slot, index], layout=WGMMA.reduce(1))

        def scores(slot):
            a, = products((smem["qk"].at[slot, second], smem["qk"].at[slot, first].transpose(T_CONTRACT)))
            c_row, c_tile = (gate(slot, 0), smem["gates"].at[slot, 0]) if decay else (None, None)
            smem["a"][...] = (later_scores(a, c_row, c_tile) * scale).astype(dtype)

        @pl.when(wg == n_wg)
        def _():
            _feed(walk, copies, smem, full, empty, scores, halved, scored)

        @pl.when(wg < n_wg)
        def _():
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            if init is not None:
                r = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
            else:
                r = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            r16, dv, pair = (smem[name].at[wg] for name in ("r16", "dv", "pair"))
            dos, du = pair.at[first], pair.at[second]
            r16[...] = r.astype(dtype)
            plgpu.commit_smem()

            def step(i, r):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                qk_tile, do_tile = smem["qk"].at[slot], smem["do"].at[slot, wg]
                if with_output:
                    plgpu.copy_smem_to_gmem(r16, gmem["leaving"].at[batch, head, chunk, :, cols])
                kr, = products((smem["qk"].at[slot, second], r16))
                out = plgpu.load(do_tile, layout=WGMMA).astype(jnp.float32) * scale
                if decay:
                    c_row, last = gate(slot, 0), smem["gates"][slot, 0, CHUNK - 1]
                    kr = kr * rows(jnp.exp2(last - c_row), kr.shape)
                    from_start = rows(jnp.exp2(c_row), kr.shape)
                    out = out * from_start
                    r = r * jnp.exp2(last)
                dos[...] = out.astype(dtype)
                plgpu.barrier_wait(scored)
                d_u, = add_products((kr, smem["a"], do_tile), interpret=interpret)
                du[...] = d_u.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(halved)
                dr = sum(products(*((smem[name].transpose(T_CONTRACT), du) for name in ("t_high", "t_low"))))
                dr = dr * rows(gate(slot, 1), dr.shape)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but `leaving`; a barrier too: all have read `du`
                du[...] = (-dr * from_start if decay else -dr).astype(dtype)
                if with_output:
                    dv[...] = dr.astype(dtype)
                plgpu.commit_smem()
                if with_output:
                    plgpu.copy_smem_to_gmem(dv, gmem["dv"].at[batch, here, head, cols])
                r, = add_products((r, qk_tile.transpose(T_CONTRACT), pair), interpret=interpret)
                if with_output:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but `dv`
                r16[...] = r.astype(dtype)
                release(empty.at[slot])
                return r

            r = lax.fori_loop(0, walk.steps, step, r)
            gmem["state"].at[batch, head, piece, :, cols][...] = r
            plgpu.wait_smem_to_gmem(0)

    return _launch(body, operands, outs, scratch, n_wg=n_wg, stages=stages, arrivals=4 + n_wg,
                   grid=(heads * split, pieces, b_size), interpret=interpret)


def delta_gradients(q, k, do, u, dv, entering, leaving, gates, *, decay, gate_sums, scale, interpret=None):
    """dQ, dK and the row sums for the gates, all chunks in parallel.

    With S the state entering the chunk, R the gradient of the state leaving it, U and dV from the two walks:
      dA = scale lower(dO U^T * P),   G = -strictly lower(dV U^T * P)
      dQ = dA K + scale diag(2^c) dO S^T
      dK = [dA^T Q + diag(2^(c_63 - c)) U R^T + G^T K]  (as written)  +  [G K - diag(2^c) dV S^T]  (as erased with)
      dc = rowsum(Q * dQ + K * dK_erased - K * dK_written),   dbeta = rowsum(dV * U) / beta^2
    A program makes 64 columns of dQ and dK of one chunk.

    Returns: dict with dq, dk; float32 dbeta [B, H, D/64, T], equal for the D/64 parts; and, if `gate_sums`, partial
      sums of that shape: dc, and inner, whose sum over a chunk is <S', R> with S' the state leaving it.
    """
    b_size, t_size, heads, size = k.shape
    dtype = k.dtype
    chunks = t_size // CHUNK
    n = size // BLOCK
    operands = present(q=q, k=k, do=do, u=u, dv=dv, entering=entering, leaving=leaving, gates=gates)
    outs = {name: jax.ShapeDtypeStruct(k.shape, dtype) for name in ("dq", "dk")}
    sums = ("dbeta", "dc", "inner") if gate_sums else ("dbeta",)
    outs |= {name: jax.ShapeDtypeStruct((b_size, heads, n, t_size), jnp.float32) for name in sums}
    wide = tile((CHUNK, size), dtype)
    scratch = {name: wide for name in ("do", "u", "dv", "entering", "leaving")}
    scratch |= {"qk": tile((2 * CHUNK, BLOCK), dtype), "scores": tile((2 * CHUNK, CHUNK), dtype),
                "gates": plgpu.SMEM((2, CHUNK), jnp.float32)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, values_in, states_in = refs[len(names):]
        chunk, batch = lax.axis_index("chunk"), lax.axis_index("batch")
        column = lax.axis_index("column")
        head, part = lax.div(column, jnp.int32(n)), lax.rem(column, jnp.int32(n))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)
        first, second = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
        for name in ("do", "u", "dv"):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head], smem[name], values_in)
        plgpu.copy_gmem_to_smem(gmem["gates"].at[batch, head, chunk], smem["gates"], values_in)
        for name in ("entering", "leaving"):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk, mine], smem[name], states_in)
        for name, rows_of in (("q", first), ("k", second)):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, mine], smem["qk"].at[rows_of], states_in)

        def turned(name):
            return smem[name].transpose(T_CONTRACT)

        def load(ref):
            return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

        plgpu.barrier_wait(values_in)
        da, g = products((smem["do"], turned("u")), (smem["dv"], turned("u")))
        c_tile = smem["gates"].at[0] if decay else None
        c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
        own, da = split_diagonal(da)
        held, g = split_diagonal(g)
        ones = plgpu.layout_cast(jnp.ones((CHUNK, CHUNK), jnp.float32), WGMMA)
        weights = decayed_scores(ones, c_row, c_tile, False)
        own = own * scale
        smem["scores"].at[first][...] = (da * weights * scale).astype(dtype)
        smem["scores"].at[second][...] = (-g * weights).astype(dtype)
        plgpu.commit_smem()
        beta = plgpu.load(smem["gates"].at[1], layout=WGMMA.reduce(1))
        gmem["dbeta"].at[batch, head, part, here][...] = held / jnp.maximum(beta * beta, TINY)
        plgpu.barrier_wait(states_in)
        dq, written, erased = products((smem["do"], turned("entering")), (smem["u"], turned("leaving")),
                                       (smem["dv"], turned("entering")))
        dq, erased = dq * scale, -erased
        q_tile, k_tile = smem["qk"].at[first], smem["qk"].at[second]
        if decay:
            tot = smem["gates"][0, CHUNK - 1]
            from_start = rows(jnp.exp2(c_row), dq.shape)
            dq, erased, written = dq * from_start, erased * from_start, written * rows(jnp.exp2(tot - c_row), dq.shape)
        if gate_sums:
            inner = 0.0
            for b in range(n):
                s, r = (load(smem[name].at[:, pl.ds(b * BLOCK, BLOCK)]) for name in ("entering", "leaving"))
                inner = inner + jnp.sum(s * r, axis=1)
            inner = inner * jnp.exp2(tot) if decay else inner
            gmem["inner"].at[batch, head, part, here][...] = inner + jnp.sum(load(k_tile) * written, axis=1)
        dq, erased, written = add_products(
            (dq, smem["scores"].at[first], k_tile), (erased, smem["scores"].at[second], k_tile),
            (written, turned("scores"), smem["qk"]), interpret=interpret)
        q_mine, k_mine = load(q_tile), load(k_tile)
        if gate_sums:
            dc = jnp.sum(q_mine * dq, axis=1) + jnp.sum(k_mine * (erased - written), axis=1)
            gmem["dc"].at[batch, head, part, here][...] = dc
        own = rows(own, dq.shape)
        dq, written = dq + own * k_mine, written + own * q_mine
        plgpu.commit_smem()  # a barrier: all have read the scores
        results = smem["scores"].at[first], smem["scores"].at[second]
        results[0][...], results[1][...] = dq.astype(dtype), (erased + written).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results[0], gmem["dq"].at[batch, here, head, mine])
        plgpu.copy_smem_to_gmem(results[1], gmem["dk"].at[batch, here, head, mine])
        plgpu.wait_smem_to_gmem(0)

    got = plgpu.kernel(
        body, out_type=tuple(outs.values()),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=4)),
        grid=(heads * n, chunks, b_size), grid_names=("column", "chunk", "batch"), interpret=interpret,
        compiler_params=OPTIONS,
    )(*operands.values())
    return dict(zip(outs, got, strict=True))
