"""Tuned tables: what ships is usable, what is looked up is used, and the command line says what it needs."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tune, tuned
from pallas_kernels.gpu import diagonal_scan

pytestmark = pytest.mark.quick
FLOAT = {2: jnp.bfloat16, 4: jnp.float32}


@pytest.mark.parametrize("path", sorted(tuned.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_fit_the_chip(path):
    for call, config in json.loads(path.read_text())["diagonal_scan"].items():
        config = diagonal_scan.Config(**config)
        direction, width, _ = call.split(", ")
        dtype = FLOAT[int(width.split()[0])]
        inputs, outputs = (2, 1) if direction == "forward" else (3, 2)
        assert diagonal_scan.shared_memory(config, [dtype] * inputs, [dtype] * outputs) <= diagonal_scan.MEMORY
        assert config.channels in (16, 32, 64, 128) and config.piece % 2 == 1


def test_a_table_decides_and_the_default_follows_from_the_shape(monkeypatch):
    shape, dtypes = (8, 2048, 2048), ([jnp.bfloat16] * 2, [jnp.bfloat16])
    call = diagonal_scan.call_class("forward", shape, dtypes[0])
    default = diagonal_scan._configure("forward", shape, *dtypes)
    assert default == diagonal_scan.default_config(shape, *dtypes)  # no table for a CPU
    known = diagonal_scan.Config(128, 3, 2, 2)
    monkeypatch.setattr(tuned, "table", lambda chip: {"diagonal_scan": {call: known._asdict()}})
    assert diagonal_scan._configure("forward", shape, *dtypes) == known != default
    other = (8, 2048, 512)
    assert diagonal_scan._configure("forward", other, *dtypes) == diagonal_scan.default_config(other, *dtypes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1, 7, 8), (8, 2048, 2048), (1, 16384, 2048), (64, 512, 4096)])
def test_defaults_and_candidates_fit(shape, dtype):
    for inputs, outputs in (([dtype] * 2, [dtype]), ([dtype] * 3, [dtype] * 2)):
        configs = [diagonal_scan.default_config(shape, inputs, outputs), *tune.diagonal_candidates(inputs, outputs)]
        assert len(configs) > 10
        assert all(diagonal_scan.shared_memory(c, inputs, outputs) <= diagonal_scan.MEMORY for c in configs)
        assert all(diagonal_scan.rows(c) <= diagonal_scan.MAX_ROWS for c in configs)


@pytest.mark.parametrize("flags, message", [
    (["--shapes", "1,2"], "three positive numbers B,T,D"), (["--shapes", "1,x,3"], "whole numbers"),
    (["--op", "gla"], "invalid choice"), pytest.param([], "needs a Hopper GPU, found cpu", marks=pytest.mark.skipif(
        jax.default_backend() == "gpu", reason="there is a GPU"))])  # fmt: skip
def test_bad_flags_give_one_line(flags, message, capsys):
    assert tune.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
