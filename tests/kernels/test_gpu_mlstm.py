"""Hopper kernels of mLSTM with exponential input gates: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.gpu import linear_attention as scalar
from pallas_kernels.gpu import mlstm as gpu
from pallas_kernels.gpu import mlstm_scans, pieces
from tests.kernels.gpu_checks import as_written, assert_causal_and_repeatable, both_ways, kernels_lowered, on_gpu

NAMES = ("o", "C", "n", "dq", "dk", "dv", "di", "df", "dC0", "dn0", "dm0")


def make(b, t, h, k, v, *, initial=False, gates=(0.0, 3.0), spread=1.0, seed=0):
    """(q, k, v, input gate, forget gate, initial state) and cotangents of o, C, n; `gates`: means of input, forget."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    wide = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    input_gate, forget_gate = (spread * wide(b, t, h) + mean for mean in gates)
    state = (wide(b, h, k, v), wide(b, h, k), wide(b, h) + gates[0]) if initial else None
    arrays = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), input_gate, forget_gate, state
    return arrays, (normal(b, t, h, v), wide(b, h, k, v), wide(b, h, k))


@functools.cache
def comparable(op, shift=0.0):
    """`op` with final states in a scale that does not depend on the stabiliser, e^-shift."""
    def run(*gated, **options):
        o, (c, n, m) = op(*gated, **options)
        size = jnp.exp(m - shift)
        return o, c * size[..., None, None], n * size[..., None]

    return run


def errors(arrays, cotangents, *, shift=0.0, **options):
    """{name: ‖ours - reference‖ / ‖reference‖}."""
    operators = comparable(gpu.mlstm, shift), comparable(reference.mlstm, shift)
    ours, want = both_ways(*operators, arrays, cotangents, scale=0.1, **options)
    sizes = dict(zip(NAMES, map(np.linalg.norm, want), strict=False))
    if arrays[5] is not None:  # <C0, dC0> + <n0, dn0>, one number per head and as good as zero now and then
        sizes["dm0"] = np.sqrt(sizes["dm0"] ** 2 + np.sum((np.asarray(arrays[5][0], np.float64) * want[8]) ** 2))
    return {name: np.linalg.norm(a - b) / size for (name, size), a, b in zip(sizes.items(), ours, want, strict=True)}


@as_written
@pytest.mark.quick
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_forward_and_backward_lower_for_hopper(k, v):
    assert kernels_lowered(comparable(gpu.mlstm), *make(2, 600, 3, k, v), scale=1.0) >= 3


@as_written
@pytest.mark.parametrize("case", ["pieces", "segments"])
def test_interpreted_matches_the_reference(case, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_CHUNKS", 1)  # several pieces and saved states at a tiny T
    monkeypatch.setattr(scalar, "SAVE_EVERY", 2)
    monkeypatch.setattr(mlstm_scans, "BLOCK", 4)
    interpret = plgpu.InterpretGPUParams()
    if case == "pieces":
        got = errors(*make(1, 310, 1, 64, 64, initial=True), interpret=interpret)
    else:
        ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 40, axis=1).reshape(1, 200), jnp.int32)
        got = errors(*make(1, 200, 1, 64, 64), segment_ids=ids, interpret=interpret)
    assert max(got.values()) < 0.01, got


@as_written
def test_interpreted_has_no_race(capsys):
    got = errors(*make(1, 192, 1, 64, 64), interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got.values()) < 0.01 and "RACE" not in capsys.readouterr().out


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("t", [1, 63, 130, 2048])
def test_gpu_matches_the_reference(t, k, v):
    got = errors(*make(2, t, 3, k, v, initial=True))
    # n.q may be small beside its terms, and then makes a few tokens' gates weigh more than all others
    assert got.pop("df") < 0.015 and max(got.values()) < 0.006, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gates", [(-60.0, 3.0), (-10.0, 3.0), (10.0, 3.0), (300.0, 3.0), (0.0, -8.0), (0.0, 20.0)])
def test_gpu_gate_extremes(gates):
    got = errors(*make(2, 600, 2, 128, 128, initial=True, gates=gates), shift=gates[0])
    assert max(got.values()) < 0.02, got


@on_gpu
@pytest.mark.gpu
def test_gpu_segments():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    got = errors(*make(2, 1000, 3, 128, 128, initial=True), segment_ids=ids)
    assert max(got.values()) < 0.02, got


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    assert_causal_and_repeatable(comparable(gpu.mlstm), *make(1, 1024, 2, 128, 128), scale=0.1)
