"""Normalised linear attention (2006.16236), with no decay or one per head or token, on Hopper GPUs."""
import jax.numpy as jnp

from pallas_kernels.gpu import mlstm
from pallas_kernels.gpu.gates import token_decays
from pallas_kernels.gpu.weighted_mean import weighted_mean
from pallas_kernels.steps import NORMALISER_EPS


def supports(q, k, v, log_decay=None, *, chunk_size=None, **_):
    """None where `normalised_linear_attention` takes these arrays, else why not, in one line."""
    if log_decay is not None and log_decay.ndim == 4:
        return "decays per channel have no normalised kernel"
    return mlstm.supports(q, k, v, chunk_size=chunk_size)


def normalised_linear_attention(q, k, v, log_decay=None, *, scale, initial_state=None, segment_ids=None,
                                interpret=None):
    """`api.linear_attention` with normalise=True for q and k that are not negative; any T.

    Divides by the larger of scale z_t . q_t and 1e-10, where others divide by their sum.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K in {64, 128}, V in {64, 128, 256}.
      log_decay: None, [H] or [B, T, H], natural log, <= 0.
      initial_state: float32 [B, H, K, V + 1], z last, or None.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, V] in the dtype of v, final state float32 [B, H, K, V + 1]).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v, log_decay):
        raise ValueError(f"pallas_gpu normalised_linear_attention: {reason}")
    b_size, t_size, heads, _ = v.shape
    decay = token_decays(log_decay, segment_ids, b_size, t_size, heads)
    decay = jnp.zeros((b_size, heads, t_size), jnp.float32) if decay is None else decay.swapaxes(1, 2)
    c0 = n0 = None
    if initial_state is not None:
        c0, n0 = (x.astype(jnp.float32) for x in (initial_state[..., :-1], initial_state[..., -1]))
    weight, floor = jnp.zeros_like(decay), jnp.full_like(decay, NORMALISER_EPS)
    o, c, n = weighted_mean(q, k, v, decay, weight, floor, c0, n0, scale=scale, interpret=interpret)
    return o, jnp.concatenate([c, n[..., None]], axis=-1)
