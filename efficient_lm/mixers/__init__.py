"""Sequence mixers: one file each, registered by importing this package."""

import importlib
import pkgutil

from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig, model_of

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MIXERS", "Mixer", "MixerConfig", "model_of"]
