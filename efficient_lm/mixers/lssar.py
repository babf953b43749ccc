"""Length-scaled softplus attention with re-weighting (LSSAR, 2501.13428), an option of `attention`.

q and k have unit norm, s_ij = log D log n_i q_i . k_j with n_i visible keys in row i, A_ij = softplus(s_ij) divided by
its sum over j. Then the re-weighting relu(n_i A_ij - 1)^power, normalised again, without the 1 in rows of up to 3 keys;
a row in which no weight exceeds the mean keeps A. power 0 leaves out the re-weighting (LSSA).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.mixers.attention import Attention, AttentionConfig
from efficient_lm.mixers.base import MIXERS
from efficient_lm.schema import ConfigError, setting
from pallas_kernels.attention import MASKED
from pallas_kernels.steps import l2_normalise


@dataclass(frozen=True)
class LSSARConfig(AttentionConfig):
    qk_norm: bool = setting(False, "RMSNorm of queries and keys per head, before they get unit norm")
    power: int = setting(15, "exponent of the re-weighting; 0 = none", low=0)


@MIXERS.register("lssar")
class LSSAR(Attention):
    Config = LSSARConfig
    variants = {"plain-gqa": {"power": 0, "n_kv_heads": 2, "position": "none"}, "window": {"power": 3, "window": 9}}
    giving = {}

    def __init__(self, cfg, model, make):
        super().__init__(cfg, model, make)
        self.scale = 1.0

    def _queries(self, x, positions):
        return l2_normalise(super()._queries(x, positions))

    def _keys_values(self, x, ctx):
        k, v = super()._keys_values(x, ctx)
        return l2_normalise(k), v

    def _row_weights(self):
        return lambda scores: softplus_weights(scores, self.sizes[2], self.cfg.power)

    @staticmethod
    def whole_rows(cfg):
        return True

    @classmethod
    def check(cls, cfg, model, path):
        super().check(cfg, model, path)
        if cfg.weights != "softmax" or cfg.forget_gate:
            raise ConfigError(f"{path}: weights and forget_gate of 'attention' have no meaning here; leave them out")


def softplus_weights(scores, width: int, power: int):
    """Masked q.k [..., S] of unit vectors with `width` channels -> weights that sum to 1."""
    visible = scores > MASKED / 2
    n = jnp.sum(visible, -1, keepdims=True)
    a = jax.nn.softplus(jnp.log(width) * jnp.log(n) * jnp.where(visible, scores, 0.0))
    a = jnp.where(visible, a, 0.0)
    a = a / jnp.sum(a, -1, keepdims=True)
    if power == 0:
        return a
    excess = jax.nn.relu(n * a - (n > 3))
    # Divided by the largest, which cancels, since powers of small numbers would vanish.
    top = jax.lax.stop_gradient(jnp.max(excess, -1, keepdims=True))
    some = top > 0
    r = jnp.where(some, (excess / jnp.where(some, top, 1.0)) ** power, a)
    return r / jnp.sum(r, -1, keepdims=True)
