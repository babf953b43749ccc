"""The decays of one chunk behind one interface, for operators that treat a decay per head and per channel alike.

Products have operands of the decays' dtype.

Tensors are [B, H, N, C, K]; log decays [B, H, N, C, 1] (one per head and token), [B, H, N, C, K] (per channel) or None.
"""
import functools

import jax.numpy as jnp

from pallas_kernels.xla import pairs
from pallas_kernels.xla.common import cumulative_decay, einsum, prefix_sum


class ChunkDecay:
    """Weights and pair scores under a cumulative log decay b.

    enter = e^b and leave = e^{b_C - b} broadcast against [B, H, N, C, K]; carry = e^{b_C} is [N, B, H, 1 or K, 1];
    before = e^{b of the previous token}. All include the segment masks.
    """

    def __init__(self, log_decay, segs, chunk, dtype):
        self.chunk, self.segs, self.dtype = chunk, segs, dtype
        self.decays = log_decay is not None
        self.per_channel = log_decay is not None and log_decay.shape[-1] > 1
        one = jnp.ones((1, 1, 1, 1, 1), dtype)
        if log_decay is None:
            self.enter = self.leave = self.before = one
            carry = one[..., 0, :]
            self._weights = self._pairs().astype(dtype)
        else:
            self._cumulative = coarse, fine = cumulative_decay(log_decay, -2)
            self.enter = jnp.exp(coarse + fine)
            self.before = jnp.pad(self.enter[..., :-1, :], [(0, 0)] * 3 + [(1, 0), (0, 0)], constant_values=1)
            self.leave = jnp.exp((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine))
            carry = self.enter[..., -1, :]
            if not self.per_channel:
                c, f = coarse[..., 0], fine[..., 0]
                gap = (c[..., :, None] - c[..., None, :]) + (f[..., :, None] - f[..., None, :])
                self._weights = jnp.exp(jnp.where(self._pairs(), gap, -jnp.inf))
        if segs is not None:
            reached = segs.enter[..., None]
            self.enter, self.before = self.enter * reached, self.before * reached
            self.leave, carry = self.leave * segs.leave[..., None], carry * segs.carry[..., None]
        self.carry = jnp.moveaxis(carry, 2, 0)[..., None]

    def _pairs(self):
        causal = jnp.tril(jnp.ones((1, 1, 1, self.chunk, self.chunk), bool))
        return causal if self.segs is None else causal & self.segs.same

    def carries(self, n):
        """carry for n chunks, as a scan input."""
        return jnp.broadcast_to(self.carry, (n,) + self.carry.shape[1:])

    def scores(self, rows, y):
        """[..., C, C] products of each x with y under the decay, zero above the diagonal and across segments."""
        if self.per_channel:
            squares = pairs.scores(rows, y, self._cumulative, self.dtype)
            return squares if self.segs is None else [jnp.where(self.segs.same, s, 0) for s in squares]
        return [self._weights * einsum("...ik,...jk->...ij", x, y, preferred_element_type=self.dtype) for x in rows]

    def scores_vjp(self, cotangents, rows, y):
        """As `pairs.scores_vjp`: (list of dx, dy, gradient of the log decays [..., C, 1 or K])."""
        if self.segs is not None:
            cotangents = [jnp.where(self.segs.same, ct, 0) for ct in cotangents]
        if self.per_channel:
            return pairs.scores_vjp(cotangents, rows, y, self._cumulative, self.dtype)
        product = functools.partial(einsum, preferred_element_type=self.dtype)
        cotangents = [ct * self._weights for ct in cotangents]
        drows = [product("...ij,...jk->...ik", ct, y) for ct in cotangents]
        dy = sum(product("...ij,...ik->...jk", ct, x) for ct, x in zip(cotangents, rows, strict=True))
        if not self.decays:
            return drows, dy, None
        # Pair (i, j) depends on the log decays after j up to i: a sum over j < t, then over i >= t.
        terms = sum(ct * product("...ik,...jk->...ij", x, y) for ct, x in zip(cotangents, rows, strict=True))
        return drows, dy, masked_lower(prefix_sum(masked_strict(terms), exclusive=True)).sum(-2)[..., None]

    def gradient(self, grad, reads=None, writes=None, kept=None):
        """Adds to the gradient of the log decays from pair scores what comes through the states.

        Args:
          grad: [B, H, N, C, 1 or K], from `scores_vjp`.
          reads: [B, H, N, C, K], the share of the entering state in what token i reads, or None without states.
          writes: [B, H, N, C, K], the share of token i in the leaving state.
          kept: [N, B, H, K], the share of the entering state in the leaving one.
        """
        if reads is not None:
            if not self.per_channel:
                reads, writes, kept = (x.sum(-1, keepdims=True) for x in (reads, writes, kept))
            grad = grad + prefix_sum(reads, -2, reverse=True) + prefix_sum(writes, -2, exclusive=True)
            grad = grad + jnp.moveaxis(kept, 0, 2)[..., None, :]
        return grad if self.segs is None else jnp.where(self.segs.start[..., None], 0, grad)


def unit_lower_inverse(strict):
    """(I + strict)^-1 for strictly lower triangular [..., C, C], C a power of two.

    Inverses of diagonal blocks are merged pairwise, X_10 = -X_1 L_10 X_0. Only inverses are multiplied, never powers
    of L, whose entries grow much faster with repeated keys. Rows depend on earlier rows only, bit for bit.
    """
    chunk = strict.shape[-1]
    blocks, square = [], strict[..., None, :, :]
    while square.shape[-1] > 1:
        square, block = pairs.split(square)
        blocks.append(block)
    inverse = jnp.ones(strict.shape[:-2] + (chunk, 1, 1), strict.dtype)
    for block in reversed(blocks):
        left, right = (inverse.reshape(*block.shape[:-2], 2, *block.shape[-2:])[..., i, :, :] for i in (0, 1))
        inverse = pairs.widen(inverse, -einsum("...ij,...jk,...kl->...il", right, block, left))
    return inverse[..., 0, :, :]


def masked_strict(x):
    """Zeroes the diagonal and above."""
    return jnp.where(jnp.tril(jnp.ones(x.shape[-2:], bool), -1), x, 0)


def masked_lower(x):
    """Zeroes above the diagonal."""
    return jnp.where(jnp.tril(jnp.ones(x.shape[-2:], bool)), x, 0)


def shift_later(x):
    """Row i of the result is row i - 1 of x along axis -2; the first row is zero."""
    return jnp.pad(x[..., :-1, :], [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)])


def shift_earlier(x):
    """Row i of the result is row i + 1 of x along axis -2; the last row is zero."""
    return jnp.pad(x[..., 1:, :], [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])
