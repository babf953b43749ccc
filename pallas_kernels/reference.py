"""Token-by-token recurrences: the oracle that every other implementation is compared with.

Each operator scans the single-token update of `steps.py` over time in float32, or in float64 when the inputs are
float64. Gradients are JAX's own, so nothing here shares code with the hand-written backward passes.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import steps
from pallas_kernels.attention import attention  # noqa: F401

SPAN = 128  # tokens at most whose states a gradient holds at once


def _scan_tokens(step, arrays, state, segment_ids, fresh=None):
    """Scan `step(*token_arrays, state) -> (o, state)` over axis 1; a segment starts from state `fresh` (default 0).

    A gradient keeps the states between spans of tokens and makes those within a span once more.
    """
    fresh = jax.tree.map(jnp.zeros_like, state) if fresh is None else fresh
    over_time = [jnp.moveaxis(x, 1, 0) for x in arrays]
    flags = None if segment_ids is None else steps.segment_starts(segment_ids).T

    def body(state, inputs):
        token, flag = inputs
        if flag is not None:
            state = jax.tree.map(lambda s, new: jnp.where(flag.reshape(-1, *(1,) * (s.ndim - 1)), new, s), state, fresh)
        o, state = step(*token, state)
        return state, o

    t_size = arrays[0].shape[1]
    span = next((n for n in range(SPAN, SPAN // 4, -1) if t_size % n == 0), max(t_size, 1))
    spans = jax.tree.map(lambda x: x.reshape(t_size // span, span, *x.shape[1:]), (over_time, flags))
    run = functools.partial(jax.lax.scan, body)
    if span < t_size:
        run = jax.checkpoint(run, prevent_cse=False)
    state, o = jax.lax.scan(run, state, spans)
    return jnp.moveaxis(o.reshape(t_size, *o.shape[2:]), 0, 1), state


def _initial(initial_state, q, v, *others, extra=0):
    acc = steps.accumulation_dtype(q, v, *others)
    if initial_state is not None:
        return initial_state.astype(acc)
    return jnp.zeros((v.shape[0], v.shape[2], q.shape[-1], v.shape[-1] + extra), acc)


def linear_attention(q, k, v, log_decay=None, *, scale, bonus=None, normalise=False, initial_state=None,
                     segment_ids=None):
    """See `pallas_kernels.api.linear_attention`."""
    state = _initial(initial_state, q, v, k, log_decay, extra=int(normalise))
    options = dict(scale=scale, bonus=bonus, normalise=normalise)
    if log_decay is None or log_decay.ndim == 1:
        step = lambda q, k, v, s: steps.linear_attention_step(q, k, v, log_decay, s, **options)  # noqa: E731
        return _scan_tokens(step, (q, k, v), state, segment_ids)
    step = functools.partial(steps.linear_attention_step, **options)
    return _scan_tokens(step, (q, k, v, log_decay), state, segment_ids)


def delta_rule(q, k, v, beta, log_decay=None, *, scale, initial_state=None, segment_ids=None):
    """See `pallas_kernels.api.delta_rule`."""
    state = _initial(initial_state, q, v, k, log_decay)
    if log_decay is None or log_decay.ndim == 1:
        step = lambda q, k, v, beta, s: steps.delta_rule_step(q, k, v, beta, log_decay, s, scale=scale)  # noqa: E731
        return _scan_tokens(step, (q, k, v, beta), state, segment_ids)
    step = functools.partial(steps.delta_rule_step, scale=scale)
    return _scan_tokens(step, (q, k, v, beta, log_decay), state, segment_ids)


def dplr(q, k, v, a, b, log_decay, *, scale, initial_state=None, segment_ids=None):
    """See `pallas_kernels.api.dplr`."""
    state = _initial(initial_state, q, v, k, log_decay)
    step = functools.partial(steps.dplr_step, scale=scale)
    return _scan_tokens(step, (q, k, v, a, b, log_decay), state, segment_ids)


def mlstm(q, k, v, input_gate, forget_gate, *, scale, input_activation="exp", initial_state=None, segment_ids=None):
    """See `pallas_kernels.api.mlstm`."""
    step = functools.partial(steps.mlstm_step, scale=scale, input_activation=input_activation)
    fresh = _initial(None, q, v, k)
    if input_activation == "exp":
        fresh = (fresh, fresh[..., 0], jnp.full(fresh.shape[:2], steps.NO_STABILISER, fresh.dtype))
    state = fresh if initial_state is None else initial_state
    return _scan_tokens(step, (q, k, v, input_gate, forget_gate), state, segment_ids, fresh)


def diagonal_scan(x, log_decay, *, initial_state=None, segment_ids=None, reverse=False):
    """See `pallas_kernels.api.diagonal_scan`."""
    if reverse:
        x, log_decay, segment_ids = (a if a is None else jnp.flip(a, 1) for a in (x, log_decay, segment_ids))
    dtype = jnp.result_type(x.dtype, log_decay.dtype, steps.accumulation_dtype(x, log_decay))
    state = jnp.zeros_like(x[:, 0], dtype) if initial_state is None else initial_state.astype(dtype)
    h, state = _scan_tokens(steps.diagonal_scan_step, (x.astype(dtype), log_decay.astype(dtype)), state, segment_ids)
    h = h if jnp.iscomplexobj(log_decay) else h.astype(x.dtype)
    return jnp.flip(h, 1) if reverse else h, state


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_state=None, segment_ids=None):
    """See `pallas_kernels.api.causal_conv1d`."""
    state = initial_state
    if state is None:
        state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[-1]), x.dtype)
    step = lambda x, s: steps.causal_conv1d_step(x, weight, bias, s, activation=activation)  # noqa: E731
    return _scan_tokens(step, (x,), state, segment_ids)


def grouped_matmul(lhs, rhs, group_sizes):
    """See `pallas_kernels.api.grouped_matmul`: all rows times the matrix of every group, masked."""
    rhs = jnp.concatenate(rhs, axis=2)
    acc, out = steps.accumulation_dtype(lhs, rhs), lhs.dtype
    rows, ends = jnp.arange(lhs.shape[0])[:, None], jnp.cumsum(group_sizes)

    def add(total, group):
        matrix, start, end = group
        product = jnp.matmul(lhs.astype(acc), matrix.astype(acc), precision="highest")
        return total + jnp.where((rows >= start) & (rows < end), product, 0), None

    total = jnp.zeros((lhs.shape[0], rhs.shape[2]), acc)
    return jax.lax.scan(add, total, (rhs, ends - group_sizes, ends))[0].astype(out)
