"""Grouped matmul on Hopper GPUs through Pallas Mosaic GPU: the product with each group's matrix and both gradients.

A program takes output tiles of 128 x 256 (or 128) in turn; one warpgroup brings operand tiles by TMA into a ring of
stages, two others own 64 rows each. Tiles of rows are aligned to the array and not to the groups: where a tile holds
rows of several groups it adds their products one after the other, with the rows of the others masked, so every output
tile is written once, whole, and rows of no group come out as zeros.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import T_CONTRACT, WGMMA, not_hopper, tile

PROGRAMS = 132  # multiprocessors of an H100 or H200
ROWS, INNER = 128, 64  # of an output tile; contracted at a time
HALF = ROWS // 2  # rows of one computing warpgroup
MEMORY = 225 * 1024  # shared memory for tiles, bytes


def supports(*, lhs, rhs, **_):
    """None where `grouped_matmul` takes these arrays, else why not, in one line."""
    if reason := not_hopper():
        return reason
    first = rhs[0]
    if not lhs.dtype == first.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"lhs and rhs must both be bfloat16 or float16, got {lhs.dtype}, {first.dtype}"
    if first.shape[1] % 128 or first.shape[2] % 128:
        return f"K and N must be multiples of 128, got {first.shape[1]}, {first.shape[2]}"
    if lhs.shape[0] % 8:
        return f"M must be a multiple of 8, got {lhs.shape[0]}"
    return None


def grouped_matmul(lhs, rhs, group_sizes):
    """See `pallas_kernels.api.grouped_matmul`."""
    return _product(lhs, rhs, group_bounds(group_sizes))


def group_bounds(group_sizes):
    """First row of each group and the row after its last: int32 [2, E]."""
    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.sum(jnp.tri(len(sizes), dtype=jnp.int32) * sizes, axis=1)
    return jnp.stack([ends - sizes, ends])


@jax.custom_vjp
def _product(lhs, rhs, bounds):
    # In a loop over layers XLA would run the kernel a second time to write what is saved for the backward pass.
    return lax.optimization_barrier(rows_times(lhs, rhs, bounds, transpose=False))


def _forward(lhs, rhs, bounds):
    return _product(lhs, rhs, bounds), (lhs, rhs, bounds)


def _backward(residuals, dy):
    lhs, rhs, bounds = residuals
    return rows_times(dy, rhs, bounds, transpose=True), outer_products(lhs, dy, bounds, parts=len(rhs)), None


_product.defvjp(_forward, _backward)


def _columns(n):
    return 256 if n % 256 == 0 else 128


def _launch(body, out, columns, left, right, operands, interpret):
    """body(refs, smem, full, empty, stages) on every multiprocessor; operand tiles `left`, `right` fill the memory."""
    dtype = operands[0].dtype
    stages = (MEMORY - ROWS * columns * 2) // ((math.prod(left) + math.prod(right)) * 2)
    scratch = {
        "left": tile((stages, *left), dtype),
        "right": tile((stages, *right), dtype),
        "out": tile((ROWS, columns), dtype),
    }
    ring = plgpu.Barrier(num_arrivals=2, num_barriers=stages)

    def kernel(*refs):
        *refs, smem, full, empty = refs
        body(refs, smem, full, empty, stages)

    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=(scratch, ring, ring),
        grid=(PROGRAMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
    )(*operands)


def _for_items(items, one):
    """one(item, step) -> step for every PROGRAMS-th item: the last step."""
    sm = lax.axis_index("sm")
    mine = lax.div(items - sm + PROGRAMS - 1, jnp.int32(PROGRAMS))
    return lax.fori_loop(0, mine, lambda i, step: one(sm + i * PROGRAMS, step), jnp.int32(0))


def _load(bring, full, empty, stages, step, steps):
    """The loading warpgroup brings the operands of steps i < `steps` into the ring, bring(i, slot): the step after."""

    @pl.loop(0, steps)
    def _(i):
        slot = lax.rem(step + i, jnp.int32(stages))

        @pl.when(step + i >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        bring(i, slot)

    return step + steps


def _store(y, smem, gmem):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = y.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)


def _in_part(refs, at, per_part, act):
    """act(ref, at within it) for the one of `refs` with `per_part` units each, side by side, that unit `at` is in."""
    for part, ref in enumerate(refs):
        pl.when(lax.div(at, jnp.int32(per_part)) == part)(functools.partial(act, ref, at - part * per_part))


def _multiply(product, first, last, *, full, empty, stages, offset):
    """product(slot, i) for first <= i < last; a stage is released once the next product has been issued."""

    @pl.loop(first, last)
    def _(i):
        slot = lax.rem(offset + i, jnp.int32(stages))
        plgpu.barrier_wait(full.at[slot])
        product(slot, i)
        plgpu.wgmma_wait(1)

        @pl.when(i > first)
        def _():
            plgpu.barrier_arrive(empty.at[lax.rem(offset + i - 1, jnp.int32(stages))])

    plgpu.wgmma_wait(0)

    @pl.when(last > first)
    def _():
        plgpu.barrier_arrive(empty.at[lax.rem(offset + last - 1, jnp.int32(stages))])


def _skip(full, empty, stages, step, steps):
    """Lets stages pass that hold nothing for this warpgroup."""

    @pl.loop(step, step + steps)
    def _(n):
        slot = lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(full.at[slot])
        plgpu.barrier_arrive(empty.at[slot])


def _mask(ref, at, start, end):
    """Zeros the rows of a tile [64, 64] that lie outside of start .. end, where `at` is its first."""
    x = plgpu.load(ref, layout=WGMMA)
    row = at + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA)
    ref[...] = jnp.where((row >= start) & (row < end), x.astype(jnp.float32), 0.0).astype(x.dtype)
    plgpu.commit_smem()


def _drain(empty, stages, total):
    """Leaves no barrier phase unobserved."""

    @pl.loop(jnp.maximum(total - stages, 0), total)
    def _(n):
        plgpu.barrier_wait(empty.at[lax.rem(n, jnp.int32(stages))])


def rows_times(lhs, rhs, bounds, *, transpose, interpret=None):
    """Rows of lhs times the matrices of their group, a tuple of P arrays rhs.

    lhs [M, K], rhs [E, K, N]: [M, P N], the products side by side. With `transpose` lhs [M, P K], rhs [E, N, K]: the
    sum of the products of each K columns with a matrix transposed, [M, N].
    """
    m, k_size = lhs.shape
    parts = len(rhs)
    n_part = rhs[0].shape[1 if transpose else 2]  # columns of one product
    n_size = n_part if transpose else parts * n_part
    columns = _columns(n_part)
    blocks, n_blocks, steps = pl.cdiv(m, ROWS), n_size // columns, k_size // INNER
    per_part = k_size // parts // INNER if transpose else n_part // columns  # steps, or blocks of columns
    low = jnp.arange(blocks)[:, None] * ROWS
    # first group of each block of rows and the group after its last; groups without rows may lie between
    spans = jnp.stack([jnp.sum(bounds[1] <= low, 1), jnp.sum(bounds[0] < low + ROWS, 1)]).astype(jnp.int32)

    def body(refs, smem, full, empty, stages):
        lhs, *rhs, bounds, spans, out = refs
        wg = lax.axis_index("wg")

        def for_tiles(item):
            """item(step, block, column) -> step for every output tile of this program; `step` counts stages."""

            def one(at, step):
                return item(step, lax.div(at, jnp.int32(n_blocks)), lax.rem(at, jnp.int32(n_blocks)))

            return _for_items(blocks * n_blocks, one)

        def for_groups(product, step, block):
            """product(step, group, start, end) -> step for every group with rows start .. end in this block."""

            def one(group, step):
                start = jnp.maximum(bounds[0, group], block * ROWS)
                end = jnp.minimum(bounds[1, group], (block + 1) * ROWS)
                return lax.cond(start < end, lambda s: product(s, group, start, end), lambda s: s, step)

            return lax.fori_loop(spans[0, block], spans[1, block], one, step)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def item(step, block, column):
                def product(step, group, *_):
                    def bring(i, slot):
                        def bring_matrix(matrix, at):
                            inner = pl.ds((at if transpose else i) * INNER, INNER)
                            outer = pl.ds((column if transpose else at) * columns, columns)
                            there = matrix.at[group, outer, inner] if transpose else matrix.at[group, inner, outer]
                            plgpu.copy_gmem_to_smem(there, smem["right"].at[slot], full.at[slot])

                        rows, inner = pl.ds(block * ROWS, ROWS), pl.ds(i * INNER, INNER)
                        plgpu.copy_gmem_to_smem(lhs.at[rows, inner], smem["left"].at[slot], full.at[slot])
                        _in_part(rhs, i if transpose else column, per_part, bring_matrix)

                    return _load(bring, full, empty, stages, step, steps)

                return for_groups(product, step, block)

            _drain(empty, stages, for_tiles(item))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * HALF, HALF)

            def item(step, block, column):
                first = block * ROWS + wg * HALF

                def multiply(acc):
                    def add(slot, _):
                        matrix = smem["right"].at[slot]
                        matrix = matrix.transpose(T_CONTRACT) if transpose else matrix
                        plgpu.wgmma(acc, smem["left"].at[slot, mine], matrix)

                    def product(step, _, start, end):
                        def add_masked(slot, i):
                            _mask(smem["left"].at[slot, mine], first, start, end)
                            add(slot, i)

                        run = functools.partial(_multiply, full=full, empty=empty, stages=stages, offset=step)
                        inside = (start <= first) & (end >= first + HALF)
                        outside = (start >= first + HALF) | (end <= first)

                        @pl.when(inside)
                        def _():
                            run(add, 0, steps)

                        @pl.when(outside)
                        def _():
                            _skip(full, empty, stages, step, steps)

                        @pl.when(jnp.logical_not(inside | outside))
                        def _():
                            run(add_masked, 0, steps)

                        return step + steps

                    return for_groups(product, step, block), acc[...]

                step, y = pl.run_scoped(multiply, plgpu.ACC((HALF, columns)))
                _store(y, smem["out"].at[mine], out.at[pl.ds(first, HALF), pl.ds(column * columns, columns)])
                return step

            for_tiles(item)
            plgpu.wait_smem_to_gmem(0)

    right = (columns, INNER) if transpose else (INNER, columns)
    out = jax.ShapeDtypeStruct((m, n_size), lhs.dtype)
    return _launch(body, out, columns, (ROWS, INNER), right, (lhs, *rhs, bounds, spans), interpret)


def outer_products(lhs, dy, bounds, *, parts=1, interpret=None):
    """lhs_g^T dy_g of each group g, lhs [M, K] and dy [M, parts N]: a tuple of `parts` arrays [E, K, N]."""
    k_size, n_size, groups = lhs.shape[1], dy.shape[1], bounds.shape[1]
    columns = _columns(n_size // parts)
    per_part = n_size // parts // columns
    k_blocks, n_blocks = k_size // ROWS, n_size // columns

    def body(refs, smem, full, empty, stages):
        lhs, dy, bounds, *out = refs
        wg = lax.axis_index("wg")

        def for_tiles(item):
            """item(step, place, rows, steps) -> step for every output tile; place: group, block of rows, of columns."""

            def one(at, step):
                per_group = jnp.int32(k_blocks * n_blocks)
                group, rest = lax.div(at, per_group), lax.rem(at, per_group)
                start, end = bounds[0, group], bounds[1, group]
                first = lax.div(start, jnp.int32(8)) * 8  # tiles in shared memory have 8 rows
                steps = jnp.where(start < end, lax.div(end - first + INNER - 1, jnp.int32(INNER)), 0)
                place = group, lax.div(rest, jnp.int32(n_blocks)), lax.rem(rest, jnp.int32(n_blocks))
                return item(step, place, (first, start, end), steps)

            return _for_items(groups * k_blocks * n_blocks, one)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def item(step, place, rows, steps):
                def bring(i, slot):
                    here = pl.ds(pl.multiple_of(rows[0] + i * INNER, 8), INNER)
                    left, right = pl.ds(place[1] * ROWS, ROWS), pl.ds(place[2] * columns, columns)
                    plgpu.copy_gmem_to_smem(lhs.at[here, left], smem["left"].at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(dy.at[here, right], smem["right"].at[slot], full.at[slot])

                return _load(bring, full, empty, stages, step, steps)

            _drain(empty, stages, for_tiles(item))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * HALF, HALF)

            def item(step, place, rows, steps):
                first, start, end = rows

                def multiply(acc):
                    def add(slot, _):
                        plgpu.wgmma(acc, smem["left"].at[slot, :, mine].transpose(T_CONTRACT), smem["right"].at[slot])

                    def add_masked(slot, i):  # the first and last steps may hold rows of other groups
                        _mask(smem["left"].at[slot, :, mine], first + i * INNER, start, end)
                        add(slot, i)

                    run = functools.partial(_multiply, full=full, empty=empty, stages=stages, offset=step)
                    last = jnp.maximum(steps - 1, 1)
                    run(add_masked, 0, jnp.minimum(steps, 1))
                    run(add, 1, last)
                    run(add_masked, last, steps)
                    return acc[...]

                y = pl.run_scoped(multiply, plgpu.ACC((HALF, columns)))
                group, row, column = place
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                result = smem["out"].at[mine]
                result[...] = y.astype(result.dtype)
                plgpu.commit_smem()

                def store(out, column):
                    here = pl.ds(row * ROWS + wg * HALF, HALF), pl.ds(column * columns, columns)
                    plgpu.copy_smem_to_gmem(result, out.at[group, *here])

                _in_part(out, column, per_part, store)
                return step + steps

            for_tiles(item)
            plgpu.wait_smem_to_gmem(0)

    out = (jax.ShapeDtypeStruct((groups, k_size, n_size // parts), lhs.dtype),) * parts
    return _launch(body, out, columns, (INNER, ROWS), (INNER, columns), (lhs, dy, bounds), interpret)
