"""Softmax attention with all its weights in memory: the oracle, one decoding step, and the pieces of both.

The pieces serve mixers whose weights need whole rows of scores: `weighted_values(f(masked_scores(...)), v)`.
Scores have the layout [B, H, T, S], query head h reads key head h // (H / G).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.steps import accumulation_dtype
from pallas_kernels.xla.common import MIN_LOG_DECAY

MASKED = -1e30  # the score of a key that is not visible; exp and sigmoid of it are exactly 0


def visible(length, window=None, segment_ids=None):
    """[B or 1, 1, T, T] bool: key j is at most at i, less than `window` tokens back, in the segment of i."""
    i, j = jnp.arange(length)[:, None], jnp.arange(length)
    mask = (j <= i) if window is None else (j <= i) & (i - j < window)
    if segment_ids is None:
        return mask[None, None]
    return (mask & (segment_ids[:, :, None] == segment_ids[:, None]))[:, None]


def scores(q, k, scale, logit_cap=None):
    """scale q.k of q [B, T, H, K] and k [B, S, G, K] -> [B, H, T, S] in float32 or wider, soft-capped."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, width)
    s = jnp.einsum("bigrk,bjgk->bgrij", grouped, k, preferred_element_type=accumulation_dtype(q), precision="highest")
    s = scale * s.reshape(batch, heads, length, -1)
    return s if logit_cap is None else logit_cap * jnp.tanh(s / logit_cap)


def masked_scores(q, k, scale, *, window=None, segment_ids=None, logit_cap=None, log_forget=None):
    """Scores of causal attention, MASKED where a key is not visible. Arguments as in `api.attention`."""
    s = scores(q, k, scale, logit_cap)
    if log_forget is not None:
        total = jnp.cumsum(jnp.maximum(log_forget.astype(s.dtype), MIN_LOG_DECAY), 1).swapaxes(1, 2)
        s = s + (total[..., :, None] - total[..., None, :])
    return jnp.where(visible(q.shape[1], window, segment_ids), s, MASKED)


def weights(s, sinks=None, sigmoid_bias=None):
    """Scores [B, H, T, S] -> weights, with sink logits [H] in the denominator, or sigmoid(s + sigmoid_bias)."""
    if sigmoid_bias is not None:
        return jax.nn.sigmoid(s + sigmoid_bias)
    if sinks is None:
        return jax.nn.softmax(s, -1)
    sinks = sinks.astype(s.dtype)[:, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), sinks))
    e = jnp.exp(s - top)
    return e / (e.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def weighted_values(w, v):
    """Weights [B, H, T, S] times v [B, S, G, V] -> [B, T, H, V] in v's dtype."""
    batch, heads, length, _ = w.shape
    w = w.reshape(batch, v.shape[2], -1, *w.shape[2:]).astype(v.dtype)
    o = jnp.einsum("bgrij,bjgv->bigrv", w, v, precision="highest")
    return o.reshape(batch, length, heads, v.shape[-1])


def attention(q, k, v, *, scale, window, segment_ids, sinks, logit_cap, log_forget, sigmoid_bias):
    """See `pallas_kernels.api.attention`."""
    acc, out = accumulation_dtype(q, k, v), v.dtype
    q, k, v = q.astype(acc), k.astype(acc), v.astype(acc)
    s = masked_scores(q, k, scale, window=window, segment_ids=segment_ids, logit_cap=logit_cap, log_forget=log_forget)
    return weighted_values(weights(s, sinks, sigmoid_bias), v).astype(out)


def attention_step(q, k, v, visible, *, scale=None, bias=None, sinks=None, logit_cap=None, sigmoid_bias=None):
    """One token's q [B, H, K] over cached k [B, S, G, K], v [B, S, G, V] -> o [B, H, V].

    visible [B, S] bool says which slots of the cache hold keys of the query's past (its own included); bias [B, H, S]
    is added to the scores after the cap, for example the log forget gates between a key and the query.
    """
    s = scores(q[:, None], k, q.shape[-1] ** -0.5 if scale is None else scale, logit_cap)
    s = s if bias is None else s + bias[:, :, None]
    s = jnp.where(visible[:, None, None], s, MASKED)
    return weighted_values(weights(s, sinks, sigmoid_bias), v)[:, 0]
