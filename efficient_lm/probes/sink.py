"""Attention sinks: how much attention the first token of a document gets (2309.17453, 2410.10781)."""

import jax
import jax.numpy as jnp

from efficient_lm.probes.base import PROBES
from efficient_lm.probes.parts import mean

SINK = 0.3  # mean weight from which a head counts as one with a sink (2410.10781)


@PROBES.register("sink")
def sink(layer):
    """Weights on the first token, of queries after it; a row of weights need not sum to 1 (off-by-one, sigmoid, ...).

    sink_mass   mean over tokens and heads
    sink_top    of the head with most
    sink_heads  share of heads with more than 0.3
    """
    if layer.attention is None:
        return {}
    first = (layer.positions == 0) & layer.counted
    on_first = jnp.sum(layer.attention * first[:, None, None], -1)
    later = (layer.positions > 0) & layer.counted
    heads = jax.vmap(mean, (1, None))(on_first, later)
    return {"sink_mass": heads.mean(), "sink_top": heads.max(), "sink_heads": (heads > SINK).mean()}
