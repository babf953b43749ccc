"""Scalar gates of the GPU kernels: log2 decays of tokens and chunks."""
import jax
import jax.numpy as jnp

from pallas_kernels.gpu.tiles import CHUNK

LOG2E = 1.4426950408889634
FORGET = -160.0  # log2 decay that empties a float32 state; a finite stand-in for -inf, so that differences stay exact


def token_decays(log_decay, segment_ids, b_size, t_size, heads):
    """float32 log2 decay of every token [B, T, H], resets of `segment_ids` included; None where nothing decays."""
    if log_decay is None and segment_ids is None:
        return None
    decay = jnp.zeros((heads,), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    decay = jnp.maximum(jnp.broadcast_to(decay * LOG2E, (b_size, t_size, heads)), FORGET)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        decay = jnp.where(new[..., None], FORGET, decay)
    return decay


def resets(log_decay, segment_ids):
    """Log decays per channel in bf16 or float32, -inf where a segment begins."""
    if log_decay.dtype != jnp.bfloat16:
        log_decay = log_decay.astype(jnp.float32)
    if segment_ids is None:
        return log_decay
    new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(new[..., None, None], -jnp.inf, log_decay)


def pad_tokens(x):
    """[B, T, ...] with zero tokens added up to a whole number of chunks."""
    pad = -x.shape[1] % CHUNK
    return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) if pad else x


def by_chunk(x):
    """[B, T, H] -> [B, H, N, 64]."""
    b_size, t_size, heads = x.shape
    return x.transpose(0, 2, 1).reshape(b_size, heads, t_size // CHUNK, CHUNK)


def rounded(x):
    """float32 x in the digits of bf16. XLA drops a cast there and back, since it may keep more precision than asked."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def running_sum(x, reverse=False):
    """Inclusive sum along the last axis as a product with a triangle: one kernel where a scan would be many."""
    size = x.shape[-1]
    ones = jnp.tril(jnp.ones((size, size), jnp.float32)) if reverse else jnp.triu(jnp.ones((size, size), jnp.float32))
    return jnp.matmul(x, ones, precision="highest")


def chunk_decays(decay):
    """[B, T, H] log2 decays -> cumulative inside each chunk [B, H, N, 64] and total of each chunk [B, H, N]."""
    if decay is None:
        return None, None
    c = running_sum(by_chunk(decay))
    return c, c[..., -1]
