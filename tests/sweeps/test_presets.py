"""Every preset that a file of configs/sweeps describes can be planned."""

import importlib
import re
from pathlib import Path

import pytest

from sweeps.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.py") if path.stem != "__init__")
NEEDS_RUNS = {"prosparse"}  # of a sweep before it; test_activation_sweeps.py


def presets(name):
    """'' (the default) and those that the docstring names as ':preset'."""
    text = importlib.import_module(f"configs.sweeps.{name}").__doc__
    return ["", *re.findall(r"(?:^|`)(:[a-z][\w-]*)", text, re.MULTILINE)]


@pytest.mark.parametrize(
    "spec", [name + preset for name in FILES if name not in NEEDS_RUNS for preset in presets(name)]
)
def test_every_preset_plans(spec):
    name, _, preset = spec.partition(":")
    plan = make_plan(f"configs/sweeps/{name}.py" + (f":{preset}" if preset else ""))
    assert plan.cells and plan.name == name
