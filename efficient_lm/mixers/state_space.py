"""The time-invariant diagonal recurrence with several states per channel that S4D and MEGA's EMA share."""

import jax
import jax.numpy as jnp

from efficient_lm.mixers.parts import from_chunks, in_chunks
from pallas_kernels import api


def states_readout(x, write, log_decay, read, *, segment_ids=None, chunk_size=32, implementation=None):
    """y_t = sum_n read_n h_tn of h_tn = exp(log_decay_n) h_(t-1)n + write_n x_t, in every channel.

    x [B, T, D] real; write, log_decay, read [D, N], real or complex -> y [B, T, D], the last h [B, D N]. The states of
    all tokens would be N times the activations: tokens are taken in chunks, recomputed in the backward pass.
    """
    batch, length, _ = x.shape
    chunk = min(chunk_size, length)
    pad = -length % chunk  # in front, where zeros leave the state at zero
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    x, ids = jnp.pad(x, ((0, 0), (pad, 0), (0, 0))), jnp.pad(ids, ((0, 0), (pad, 0)), mode="edge")

    @jax.checkpoint
    def one(carry, inputs):
        state, last = carry
        x, ids = inputs
        h, state = api.diagonal_scan(
            states_input(x, write),
            log_decay.reshape(-1),
            initial_state=jnp.where((ids[:, 0] == last)[:, None], state, 0),
            segment_ids=None if segment_ids is None else ids,
            output_final_state=True,
            implementation=implementation,
        )
        return (state, ids[:, -1]), states_output(h, read)

    start = jnp.zeros((batch, write.size), jnp.result_type(x, write)), ids[:, 0]
    (state, _), y = jax.lax.scan(one, start, (in_chunks(x, chunk), in_chunks(ids, chunk)))
    return from_chunks(y, pad + length)[:, pad:], state


def states_input(x, write):
    """write_n x: x [..., D], write [D, N] -> [..., D N]."""
    return (x[..., None] * write).reshape(*x.shape[:-1], -1)


def states_output(h, read):
    """sum_n read_n h_n: h [..., D N], read [D, N] -> [..., D]."""
    return jnp.sum(h.reshape(*h.shape[:-1], *read.shape) * read, -1)
