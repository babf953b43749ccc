"""Mathematics of one chunk on values in VMEM: products, decays, pair scores and the triangular inverse.

Only what lowers well on a TPU: two-dimensional products, element-wise work, sums; no cumsum, gather or reshape. Prefix
sums, shifts and anchors are products with 0/1 matrices in full float32, which are exact for one-hot rows.
"""
import functools

import jax
import jax.numpy as jnp


def dot(a, b, *, a_axis=1, b_axis=0):
    """Product of two matrices contracting a_axis with b_axis, accumulated in float32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    if a_axis == 0:
        a, a_axis = a.T, 1
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


@functools.cache
def _levels(size):
    """s of the levels at which blocks of 2 << s tokens are cut in halves of 1 << s, smallest first."""
    return range(size.bit_length() - 1)


def _positions(size):
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def matrix(condition):
    """0/1 float32 matrix."""
    return jnp.where(condition, 1.0, 0.0).astype(jnp.float32)


def lower(x, strict=False):
    """x with zeros above the diagonal (and on it when strict)."""
    i, j = _positions(x.shape[0])
    return jnp.where(i > j if strict else i >= j, x, 0.0)


def suffix_sum(x):
    """y_t = sum over i >= t of x_i, along the rows."""
    i, j = _positions(x.shape[0])
    return dot(matrix(i <= j), x)


def sum_before(x):
    """y_t = sum over j < t of x_j, along the rows."""
    i, j = _positions(x.shape[0])
    return dot(matrix(i > j), x)


def shift_later(x):
    """Row i of the result is row i - 1 of x; the first row is zero."""
    i, j = _positions(x.shape[0])
    return dot(matrix(j == i - 1), x)


def shift_earlier(x):
    """Row i of the result is row i + 1 of x; the last row is zero."""
    i, j = _positions(x.shape[0])
    return dot(matrix(j == i + 1), x)


def first_row(shape):
    """Ones in the first row, zeros below."""
    return matrix(jax.lax.broadcasted_iota(jnp.int32, shape, 0) == 0)


def unit_lower_inverse(strict):
    """(I + strict)^-1 by merging inverses of diagonal blocks: X <- X - X L_level X, level by level."""
    size = strict.shape[0]
    i, j = _positions(size)
    inverse = matrix(i == j)
    for s in _levels(size):
        block = jnp.where((i >> s + 1 == j >> s + 1) & (i >> s != j >> s), strict, 0.0)
        inverse = inverse - dot(dot(inverse, block), inverse)
    return inverse


class Decay:
    """Decays of one chunk from cumulative log decays (coarse, fine), each [C, 1] (per token) or [C, K] (per channel).

    `dtype` is that of the products' operands. enter, leave: [C, 1 or K]; carry: [1, 1 or K].
    """

    def __init__(self, coarse, fine, dtype):
        self.coarse, self.fine, self.dtype = coarse, fine, dtype
        self.size, channels = coarse.shape
        self.per_channel = channels > 1
        last = slice(self.size - 1, self.size)
        self.enter = jnp.exp(coarse + fine)
        self.leave = jnp.exp((coarse[last] - coarse) + (fine[last] - fine))
        self.carry = jnp.exp(coarse[last] + fine[last])
        if not self.per_channel:
            i, j = _positions(self.size)
            gap = (coarse - coarse.T) + (fine - fine.T)
            self.weights = jnp.exp(jnp.where(i >= j, gap, -jnp.inf))

    def _level(self, s):
        """(weights of right rows, weights of left columns, block mask) of one level."""
        i, j = _positions(self.size)
        anchor = matrix(j == ((i >> s + 1) << s + 1) + (1 << s) - 1)
        coarse, fine = self.coarse - dot(anchor, self.coarse), self.fine - dot(anchor, self.fine)
        right = (jax.lax.broadcasted_iota(jnp.int32, self.coarse.shape, 0) >> s) & 1 == 1
        rows = jnp.exp(jnp.where(right, coarse + fine, -jnp.inf))
        columns = jnp.exp(jnp.where(right, -jnp.inf, -(coarse + fine)))
        return rows, columns, i >> s + 1 == j >> s + 1

    def scores(self, rows, y):
        """[C, C] products of each x with y under the decay, zero above the diagonal."""
        if not self.per_channel:
            y = y.astype(self.dtype)
            return [self.weights * dot(x.astype(self.dtype), y, b_axis=1) for x in rows]
        i, j = _positions(self.size)
        squares = [jnp.where(i == j, (x * y).sum(1, keepdims=True), 0.0) for x in rows]
        for s in _levels(self.size):
            right, left, same = self._level(s)
            columns = (y * left).astype(self.dtype)
            squares = [square + jnp.where(same, dot((x * right).astype(self.dtype), columns, b_axis=1), 0.0)
                       for square, x in zip(squares, rows, strict=True)]
        return squares

    def scores_vjp(self, cotangents, rows, y):
        """(list of dx, dy, gradient of the log decays [C, 1 or K]) of `scores`."""
        if not self.per_channel:
            weighted = [(ct * self.weights).astype(self.dtype) for ct in cotangents]
            operands, y_ = [x.astype(self.dtype) for x in rows], y.astype(self.dtype)
            drows = [dot(ct, y_) for ct in weighted]
            dy = sum(dot(ct, x, a_axis=0) for ct, x in zip(weighted, operands, strict=True))
            i, j = _positions(self.size)
            terms = sum(lower(ct.astype(jnp.float32) * dot(x, y_, b_axis=1), strict=True)
                        for ct, x in zip(weighted, operands, strict=True))
            # Pair (i, j) depends on the log decays of tokens t with j < t <= i; row t of `crossing` sums over j < t.
            crossing = dot(matrix(i > j), terms, b_axis=1)
            return drows, dy, jnp.where(i <= j, crossing, 0.0).sum(1, keepdims=True)
        i, j = _positions(self.size)
        diagonals = [jnp.where(i == j, ct, 0.0).sum(1, keepdims=True) for ct in cotangents]
        drows = [d * y for d in diagonals]
        dy = sum(d * x for d, x in zip(diagonals, rows, strict=True))
        dlog = jnp.zeros_like(y)
        for s in _levels(self.size):
            right, left, same = self._level(s)
            columns = y * left
            reach = dcolumns = jnp.zeros_like(y)
            for r, (ct, x) in enumerate(zip(cotangents, rows, strict=True)):
                block = jnp.where(same, ct, 0.0).astype(self.dtype)
                x = x * right
                dx = dot(block, columns.astype(self.dtype))
                drows[r] = drows[r] + right * dx
                reach = reach + x * dx
                dcolumns = dcolumns + dot(block, x.astype(self.dtype), a_axis=0)
            dy = dy + left * dcolumns
            half = i >> s == j >> s
            in_right = (i >> s) & 1 == 1
            dlog = dlog + dot(matrix(half & in_right & (i <= j)), reach)
            dlog = dlog + dot(matrix(half & ~in_right & (i > j)), columns * dcolumns)
        return drows, dy, dlog

    def state_gradient(self, reads, writes, kept):
        """Gradient of the log decays through the states: reads, writes [C, K], kept [1, K] as in `xla.decay`."""
        if not self.per_channel:
            reads, writes, kept = (x.sum(1, keepdims=True) for x in (reads, writes, kept))
        return suffix_sum(reads) + sum_before(writes) + kept
