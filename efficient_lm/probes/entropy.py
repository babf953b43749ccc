"""Entropy of attention, whose collapse goes with unstable training (2303.06296)."""

import jax
import jax.numpy as jnp

from efficient_lm.probes.base import PROBES
from efficient_lm.probes.parts import mean


@PROBES.register("entropy")
def entropy(layer):
    """Nats of a query's weights, scaled to sum 1 where they do not; mean over queries after the first token.

    attention_entropy      mean over heads
    attention_entropy_low  of the head with least
    """
    if layer.attention is None:
        return {}
    total = jnp.sum(layer.attention, -1, keepdims=True)
    weights = layer.attention / jnp.where(total > 0, total, 1.0)
    nats = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), -1)
    later = (layer.positions > 0) & layer.counted
    heads = jax.vmap(mean, (1, None))(nats, later)
    return {"attention_entropy": heads.mean(), "attention_entropy_low": heads.min()}
