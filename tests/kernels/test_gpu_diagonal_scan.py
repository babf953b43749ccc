"""Hopper kernel of the diagonal recurrence: lowered for CUDA, interpreted on CPU, run on a GPU if there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import reference
from pallas_kernels.gpu import diagonal_scan as gpu
from tests.kernels.gpu_checks import (
    as_written,
    assert_causal_and_repeatable,
    kernels_lowered,
    on_gpu,
    relative_errors,
)

BF16, F32 = jnp.bfloat16, jnp.float32


def make(b, t, d, x_dtype=F32, decay_dtype=F32, *, initial=True, gate=-2.0, seed=0):
    """(x, log_decay, initial_state), (cotangent of h, of the final state)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    x, log_decay = jnp.asarray(normal(b, t, d), x_dtype), jnp.asarray(-np.exp(normal(b, t, d) + gate), decay_dtype)
    state = jnp.asarray(normal(b, d), F32) if initial else None
    return (x, log_decay, state), (jnp.asarray(normal(b, t, d), x_dtype), jnp.asarray(normal(b, d), F32))


def errors(arrays, cotangents, **options):
    """Relative errors of h, the final state and every gradient."""
    return relative_errors(gpu.diagonal_scan, reference.diagonal_scan, arrays, cotangents, **options)


@as_written
@pytest.mark.quick
@pytest.mark.parametrize(
    "shape, x_dtype, decay_dtype, config",
    [
        ((8, 1000, 2048), BF16, BF16, None),
        ((2, 1, 200), BF16, F32, None),
        ((1, 5000, 24), F32, F32, None),
        ((1, 5000, 24), BF16, BF16, gpu.Config(16, 3, 2, 2, warpgroups=2)),
    ],
)
def test_lowers_for_hopper(shape, x_dtype, decay_dtype, config):
    """Values and gradients, in the configurations that the shapes choose or a given one."""
    x, log_decay = jax.ShapeDtypeStruct(shape, x_dtype), jax.ShapeDtypeStruct(shape, decay_dtype)
    cotangents = x, jax.ShapeDtypeStruct((shape[0], shape[2]), F32)
    assert kernels_lowered(gpu.diagonal_scan, (x, log_decay, None), cotangents, config=config) >= 2


@as_written
@pytest.mark.parametrize(
    "config, t, d",
    [(gpu.Config(64, 3, 2, 2), 40, 64), (gpu.Config(32, 3, 2, 2), 50, 64), (gpu.Config(128, 1, 2, 4), 9, 128)],
)
def test_interpreted_matches_the_reference(config, t, d):
    """Several tiles, the last one partly filled; several blocks of channels."""
    assert max(errors(*make(2, t, d), config=config, interpret=plgpu.InterpretGPUParams())) < 1e-6


@as_written
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_interpreted_segments_have_no_race(warpgroups, capsys):
    ids = jnp.asarray([[1] * 12 + [2] * 13 + [0] * 5])
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    config = gpu.Config(64, 3, 2, 2, warpgroups)
    got = errors(*make(1, 30, 64), segment_ids=ids, config=config, interpret=interpret)
    assert max(got) < 1e-6 and "RACE" not in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    "dtype, width, word",
    [(jnp.complex64, 64, "x must be bfloat16 or float32"), (BF16, 20, "multiple of 8"), (F32, 64, None)],
)
def test_unsupported_calls_get_a_reason(dtype, width, word):
    struct = jax.ShapeDtypeStruct((1, 8, width), dtype)
    reason = gpu.supports(x=struct, log_decay=struct)
    assert reason is None if word is None else word in reason


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype, decay_dtype", [(BF16, BF16), (BF16, F32), (F32, F32)])
@pytest.mark.parametrize("b, t, d", [(2, 1, 256), (1, 63, 200), (3, 2048, 64), (1, 1000, 256), (8, 700, 2048)])
def test_gpu_matches_the_reference(b, t, d, x_dtype, decay_dtype):
    for initial in (True, False):
        got = errors(*make(b, t, d, x_dtype, decay_dtype, initial=initial))
        assert max(got) < (1e-6 if x_dtype == F32 else 0.004), got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [-20.0, -8.0, 3.0, 5.0])
def test_gpu_gate_extremes(gate):
    assert max(errors(*make(2, 1024, 256, BF16, BF16, gate=gate))) < 0.004


@on_gpu
@pytest.mark.gpu
def test_gpu_segments():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    assert max(errors(*make(2, 1000, 256, BF16, BF16), segment_ids=ids)) < 0.004


@on_gpu
@pytest.mark.gpu
def test_gpu_very_long_sequence():
    assert max(errors(*make(1, 65536, 64, BF16, F32))) < 0.004


@on_gpu
@pytest.mark.gpu
def test_gpu_is_bitwise_causal_and_repeatable():
    assert_causal_and_repeatable(gpu.diagonal_scan, *make(1, 1024, 256, BF16, BF16))
