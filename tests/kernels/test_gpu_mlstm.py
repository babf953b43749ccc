"""Hopper kernels of mLSTM with exponential input gates: lowered for CUDA, interpreted on CPU, run on a GPU if any."""
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
from pallas_kernels.gpu import linear_attention as scalar  # noqa: E402
from pallas_kernels.gpu import mlstm as gpu  # noqa: E402
from pallas_kernels.gpu import mlstm_scans, pieces  # noqa: E402
from pallas_kernels.gpu.tiles import MOSAIC_AS_WRITTEN  # noqa: E402

HOPPER = AbstractMesh((), (), abstract_device=AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))
as_written = pytest.mark.skipif(not MOSAIC_AS_WRITTEN, reason="Mosaic GPU of another jax version")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
NAMES = ("o", "C", "n", "dq", "dk", "dv", "di", "df", "dC0", "dn0", "dm0")


def make(b, t, h, k, v, *, initial=False, gates=(0.0, 3.0), spread=1.0, seed=0):
    """(q, k, v, input gate, forget gate, initial state) and cotangents of o, C, n; `gates`: means of input, forget."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    wide = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    input_gate, forget_gate = (spread * wide(b, t, h) + mean for mean in gates)
    state = (wide(b, h, k, v), wide(b, h, k), wide(b, h)) if initial else None
    arrays = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v), input_gate, forget_gate, state
    return arrays, (normal(b, t, h, v), wide(b, h, k, v), wide(b, h, k))


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def errors(arrays, cotangents, *, segment_ids=None, interpret=None):
    """{name: ‖ours - reference‖ / ‖reference‖}; states are compared after undoing their scale e^-m."""
    def run(op, arrays, cotangents):
        def outputs(*arrays):
            o, (c, n, m) = op(*arrays[:5], scale=0.1, initial_state=arrays[5], segment_ids=segment_ids)
            return o, c * jnp.exp(m)[..., None, None], n * jnp.exp(m)[..., None]

        out, vjp = jax.vjp(outputs, *arrays)
        return out, vjp(jax.tree.map(lambda ct, o: ct.astype(o.dtype), cotangents, out))

    ours = jax.jit(functools.partial(run, functools.partial(gpu.mlstm, interpret=interpret)))(arrays, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, as_float64((arrays, cotangents)))
        want = jax.jit(functools.partial(run, reference.mlstm))(*wide)
    ours, want = jax.tree.leaves(as_float64(ours)), jax.tree.leaves(as_float64(want))
    assert all(np.isfinite(a).all() for a in ours), [np.isfinite(a).mean() for a in ours]
    sizes = dict(zip(NAMES, map(np.linalg.norm, want), strict=False))
    if arrays[5] is not None:  # <C0, dC0> + <n0, dn0>, one number per head and as good as zero now and then
        sizes["dm0"] = np.sqrt(sizes["dm0"] ** 2 + np.sum((np.asarray(arrays[5][0], np.float64) * want[8]) ** 2))
    return {name: np.linalg.norm(a - b) / size for (name, size), a, b in zip(sizes.items(), ours, want, strict=True)}


@as_written
@pytest.mark.quick
@pytest.mark.parametrize("k, v", [(64, 128), (128, 64), (128, 128)])
def test_forward_and_backward_lower_for_hopper(k, v):
    arrays, (do, _, _) = make(2, 600, 3, k, v)

    def both(*gated):
        o, vjp = jax.vjp(lambda *a: gpu.mlstm(*a, scale=1.0)[0], *gated)
        return o, vjp(do)

    with jax.sharding.use_abstract_mesh(HOPPER):
        text = jax.jit(both).trace(*arrays[:5]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


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
    assert max(got.values()) < 0.01, got


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("gates", [(-10.0, 3.0), (10.0, 3.0), (0.0, -8.0), (0.0, 20.0), (300.0, 3.0), (-300.0, 3.0)])
def test_gpu_gate_extremes(gates):
    got = errors(*make(2, 600, 2, 128, 128, initial=abs(gates[0]) < 100, gates=gates))
    assert max(got.values()) < 0.02, got


@on_gpu
@pytest.mark.gpu
def test_gpu_segments():
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, 1000)) < 0.02, axis=1), jnp.int32)
    got = errors(*make(2, 1000, 3, 128, 128, initial=True), segment_ids=ids)
    assert max(got.values()) < 0.01, got


@on_gpu
@pytest.mark.gpu
def test_gpu_output_is_bitwise_causal_and_repeatable():
    (q, k, v, input_gate, forget_gate, _), _ = make(1, 1024, 2, 128, 128)
    run = jax.jit(lambda *a: gpu.mlstm(*a, scale=0.1)[0])
    arrays = q, k, v, input_gate, forget_gate
    first, again = run(*arrays), run(*arrays)
    changed = run(*(x.at[:, 700:].multiply(0.5) for x in arrays))
    assert jnp.array_equal(first, again)
    assert jnp.array_equal(first[:, :700], changed[:, :700]) and not jnp.array_equal(first, changed)
