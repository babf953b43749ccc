"""Linear attention with no decay, one decay per head, or one per head and token (RetNet, Lightning, SSD, mLSTM).

One head and one chunk, with b the inclusive in-chunk sum of log decays and S the entering state:

    P_ij = exp(b_i - b_j) for j <= i, else 0
    O    = scale (Q K^T * P) V + scale diag(e^b) Q S
    S'   = e^{b_C} S + (diag(e^{b_C - b}) K)^T V

Everything but the element-wise recurrence of S over chunks is parallel over chunks. The backward pass keeps one state
per chunk and recomputes the scores. Kernel design after arXiv 2405.21060 (SSD) and 2312.06635 (chunk form).
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.steps import accumulation_dtype
from pallas_kernels.xla import common
from pallas_kernels.xla.common import cumulative_decay, einsum, prefix_sum, scan_states


def linear_attention(q, k, v, log_decay, *, scale, initial_state, segment_ids, output_final_state, chunk_size):
    """log_decay: None, [H] or [B, T, H]. Returns (o, final_state or None); other arguments as in `api`."""
    length, heads, groups = v.shape[1], v.shape[2], q.shape[2]
    chunk = min(chunk_size, length)
    acc = accumulation_dtype(q, k, v, log_decay, initial_state)
    if log_decay is not None:
        log_decay = log_decay.astype(acc)
        if log_decay.ndim == 1 and length % chunk:  # padding must not decay the final state
            log_decay = jnp.broadcast_to(log_decay, (1, length, heads))
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay.reshape(1, groups, -1, 1, 1), (1, groups, heads // groups, 1, chunk))
        else:
            log_decay = common.to_chunks(log_decay, chunk, groups)
    if initial_state is not None:
        initial_state = initial_state.astype(acc).reshape(v.shape[0], groups, -1, *initial_state.shape[2:])
    q, k = common.to_chunks(q, chunk), common.to_chunks(k, chunk)
    v = common.to_chunks(v, chunk, groups)
    segs = common.segments(segment_ids, chunk)
    o, final = _chunked((float(scale), output_final_state), q, k, v, log_decay, initial_state, segs)
    return common.from_chunks(o, length), final if final is None else final.reshape(-1, heads, *final.shape[3:])


def _weights(log_decay, segs, chunk, dtype):
    """(P [..,C,C], e^b [..,C], e^{b_C - b} [..,C], e^{b_C} [..]) with size-1 axes where they do not vary."""
    pairs = jnp.tril(jnp.ones((1, 1, 1, 1, chunk, chunk), bool))
    if segs is not None:
        pairs = pairs & segs.same
    if log_decay is None:
        p = pairs.astype(dtype)
        enter = leave = jnp.ones((1, 1, 1, 1, chunk), dtype)
        carry = jnp.ones((1,) * 4, dtype)
    else:
        coarse, fine = cumulative_decay(log_decay)
        gap = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
        p = jnp.exp(jnp.where(pairs, gap, -jnp.inf))
        enter = jnp.exp(coarse + fine)
        leave = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
        carry = enter[..., -1]
    if segs is not None:
        enter, leave, carry = enter * segs.enter, leave * segs.leave, carry * segs.carry
    return p, enter, leave, carry


def _leading(carry, n):
    """[.., N or 1] -> [N, .., 1, 1], to be scanned together with states [N, B, G, R, K, V]."""
    carry = jnp.moveaxis(carry, -1, 0)[..., None, None]
    return jnp.broadcast_to(carry, (n,) + carry.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, q, k, v, log_decay, initial_state, segs):
    return _forward(static, q, k, v, log_decay, initial_state, segs)[0]


def _forward(static, q, k, v, log_decay, initial_state, segs):
    scale, want_final = static
    out_dtype, acc, mm = v.dtype, accumulation_dtype(q, k, v, log_decay), common.matmul_dtype(v)
    residuals = (q, k, v, log_decay, initial_state, segs)
    q, k, v = q.astype(mm), k.astype(mm), v.astype(mm)
    n, chunk = v.shape[3:5]
    p, enter, leave, carry = _weights(log_decay, segs, chunk, acc)
    scores = einsum("bgnik,bgnjk->bgnij", q, k, preferred_element_type=acc)
    a = (scale * scores[:, :, None] * p).astype(mm)
    o = einsum("bgrnij,bgrnjv->bgrniv", a, v, preferred_element_type=acc)
    if n == 1 and initial_state is None and not want_final:
        return (o.astype(out_dtype), None), residuals + (None,)
    # The update by the last chunk serves the final state only.
    used = n if want_final else n - 1
    updates = einsum("bgnjk,bgrnjv->nbgrkv", k[:, :, :used], ((leave[..., None] * v)[:, :, :, :used]).astype(mm),
                     preferred_element_type=acc)
    state = jnp.zeros(v.shape[:3] + (k.shape[-1], v.shape[-1]), acc) if initial_state is None else initial_state
    final, states = scan_states(_leading(carry, n)[:used], updates, state)
    if not want_final:
        states, final = jnp.concatenate([states, final[None]]), None
    reads = einsum("bgnik,nbgrkv->bgrniv", q, states.astype(mm), preferred_element_type=acc)
    o = o + (scale * enter)[..., None] * reads
    return (o.astype(out_dtype), final), residuals + (states,)


def _backward(static, residuals, cotangents):
    scale, want_final = static
    q0, k0, v0, log_decay, initial_state, segs, states = residuals
    do, dfinal = cotangents
    acc, mm = accumulation_dtype(q0, k0, v0, log_decay), common.matmul_dtype(v0)
    q, k, v, do = q0.astype(mm), k0.astype(mm), v0.astype(mm), (scale * do.astype(acc)).astype(mm)
    n, chunk = v.shape[3:5]
    p, enter, leave, carry = _weights(log_decay, segs, chunk, acc)

    scores = einsum("bgnik,bgnjk->bgnij", q, k, preferred_element_type=acc)
    da = einsum("bgrniv,bgrnjv->bgrnij", do, v, preferred_element_type=acc) * p
    dscores = da.sum(2).astype(mm)
    dq = einsum("bgnij,bgnjk->bgnik", dscores, k, preferred_element_type=acc)
    dk = einsum("bgnij,bgnik->bgnjk", dscores, q, preferred_element_type=acc)
    dv = einsum("bgrnij,bgrniv->bgrnjv", (scores[:, :, None] * p).astype(mm), do, preferred_element_type=acc)
    dlog_decay = dinitial = None
    if log_decay is not None:
        # The diagonal has weight 1 whatever the decay: leaving it out keeps small gradients free of cancellation.
        m = jnp.where(jnp.tril(jnp.ones((chunk, chunk), bool), -1), da * scores[:, :, None], 0)
        reach = m.sum(-1) - m.sum(-2)

    if states is not None:
        do_in = (enter[..., None] * do).astype(mm)
        reads = einsum("bgnik,bgrniv->nbgrkv", q, do_in, preferred_element_type=acc)
        last = jnp.zeros(reads.shape[1:], acc) if dfinal is None else dfinal.astype(acc)
        dinitial, dstates = scan_states(_leading(carry, n), reads, last, reverse=True)
        dstates_mm = dstates.astype(mm)
        dq_in = einsum("bgrniv,nbgrkv->bgrnik", do_in, states.astype(mm), preferred_element_type=acc)
        dq = dq + dq_in.sum(2)
        dk = dk + einsum("bgrnjv,nbgrkv->bgnjk", (leave[..., None] * v).astype(mm), dstates_mm,
                         preferred_element_type=acc)
        dv_out = leave[..., None] * einsum("bgnjk,nbgrkv->bgrnjv", k, dstates_mm, preferred_element_type=acc)
        dv = dv + dv_out
        if log_decay is not None:
            reach = reach + (dq_in * q[:, :, None]).sum(-1)
            kept = jnp.moveaxis((states * dstates).sum((-1, -2)), 0, -1) * carry
            behind = prefix_sum((dv_out * v).sum(-1), exclusive=True)
    if log_decay is not None:
        dlog_decay = prefix_sum(reach, reverse=True)
        if states is not None:
            dlog_decay = dlog_decay + behind + kept[..., None]
        if segs is not None:
            dlog_decay = jnp.where(segs.start, 0, dlog_decay)
        shared = tuple(i for i, size in enumerate(log_decay.shape) if size == 1)
        dlog_decay = dlog_decay.sum(shared, keepdims=True)
    if initial_state is None:
        dinitial = None
    return dq.astype(q0.dtype), dk.astype(k0.dtype), dv.astype(v0.dtype), dlog_decay, dinitial, None


_chunked.defvjp(_forward, _backward)
