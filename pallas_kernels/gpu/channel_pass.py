"""Mosaic GPU kernels (Hopper) for linear attention with a decay per key channel (GLA, HGRN2).

One head and one chunk of 64 tokens, b [64, K] the inclusive in-chunk sum of log decays, S the entering state:
    A_ij = scale sum_c q_ic k_jc e^(b_ic - b_jc), j <= i,   X = scale q * e^b,   Y = k * e^(b_63 - b)   `chunk_weights`
    O    = A V + X S,    S <- diag(e^(b_63)) S + Y^T V                                                  `weighted_pass`
The gradients run the same pass from the end, dV = A^T dO + Y R, R <- diag(e^(b_63)) R + X^T dO with R = dS, and then
make dQ, dK and the gate gradients of all chunks in parallel (`chunk_gradients`), each chunk by one of two kernels.

Where no channel has decayed by more than 2^-REACH since the chunk's start, one product makes a row of A: q e^b times
k e^-b, shifted by REACH / 2 to stay inside float32. Elsewhere the decay does not factor out of A, so a chunk that has
such rows is halved again and again for them. At the level with halves of `size` tokens, token t carries
Z_t = (q_t if t is in a right half, else k_t) * e^(sum of the log decays between t and the middle of its block), whose
exponents are <= 0, and the level's scores are the lower left blocks of Z Z^T. The sums are products of a matrix of
zeros and ones with the decays: no differences. No row sees later decays, nor do they decide how it is made. The code
for these levels costs registers even where it does not run, so gradients of chunks without such rows have a kernel of
their own, which leaves the others to a second one.

Weights are made by resident programs of one warpgroup, two on a multiprocessor (up to 255 registers a thread), which
load the tiles of their next chunk while they store those of the last.

ptxas waits after every product of a kernel ("C7514") where one instruction reads an accumulator too early, and a
negation of a product is moved to such a place: what is negated here is another factor, or taken from zero.
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
)
from pallas_kernels.gpu.walk import walk_chunks

MIN_LOG_DECAY = -100.0  # empties a float32 state; a finite stand-in for -inf
LEVELS = 6  # halves of 32, 16, .. 1 tokens
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200, as registers allow
REACH = 120.0  # log2 decays that one product of scores can span: q e^b and k e^-b then lie within 2^-60 .. 2^60
SQUARE = (CHUNK, CHUNK)


class Levels:
    """Decays inside one chunk, for 64 channels, over shared-memory tiles: fp16 `g` holds the log decays, `z` gets the
    weighted tokens.
    """

    def __init__(self, g, z, interpret):
        self.g, self.z, self.interpret = g, z, interpret
        self.row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
        self.col = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)

    def log2_decay(self, keep):
        """keep [64, 64] bool times the log decays, in log2."""
        ones = jnp.where(keep, 1.0, 0.0).astype(self.g.dtype)
        return add_products((zeros(), ones, self.g), interpret=self.interpret)[0] * LOG2E

    def anchored(self):
        """How one product makes the scores of the whole chunk: (k's exponent, q's factor, least [64]).

        With b the log2 decays since the chunk's start: -b for k and 2^b for q, but for a shift. Row i of the product is
        exact where b_i stays above -REACH in every channel, whatever comes after it; q's factor is zero elsewhere.
        least: the smallest b of each token, over the channels.
        """
        b = self.log2_decay(self.row >= self.col)
        least = plgpu.layout_cast(jnp.min(b, axis=1), WGMMA.reduce(1))
        b = jnp.maximum(b, -REACH) + REACH / 2
        return -b, jnp.where(rows(least, SQUARE) >= -REACH, jnp.exp2(b), 0.0), least

    def steps(self, least):
        """Levels that a chunk needs: none where one product reaches all of its tokens."""
        return jnp.where(jnp.min(least) < -REACH, LEVELS, 0)

    def weights(self, size, least):
        """(right [64, 64] bool, decay factors) of the level with halves of `size` tokens; 0 in rows that need none."""
        right = (self.row & size) != 0
        same_half = (self.row ^ self.col) < size
        b = self.log2_decay(same_half & jnp.where(right, self.col - 1 < self.row, self.col > self.row))
        return right, jnp.where(right & (rows(least, SQUARE) >= -REACH), 0.0, jnp.exp2(b))

    def put(self, weighted):
        """Stores weighted tokens in `z` and returns them as stored."""
        z = weighted.astype(self.z.dtype)
        plgpu.commit_smem()  # all have read the last ones
        self.z[...] = z
        plgpu.commit_smem()
        return z

    def square(self):
        """Z Z^T."""
        return products((self.z, self.z.transpose(T_CONTRACT)))[0]

    def halves_of(self, size):
        """[64, 64] bool: the two tokens are in the two halves of one block."""
        differ = self.row ^ self.col
        return (differ >= size) & (differ < 2 * size)


def zeros():
    return plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA)


def load(ref):
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


def load_decays(ref):
    return jnp.maximum(plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32), MIN_LOG_DECAY)


def chunk_weights(q, k, g, beta=None, *, scale, keep=True, interpret=None):
    """The parts of A, X and Y that one chunk makes alone, all chunks in parallel.

    Args: q, k [B, T, H, K] bf16, g [B, T, H, K] natural log decays; T a multiple of 64, K 64 or 128. beta: float32
      [B, H, N, 64] of a delta rule, or None. keep: return T, which only gradients need.
    Returns: dict with a [B, H, N, 64, 64], x and y [B, T, H, K] in bf16, total [B, H, N, K] float32 = log2 decay of
      each chunk. With beta also w = -k * e^b [B, T, H, K] and T, t_low [B, H, N, 64, 64], the two bf16 parts of
      T = (I + diag(beta) strictly lower M)^-1 diag(beta), where M = A for q = k and scale 1; a then holds A T and y
      holds T^T Y, see `kda_pass`.
    """
    b_size, t_size, heads, k_size = q.shape
    chunks, n, dtype = t_size // CHUNK, k_size // BLOCK, q.dtype
    erase = beta is not None
    items = b_size * heads * chunks
    programs = min(PROGRAMS, items)
    operands = present(q=q, k=k, g=g, beta=beta)
    outs = {"a": jax.ShapeDtypeStruct((b_size, heads, chunks, *SQUARE), dtype),
            "x": jax.ShapeDtypeStruct(q.shape, dtype), "y": jax.ShapeDtypeStruct(k.shape, dtype),
            "total": jax.ShapeDtypeStruct((b_size, heads, chunks, k_size), jnp.float32)}
    square = tile(SQUARE, dtype)
    scratch = {"q": tile((n, *SQUARE), dtype), "k": tile((n, *SQUARE), dtype), "log_decay": tile(SQUARE, jnp.float16),
               "x": square, "z": square, "ones": tile(SQUARE, jnp.float16), "total": plgpu.SMEM((BLOCK,), jnp.float32)}
    if erase:
        outs |= {"w": outs["y"]} | ({"t": outs["a"], "t_low": outs["a"]} if keep else {})
        scratch |= {"w": square, "beta": plgpu.SMEM((CHUNK,), jnp.float32)}

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, loaded = refs[len(names):]
        program = lax.axis_index("program")
        mine = lax.div(items - program + programs - 1, jnp.int32(programs))
        ones, g_tile, x_tile, z = (smem[name] for name in ("ones", "log_decay", "x", "z"))

        def place(i):
            item = program + i * programs
            head, chunk = lax.div(item, jnp.int32(chunks)), lax.rem(item, jnp.int32(chunks))
            return lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads)), chunk

        def fetch(name, i):
            batch, head, chunk = place(i)
            if name == "beta":
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk], smem[name], loaded)
                return
            for b in range(n):
                src = gmem[name].at[batch, pl.ds(chunk * CHUNK, CHUNK), head, pl.ds(b * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(src, smem[name].at[b], loaded)

        for name in ("q", "k", *(("beta",) if erase else ())):
            fetch(name, 0)
        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
        col = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)
        ones[...] = jnp.where(row >= col, 1.0, 0.0).astype(ones.dtype)

        @pl.loop(0, mine)
        def _(i):
            batch, head, chunk = place(i)
            here = pl.ds(chunk * CHUNK, CHUNK)
            levels = Levels(g_tile, z, interpret)
            row, col = iotas = levels.row, levels.col

            def block(b, carry):
                *scores, own = carry  # A, for a delta rule M, and the diagonal of A
                columns_here = pl.ds(b * BLOCK, BLOCK)
                q_tile, k_tile = smem["q"].at[b], smem["k"].at[b]
                decays = load_decays(gmem["g"].at[batch, here, head, columns_here])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # all have read what is written now and below
                g_tile[...] = decays.astype(g_tile.dtype)
                plgpu.commit_smem()
                decay, total = products((ones, g_tile), (g_tile.transpose(T_CONTRACT), ones))
                total = jnp.sum(jnp.where(col == 0, total, 0.0), axis=1) * LOG2E
                gmem["total"].at[batch, head, chunk, columns_here][...] = total
                smem["total"][...] = total
                decay = decay * LOG2E
                least = plgpu.layout_cast(jnp.min(decay, axis=1), WGMMA.reduce(1))
                decay = jnp.maximum(decay, -REACH) + REACH / 2

                @pl.when(b == 0)
                def _():
                    plgpu.barrier_wait(loaded)  # only now: the first sums of decays needed no tile

                z[...] = (load(k_tile) * jnp.exp2(0.0 - decay)).astype(dtype)
                own = own + jnp.sum(load(q_tile) * load(k_tile), axis=1)
                grown = jnp.exp2(decay)
                reached = rows(least, SQUARE) >= -REACH
                left = []
                for tokens, into, factor in ((q_tile, "x", scale), (k_tile, "w", -1.0))[: 1 + erase]:
                    reads = load(tokens) * grown
                    smem[into][...] = (reads * (factor * 2.0 ** (-REACH / 2))).astype(dtype)
                    left.append(jnp.where(reached, reads, 0.0).astype(dtype))
                plgpu.commit_smem()
                for name in ("x", "w")[: 1 + erase]:
                    plgpu.copy_smem_to_gmem(smem[name], gmem[name].at[batch, here, head, columns_here])
                scores = add_products(*((a, x, z.transpose(T_CONTRACT)) for a, x in zip(scores, left, strict=True)),
                                      interpret=interpret)

                def level(i, scores):
                    row = levels.row = iotas[0] + lax.optimization_barrier(jnp.int32(0))  # no masks before the loop
                    size = lax.shift_right_logical(jnp.int32(CHUNK // 2), i)
                    right, decay = levels.weights(size, least)
                    lower = (row > col) & levels.halves_of(size)
                    levels.put(jnp.where(right, load(q_tile), load(k_tile)) * decay)
                    a = scores[0] + jnp.where(lower, levels.square(), 0.0)
                    if not erase:
                        return (a,)
                    levels.put(load(k_tile) * decay)
                    return a, scores[1] + jnp.where(lower, levels.square(), 0.0)

                strongest = jnp.min(plgpu.load(smem["total"], layout=WGMMA.reduce(0)))
                steps = jnp.where(strongest < 1.0 - REACH, LEVELS, 0)
                scores = lax.fori_loop(0, steps, level, tuple(scores))
                until, = products((ones.transpose(T_CONTRACT), g_tile))
                k_tile[...] = (load(k_tile) * jnp.exp2((until - load(g_tile)) * LOG2E)).astype(dtype)
                plgpu.commit_smem()
                if not erase:
                    plgpu.copy_smem_to_gmem(k_tile, gmem["y"].at[batch, here, head, columns_here])
                return *scores, own

            nothing = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), WGMMA.reduce(1))
            *scores, own = lax.fori_loop(0, n, block, (*(zeros(),) * (1 + erase), nothing))
            a = jnp.where(row > col, scores[0], jnp.where(row == col, rows(own, SQUARE), 0.0)) * scale
            if erase:
                a_low = smem["q"].at[0]
                beta_row = rows(plgpu.load(smem["beta"], layout=WGMMA.reduce(1)), SQUARE)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                z[...], a_low[...] = two_parts(a, dtype)
                lower = jnp.where(row > col, scores[1], 0.0) * beta_row
                inverse = solved(lower, row, col, g_tile, interpret=interpret)
                inverse = inverse * columns(plgpu.load(smem["beta"], layout=WGMMA.reduce(0)), SQUARE)
                plgpu.commit_smem()
                t, t_low = x_tile, smem["w"]
                t[...], t_low[...] = two_parts(inverse, dtype)
                plgpu.commit_smem()
                for name, part in (("t", t), ("t_low", t_low)) if keep else ():
                    plgpu.copy_smem_to_gmem(part, gmem[name].at[batch, head, chunk])
                turned = t.transpose(T_CONTRACT), t_low.transpose(T_CONTRACT)
                a, *ys = products(((z, z, a_low), (t, t_low, t)),
                                  *((turned, (smem["k"].at[b],) * 2) for b in range(n)))
                plgpu.commit_smem()
                for b, y in enumerate(ys):
                    smem["k"].at[b][...] = y.astype(dtype)
            z[...] = a.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(z, gmem["a"].at[batch, head, chunk])
            if erase:
                for b in range(n):
                    plgpu.copy_smem_to_gmem(smem["k"].at[b], gmem["y"].at[batch, here, head, pl.ds(b * BLOCK, BLOCK)])

            @pl.when(i + 1 < mine)
            def _():
                for name in ("q", *(("beta",) if erase else ())):
                    fetch(name, i + 1)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                fetch("k", i + 1)

        plgpu.wait_smem_to_gmem(0)

    got = plgpu.kernel(
        body, out_type=tuple(outs.values()), scratch_types=(scratch, plgpu.Barrier(num_arrivals=2 * n + erase)),
        grid=(programs,), grid_names=("program",), interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True,
                                             reduction_scratch_bytes=256),
    )(*operands.values())
    return dict(zip(outs, got, strict=True))


def solved(lower, row, col, ref, *, interpret):
    """(I + lower)^-1 float32 of a strictly lower [64, 64] matrix, refined, through an fp16 tile of shared memory."""
    def times(left, right):
        plgpu.commit_smem()  # all have read the last one
        ref[...] = right
        plgpu.commit_smem()
        return add_products((zeros(), left, (ref,) * len(left)), interpret=interpret)[0]

    row = row + lax.optimization_barrier(jnp.int32(0))  # no masks before the loop over chunks
    lower = plgpu.layout_cast(0.0 - lower, WGMMA)
    minus, minus_low = (plgpu.layout_cast(part, WGMMA) for part in two_parts(lower, jnp.float16))
    x = jnp.where(row == col, 1.0, jnp.where((row == col + 1) & ((row & 1) == 1), lower, 0.0))
    for level in range(1, 6):
        x16 = x.astype(jnp.float16)
        z = times((minus,), x16).astype(jnp.float16)
        z = times((x16,), z)
        left_block = jnp.where(((row >> level) & 1) == 1, (row >> level) - 1, -1)
        x = plgpu.layout_cast(jnp.where(left_block == (col >> level), z, x), WGMMA)
    x16 = x.astype(jnp.float16)
    x = x16.astype(jnp.float32)
    rest = jnp.where(row == col, 1.0, 0.0) - x + times((minus, minus_low), x16)
    return x + times((x16,), rest.astype(jnp.float16))


def weighted_pass(x, y, z, a, total, init, *, reverse, pieces, keep=False, interpret=None):
    """O = A Z + X S, S <- diag(2^total) S + Y^T Z, chunk after chunk; `reverse` from the end and with A^T.

    Args:
      x, y: [B, T, H, K]; z: [B, T, H, V] bf16, T a multiple of 64, K and V in {64, 128}. a: [B, H, N, 64, 64]; without
        x and a, no outputs are made. total: float32 [B, H, N, K].
      init: float32 [B, H, P, K, V] state entering each of the P pieces, or None for zero.
      keep: also return the states that enter the chunks. With neither outputs nor those, the last piece is skipped.
    Returns: dict with state [B, H, P or P-1, K, V] leaving each piece; o [B, T, H, V]; entering [B, H, N, K, V] bf16.
    """
    def chunk(walk):
        smem, own = walk.smem, walk.own
        terms = [(walk.decayed(walk.state), smem("y").transpose(T_CONTRACT), smem("z"))]
        if x is not None:
            scores = smem("a").transpose(T_CONTRACT) if reverse else smem("a")
            terms.append((zeros(), (scores, smem("x")), (smem("z"), walk.state16)))
        state, *o = add_products(*terms, interpret=interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk wrote has left shared memory
        if x is not None:
            own[...] = o[0].astype(own.dtype)
            plgpu.commit_smem()
            walk.store("o", own)
        return state

    results = (*(() if x is None else ("o",)), *(("entering",) if keep else ()))
    return walk_chunks(chunk, present(x=x, y=y), present(a=a), present(z=z, total=total, init=init), results,
                       reverse=reverse, pieces=pieces, stages=3, interpret=interpret)


def chunk_gradients(*arrays, scale, interpret=None):
    """dQ, dK and the gradient of the log decays, all chunks in parallel.

    With S the state entering the chunk, R the gradient of the state leaving it, W = scale dO V^T, and for a product of
    scores Z Z'^T (q e^b and k e^-b, or the two halves of a level) D = W Z' and D' = W^T Z, the gradients of Z and Z':
      dQ = scale e^b * dO S^T + sum over products of decay * D + diag(W) k
      dK = e^(b_63 - b) * V R^T + sum over products of decay * D' + diag(W) q
      dg_t = sum_{i >= t} (Z D - Z' D' + X * dX)_i + sum_{j < t} (Y * dY)_j + e^(b_63) rowsum(S * R)
    A pair of tokens on one side of t enters dg twice with opposite signs and the same rounding: only true terms stay.
    In a delta rule v is U, and dv the gradient of what the state is asked to hold. Then -dV V^T takes the place of W
    for the scores of k with k, and w = -k e^b has the gradient dV S^T: both add to dK and dg likewise.
    A program makes 64 channels of one chunk.

    Args: q, k, v, do, g, total, entering, leaving, and in a delta rule dv. As `chunk_weights` and `weighted_pass`; do,
      v, dv [B, T, H, V]; entering, leaving [B, H, N, K, V] bf16.
    Returns: dict with dq, dk, dg [B, T, H, K], dg in the dtype of g; with dv (then K = V) also held, float32
      [B, H, T], the row sums of dV * V.
    """
    total = arrays[5]
    strong = (jnp.min(total, axis=-1) < 1.0 - REACH).astype(jnp.float32)
    made = moderate_gradients(strong, *arrays, scale=scale, interpret=interpret)
    return strong_gradients(made, strong, *arrays, scale=scale, interpret=interpret)


def strong_gradients(made, strong, q, k, v, do, g, total, entering, leaving, dv=None, *, scale, interpret=None):
    """Puts the gradients of the chunks with strong [B, H, N] > 0 into `made`, the results of `moderate_gradients`.

    Resident programs take these chunks, whatever their decays, and leave at once where they have none.
    """
    b_size, t_size, heads, k_size = q.shape
    v_size, dtype = v.shape[-1], q.dtype
    chunks, n, n_v = t_size // CHUNK, k_size // BLOCK, v_size // BLOCK
    erase = dv is not None
    items = strong.size * n
    turns = pl.cdiv(pl.cdiv(items, PROGRAMS), BLOCK) * BLOCK  # of one program, which takes every PROGRAMS-th item
    flags = jnp.repeat(strong.reshape(-1), n)
    flags = jnp.pad(flags, (0, PROGRAMS * turns - items)).reshape(turns, PROGRAMS).T
    operands = present(q=q, k=k, v=v, do=do, dv=dv, g=g, total=total, entering=entering, leaving=leaving, flags=flags)
    values = ("do", "v", "dv")[: 2 + erase]
    # Lists where a tile is a product's operand by name: an operand cannot be indexed with a Python int.
    scratch = {name: [tile(SQUARE, dtype)] * n_v for name in ("do", "entering", "leaving")}
    scratch |= {name: tile((n_v, *SQUARE), dtype) for name in values[1:]}
    scratch |= {name: [tile(SQUARE, dtype)] * 2 for name in ("do", "entering")}
    if erase:
        scratch["dv"] = tile((2, *SQUARE), dtype)
    scratch |= {"q": tile(SQUARE, dtype), "k": tile(SQUARE, dtype), "log_decay": tile(SQUARE, jnp.float16),
                "carried": plgpu.SMEM((BLOCK,), jnp.float32)}

    def body(*refs):
        names = (*operands, *made)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, loaded = refs[len(names):]
        program = lax.axis_index("program")
        mine = gmem["flags"].at[program]

        @pl.when(jnp.max(plgpu.load(mine, layout=WGMMA.reduce(1), optimized=False)) > 0)
        def _():
            @pl.loop(0, turns)
            def _(i):
                @pl.when(mine[i] > 0)
                def _():
                    one_chunk(program + i * PROGRAMS, gmem, smem, loaded)

    def one_chunk(item, gmem, smem, loaded):
        index, part = lax.div(item, jnp.int32(n)), lax.rem(item, jnp.int32(n))
        index, chunk = lax.div(index, jnp.int32(chunks)), lax.rem(index, jnp.int32(chunks))
        batch, head = lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)

        def tiles_of(name):
            tiles = smem[name]
            return tuple(tiles[:n_v]) if isinstance(tiles, list) else tuple(tiles.at[b] for b in range(n_v))

        def scores_of(name):
            """The parts of the scores' gradients that took the place of `name`."""
            pair = smem["do"] if name == "do" else [smem["dv"].at[b] for b in range(2)]
            return tuple(plgpu.load(ref, layout=WGMMA) for ref in pair[: 1 + erase])

        for b in range(n_v):
            cols = pl.ds(b * BLOCK, BLOCK)
            for name in values:
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, cols], tiles_of(name)[b], loaded)
            for name in ("entering", "leaving"):
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk, mine, cols], tiles_of(name)[b], loaded)
        for name in ("q", "k"):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, mine], smem[name], loaded)
        g_here = gmem["g"].at[batch, here, head, mine]
        decays = load_decays(g_here)
        total_row = plgpu.load(gmem["total"].at[batch, head, chunk, mine], layout=WGMMA.reduce(1), optimized=False)

        def turned(name):
            return tuple(ref.transpose(T_CONTRACT) for ref in tiles_of(name))

        def between_halves(left, right, row, col):
            """What two tokens give to each other's gradients, from products of `left` rows with `right` rows."""
            forth, back = products((tiles_of(left), turned(right)), (tiles_of(right), turned(left)))
            return jnp.where(row >= col, forth, back)

        plgpu.barrier_wait(loaded)
        # The value tiles are spent one after the other and then hold other things, so that two programs share a
        # processor.
        levels = Levels(smem["log_decay"], smem["entering"][0], interpret)
        row, col = levels.row, levels.col
        w = between_halves("do", "v", row, col) * scale
        own = rows(jnp.sum(jnp.where(row == col, w, 0.0), axis=1), SQUARE)
        if erase:
            w, w_low = two_parts(w, dtype)
            w_erase, w_erase_low = two_parts(between_halves("dv", "v", row, col), dtype)

            @pl.when(part == 0)
            def _():
                held = (load(a) * load(b) for a, b in zip(tiles_of("dv"), tiles_of("v"), strict=True))
                gmem["held"].at[batch, head, here][...] = jnp.sum(sum(held), axis=1)

        else:
            w = w.astype(dtype)
        states = zip(tiles_of("entering"), tiles_of("leaving"), strict=True)
        kept = sum(jnp.sum(load(s) * load(r), axis=1) for s, r in states)
        smem["carried"][...] = kept * jnp.exp2(total_row)
        levels.g[...] = decays.astype(levels.g.dtype)
        plgpu.commit_smem()
        dx, = products((tiles_of("do"), turned("entering")))
        exponent, reads, least = levels.anchored()
        entered = jnp.exp2(-exponent - REACH / 2)
        dx = dx * entered * scale
        q_own, k_own = load(smem["q"]), load(smem["k"])
        dq, dk, dlog = dx + own * k_own, own * q_own, q_own * dx
        if erase:
            d_erase, = products((tiles_of("dv"), turned("entering")))
            d_erase = d_erase * entered
            dk, dlog = dk - d_erase, dlog - k_own * d_erase
            smem["do"][1][...] = w_low
            smem["dv"].at[0][...], smem["dv"].at[1][...] = w_erase, w_erase_low
        smem["do"][0][...] = w
        dy, = products((tiles_of("v"), turned("leaving")))
        dy = dy * jnp.exp2(levels.log2_decay(row < col))
        written = [smem["leaving"][0]]
        if erase:  # k * dy cancels as the scores do
            written.append(tiles_of("v")[0])
            written[0][...], written[1][...] = two_parts(k_own * dy, dtype)
        else:
            written[0][...] = (k_own * dy).astype(dtype)
        plgpu.commit_smem()
        dk = dk + dy

        kinds = (("q", "do"), ("k", "dv"))[: 1 + erase]  # what reads k, and the gradient of its scores

        def masked(keep, name):
            return tuple(jnp.where(keep, part, jnp.zeros(SQUARE, dtype)) for part in scores_of(name))

        back_tile = smem["entering"][1]
        back_tile[...] = (load(smem["k"]) * jnp.exp2(exponent)).astype(dtype)
        for name, given in kinds:
            z = levels.put(load(smem[name]) * reads)
            dz, = add_products((zeros(), masked(row > col, given), (back_tile,) * (1 + erase)), interpret=interpret)
            reach, dz = z.astype(jnp.float32) * dz, dz * reads
            dq, dk, dlog = (dq + dz, dk, dlog + reach) if name == "q" else (dq, dk - dz, dlog - reach)
            dz, = add_products((zeros(), masked(row < col, given), (levels.z,) * (1 + erase)), interpret=interpret)
            reach, dz = load(back_tile) * dz, dz * jnp.exp2(exponent)
            dk, dlog = (dk + dz, dlog - reach) if name == "q" else (dk - dz, dlog + reach)

        def level(i, carry):
            dq, dk, dlog = carry
            size = lax.shift_right_logical(jnp.int32(CHUNK // 2), i)
            right, decay = levels.weights(size, least)
            halves = levels.halves_of(size)

            def gradient(weighted, given):
                """(gradient of the tokens before their decay, change of dlog) through one kind of scores."""
                z = levels.put(weighted)
                dz, = add_products((zeros(), masked(halves, given), (levels.z,) * (1 + erase)), interpret=interpret)
                reach = z.astype(jnp.float32) * dz
                return dz * decay, jnp.where(right, reach, -reach)

            dz, reach = gradient(jnp.where(right, load(smem["q"]), load(smem["k"])) * decay, "do")
            dq, dk, dlog = dq + jnp.where(right, dz, 0.0), dk + jnp.where(right, 0.0, dz), dlog + reach
            if erase:
                dz, reach = gradient(load(smem["k"]) * decay, "dv")
                dk, dlog = dk - dz, dlog - reach
            return dq, dk, dlog

        dq, dk, dlog = lax.fori_loop(0, levels.steps(least), level, (dq, dk, dlog))
        high, low, before = smem["do"][0], levels.z, tiles_of("dv" if erase else "v")[0]
        high[...], low[...] = two_parts(dlog, dtype)  # terms of dlog cancel: 16 bits of them
        before[...] = jnp.where(row > col, 1.0, 0.0).astype(dtype)
        plgpu.commit_smem()
        # With the triangle of ones in registers some rows came out as infinities on the GPU (docs/kernels_gpu.md).
        after = before.transpose(T_CONTRACT)
        dg, = products(((after, after, *(before for _ in written)), (high, low, *written)))
        dg = dg + dlog + columns(plgpu.load(smem["carried"], layout=WGMMA.reduce(0)), SQUARE)
        alive = plgpu.load(g_here, layout=WGMMA, optimized=False).astype(jnp.float32) > MIN_LOG_DECAY
        gmem["dg"].at[batch, here, head, mine][...] = jnp.where(alive, dg, 0.0).astype(g.dtype)
        smem["q"][...], smem["k"][...] = dq.astype(dtype), dk.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["q"], gmem["dq"].at[batch, here, head, mine])
        plgpu.copy_smem_to_gmem(smem["k"], gmem["dk"].at[batch, here, head, mine])
        plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        body, scratch_types=(scratch, plgpu.Barrier(num_arrivals=(len(values) + 2) * n_v + 2)),
        grid=(PROGRAMS,), grid_names=("program",), interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=256),
    )
    put = pl.run_state(lambda refs: run(*operands.values(), *refs))(tuple(made.values()))
    return dict(zip(made, put, strict=True))


def moderate_gradients(strong, q, k, v, do, g, total, entering, leaving, dv=None, *, scale, interpret=None):
    """Gradients of the chunks where no channel decays by more than 2^-REACH: one product makes all scores.

    The chunks with strong [B, H, N] > 0 are left out.
    With c = 2^(-REACH / 2), b shifted by REACH / 2 and Z_q = q e^b, Z_k = -k e^b, Z_w = k e^-b as rounded:
      dZ_q = c scale dO S^T + W Z_w,   dZ_k = c dV S^T + (dV V^T) Z_w,   dZ_w = W^T Z_q + (dV V^T)^T Z_k
    with scores between different tokens: one accumulator for each, and one product with it for each gradient.
    """
    b_size, t_size, heads, k_size = q.shape
    v_size, dtype = v.shape[-1], q.dtype
    chunks, n, n_v = t_size // CHUNK, k_size // BLOCK, v_size // BLOCK
    erase = dv is not None
    operands = present(q=q, k=k, v=v, do=do, dv=dv, g=g, total=total, entering=entering, leaving=leaving, strong=strong)
    outs = {"dq": jax.ShapeDtypeStruct(q.shape, dtype), "dk": jax.ShapeDtypeStruct(k.shape, dtype),
            "dg": jax.ShapeDtypeStruct(g.shape, g.dtype)}
    if erase:
        outs["held"] = jax.ShapeDtypeStruct((b_size, heads, t_size), jnp.float32)
    values = ("do", "v", "dv")[: 2 + erase]
    # Lists, since a product's operand cannot be indexed with a Python int. Two of each: they hold other things later.
    scratch = {name: [tile(SQUARE, dtype)] * 2 for name in (*values, "entering", "leaving")}
    scratch |= {"q": tile(SQUARE, dtype), "k": tile(SQUARE, dtype), "log_decay": tile(SQUARE, jnp.float16),
                "carried": plgpu.SMEM((BLOCK,), jnp.float32)}
    spent = values[-1]  # one of its tiles holds fp16 later
    scratch[spent] = [plgpu.RefUnion(tile(SQUARE, dtype), tile(SQUARE, jnp.float16)), tile(SQUARE, dtype)]

    def body(*refs):
        names = (*operands, *outs)
        gmem = dict(zip(names, refs[: len(names)], strict=True))
        smem, loaded = refs[len(names):]
        (before, ones), z_w = smem[spent]
        smem = smem | {spent: [before, z_w], "ones": ones}
        column, chunk, batch = lax.axis_index("column"), lax.axis_index("chunk"), lax.axis_index("batch")
        head, part = lax.div(column, jnp.int32(n)), lax.rem(column, jnp.int32(n))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)
        for b in range(n_v):
            cols = pl.ds(b * BLOCK, BLOCK)
            for name in values:
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, cols], smem[name][b], loaded)
            for name in ("entering", "leaving"):
                plgpu.copy_gmem_to_smem(gmem[name].at[batch, head, chunk, mine, cols], smem[name][b], loaded)
        for name in ("q", "k"):
            plgpu.copy_gmem_to_smem(gmem[name].at[batch, here, head, mine], smem[name], loaded)

        # Read while the tiles arrive: after the barrier a program would wait for one read after the other.
        left_out = gmem["strong"][batch, head, chunk] > 0
        total_row = plgpu.load(gmem["total"].at[batch, head, chunk, mine], layout=WGMMA.reduce(1), optimized=False)
        decays = smem["log_decay"]
        decays[...] = load_decays(gmem["g"].at[batch, here, head, mine]).astype(decays.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)  # also where the chunk is left out: no transfer may outlive its program

        @pl.when(jnp.logical_not(left_out))
        def _():
            one_chunk(gmem, smem, total_row, batch, head, part, chunk)

    def one_chunk(gmem, smem, total_row, batch, head, part, chunk):
        (before, z_w), ones, decays = (smem[name] for name in (spent, "ones", "log_decay"))
        here, mine = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * BLOCK, BLOCK)
        row = plgpu.broadcasted_iota(jnp.int32, SQUARE, 0, layout=WGMMA)
        col = plgpu.broadcasted_iota(jnp.int32, SQUARE, 1, layout=WGMMA)

        def put_parts(x, into):
            """Stores x, in as many parts as tiles are given, each with what the last has left; returns the tiles."""
            for i, ref in enumerate(into):
                x = x if i == 0 else x - load(into[i - 1])
                ref[...] = x.astype(dtype)
            return tuple(into)

        # The tiles of values and states are spent one after the other and then hold other things, so that two
        # programs share a processor.
        tiles = {name: tuple(smem[name][:n_v]) for name in (*values, "entering", "leaving")}
        turned = {name: tuple(ref.transpose(T_CONTRACT) for ref in refs) for name, refs in tiles.items()}
        states = zip(tiles["entering"], tiles["leaving"], strict=True)
        kept = sum(jnp.sum(load(s) * load(r), axis=1) for s, r in states)
        smem["carried"][...] = kept * jnp.exp2(total_row)
        dy, = products((tiles["v"], turned["leaving"]))

        w, *more = products(*((tiles[name], turned["v"]) for name in ("do", "dv")[: 1 + erase]))
        w = w * scale
        plgpu.commit_smem()  # all have read what is written now, here and below
        own = jnp.sum(jnp.where(row == col, w, 0.0), axis=1)
        scores = [put_parts(jnp.where(row > col, w, 0.0), smem["leaving"][: 1 + erase])]
        if erase:
            held = jnp.sum(jnp.where(row == col, more[0], 0.0), axis=1)

            @pl.when(part == 0)
            def _():
                gmem["held"].at[batch, head, here][...] = held

            scores.append(put_parts(jnp.where(row > col, more[0], 0.0), smem["v"]))
        dx, *d_erase = products(*((tiles[name], turned["entering"]) for name in ("do", "dv")[: 1 + erase]))
        plgpu.commit_smem()
        ones[...] = jnp.where(row > col, 1.0, 0.0).astype(ones.dtype)
        plgpu.commit_smem()
        since, until = products((ones, decays), (ones.transpose(T_CONTRACT), decays))
        dk = dy * jnp.exp2(until * LOG2E)
        wrote = put_parts(load(smem["k"]) * dk, smem["do"][: 1 + erase])  # cancels, as scores do
        grown = jnp.exp2((since + load(decays)) * LOG2E + REACH / 2)
        # What reads (q, and in a delta rule -k) and what writes (k), decayed from the chunk's start and to it.
        z_q, z_k = smem["entering"]
        z_q[...] = (load(smem["q"]) * grown).astype(dtype)
        if erase:
            z_k[...] = (load(smem["k"]) * (0.0 - grown)).astype(dtype)
        z_w[...] = (load(smem["k"]) * (1.0 / grown)).astype(dtype)
        plgpu.commit_smem()

        def through(given, d):
            """d, of the state that enters, and what the tokens before give through these scores."""
            d = d * (2.0 ** (-REACH / 2))
            return add_products((d, given, (z_w,) * len(given)), interpret=interpret)[0]

        if erase:
            dz = through(scores[1], d_erase[0])
            dlog = load(z_k) * dz
            dk = dk + dz * (0.0 - grown)
        dz = through(scores[0], dx * scale)
        dlog = load(z_q) * dz + (dlog if erase else 0.0)
        own = rows(own, SQUARE)
        dk = dk + own * load(smem["q"])
        smem["q"][...] = (dz * grown + own * load(smem["k"])).astype(dtype)
        reads = [(ref, z) for given, z in zip(scores, (z_q, z_k), strict=False) for ref in given]
        dz, = products((tuple(ref.transpose(T_CONTRACT) for ref, _ in reads), tuple(z for _, z in reads)))
        dlog = dlog + (0.0 - load(z_w)) * dz
        smem["k"][...] = (dk + dz * (1.0 / grown)).astype(dtype)
        plgpu.commit_smem()
        parts = put_parts(dlog, smem["entering"])  # terms of dlog cancel: 16 bits of them
        before[...] = jnp.where(row > col, 1.0, 0.0).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["q"], gmem["dq"].at[batch, here, head, mine])
        plgpu.copy_smem_to_gmem(smem["k"], gmem["dk"].at[batch, here, head, mine])
        # With the triangle of ones in registers some rows came out as infinities on the GPU (docs/kernels_gpu.md).
        after = before.transpose(T_CONTRACT)
        dg, = products(((after, after, *(before for _ in wrote)), (*parts, *wrote)))
        dg = dg + dlog + columns(plgpu.load(smem["carried"], layout=WGMMA.reduce(0)), SQUARE)
        alive = load(decays) > MIN_LOG_DECAY
        gmem["dg"].at[batch, here, head, mine][...] = jnp.where(alive, dg, 0.0).astype(g.dtype)
        plgpu.wait_smem_to_gmem(0)

    arrivals = (len(values) + 2) * n_v + 2
    got = plgpu.kernel(
        body, out_type=tuple(outs.values()), scratch_types=(scratch, plgpu.Barrier(num_arrivals=arrivals)),
        grid=(heads * n, chunks, b_size), grid_names=("column", "chunk", "batch"), interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True,
                                             reduction_scratch_bytes=256),
    )(*operands.values())
    return dict(zip(outs, got, strict=True))
