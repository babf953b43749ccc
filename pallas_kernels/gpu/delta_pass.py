"""Mosaic GPU kernels (Hopper) for the two walks and the gradients of DeltaNet and the gated delta rule.

One head and one chunk of 64 tokens, c the in-chunk cumulative log2 decay, P_ij = 2^(c_i - c_j), S the entering state,
T = (I + diag(beta) M)^-1 with M = strictly lower (K K^T * P), see `delta_inverse`:
    U  = T diag(beta) (V - diag(2^c) K S)
    O  = scale (diag(2^c) Q S + lower(Q K^T * P) U)
    S <- 2^c_63 S + (diag(2^(c_63 - c)) K)^T U                                   `delta_forward`, chunk after chunk
Operands of all products on the way of values are fp16: U alternates in sign where keys look alike, and the sums of it
that are wanted show bf16's rounding eightfold. What fp16 lacks in range comes from powers of two, one for the values
of each chunk and one for the gradients (`value_units`, `grad_units`). Gates travel as one float32 array
[B, H, N, 3, 64]: c, beta, and factors, whose places have names below.

In a walk one warpgroup brings the tiles, turns them into fp16 in place and makes the scores Q K^T * P, a chunk ahead;
every other one owns 64 value columns of the state, and never waits for its neighbours. The compiler's own barriers
around every access to shared memory are off (`unsafe_no_auto_barriers`): `plgpu.commit_smem` stands where one is
needed. Every accumulator takes one product at a time, of stacked tiles where there would be two: ptxas serialises all
wgmma of a group where one accumulator is given twice.
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
HALF = jnp.float16
C, BETA, FACTORS = 0, 1, 2  # rows of the gates
GATE_SUMS = "passed", "read", "written", "kept"
UNIT, ONE, NEXT_UNITS, NEXT_ONE = range(4)  # a factor that makes units, one back, units of the next chunk, one of them
DO_UNIT, GRAD_ONE = 2, 3  # backwards: UNIT times the scale, and from a product of gradients and values back
OPTIONS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256, unsafe_no_auto_barriers=True)


def _either(shape, dtype, interpret):
    """A tile of `dtype` and one of fp16 in its memory; not so in the interpreter, which takes all stages for one."""
    pair = tile(shape, dtype), tile(shape, HALF)
    return pair if interpret else plgpu.RefUnion(*pair)


def _halve(source, target, factor=1.0):
    """A tile as one of fp16, times `factor`; they may be one memory."""
    parts = [pl.ds(b * BLOCK, BLOCK) for b in range(source.shape[1] // BLOCK)]
    read = [plgpu.load(source.at[:, part], layout=WGMMA).astype(jnp.float32) for part in parts]
    for part, x in zip(parts, read, strict=True):
        target.at[:, part][...] = (x * factor).astype(HALF)


def _feed(walk, copies, full, empty, ready, prepare):
    """The loading warpgroup: `copies(chunk, slot)` lists (source, destination) pairs, `prepare(slot)` works on them."""
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
        prepare(slot)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ready.at[slot])

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(empty.at[walk.slot(i - 1)])

            @pl.when(i - 1 + walk.stages < walk.steps)
            def _():
                load(i - 1 + walk.stages)

    plgpu.barrier_wait(empty.at[walk.slot(walk.steps - 1)])


def _launch(body, operands, outs, scratch, *, n_wg, stages, arrivals, grid, interpret):
    ring = [plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (arrivals, n_wg, 1)]
    run = plgpu.kernel(body, out_type=tuple(outs.values()), scratch_types=(scratch, *ring), grid=grid,
                       grid_names=("head", "piece", "batch"), num_threads=n_wg + 1, thread_name="wg",
                       compiler_params=OPTIONS, interpret=interpret)
    return dict(zip(outs, run(*operands.values()), strict=True))


def delta_forward(q, k, v, inverse, gates, init, *, decay, scale, pieces=1, split=1, save=False, stages=2,
                  interpret=None):
    """Outputs and final state, and where `save` what the backward pass needs; or, where q is None, states only.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V] bf16, T a multiple of 64, K and V in {64, 128}.
      inverse: fp16 [B, H, N, 64, 64] from `chunk_inverses`; gates: [B, H, N, 3, 64]; decay: whether c is not all zero.
      init: float32 [B, H, P, K, V], the state entering each of the `pieces` of T, or None for zero (P = 1).
      split: programs per head, each with its own value columns (independent in a delta rule).
    Returns: dict with o [B, T, H, V] and state [B, H, K, V] float32; if `save` also, fp16 in units, u [B, T, H, V] and
      the states entering the chunks, entering [B, H, N, K, V]. Where q is None: local and moves [B, H, P, K, V] float32
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
    own, squares = tile((n_wg, CHUNK, BLOCK), HALF), tile((stages, CHUNK, CHUNK), HALF)
    scratch = dict(k=_either((stages, CHUNK, k_size), dtype, interpret), v=tile((stages, n_wg, CHUNK, BLOCK), dtype),
                   inverse=squares, gates=plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
                   s16=tile((n_wg, k_size, BLOCK), HALF), us=own)
    if with_output:
        outs = {"o": jax.ShapeDtypeStruct(v.shape, dtype),
                "state": jax.ShapeDtypeStruct((b_size, heads, k_size, v_size), jnp.float32)}
        scratch |= dict(q=scratch["k"], a=squares, u=own, o=tile((n_wg, CHUNK, BLOCK), dtype))
    else:
        local = jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32)
        outs = {"local": local, "moves": local}
    if save:
        outs["u"] = jax.ShapeDtypeStruct(v.shape, HALF)
        outs["entering"] = jax.ShapeDtypeStruct((b_size, heads, chunks, k_size, v_size), HALF)

    def walk(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, ready = refs[len(names):]
        program, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        head, group, wg = lax.div(program, jnp.int32(groups)), lax.rem(program, jnp.int32(groups)), lax.axis_index("wg")
        walk = Walk(chunks, pieces, stages, False, piece)
        first_block = group * n_wg if with_output else 0

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, here, head], smem[n][0].at[slot]) for n in ("k", "q") if n in scratch]
            pairs += [(gmem["v"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)], smem["v"].at[slot, w])
                      for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in ("inverse", "gates")]

        def gate(slot, index):
            return plgpu.load(smem["gates"].at[slot, index], layout=WGMMA.reduce(1))

        def prepare(slot):
            for name in ("k", "q"):
                if name in scratch:
                    _halve(*(ref.at[slot] for ref in smem[name]))
            if with_output:
                plgpu.commit_smem()
                a, = products((smem["q"][1].at[slot], smem["k"][1].at[slot].transpose(T_CONTRACT)))
                c_row, c_tile = (gate(slot, C), smem["gates"].at[slot, C]) if decay else (None, None)
                smem["a"].at[slot][...] = decayed_scores(a, c_row, c_tile, False).astype(HALF)

        @pl.when(wg == n_wg)
        def _():
            _feed(walk, copies, full, empty, ready, prepare)

        @pl.when(wg < n_wg)
        def _():
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            factors = gmem["gates"].at[batch, head, :, FACTORS]
            if not with_output:  # the second program of a piece walks from the identity without values
                row = plgpu.broadcasted_iota(jnp.int32, (k_size, BLOCK), 0, layout=WGMMA)
                col = plgpu.broadcasted_iota(jnp.int32, (k_size, BLOCK), 1, layout=WGMMA)
                state = jnp.where((row == col + wg * BLOCK) & (group == 1), 1.0, 0.0)
            elif init is not None:
                state = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
                state = state * factors[walk.first, UNIT]
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            s16, us_tile = smem["s16"].at[wg], smem["us"].at[wg]
            s16[...] = state.astype(HALF)
            plgpu.commit_smem()

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(ready.at[slot])
                k_tile = smem["k"][1].at[slot]
                if save:
                    plgpu.copy_smem_to_gmem(s16, gmem["entering"].at[batch, head, chunk, :, cols])
                if with_output:
                    ks, qs = products((k_tile, s16), (smem["q"][1].at[slot], s16))
                else:
                    ks, = products((k_tile, s16))
                unit, next_units = (smem["gates"][slot, FACTORS, n] for n in (UNIT, NEXT_UNITS))
                if not with_output:  # a transition has no unit
                    unit, next_units = jnp.where(group == 0, unit, 0.0), jnp.where(group == 0, next_units, 1.0)
                wanted = plgpu.load(smem["v"].at[slot, wg], layout=WGMMA).astype(jnp.float32) * unit
                kept = next_units
                if decay:
                    c_row, last = gate(slot, C), smem["gates"][slot, C, CHUNK - 1]
                    from_start = rows(jnp.exp2(c_row), ks.shape)
                    ks = ks * -from_start
                    qs = qs * from_start if with_output else None
                    kept = kept * jnp.exp2(last)
                else:
                    ks = 0.0 - ks  # `wanted - ks` would negate ks before its wait: ptxas then serialises all products
                state = state * kept
                us_tile[...] = ((wanted + ks) * rows(gate(slot, BETA), ks.shape)).astype(HALF)
                plgpu.commit_smem()
                u, = products((smem["inverse"].at[slot], us_tile))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but `entering`; a barrier too: all have read `us`
                written = u * next_units
                us_tile[...] = (written * rows(jnp.exp2(last - c_row), u.shape) if decay else written).astype(HALF)
                write = state, k_tile.transpose(T_CONTRACT), us_tile
                if with_output:
                    u_tile = smem["u"].at[wg]
                    u_tile[...] = u.astype(HALF)
                    plgpu.commit_smem()
                    if save:
                        plgpu.copy_smem_to_gmem(u_tile, gmem["u"].at[batch, here, head, cols])
                    o, state = add_products((qs, smem["a"].at[slot], u_tile), write, interpret=interpret)
                    o = o * (smem["gates"][slot, FACTORS, ONE] * scale)
                    plgpu.wait_smem_to_gmem(int(save), wait_read_only=True)  # all but `u`
                    smem["o"].at[wg][...] = o.astype(dtype)
                else:
                    plgpu.commit_smem()
                    state, = add_products(write, interpret=interpret)
                s16[...] = state.astype(HALF)
                release(empty.at[slot])
                if with_output:
                    plgpu.copy_smem_to_gmem(smem["o"].at[wg], gmem["o"].at[batch, here, head, cols])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            one = factors[walk.first + walk.steps - 1, NEXT_ONE]
            state = state * (one if with_output else jnp.where(group == 0, one, 1.0))
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

    return _launch(walk, operands, outs, scratch, n_wg=n_wg, stages=stages, arrivals=3 + with_output + n_wg,
                   grid=(heads * groups, pieces, b_size), interpret=interpret)


def delta_reverse(q, k, do, inverse, gates, init, *, decay, pieces=1, split=1, emit="output", stages=2, interpret=None):
    """dV, in a walk from the end of the sequence with R, the gradient of the state, in registers.

    With T as above and R the gradient of the state leaving the chunk:
      dV  = diag(beta) T^T (A^T dO + diag(2^(c_63 - c)) K R),    A = scale lower(Q K^T * P)
      R  <- 2^c_63 R + scale (diag(2^c) Q)^T dO - (diag(2^c) K)^T dV
    The decay of the first token is left out of both products and applied to their sum: alone it may be beyond fp16.

    Args: q, k, do [B, T, H, D]; init float32 [B, H, P, D, D], R of the last chunk of each piece, or None for zero;
      emit: "output", or "state" for nothing but `state`; the rest as `delta_forward`.
    Returns: dict with state float32 [B, H, P, D, D], R entering each piece from its first chunk; dv; and, times
      `grad_units`, fp16, minus_dv and leaving [B, H, N, D, D] = R of every chunk.
    """
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = do.shape[-1], k.dtype
    chunks = t_size // CHUNK
    n_wg = v_size // BLOCK // split
    with_output = emit == "output"
    operands = present(q=q, k=k, do=do, inverse=inverse, gates=gates, init=init)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32)}
    squares = tile((stages, CHUNK, CHUNK), HALF)
    first, second = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
    scratch = dict(qk=_either((stages, 2 * CHUNK, k_size), dtype, interpret),
                   do=_either((stages, n_wg, CHUNK, BLOCK), dtype, interpret),
                   pair=tile((n_wg, 2 * CHUNK, BLOCK), HALF), r16=tile((n_wg, k_size, BLOCK), HALF), inverse=squares,
                   a=squares, gates=plgpu.SMEM((stages, 3, CHUNK), jnp.float32))
    if with_output:
        outs |= {"dv": jax.ShapeDtypeStruct(do.shape, dtype), "minus_dv": jax.ShapeDtypeStruct(do.shape, HALF),
                 "leaving": jax.ShapeDtypeStruct((b_size, heads, chunks, k_size, v_size), HALF)}
        scratch |= {name: tile((n_wg, CHUNK, BLOCK), outs[name].dtype) for name in ("dv", "minus_dv")}

    def walk_back(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, ready = refs[len(names):]
        program, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        head, group, wg = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split)), lax.axis_index("wg")
        walk = Walk(chunks, pieces, stages, True, piece)
        first_block = group * n_wg

        def copies(chunk, slot):
            here = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[name].at[batch, here, head], smem["qk"][0].at[slot, half])
                     for name, half in (("q", first), ("k", second))]
            pairs += [(gmem["do"].at[batch, here, head, pl.ds((first_block + w) * BLOCK, BLOCK)],
                       smem["do"][0].at[slot, w]) for w in range(n_wg)]
            return pairs + [(gmem[n].at[batch, head, chunk], smem[n].at[slot]) for n in ("inverse", "gates")]

        def gate(slot, index):
            return plgpu.load(smem["gates"].at[slot, index], layout=WGMMA.reduce(1))

        def prepare(slot):
            unit = smem["gates"][slot, FACTORS, DO_UNIT]
            for half in (first, second):
                _halve(*(ref.at[slot, half] for ref in smem["qk"]))
            for w in range(n_wg):
                _halve(*(ref.at[slot, w] for ref in smem["do"]), unit)
            plgpu.commit_smem()
            qk_tile = smem["qk"][1]
            a, = products((qk_tile.at[slot, second], qk_tile.at[slot, first].transpose(T_CONTRACT)))
            c_row, c_tile = (gate(slot, C), smem["gates"].at[slot, C]) if decay else (None, None)
            smem["a"].at[slot][...] = later_scores(a, c_row, c_tile).astype(HALF)

        @pl.when(wg == n_wg)
        def _():
            _feed(walk, copies, full, empty, ready, prepare)

        @pl.when(wg < n_wg)
        def _():
            cols = pl.ds((first_block + wg) * BLOCK, BLOCK)
            factors = gmem["gates"].at[batch, head, walk.first, FACTORS]
            if init is not None:
                r = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
                r = r * factors[UNIT]
            else:
                r = plgpu.layout_cast(jnp.zeros((k_size, BLOCK), jnp.float32), WGMMA)
            r16, pair = smem["r16"].at[wg], smem["pair"].at[wg]
            dos, du = pair.at[first], pair.at[second]
            r16[...] = r.astype(HALF)
            plgpu.commit_smem()

            def step(i, r):
                slot, chunk = walk.slot(i), walk.chunk(i)
                here = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(ready.at[slot])
                qk_tile, do_tile = smem["qk"][1].at[slot], smem["do"][1].at[slot, wg]
                if with_output:
                    plgpu.copy_smem_to_gmem(r16, gmem["leaving"].at[batch, head, chunk, :, cols])
                kr, = products((smem["qk"][1].at[slot, second], r16))
                out = plgpu.load(do_tile, layout=WGMMA)
                if decay:
                    c_row, last = gate(slot, C), smem["gates"][slot, C, CHUNK - 1]
                    kr = kr * rows(jnp.exp2(last - c_row), kr.shape)
                    first_c = smem["gates"][slot, C, 0]
                    from_start = rows(jnp.exp2(c_row - first_c), kr.shape)
                    out = (out.astype(jnp.float32) * from_start).astype(HALF)
                    r = r * jnp.exp2(last - first_c)
                dos[...] = out
                d_u, = add_products((kr, smem["a"].at[slot], do_tile), interpret=interpret)
                du[...] = d_u.astype(HALF)
                plgpu.commit_smem()
                dr, = products((smem["inverse"].at[slot].transpose(T_CONTRACT), du))
                minus = dr * -rows(gate(slot, BETA), dr.shape)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # all but `leaving`; a barrier too: all have read `du`
                du[...] = (minus * from_start if decay else minus).astype(HALF)
                if with_output:
                    smem["minus_dv"].at[wg][...] = minus.astype(HALF)
                    smem["dv"].at[wg][...] = (minus * -smem["gates"][slot, FACTORS, ONE]).astype(dtype)
                plgpu.commit_smem()
                if with_output:
                    for name in ("dv", "minus_dv"):
                        plgpu.copy_smem_to_gmem(smem[name].at[wg], gmem[name].at[batch, here, head, cols])
                r, = add_products((r, qk_tile.transpose(T_CONTRACT), pair), interpret=interpret)
                r = r * jnp.exp2(first_c) if decay else r  # the first token's decay may be beyond fp16
                if with_output:
                    plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # all but `dv` and `minus_dv`
                r16[...] = r.astype(HALF)
                release(empty.at[slot])
                return r

            r = lax.fori_loop(0, walk.steps, step, r)
            gmem["state"].at[batch, head, piece, :, cols][...] = r * factors[ONE]
            plgpu.wait_smem_to_gmem(0)

    return _launch(walk_back, operands, outs, scratch, n_wg=n_wg, stages=stages, arrivals=4 + n_wg,
                   grid=(heads * split, pieces, b_size), interpret=interpret)


def delta_gradients(q, k, do, u, minus_dv, entering, leaving, gates, *, decay, gate_sums, reflects, interpret=None):
    """dQ, dK and the row sums for the gates, all chunks in parallel.

    With S the state entering the chunk, R the gradient of the state leaving it, U and dV from the two walks:
      dA = scale lower(dO U^T * P),   G = -strictly lower(dV U^T * P)
      dQ = dA K + scale diag(2^c) dO S^T
      dK = [dA^T Q + diag(2^(c_63 - c)) U R^T + G^T K]  (as written)  +  [G K - diag(2^c) dV S^T]  (as erased with)
      dbeta = rowsum(dV * U) / beta^2
    A program makes 64 columns of dQ and dK of one chunk. The gradient of token t's natural log decay is the sum of
      passed_t = sum_{j < t <= i} (dA * Q K^T + G * K K^T)_ij,   read_i = (Q * dQ + K * dK)_i from S, over i >= t,
      written_j = (K * dK)_j from R, over j < t,                 kept = 2^c_63 <S, R>:
    terms that all carry the decay across t, since differences of larger ones would not be known where it is strong.
    Scores of dQ, what `passed` sums and, where beta `reflects`, scores of dK have two bf16 parts: against keys that
    look alike they cancel.

    Args: gates as for `delta_reverse`; u, minus_dv, entering, leaving fp16 from the
      walks. The sign of dV comes with it: negating its products here would make ptxas serialise all of them ("C7514").
      reflects: whether beta may exceed 1.
    Returns: dict with dq, dk; float32 dbeta [B, H, D/64, T], equal for the D/64 parts; and, if `gate_sums`, parts of
      GATE_SUMS of that shape, kept by channels of K instead of tokens.
    """
    b_size, t_size, heads, size = k.shape
    dtype = k.dtype
    chunks = t_size // CHUNK
    n = size // BLOCK
    operands = present(q=q, k=k, do=do, u=u, minus_dv=minus_dv, entering=entering, leaving=leaving, gates=gates)
    outs = {name: jax.ShapeDtypeStruct(k.shape, dtype) for name in ("dq", "dk")}
    sums = ("dbeta", *(GATE_SUMS if gate_sums else ()))
    outs |= {name: jax.ShapeDtypeStruct((b_size, heads, n, t_size), jnp.float32) for name in sums}
    wide = tile((CHUNK, size), HALF)
    scores = tile((2 * CHUNK, CHUNK), dtype)
    # Values, when spent, make room for low parts of scores and for sums, so that two programs share a processor.
    two_wide = tile((CHUNK, 2 * CHUNK), dtype)
    spent = {"do": (tile((CHUNK, size), dtype), wide, scores), "u": (wide, two_wide), "dv": (wide, two_wide)}
    scratch = {"entering": wide, "leaving": wide, "scores": scores, "qk": tile((2 * CHUNK, BLOCK), dtype),
               "gates": plgpu.SMEM((FACTORS, CHUNK), jnp.float32)}
    scratch |= {name: plgpu.RefUnion(*uses) for name, uses in spent.items()}

    def gradients(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, values_in, states_in = refs[len(names):]
        chunk, batch = lax.axis_index("chunk"), lax.axis_index("batch")
        column = lax.axis_index("column")
        head, part = lax.div(column, jnp.int32(n)), lax.rem(column, jnp.int32(n))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)
        first, second = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
        (do_in, do_tile, low), (u_tile, pairs), (dv_tile, ones) = (smem[name] for name in ("do", "u", "dv"))
        for name, ref in (("do", do_in), ("u", u_tile), ("minus_dv", dv_tile)):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head], ref, values_in)
        plgpu.copy_gmem_to_smem(gmem["gates"].at[batch, head, chunk, pl.ds(0, FACTORS)], smem["gates"], values_in)
        unit, one = (gmem["gates"][batch, head, chunk, FACTORS, n] for n in (DO_UNIT, GRAD_ONE))
        for name in ("entering", "leaving"):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk, mine], smem[name], states_in)
        for name, rows_of in (("q", first), ("k", second)):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, mine], smem["qk"].at[rows_of], states_in)

        def turned(ref):
            return ref.transpose(T_CONTRACT)

        def load(ref):
            return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)

        plgpu.barrier_wait(values_in)
        _halve(do_in, do_tile, unit)
        plgpu.commit_smem()
        da, g = products((do_tile, turned(u_tile)), (dv_tile, turned(u_tile)))
        c_tile = smem["gates"].at[C] if decay else None
        c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1)) if decay else None
        held, g = split_diagonal(g)
        weights = plgpu.layout_cast(jnp.ones((CHUNK, CHUNK), jnp.float32), WGMMA)
        weights = decayed_scores(weights, c_row, c_tile, False)
        da, g = da * weights, g * weights
        q_tile, k_tile = smem["qk"].at[first], smem["qk"].at[second]
        plgpu.barrier_wait(states_in)
        if gate_sums:
            scores_q, scores_k = products((q_tile, turned(k_tile)), (k_tile, turned(k_tile)))
            _, given = split_diagonal(da * scores_q + g * scores_k)
            given = two_parts(given, dtype)
        (da, da_low), (g, g_low) = two_parts(da, dtype), two_parts(g, dtype)
        smem["scores"].at[first][...], smem["scores"].at[second][...] = da, g
        beta = plgpu.load(smem["gates"].at[BETA], layout=WGMMA.reduce(1))
        gmem["dbeta"].at[batch, head, part, here][...] = held * -one / jnp.maximum(beta * beta, TINY)
        dq, written, erased = products((do_tile, turned(smem["entering"])), (u_tile, turned(smem["leaving"])),
                                       (dv_tile, turned(smem["entering"])))
        plgpu.commit_smem()  # a barrier: all have read the values
        low.at[first][...] = da_low
        if reflects:
            low.at[second][...] = g_low
        if decay:
            tot = smem["gates"][C, CHUNK - 1]
            from_start = rows(jnp.exp2(c_row), dq.shape)
            dq, erased, written = dq * from_start, erased * from_start, written * rows(jnp.exp2(tot - c_row), dq.shape)
        sums = ()
        if gate_sums:
            row, col = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA) for axis in (0, 1))
            triangle = jnp.where(row > col, 1.0, 0.0).astype(dtype)
            for half, x in zip((first, second), given, strict=True):
                pairs.at[:, half][...], ones.at[:, half][...] = x, triangle
            totals = {"read": jnp.sum(load(q_tile) * dq + load(k_tile) * erased, axis=1),
                      "written": jnp.sum(load(k_tile) * written, axis=1)}
            zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
            sums = ((zero, ones, turned(pairs)),)
        plgpu.commit_smem()

        def through(scores):
            return ((dq, scores.at[first], k_tile), (erased, scores.at[second], k_tile),
                    (written, turned(scores), smem["qk"]))

        dq, erased, written = add_products(*through(smem["scores"]), interpret=interpret)
        dq, *rest = add_products(*through(low)[: 3 if reflects else 1], *sums, interpret=interpret)
        if reflects:
            erased, written, *rest = rest
        if gate_sums:
            passed, = rest
            kept = 0.0
            for b in range(n):
                s, r = (load(smem[name].at[:, pl.ds(b * BLOCK, BLOCK)]) for name in ("entering", "leaving"))
                kept = kept + jnp.sum(s * r, axis=1)
            totals["kept"] = kept * jnp.exp2(tot) if decay else kept
            totals["passed"] = jnp.sum(jnp.where(row <= col, passed, 0.0), axis=1)
            for name in GATE_SUMS:
                gmem[name].at[batch, head, part, here][...] = totals[name] * one
        dq, dk = dq * one, (erased + written) * one
        plgpu.commit_smem()  # a barrier: all have read the scores
        results = smem["scores"].at[first], smem["scores"].at[second]
        results[0][...], results[1][...] = dq.astype(dtype), dk.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(results[0], gmem["dq"].at[batch, here, head, mine])
        plgpu.copy_smem_to_gmem(results[1], gmem["dk"].at[batch, here, head, mine])
        plgpu.wait_smem_to_gmem(0)

    got = plgpu.kernel(
        gradients, out_type=tuple(outs.values()),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=4), plgpu.Barrier(num_arrivals=4)),
        grid=(heads * n, chunks, b_size), grid_names=("column", "chunk", "batch"), interpret=interpret,
        compiler_params=OPTIONS,
    )(*operands.values())
    return dict(zip(outs, got, strict=True))
