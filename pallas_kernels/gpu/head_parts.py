"""Heads larger than a kernel holds, as several smaller heads."""
import jax.numpy as jnp


class HeadParts:
    """Every head as `keys` x `values` heads of a part of its key channels and a part of its value channels.

    Linear attention is a sum over key channels, so the outputs of key parts add up. Value channels never meet, so the
    outputs of value parts stand side by side; that holds for a delta rule too, whose keys cannot be parted.
    """

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def of_keys(self, x):
        """[B, T, H, K] -> [B, T, H * keys * values, K / keys]: queries, keys or decays per channel."""
        b, t, h, size = x.shape
        x = x.reshape(b, t, h, self.keys, 1, size // self.keys)
        return jnp.broadcast_to(x, (b, t, h, self.keys, self.values, size // self.keys)).reshape(b, t, -1, x.shape[-1])

    def of_values(self, x):
        """[B, T, H, V] -> [B, T, H * keys * values, V / values]."""
        b, t, h, size = x.shape
        x = x.reshape(b, t, h, 1, self.values, size // self.values)
        return jnp.broadcast_to(x, (b, t, h, self.keys, *x.shape[-2:])).reshape(b, t, -1, x.shape[-1])

    def of_heads(self, x):
        """[H] or [B, T, H] -> the same with H * keys * values heads; None stays."""
        return None if x is None else jnp.repeat(x, self.keys * self.values, axis=-1)

    def of_state(self, x):
        """[B, H, K, V] -> [B, H * keys * values, K / keys, V / values]; None stays."""
        if x is None:
            return None
        b, h, k, v = x.shape
        x = x.reshape(b, h, self.keys, k // self.keys, self.values, v // self.values)
        return x.swapaxes(3, 4).reshape(b, -1, k // self.keys, v // self.values)

    def join(self, o, state):
        """Output [B, T, H, V] and state [B, H, K, V] from those of the parts."""
        b, t, h, v = o.shape
        h //= self.keys * self.values
        parts = o.reshape(b, t, h, self.keys, self.values * v)
        o = parts[:, :, :, 0] if self.keys == 1 else jnp.sum(parts, axis=3, dtype=jnp.float32).astype(o.dtype)
        state = state.reshape(b, h, self.keys, self.values, *state.shape[2:]).swapaxes(3, 4)
        return o, state.reshape(b, h, self.keys * state.shape[3], -1)
