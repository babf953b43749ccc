"""The two recurrences over T that mLSTM needs beside its kernels, in XLA: a few small kernels each, whatever T."""
import jax.numpy as jnp

from pallas_kernels.gpu.gates import running_sum
from pallas_kernels.steps import NO_STABILISER

# Positions combined pair by pair; longer sequences are cut in blocks, whose ends make a shorter sequence.
BLOCK = 64
SUMS_BLOCK = 32


def _blocks(x, fill, size):
    """[..., T] -> [..., N, size], padded with `fill`."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, pad, constant_values=fill).reshape(*x.shape[:-1], -1, size)


def running_max(log_decay, x, init, starts=None):
    """m_t = max(log_decay_t + m_{t-1}, x_t) along the last axis, up to rounding in sums of 64 log decays.

    Args: log_decay, x [..., T]; init [...]; starts bool [..., T], where m_t = x_t, or None.
    """
    size = x.shape[-1]
    sums, x = running_sum(_blocks(log_decay, 0.0, BLOCK)), _blocks(x, NO_STABILISER, BLOCK)
    place = jnp.arange(BLOCK)
    keep = place[:, None] >= place
    if starts is not None:
        segment = running_sum(_blocks(starts.astype(jnp.float32), 0.0, BLOCK))
        keep = keep & (segment[..., :, None] == segment[..., None, :])
    m = jnp.max(jnp.where(keep, sums[..., :, None] - sums[..., None, :] + x[..., None, :], NO_STABILISER), axis=-1)
    entering = init[..., None]
    if m.shape[-2] > 1:
        cut = None if starts is None else segment[..., -1] > 0
        ends = running_max(sums[..., -1], m[..., -1], init, cut)
        entering = jnp.concatenate([entering, ends[..., :-1]], axis=-1)
    carried = sums + entering[..., None]
    if starts is not None:
        carried = jnp.where(segment == 0, carried, NO_STABILISER)
    return jnp.maximum(m, carried).reshape(*x.shape[:-2], -1)[..., :size]


def decayed_sums(total, x, init=None):
    """y_0 = init, y_{n+1} = 2^total_n y_n + x_n: total [B, H, N], x [B, H, N, K], init [B, H, K] -> [B, H, N + 1, K].
    """
    size = x.shape[2]
    if init is None:
        init = jnp.zeros_like(x[:, :, 0])
    if size > SUMS_BLOCK:
        total = _blocks(total, 0.0, SUMS_BLOCK)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -size % (SUMS_BLOCK)), (0, 0))).reshape(*total.shape, x.shape[-1])
        within = _from_zero(total, x)
        entering = decayed_sums(total.sum(-1), within[..., -1, :], init)
        passed = jnp.exp2(jnp.pad(running_sum(total), ((0, 0),) * 3 + ((1, 0),)))
        y = (within + passed[..., None] * entering[:, :, :-1, None])[..., :-1, :].reshape(*x.shape[:2], -1, x.shape[-1])
        return jnp.concatenate([y, entering[:, :, -1:]], axis=2)[:, :, :size + 1]
    total = jnp.pad(total, ((0, 0), (0, 0), (1, 0)))
    return _from_zero(total, jnp.concatenate([init[:, :, None], x], axis=2))[:, :, 1:]


def _from_zero(total, x):
    """As `decayed_sums` from y_0 = 0: total [..., N], x [..., N, K] -> [..., N + 1, K]."""
    size = total.shape[-1]
    after, before, between = jnp.indices((size + 1, size, size))
    inside = ((before < between) & (between < after)).astype(jnp.float32)  # sums of decays, never differences of sums
    passed = jnp.einsum("...m,abm->...ab", total, inside, precision="highest")
    weights = jnp.where(after[..., 0] > before[..., 0], jnp.exp2(passed), 0.0)
    return jnp.einsum("...ab,...bk->...ak", weights, x, precision="highest")
