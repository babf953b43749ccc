"""TPU kernels without a TPU: lowering, races, decay extremes; with libtpu installed, real compilation for two chips."""
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as mosaic_interpret  # the only place of `races`
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import api
from pallas_kernels.tpu import delta_rule, diagonal_scan, dplr, linear_attention
from tests.kernels.cases import relative_error

CALLS = {
    "linear": (linear_attention.linear_attention, "qkv"),
    "token": (linear_attention.linear_attention, "qkvg"),
    "channel": (linear_attention.linear_attention, "qkvG"),
    "gated_delta": (delta_rule.delta_rule, "qkvtg"),
    "kda": (delta_rule.delta_rule, "qkvtG"),
    "dplr": (dplr.dplr, "qkvkkG"),
    "diagonal": (diagonal_scan.diagonal_scan, "xx"),
    "diagonal_complex": (diagonal_scan.diagonal_scan, "zz"),
}


def shapes(letters, dtype, T, D):
    wide = jnp.float32
    table = {"q": ((1, T, 1, D), dtype), "k": ((1, T, 1, D), dtype), "v": ((1, T, 2, D), dtype), "t": ((1, T, 2), wide),
             "g": ((1, T, 2), wide), "G": ((1, T, 2, D), wide), "x": ((1, T, D), wide),
             "z": ((1, T, D), jnp.complex64)}
    return [jax.ShapeDtypeStruct(*table[c]) for c in letters]


def gradient(name, interpret, **options):
    """Gradients of the sum of outputs, for all arguments."""
    function, letters = CALLS[name]
    options = {} if name.startswith("diagonal") else {"scale": 0.1} | options

    def loss(args):
        return function(*args, interpret=interpret, **options)[0].real.astype(jnp.float32).sum()
    return jax.jit(jax.grad(loss)), letters


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_tpu(name, dtype):
    """Forward and backward kernels pass the Mosaic lowering: legal blocks, only supported primitives."""
    run, letters = gradient(name, interpret=False)
    text = run.trace(shapes(letters, dtype, 200, 128)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("name", ["channel", "kda", "dplr", "diagonal_complex"])
def test_no_races_and_no_uninitialised_reads(name):
    """The TPU interpreter with race detection; memory that was never written reads as NaN."""
    run, letters = gradient(name, interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
                            chunk_size=8)
    rng = np.random.default_rng(0)
    args = [jnp.asarray(-rng.random(s.shape), s.dtype) for s in shapes(letters, jnp.float32, 16, 8)]
    args = [x + 1j * rng.random(x.shape) if jnp.iscomplexobj(x) else x for x in args]
    expected, _ = gradient(name, interpret=True, chunk_size=8)
    for x, y in zip(run(args), expected(args), strict=True):
        assert relative_error(x, y) < 1e-6
    assert not mosaic_interpret.races.races_found


@pytest.mark.parametrize("name", ["token", "channel", "kda", "dplr"])
def test_no_output_depends_on_later_tokens(name):
    """Bit for bit, with later values and gates changed strongly in the middle of a chunk."""
    function, letters = CALLS[name]
    rng = np.random.default_rng(1)
    args = [jnp.asarray(-rng.random(s.shape), s.dtype) for s in shapes(letters, jnp.float32, 16, 8)]
    run = jax.jit(lambda args: function(*args, scale=0.1, chunk_size=8, interpret=True)[0])
    later = [x.at[:, 11:].add(-3.0) for x in args]
    assert np.array_equal(run(args)[:, :11], run(later)[:, :11])
    assert not np.array_equal(run(args)[:, 11:], run(later)[:, 11:])


@pytest.mark.parametrize("name", ["channel", "kda"])
def test_chunk_sizes_agree(name):
    """Gradients at T = 130 in chunks of 16, 64 and 128."""
    rng = np.random.default_rng(3)
    given = shapes(CALLS[name][1], jnp.float32, 130, 8)
    args = [jnp.asarray(-rng.random(s.shape) / s.shape[-1], s.dtype) for s in given]

    def run(chunk_size):
        once = {"xla_backend_optimization_level": 0}
        return jax.jit(gradient(name, interpret=True, chunk_size=chunk_size)[0], compiler_options=once)(args)

    expected = run(16)
    for chunk_size in (64, 128):
        for x, y in zip(run(chunk_size), expected, strict=True):
            assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("imaginary", [0.0, 1j])
def test_diagonal_scan_carries_its_state_over_blocks(imaginary):
    """T = 300 is three blocks of 128; 256 channels are two blocks of 128."""
    rng = np.random.default_rng(2)
    x, log_decay = jnp.asarray(rng.standard_normal((1, 300, 256))), jnp.asarray(-0.01 * rng.random((1, 300, 256)))
    log_decay = log_decay + imaginary * rng.random((256,)) if imaginary else log_decay
    results = []
    for implementation in ("pallas_tpu", "xla"):
        def loss(x, log_decay, implementation=implementation):
            return (api.diagonal_scan(x, log_decay, implementation=implementation)[0].real ** 2).sum()
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, log_decay))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(a, b) < 1e-5


def test_explicit_choice_gives_the_reason():
    q = jnp.ones((1, 4, 1, 512))
    with pytest.raises(ValueError, match="cannot run linear_attention: K = 512, V = 512: at most 256"):
        api.linear_attention(q, q, q, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="cannot run diagonal_scan: dtype float16"):
        api.diagonal_scan(jnp.ones((1, 4, 2), jnp.float16), jnp.zeros(2), implementation="pallas_tpu")


COMPILE = """
    import json, re, sys
    import jax, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tests.kernels.test_tpu import CALLS, gradient, shapes
    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
    place = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    size = lambda text, field: [int(n) for n in re.findall('"' + field + r'":\\[{[^}]*"size":"(\\d+)"', text)]
    for name in CALLS:
        for dtype, D, chunk in (("float32", 64, None), ("float32", 256, None), ("float32", 256, 128),
                                ("bfloat16", 64, None), ("bfloat16", 256, None)):
            run, letters = gradient(name, interpret=False, chunk_size=chunk)
            args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in shapes(letters, dtype, 512, D)]
            compiled = run.trace(args).lower(lowering_platforms=("tpu",)).compile()
            kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
            used = [size(line, "used_scoped_memory_configs")[0] for line in kernels]
            limits = [(size(line, "scoped_memory_configs") or [DEFAULT_VMEM_LIMIT])[0] for line in kernels]
            print(json.dumps(dict(name=name, dtype=dtype, D=D, chunk=chunk, vmem=used, limits=limits)))
"""
# Of a kernel that asks for no other.
DEFAULT_VMEM_LIMIT = 16 << 20


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (an optional test tool)")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_compiles_for_real_chips(topology):
    """The TPU compiler accepts every kernel at head sizes 64 to 256, and its VMEM use stays below the limit.

    `pytest -s` prints the use. Chunks of 128 are the largest that the kernels take.
    """
    env = os.environ | dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
                            TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    code = textwrap.dedent(COMPILE).replace("DEFAULT_VMEM_LIMIT", str(DEFAULT_VMEM_LIMIT))
    done = subprocess.run([sys.executable, "-c", code, topology], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 5 * len(CALLS)
    for row in rows:
        assert len(row["vmem"]) >= 2  # a forward and a backward kernel
        assert all(used < limit for used, limit in zip(row["vmem"], row["limits"], strict=True)), row
        mib = ", ".join(f"{used / 2 ** 20:.2f}" for used in row["vmem"])
        print(f"{topology} {row['name']:17} {row['dtype']:9} K = V = {row['D']:3} chunk {row['chunk'] or 64:3}: {mib} "
              f"of {row['limits'][0] >> 20} MiB")
