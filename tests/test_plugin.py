"""The README's example of a mixer from outside the package works, and passes the conformance suite."""

import re
import sys
from pathlib import Path

import pytest

from efficient_lm.config import from_dict
from efficient_lm.counting import count_params
from efficient_lm.metrics import code_hash
from efficient_lm.mixers import MIXERS
from tests.conformance import test_mixers

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture
def ema(tmp_path, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "@MIXERS" in block)
    (tmp_path / "ema.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    MIXERS.pop("ema", None)
    sys.modules.pop("ema", None)


def test_the_hash_of_the_sources_covers_plugins(ema, tmp_path):
    from_dict({"model": {"plugins": "ema"}})
    before = code_hash(("ema",))
    assert before != code_hash()
    with open(tmp_path / "ema.py", "a") as file:
        file.write("# another version\n")
    assert code_hash(("ema",)) not in (before, code_hash())


def test_readme_mixer_passes_the_conformance_suite(ema, monkeypatch):
    config = from_dict({"model": {"plugins": "ema", "pattern": "ema,attention", "d_model": 32}})
    assert count_params(config)["total"] > 0
    monkeypatch.setitem(test_mixers.CASES, "ema", ("ema", {}))
    checks = [check for name, check in vars(test_mixers).items() if name.startswith("test_")]
    assert len(checks) >= 8
    for check in checks:
        check("ema")
