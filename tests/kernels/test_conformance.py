"""Every family and implementation against the float64 token loop: outputs, final states and all gradients."""
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.xla import common
from tests.kernels.cases import FAMILIES, IMPLEMENTATIONS, MODES, Shape, cast, has_kernel, relative_error, segment_ids

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CHUNK = 16
# The others run the same kernels: their gates are broadcast, their steps spread over rows, before the kernel.
TPU_FAMILIES = ("linear", "simple_gla", "gla", "rwkv6", "normalised", "deltanet", "gated_deltanet", "deltaproduct",
                "kda", "rwkv7", "mlstm", "diagonal", "diagonal_complex")

# With decays per channel a normaliser is computed in float32; no kernel is complex.
GPU_REFUSES = {"normalised_gla": "must be bfloat16", "diagonal_complex": "must be bfloat16 or float32"}


def outputs(family, arrays, ids, cotangent, implementation, **options):
    """(o, final state, gradients by name). Scaled mLSTM states are compared after undoing the scale."""
    def loss(arrays):
        o, state = family.call(arrays, ids, implementation, **options)
        if family.name == "mlstm" and state is not None:
            state = (state[0] * jnp.exp(state[2])[..., None, None], state[1] * jnp.exp(state[2])[..., None])
        total = (o * cotangent["o"]).real.sum()
        for s, c in zip(jax.tree.leaves(state), cotangent["state"], strict=False):
            total = total + (s * c).real.sum()
        return total, (o, state)

    grads, (o, state) = jax.grad(loss, has_aux=True)(arrays)
    return {"o": o, "state": state, "grad": grads}


@functools.cache
def compiled(family, implementation, options):
    return jax.jit(functools.partial(outputs, family, implementation=implementation, **dict(options)))


def cotangents(rng, family, arrays, s):
    o = rng.standard_normal((s.B, s.T, s.H * s.K) if "x" in arrays else (s.B, s.T, s.H, s.V))
    return {"o": o, "state": [rng.standard_normal(x.shape) for x in jax.tree.leaves(arrays["initial_state"])[:2]]}


def errors(result, expected, sizes):
    """{name: error} of two `outputs`, relative to the expected norm or the one in `sizes`, whichever is larger."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    names, got = [jax.tree_util.keystr(path) for path, _ in paths], jax.tree.leaves(result)
    return {name: relative_error(x, y, sizes.get(name, 0.0)) for name, x, (_, y) in zip(names, got, paths, strict=True)}


def reference(family, arrays, ids, cotangent):
    """(float64 `outputs` of the token loop, {name: norm of the terms of an array that is their sum}).

    The gradient of one decay per head adds up one of every token. Their signs are random here, and how much of them is
    left is a matter of luck: 1/17 in retention's 'forget', where terms right to .1 % make a sum right to 2 %.
    """
    arrays = dict(arrays)
    per_head = "log_decay" in arrays and arrays["log_decay"].ndim == 1
    if per_head:
        arrays["log_decay"] = np.broadcast_to(arrays["log_decay"], arrays["v"].shape[:-1])
    with jax.enable_x64(True):
        result = jax.tree.map(np.asarray, compiled(family, "reference", ())(cast(arrays, jnp.float64), ids, cotangent))
    if not per_head:
        return result, {}
    terms = result["grad"]["log_decay"]
    result["grad"]["log_decay"] = terms.sum((0, 1))
    return result, {"['grad']['log_decay']": np.linalg.norm(terms)}


def cases():
    for family in FAMILIES:
        for implementation in IMPLEMENTATIONS:
            wanted = implementation != "pallas_tpu" or family.name in TPU_FAMILIES
            if (family.name, implementation) == ("rwkv7", "pallas_gpu"):
                continue  # its decays must be bounded: test_gpu_dplr.py
            if wanted and has_kernel(family.op, implementation):
                marks = [pytest.mark.gpu] if implementation == "pallas_gpu" else []
                yield pytest.param(family, implementation, id=f"{family.name}-{implementation}", marks=marks)


def failures(family, run, s, dtype):
    """{(mode, array): relative error} of `run(arrays, ids, cotangent)` where above the tolerance, over all modes."""
    failed = {}
    for mode in MODES:
        rng = np.random.default_rng(zlib.crc32(f"{family.name} {mode}".encode()))
        arrays = cast(family.make(rng, s, mode), jnp.dtype(dtype))
        ids = segment_ids(rng, s, boundaries=mode != "keep")
        cotangent = cotangents(rng, family, arrays, s)
        expected, sizes = reference(family, jax.tree.map(lambda x: np.asarray(x.astype(
            jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)), arrays), ids, cotangent)
        cotangent = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cotangent)
        for name, error in errors(run(arrays, jnp.asarray(ids), cotangent), expected, sizes).items():
            if error > TOLERANCE[dtype]:
                failed[mode, name] = error
    return failed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family,implementation", cases())
def test_matches_float64_reference(family, implementation, dtype):
    if implementation == "pallas_gpu" and (jax.default_backend() != "gpu" or dtype == "float32"):
        pytest.skip("needs an NVIDIA GPU and bfloat16")
    s = Shape(K=64, V=64) if implementation == "pallas_gpu" else Shape()
    run = compiled(family, implementation, (() if implementation == "pallas_gpu" else (("chunk_size", CHUNK),)))
    if implementation == "pallas_gpu" and family.name in GPU_REFUSES:
        with pytest.raises(ValueError, match=GPU_REFUSES[family.name]):
            failures(family, run, s, dtype)
    else:
        assert not failures(family, run, s, dtype)


@pytest.mark.parametrize("name,implementation", [
    ("simple_gla", "xla"), ("gla", "xla"), ("gated_deltanet", "xla"), ("kda", "xla"), ("rwkv7", "xla"),
    ("gla", "pallas_tpu"), ("rwkv7", "pallas_tpu")])
def test_heads_of_256_channels(name, implementation):
    family = next(f for f in FAMILIES if f.name == name)
    run = compiled(family, implementation, (("chunk_size", CHUNK),))
    assert not failures(family, run, Shape(B=1, T=20, H=1, G=1, K=256, V=256), "float32")


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_deltanet", "kda", "rwkv7"])
def test_bfloat16_operands(name, monkeypatch):
    """The XLA forms as on accelerators, where operands of matrix products keep the inputs' bfloat16."""
    monkeypatch.setattr(common, "matmul_dtype", lambda x: x.dtype)
    family = next(f for f in FAMILIES if f.name == name)
    run = jax.jit(functools.partial(outputs, family, implementation="xla", chunk_size=64), compiler_options={
        "xla_allow_excess_precision": False, "xla_backend_optimization_level": 0})
    assert not failures(family, run, Shape(B=1, T=128, H=2, G=1, K=16, V=16), "bfloat16")
