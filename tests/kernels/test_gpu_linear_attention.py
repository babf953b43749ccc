"""Hopper kernels of scalar-decay linear attention: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.gpu import linear_attention as gpu
from pallas_kernels.gpu import pieces
from pallas_kernels.xla import linear_attention as xla
from tests.kernels.gpu_checks import as_written, assert_causal_and_repeatable, both_ways, kernels_lowered, on_gpu


def make(b, t, h, k, v, decay, *, initial=False, gate=-3.0, seed=0):
    """(q, k, v, log_decay, initial_state), a cotangent of o and one of the final state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    shape = {"none": None, "head": (h,), "token": (b, t, h)}[decay]
    log_decay = None if shape is None else jnp.asarray(-np.exp(rng.normal(size=shape) + gate), jnp.float32)
    state = jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32) if initial else None
    arrays = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), log_decay, state
    return arrays, normal(b, t, h, v), jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32)


def errors(arrays, do, dstate, *, exact=reference.linear_attention, **options):
    """Relative errors of o, the final state and every gradient, that of the gates also relative to its terms."""
    ours, want = both_ways(gpu.linear_attention, exact, arrays, (do, dstate), scale=0.1, **options)
    sizes = [np.linalg.norm(b) for b in want]
    if arrays[3] is not None:  # gate gradients are differences of q.dq and k.dk, and cannot be exact far below those
        terms = np.sum(np.asarray(arrays[0], np.float64) * want[2], axis=-1)
        sizes[5] += 0.02 * np.linalg.norm(np.sum(terms, axis=(0, 1)) if arrays[3].ndim == 1 else terms)
    return [np.linalg.norm(a - b) / size for a, b, size in zip(ours, want, sizes, strict=True)]


@as_written
@pytest.mark.quick
@pytest.mark.parametrize("decay", ["none", "token"])
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_forward_and_backward_lower_for_hopper(k, v, decay):
    arrays, *cotangents = make(2, 600, 3, k, v, decay)
    assert kernels_lowered(gpu.linear_attention, arrays, tuple(cotangents), scale=1.0) >= 3


@as_written
@pytest.mark.parametrize("case", ["pieces", "segments", "plain", "head size 256"])
def test_interpreted_matches_the_reference(case, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_CHUNKS", 1)  # several pieces and saved states at a tiny T
    monkeypatch.setattr(gpu, "SAVE_EVERY", 2)
    interpret = plgpu.InterpretGPUParams()
    if case == "pieces":
        got = errors(*make(1, 320, 1, 64, 64, "token", initial=True), interpret=interpret)
    elif case == "segments":
        ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 40, axis=1).reshape(1, 200), jnp.int32)
        got = errors(*make(1, 200, 1, 64, 64, "token"), segment_ids=ids, interpret=interpret)
    elif case == "plain":
        got = errors(*make(1, 128, 1, 128, 128, "none"), interpret=interpret)
    else:
        got = errors(*make(1, 64, 1, 256, 256, "token", initial=True), interpret=interpret)
    assert max(got) < 0.01, got


@as_written
def test_interpreted_has_no_race(capsys):
    got = errors(*make(1, 192, 1, 64, 64, "token"), interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.015 and "RACE" not in capsys.readouterr().out  # 0.015: bf16 states reach the gates' gradient


@pytest.mark.quick
@pytest.mark.parametrize("change, word", [
    (dict(dtype=jnp.float32), "bfloat16"), (dict(k=96), "key head size"), (dict(v=192), "value head size"),
    (dict(chunk_size=32), "chunk_size")])
def test_unsupported_calls_get_a_reason(change, word):
    k, v, dtype = change.get("k", 64), change.get("v", 64), change.get("dtype", jnp.bfloat16)
    struct = lambda size: jax.ShapeDtypeStruct((1, 64, 2, size), dtype)  # noqa: E731
    reason = gpu.supports(struct(k), struct(k), struct(v), None, chunk_size=change.get("chunk_size"))
    assert word in reason
    assert gpu.supports(*[jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)] * 3, scale=1.0) is None


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("k, v", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("t", [1, 63, 130, 2048])
def test_gpu_matches_the_reference(t, k, v, decay):
    got = errors(*make(2, t, 3, k, v, decay, initial=True))
    gates = got.pop(5) if decay != "none" else 0.0
    # A gradient per head is a sum of T rounded terms that mostly cancel on random data.
    assert max(got) < 0.006 and gates < (0.1 if decay == "head" else 0.015), (got, gates)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(256, 256), (256, 64), (128, 256)])
def test_gpu_head_size_256(k, v):
    got = errors(*make(2, 300, 2, k, v, "token", initial=True))
    assert max(got) < 0.015, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [-20.0, -8.0, -1.0, 2.0, 4.0])
def test_gpu_gate_extremes(gate):
    got = errors(*make(2, 1024, 2, 128, 128, "token", initial=True, gate=gate))
    assert max(got) < 0.02, got


@on_gpu
@pytest.mark.gpu
def test_gpu_segments_equal_separate_calls_and_reference():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    got = errors(*make(2, 1000, 3, 128, 128, "token", initial=True), segment_ids=ids)
    assert max(got) < 0.02, got


@on_gpu
@pytest.mark.gpu
def test_gpu_very_long_sequence():
    by_chunks = functools.partial(xla.linear_attention, output_final_state=True)  # the token loop takes half a minute
    assert max(errors(*make(1, 65536, 1, 64, 64, "token"), exact=by_chunks)) < 0.015


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    arrays, *cotangents = make(1, 1024, 2, 128, 128, "token")
    assert_causal_and_repeatable(gpu.linear_attention, arrays, tuple(cotangents), scale=0.1)
