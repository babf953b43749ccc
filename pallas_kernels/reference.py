"""Token-by-token recurrences: the oracle that every other implementation is compared with.

Each operator scans the single-token update of `steps.py` over time in float32, or in float64 when the inputs are
float64. Gradients are JAX's own, so nothing here shares code with the hand-written backward passes.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import steps


def resets(segment_ids):
    """[B, T] bool: True where a new segment starts. The first token continues `initial_state`."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def _scan_tokens(step, arrays, state, segment_ids):
    """Scan `step(*token_arrays, state) -> (o, state)` over axis 1, with the state zeroed where a segment starts."""
    over_time = [jnp.moveaxis(x, 1, 0) for x in arrays]
    flags = None if segment_ids is None else resets(segment_ids).T

    def body(state, inputs):
        token, flag = inputs
        if flag is not None:
            keep = jax.tree.map(lambda s: flag.reshape(flag.shape + (1,) * (s.ndim - 1)), state)
            state = jax.tree.map(lambda s, f: jnp.where(f, jnp.zeros_like(s), s), state, keep)
        o, state = step(*token, state)
        return state, o

    state, o = jax.lax.scan(body, state, (over_time, flags))
    return jnp.moveaxis(o, 0, 1), state


def _initial(initial_state, q, v, *others):
    acc = steps.accumulation_dtype(q, v, *others)
    if initial_state is not None:
        return initial_state.astype(acc)
    return jnp.zeros((v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]), acc)


def linear_attention(q, k, v, log_decay=None, *, scale, initial_state=None, segment_ids=None):
    """See `pallas_kernels.api.linear_attention`."""
    state = _initial(initial_state, q, v, k, log_decay)
    if log_decay is None or log_decay.ndim == 1:
        step = lambda q, k, v, s: steps.linear_attention_step(q, k, v, log_decay, s, scale=scale)  # noqa: E731
        return _scan_tokens(step, (q, k, v), state, segment_ids)
    step = functools.partial(steps.linear_attention_step, scale=scale)
    return _scan_tokens(step, (q, k, v, log_decay), state, segment_ids)
