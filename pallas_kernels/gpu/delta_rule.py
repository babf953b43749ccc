"""DeltaNet (2406.06484), Gated DeltaNet (2412.06464) and, through `kda`, Kimi Delta Attention on Hopper GPUs.

The rest of this file is the scalar decay. Forward: the chunks' triangular inverses, then one walk with the state on
chip. Residuals are the inputs, the inverses and, in fp16, U and the states entering the chunks: to walk again for those
costs more than the memory's traffic. The backward pass walks back for dv and the gradients of the states, and makes the
other gradients with all chunks in parallel.

Few heads: T is cut in pieces, whose entering states come first, exactly: a piece takes a state S to F + M S, with F and
M [K, K] from one walk over every piece at once (M is also, transposed, the transition of the states' gradients).
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu import kda
from pallas_kernels.gpu.delta_carry import carry_states
from pallas_kernels.gpu.delta_inverse import chunk_inverses
from pallas_kernels.gpu.delta_pass import GATE_SUMS, TINY, delta_forward, delta_gradients, delta_reverse
from pallas_kernels.gpu.gates import LOG2E, by_chunk, chunk_decays, pad_tokens, token_decays
from pallas_kernels.gpu.head_parts import HeadParts
from pallas_kernels.gpu.pieces import MIN_PIECE_CHUNKS, value_programs
from pallas_kernels.gpu.tiles import CHUNK, not_hopper
from pallas_kernels.steps import repeat_heads


def supports(q, k, v, beta=None, log_decay=None, *, chunk_size=None, **_):
    """None where `delta_rule` takes these arrays, else why not, in one line. Values are not looked at."""
    del beta
    if reason := not_hopper():
        return reason
    if chunk_size not in (None, CHUNK):
        return f"chunk_size must be {CHUNK} or None, got {chunk_size}"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k, v must be bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[1] == 0:
        return "T must be at least 1"
    if q.shape[-1] not in (64, 128):
        return f"key head size must be 64 or 128, got {q.shape[-1]}"
    if v.shape[-1] % q.shape[-1] or v.shape[-1] > 256:
        return f"value head size must be a multiple of the key head size, at most 256, got {v.shape[-1]}"
    return None


def delta_rule(q, k, v, beta, log_decay=None, *, scale, max_beta=2.0, initial_state=None, segment_ids=None,
               interpret=None):
    """S' = exp(log_decay_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale S_t^T q_t.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K 64 or 128, V a multiple of K up to 256, any T;
        beta |k|^2 <= max_beta. Values wider than keys run as several heads of K channels. Without decays per channel
        q and k become fp16: rows of a norm below 1e-4 lose digits, entries beyond 65504 overflow. v may have any
        magnitude.
      beta: [B, T, H], not negative; where it is exactly 0 (a masked token) its gradient is given as 0.
      max_beta: a promise, at most 2; up to 1 the kernels spare digits that only reflections need (without decays per
        channel).
      log_decay: None, [H], [B, T, H] or [B, T, H, K] (rounded, see `kda`), natural log, <= 0.
      initial_state: float32 [B, H, K, V] or None for zero.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, V] in the dtype of v, final state float32 [B, H, K, V]).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v, beta, log_decay):
        raise ValueError(f"pallas_gpu delta_rule: {reason}")
    q, k = repeat_heads(q, v.shape[2]), repeat_heads(k, v.shape[2])
    parts = HeadParts(1, v.shape[-1] // q.shape[-1])
    q, k, v, initial_state = parts.of_keys(q), parts.of_keys(k), parts.of_values(v), parts.of_state(initial_state)
    options = dict(scale=scale, initial_state=initial_state, segment_ids=segment_ids, interpret=interpret)
    if log_decay is not None and log_decay.ndim == 4:
        return parts.join(*kda.delta_rule(q, k, v, parts.of_heads(beta), parts.of_keys(log_decay), **options))
    return parts.join(*_scalar_decay(q, k, v, parts.of_heads(beta), parts.of_heads(log_decay), reflects=max_beta > 1,
                                     **options))


def _scalar_decay(q, k, v, beta, log_decay, *, scale, reflects, initial_state, segment_ids, interpret):
    b_size, t_size, heads, _ = v.shape
    decay = token_decays(log_decay, segment_ids, b_size, t_size, heads)
    # a beta of zero without decay changes neither state nor gradients
    q, k, v, beta, decay = (None if x is None else pad_tokens(x)
                            for x in (q, k, v, beta.astype(jnp.float32), decay))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    o, state = _delta_rule(q, k, v, beta, decay, initial_state, scale, reflects, interpret)
    return o[:, :t_size], state


PROGRAMS = 132  # multiprocessors of an H100 or H200
PIECES = 4, 32  # with fewer, walking them twice costs more than it gains; with more, carrying states along


def delta_pieces(v):
    """Pieces T is cut in: those that fill the card, where they are worth it."""
    b_size, t_size, heads, _ = v.shape
    chunks = t_size // CHUNK
    wanted = min(PROGRAMS // (b_size * heads), chunks // MIN_PIECE_CHUNKS, PIECES[1])
    per_piece = -(-chunks // wanted) if wanted >= PIECES[0] else chunks
    return -(-chunks // per_piece)


def _gates(beta, decay):
    """float32 [B, H, N, 2, 64]: in-chunk log2 decays and beta."""
    beta = by_chunk(beta)
    c, _ = chunk_decays(decay)
    return jnp.stack([jnp.zeros_like(beta) if c is None else c, beta], axis=3)


def _with_factors(gates, *factors):
    """gates [B, H, N, 3, 64] with `factors` [B, H, N] in the third row, see `delta_pass`."""
    factors = jnp.stack([jnp.broadcast_to(x, gates.shape[:3]) for x in factors], axis=-1)
    factors = jnp.pad(factors, ((0, 0),) * 3 + ((0, CHUNK - factors.shape[-1]),))
    return jnp.concatenate([gates, factors[..., None, :]], axis=3)


def value_units(peaks, init):
    """Powers of two [B, H, N] by which the chunks' values and states are multiplied to fit fp16 with room to grow.

    A column of the state grows by at most 2 |v| per token, for beta |k|^2 <= 2. Steps of 2^8 keep the unit, and so
    the rounding of what is below fp16's normal range, from changing with every large value.

    Args: peaks [B, H, N], the largest magnitude among each chunk's values; init [B, H, K, V] or None.
    """
    so_far = jnp.max(jnp.where(jnp.tri(peaks.shape[2], dtype=bool), peaks[:, :, None], 0.0), axis=3)
    if init is not None:
        so_far = jnp.maximum(so_far, jnp.max(jnp.abs(init), axis=(-1, -2))[..., None])
    exponent = jnp.ceil(jnp.log2(jnp.maximum(so_far, TINY)) / 8 - 0.5) * 8 + 4
    growth = jnp.maximum(jnp.ceil(jnp.log2(1.0 + jnp.arange(peaks.shape[2]))) - 4, 0)
    return _power(-exponent - growth)


def grad_units(do, dfinal, scale):
    """A power of two [B, H, 1] for all chunks' gradients of values and states, likewise."""
    peaks = jnp.max(jnp.abs(do), axis=(1, 3)).astype(jnp.float32) * scale
    if dfinal is not None:
        peaks = jnp.maximum(peaks, jnp.max(jnp.abs(dfinal), axis=(-1, -2)))
    growth = max(math.ceil(math.log2(do.shape[1])) - 10, 0) + 2
    return _power(-jnp.ceil(jnp.log2(jnp.maximum(peaks, TINY))) - growth)[..., None]


def _power(exponent):
    return jnp.ldexp(1.0, jnp.clip(exponent, -60, 60).astype(jnp.int32))


def _decay_gradient(sums):
    """Gradient of log2 decays [B, T, H] from the row sums of `delta_gradients`, see there."""
    passed, read, written, kept = (jnp.sum(x.reshape(*x.shape[:3], -1, CHUNK), axis=2) for x in sums)
    ones = jnp.ones((CHUNK, CHUNK), jnp.float32)
    from_here_or_before = jnp.concatenate([jnp.tril(ones), jnp.triu(ones, 1)])
    sides = jnp.matmul(jnp.concatenate([read, written], axis=-1), from_here_or_before, precision="highest")
    grad = passed + sides + jnp.sum(kept, axis=-1, keepdims=True)
    return grad.reshape(*grad.shape[:2], -1).transpose(0, 2, 1) / LOG2E


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, decay, init, scale, reflects, interpret):
    out, _ = _forward(q, k, v, beta, decay, init, scale, reflects, interpret)
    return out["o"], out["state"]


def _forward(q, k, v, beta, decay, init, scale, reflects, interpret, save=False):
    decays, pieces = decay is not None, delta_pieces(v)
    gates = _gates(beta, decay)
    inverse, peaks = chunk_inverses(k, v, gates, decay=decays, refine=reflects, interpret=interpret)
    units = value_units(jnp.max(peaks, axis=-1), init)
    following = jnp.concatenate([units[:, :, 1:], units[:, :, -1:]], axis=2)
    walk_gates = _with_factors(gates, units, 1 / units, following / units, 1 / following)
    moves, states = None, None if init is None else init[:, :, None]
    if pieces > 1:
        local, moves = delta_forward(None, k, v, inverse, walk_gates, None, decay=decays, scale=scale, pieces=pieces,
                                     interpret=interpret).values()
        states = carry_states(init, local, moves, interpret=interpret)
    out = delta_forward(q, k, v, inverse, walk_gates, states, decay=decays, scale=scale, pieces=pieces,
                        split=value_programs(v) if pieces == 1 else 1, save=save, interpret=interpret)
    return out, (inverse, moves, gates, units)


def _vjp_forward(q, k, v, beta, decay, init, scale, reflects, interpret):
    gate_grad = decay is not None and decay.perturbed
    arrays = tuple(None if a is None else a.value for a in (q, k, v, beta, decay, init))
    out, weights = _forward(*arrays, scale, reflects, interpret, save=True)
    return (out["o"], out["state"]), (arrays, weights, out["u"], out["entering"], () if gate_grad else None)


def _vjp_backward(scale, reflects, interpret, residuals, cotangents):
    (q, k, v, beta, decay, init), (inverse, moves, gates, units), u, entering, gate_grad = residuals
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    unit, pieces = grad_units(do, dfinal, scale), delta_pieces(v)
    gates = _with_factors(gates, unit, 1 / unit, scale * unit, 1 / (unit * units))
    options = dict(decay=decay is not None, pieces=pieces, interpret=interpret)
    states = None if dfinal is None else dfinal[:, :, None]
    if pieces > 1:
        local = delta_reverse(q, k, do, inverse, gates, None, emit="state", **options)["state"]
        states = carry_states(dfinal, local, moves, reverse=True, interpret=interpret)
    split = value_programs(v) if pieces == 1 else 1
    back = delta_reverse(q, k, do, inverse, gates, states, split=split, **options)
    grads = delta_gradients(q, k, do, u, back["minus_dv"], entering, back["leaving"], gates, decay=decay is not None,
                            gate_sums=gate_grad is not None, reflects=reflects, interpret=interpret)
    dbeta = grads["dbeta"][:, :, 0].transpose(0, 2, 1)
    ddecay = None if gate_grad is None else _decay_gradient([grads[name] for name in GATE_SUMS])
    return grads["dq"], grads["dk"], back["dv"], dbeta, ddecay, None if init is None else back["state"][:, :, 0]


_delta_rule.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
