"""One Mosaic GPU kernel (Hopper) behind the scalar-decay family: the decayed causal pass.

For one head, with x, y [T, K] and z [T, V] and in-chunk log2 decays c, the pass computes
    o_i = scale * sum_{j <= i} 2^(c_i - c_j) (x_i . y_j) z_j          (plus the part of earlier chunks, through the state)
    S  <- 2^(total) S + sum_j 2^(total - c_j) y_j z_j^T               ([K, V], float32, once per chunk of 64 tokens)
The forward of linear attention is pass(q, k, v); its gradients are three more passes with the roles changed:
dq = pass(do, v, k), dv = reversed pass(k, q, do), dk = reversed pass(v, do, q).  See `linear_attention.py`.

A program owns one (head, piece of T, batch) and walks its chunks with the state in registers. Its warpgroups: one loads tiles
through TMA into a ring of stages, and V/64 others own 64 value columns each, so that they never wait for one another.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
COLS = 64  # value columns of one compute warpgroup
WGMMA = plgpu.Layout.WGMMA


def _tile(shape, dtype):
    swizzle = plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle))


def add_products(*terms, interpret):
    """[acc + a @ b for (acc, a, b) in terms], all products in flight together."""
    def onto(refs):
        for ref, (_, a, b) in zip(refs, terms, strict=True):
            plgpu.wgmma(ref, a, b)

    def one(acc, a, b):
        if isinstance(a, jax.Array):
            return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

        def product(ref):
            plgpu.wgmma(ref, a, b)
            return ref[...]

        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, acc.dtype))

    if interpret:  # the interpreter knows neither initialised accumulators nor operands in registers
        return [one(*term) for term in terms]
    return pl.run_state(onto)([plgpu.ACC.init(acc) for acc, _, _ in terms])


def decay_pass(x, y, z, c, total, init, u, *, scale, reverse, pieces, stages=3, emit_output=True, emit_state=True,
               interpret=None):
    """Runs the pass over [B, T, H, D] tensors.

    Args:
      x, y: [B, T, H, K] bf16/fp16, "query" and "key" (x is None when only the state is wanted).
      z: [B, T, H, V] "value".
      c, total: float32 [B, H, N, 64] and [B, H, N] in-chunk cumulative log2 decay and its total per chunk, or None.
      init: float32 [B, H, P, K, V] state entering each piece, or None for zero.
      u: [B, T, H, V] or None; with it the row sums of o * u are returned as well, in float32.
      pieces: number P of pieces T is cut in. `emit_state` writes the state leaving each piece.
    Returns: (o [B, T, H, V] or None, states [B, H, P, K, V] or None, row sums [B, H, V/64, T] or None).
    """
    b_size, t_size, heads, k_size = y.shape
    v_size = z.shape[-1]
    n_wg = v_size // COLS
    chunks = pl.cdiv(t_size, CHUNK)
    per_piece = pl.cdiv(chunks, pieces)
    dtype = z.dtype
    decay = c is not None
    operands = {"x": x, "y": y, "z": z, "c": c, "total": total, "init": init, "u": u}
    operands = {name: a for name, a in operands.items() if a is not None}
    outs = {}
    if emit_output:
        outs["o"] = jax.ShapeDtypeStruct(z.shape, dtype)
    if emit_state:
        outs["state"] = jax.ShapeDtypeStruct((b_size, heads, pieces, k_size, v_size), jnp.float32)
    if u is not None:
        outs["r"] = jax.ShapeDtypeStruct((b_size, heads, n_wg, chunks * CHUNK), jnp.float32)
    scratch = {"y": _tile((stages, CHUNK, k_size), dtype), "z": _tile((stages, n_wg, CHUNK, COLS), dtype)}
    if emit_output:
        scratch["x"] = _tile((stages, CHUNK, k_size), dtype)
        scratch["o"] = _tile((n_wg, CHUNK, COLS), dtype)
        scratch["s16"] = _tile((n_wg, k_size, COLS), dtype)
    if u is not None:
        scratch["u"] = _tile((stages, n_wg, CHUNK, COLS), dtype)
        scratch["r"] = plgpu.SMEM((n_wg, CHUNK), jnp.float32)
    if decay:
        scratch["c"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
        scratch["zs"] = _tile((n_wg, CHUNK, COLS), dtype)
    arrivals = 1 + n_wg + int(emit_output) + int(decay) + (n_wg if u is not None else 0)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, full, empty = refs[len(names):]
        head, piece, batch = lax.axis_index("head"), lax.axis_index("piece"), lax.axis_index("batch")
        wg = lax.axis_index("wg")
        first = piece * per_piece
        steps = jnp.minimum(chunks - first, per_piece)

        def chunk_index(i):
            return first + (steps - 1 - i if reverse else i)

        @pl.when(wg == n_wg)
        def load_tiles():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, jnp.int32(stages))
                chunk = chunk_index(i)
                rows = pl.ds(chunk * CHUNK, CHUNK)

                @pl.when(i >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for name in ("x", "y"):
                    if name in scratch:
                        plgpu.copy_gmem_to_smem(gmem[name].at[batch, rows, head], smem[name].at[slot], full.at[slot])
                for name in ("z", "u"):
                    for w in range(n_wg if name in scratch else 0):
                        src = gmem[name].at[batch, rows, head, pl.ds(w * COLS, COLS)]
                        plgpu.copy_gmem_to_smem(src, smem[name].at[slot, w], full.at[slot])
                if decay:
                    plgpu.copy_gmem_to_smem(gmem["c"].at[batch, head, chunk], smem["c"].at[slot], full.at[slot])

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _(i):  # leave no barrier phase unobserved
                plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(stages))])

        @pl.when(wg < n_wg)
        def compute():
            plgpu.set_max_registers(232 if n_wg == 2 else 216, action="increase")
            cols = pl.ds(wg * COLS, COLS)
            if init is not None:
                state = plgpu.load(gmem["init"].at[batch, head, piece, :, cols], layout=WGMMA, optimized=False)
            else:
                state = plgpu.layout_cast(jnp.zeros((k_size, COLS), jnp.float32), WGMMA)
            if emit_output:
                smem["s16"].at[wg][...] = state.astype(dtype)
                plgpu.commit_smem()

            def step(i, state):
                slot = lax.rem(i, jnp.int32(stages))
                chunk = chunk_index(i)
                plgpu.barrier_wait(full.at[slot])
                z_tile = smem["z"].at[slot, wg]
                if decay:
                    tot = gmem["total"][batch, head, chunk]
                    c_row = plgpu.load(smem["c"].at[slot], layout=WGMMA.reduce(1))
                    zs = plgpu.load(z_tile, layout=WGMMA).astype(jnp.float32)
                    zs = zs * lax.broadcast_in_dim(jnp.exp2(tot - c_row), zs.shape, [0])
                    smem["zs"].at[wg][...] = zs.astype(dtype)
                    plgpu.commit_smem()
                    state = state * jnp.exp2(tot)
                    z_state = smem["zs"].at[wg]
                else:
                    z_state = z_tile
                if emit_output:
                    def scores(a_ref, o_ref):
                        plgpu.wgmma(a_ref, smem["x"].at[slot], smem["y"].at[slot].transpose((1, 0)))
                        plgpu.wgmma(o_ref, smem["x"].at[slot], smem["s16"].at[wg])
                        return a_ref[...], o_ref[...]

                    acc = plgpu.ACC((CHUNK, CHUNK), jnp.float32), plgpu.ACC((CHUNK, COLS), jnp.float32)
                    a, o = pl.run_scoped(scores, *acc)
                    row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=WGMMA)
                    col = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=WGMMA)
                    keep = row <= col if reverse else row >= col
                    if decay:
                        c_col = plgpu.load(smem["c"].at[slot], layout=WGMMA.reduce(0))
                        gap = lax.broadcast_in_dim(c_row, a.shape, [0]) - lax.broadcast_in_dim(c_col, a.shape, [1])
                        a = a * jnp.exp2(jnp.where(keep, gap, -jnp.inf))
                        o = o * lax.broadcast_in_dim(jnp.exp2(c_row), o.shape, [0])
                    else:
                        a = jnp.where(keep, a, 0.0)
                    a16 = a.astype(dtype)

                    o, state = add_products(
                        (o, a16, z_tile), (state, smem["y"].at[slot].transpose((1, 0)), z_state), interpret=interpret)
                    o = o * scale
                    if u is not None:
                        u_tile = plgpu.load(smem["u"].at[slot, wg], layout=WGMMA).astype(jnp.float32)
                        r = jnp.sum(o * u_tile, axis=1)
                    plgpu.barrier_arrive(empty.at[slot])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    smem["o"].at[wg][...] = o.astype(dtype)
                    smem["s16"].at[wg][...] = state.astype(dtype)
                    if u is not None:
                        smem["r"].at[wg][...] = r
                    plgpu.commit_smem()
                    rows = pl.ds(chunk * CHUNK, CHUNK)
                    plgpu.copy_smem_to_gmem(smem["o"].at[wg], gmem["o"].at[batch, rows, head, cols])
                    if u is not None:
                        plgpu.copy_smem_to_gmem(smem["r"].at[wg], gmem["r"].at[batch, head, wg, rows])
                else:
                    state, = add_products((state, smem["y"].at[slot].transpose((1, 0)), z_state), interpret=interpret)
                    plgpu.barrier_arrive(empty.at[slot])
                return state

            state = lax.fori_loop(0, steps, step, state)
            if emit_state:
                gmem["state"].at[batch, head, piece, :, cols][...] = state
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
                       plgpu.Barrier(num_arrivals=n_wg, num_barriers=stages)),
        grid=(heads, pieces, b_size),
        grid_names=("head", "piece", "batch"),
        num_threads=n_wg + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    got = dict(zip(outs, run(*operands.values()), strict=True))
    return got.get("o"), got.get("state"), got.get("r")
