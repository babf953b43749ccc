"""Hopper kernels of DPLR (RWKV-7): lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from configs.linear import get_config
from efficient_lm.config import from_dict
from efficient_lm.model import LM
from pallas_kernels import api, partition, reference
from pallas_kernels.gpu import dplr as gpu
from tests.kernels.gpu_checks import (
    HOPPER,
    as_written,
    assert_causal_and_repeatable,
    kernels_lowered,
    on_gpu,
    relative_errors,
)

OPTIONS = {"scale": 0.3, "min_log_decay": gpu.MIN_LOG_DECAY}
RWKV7 = -0.6065  # the lowest log decay of RWKV-7


def make(b, t, h, d, *, initial=False, gate=None, gate_dtype=jnp.float32, eta=None, keys="random", seed=0):
    """(q, k, v, a, b, log_decay, initial_state) and cotangents of o and the final state; gates as in RWKV-7."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    q, k, v, kappa = (normal(b, t, h, d) for _ in range(4))
    if keys == "repeated":
        kappa = np.broadcast_to(kappa[:, :1], kappa.shape) + 0.1 * kappa
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    rate = sigmoid(normal(b, t, h, d)) if eta is None else np.full((b, t, h, d), eta)
    log_decay = RWKV7 * sigmoid(normal(b, t, h, d)) if gate is None else np.full((b, t, h, d), gate)
    state = jnp.asarray(normal(b, h, d, d), jnp.float32) if initial else None
    half = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    arrays = (*map(half, (q, k * d**-0.5, v, -kappa, kappa * rate)), jnp.asarray(log_decay, gate_dtype), state)
    return arrays, (half(normal(b, t, h, d)), jnp.asarray(normal(b, h, d, d), jnp.float32))


def errors(arrays, cotangents, **options):
    return relative_errors(gpu.dplr, reference.dplr, arrays, cotangents, **OPTIONS, **options)


@as_written
@pytest.mark.parametrize("d, segments", [(64, False), (128, False), (128, True)])
def test_forward_and_backward_lower_for_hopper(d, segments):
    ids = jnp.zeros((2, 300), jnp.int32) if segments else None
    assert kernels_lowered(gpu.dplr, *make(2, 300, 3, d), ids, **OPTIONS) >= 5


@as_written
def test_interpreted_matches_the_reference_without_races(capsys):
    ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 4]], 20, axis=1).reshape(1, 100), jnp.int32)
    got = errors(*make(1, 100, 1, 64, initial=True), segment_ids=ids,
                 interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.01 and "RACE" not in capsys.readouterr().out, got


@as_written
def test_interpreted_at_the_lowest_decay():
    got = errors(*make(1, 128, 1, 64, gate=gpu.MIN_LOG_DECAY), interpret=plgpu.InterpretGPUParams())
    assert max(got) < 0.01, got


@pytest.mark.quick
@pytest.mark.parametrize("change, word", [
    (dict(dtype=jnp.float32), "bfloat16"), (dict(v=128), "head sizes"), (dict(min_log_decay=None), "min_log_decay"),
    (dict(min_log_decay=-2.0), "min_log_decay")])
def test_unsupported_calls_get_a_reason(change, word):
    def reason(dtype=jnp.bfloat16, v=64, min_log_decay=RWKV7):
        q, v = (jax.ShapeDtypeStruct((1, 64, 2, size), dtype) for size in (64, v))
        return gpu.supports(q, q, v, q, q, q, min_log_decay=min_log_decay)

    assert reason() is None and word in reason(**change)


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu"])
def test_other_implementations_take_the_bound(implementation):
    (*arrays, _), _ = make(1, 20, 1, 8)
    run = functools.partial(api.dplr, min_log_decay=RWKV7, implementation=implementation)
    assert jax.eval_shape(run, *arrays)[0].shape == arrays[2].shape


@as_written
def test_rwkv7_models_use_it_on_a_gpu(monkeypatch):
    config = get_config("rwkv7-340M")
    config.model.n_layers = 2
    model = LM(from_dict(config.to_dict()).model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "not_hopper", lambda: None)
    monkeypatch.setattr(partition, "per_device", lambda op: True)
    with jax.sharding.use_abstract_mesh(HOPPER):
        lowered = jax.jit(lambda p, t: model(p, t)[0]).trace(params, tokens).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@on_gpu
@pytest.mark.gpu
def test_gpu_segments_match_the_reference():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    assert max(errors(*make(2, 1000, 3, 128, initial=True), segment_ids=ids)) < 0.012


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    assert_causal_and_repeatable(gpu.dplr, *make(1, 1024, 2, 128), **OPTIONS)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 63, 130, 1024])
@pytest.mark.parametrize("d", [64, 128])
def test_gpu_matches_the_reference(t, d):
    got = errors(*make(2, t, 3, d, initial=True))
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gate", [gpu.MIN_LOG_DECAY, -0.6, -0.05, -1e-6, 0.0])
def test_gpu_gate_extremes(gate):
    got = errors(*make(2, 512, 2, 128, initial=True, gate=gate, gate_dtype=jnp.bfloat16))
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 0.98, 1.9])
@pytest.mark.parametrize("keys, bound, erasing", [("random", 0.008, 0.008), ("repeated", 0.016, 0.04)])
def test_gpu_erase_extremes(eta, keys, bound, erasing):
    with np.errstate(invalid="ignore"):
        got = errors(*make(1, 512, 2, 128, eta=eta, keys=keys, gate=-0.02, initial=True))
    da_db = got[5 if eta else 6:7]  # without erasure the gradient of a is zero
    assert max(da_db) < erasing and max(*got[:5], *got[7:]) < bound, got


@on_gpu
@pytest.mark.gpu
def test_gpu_very_long_sequence():
    assert max(errors(*make(1, 65536, 1, 64))) < 0.012
