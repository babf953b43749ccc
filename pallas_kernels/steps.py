"""One token of every recurrence: what decoding calls and what the reference loop scans over.

Shapes without a time axis: q, k [B, Hk, K], v [B, H, V], state [B, H, K, V]. H is a multiple of Hk (query and key heads
shared by groups of value heads). States are float32, or float64 when the inputs are. Outputs have v's dtype.
"""
import jax
import jax.numpy as jnp


def accumulation_dtype(*arrays):
    """float64 when any input is float64, else float32."""
    return jnp.float64 if any(x is not None and x.dtype == jnp.float64 for x in arrays) else jnp.float32


def repeat_heads(x, heads):
    """[..., Hk, D] -> [..., H, D]: value head h reads key head h // (H / Hk)."""
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], axis=-2)


def _decay(log_decay):
    """Decay factor with the axes of a state [B, H, K, V], from log_decay [H], [B, H] or [B, H, K]."""
    a = jnp.exp(log_decay)
    return a[..., None] if a.ndim == 3 else a[..., None, None]


def linear_attention_step(q, k, v, log_decay, state, *, scale=None):
    """S <- exp(log_decay) S + k v^T, o = scale S^T q. log_decay: None, [H], [B, H] or [B, H, K]. Returns (o, state)."""
    acc = accumulation_dtype(q, k, v, log_decay)
    heads, out = v.shape[-2], v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = repeat_heads(q, heads).astype(acc), repeat_heads(k, heads).astype(acc), v.astype(acc)
    state = state.astype(acc)
    if log_decay is not None:
        state = _decay(log_decay.astype(acc)) * state
    state = state + k[..., None] * v[..., None, :]
    o = scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")
    return o.astype(out), state


def l2_normalise(x, eps=1e-6):
    """x / sqrt(sum x^2 + eps) over the last axis, in float32 or wider."""
    y = x.astype(accumulation_dtype(x))
    return (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + eps)).astype(x.dtype)
