"""Pieces shared by the Mosaic GPU kernels: tiles, products and the walk over the chunks of a sequence."""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
BLOCK = 64  # rows or columns of the state that one warpgroup owns
WGMMA = plgpu.Layout.WGMMA
T_CONTRACT = (1, 0)  # transpose of a shared-memory tile, free for wgmma
MOSAIC_AS_WRITTEN = jax.__version_info__ < (0, 12)


def not_hopper():
    """None where the default GPU can run these kernels (or there is none, as when lowering only), else why not."""
    if jax.default_backend() != "gpu":
        return None
    if not MOSAIC_AS_WRITTEN:
        return f"needs jax 0.11: Mosaic GPU has other rules for transfers in {jax.__version__}"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "unknown")
    if str(capability) == "9.0":
        return None
    return f"needs compute capability 9.0 (Hopper), {device.device_kind} has {capability}"


def tile(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


# The casts pin layouts that the compiler would otherwise search for, at worst for minutes.
def rows(vector, shape):
    vector = plgpu.layout_cast(vector, WGMMA.reduce(1))
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), WGMMA)


def columns(vector, shape):
    vector = plgpu.layout_cast(vector, WGMMA.reduce(0))
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [1]), WGMMA)


def add_products(*terms, interpret):
    """[acc + a @ b for (acc, a, b) in terms], all products in flight together; a and b may be tuples, summed over.

    Tuples of registers follow one another: two in flight for one accumulator make ptxas wait after every product of the
    kernel ("C7514").
    """
    terms = [(acc, a, b) if isinstance(a, tuple) else (acc, (a,), (b,)) for acc, a, b in terms]
    rounds = max(len(left) if isinstance(left[0], jax.Array) else 1 for _, left, _ in terms)
    if rounds > 1:
        sums = [acc for acc, _, _ in terms]
        for i in range(rounds):
            now = [n for n, (_, left, _) in enumerate(terms) if i < len(left)]
            found = add_products(*((sums[n], terms[n][1][i], terms[n][2][i]) for n in now), interpret=interpret)
            for n, value in zip(now, found, strict=True):
                sums[n] = value
        return sums

    def onto(refs):
        for ref, (_, left, right) in zip(refs, terms, strict=True):
            for a, b in zip(left, right, strict=True):
                plgpu.wgmma(ref, a, b)

    def one(a, b):
        if isinstance(a, jax.Array):
            return jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return products((a, b))[0]

    if interpret:  # the interpreter knows neither initialised accumulators nor operands in registers
        return [acc + sum(map(one, left, right)) for acc, left, right in terms]
    return pl.run_state(onto)([plgpu.ACC.init(acc) for acc, _, _ in terms])


def release(barrier):
    """This warpgroup has read a stage: its plain reads come before the copy engine's next write to it."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def products(*pairs):
    """[a @ b for (a, b) in pairs] of shared-memory tiles, all in flight together; tuples of tiles are summed over."""
    pairs = [(a, b) if isinstance(a, tuple) else ((a,), (b,)) for a, b in pairs]

    def fresh(*refs):
        for ref, (left, right) in zip(refs, pairs, strict=True):
            for a, b in zip(left, right, strict=True):
                plgpu.wgmma(ref, a, b)
        return [ref[...] for ref in refs]

    shapes = [(left[0].shape[0], right[0].shape[1]) for left, right in pairs]
    return pl.run_scoped(fresh, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def decayed_scores(a, c_row, c_ref, reverse):
    """Scores [64, 64] of a chunk against itself: masked, and decayed where `c_ref` holds the chunk's log2 decays."""
    row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=WGMMA)
    col = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=WGMMA)
    keep = row <= col if reverse else row >= col
    if c_ref is None:
        return jnp.where(keep, a, 0.0)
    gap = rows(c_row, a.shape) - columns(plgpu.load(c_ref, layout=WGMMA.reduce(0)), a.shape)
    return a * jnp.exp2(jnp.where(keep, gap, -jnp.inf))  # mask the exponent: where it is dropped it may be large


def split_diagonal(a):
    """(diagonal [64], the rest): what a token gives itself, which no decay makes small, is kept from gates' sums."""
    row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=WGMMA)
    col = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=WGMMA)
    return jnp.sum(jnp.where(row == col, a, 0.0), axis=1), jnp.where(row == col, 0.0, a)


def later_scores(a, c_row, c_ref):
    """The transpose of `decayed_scores(a^T, ...)`: row j holds what token j gives to the tokens from j on."""
    row = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=WGMMA)
    col = plgpu.broadcasted_iota(jnp.int32, a.shape, 1, layout=WGMMA)
    if c_ref is None:
        return jnp.where(row <= col, a, 0.0)
    gap = columns(plgpu.load(c_ref, layout=WGMMA.reduce(0)), a.shape) - rows(c_row, a.shape)
    return a * jnp.exp2(jnp.where(row <= col, gap, -jnp.inf))


def _on_chip(left, right, tile, *, interpret):
    """left @ right of [64, 64] fp16 registers, through a tile of shared memory."""
    tile[...] = right
    plgpu.commit_smem()
    zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
    return add_products((zero, left, tile), interpret=interpret)[0]


def two_parts(x, dtype):
    """x as the sum of two arrays of `dtype`, twice its digits."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def unit_lower_inverse(lower, tile, *, interpret):
    """(I + lower)^-1 float32 of a strictly lower [64, 64] matrix, through an fp16 tile of shared memory.

    The inverse of the diagonal blocks of size 2b comes from those of size b: X <- X - (X lower X)_off, with _off the
    lower left b x b blocks. Only inverses are multiplied, never powers of `lower`. Operands are fp16: entries of the
    inverse stay moderate for beta |k|^2 <= 2, and three more bits than bf16 keep the error below that of storing it.
    """
    row = plgpu.broadcasted_iota(jnp.int32, lower.shape, 0, layout=WGMMA)
    col = plgpu.broadcasted_iota(jnp.int32, lower.shape, 1, layout=WGMMA)
    x = jnp.where(row == col, 1.0, jnp.where((row ^ col) == 1, -lower, 0.0))
    lower = lower.astype(jnp.float16)
    for size in (2, 4, 8, 16, 32):
        x16 = x.astype(jnp.float16)
        right = _on_chip(lower, x16, tile, interpret=interpret).astype(jnp.float16)
        z = _on_chip(-x16, right, tile, interpret=interpret)
        differ = row ^ col
        x = jnp.where((row > col) & (differ >= size) & (differ < 2 * size), z, x)
    return x


class Walk:
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

    def load(self, copies, full, empty, late=None):
        """The loading warpgroup: `copies(chunk, slot)` lists (source, destination) pairs.

        late: tiles with room for one chunk only, (copies(chunk), full, empty).
        """
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, self.steps)
        def _(i):
            slot = self.slot(i)

            @pl.when(i >= self.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            for src, dst in copies(self.chunk(i), slot):
                plgpu.copy_gmem_to_smem(src, dst, full.at[slot])
            if late:
                late_copies, late_full, late_empty = late

                @pl.when(i >= 1)
                def _():
                    plgpu.barrier_wait(late_empty)

                for src, dst in late_copies(self.chunk(i)):
                    plgpu.copy_gmem_to_smem(src, dst, late_full)

        @pl.loop(jnp.maximum(self.steps - self.stages, 0), self.steps)
        def _(i):  # leave no barrier phase unobserved
            plgpu.barrier_wait(empty.at[self.slot(i)])

        if late:
            plgpu.barrier_wait(late[2])


def launch(body, operands, outs, *, arrivals, consumers, stages, grid, extra_scratch, scratch, interpret):
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


def present(**arrays):
    return {name: a for name, a in arrays.items() if a is not None}
