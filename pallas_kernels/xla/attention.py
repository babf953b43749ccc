"""Softmax attention by blocks of queries and keys: one scan over the pairs of blocks that see each other.

Memory beyond inputs and outputs is one block of scores per head, forward and backward (2205.14135), and blocks in
the future or behind the window are never computed. Layout: N blocks of C tokens, queries [N, B, G, R, C, K], keys
[N, B, G, C, K].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import MASKED
from pallas_kernels.attention import attention as plain
from pallas_kernels.steps import accumulation_dtype
from pallas_kernels.xla import common
from pallas_kernels.xla.common import einsum


def block_limit():
    """Most tokens per block. On CPU small ones stay in cache and waste less on the diagonal."""
    return 128 if jax.default_backend() == "cpu" else 1024


class Static(NamedTuple):
    scale: float
    window: int | None
    logit_cap: float | None
    sigmoid_bias: float | None


def blocks(length):
    """(number of blocks, tokens per block), with few padded tokens."""
    n = -(-length // block_limit())
    return n, -(-length // n)


def visible_pairs(length, window=None):
    """[P, 2] (query block, key block) in the order of the scan, those with at least one visible key."""
    n, block = blocks(length)
    reach = length if window is None else window
    return np.array([(i, j) for i in range(n) for j in range(i + 1) if (i - j - 1) * block + 1 < reach], np.int32)


def attention(q, k, v, *, scale, window, segment_ids, sinks, logit_cap, log_forget, sigmoid_bias):
    """See `pallas_kernels.api.attention`."""
    batch, length, heads, _ = q.shape
    groups, (n, block) = k.shape[2], blocks(length)
    if n == 1 and jax.default_backend() == "cpu":  # a scan of one step costs four times the plain form there
        return plain(q, k, v, scale=scale, window=window, segment_ids=segment_ids, sinks=sinks, logit_cap=logit_cap,
                     log_forget=log_forget, sigmoid_bias=sigmoid_bias)
    acc = accumulation_dtype(q, k, v)
    totals = None
    if log_forget is not None:
        totals = _cumulative(common.pad_time(log_forget.astype(acc), n * block))
        totals = jnp.stack([_blocked(x, block, groups) for x in totals])
    if sinks is not None:
        sinks = sinks.astype(acc).reshape(groups, -1)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, n * block - length)), mode="edge")
        segment_ids = segment_ids.reshape(batch, n, block).swapaxes(0, 1)
    static = Static(float(scale), window, logit_cap, sigmoid_bias)
    o = _attend(
        (static, length), _blocked(q, block, groups), _blocked(k, block), _blocked(v, block), totals, sinks, segment_ids
    )
    return o.transpose(1, 0, 4, 2, 3, 5).reshape(batch, n * block, heads, -1)[:, :length]


def _blocked(x, block, groups=None):
    return jnp.moveaxis(common.to_chunks(x, block, groups), 2 if groups is None else 3, 0)


def _cumulative(log_forget):
    """Cumulative sums over axis 1 as (coarse, fine), for the reason given in `common.cumulative_decay`."""
    g = jnp.maximum(log_forget, common.MIN_LOG_DECAY)
    coarse = jnp.round(g * 256) / 256
    return jnp.cumsum(coarse, 1), jnp.cumsum(g - coarse, 1)


def _pair_scores(static, q, k, totals, segs, i, j):
    """Scores of query block i and key block j: (capped, what enters the weights, MASKED where not visible)."""
    acc = accumulation_dtype(q, k)
    s = static.scale * einsum("bgrik,bgjk->bgrij", q[i], k[j], preferred_element_type=acc)
    if static.logit_cap is not None:
        s = static.logit_cap * jnp.tanh(s / static.logit_cap)
    rows, columns = jnp.arange(s.shape[-2]), jnp.arange(s.shape[-1])
    gap = (i - j) * s.shape[-1] + rows[:, None] - columns
    mask = gap >= 0 if static.window is None else (gap >= 0) & (gap < static.window)
    if segs is not None:
        mask = mask & (segs[i][:, :, None] == segs[j][:, None])[:, None, None]
    biased = s
    if totals is not None:
        biased = s + (totals[:, i][..., :, None] - totals[:, j][..., None, :]).sum(0)
    if static.sigmoid_bias is not None:
        biased = biased + static.sigmoid_bias
    return s, jnp.where(mask, biased, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape, q, k, v, totals, sinks, segs):
    return _forward(shape, q, k, v, totals, sinks, segs)[0]


def _forward(shape, q, k, v, totals, sinks, segs):
    static, length = shape
    acc, mm, out = accumulation_dtype(q, k, v), common.matmul_dtype(v), v.dtype
    residuals = (q, k, v, totals, sinks, segs)
    q, k, v = q.astype(mm), k.astype(mm), v.astype(mm)
    # Running maximum and sum of a row begin with its sink, a key with value 0.
    top = jnp.full(q.shape[:-1], MASKED, acc) if sinks is None else jnp.broadcast_to(sinks[..., None], q.shape[:-1])
    total = jnp.full(q.shape[:-1], 0.0 if sinks is None else 1.0, acc)
    o = jnp.zeros(q.shape[:-1] + v.shape[-1:], acc)

    def body(carry, pair):
        i, j = pair
        top, total, o = carry
        _, s = _pair_scores(static, q, k, totals, segs, i, j)
        if static.sigmoid_bias is not None:
            p, shrink = jax.nn.sigmoid(s), 1.0
        else:
            new_top = jnp.maximum(top[i], s.max(-1))
            p, shrink = jnp.exp(s - new_top[..., None]), jnp.exp(top[i] - new_top)
            total = total.at[i].set(shrink * total[i] + p.sum(-1))
            top, shrink = top.at[i].set(new_top), shrink[..., None]
        values = einsum("bgrij,bgjv->bgriv", p.astype(mm), v[j], preferred_element_type=acc)
        return (top, total, o.at[i].set(shrink * o[i] + values)), None

    (top, total, o), _ = jax.lax.scan(body, (top, total, o), tuple(visible_pairs(length, static.window).T))
    log_sum = None
    if static.sigmoid_bias is None:
        o, log_sum = o / total[..., None], top + jnp.log(total)
    o = o.astype(out)
    return o, residuals + (o, log_sum)


def _backward(shape, residuals, do):
    static, length = shape
    q0, k0, v0, totals, sinks, segs, o, log_sum = residuals
    acc, mm = accumulation_dtype(q0, k0, v0), common.matmul_dtype(v0)
    q, k, v = q0.astype(mm), k0.astype(mm), v0.astype(mm)
    mean = (do.astype(acc) * o.astype(acc)).sum(-1)  # of a row's dweights under its weights
    do = do.astype(mm)
    zeros = [jnp.zeros(x.shape, acc) for x in (q0, k0, v0)]
    gate = None if totals is None else jnp.zeros(totals.shape[1:], acc)

    def body(carry, pair):
        i, j = pair
        dq, dk, dv, dgate = carry
        capped, s = _pair_scores(static, q, k, totals, segs, i, j)
        dp = einsum("bgriv,bgjv->bgrij", do[i], v[j], preferred_element_type=acc)
        if static.sigmoid_bias is not None:
            p = jax.nn.sigmoid(s)
            ds = p * (1 - p) * dp
        else:
            p = jnp.exp(s - log_sum[i][..., None])
            ds = p * (dp - mean[i][..., None])
        if totals is not None:
            dgate = dgate.at[i].add(ds.sum(-1)).at[j].add(-ds.sum(-2))
        if static.logit_cap is not None:
            ds = ds * (1 - jnp.square(capped / static.logit_cap))
        ds = (static.scale * ds).astype(mm)
        dq = dq.at[i].add(einsum("bgrij,bgjk->bgrik", ds, k[j], preferred_element_type=acc))
        dk = dk.at[j].add(einsum("bgrij,bgrik->bgjk", ds, q[i], preferred_element_type=acc))
        dv = dv.at[j].add(einsum("bgrij,bgriv->bgjv", p.astype(mm), do[i], preferred_element_type=acc))
        return (dq, dk, dv, dgate), None

    (dq, dk, dv, dgate), _ = jax.lax.scan(body, (*zeros, gate), tuple(visible_pairs(length, static.window).T))
    dtotals = None if totals is None else jnp.stack([dgate, dgate])
    dsinks = None
    if sinks is not None:
        dsinks = -(jnp.exp(sinks[..., None] - log_sum) * mean).sum((0, 1, 4))
    return dq.astype(q0.dtype), dk.astype(k0.dtype), dv.astype(v0.dtype), dtotals, dsinks, None


_attend.defvjp(_forward, _backward)
