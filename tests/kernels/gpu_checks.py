"""What the tests of GPU kernels share: a Hopper to lower for, errors against the float64 token loops, bit equality."""
import functools
import os

os.environ.setdefault("NPROC", "16")  # the interpreter deadlocks when warpgroups outnumber XLA's CPU threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh  # noqa: E402

from pallas_kernels.gpu.tiles import MOSAIC_AS_WRITTEN  # noqa: E402

HOPPER = AbstractMesh((), (), abstract_device=AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"))
as_written = pytest.mark.skipif(not MOSAIC_AS_WRITTEN, reason="Mosaic GPU of another jax version")
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def compiled(op, **options):
    """Jitted (arrays, cotangents, segment_ids) -> (outputs, gradients) of an operator; the last array is its state."""
    def run(arrays, cotangents, segment_ids):
        def outputs(*arrays):
            return op(*arrays[:-1], initial_state=arrays[-1], segment_ids=segment_ids, **options)

        out, vjp = jax.vjp(outputs, *arrays)
        return out, vjp(jax.tree.map(lambda ct, o: ct.astype(o.dtype), cotangents, out))

    return jax.jit(run)


def both_ways(ours, reference, arrays, cotangents, *, segment_ids=None, scale=None, **options):
    """(ours, reference): lists of o, the final state and every gradient, all float64; the reference computes in it."""
    shared = {} if scale is None else {"scale": scale}
    got = compiled(ours, **shared, **options)(arrays, cotangents, segment_ids)
    with jax.enable_x64(True):
        want = compiled(reference, **shared)(jax.tree.map(jnp.asarray, wide(arrays)), cotangents, segment_ids)
    got, want = jax.tree.leaves(wide(got)), jax.tree.leaves(wide(want))
    assert all(np.isfinite(a).all() for a in got)
    return got, want


def relative_errors(*args, **options):
    """‖ours - reference‖ / ‖reference‖ of o, the final state and every gradient."""
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*both_ways(*args, **options), strict=True)]


def kernels_lowered(op, arrays, cotangents, segment_ids=None, **options):
    """Mosaic GPU kernels in the values and gradients of `op`, lowered for a Hopper GPU."""
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = compiled(op, **options).trace(arrays, cotangents, segment_ids)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu")


def assert_causal_and_repeatable(op, arrays, cotangents, **options):
    """Same bits from the same call, gradients included, and the same first 700 tokens whatever comes after them."""
    run = compiled(op, **options)
    changed = [None if x is None else x.at[:, 700:].multiply(0.5) for x in arrays[:-1]]
    first, again = run(arrays, cotangents, None), run(arrays, cotangents, None)
    assert all(map(jnp.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    o, other = first[0][0], run((*changed, arrays[-1]), cotangents, None)[0][0]
    assert jnp.array_equal(o[:, :700], other[:, :700]) and not jnp.array_equal(o, other)
