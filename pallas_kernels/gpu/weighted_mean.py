"""Linear attention with a scalar decay, divided by its own normaliser, on Hopper GPUs: mLSTM, normalised attention.

The walk is that of scalar-decay linear attention (`decay_pass`) with other exponents for columns, d = c - weight, than
for rows. The normaliser is a value channel of ones, and may be small beside its terms; hence float32: row sums of the
scores for tokens of the same chunk, and for earlier ones the weighted sum of their keys, which XLA makes for all chunks
at once and which meets q in three bf16 parts.

Gradients are exact. With D = max(|scale n.q|, floor), s the sign of n.q where that is larger, else 0, and delta = s
(do . o), the scores of the backward passes are (do_i . v_j - delta_i) / D_i, as for softmax attention.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu import linear_attention as scalar
from pallas_kernels.gpu.chunk_sums import bf16_parts, chunk_sums, row_dots
from pallas_kernels.gpu.decay_pass import decay_pass, decay_pass_pair
from pallas_kernels.gpu.gates import LOG2E, pad_tokens, running_sum
from pallas_kernels.gpu.head_parts import HeadParts
from pallas_kernels.gpu.mlstm_scans import decayed_sums
from pallas_kernels.gpu.pieces import count_pieces
from pallas_kernels.gpu.tiles import CHUNK
from pallas_kernels.steps import repeat_heads

SMALLEST = 2.0**-126  # normalisers below the smallest float32 belong to outputs 0 / 0 of zero queries


def weighted_mean(q, k, v, decay, weight, floor, c0, n0, *, scale, interpret=None):
    """o_i = sum_j w_ij v_j / max(|sum_j w_ij|, floor_i), w_ij = scale 2^(c_i - c_j + weight_j) (q_i . k_j), j <= i.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K in {64, 128}, V in {64, 128, 256}, any T.
      decay, weight: float32 [B, H, T], both log2 and <= 0; c are the sums of the decays.
      floor: float32 [B, H, T], positive or zero, a constant for gradients.
      c0, n0: float32 states [B, H, K, V] and [B, H, K] before the first token, or None and None.
    Returns: (o [B, T, H, V], C [B, H, K, V], n [B, H, K]), C_t = 2^decay C_{t-1} + 2^weight k v^T and n with v = 1.
    """
    t_size, heads, v_size = v.shape[1:]
    parts = HeadParts(1, -(-v_size // 128))
    q, k = (parts.of_keys(repeat_heads(x, heads)) for x in (q, k))
    n0 = None if n0 is None else jnp.repeat(n0, parts.values, axis=1)
    # zero tokens without decay change neither state nor gradients
    q, k, v = (pad_tokens(x) for x in (q, k, parts.of_values(v)))
    padding = (0, 0), (0, 0), (0, q.shape[1] - t_size)
    gates = (jnp.repeat(jnp.pad(x, padding), parts.values, axis=1) for x in (decay, weight, floor))
    decay, weight, floor = (x.reshape(*x.shape[:2], -1, CHUNK) for x in gates)
    gates = decay, weight, jnp.maximum(floor, SMALLEST)
    o, c, n = _weighted_mean(q, k, v, gates, parts.of_state(c0), n0, scale, interpret)
    o, c = parts.join(o[:, :t_size], c)
    return o, c, n[:, ::parts.values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _weighted_mean(q, k, v, gates, c0, n0, scale, interpret):
    out, _ = _forward(q, k, v, gates, c0, n0, scale, interpret)
    return out["o"], out["state"][:, :, -1], out["n"]


def _forward(q, k, v, gates, c0, n0, scale, interpret, save_every=0):
    decay, weight, floor = gates
    pieces = count_pieces(*q.shape[:3], v.shape[-1])
    c = running_sum(decay)
    total, d = c[..., -1], c - weight
    states = scalar.entering_states(k, v, d, total, c0, pieces=pieces, reverse=False, interpret=interpret)
    sums = decayed_sums(total, chunk_sums(k, jnp.exp2(total[..., None] - d), interpret=interpret), n0)
    out = decay_pass(q, k, v, c, total, states, None, d=d, floor=floor, norms=bf16_parts(sums[:, :, :-1]), scale=scale,
                     reverse=False, pieces=pieces, stages=2, save_every=save_every, interpret=interpret)
    return out | {"n": sums[:, :, -1]}, (states, sums)


def _vjp_forward(q, k, v, gates, c0, n0, scale, interpret):
    q, k, v, gates, c0, n0 = jax.tree.map(lambda x: x.value, (q, k, v, gates, c0, n0),
                                          is_leaf=lambda x: hasattr(x, "perturbed"))
    out, (states, sums) = _forward(q, k, v, gates, c0, n0, scale, interpret, scalar.SAVE_EVERY)
    residuals = q, k, v, gates, states, sums, out["saved"], out["m"], out["o"], None if c0 is None else ()
    return (out["o"], out["state"][:, :, -1], out["n"]), residuals


def _vjp_backward(scale, interpret, residuals, cotangents):
    q, k, v, (decay, weight, floor), states, sums, saved, m, o, has_init = residuals
    do, dfinal, dn = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    b_size, t_size, heads, _ = q.shape
    pieces = count_pieces(b_size, t_size, heads, v.shape[-1])
    c = running_sum(decay)
    total, d = c[..., -1], c - weight
    m = m.reshape(floor.shape)
    delta = jnp.where(jnp.abs(m) > floor, jnp.sign(m) * row_dots(do, o, interpret=interpret), 0.0)
    c_out = c - jnp.log2(jnp.maximum(jnp.abs(m), floor))
    dq = decay_pass(do, v, k, c_out, total, None if states is None else states.swapaxes(-1, -2), q, d=d, delta=delta,
                    norms=sums[:, :, :-1], scale=scale, reverse=False, pieces=pieces, stages=2,
                    save_every=scalar.SAVE_EVERY, interpret=interpret)

    c, d, whole = total[..., None] - d, total[..., None] - c_out, total[..., None]
    unscaled = None if dfinal is None else dfinal / scale
    dstates = scalar.entering_states(q, do, d, total, unscaled, pieces=pieces, reverse=True, interpret=interpret)
    q_sums = chunk_sums(q, delta * jnp.exp2(whole - d), interpret=interpret)
    behind = jnp.flip(decayed_sums(jnp.flip(total, 2), jnp.flip(q_sums, 2), None if dn is None else -dn / scale), 2)
    dkv = decay_pass_pair(q, k, v, do, c, total, dstates, saved, d=d, delta=delta, norms=behind[:, :, 1:], scale=scale,
                          pieces=pieces, save_every=scalar.SAVE_EVERY, interpret=interpret)

    first = scalar.SAVE_EVERY * jnp.arange(dkv["f"].shape[2])
    passed = jnp.exp2(total[:, :, first]) * jnp.sum(sums[:, :, first] * behind[:, :, first + 1], axis=-1)
    ddecay = scalar.decay_gradient(dq, dkv, scale, -passed).reshape(decay.shape)
    dweight = (dkv["r"] + dkv["own"] * dkv["qk"]).reshape(ddecay.shape) / LOG2E
    dc0 = dn0 = None
    if has_init is not None:
        dc0, dn0 = scale * dkv["state"][:, :, 0], -scale * behind[:, :, 0]
    return dq["o"], dkv["dk"], dkv["dv"], (ddecay, dweight, jnp.zeros_like(floor)), dc0, dn0


_weighted_mean.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
