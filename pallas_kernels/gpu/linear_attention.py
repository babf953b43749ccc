"""Linear attention on Hopper GPUs through Pallas Mosaic GPU: no decay, or one per head, token or channel.

Serves linear attention (2006.16236), RetNet (2307.08621), Lightning Attention (2401.04658), Mamba-2 (2405.21060),
sigmoid-gated mLSTM and, through `channel_decay`, GLA and HGRN2. The rest of this file is the scalar decay: states are
float32 and stay on chip; residuals are the inputs and one state per piece of T.

The gradient of the gates needs no product of its own, see `decay_gradient`; the kernels take its float32 row sums.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu import channel_decay
from pallas_kernels.gpu.decay_pass import decay_pass, decay_pass_pair
from pallas_kernels.gpu.gates import LOG2E, chunk_decays, pad_tokens, running_sum, token_decays
from pallas_kernels.gpu.head_parts import HeadParts
from pallas_kernels.gpu.pieces import count_pieces, piece_states
from pallas_kernels.gpu.tiles import CHUNK, not_hopper
from pallas_kernels.steps import repeat_heads

SAVE_EVERY = 4  # chunks of a span, between the states saved for the gradient of the gates


def supports(q, k, v, log_decay=None, *, chunk_size=None, **_):
    """None where `linear_attention` takes these arrays, else why not, in one line. Values are not looked at."""
    if reason := not_hopper():
        return reason
    if chunk_size not in (None, CHUNK):
        return f"chunk_size must be {CHUNK} or None, got {chunk_size}"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k, v must be bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[1] == 0:
        return "T must be at least 1"
    for name, size in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if size not in (64, 128, 256):
            return f"{name} head size must be 64, 128 or 256, got {size}"
    return None


def linear_attention(q, k, v, log_decay=None, *, scale, initial_state=None, segment_ids=None, interpret=None):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, differentiable in every array.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K and V in {64, 128, 256}, any T. A head of 256
        runs as two of 128, whose outputs add up (K) or stand side by side (V).
      log_decay: None, [H], [B, T, H] or [B, T, H, K] (rounded, see `channel_decay`), natural log, <= 0.
      initial_state: float32 [B, H, K, V] or None for zero.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, V] in the dtype of v, final state float32 [B, H, K, V]).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v, log_decay):
        raise ValueError(f"pallas_gpu linear_attention: {reason}")
    q, k = repeat_heads(q, v.shape[2]), repeat_heads(k, v.shape[2])
    parts = HeadParts(-(-q.shape[-1] // 128), -(-v.shape[-1] // 128))
    q, k, v, initial_state = parts.of_keys(q), parts.of_keys(k), parts.of_values(v), parts.of_state(initial_state)
    options = dict(scale=scale, initial_state=initial_state, segment_ids=segment_ids, interpret=interpret)
    if log_decay is not None and log_decay.ndim == 4:
        return parts.join(*channel_decay.linear_attention(q, k, v, parts.of_keys(log_decay), **options))
    return parts.join(*_scalar_decay(q, k, v, parts.of_heads(log_decay), **options))


def _scalar_decay(q, k, v, log_decay, *, scale, initial_state, segment_ids, interpret):
    b_size, t_size, heads, _ = v.shape
    decay = token_decays(log_decay, segment_ids, b_size, t_size, heads)
    # zero tokens without decay change neither state nor gradients
    q, k, v, decay = (None if x is None else pad_tokens(x) for x in (q, k, v, decay))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    o, state = _linear_attention(q, k, v, decay, initial_state, scale, interpret)
    return o[:, :t_size], state


def entering_states(y, z, c, total, init, *, pieces, reverse, interpret):
    """float32 state entering each piece [B, H, P, K, V], from the side the pieces are walked from; None for zero."""
    if pieces == 1:
        return None if init is None else init[:, :, None]
    local = decay_pass(None, y, z, c, total, None, None, scale=1.0, reverse=reverse, pieces=pieces, stages=3,
                       emit="state", interpret=interpret)["state"]
    return piece_states(local, total, init, pieces, reverse)


def decay_gradient(dq, dkv, scale, passed=0.0):
    """Gradient of log2 decays [B, H, T] from the results of `decay_pass` (with u = q) and `decay_pass_pair`.

    That of token t's natural log decay is <S, dS> before its span of chunks plus the sum of k . dk - q . dq over the
    span's tokens before t, without what tokens give to themselves: over a whole sequence rounding would add up. Counted
    from the start and not from the end, nothing is large where decays make the gradient small, as <S, dS> after the
    last token would be. <S, dS> before a span adds up what passes its first chunk and what that chunk's queries read,
    the latter as it went into q . dq: where the first is small, what is left of the second must vanish.

    Args: passed [B, H, M], added to <S, R> of what passes the first chunk of each span.
    """
    def sum_before(x):
        return running_sum(jnp.pad(x[..., :-1], ((0, 0),) * (x.ndim - 1) + ((1, 0),)))

    r_q, r_k = jnp.sum(dq["r"], axis=2), dkv["r"]
    inner = scale * (jnp.sum(dkv["f"], axis=-1) + passed) + jnp.sum(dq["entered"], axis=(2, 4))
    b_size, heads, t_size = r_q.shape
    spans = inner.shape[-1]
    rows = jnp.pad(r_k - r_q, ((0, 0), (0, 0), (0, spans * SAVE_EVERY * CHUNK - t_size)))
    rows = rows.reshape(b_size, heads, spans, SAVE_EVERY, CHUNK)
    within = sum_before(rows)
    dg = within + (sum_before(within[..., -1] + rows[..., -1]) + inner[..., None])[..., None]
    return dg.reshape(b_size, heads, -1)[..., :t_size] / LOG2E


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear_attention(q, k, v, decay, init, scale, interpret):
    out, _ = _forward(q, k, v, decay, init, scale, interpret)
    return out["o"], out["state"][:, :, -1]


def _forward(q, k, v, decay, init, scale, interpret, save_every=0):
    pieces = count_pieces(*q.shape[:3], v.shape[-1])
    c, total = chunk_decays(decay)
    states = entering_states(k, v, c, total, init, pieces=pieces, reverse=False, interpret=interpret)
    out = decay_pass(q, k, v, c, total, states, None, scale=scale, reverse=False, pieces=pieces, stages=2,
                     save_every=save_every, interpret=interpret)
    return out, states


def _vjp_forward(q, k, v, decay, init, scale, interpret):
    save_every = SAVE_EVERY if decay is not None and decay.perturbed else 0
    q, k, v, decay, init = (None if a is None else a.value for a in (q, k, v, decay, init))
    out, states = _forward(q, k, v, decay, init, scale, interpret, save_every)
    # Which residuals are None, not their values, tells the backward pass what is wanted: residuals must be arrays.
    residuals = q, k, v, decay, states, out.get("saved"), None if init is None else ()
    return (out["o"], out["state"][:, :, -1]), residuals


def _vjp_backward(scale, interpret, residuals, cotangents):
    q, k, v, decay, states, saved, has_init = residuals
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    pieces = count_pieces(*q.shape[:3], v.shape[-1])
    c, total = chunk_decays(decay)
    transposed = None if states is None else states.swapaxes(-1, -2)
    gates = dict(u=None) if saved is None else dict(u=q, save_every=SAVE_EVERY)
    dq = decay_pass(do, v, k, c, total, transposed, scale=scale, reverse=False, pieces=pieces, stages=2,
                    interpret=interpret, **gates)
    if total is not None:
        c = total[..., None] - c
    unscaled = None if dfinal is None else dfinal / scale
    dstates = entering_states(q, do, c, total, unscaled, pieces=pieces, reverse=True, interpret=interpret)
    dkv = decay_pass_pair(q, k, v, do, c, total, dstates, saved, scale=scale, pieces=pieces, save_every=SAVE_EVERY,
                          interpret=interpret)
    ddecay = None
    if saved is not None:
        ddecay = decay_gradient(dq, dkv, scale).swapaxes(1, 2)
    return dq["o"], dkv["dk"], dkv["dv"], ddecay, None if has_init is None else dkv["state"][:, :, 0] * scale


_linear_attention.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
