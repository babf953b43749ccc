"""Hopper kernels of scalar-decay linear attention: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
import functools
import os

os.environ.setdefault("NPROC", "16")  # the interpreter deadlocks when warpgroups outnumber XLA's CPU threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh  # noqa: E402

from pallas_kernels import reference  # noqa: E402
from pallas_kernels.gpu import linear_attention as gpu  # noqa: E402
from pallas_kernels.gpu import pieces  # noqa: E402
from pallas_kernels.gpu.tiles import MOSAIC_AS_WRITTEN  # noqa: E402

HOPPER = AbstractMesh((), (), abstract_device=AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))
as_written = pytest.mark.skipif(not MOSAIC_AS_WRITTEN, reason="Mosaic GPU of another jax version")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")


def make(b, t, h, k, v, decay, *, initial=False, gate=-3.0, seed=0):
    """(q, k, v, log_decay, initial_state), a cotangent of o and one of the final state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    shape = {"none": None, "head": (h,), "token": (b, t, h)}[decay]
    log_decay = None if shape is None else jnp.asarray(-np.exp(rng.normal(size=shape) + gate), jnp.float32)
    state = jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32) if initial else None
    arrays = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), log_decay, state
    return arrays, normal(b, t, h, v), jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def both_ways(arrays, do, dstate, *, segment_ids=None, interpret=None):
    """(ours, reference): lists of o, the final state and every gradient, all float64; the reference computes in it."""
    def run(op, arrays):
        def outputs(q, k, v, log_decay, state):
            return op(q, k, v, log_decay, scale=0.1, initial_state=state, segment_ids=segment_ids)

        out, vjp = jax.vjp(outputs, *arrays)
        return out, vjp(jax.tree.map(lambda ct, o: ct.astype(o.dtype), (do, dstate), out))

    ours = jax.jit(functools.partial(run, functools.partial(gpu.linear_attention, interpret=interpret)))(arrays)
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(run, reference.linear_attention))(jax.tree.map(jnp.asarray, wide(arrays)))
    ours, want = jax.tree.leaves(wide(ours)), jax.tree.leaves(wide(want))
    assert all(np.isfinite(a).all() for a in ours)
    return ours, want


def relative_errors(*args, **options):
    """‖ours - reference‖ / ‖reference‖ of o, the final state and every gradient."""
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*both_ways(*args, **options), strict=True)]


def errors(arrays, *args, **options):
    """As `relative_errors`, the gradient of the gates also relative to its terms."""
    ours, want = both_ways(arrays, *args, **options)
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
    arrays, do, _ = make(2, 600, 3, k, v, decay)

    def both(q, k, v, log_decay):
        o, vjp = jax.vjp(lambda *a: gpu.linear_attention(*a, scale=1.0)[0], q, k, v, log_decay)
        return o, vjp(do)

    with jax.sharding.use_abstract_mesh(HOPPER):
        text = jax.jit(both).trace(*arrays[:4]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@as_written
@pytest.mark.parametrize("case", ["pieces", "segments", "plain"])
def test_interpreted_matches_the_reference(case, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_CHUNKS", 1)  # several pieces and saved states at a tiny T
    monkeypatch.setattr(gpu, "SAVE_EVERY", 2)
    interpret = plgpu.InterpretGPUParams()
    if case == "pieces":
        got = errors(*make(1, 320, 1, 64, 64, "token", initial=True), interpret=interpret)
    elif case == "segments":
        ids = jnp.asarray(np.repeat([[1, 2, 2, 3, 0]], 40, axis=1).reshape(1, 200), jnp.int32)
        got = errors(*make(1, 200, 1, 64, 64, "token"), segment_ids=ids, interpret=interpret)
    else:
        got = errors(*make(1, 128, 1, 128, 128, "none"), interpret=interpret)
    assert max(got) < 0.01, got


@as_written
def test_interpreted_has_no_race(capsys):
    got = errors(*make(1, 192, 1, 64, 64, "token"), interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.015 and "RACE" not in capsys.readouterr().out  # 0.015: bf16 states reach the gates' gradient


@pytest.mark.quick
@pytest.mark.parametrize("change, word", [
    (dict(dtype=jnp.float32), "bfloat16"), (dict(k=96), "key head size"), (dict(v=256), "value head size"),
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
    assert max(errors(*make(1, 65536, 1, 64, 64, "token"))) < 0.015


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    (q, k, v, log_decay, _), _, _ = make(1, 1024, 2, 128, 128, "token")
    run = jax.jit(lambda *a: gpu.linear_attention(*a, scale=0.1)[0])
    first, again = run(q, k, v, log_decay), run(q, k, v, log_decay)
    changed = run(*(x.at[:, 700:].multiply(0.5) for x in (q, k, v, log_decay)))
    assert jnp.array_equal(first, again)
    assert jnp.array_equal(first[:, :700], changed[:, :700]) and not jnp.array_equal(first, changed)
