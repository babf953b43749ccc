"""Sequence mixers: one file each, registered by importing this package."""

from efficient_lm.mixers import attention, gla  # noqa: F401  (registers)
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig

__all__ = ["MIXERS", "Mixer", "MixerConfig"]
