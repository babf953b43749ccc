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
from pallas_kernels.gpu import normalised_linear_attention as normalised
from pallas_kernels.steps import segment_starts
from tests.kernels.gpu_checks import (
    as_written,
    assert_causal_and_repeatable,
    both_ways,
    kernels_lowered,
    on_gpu,
    relative_errors,
    wide,
)

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


def normalised_errors(b, t, h, decay, **options):
    """Relative errors of normalised linear attention with q, k >= 0 and one decay per head, per token or none."""
    (q, k, v, gate, *_), _ = make(b, t, h, 64, 128)
    rng = np.random.default_rng(1)
    state, dstate = (jnp.asarray(np.abs(rng.normal(size=(b, h, 64, 129))), jnp.float32) for _ in range(2))
    log_decay = {"none": None, "head": -jnp.exp(gate[0, 0] - 3), "token": -jnp.exp(gate - 3)}[decay]
    token_loop = functools.partial(reference.linear_attention, normalise=True)
    return relative_errors(normalised.normalised_linear_attention, token_loop, (abs(q), abs(k), v, log_decay, state),
                           (v[::-1], dstate), scale=0.1, **options)


def read_through_normaliser(arrays, do, o, scale, segment_ids=None):
    """Norm of the gradients of q that come through |n.q|, with do.o counted as the root of its terms' squares.

    Where n.q is small they are a large vector n times a sum of V products, each of which has o's rounding in bf16: one
    such token may outweigh all others, and its gradient is as uncertain as these products are.
    """
    q, k, _, input_gate, forget_gate, state = wide(arrays)
    empty = np.zeros_like(q[:, 0]), np.full_like(input_gate[:, 0], -1e30)
    n, m = empty if state is None else state[1:]
    log_forget, do_o, squares = -np.logaddexp(0, -forget_gate), np.linalg.norm(wide(do) * o, axis=-1), 0.0
    starts = np.zeros(q.shape[:2], bool) if segment_ids is None else np.asarray(segment_starts(segment_ids))
    for t in range(q.shape[1]):
        n, m = np.where(starts[:, t, None, None], empty[0], n), np.where(starts[:, t, None], empty[1], m)
        kept, m = log_forget[:, t] + m, np.maximum(log_forget[:, t] + m, input_gate[:, t])
        n = np.exp(kept - m)[..., None] * n + np.exp(input_gate[:, t] - m)[..., None] * k[:, t]
        normaliser = scale * np.abs(np.sum(n * q[:, t], axis=-1))
        given = scale * do_o[:, t] * np.linalg.norm(n, axis=-1) / normaliser
        squares += np.sum(np.where(normaliser > np.exp(-m), given, 0.0) ** 2)
    return np.sqrt(squares)


def errors(arrays, cotangents, *, shift=0.0, segment_ids=None, **options):
    """{name: ‖ours - reference‖ / ‖reference‖}, that of q also relative to what it gets through the normaliser."""
    operators = comparable(gpu.mlstm, shift), comparable(reference.mlstm, shift)
    ours, want = both_ways(*operators, arrays, cotangents, scale=0.1, segment_ids=segment_ids, **options)
    sizes = dict(zip(NAMES, map(np.linalg.norm, want), strict=False))
    sizes["dq"] = np.hypot(sizes["dq"], read_through_normaliser(arrays, cotangents[0], want[0], 0.1, segment_ids))
    if arrays[5] is not None:  # <C0, dC0> + <n0, dn0>, one number per head and as good as zero now and then
        sizes["dm0"] = np.sqrt(sizes["dm0"] ** 2 + np.sum((np.asarray(arrays[5][0], np.float64) * want[8]) ** 2))
    return {name: np.linalg.norm(a - b) / size for (name, size), a, b in zip(sizes.items(), ours, want, strict=True)}


@as_written
@pytest.mark.quick
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_forward_and_backward_lower_for_hopper(k, v):
    assert kernels_lowered(comparable(gpu.mlstm), *make(2, 600, 3, k, v), scale=1.0) >= 3


@as_written
@pytest.mark.parametrize("case", ["pieces", "segments", "head size 256"])
def test_interpreted_matches_the_reference(case, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_CHUNKS", 1)  # several pieces and saved states at a tiny T
    monkeypatch.setattr(scalar, "SAVE_EVERY", 2)
    monkeypatch.setattr(mlstm_scans, "BLOCK", 4)
    monkeypatch.setattr(mlstm_scans, "SUMS_BLOCK", 2)
    interpret = plgpu.InterpretGPUParams()
    if case == "pieces":
        got = errors(*make(1, 310, 1, 64, 64, initial=True), interpret=interpret)
    elif case == "head size 256":
        got = errors(*make(1, 64, 1, 64, 256, initial=True), interpret=interpret)
    else:
        ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 40, axis=1).reshape(1, 200), jnp.int32)
        got = errors(*make(1, 200, 1, 64, 64), segment_ids=ids, interpret=interpret)
    assert max(got.values()) < 0.01, got


@as_written
def test_interpreted_normalised_attention_matches_the_reference():
    assert max(normalised_errors(1, 150, 1, "token", interpret=plgpu.InterpretGPUParams())) < 0.01


@as_written
def test_interpreted_has_no_race(capsys):
    got = errors(*make(1, 192, 1, 64, 64), interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got.values()) < 0.01 and "RACE" not in capsys.readouterr().out


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256)])
@pytest.mark.parametrize("t", [1, 63, 130, 2048])
def test_gpu_matches_the_reference(t, k, v):
    got = errors(*make(2, t, 3, k, v, initial=True))
    # n.q may be small beside its terms, and then makes a few tokens' gates weigh more than all others
    assert got.pop("df") < 0.015 and max(got.values()) < 0.006, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("t", [1, 130, 2048])
def test_gpu_normalised_attention_matches_the_reference(t, decay):
    got = normalised_errors(2, t, 3, decay)
    gates = got.pop(5) if decay != "none" else 0.0
    assert max(got) < 0.006 and gates < (0.1 if decay == "head" else 0.015), (got, gates)  # as without a normaliser


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
