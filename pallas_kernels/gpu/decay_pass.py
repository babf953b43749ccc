"""Mosaic GPU kernels (Hopper) behind the scalar-decay family: the decayed causal pass and its two-output form.

For one head, with x, y [T, K] and z [T, V] and in-chunk log2 decays c, the pass computes
    o_i = scale * sum_{j <= i} 2^(c_i - c_j) (x_i . y_j) z_j     (and the part of earlier chunks, through the state)
    S  <- 2^total S + sum_j 2^(total - c_j) y_j z_j^T            ([K, V], float32, once per chunk of 64 tokens)
The forward of linear attention is pass(q, k, v); its gradients are the same pass with the roles changed:
dq = pass(do, v, k), dv = reversed pass(k, q, do), dk = reversed pass(v, do, q), the last two over one shared state
(`decay_pass_pair`).  All exponents are differences <= 0, so nothing overflows.

A program owns one (head, piece of T, batch) and walks its chunks with the state in registers; one warpgroup loads tiles
through TMA into a ring of stages, the others compute.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
BLOCK = 64  # rows or columns of the state that one warpgroup owns
WGMMA = plgpu.Layout.WGMMA
T_CONTRACT = (1, 0)  # transpose of a shared-memory tile, free for wgmma


def _tile(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


# The casts pin layouts that the compiler would otherwise search for, at worst for minutes.
def _rows(vector, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), WGMMA)


def _columns(vector, shape):
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [1]), WGMMA)


def _add_products(*terms, interpret):
    """[acc + a @ b for (acc, a, b) in terms], all products in flight together."""
    def onto(refs):
        for ref, (_, a, b) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    def one(acc, a, b):
        if isinstance(a, jax.Array):
            return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return acc + _products((a, b))[0]

    if interpret:  # the interpreter knows neither initialised accumulators nor operands in registers
        return [one(*term) for term in terms]
    return pl.run_state(onto)([plgpu.ACC.init(acc) for acc, _, _ in terms])


def _products(*pairs):
    """[a @ b for (a, b) in pairs] of shared-memory tiles, all in flight together."""
    def fresh(*refs):
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b)
        return [ref[...] for ref in refs]

    return pl.run_scoped(fresh, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def _decayed_scores(a, c_row, c_ref, reverse):
    """Scores [64, 64] of a chunk against itself: masked, and decayed where `c_ref` holds the chunk's log2 decays."""
    row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=WGMMA)
    col = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=WGMMA)
    keep = row <= col if reverse else row >= col
    if c_ref is None:
        return jnp.where(keep, a, 0.0)
    gap = _rows(c_row, a.shape) - _columns(plgpu.load(c_ref, layout=WGMMA.reduce(0)), a.shape)
    return a * jnp.exp2(jnp.where(keep, gap, -jnp.inf))  # mask the exponent: where it is dropped it may be large


class _Walk:
    """Chunks of one program: which ones, in which order, and the ring of stages they arrive in."""

    def __init__(self, chunks, pieces, stages, reverse, piece):
        self.stages, self.reverse = stages, reverse
        per_piece = pl.cdiv(chunks, pieces)
        self.first = piece * per_piece
        self.steps = jnp.minimum(chunks - self.first, per_piece)

    def chunk(self, i):
        return self.first + (self.steps - 1 - i if self.reverse else i)

    def slot(self, i):
        return lax.rem(i, jnp.int32(self.stages))

    def load(self, copies, full, empty):
        """The loading warpgroup: `copies(chunk, slot)` lists (source, destination) pairs."""
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, self.steps)
        def _(i):
            slot = self.slot(i)

            @pl.when(i >= self.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            for src, dst in copies(self.chunk(i), slot):
                plgpu.copy_gmem_to_smem(src, dst, full.at[slot])

        @pl.loop(jnp.maximum(self.steps - self.stages, 0), self.steps)
        def _(i):  # leave no barrier phase unobserved
            plgpu.barrier_wait(empty.at[self.slot(i)])


def _launch(body, operands, outs, *, arrivals, consumers, stages, grid, extra_scratch, scratch, interpret):
    run = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
                       plgpu.Barrier(num_arrivals=consumers, num_barriers=stages), *extra_scratch),
        grid=grid,
        grid_names=("head", "piece", "batch"),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return dict(zip(outs, run(*operands.values()), strict=True))


def _present(**arrays):
    return {name: a for name, a in arrays.items() if a is not None}


def decay_pass(x, y, z, c, total, init, u, *, scale, reverse, pieces, stages, emit="output", save_every=0,
               interpret=None):
    """One pass over [B, T, H, D] tensors of bf16 or fp16, T a multiple of 64, K and V in {64, 128}.

    Args:
      x, y: [B, T, H, K] "query" and "key" (x is None when only states are wanted).
      z: [B, T, H, V] "value".
      c, total: float32 [B, H, N, 64] and [B, H, N], in-chunk cumulative log2 decay and its total per chunk, or None.
      init: float32 [B, H, P, K, V] state entering each of the P pieces, or None for zero.
      u: [B, T, H, V] or None; with it the row sums of o * u are returned as well, in float32.
      emit: "output" also writes the state leaving each piece; "state" writes nothing else, and skips the last piece.
      save_every: also write the state after every so many chunks, in the dtype of z (0 = never).
    Returns: dict with o [B, T, H, V], r [B, H, V/64, T] (partial row sums), state [B, H, P or P-1, K, V],
      saved [B, H, N // save_every, K, V].
    """
    b_size, t_size, heads, k_size = y.shape
    v_size, dtype = z.shape[-1], z.dtype
    n_wg = v_size // BLOCK
    chunks = t_size // CHUNK
    with_output = emit == "output"
    n_pieces = pieces if with_output else pieces - 1
    piece_offset = 1 if reverse and not with_output else 0
    operands = _present(x=x, y=y, z=z, c=c, total=total, init=init, u=u)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, n_pieces, k_size, v_size), jnp.float32)}
    scratch = {"y": _tile((stages, CHUNK, k_size), dtype), "z": _tile((stages, n_wg, CHUNK, BLOCK), dtype)}
    if with_output:
        outs["o"] = jax.ShapeDtypeStruct(z.shape, dtype)
        scratch |= {"x": _tile((stages, CHUNK, k_size), dtype), "o": _tile((n_wg, CHUNK, BLOCK), dtype),
                    "s16": _tile((n_wg, k_size, BLOCK), dtype)}
    if u is not None:
        outs["r"] = jax.ShapeDtypeStruct((b_size, heads, n_wg, t_size), jnp.float32)
        scratch |= {"u": _tile((stages, n_wg, CHUNK, BLOCK), dtype), "r": plgpu.SMEM((n_wg, CHUNK), jnp.float32)}
    if save_every:
        outs["saved"] = jax.ShapeDtypeStruct((b_size, heads, max(1, chunks // save_every), k_size, v_size), dtype)
    if c is not None:
        scratch |= {"c": plgpu.SMEM((stages, CHUNK), jnp.float32), "zs": _tile((n_wg, CHUNK, BLOCK), dtype)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
        out_piece = lax.axis_index("piece")
        piece = out_piece + piece_offset
        walk = _Walk(chunks, pieces, stages, reverse, piece)

        def copies(chunk, slot):
            rows = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, rows, head], smem[n].at[slot]) for n in ("x", "y") if n in scratch]
            pairs += [(gmem[n].at[batch, rows, head, pl.ds(w * BLOCK, BLOCK)], smem[n].at[slot, w])
                      for n in ("z", "u") if n in scratch for w in range(n_wg)]
            return pairs + ([(gmem["c"].at[batch, head, chunk], smem["c"].at[slot])] if c is not None else [])

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

            def step(i, state):
                slot, chunk = walk.slot(i), walk.chunk(i)
                rows = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                y_tile, z_tile = smem["y"].at[slot], smem["z"].at[slot, wg]
                z_state, c_row, c_tile = z_tile, None, None
                if c is not None:
                    c_tile, z_state = smem["c"].at[slot], smem["zs"].at[wg]
                    tot = gmem["total"][batch, head, chunk]
                    c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1))
                    zs = plgpu.load(z_tile, layout=WGMMA).astype(jnp.float32)
                    z_state[...] = (zs * _rows(jnp.exp2(tot - c_row), zs.shape)).astype(dtype)
                    plgpu.commit_smem()
                    state = state * jnp.exp2(tot)
                if not with_output:
                    state, = _add_products((state, y_tile.transpose(T_CONTRACT), z_state), interpret=interpret)
                    plgpu.barrier_arrive(empty.at[slot])
                    return state
                x_tile = smem["x"].at[slot]
                a, o = _products((x_tile, y_tile.transpose(T_CONTRACT)), (x_tile, smem["s16"].at[wg]))
                a = _decayed_scores(a, c_row, c_tile, reverse).astype(dtype)
                if c is not None:
                    o = o * _rows(jnp.exp2(c_row), o.shape)
                o, state = _add_products((o, a, z_tile), (state, y_tile.transpose(T_CONTRACT), z_state),
                                         interpret=interpret)
                o = o * scale
                if save_every:
                    @pl.when(lax.rem(chunk + 1, jnp.int32(save_every)) == 0)
                    def _():
                        saved = lax.div(chunk, jnp.int32(save_every))
                        gmem["saved"].at[batch, head, saved, :, cols][...] = state.astype(dtype)
                if u is not None:
                    r = jnp.sum(o * plgpu.load(smem["u"].at[slot, wg], layout=WGMMA).astype(jnp.float32), axis=1)
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem["o"].at[wg][...] = o.astype(dtype)
                smem["s16"].at[wg][...] = state.astype(dtype)
                if u is not None:
                    smem["r"].at[wg][...] = r
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["o"].at[wg], gmem["o"].at[batch, rows, head, cols])
                if u is not None:
                    plgpu.copy_smem_to_gmem(smem["r"].at[wg], gmem["r"].at[batch, head, wg, rows])
                return state

            state = lax.fori_loop(0, walk.steps, step, state)
            gmem["state"].at[batch, head, out_piece, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    arrivals = sum({"x": 1, "y": 1, "c": 1, "z": n_wg, "u": n_wg}.get(name, 0) for name in scratch)
    return _launch(body, operands, outs, arrivals=arrivals, consumers=n_wg, stages=stages, extra_scratch=(),
                   grid=(heads, n_pieces, b_size), scratch=scratch, interpret=interpret)


def decay_pass_pair(q, k, v, do, c, total, init, saved, *, scale, pieces, save_every=0, stages=2, interpret=None):
    """Gradients of keys and values in one walk from the end of the sequence, with R = sum of decayed q do^T as state.

    dv_j = scale * sum_{i >= j} 2^(c_j - c_i) (k_j . q_i) do_i
    dk_j = scale * sum_{i >= j} 2^(c_j - c_i) (v_j . do_i) q_i
    with c the *exclusive* in-chunk log2 decay counted from the chunk's end. One compute warpgroup makes dv, the other
    dk, and each owns one block of 64 rows of R (the first owns all of it when K is 64); bf16 R is shared through SMEM.

    Args: as `decay_pass`; init float32 [B, H, P, K, V] is R entering each piece from its end; saved are the states S
      that the forward pass saved, or None.
    Returns: dict with dk, dv, state [B, H, P, K, V] and, where `saved` is given, r [B, H, T] = sum over K of k * dk and
      f [B, H, M, K], the sums over V of S * R at the saved places.
    """
    row_sums = saved is not None
    b_size, t_size, heads, k_size = k.shape
    v_size, dtype = v.shape[-1], v.dtype
    chunks = t_size // CHUNK
    n_blocks = k_size // BLOCK
    operands = _present(q=q, k=k, v=v, do=do, c=c, total=total, init=init, saved=saved)
    outs = {"state": jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32),
            "dk": jax.ShapeDtypeStruct(k.shape, dtype), "dv": jax.ShapeDtypeStruct(v.shape, dtype)}
    sizes = {"q": k_size, "k": k_size, "v": v_size, "do": v_size}
    scratch = {name: _tile((stages, CHUNK, size), dtype) for name, size in sizes.items()}
    scratch |= {"dk": _tile((CHUNK, k_size), dtype), "dv": _tile((CHUNK, v_size), dtype),
                "s16": _tile((k_size, v_size), dtype)}
    if row_sums:
        outs["r"] = jax.ShapeDtypeStruct((b_size, heads, t_size), jnp.float32)
        outs["f"] = jax.ShapeDtypeStruct(saved.shape[:4], jnp.float32)
        scratch["r"] = plgpu.SMEM((CHUNK,), jnp.float32)
    if c is not None:
        scratch |= {"c": plgpu.SMEM((stages, CHUNK), jnp.float32), "qs": _tile((n_blocks, CHUNK, BLOCK), dtype)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty, written, free = refs[len(names):]
        head, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        wg = lax.axis_index("wg")
        walk = _Walk(chunks, pieces, stages, True, piece)

        def copies(chunk, slot):
            rows = pl.ds(chunk * CHUNK, CHUNK)
            pairs = [(gmem[n].at[batch, rows, head], smem[n].at[slot]) for n in sizes]
            return pairs + ([(gmem["c"].at[batch, head, chunk], smem["c"].at[slot])] if c is not None else [])

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
                rows = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.barrier_wait(full.at[slot])
                c_row = c_tile = None
                if c is not None:
                    c_tile = smem["c"].at[slot]
                    c_row = plgpu.load(c_tile, layout=WGMMA.reduce(1))
                if owns_state and row_sums:
                    @pl.when(lax.rem(chunk + 1, jnp.int32(save_every)) == 0)
                    def _():
                        place = batch, head, lax.div(chunk, jnp.int32(save_every)), block
                        s = plgpu.load(gmem["saved"].at[place], layout=WGMMA, optimized=False).astype(jnp.float32)
                        gmem["f"].at[place][...] = jnp.sum(s * state, axis=1)
                if owns_state:
                    q_state = smem["q"].at[slot, :, block]
                    if c is not None:
                        tot = gmem["total"][batch, head, chunk]
                        qs = plgpu.load(q_state, layout=WGMMA).astype(jnp.float32)
                        q_state = smem["qs"].at[wg]
                        q_state[...] = (qs * _rows(jnp.exp2(tot - c_row), qs.shape)).astype(dtype)
                        plgpu.commit_smem()
                        state = state * jnp.exp2(tot)
                plgpu.barrier_wait(written)
                s16 = smem["s16"].transpose(T_CONTRACT) if transposed else smem["s16"]
                a, o = _products((smem[left].at[slot], smem[right].at[slot].transpose(T_CONTRACT)),
                                 (smem[left].at[slot], s16))
                plgpu.barrier_arrive(free)
                a = _decayed_scores(a, c_row, c_tile, True).astype(dtype)
                if c is not None:
                    o = o * _rows(jnp.exp2(c_row), o.shape)
                terms = [(o, a, smem[other].at[slot])]
                if owns_state:
                    terms.append((state, q_state.transpose(T_CONTRACT), smem["do"].at[slot]))
                o, *state = _add_products(*terms, interpret=interpret)
                state = state[0] if owns_state else ()
                o = o * scale
                if out == "dk" and row_sums:
                    r = jnp.sum(o * plgpu.load(smem["k"].at[slot], layout=WGMMA).astype(jnp.float32), axis=1)
                plgpu.barrier_arrive(empty.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem[out][...] = o.astype(dtype)
                plgpu.barrier_wait(free)  # both are done reading R of this chunk
                if owns_state:
                    smem["s16"].at[block][...] = state.astype(dtype)
                if out == "dk" and row_sums:
                    smem["r"][...] = r
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.copy_smem_to_gmem(smem[out], gmem[out].at[batch, rows, head])
                if out == "dk" and row_sums:
                    plgpu.copy_smem_to_gmem(smem["r"], gmem["r"].at[batch, head, rows])
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
    return _launch(body, operands, outs, arrivals=4 + (c is not None), consumers=2, stages=stages, extra_scratch=extra,
                   grid=(heads, pieces, b_size), scratch=scratch, interpret=interpret)
