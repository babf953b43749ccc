"""Linear attention with a decay per key channel (GLA, HGRN2): arXiv 2312.06635, 2404.07904.

One head and one chunk, b [C, K] the inclusive in-chunk sum of log decays, S the entering state:

    A_ij = sum_c q_ic k_jc exp(b_ic - b_jc), j <= i     (`pairs.py`)
    O    = scale A V + scale (Q * e^b) S
    S'   = diag(e^{b_C}) S + (K * e^{b_C - b})^T V
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.steps import accumulation_dtype, repeat_heads
from pallas_kernels.xla import common, pairs
from pallas_kernels.xla.common import cumulative_decay, einsum, prefix_sum, scan_states


def power_of_two_chunk(chunk_size, length):
    """The chunk used for `length` tokens: halving inside the chunk needs a power of two."""
    return min(chunk_size, 1 << (length - 1).bit_length())


def linear_attention(q, k, v, log_decay, *, scale, initial_state, segment_ids, output_final_state, chunk_size):
    """log_decay [B, T, H, K]. Returns (o, final_state or None); other arguments as in `api`."""
    length, heads = v.shape[1:3]
    chunk = power_of_two_chunk(chunk_size, length)
    acc = accumulation_dtype(q, k, v, log_decay, initial_state)
    q, k = repeat_heads(q, heads), repeat_heads(k, heads)
    q, k, v, log_decay = (common.to_chunks(x, chunk) for x in (q, k, v, log_decay.astype(acc)))
    segs = common.segments(segment_ids, chunk)
    segs = segs and common.Segments(*(x[:, 0] for x in segs))  # no group axis here
    initial_state = initial_state if initial_state is None else initial_state.astype(acc)
    o, final = _chunked((float(scale), output_final_state), q, k, v, log_decay, initial_state, segs)
    return common.from_chunks(o[:, :, None], length), final


def decay_weights(log_decay, segs):
    """Cumulative decay pair, and e^b [.., C, K], e^{b_C - b} [.., C, K], e^{b_C} [N, .., K, 1] with segment masks."""
    coarse, fine = cumulative_decay(log_decay, -2)
    enter = jnp.exp(coarse + fine)
    leave = jnp.exp((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine))
    carry = enter[..., -1, :]
    if segs is not None:
        enter, leave = enter * segs.enter[..., None], leave * segs.leave[..., None]
        carry = carry * segs.carry[..., None]
    return (coarse, fine), enter, leave, jnp.moveaxis(carry, 2, 0)[..., None]


def same_segment(segs, x):
    """Zeroes the entries of [B, H, N, C, C] that pair tokens of different segments."""
    return x if segs is None else jnp.where(segs.same, x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, q, k, v, log_decay, initial_state, segs):
    return _forward(static, q, k, v, log_decay, initial_state, segs)[0]


def _forward(static, q, k, v, log_decay, initial_state, segs):
    scale, want_final = static
    acc, mm = log_decay.dtype, common.matmul_dtype(v)
    v_mm = v.astype(mm)
    n = v.shape[2]
    cumulative, enter, leave, carry = decay_weights(log_decay, segs)
    a, = pairs.scores([q], k, cumulative, mm)
    a = (scale * same_segment(segs, a)).astype(mm)
    o = einsum("bhnij,bhnjv->bhniv", a, v_mm, preferred_element_type=acc)
    residuals = (q, k, v, log_decay, initial_state, segs)
    if n == 1 and initial_state is None and not want_final:
        return (o.astype(v.dtype), None), residuals + (None,)
    used = n if want_final else n - 1
    updates = einsum("bhnjk,bhnjv->nbhkv", (leave * k)[:, :, :used].astype(mm), v_mm[:, :, :used],
                     preferred_element_type=acc)
    state = jnp.zeros(v.shape[:2] + (k.shape[-1], v.shape[-1]), acc) if initial_state is None else initial_state
    final, states = scan_states(carry[:used], updates, state)
    if not want_final:
        states, final = jnp.concatenate([states, final[None]]), None
    o = o + scale * einsum("bhnik,nbhkv->bhniv", (enter * q).astype(mm), states.astype(mm), preferred_element_type=acc)
    return (o.astype(v.dtype), final), residuals + (states,)


def _backward(static, residuals, cotangents):
    scale, want_final = static
    q, k, v, log_decay, initial_state, segs, states = residuals
    do, dfinal = cotangents
    acc, mm = log_decay.dtype, common.matmul_dtype(v)
    do, v_mm = (scale * do.astype(acc)).astype(mm), v.astype(mm)
    cumulative, enter, leave, carry = decay_weights(log_decay, segs)

    a, = pairs.scores([q], k, cumulative, mm)
    dv = einsum("bhnij,bhniv->bhnjv", same_segment(segs, a).astype(mm), do, preferred_element_type=acc)
    da = same_segment(segs, einsum("bhniv,bhnjv->bhnij", do, v_mm, preferred_element_type=acc))
    (dq,), dk, dlog_decay = pairs.scores_vjp([da], [q], k, cumulative, mm)
    dinitial = None
    if states is not None:
        reads = einsum("bhnik,bhniv->nbhkv", (enter * q).astype(mm), do, preferred_element_type=acc)
        last = jnp.zeros(reads.shape[1:], acc) if dfinal is None else dfinal.astype(acc)
        dinitial, dstates = scan_states(carry, reads, last, reverse=True)
        dstates_mm = dstates.astype(mm)
        dq_in = enter * einsum("bhniv,nbhkv->bhnik", do, states.astype(mm), preferred_element_type=acc)
        dk_out = leave * einsum("bhnjv,nbhkv->bhnjk", v_mm, dstates_mm, preferred_element_type=acc)
        dv = dv + einsum("bhnjk,nbhkv->bhnjv", (leave * k).astype(mm), dstates_mm, preferred_element_type=acc)
        dq, dk = dq + dq_in, dk + dk_out
        kept = jnp.moveaxis((states * dstates).sum(-1) * carry[..., 0], 0, 2)[..., None, :]
        dlog_decay = dlog_decay + prefix_sum(q * dq_in, -2, reverse=True) + prefix_sum(k * dk_out, -2, exclusive=True)
        dlog_decay = dlog_decay + kept
    if segs is not None:
        dlog_decay = jnp.where(segs.start[..., None], 0, dlog_decay)
    dinitial = None if initial_state is None else dinitial
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dlog_decay, dinitial, None


_chunked.defvjp(_forward, _backward)
