"""Hopper kernels of Kimi Delta Attention: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import delta_rule as gpu
from tests.kernels import test_gpu_delta_rule as scalar
from tests.kernels.gpu_checks import as_written, assert_causal_and_repeatable, kernels_lowered, on_gpu
from tests.kernels.test_gpu_delta_rule import errors


def make(b, t, h, d, *, gate=-3.0, gate_dtype=jnp.float32, **options):
    """As `test_gpu_delta_rule.make`, with a decay per channel."""
    (*arrays, _, state), do, dstate = scalar.make(b, t, h, d, **options)
    log_decay = jnp.asarray(-np.exp(np.random.default_rng(5).normal(size=(b, t, h, d)) + gate), gate_dtype)
    return (*arrays, log_decay, state), do, dstate


@as_written
@pytest.mark.parametrize("d", [64, 128])
def test_forward_and_backward_lower_for_hopper(d):
    arrays, *cotangents = make(2, 300, 3, d)
    assert kernels_lowered(gpu.delta_rule, arrays, tuple(cotangents), scale=1.0) >= 5  # two kinds of gradients


def strong_later(arrays):
    """The second chunk of the second head decays too much for one product of scores: another kernel's work."""
    *others, log_decay, state = arrays
    return *others, log_decay.at[:, 64:128, 1].multiply(400), state


@as_written
@pytest.mark.parametrize("case", ["segments", "both kinds of chunks"])
def test_interpreted_matches_the_reference_without_races(case, capsys):
    arrays, *cotangents = make(1, 100, 1 + (case == "both kinds of chunks"), 64, initial=True)
    ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 20, axis=1).reshape(1, 100), jnp.int32)
    got = errors(strong_later(arrays) if case == "both kinds of chunks" else arrays, *cotangents,
                 segment_ids=ids if case == "segments" else None,
                 interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.01 and "RACE" not in capsys.readouterr().out, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 63, 130, 1024])
@pytest.mark.parametrize("d", [64, 128])
def test_gpu_matches_the_reference(t, d):
    got = errors(*make(2, t, 3, d, initial=True))
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_gpu_both_kinds_of_chunks_match_the_reference(d):
    arrays, *cotangents = make(2, 512, 3, d, initial=True)
    got = errors(strong_later(arrays), *cotangents)
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
def test_gpu_values_wider_than_keys():
    assert max(errors(*make(2, 300, 2, 128, v=256, initial=True))) < 0.012


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [-20.0, -8.0, -1.0, 2.0, 4.0])
def test_gpu_gate_extremes(gate):
    got = errors(*make(2, 512, 2, 128, initial=True, gate=gate, gate_dtype=jnp.bfloat16))
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 0.98, 1.9])
@pytest.mark.parametrize("keys, bound", [("random", 0.008), ("repeated", 0.016)])
def test_gpu_beta_extremes(beta, keys, bound):
    with np.errstate(invalid="ignore"):
        got = errors(*make(1, 512, 2, 128, beta=beta, keys=keys, gate=-4.0, initial=True))
    if beta == 0:
        del got[3:6]  # of dk and dv, which are zero, and of dbeta, which is given as zero
    assert max(got) < bound, got


@on_gpu
@pytest.mark.gpu
def test_gpu_segments_match_the_reference():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    assert max(errors(*make(2, 1000, 3, 128, initial=True), segment_ids=ids)) < 0.012


@on_gpu
@pytest.mark.gpu
def test_gpu_very_long_sequence():
    assert max(errors(*make(1, 65536, 1, 64))) < 0.012


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    arrays, *cotangents = make(1, 1024, 2, 128)
    assert_causal_and_repeatable(gpu.delta_rule, arrays, tuple(cotangents), scale=0.3)
