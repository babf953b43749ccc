"""Decoding caches [B, slots, ...]: rings, in which token t takes slot t % slots from the token that left the window."""

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


def filled(cache, position):
    """[B, slots] bool: slots that hold a token once those at `position` [B] are written."""
    return jnp.arange(cache.shape[1]) <= position[:, None]
