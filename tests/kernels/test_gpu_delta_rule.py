"""Hopper kernels of the (gated) delta rule: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.mixers.deltanet import DeltaNetConfig
from efficient_lm.mixers.gated_deltanet import GatedDeltaNetConfig
from pallas_kernels import api, reference
from pallas_kernels.gpu import delta_inverse
from pallas_kernels.gpu import delta_rule as gpu
from pallas_kernels.gpu.gates import by_chunk
from tests.kernels.gpu_checks import (
    as_written,
    assert_causal_and_repeatable,
    kernels_lowered,
    on_gpu,
    relative_errors,
)


def make(b, t, h, d, *, v=None, decay=True, initial=False, gate=-3.0, beta=None, keys="random", seed=0):
    """(q, k, v, beta, log_decay, initial_state), a cotangent of o and one of the final state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    v, q, k = v or d, normal(b, t, h, d), normal(b, t, h, d)
    if keys == "repeated":
        k = np.broadcast_to(k[:, :1], k.shape) + 0.1 * k
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    strength = 1 / (1 + np.exp(-normal(b, t, h))) if beta is None else np.full((b, t, h), beta)
    log_decay = jnp.asarray(-np.exp(normal(b, t, h) + gate), jnp.float32) if decay else None
    state = jnp.asarray(normal(b, h, d, v), jnp.float32) if initial else None
    half = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    arrays = half(q), half(k), half(normal(b, t, h, v)), jnp.asarray(strength, jnp.float32), log_decay, state
    return arrays, half(normal(b, t, h, v)), jnp.asarray(normal(b, h, d, v), jnp.float32)


def errors(arrays, do, dstate, **options):
    """Relative errors of o, the final state and every gradient."""
    return relative_errors(gpu.delta_rule, reference.delta_rule, arrays, (do, dstate), scale=0.3, **options)


@as_written
@pytest.mark.parametrize("d, decay, max_beta", [
    (64, True, 2.0), (64, True, 1.0), (128, True, 2.0), (128, True, 1.0), (128, False, 2.0), (128, False, 1.0)])
def test_forward_and_backward_lower_for_hopper(d, decay, max_beta):
    arrays, *cotangents = make(2, 300, 3, d, decay=decay)
    assert kernels_lowered(gpu.delta_rule, arrays, tuple(cotangents), scale=1.0, max_beta=max_beta) >= 5


@as_written
def test_interpreted_matches_the_reference_without_races(capsys):
    got = errors(*make(1, 192, 1, 64, initial=True), interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.01 and "RACE" not in capsys.readouterr().out


@as_written
def test_interpreted_segments_and_wide_values_match_the_reference():
    ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 20, axis=1).reshape(1, 100), jnp.int32)
    arguments = make(1, 100, 1, 64, v=128, decay=False, initial=True)
    got = errors(*arguments, segment_ids=ids, interpret=plgpu.InterpretGPUParams())
    assert max(got) < 0.01, got


@as_written
def test_interpreted_reflections_of_one_key_keep_their_digits():
    """Beta near 2: U alternates in sign, bf16 leaves 2 % of its sums; values far from 1 fit fp16 as well."""
    (q, k, v, *gates, state), do, dstate = make(1, 128, 1, 64, beta=1.99, keys="repeated", gate=-6.0, initial=True)
    size = 2.0**12
    arrays = q, k, v * size, *gates, state * size
    got = errors(arrays, do / size**2, dstate / size**2, interpret=plgpu.InterpretGPUParams())
    assert max(got) < 0.008, got


@as_written
@pytest.mark.parametrize("max_beta", [1.0, 2.0])
def test_interpreted_repeated_keys_with_a_bound_on_beta(max_beta):
    """What the bound of 1 spares is not needed below it: one key, written over nearly whole at every token."""
    arguments = make(1, 128, 1, 64, beta=0.99, keys="repeated", gate=-4.0, initial=True)
    got = errors(*arguments, max_beta=max_beta, interpret=plgpu.InterpretGPUParams())
    assert max(got) < 0.005, got


@as_written
@pytest.mark.parametrize("t, refine", [(512, False), (192, False), (192, True)])
def test_interpreted_inverses_of_several_chunks_per_warpgroup(monkeypatch, capsys, t, refine):
    monkeypatch.setattr(delta_inverse, "PROGRAMS", 1)
    (_, k, v, beta, *_), *_ = make(1, t, 1, 64, beta=0.9, keys="repeated")
    gates = jnp.stack([jnp.zeros((1, 1, t // 64, 64)), by_chunk(beta)], axis=3)
    run = functools.partial(delta_inverse.chunk_inverses, decay=False, refine=refine,
                            interpret=plgpu.InterpretGPUParams(detect_races=True))
    got, peaks = jax.jit(run)(k, v, gates)
    keys = np.asarray(k, np.float64).reshape(-1, 64, 64)
    want = np.linalg.inv(np.eye(64) + 0.9 * np.tril(keys @ keys.transpose(0, 2, 1), -1))
    assert np.abs(np.asarray(got[0, 0], np.float64) - want).max() < 0.002
    assert np.array_equal(peaks.reshape(-1), np.abs(np.asarray(v[0, :, 0], np.float32)).max(-1))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.quick
def test_the_bound_on_beta_is_checked_and_mixers_give_it():
    x, beta = jnp.ones((1, 64, 1, 64), jnp.bfloat16), jnp.ones((1, 64, 1))
    with pytest.raises(ValueError, match="max_beta = 2.5: must be above 0 and at most 2"):
        api.delta_rule(x, x, x, beta, max_beta=2.5)
    for config in (DeltaNetConfig, GatedDeltaNetConfig):
        assert [config(allow_neg_eigval=reflects).options()["max_beta"] for reflects in (False, True)] == [1.0, 2.0]


def test_masked_tokens_leave_the_state_bit_identical():
    (q, k, v, beta, _, state), do, _ = make(1, 64, 1, 64, decay=False, initial=True, beta=0.0)

    def final(beta):
        o, end = gpu.delta_rule(q, k, v, beta, scale=0.3, initial_state=state, interpret=plgpu.InterpretGPUParams())
        return jnp.sum(o * do), end

    (_, end), dbeta = jax.jit(jax.value_and_grad(final, has_aux=True))(beta)
    assert jnp.array_equal(end, state) and jnp.array_equal(dbeta, jnp.zeros_like(beta))


@pytest.mark.quick
@pytest.mark.parametrize("change, word", [
    (dict(dtype=jnp.float32), "bfloat16"), (dict(v=96), "value head size"), (dict(k=256), "key head size"),
    (dict(chunk_size=32), "chunk_size")])
def test_unsupported_calls_get_a_reason(change, word):
    k, v, dtype = change.get("k", 64), change.get("v", 64), change.get("dtype", jnp.bfloat16)
    struct = lambda size: jax.ShapeDtypeStruct((1, 64, 2, size), dtype)  # noqa: E731
    reason = gpu.supports(struct(k), struct(k), struct(v), chunk_size=change.get("chunk_size"))
    assert word in reason
    assert gpu.supports(*[jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)] * 3, scale=1.0) is None


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("t, max_beta", [(1, 2.0), (130, 2.0), (1024, 2.0), (130, 1.0), (1024, 1.0)])
@pytest.mark.parametrize("d, decay", [(64, True), (128, True), (128, False)])
def test_gpu_matches_the_reference(t, max_beta, d, decay):
    got = errors(*make(2, t, 3, d, decay=decay, initial=True), max_beta=max_beta)
    assert max(got) < 0.012, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("d, v", [(128, 256), (64, 128)])
def test_gpu_values_wider_than_keys(d, v):
    assert max(errors(*make(2, 300, 2, d, v=v, initial=True))) < 0.012


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("beta, max_beta", [(0.0, 2.0), (0.98, 2.0), (1.9, 2.0), (0.0, 1.0), (0.98, 1.0)])
@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_gpu_beta_extremes(beta, max_beta, keys):
    got = errors(*make(1, 512, 2, 128, beta=beta, keys=keys, gate=-4.0, initial=True), max_beta=max_beta)
    if beta == 0:
        del got[3:6]  # of dk and dv, which are zero, and of dbeta, which is given as zero
    assert max(got) < 0.01, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-20, 12])
def test_gpu_values_and_gradients_of_any_magnitude(exponent):
    (q, k, v, *gates, state), do, dstate = make(1, 512, 2, 128, initial=True)
    size = 2.0**exponent
    got = errors((q, k, v * size, *gates, state * size), do / size**2, dstate / size**2)
    assert max(got) < 0.01, got


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
