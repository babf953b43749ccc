"""Linear attention with no decay, a constant decay per head or one per token, on Hopper GPUs through Pallas Mosaic GPU.

Serves linear attention (2006.16236), RetNet (2307.08621), Lightning Attention (2401.04658), Mamba-2 (2405.21060) and
sigmoid-gated mLSTM. States are float32 and stay on chip; residuals are the inputs and one state per piece of T.

With S_t = e^(g_t) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t, the gradient of the gates needs no product of its
own: dg_t = sum_{t <= i <= n} (q_i . dq_i - k_i . dk_i) + <S_n, dS_n> for any n >= t. The row sums are float32 and taken
inside the kernels; n is the end of t's span of 512 tokens: over a whole sequence the rounding of the sums would add up.
"""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.gpu.decay_pass import CHUNK, decay_pass, decay_pass_pair
from pallas_kernels.steps import repeat_heads

LOG2E = 1.4426950408889634
FORGET = -160.0  # log2 decay that empties a float32 state; a finite stand-in for -inf, so that differences stay exact
PROGRAMS = {64: 264, 128: 132}  # resident programs of one H100 (132 multiprocessors), by value head size
MIN_PIECE_CHUNKS = 8
SAVE_EVERY = 8  # chunks between the states saved for the gradient of the gates


def supports(q, k, v, log_decay=None, *, chunk_size=None, **_):
    """None where `linear_attention` takes these arrays, else why not, in one line. Looks at shapes and dtypes only."""
    if chunk_size not in (None, CHUNK):
        return f"chunk_size must be {CHUNK} or None, got {chunk_size}"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k, v must be bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[1] == 0:
        return "T must be at least 1"
    for name, size in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if size not in (64, 128):
            return f"{name} head size must be 64 or 128, got {size}"
    if log_decay is not None and log_decay.ndim not in (1, 3):
        return f"log_decay must be None, [H] or [B, T, H], got {log_decay.shape}"
    return None


def linear_attention(q, k, v, log_decay=None, *, scale, initial_state=None, segment_ids=None, interpret=None):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, differentiable in every array.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K and V in {64, 128}, any T.
      log_decay: None, [H] or [B, T, H], natural log, <= 0.
      initial_state: float32 [B, H, K, V] or None for zero.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, V] in the dtype of v, final state float32 [B, H, K, V]).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v, log_decay):
        raise ValueError(f"pallas_gpu linear_attention: {reason}")
    b_size, t_size, heads, _ = v.shape
    q, k = repeat_heads(q, heads), repeat_heads(k, heads)
    decay = None
    if log_decay is not None or segment_ids is not None:
        decay = jnp.zeros((heads,), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
        decay = jnp.maximum(jnp.broadcast_to(decay * LOG2E, (b_size, t_size, heads)), FORGET)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        decay = jnp.where(new[..., None], FORGET, decay)
    if pad := -t_size % CHUNK:  # zero tokens without decay change neither state nor gradients
        widths = ((0, 0), (0, pad), (0, 0))
        q, k, v = (jnp.pad(a, (*widths, (0, 0))) for a in (q, k, v))
        decay = decay if decay is None else jnp.pad(decay, widths)
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    o, state = _linear_attention(q, k, v, decay, initial_state, scale, interpret)
    return o[:, :t_size], state


def count_pieces(b_size, t_size, heads, v_size):
    """Pieces T is cut in so that few heads still fill the card."""
    chunks = t_size // CHUNK
    wanted = min(PROGRAMS[v_size] // (b_size * heads), chunks // MIN_PIECE_CHUNKS)
    per_piece = -(-chunks // max(1, wanted))
    return -(-chunks // per_piece)


def _running_sum(x, reverse=False):
    """Inclusive sum along the last axis as a product with a triangle: one kernel where a scan would be many."""
    size = x.shape[-1]
    ones = jnp.tril(jnp.ones((size, size), jnp.float32)) if reverse else jnp.triu(jnp.ones((size, size), jnp.float32))
    return jnp.matmul(x, ones, precision="highest")


def _chunk_decays(decay, reverse):
    """[B, T, H] log2 decays -> (c [B, H, N, 64], total [B, H, N]) as `decay_pass` wants them."""
    if decay is None:
        return None, None
    b_size, t_size, heads = decay.shape
    c = _running_sum(decay.transpose(0, 2, 1).reshape(b_size, heads, t_size // CHUNK, CHUNK))
    total = c[..., -1]
    return (total[..., None] - c if reverse else c), total


def _piece_states(local, total, init, pieces, reverse):
    """State entering each piece [B, H, P, K, V], from the pieces' states grown from zero (all but the last walked)."""
    b_size, heads, _, k_size, v_size = local.shape
    entering = jnp.zeros((b_size, heads, 1, k_size, v_size), jnp.float32) if init is None else init[:, :, None]
    if reverse:
        local = local[:, :, ::-1]
    if total is None:
        weights = jnp.broadcast_to(jnp.tri(pieces, dtype=jnp.float32), (b_size, heads, pieces, pieces))
    else:
        chunks = total.shape[-1]
        per_piece = -(-chunks // pieces)
        piece = jnp.pad(total, ((0, 0), (0, 0), (0, pieces * per_piece - chunks)))
        piece = piece.reshape(b_size, heads, pieces, per_piece).sum(-1)
        piece = piece[..., ::-1] if reverse else piece
        # row p: the state entering p from source r (0 = init, r = piece r-1) has passed pieces r .. p-1
        p, r, between = jnp.indices((pieces, pieces, pieces))
        inside = ((r <= between) & (between < p)).astype(jnp.float32)
        passed = jnp.einsum("bhm,prm->bhpr", piece, inside, precision="highest")
        weights = jnp.exp2(passed) * jnp.tri(pieces, dtype=jnp.float32)[None, None]
    sources = jnp.concatenate([entering, local], axis=2)
    states = jnp.einsum("bhpr,bhrkv->bhpkv", weights, sources, precision="highest")
    return states[:, :, ::-1] if reverse else states


def _entering_states(y, z, c, total, init, *, pieces, reverse, interpret):
    if pieces == 1:
        return None if init is None else init[:, :, None]
    local = decay_pass(None, y, z, c, total, None, None, scale=1.0, reverse=reverse, pieces=pieces, stages=3,
                       emit="state", interpret=interpret)["state"]
    return _piece_states(local, total, init, pieces, reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear_attention(q, k, v, decay, init, scale, interpret):
    out, _ = _forward(q, k, v, decay, init, scale, interpret)
    return out["o"], out["state"][:, :, -1]


def _forward(q, k, v, decay, init, scale, interpret, save_every=0):
    pieces = count_pieces(*q.shape[:3], v.shape[-1])
    c, total = _chunk_decays(decay, reverse=False)
    states = _entering_states(k, v, c, total, init, pieces=pieces, reverse=False, interpret=interpret)
    out = decay_pass(q, k, v, c, total, states, None, scale=scale, reverse=False, pieces=pieces, stages=2,
                     save_every=save_every, interpret=interpret)
    return out, states


def _vjp_forward(q, k, v, decay, init, scale, interpret):
    save_every = SAVE_EVERY if decay is not None and decay.perturbed else 0
    q, k, v, decay, init = (None if a is None else a.value for a in (q, k, v, decay, init))
    out, states = _forward(q, k, v, decay, init, scale, interpret, save_every)
    final = out["state"][:, :, -1]
    # Which residuals are None, not their values, tells the backward pass what is wanted: residuals must be arrays.
    residuals = q, k, v, decay, states, out.get("saved"), final if save_every else None, None if init is None else ()
    return (out["o"], final), residuals


def _vjp_backward(scale, interpret, residuals, cotangents):
    q, k, v, decay, states, saved, final, has_init = residuals
    do, dfinal = (None if isinstance(ct, SymbolicZero) else ct for ct in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    pieces = count_pieces(*q.shape[:3], v.shape[-1])
    c, total = _chunk_decays(decay, reverse=False)
    transposed = None if states is None else states.swapaxes(-1, -2)
    dq = decay_pass(do, v, k, c, total, transposed, None if saved is None else q, scale=scale, reverse=False,
                    pieces=pieces, stages=2, interpret=interpret)
    if total is not None:
        c = total[..., None] - c
    unscaled = None if dfinal is None else dfinal / scale
    dstates = _entering_states(q, do, c, total, unscaled, pieces=pieces, reverse=True, interpret=interpret)
    dkv = decay_pass_pair(q, k, v, do, c, total, dstates, saved, scale=scale, pieces=pieces, save_every=SAVE_EVERY,
                          interpret=interpret)
    ddecay = None
    if saved is not None:
        at_end = jnp.zeros(final.shape[:2], jnp.float32) if dfinal is None else jnp.sum(final * dfinal, axis=(-1, -2))
        rows = jnp.sum(dq["r"], axis=2) - dkv["r"]
        ddecay = _gate_gradient(rows, scale * jnp.sum(dkv["f"], axis=-1), at_end) / LOG2E
    return dq["o"], dkv["dk"], dkv["dv"], ddecay, None if has_init is None else dkv["state"][:, :, 0] * scale


def _gate_gradient(rows, at_saved, at_end):
    """dg [B, T, H] from rows q.dq - k.dk [B, H, T] and <S, dS> at the saved places [B, H, M] and at the end [B, H]."""
    b_size, heads, t_size = rows.shape
    span = SAVE_EVERY * CHUNK
    spans = -(-t_size // span)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, spans * span - t_size))).reshape(b_size, heads, spans, SAVE_EVERY, CHUNK)
    within = _running_sum(rows, reverse=True)
    chunks = within[..., 0]
    after = _running_sum(chunks, reverse=True) - chunks
    ends = jnp.concatenate([at_saved[..., : t_size // span], at_end[..., None]], axis=-1)[..., :spans]
    dg = within + (after + ends[..., None])[..., None]
    return dg.reshape(b_size, heads, spans * span)[..., :t_size].transpose(0, 2, 1)


_linear_attention.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
