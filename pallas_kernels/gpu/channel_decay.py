"""Linear attention with a decay per key channel on Hopper GPUs (GLA 2312.06635, HGRN2 2404.07904).

Forward: what each chunk makes alone, all chunks in parallel, then one walk with the state on chip. Residuals are the
inputs, those weights and the states entering the chunks; the backward pass walks back for dv and the gradients of the
states, and makes the other gradients with all chunks in parallel.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu.channel_pass import chunk_gradients, chunk_weights, weighted_pass
from pallas_kernels.gpu.gates import pad_tokens, resets
from pallas_kernels.gpu.pieces import count_pieces, piece_states


def linear_attention(q, k, v, log_decay, *, scale, initial_state=None, segment_ids=None, interpret=None):
    """As `linear_attention.linear_attention`, with q, k of as many heads as v and log_decay [B, T, H, K].

    Log decays are rounded to fp16, or to bf16 where they come so: a decay e^-g is off by up to 0.02 or 0.2 % of g.
    """
    t_size = v.shape[1]
    log_decay = resets(log_decay, segment_ids)
    # zero tokens without decay change neither state nor gradients
    q, k, v, log_decay = (pad_tokens(x) for x in (q, k, v, log_decay))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    o, state = _channel_decay(q, k, v, log_decay, initial_state, scale, interpret)
    return o[:, :t_size], state


def _entering_states(y, z, total, init, *, pieces, reverse, interpret):
    if pieces == 1:
        return None if init is None else init[:, :, None]
    local = weighted_pass(None, y, z, None, total, None, reverse=reverse, pieces=pieces, interpret=interpret)["state"]
    return piece_states(local, total, init, pieces, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _channel_decay(q, k, v, log_decay, init, scale, interpret):
    return _forward(q, k, v, log_decay, init, scale, interpret, keep=False)[0]


def _forward(q, k, v, log_decay, init, scale, interpret, keep=True):
    weights = chunk_weights(q, k, log_decay, scale=scale, interpret=interpret)
    a, x, y, total = (weights[name] for name in ("a", "x", "y", "total"))
    pieces = count_pieces(*v.shape[:3], v.shape[-1])
    states = _entering_states(y, v, total, init, pieces=pieces, reverse=False, interpret=interpret)
    out = weighted_pass(x, y, v, a, total, states, reverse=False, pieces=pieces, keep=keep, interpret=interpret)
    return (out["o"], out["state"][:, :, -1]), (weights, out.get("entering"))


def _vjp_forward(q, k, v, log_decay, init, scale, interpret):
    arrays = tuple(None if x is None else x.value for x in (q, k, v, log_decay, init))
    out, made = _forward(*arrays, scale, interpret)
    return out, (arrays[:4], made, None if init is None else ())


def _vjp_backward(scale, interpret, residuals, cotangents):
    (q, k, v, log_decay), (weights, entering), has_init = residuals
    a, x, y, total = (weights[name] for name in ("a", "x", "y", "total"))
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    pieces = count_pieces(*v.shape[:3], v.shape[-1])
    dstates = _entering_states(x, do, total, dfinal, pieces=pieces, reverse=True, interpret=interpret)
    back = weighted_pass(y, x, do, a, total, dstates, reverse=True, pieces=pieces, keep=True, interpret=interpret)
    grads = chunk_gradients(q, k, v, do, log_decay, total, entering, back["entering"], scale=scale,
                            interpret=interpret)
    return grads["dq"], grads["dk"], back["o"], grads["dg"], None if has_init is None else back["state"][:, :, 0]


_channel_decay.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
