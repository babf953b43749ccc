"""Decoding caches: rings, in which token t takes slot t % slots from the token that left the window.

Caches are [B, slots, ...]. Those of keys and values are [B, G, slots, D] for G heads: a product over the slots reads
them as they lie, while [B, slots, G, D] would be transposed for every token.
"""

import jax.numpy as jnp


def fill(x, slots: int, dtype=None):
    """x [B, n, ...] of tokens 0 .. n-1 -> their cache."""
    x, length = x.astype(dtype or x.dtype), x.shape[1]
    if length <= slots:
        return jnp.pad(x, ((0, 0), (0, slots - length), *((0, 0),) * (x.ndim - 2)))
    return jnp.roll(x[:, -slots:], length % slots, axis=1)


def write(cache, x, position):
    """The cache with x [B, ...] of the tokens at `position` [B]."""
    return cache.at[jnp.arange(len(position)), position % cache.shape[1]].set(x.astype(cache.dtype))


def fill_heads(x, slots: int, dtype):
    """x [B, n, G, D] of tokens 0 .. n-1 -> their cache [B, G, slots, D]."""
    return fill(x, slots, dtype).swapaxes(1, 2)


def write_heads(cache, x, position):
    """The cache [B, G, slots, D] with x [B, G, D] of the tokens at `position` [B]."""
    return cache.at[jnp.arange(len(position)), :, position % cache.shape[2]].set(x.astype(cache.dtype))


def read_heads(cache, dtype):
    """A cache [B, G, slots, D] as `api.attention_step` takes it, [B, slots, G, D]."""
    return cache.swapaxes(1, 2).astype(dtype)


def filled(slots: int, position):
    """[B, slots] bool: slots that hold a token once those at `position` [B] are written."""
    return jnp.arange(slots) <= position[:, None]
