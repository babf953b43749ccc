"""Diagonal plus low rank transitions (RWKV-7, 2503.14456) on Hopper GPUs, for decays with a known lower bound.

Forward: what each chunk makes alone (decayed tokens, scores, triangular inverse), all chunks in parallel, then one walk
with the state on chip. Residuals are the inputs and those weights; the backward pass repeats the walk to write the
states entering the chunks, walks back for dv and the gradients of the states, and makes the other gradients with all
chunks in parallel. No inverse is differentiated.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu.dplr_pass import MIN_LOG_DECAY, chunk_gradients, chunk_weights, dplr_forward, dplr_reverse
from pallas_kernels.gpu.gates import pad_tokens
from pallas_kernels.gpu.pieces import value_programs
from pallas_kernels.gpu.tiles import CHUNK, not_hopper
from pallas_kernels.steps import repeat_heads


def supports(q, k, v, a, b, log_decay, *, min_log_decay=None, chunk_size=None, **_):
    """None where `dplr` takes these arrays, else why not, in one line. Values are not looked at."""
    if reason := not_hopper():
        return reason
    if chunk_size not in (None, CHUNK):
        return f"chunk_size must be {CHUNK} or None, got {chunk_size}"
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v, a, b)):
        return f"q, k, v, a, b must be bfloat16, got {', '.join(str(x.dtype) for x in (q, k, v, a, b))}"
    if q.shape[1] == 0:
        return "T must be at least 1"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128):
        return f"key and value head sizes must both be 64 or both 128, got {q.shape[-1]} and {v.shape[-1]}"
    if min_log_decay is None or min_log_decay < MIN_LOG_DECAY:
        return f"min_log_decay must be given and at least {MIN_LOG_DECAY}, got {min_log_decay}"
    return None


def dplr(q, k, v, a, b, log_decay, *, scale, min_log_decay, initial_state=None, segment_ids=None, interpret=None):
    """S_t = (diag(e^log_decay_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Args:
      q, k, a, b: [B, T, Hk, D]; v: [B, T, H, D], H a multiple of Hk; bf16, D 64 or 128, any T; |a| |b| <= 2.
      log_decay: [B, T, H, D] natural log, in [min_log_decay, 0]; below -1.25 it acts as -1.25.
      min_log_decay: at least -1.25: the decays of a chunk of 64 tokens must not leave the range of float32.
      initial_state: float32 [B, H, D, D] or None for zero.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, D] in the dtype of v, final state float32 [B, H, D, D]).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v, a, b, log_decay, min_log_decay=min_log_decay):
        raise ValueError(f"pallas_gpu dplr: {reason}")
    t_size, heads = v.shape[1:3]
    if log_decay.dtype != jnp.bfloat16:
        log_decay = log_decay.astype(jnp.float32)
    # zero tokens without decay change neither state nor gradients
    arrays = (pad_tokens(repeat_heads(x, heads)) for x in (q, k, v, a, b, log_decay))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    segments = None if segment_ids is None else _segments(segment_ids)
    o, state = _dplr(*arrays, initial_state, segments, scale, interpret)
    return o[:, :t_size], state


def _segments(ids):
    """([B, N, 2, 64] int32 of `dplr_pass.Segments`, [B, N] float32: 0 where a segment starts in the chunk)."""
    starts = pad_tokens(jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))))
    starts = starts.reshape(ids.shape[0], -1, CHUNK)
    at = jnp.arange(CHUNK)
    first = jax.lax.cummax(jnp.where(starts, at, -1), axis=2)
    after = jnp.pad(jnp.where(starts, at, CHUNK + 1)[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=CHUNK + 1)
    last = jax.lax.cummin(after, axis=2, reverse=True) - 1
    return jnp.stack([first, last], axis=2), (first[..., -1] < 0).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _dplr(q, k, v, a, b, log_decay, init, segments, scale, interpret):
    return _forward(q, k, v, a, b, log_decay, init, segments, scale, interpret, gradient=False)[0]


def _forward(q, k, v, a, b, log_decay, init, segments, scale, interpret, gradient):
    segments, keep = (None, None) if segments is None else segments
    weights = chunk_weights(q, k, a, b, log_decay, segments, scale=scale, gradient=gradient, interpret=interpret)
    out = dplr_forward(weights, v, init, keep, output=True, split=value_programs(v), interpret=interpret)
    return (out["o"], out["state"]), weights


def _vjp_forward(q, k, v, a, b, log_decay, init, segments, scale, interpret):
    arrays = jax.tree.map(lambda x: x.value, (q, k, v, a, b, log_decay, init, segments))
    out, weights = _forward(*arrays, scale, interpret, gradient=True)
    return out, (arrays, weights)


def _vjp_backward(scale, interpret, residuals, cotangents):
    (q, k, v, a, b, log_decay, init, segments), weights = residuals
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    flags, keep = (None, None) if segments is None else segments
    options = dict(split=value_programs(v), interpret=interpret)
    walk = dplr_forward(weights, v, init, keep, output=False, **options)
    back = dplr_reverse(weights, do, dfinal, keep, **options)
    grads = chunk_gradients(q, k, a, b, v, walk["u"], do, back["de"], log_decay, walk["entering"], back["entering"],
                            keep, flags, scale=scale, interpret=interpret)
    dsegments = None if segments is None else (None, jnp.zeros_like(keep))
    return (grads["dq"], grads["dk"], back["dv"], grads["da"], grads["db"], grads["dg"],
            None if init is None else back["state"], dsegments)


_dplr.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
