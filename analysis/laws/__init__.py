"""Registry of scaling laws: one file per law; importing this package imports them all."""

import importlib
import pkgutil

from analysis.laws.base import PF_DAY, Constants, Law, Parameter, Synthetic, Variable, all_laws, get_law, register

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PF_DAY", "Constants", "Law", "Parameter", "Synthetic", "Variable", "all_laws", "get_law", "register"]
