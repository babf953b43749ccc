"""Registry of scaling laws: one file per law; importing this package imports them all."""

import importlib
import pkgutil

from analysis.laws.base import Constants, Law, Parameter, Synthetic, Variable, all_laws, get_law, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Constants", "Law", "Parameter", "Synthetic", "Variable", "all_laws", "get_law", "register"]
