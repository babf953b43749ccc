"""mLSTM with an exponential input gate (2405.04517) on Hopper GPUs through Pallas Mosaic GPU.

With the stabiliser m_t = max(log f_t + m_{t-1}, i_t) it is `weighted_mean` with decays log f_t + m_{t-1} - m_t <= 0,
weights i_t - m_t <= 0 and floor e^-m_t.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.gpu import linear_attention as scalar
from pallas_kernels.gpu.gates import FORGET, LOG2E
from pallas_kernels.gpu.mlstm_scans import running_max
from pallas_kernels.gpu.weighted_mean import weighted_mean
from pallas_kernels.steps import NO_STABILISER, segment_starts


def supports(q, k, v, input_gate=None, forget_gate=None, *, chunk_size=None, **_):
    """None where `mlstm` takes these arrays, else why not, in one line. Values are not looked at."""
    if q.shape[-1] > 128:
        return f"key head size must be 64 or 128, got {q.shape[-1]}"
    return scalar.supports(q, k, v, chunk_size=chunk_size)


def mlstm(q, k, v, input_gate, forget_gate, *, scale, initial_state=None, segment_ids=None, interpret=None):
    """See `pallas_kernels.api.mlstm` with input_activation 'exp'; any T.

    Args:
      q, k: [B, T, Hk, K]; v: [B, T, H, V], H a multiple of Hk; bf16, K in {64, 128}, V in {64, 128, 256}.
      input_gate, forget_gate: [B, T, H] before activation.
      initial_state: (C [B, H, K, V], n [B, H, K], m [B, H]) or None.
      segment_ids: int [B, T] or None; the state is emptied where the id changes.
    Returns: (o [B, T, H, V] in the dtype of v, (C, n, m) after the last token, float32).
    Raises: ValueError where `supports` gives a reason.
    """
    if reason := supports(q, k, v):
        raise ValueError(f"pallas_gpu mlstm: {reason}")
    gate, log_forget = (x.astype(jnp.float32).swapaxes(1, 2) for x in (input_gate, forget_gate))  # [B, H, T]
    log_forget = jax.nn.log_sigmoid(log_forget)
    c0 = n0 = starts = None
    if segment_ids is not None:
        starts = jnp.broadcast_to(segment_starts(segment_ids)[:, None], gate.shape)
    m0 = jnp.full(gate.shape[:2], NO_STABILISER, jnp.float32)
    if initial_state is not None:
        c0, n0, m0 = (x.astype(jnp.float32) for x in initial_state)
        one = jnp.exp(m0 - jax.lax.stop_gradient(m0))  # the gradient of m0: e^m0 is the scale of c0 and n0
        c0, n0, m0 = c0 * one[..., None, None], n0 * one[..., None], jax.lax.stop_gradient(m0)

    # m divides numerator and normaliser alike: any value would do, and none has a gradient
    m = jax.lax.stop_gradient(running_max(jnp.maximum(log_forget, -1e3), gate, m0, starts))
    before = jnp.concatenate([m0[..., None], m[..., :-1]], axis=-1)
    decay = jnp.maximum((log_forget + (before - m)) * LOG2E, FORGET)
    if starts is not None:
        decay = jnp.where(starts, FORGET, decay)
    weight = (gate - m) * LOG2E
    floor = jnp.exp(jnp.minimum(-m, 80.0))
    o, *state = weighted_mean(q, k, v, decay, weight, floor, c0, n0, scale=scale, interpret=interpret)
    return o, (*state, m[..., -1])
