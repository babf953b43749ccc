"""Grouped matmul on Hopper GPUs through Pallas Mosaic GPU: the product with each group's matrix and both gradients.

A program takes output tiles of 128 x 256 (or 128) in turn; loading warpgroups bring operand tiles by TMA into rings of
stages, two others own 64 rows each. Tiles of rows are aligned to the array and not to the groups. A tile with rows of
several groups is two pieces of work, one per half of its columns: there the two halves of a step's right tile hold that
half of the matrices of two groups, each row takes the product of its own, and so such a piece costs what any other tile
costs. Every output tile is written whole and rows of no group come out as zeros.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.tiles import T_CONTRACT, WGMMA, not_hopper, tile

PROGRAMS = 132  # multiprocessors of an H100 or H200
ROWS, INNER = 128, 64  # of an output tile; contracted at a time
HALF = ROWS // 2  # rows of one computing warpgroup
MEMORY = 226 * 1024  # shared memory for tiles and the table of groups, bytes


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
    return _product(lhs, rhs, group_starts(group_sizes))


def group_starts(group_sizes):
    """First row of each of E groups, then the row after the last, repeated: int32 [E + 2 or more]."""
    sizes = group_sizes.astype(jnp.int32)
    places = jnp.arange(pl.cdiv(len(sizes) + 2, 32) * 32)[:, None]  # whole transfers
    return jnp.sum(jnp.where(places > jnp.arange(len(sizes)), sizes, 0), axis=1, dtype=jnp.int32)


@jax.custom_vjp
def _product(lhs, rhs, starts):
    # In a loop over layers XLA would run the kernel a second time to write what is saved for the backward pass.
    return lax.optimization_barrier(rows_times(lhs, rhs, starts, transpose=False))


def _forward(lhs, rhs, starts):
    return _product(lhs, rhs, starts), (lhs, rhs, starts)


def _backward(residuals, dy):
    lhs, rhs, starts = residuals
    dlhs = rows_times(dy, rhs, starts, transpose=True)
    return dlhs, outer_products(lhs, dy, starts, rhs[0].shape[0], parts=len(rhs)), None


_product.defvjp(_forward, _backward)


def _half(n):
    """Columns of half an output tile."""
    return 128 if n % 256 == 0 else 64


class Ring(NamedTuple):
    """Barriers of the stages in shared memory that a loading warpgroup fills and both computing ones read."""

    full: jax.Array
    empty: jax.Array
    stages: int

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.stages))

    def wait(self, step):
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step):
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])

    def load(self, bring, step, steps):
        """Fills the stages of steps i < `steps`, bring(i, slot, barrier): the step after."""

        @pl.loop(0, steps)
        def _(i):
            slot = self.slot(step + i)

            @pl.when(step + i >= self.stages)
            def _():
                plgpu.barrier_wait(self.empty.at[slot])

            bring(i, slot, self.full.at[slot])

        return step + steps

    def drain(self, total):
        """Leaves no barrier phase unobserved."""

        @pl.loop(jnp.maximum(total - self.stages, 0), total)
        def _(n):
            plgpu.barrier_wait(self.empty.at[self.slot(n)])


def _launch(kernel, out, scratch, threads, operands, interpret):
    """kernel(*refs, scratch) in `threads` warpgroups on every multiprocessor."""
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=(scratch,),
        grid=(PROGRAMS,),
        grid_names=("sm",),
        num_threads=threads,
        thread_name="wg",
        interpret=interpret,
    )(*operands)


def _for_items(items, one):
    """one(item, step) -> step for every PROGRAMS-th item: the last step."""
    sm = lax.axis_index("sm")
    mine = lax.div(items - sm + PROGRAMS - 1, jnp.int32(PROGRAMS))
    return lax.fori_loop(0, mine, lambda i, step: one(sm + i * PROGRAMS, step), jnp.int32(0))


def _in_part(refs, at, per_part, act):
    """act(ref, at within it) for the one of `refs` with `per_part` units each, side by side, that unit `at` is in."""
    for part, ref in enumerate(refs):
        pl.when(lax.div(at, jnp.int32(per_part)) == part)(functools.partial(act, ref, at - part * per_part))


def _multiply(product, rings, offset, first, last, *, in_flight=1):
    """product(i, *slots) for first <= i < last, of `in_flight` wgmma; frees a stage after issuing the next product."""

    def release(step):
        for ring in rings:
            ring.release(step)

    @pl.loop(first, last)
    def _(i):
        for ring in rings:
            ring.wait(offset + i)
        product(i, *(ring.slot(offset + i) for ring in rings))
        plgpu.wgmma_wait(in_flight)
        pl.when(i > first)(lambda: release(offset + i - 1))

    plgpu.wgmma_wait(0)
    pl.when(last > first)(lambda: release(offset + last - 1))


def _mask(ref, at, start, end):
    """Zeros the rows of a tile [64, 64] that lie outside of start .. end, where `at` is its first."""
    x = plgpu.load(ref, layout=WGMMA)
    row = at + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA)
    ref[...] = jnp.where((row >= start) & (row < end), x.astype(jnp.float32), 0.0).astype(x.dtype)
    plgpu.commit_smem()


def _groups_before(starts, groups, row):
    """How many of the groups end at `row` or before."""

    def halve(_, span):
        low, high = span
        middle = lax.div(low + high, jnp.int32(2))
        before = (middle < high) & (starts[middle + 1] <= row)
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    return lax.fori_loop(0, groups.bit_length(), halve, (jnp.int32(0), jnp.int32(groups)))[0]


def rows_times(lhs, rhs, starts, *, transpose, interpret=None):
    """Rows of lhs times the matrices of their group, a tuple of P arrays rhs.

    lhs [M, K], rhs [E, K, N]: [M, P N], the products side by side. With `transpose` lhs [M, P K], rhs [E, N, K]: the
    sum of the products of each K columns with a matrix transposed, [M, N].
    """
    m, k_size = lhs.shape
    parts, groups = len(rhs), rhs[0].shape[0]
    n_part = rhs[0].shape[1 if transpose else 2]  # columns of one product
    n_size = n_part if transpose else parts * n_part
    half = _half(n_part)
    blocks, n_blocks, steps = pl.cdiv(m, ROWS), n_size // (2 * half), k_size // INNER
    per_part = k_size // parts // INNER if transpose else n_part // half  # steps, or halves of tiles

    stages = (MEMORY - starts.size * 4 - ROWS * half * 2) // ((ROWS + 2 * half) * INNER * 2)
    right = (half, INNER) if transpose else (INNER, half)
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    scratch = {
        "left": tile((stages, ROWS, INNER), lhs.dtype),
        "right": tile((stages, 2, *right), lhs.dtype),
        "out": tile((2, HALF, half), lhs.dtype),
        "starts": plgpu.SMEM(starts.shape, jnp.int32),
        "left ring": (ring(num_arrivals=1), ring(num_arrivals=2)),
        "right ring": (ring(num_arrivals=2), ring(num_arrivals=2)),
        "ready": plgpu.Barrier(num_arrivals=1),
    }

    def kernel(*refs):
        lhs, *rhs, given, out, smem = refs
        starts = smem["starts"]
        left, right = (Ring(*smem[f"{side} ring"], stages) for side in ("left", "right"))
        wg = lax.axis_index("wg")

        def for_tiles(whole, mixed):
            """whole(step, block, column, group) -> step for each output tile of this program with rows of one group,
            mixed(step, block, half column, first group, groups) for half of the columns of the others."""

            def one(at, step):
                # Beyond all tiles one item per group: the second half of the tile where it ends before another.
                second = at >= blocks * n_blocks
                at = jnp.where(second, at - blocks * n_blocks, at)
                row, column = lax.div(at, jnp.int32(n_blocks)), lax.rem(at, jnp.int32(n_blocks))
                end = starts[jnp.minimum(row, groups - 1) + 1]
                block = jnp.where(second, lax.div(end, jnp.int32(ROWS)), row)
                low, high = block * ROWS, jnp.minimum((block + 1) * ROWS, m)
                first = _groups_before(starts, groups, low)
                alone = (first == groups) | (starts[first + 1] >= high)
                last = jnp.minimum(_groups_before(starts, groups, high - 1) + 1, groups)
                half_column = 2 * column + second.astype(jnp.int32)
                step = lax.cond(alone & ~second, lambda s: whole(s, block, column, first), lambda s: s, step)
                return lax.cond(
                    ~alone & (~second | (first == row)),
                    lambda s: mixed(s, block, half_column, first, last),
                    lambda s: s,
                    step,
                )

            return _for_items((blocks + groups) * n_blocks, one)

        def for_pairs(product, step, block, first, last):
            """product(step, group, the next one) -> step for all two groups with rows in a block."""
            low, high = block * ROWS, (block + 1) * ROWS

            def one(i, step):
                group = first + 2 * i
                present = jnp.minimum(starts[group + 2], high) > jnp.maximum(starts[group], low)
                return lax.cond(
                    present, lambda s: product(s, group, jnp.minimum(group + 1, groups - 1)), lambda s: s, step
                )

            return lax.fori_loop(0, lax.div(last - first + 1, jnp.int32(2)), one, step)

        @pl.when(wg == 2)
        def _():
            plgpu.copy_gmem_to_smem(given, starts, smem["ready"])

        plgpu.barrier_wait(smem["ready"])

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, block, steps):
                def bring(i, slot, barrier):
                    rows, inner = pl.ds(block * ROWS, ROWS), pl.ds(i * INNER, INNER)
                    plgpu.copy_gmem_to_smem(lhs.at[rows, inner], smem["left"].at[slot], barrier)

                return left.load(bring, step, steps)

            def whole(step, block, column, group):
                return load(step, block, jnp.where(group < groups, steps, 0))

            def mixed(step, block, column, first, last):
                return for_pairs(lambda step, *_: load(step, block, steps), step, block, first, last)

            left.drain(for_tiles(whole, mixed))

        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, pair, steps):
                def bring(i, slot, barrier):
                    def bring_matrix(matrix, at, group, into, column):
                        inner = pl.ds((at if transpose else i) * INNER, INNER)
                        outer = pl.ds((column if transpose else at) * half, half)
                        there = matrix.at[group, outer, inner] if transpose else matrix.at[group, inner, outer]
                        plgpu.copy_gmem_to_smem(there, into, barrier)

                    for which, (group, column) in enumerate(pair):
                        into = smem["right"].at[slot, which]
                        act = functools.partial(bring_matrix, group=group, into=into, column=column)
                        _in_part(rhs, i if transpose else column, per_part, act)

                return right.load(bring, step, steps)

            def whole(step, block, column, group):
                there = group < groups
                group = jnp.minimum(group, groups - 1)
                return load(step, ((group, 2 * column), (group, 2 * column + 1)), jnp.where(there, steps, 0))

            def mixed(step, block, column, first, last):
                def product(step, a, b):
                    return load(step, ((a, column), (b, column)), steps)

                return for_pairs(product, step, block, first, last)

            right.drain(for_tiles(whole, mixed))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(216, action="increase")
            mine, result = pl.ds(wg * HALF, HALF), smem["out"].at[wg]

            def multiply(step, steps, finish):
                """finish(both products) of the next `steps` stages: the step after."""

                def run(*accs):
                    def product(_, row, matrix):
                        for which, acc in enumerate(accs):
                            there = smem["right"].at[matrix, which]
                            there = there.transpose(T_CONTRACT) if transpose else there
                            plgpu.wgmma(acc, smem["left"].at[row, mine], there)

                    _multiply(product, (left, right), step, 0, steps, in_flight=2)
                    return [acc[...] for acc in accs]

                finish(pl.run_scoped(run, *[plgpu.ACC((HALF, half))] * 2))
                return step + steps

            def store(block, column):
                here = pl.ds(block * ROWS + wg * HALF, HALF), pl.ds(column * half, half)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(result, out.at[*here])

            def whole(step, block, column, group):
                def finish(products):
                    for which, y in enumerate(products):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        result[...] = y.astype(result.dtype)
                        store(block, 2 * column + which)

                return multiply(step, jnp.where(group < groups, steps, 0), finish)

            def mixed(step, block, column, first, last):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                row = block * ROWS + wg * HALF + plgpu.broadcasted_iota(jnp.int32, (HALF, half), 0, layout=WGMMA)
                result[...] = (0 * row).astype(result.dtype)

                def product(step, group, _):
                    def finish(products):
                        y = plgpu.load(result, layout=WGMMA).astype(jnp.float32)
                        for which, x in enumerate(products):
                            here = (row >= starts[group + which]) & (row < starts[group + which + 1])
                            y = jnp.where(here, x, y)
                        result[...] = y.astype(result.dtype)

                    return multiply(step, steps, finish)

                step = for_pairs(product, step, block, first, last)
                store(block, column)
                return step

            for_tiles(whole, mixed)
            plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((m, n_size), lhs.dtype)
    return _launch(kernel, out, scratch, 4, (lhs, *rhs, starts), interpret)


def outer_products(lhs, dy, starts, groups, *, parts=1, interpret=None):
    """lhs_g^T dy_g of each of E groups, lhs [M, K] and dy [M, parts N]: a tuple of `parts` arrays [E, K, N]."""
    k_size, n_size = lhs.shape[1], dy.shape[1]
    columns = 2 * _half(n_size // parts)
    per_part = n_size // parts // columns
    k_blocks, n_blocks = k_size // ROWS, n_size // columns
    stages = (MEMORY - ROWS * columns * 2) // ((ROWS + columns) * INNER * 2)
    scratch = {
        "left": tile((stages, INNER, ROWS), lhs.dtype),
        "right": tile((stages, INNER, columns), lhs.dtype),
        "out": tile((ROWS, columns), lhs.dtype),
        "ring": (plgpu.Barrier(num_arrivals=2, num_barriers=stages),) * 2,
    }

    def kernel(*refs):
        lhs, dy, starts, *out, smem = refs
        ring = Ring(*smem["ring"], stages)
        wg = lax.axis_index("wg")

        def for_tiles(item):
            """item(step, place, rows, steps) -> step for every output tile; place: group, block of rows, of columns."""

            def one(at, step):
                per_group = jnp.int32(k_blocks * n_blocks)
                group, rest = lax.div(at, per_group), lax.rem(at, per_group)
                start, end = starts[group], starts[group + 1]
                first = lax.div(start, jnp.int32(8)) * 8  # tiles in shared memory have 8 rows
                steps = jnp.where(start < end, lax.div(end - first + INNER - 1, jnp.int32(INNER)), 0)
                place = group, lax.div(rest, jnp.int32(n_blocks)), lax.rem(rest, jnp.int32(n_blocks))
                return item(step, place, (first, start, end), steps)

            return _for_items(groups * k_blocks * n_blocks, one)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def item(step, place, rows, steps):
                def bring(i, slot, barrier):
                    here = pl.ds(pl.multiple_of(rows[0] + i * INNER, 8), INNER)
                    left, right = pl.ds(place[1] * ROWS, ROWS), pl.ds(place[2] * columns, columns)
                    plgpu.copy_gmem_to_smem(lhs.at[here, left], smem["left"].at[slot], barrier)
                    plgpu.copy_gmem_to_smem(dy.at[here, right], smem["right"].at[slot], barrier)

                return ring.load(bring, step, steps)

            ring.drain(for_tiles(item))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * HALF, HALF)

            def item(step, place, rows, steps):
                first, start, end = rows

                def multiply(acc):
                    def add(_, slot):
                        plgpu.wgmma(acc, smem["left"].at[slot, :, mine].transpose(T_CONTRACT), smem["right"].at[slot])

                    def add_masked(i, slot):  # the first and last steps may hold rows of other groups
                        _mask(smem["left"].at[slot, :, mine], first + i * INNER, start, end)
                        add(i, slot)

                    run = functools.partial(_multiply, rings=(ring,), offset=step)
                    last = jnp.maximum(steps - 1, 1)
                    run(add_masked, first=0, last=jnp.minimum(steps, 1))
                    run(add, first=1, last=last)
                    run(add_masked, first=last, last=steps)
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
    return _launch(kernel, out, scratch, 3, (lhs, dy, starts), interpret)
