"""Scores between tokens of one chunk under a decay per channel: A_ij = sum_c x_ic y_jc exp(b_ic - b_jc), j <= i.

The decay does not factor out of the sum, and splitting it as (x e^b)(y e^-b) overflows. So the chunk is halved again
and again: at each level the rows of a right half meet the columns of the left half beside it, with the last token of
the left half as anchor n. Both exponents, b_i - b_n and b_n - b_j, are then sums of log decays, hence <= 0, and each
level is a batch of matrix products. That takes log2(C) exponentials per token and channel, half the products of the
full square, and is exact for any decay. The anchor precedes every row, so no row depends on later gates, bit for bit.
"""
import jax.numpy as jnp

from pallas_kernels.xla.common import einsum, prefix_sum


def _halves(x, size):
    """[..., C, D] -> left, right halves [..., M, size, D] of the M = C / (2 size) blocks."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _join(left, right):
    """Undoes `_halves`."""
    x = jnp.stack([left, right], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _level(cumulative, size):
    """exp(b_i - b_n) for right rows and exp(b_n - b_j) for left columns of every block of one level."""
    (coarse_l, coarse_r), (fine_l, fine_r) = (_halves(part, size) for part in cumulative)
    coarse_n, fine_n = coarse_l[..., -1:, :], fine_l[..., -1:, :]
    return jnp.exp((coarse_r - coarse_n) + (fine_r - fine_n)), jnp.exp((coarse_n - coarse_l) + (fine_n - fine_l))


def _sizes(chunk):
    """Half sizes of all levels, largest first. The chunk is a power of two."""
    return [1 << s for s in reversed(range(chunk.bit_length() - 1))]


def widen(diagonal, block):
    """Diagonal blocks [..., 2M, h, h] and lower-left blocks [..., M, h, h] -> [..., M, 2h, 2h], zero above."""
    h = block.shape[-1]
    d = diagonal.reshape(*block.shape[:-2], 2, h, h)
    upper = jnp.concatenate([d[..., 0, :, :], jnp.zeros_like(block)], -1)
    return jnp.concatenate([upper, jnp.concatenate([block, d[..., 1, :, :]], -1)], -2)


def split(square):
    """[..., M, 2h, 2h] -> diagonal blocks [..., 2M, h, h] and lower-left blocks [..., M, h, h]: undoes widen."""
    h = square.shape[-1] // 2
    d = jnp.stack([square[..., :h, :h], square[..., h:, h:]], -3)
    return d.reshape(*square.shape[:-3], -1, h, h), square[..., h:, :h]


def scores(rows, y, cumulative, dtype):
    """Scores of each x in `rows` against y. x, y [..., C, K] -> list of [..., C, C], zero above the diagonal.

    `cumulative` is the (coarse, fine) pair of `common.cumulative_decay`; products take operands of `dtype` and
    accumulate in the decays' dtype.
    """
    acc, chunk = cumulative[0].dtype, y.shape[-2]
    y = y.astype(acc)
    squares = [(x.astype(acc) * y).sum(-1)[..., None, None] for x in rows]
    for size in reversed(_sizes(chunk)):
        right, left = _level(cumulative, size)
        columns = (_halves(y, size)[0] * left).astype(dtype)
        blocks = [einsum("...ik,...jk->...ij", (_halves(x, size)[1] * right).astype(dtype), columns,
                         preferred_element_type=acc) for x in rows]
        squares = [widen(square, block) for square, block in zip(squares, blocks, strict=True)]
    return [square[..., 0, :, :] for square in squares]


def scores_vjp(cotangents, rows, y, cumulative, dtype):
    """Gradients of `scores`: (list of dx, dy, gradient of the log decays). Cotangents above the diagonal are ignored.

    Row i of a level depends on the log decays after the anchor up to i, column j on those after j up to the anchor:
    both gradients are sums without cancellation, where sum_x x dx - y dy over the whole chunk would lose small ones.
    """
    acc, chunk = cumulative[0].dtype, y.shape[-2]
    y, rows = y.astype(acc), [x.astype(acc) for x in rows]
    squares = [ct.astype(acc)[..., None, :, :] for ct in cotangents]
    dy, drows, dlog = jnp.zeros_like(y), [jnp.zeros_like(x) for x in rows], jnp.zeros_like(y)
    for size in _sizes(chunk):
        right, left = _level(cumulative, size)
        columns = _halves(y, size)[0] * left
        dcolumns = reach = 0
        for r, x in enumerate(rows):
            squares[r], block = split(squares[r])
            block = block.astype(dtype)
            x = _halves(x, size)[1] * right
            dx = einsum("...ij,...jk->...ik", block, columns.astype(dtype), preferred_element_type=acc)
            drows[r] = drows[r] + _join(jnp.zeros_like(dx), right * dx)
            reach = reach + x * dx
            dcolumns = dcolumns + einsum("...ij,...ik->...jk", block, x.astype(dtype), preferred_element_type=acc)
        dy = dy + _join(left * dcolumns, jnp.zeros_like(dcolumns))
        if size > 1:
            dlog = dlog + _join(prefix_sum(columns * dcolumns, -2, exclusive=True), prefix_sum(reach, -2, reverse=True))
        else:
            dlog = dlog + _join(jnp.zeros_like(reach), reach)
    diagonals = [square[..., 0] for square in squares]  # [..., C, 1]
    drows = [dx + d * y for dx, d in zip(drows, diagonals, strict=True)]
    return drows, dy + sum(d * x for d, x in zip(diagonals, rows, strict=True)), dlog
