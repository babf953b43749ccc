"""Hopper kernels of linear attention with a decay per channel: lowered, interpreted on CPU, run on a GPU if any."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.gpu import channel_pass, gates, pieces
from pallas_kernels.gpu import linear_attention as gpu
from tests.kernels.gpu_checks import (
    as_written,
    assert_causal_and_repeatable,
    kernels_lowered,
    on_gpu,
    relative_errors,
)


def make(b, t, h, k, v, *, gate_dtype=jnp.bfloat16, initial=False, gate=-3.0, seed=0):
    """(q, k, v, log_decay, initial_state), a cotangent of o and one of the final state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    log_decay = jnp.asarray(-np.exp(rng.normal(size=(b, t, h, k)) + gate), gate_dtype)
    state = jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32) if initial else None
    arrays = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), log_decay, state
    return arrays, normal(b, t, h, v), jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32)


def errors(arrays, do, dstate, **options):
    """Relative errors of o, the final state and every gradient."""
    operators = gpu.linear_attention, reference.linear_attention
    return relative_errors(*operators, arrays, (do, dstate), scale=0.1, **options)


@as_written
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_forward_and_backward_lower_for_hopper(k, v):
    arrays, *cotangents = make(2, 1100, 3, k, v)
    kernels = kernels_lowered(gpu.linear_attention, arrays, tuple(cotangents), scale=1.0)
    assert kernels >= 7  # two of them for the states that enter the pieces, two kinds of gradients


def strong_later(arrays):
    """The second chunk of the second head decays too much for one product of scores: another kernel's work."""
    *others, log_decay, state = arrays
    return *others, log_decay.at[:, 64:128, 1].multiply(400), state


def gradients_of_both_kinds(erase, d, interpret=None):
    """Gradients of one moderate call by the kernel for any decays and by the one for moderate ones, as a model's."""
    (q, k, v, g, _), do, _ = make(1, 64, 2, d, d)
    rng = np.random.default_rng(1)
    entering, leaving = (jnp.asarray(rng.normal(size=(1, 2, 1, d, d)), jnp.bfloat16) for _ in range(2))
    total = jnp.sum(g.astype(jnp.float32), axis=1)[:, :, None] * gates.LOG2E
    arrays = (q, k, v, do, g, total, entering, leaving, *((do[:, ::-1],) if erase else ()))
    strong, moderate = (jax.jit(functools.partial(kind, scale=0.1, interpret=interpret))
                        for kind in (channel_pass.strong_gradients, channel_pass.moderate_gradients))
    none = jnp.zeros((1, 2, 1))
    made = moderate(none, *arrays)
    got = strong(jax.tree.map(jnp.zeros_like, made), none + 1, *arrays), made
    return [jax.tree.map(lambda x: np.asarray(x, np.float64), gradients) for gradients in got]


@as_written
def test_interpreted_kernels_agree_on_moderate_decays():
    strong, moderate = gradients_of_both_kinds(True, 64, plgpu.InterpretGPUParams())
    for name, want in strong.items():
        assert np.linalg.norm(moderate[name] - want) < 0.003 * np.linalg.norm(want), name


@as_written
@pytest.mark.parametrize("case", ["pieces", "segments", "both kinds of chunks", "keys of 256, float32 gates"])
def test_interpreted_matches_the_reference_without_races(case, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "MIN_PIECE_CHUNKS", 1)  # several pieces at a tiny T
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    if case == "pieces":
        got = errors(*make(1, 192, 1, 64, 64, initial=True), interpret=interpret)
    elif case == "segments":
        ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 20, axis=1).reshape(1, 100), jnp.int32)
        got = errors(*make(1, 100, 1, 64, 64, gate=1.0), segment_ids=ids, interpret=interpret)
    elif case == "both kinds of chunks":
        arrays, *cotangents = make(1, 100, 2, 64, 64, initial=True)
        got = errors(strong_later(arrays), *cotangents, interpret=interpret)
    else:
        got = errors(*make(1, 64, 1, 256, 128, gate_dtype=jnp.float32), interpret=interpret)
    assert max(got) < 0.005 and "RACE" not in capsys.readouterr().out, got


@as_written
def test_interpreted_later_decays_change_no_bit_of_earlier_outputs():
    (q, k, v, g, _), *_ = make(1, 64, 1, 64, 64, gate=-2.0)
    run = functools.partial(gpu.linear_attention, scale=0.1, interpret=plgpu.InterpretGPUParams())
    first, other = (run(q, k, v, gates)[0] for gates in (g, g.at[:, 40:].multiply(200)))  # the chunk is halved then
    assert jnp.array_equal(first[:, :40], other[:, :40]) and not jnp.array_equal(first, other)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("t", [1, 63, 130, 2048])
def test_gpu_matches_the_reference(t, k, v):
    got = errors(*make(2, t, 3, k, v, initial=True))
    assert max(got) < 0.006, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(256, 256), (256, 64), (128, 256)])
def test_gpu_head_size_256(k, v):
    got = errors(*make(2, 300, 2, k, v, initial=True))
    assert max(got) < 0.006, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_gpu_both_kinds_of_chunks_match_the_reference(k, v):
    arrays, *cotangents = make(2, 512, 3, k, v, initial=True)
    got = errors(strong_later(arrays), *cotangents)
    assert max(got) < 0.006, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("erase", [False, True])
def test_gpu_kernels_agree_on_moderate_decays(erase):
    strong, moderate = gradients_of_both_kinds(erase, 128)
    for name, want in strong.items():
        assert np.linalg.norm(moderate[name] - want) < 0.003 * np.linalg.norm(want), name


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [-20.0, -8.0, -1.0, 2.0, 4.0])
def test_gpu_gate_extremes(gate):
    got = errors(*make(2, 1024, 2, 128, 128, initial=True, gate=gate))
    assert max(got) < 0.01, got


@on_gpu
@pytest.mark.gpu
def test_gpu_segments_match_the_reference():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    got = errors(*make(2, 1000, 3, 128, 128, initial=True), segment_ids=ids)
    assert max(got) < 0.006, got


@on_gpu
@pytest.mark.gpu
def test_gpu_very_long_sequence():
    assert max(errors(*make(1, 65536, 1, 64, 64))) < 0.006


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    arrays, *cotangents = make(1, 1024, 2, 128, 128)
    assert_causal_and_repeatable(gpu.linear_attention, arrays, tuple(cotangents), scale=0.1)
