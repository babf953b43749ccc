"""Mosaic GPU kernels (Hopper) for DPLR (RWKV-7), S_t = (diag(e^w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, bounded decays.

One head and one chunk of 64 tokens, c the inclusive and e the exclusive sum of its log decays, S the entering state:
    q' = q e^c,   a' = a e^e,   k' = k e^-c,   b' = b e^-c
    A_qk = lower(q' k'^T), A_qb likewise;   A_ak = strictly lower(a' k'^T), A_ab likewise;   T = (I - A_ab)^-1
    E = a' S + A_ak V,   U = T E,   O = scale (q' S + A_qk V + A_qb U),   S <- e^c_63 (S + k'^T V + b'^T U)
U alternates in sign where keys look alike, so N = scale A_qb T and Y = T^T b' are what gets rounded. `chunk_weights`
makes x = scale q', a', k', Y, A_ak, scale A_qk and N of all chunks in parallel, `dplr_forward` walks. With R the
gradient of the leaving state times e^c_63, `dplr_reverse` walks back:
    dE = N^T dO + Y R,   dV = scale A_qk^T dO + A_ak^T dE + k' R,   dS = R + x^T dO + a'^T dE
`chunk_gradients` makes the rest of all chunks in parallel.

The decays of a chunk add up to at least 64 MIN_LOG_DECAY = -80, so that e^-c stays finite and one product makes all
scores: the anchor of every exponent is the first token of the chunk, and no row sees later decays.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.gates import LOG2E
from pallas_kernels.gpu.tiles import (
    BLOCK,
    CHUNK,
    T_CONTRACT,
    WGMMA,
    add_products,
    columns,
    present,
    products,
    rows,
    tile,
    two_parts,
    unit_lower_inverse,
)
from pallas_kernels.gpu.walk import walk_chunks

MIN_LOG_DECAY = -1.25
SQUARE = (CHUNK, CHUNK)


def load(ref):
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


def load_decays(ref):
    return jnp.maximum(plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32), MIN_LOG_DECAY)


def turned(tiles):
    return tuple(ref.transpose(T_CONTRACT) for ref in tiles)


def zeros():
    return plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA)


def iotas():
    return tuple(plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=WGMMA) for axis in (0, 1))


def cumulative(decays, ones, scratch, *, exact, interpret):
    """Sums of decays [64, 64] over the tokens up to each, in log2; `ones`: a lower triangle of ones in shared memory.

    Decays are summed as two parts of 8 bits, or as they are where `exact` says that they are bf16.
    """
    high = decays.astype(scratch.dtype)
    scratch[...] = high
    plgpu.commit_smem()
    c, = products((ones, scratch))
    if not exact:
        scratch[...] = (decays - high.astype(jnp.float32)).astype(scratch.dtype)
        plgpu.commit_smem()
        c, = add_products((c, (ones,), (scratch,)), interpret=interpret)
    return c * LOG2E


class Segments:
    """Which tokens of a chunk see each other, and the states at its ends; without segments all do."""

    def __init__(self, ref):
        """ref: [2, 64] int32 in global memory or None: where each token's segment starts in the chunk, -1 if before it,
        and where it ends, 64 if after it.
        """
        self.given = ref is not None
        if self.given:
            self.start, self.end = (plgpu.load(ref.at[i], layout=WGMMA.reduce(1), optimized=False) for i in (0, 1))

    def earlier(self, keep, col):
        """keep [64, 64], of rows that read columns, where both are of one segment."""
        return keep & (col >= rows(self.start, SQUARE)) if self.given else keep

    def later(self, keep, col):
        """keep [64, 64], of rows that are read by columns, where both are of one segment."""
        return keep & (col <= rows(self.end, SQUARE)) if self.given else keep

    def entering(self, x):
        return jnp.where(rows(self.start, SQUARE) < 0, x, 0.0) if self.given else x

    def leaving(self, x):
        return jnp.where(rows(self.end, SQUARE) == CHUNK, x, 0.0) if self.given else x


def chunk_weights(q, k, a, b, g, segments=None, *, scale, gradient, interpret=None):
    """The parts of the walks that one chunk makes alone, all chunks in parallel.

    Args: q, k, a, b [B, T, H, K] bf16, g [B, T, H, K] natural log decays; T a multiple of 64, K 64 or 128. segments:
      [B, N, 2, 64] int32 or None, see `Segments`. gradient: also make what only the backward pass needs.
    Returns: dict with q = x, a, k, y [B, T, H, K], qk, ak, n [B, H, N, 64, 64] in bf16, total [B, H, N, K] float32 =
      log2 decay of each chunk, and with `gradient` t = T. Where segments start, q, a, k and y are zero for tokens that
      do not reach the states at the ends of the chunk.
    """
    b_size, t_size, heads, k_size = q.shape
    chunks, n, dtype = t_size // CHUNK, k_size // BLOCK, q.dtype
    operands = present(q=q, k=k, a=a, b=b, g=g, segments=segments)
    keys, square = jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((b_size, heads, chunks, *SQUARE), dtype)
    outs = {f"{name}_out": keys for name in "qaky"}
    outs |= dict.fromkeys(("qk", "ak", "n", *(("t",) if gradient else ())), square)
    outs["total"] = jax.ShapeDtypeStruct((b_size, heads, chunks, k_size), jnp.float32)
    scratch = {name: [tile(SQUARE, dtype)] * n for name in "qkab"}
    scratch |= {name: tile(SQUARE, dtype) for name in ("qk", "ak", "n", "t")}
    scratch["half"] = tile(SQUARE, jnp.float16)

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, loaded = refs[len(names):]
        head, chunk, batch = lax.axis_index("head"), lax.axis_index("chunk"), lax.axis_index("batch")
        here = pl.ds(chunk * CHUNK, CHUNK)
        seg = Segments(gmem["segments"].at[batch, chunk] if segments is not None else None)
        for i in range(n):
            for name in "qkab":
                source = gmem[name].at[batch, here, head, pl.ds(i * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(source, smem[name][i], loaded)
        row, col = iotas()
        ones = smem["t"]
        ones[...] = jnp.where(row >= col, 1.0, 0.0).astype(dtype)
        for i in range(n):
            mine = pl.ds(i * BLOCK, BLOCK)
            decays = load_decays(gmem["g"].at[batch, here, head, mine])
            gmem["total"].at[batch, head, chunk, mine][...] = jnp.sum(decays, axis=0) * LOG2E
            c = cumulative(decays, ones, smem["n"], exact=g.dtype == dtype, interpret=interpret)
            if i == 0:
                plgpu.barrier_wait(loaded)
            for name, exponent in (("q", c), ("a", c - decays * LOG2E), ("k", -c), ("b", -c)):
                ref = smem[name][i]
                ref[...] = (load(ref) * jnp.exp2(exponent)).astype(dtype)
        plgpu.commit_smem()
        tiles = {name: tuple(smem[name]) for name in "qkab"}
        ab, = products((tiles["a"], turned(tiles["b"])))
        lower, strict = seg.earlier(row >= col, col), seg.earlier(row > col, col)
        t = smem["t"]
        inverse = unit_lower_inverse(jnp.where(strict, 0.0 - ab, 0.0), smem["half"], interpret=interpret)
        t[...] = inverse.astype(dtype)
        qb, qk, ak = products(*((tiles[x], turned(tiles[y])) for x, y in ("qb", "qk", "ak")))
        smem["qk"][...] = (jnp.where(lower, qk, 0.0) * scale).astype(dtype)
        smem["ak"][...] = jnp.where(strict, ak, 0.0).astype(dtype)
        plgpu.commit_smem()
        n_square, = add_products((zeros(), jnp.where(lower, qb * scale, 0.0).astype(dtype), t), interpret=interpret)
        smem["n"][...] = n_square.astype(dtype)
        y = products(*((t.transpose(T_CONTRACT), ref) for ref in tiles["b"]))
        for ref, value in zip(tiles["b"], y, strict=True):
            ref[...] = seg.leaving(value).astype(dtype)
        for ref in tiles["q"]:
            ref[...] = (seg.entering(load(ref)) * scale).astype(dtype)
        if segments is not None:
            for ref in tiles["a"]:
                ref[...] = seg.entering(load(ref)).astype(dtype)
            for ref in tiles["k"]:
                ref[...] = seg.leaving(load(ref)).astype(dtype)
        plgpu.commit_smem()
        for name, out in zip("qakb", "qaky", strict=True):
            for i in range(n):
                mine = pl.ds(i * BLOCK, BLOCK)
                plgpu.copy_smem_to_gmem(smem[name][i], gmem[f"{out}_out"].at[batch, here, head, mine])
        for name in ("qk", "ak", "n", *(("t",) if gradient else ())):
            plgpu.copy_smem_to_gmem(smem[name], gmem[name].at[batch, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    got = plgpu.kernel(
        body, out_type=tuple(outs.values()), scratch_types=(scratch, plgpu.Barrier(num_arrivals=4 * n)),
        grid=(heads, chunks, b_size), grid_names=("head", "chunk", "batch"), interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
    )(*operands.values())
    return {name.removesuffix("_out"): array for name, array in zip(outs, got, strict=True)}


def dplr_forward(weights, v, init, keep, *, output, split, interpret=None):
    """Outputs and final state, or, without `output`, what the backward pass needs.

    Args: weights: the dict of `chunk_weights`; v [B, T, H, V] bf16, V in {64, 128}; init float32 [B, H, K, V] or None;
      keep: float32 [B, N], 0 where a segment starts in the chunk, or None. split: programs per head.
    Returns: as `kda_pass.kda_forward`.
    """
    keys = {name: weights[name] for name in ("a", "k", "y", *("q" if output else ()))}
    squares = {name: weights[name] for name in ("ak", *(("qk", "n") if output else ("t",)))}
    arrays = present(total=weights["total"], z=v, init=init, keep=keep)

    def chunk(walk):
        smem, s16, own, z = walk.smem, walk.state16, walk.own, walk.smem("z")
        e = ((smem("a"), smem("ak")), (s16, z))
        if output:
            e, result = products(e, ((smem("q"), smem("qk")), (s16, z)))
        else:
            e, = products(e)
            result = plgpu.layout_cast(jnp.zeros_like(e), WGMMA)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk wrote has left shared memory
        own[...] = e.astype(own.dtype)
        plgpu.commit_smem()
        if output:
            walk.wait_late()
        state, result = add_products((walk.state, turned((smem("k"), smem("y"))), (z, own)),
                                     (result, smem("n" if output else "t"), own), interpret=interpret)
        own[...] = result.astype(own.dtype)
        plgpu.commit_smem()
        walk.store("o" if output else "u", own)
        return walk.decayed(state)

    return walk_chunks(chunk, keys, squares, arrays, ("o",) if output else ("u", "entering"), reverse=False,
                       split=split, late=("k", "y") if output else (), interpret=interpret)


def dplr_reverse(weights, do, dfinal, keep, *, split, interpret=None):
    """dV and dE, in a walk from the end of the sequence with R in registers.

    Args: as `dplr_forward`; do [B, T, H, V]; dfinal float32 [B, H, K, V] or None.
    Returns: dict with dv, de [B, T, H, V], entering [B, H, N, K, V] bf16 = R of every chunk, and state [B, H, K, V],
      the gradient of the initial state.
    """
    keys = {name: weights[name] for name in "qaky"}
    squares = {name: weights[name] for name in ("qk", "ak", "n")}
    total = weights["total"]
    if dfinal is not None:
        dfinal = dfinal * jnp.exp2(total[:, :, -1])[..., None]
    before = jnp.pad(total[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))  # R carries the decay of the chunk it enters
    arrays = present(total=before, z=do, init=dfinal, keep=keep)

    def chunk(walk):
        smem, r16, own, z = walk.smem, walk.state16, walk.own, walk.smem("z")
        de, = products(((smem("n").transpose(T_CONTRACT), smem("y")), (z, r16)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = de.astype(own.dtype)
        plgpu.commit_smem()
        walk.store("de", own)
        dv, = products(((*turned((smem("qk"), smem("ak"))), smem("k")), (z, own, r16)))
        walk.wait_late()
        state, = add_products((walk.state, turned((smem("q"), smem("a"))), (z, own)), interpret=interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own[...] = dv.astype(own.dtype)
        plgpu.commit_smem()
        walk.store("dv", own)
        return walk.decayed(state)

    return walk_chunks(chunk, keys, squares, arrays, ("dv", "de", "entering"), reverse=True, split=split,
                       late=("q", "a"), interpret=interpret)


def chunk_gradients(q, k, a, b, v, u, do, de, g, entering, leaving, keep=None, segments=None, *, scale, interpret=None):
    """Gradients of q, k, a, b and of the log decays, all chunks in parallel.

    With S the state entering the chunk, R, U and dE from the walks, L and L- the lower triangle with and without its
    diagonal:
      dq' = scale dO S^T + L(scale dO V^T) k' + L(scale dO U^T) b',   da' = dE S^T + L-(dE V^T) k' + L-(dE U^T) b'
      dk' = V R^T + L(scale dO V^T)^T q' + L-(dE V^T)^T a',           db' with U for V
      dg_t = sum_{i >= t} (q' dq' - k' [dk' - V R^T] - b' [db' - U R^T])_i + sum_{i > t} (a' da')_i
             + sum_{j < t} (k' V R^T + b' U R^T)_j + rowsum(S * R)
    A pair of tokens on one side of t enters twice with opposite signs and the same rounding: only true terms stay.
    A program makes 64 channels of one chunk.

    Args: as `chunk_weights` and the walks; u, do, de [B, T, H, V]; entering, leaving [B, H, N, K, V] bf16.
    Returns: dict with dq, dk, da, db, dg [B, T, H, K], dg in the dtype of g.
    """
    b_size, t_size, heads, k_size = q.shape
    v_size, dtype = v.shape[-1], q.dtype
    chunks, n, n_v = t_size // CHUNK, k_size // BLOCK, v_size // BLOCK
    operands = present(q=q, k=k, a=a, b=b, v=v, u=u, do=do, de=de, g=g, entering=entering, leaving=leaving, keep=keep,
                       segments=segments)
    outs = {name: jax.ShapeDtypeStruct(q.shape, dtype) for name in ("dq", "dk", "da", "db")}
    outs["dg"] = jax.ShapeDtypeStruct(g.shape, g.dtype)
    # Through global memory, since 24 bytes more of shared memory would halve the programs of a processor.
    outs["kept"] = jax.ShapeDtypeStruct((b_size, heads, chunks, k_size), jnp.float32)
    values = ("v", "u", "do", "de")
    scratch = {name: [tile(SQUARE, dtype)] * n_v for name in (*values, "entering")}
    # R is spent before k and b are needed: with its tiles shared, two programs fit on a processor.
    scratch |= {"leaving": [tile(SQUARE, dtype)] * 2, "q": tile(SQUARE, dtype), "a": tile(SQUARE, dtype)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, loaded, reads_loaded, writes_loaded = refs[len(names):]
        column, chunk, batch = lax.axis_index("column"), lax.axis_index("chunk"), lax.axis_index("batch")
        head, part = lax.div(column, jnp.int32(n)), lax.rem(column, jnp.int32(n))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)
        tiles = {name: tuple(smem[name]) for name in (*values, "entering")}
        tiles["leaving"] = tuple(smem["leaving"][:n_v])
        for i in range(n_v):
            cols = pl.ds(i * BLOCK, BLOCK)
            for name in values:
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, cols], tiles[name][i], loaded)
            for name in ("entering", "leaving"):
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk, mine, cols], tiles[name][i], loaded)
        seg = Segments(gmem["segments"].at[batch, chunk] if segments is not None else None)
        row, col = iotas()
        q_tile, a_tile, k_tile, b_tile = smem["q"], smem["a"], *smem["leaving"]
        q_tile[...] = jnp.where(row >= col, 1.0, 0.0).astype(dtype)
        g_here = gmem["g"].at[batch, here, head, mine]
        c = cumulative(load_decays(g_here), q_tile, a_tile, exact=g.dtype == dtype, interpret=interpret)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(gmem["q"].at[batch, here, head, mine], q_tile, reads_loaded)
        plgpu.copy_gmem_to_smem(gmem["a"].at[batch, here, head, mine], a_tile, reads_loaded)

        plgpu.barrier_wait(loaded)
        kept = sum(jnp.sum(load(s) * load(r), axis=1) for s, r in zip(tiles["entering"], tiles["leaving"], strict=True))
        kept_here = gmem["kept"].at[batch, head, chunk, mine]
        kept_here[...] = kept if keep is None else kept * gmem["keep"][batch, chunk]
        dk_state, db_state = products((tiles["v"], turned(tiles["leaving"])), (tiles["u"], turned(tiles["leaving"])))
        dk_state, db_state = seg.leaving(dk_state), seg.leaving(db_state)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(gmem["k"].at[batch, here, head, mine], k_tile, writes_loaded)
        plgpu.copy_gmem_to_smem(gmem["b"].at[batch, here, head, mine], b_tile, writes_loaded)

        def before():
            return jnp.exp2(c - load_decays(g_here) * LOG2E)

        plgpu.barrier_wait(reads_loaded)
        q_tile[...] = (load(q_tile) * jnp.exp2(c)).astype(dtype)
        a_tile[...] = (load(a_tile) * before()).astype(dtype)
        plgpu.commit_smem()

        def scores(left, right, keep, factor):
            score, = products((tiles[left], turned(tiles[right])))
            return jnp.where(keep, score * factor, 0.0).astype(dtype)

        def write(name, ref, state):
            """(gradient, change of reach, share in the state) of k or b; `ref` gets the weighted tokens."""
            pair = (scores(name, "do", seg.later(row <= col, col), scale),
                    scores(name, "de", seg.later(row < col, col), 1.0))
            inner, = add_products((zeros(), pair, (q_tile, a_tile)), interpret=interpret)
            weighted = (load(ref) * jnp.exp2(-c)).astype(dtype)
            ref[...] = weighted
            weighted = weighted.astype(jnp.float32)
            return ((inner + state) * jnp.exp2(-c)).astype(dtype), weighted * inner, weighted * state

        def read(gradient, keep, factor):
            pair = scores(gradient, "v", keep, factor), scores(gradient, "u", keep, factor)
            state, = products((tiles[gradient], turned(tiles["entering"])))
            return add_products((seg.entering(state) * factor, pair, (k_tile, b_tile)), interpret=interpret)[0]

        plgpu.barrier_wait(writes_loaded)
        dk, reach, written = write("v", k_tile, dk_state)
        db, reach_b, written_b = write("u", b_tile, db_state)
        reach, written = -reach - reach_b, (written + written_b).astype(dtype)
        plgpu.commit_smem()
        dq = read("do", seg.earlier(row >= col, col), scale)
        reach = reach + load(q_tile) * dq
        q_tile[...] = (dq * jnp.exp2(c)).astype(dtype)
        da = read("de", seg.earlier(row > col, col), 1.0)
        erased = load(a_tile) * da
        a_tile[...] = (da * before()).astype(dtype)
        k_tile[...], b_tile[...] = dk, db
        plgpu.commit_smem()
        for name, ref in (("dq", q_tile), ("da", a_tile), ("dk", k_tile), ("db", b_tile)):
            plgpu.copy_smem_to_gmem(ref, gmem[name].at[batch, here, head, mine])
        high, low, strict, prefix = (tiles[name][0] for name in values)  # all spent
        high[...], low[...] = two_parts(reach + erased, dtype)  # terms cancel: 16 bits of them
        strict[...] = jnp.where(row > col, 1.0, 0.0).astype(dtype)
        prefix[...] = written
        plgpu.commit_smem()
        after = strict.transpose(T_CONTRACT)
        dg, = products(((after, after, strict), (high, low, prefix)))
        dg = dg + reach + columns(plgpu.load(kept_here, layout=WGMMA.reduce(0), optimized=False), SQUARE)
        given = plgpu.load(g_here, layout=WGMMA, optimized=False).astype(jnp.float32)
        gmem["dg"].at[batch, here, head, mine][...] = jnp.where(given >= MIN_LOG_DECAY, dg, 0.0).astype(g.dtype)
        plgpu.wait_smem_to_gmem(0)

    got = plgpu.kernel(
        body, out_type=tuple(outs.values()),
        scratch_types=(scratch, plgpu.Barrier(num_arrivals=6 * n_v), plgpu.Barrier(num_arrivals=2),
                       plgpu.Barrier(num_arrivals=2)),
        grid=(heads * n, chunks, b_size), grid_names=("column", "chunk", "batch"), interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*operands.values())
    return dict(zip(outs, got, strict=True))
