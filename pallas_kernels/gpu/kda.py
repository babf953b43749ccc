"""Kimi Delta Attention (2510.26692) on Hopper GPUs: the delta rule with a decay per key channel.

Forward: what each chunk makes alone (scores, decayed keys, triangular inverse), all chunks in parallel, then one walk
with the state on chip. Residuals are q, k and the gates, those weights, U and the states entering the chunks; the
backward pass walks back for dv and the gradients of the states, and makes the other gradients with all chunks in
parallel. No inverse is differentiated.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu.channel_pass import chunk_gradients, chunk_weights
from pallas_kernels.gpu.delta_pass import TINY
from pallas_kernels.gpu.gates import by_chunk, pad_tokens, resets
from pallas_kernels.gpu.kda_pass import kda_forward, kda_reverse
from pallas_kernels.gpu.pieces import value_programs


def delta_rule(q, k, v, beta, log_decay, *, scale, initial_state=None, segment_ids=None, interpret=None):
    """As `delta_rule.delta_rule`, with q, k of as many heads as v and log_decay [B, T, H, K].

    Log decays are rounded to fp16, or to bf16 where they come so: a decay e^-g is off by up to 0.02 or 0.2 % of g.
    """
    t_size = v.shape[1]
    # a beta of zero without decay changes neither state nor gradients
    q, k, v, beta, log_decay = map(pad_tokens, (q, k, v, beta.astype(jnp.float32), resets(log_decay, segment_ids)))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    o, state = _kda(q, k, v, beta, log_decay, initial_state, scale, interpret)
    return o[:, :t_size], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _kda(q, k, v, beta, log_decay, init, scale, interpret):
    return _forward(q, k, v, beta, log_decay, init, scale, interpret, keep=False)[0]


def _forward(q, k, v, beta, log_decay, init, scale, interpret, keep=True):
    weights = chunk_weights(q, k, log_decay, by_chunk(beta), scale=scale, keep=keep, interpret=interpret)
    walk = kda_forward(weights, v, init, keep=keep, split=value_programs(v), interpret=interpret)
    made = {name: weights[name] for name in ("a", "w", "x", "y", "total")}
    return (walk["o"], walk["state"]), made | {name: walk[name] for name in ("u", "entering") if keep}


def _vjp_forward(q, k, v, beta, log_decay, init, scale, interpret):
    arrays = tuple(None if a is None else a.value for a in (q, k, v, beta, log_decay, init))
    out, made = _forward(*arrays, scale, interpret)
    q, k, v, beta, log_decay, init = arrays
    return out, ((q, k, beta, log_decay, None if init is None else ()), made)


def _vjp_backward(scale, interpret, residuals, cotangents):
    (q, k, beta, log_decay, has_init), made = residuals
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(made["u"]) if do is None else do
    back = kda_reverse(made, do, dfinal, split=value_programs(do), interpret=interpret)
    grads = chunk_gradients(q, k, made["u"], do, log_decay, made["total"], made["entering"], back["entering"],
                            back["dv"], scale=scale, interpret=interpret)
    dbeta = grads["held"].transpose(0, 2, 1) / jnp.maximum(beta * beta, TINY)
    return grads["dq"], grads["dk"], back["dv"], dbeta, grads["dg"], None if has_init is None else back["state"]


_kda.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
