"""Hopper kernels of Kimi Delta Attention: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import delta_rule as gpu
from tests.kernels import test_gpu_delta_rule as scalar
from tests.kernels.test_gpu_delta_rule import errors
from tests.kernels.test_gpu_linear_attention import HOPPER, as_written, on_gpu


def make(b, t, h, d, *, gate=-3.0, gate_dtype=jnp.float32, **options):
    """As `test_gpu_delta_rule.make`, with a decay per channel."""
    (*arrays, _, state), do, dstate = scalar.make(b, t, h, d, **options)
    log_decay = jnp.asarray(-np.exp(np.random.default_rng(5).normal(size=(b, t, h, d)) + gate), gate_dtype)
    return (*arrays, log_decay, state), do, dstate


@as_written
@pytest.mark.parametrize("d", [64, 128])
def test_forward_and_backward_lower_for_hopper(d):
    arrays, do, _ = make(2, 300, 3, d)

    def both(*arrays):
        o, vjp = jax.vjp(lambda *a: gpu.delta_rule(*a, scale=1.0)[0], *arrays)
        return o, vjp(do)

    with jax.sharding.use_abstract_mesh(HOPPER):
        text = jax.jit(both).trace(*arrays[:5]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 5


@as_written
def test_interpreted_matches_the_reference_without_races(capsys):
    ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 20, axis=1).reshape(1, 100), jnp.int32)
    got = errors(*make(1, 100, 1, 64, initial=True), segment_ids=ids,
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
@pytest.mark.parametrize("gate", [-20.0, -8.0, -1.0, 2.0, 4.0])
def test_gpu_gate_extremes(gate):
    got = errors(*make(2, 512, 2, 128, initial=True, gate=gate, gate_dtype=jnp.bfloat16))
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 0.98, 1.9])
@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_gpu_beta_extremes(beta, keys):
    got = errors(*make(1, 512, 2, 128, beta=beta, keys=keys, gate=-4.0, initial=True))
    assert max(got[:2]) < 0.02, got


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
    (*arrays, _), do, _ = make(1, 1024, 2, 128)
    run = jax.jit(functools.partial(gpu.delta_rule, scale=0.3))
    gradients = jax.jit(lambda *arrays: jax.vjp(lambda *a: run(*a)[0], *arrays)[1](do))
    first, again = run(*arrays)[0], run(*arrays)[0]
    changed = run(*(x.at[:, 700:].multiply(0.5) for x in arrays))[0]
    assert jnp.array_equal(first, again)
    assert all(map(jnp.array_equal, gradients(*arrays), gradients(*arrays)))
    assert jnp.array_equal(first[:, :700], changed[:, :700]) and not jnp.array_equal(first, changed)
