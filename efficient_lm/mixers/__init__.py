"""Sequence mixers: one file each, registered by importing this package."""

from efficient_lm.mixers import (  # noqa: F401  (registers)
    attention,
    deltanet,
    gated_deltanet,
    gla,
    hgrn2,
    kda,
    lightning,
    linear_attention,
    mamba,
    mamba2,
    mlstm,
    retnet,
    rg_lru,
    rwkv7,
    simple_gla,
)
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig

__all__ = ["MIXERS", "Mixer", "MixerConfig"]
