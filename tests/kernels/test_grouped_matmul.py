"""Grouped matmul against float64: values and gradients, for groups of every kind."""

import functools
import os

os.environ.setdefault("NPROC", "16")  # the GPU interpreter deadlocks when warpgroups outnumber XLA's CPU threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels import api  # noqa: E402
from pallas_kernels.gpu import grouped_matmul as gpu  # noqa: E402
from pallas_kernels.tpu import grouped_matmul as tpu  # noqa: E402
from pallas_kernels.xla.grouped_matmul import tile_size  # noqa: E402
from tests.kernels.cases import relative_error  # noqa: E402
from tests.kernels.gpu_checks import HOPPER, as_written  # noqa: E402

M, E, K, N = 70, 5, 12, 9
SIZES = {
    "uneven": [1, 30, 2, 16, 21],
    "empty": [0, 33, 0, 37, 0],
    "one_group": [0, 0, M, 0, 0],
    "rows_left_over": [16, 0, 15, 17, 2],
    "no_rows": [0] * E,
}


@functools.partial(jax.jit, static_argnames=("implementation", "matrices"))
def gradients(lhs, rhs, sizes, cotangent, implementation, matrices=1):
    """(y, dlhs, drhs), rhs handed over in several matrices side by side."""

    def product(lhs, rhs):
        return api.grouped_matmul(lhs, tuple(jnp.split(rhs, matrices, 2)), sizes, implementation=implementation)

    y, pull = jax.vjp(product, lhs, rhs)
    return y, *pull(cotangent.astype(y.dtype))


def inputs(rows=M, seed=0):
    rng = np.random.default_rng(seed)
    return [np.float32(rng.standard_normal(shape)) for shape in ((rows, K), (E, K, N), (rows, N))]


def exact(lhs, rhs, sizes, cotangent):
    """By NumPy, one group at a time."""
    lhs, rhs, cotangent = (np.asarray(x, np.float64) for x in (lhs, rhs, cotangent))
    y, dlhs, drhs, start = np.zeros((len(lhs), N)), np.zeros_like(lhs), np.zeros_like(rhs), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dlhs[rows] = lhs[rows] @ rhs[group], cotangent[rows] @ rhs[group].T
        drhs[group] = lhs[rows].T @ cotangent[rows]
        start += size
    return y, dlhs, drhs


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("case", SIZES)
def test_matches_float64(case, implementation, dtype):
    lhs, rhs, cotangent = (jnp.asarray(x, dtype) for x in inputs())
    got = gradients(lhs, rhs, jnp.asarray(SIZES[case]), cotangent, implementation)
    for x, y in zip(got, exact(lhs, rhs, SIZES[case], cotangent), strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x[y == 0], 0)  # rows and matrices of no group: exactly zero
        assert relative_error(x, y) < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]


def test_groups_of_several_tiles():
    """Random sizes, most rows in few groups, as a router that collapses would give."""
    rng = np.random.default_rng(3)
    rows = 600
    assert tile_size(rows, E) * 4 < rows
    for _ in range(4):
        sizes = rng.multinomial(rows - 7, rng.dirichlet(np.full(E, 0.5)))
        lhs, rhs, cotangent = inputs(rows)
        got = gradients(lhs, rhs, jnp.asarray(sizes), cotangent, "xla")
        for x, y in zip(got, exact(lhs, rhs, sizes, cotangent), strict=True):
            assert relative_error(x, y) < 1e-6


def test_float64():
    lhs, rhs, cotangent = (np.float64(x) for x in inputs())
    with jax.enable_x64(True):
        for implementation in ("reference", "xla"):
            got = gradients(lhs, rhs, jnp.asarray(SIZES["uneven"]), cotangent, implementation)
            for x, y in zip(got, exact(lhs, rhs, SIZES["uneven"], cotangent), strict=True):
                assert relative_error(x, y) < 1e-14


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_kernel_lowers(dtype):
    """Mosaic takes the product and both gradients."""
    lhs, rhs, sizes = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((500, 256), dtype), ((6, 256, 384), dtype), ((6,), jnp.int32))
    )
    grad = jax.grad(
        lambda lhs, rhs, sizes: jnp.sin(tpu.grouped_matmul(lhs, (rhs,), sizes, interpret=False)).sum(), argnums=(0, 1)
    )
    text = jax.jit(grad).trace(lhs, rhs, sizes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@as_written
@pytest.mark.quick
@pytest.mark.parametrize("rows, k, n, matrices", [(1000, 256, 128, 1), (40, 128, 512, 2)])
def test_gpu_kernels_lower(rows, k, n, matrices):
    """Mosaic GPU takes the product and both gradients."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    grad = jax.grad(lambda *a: jnp.sin(gpu.grouped_matmul(*a).astype(jnp.float32)).sum(), argnums=(0, 1))
    with jax.sharding.use_abstract_mesh(HOPPER):
        arrays = bf16((rows, k)), (bf16((7, k, n)),) * matrices, jax.ShapeDtypeStruct((7,), jnp.int32)
        text = jax.jit(grad).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.quick
def test_gpu_kernel_says_what_it_does_not_take():
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    for message, m, k, n in (("M must be a multiple of 8, got 12", 12, 128, 256), ("K and N must be", 8, 128, 64)):
        assert message in gpu.supports(lhs=bf16((m, k)), rhs=(bf16((2, k, n)),))
    assert gpu.supports(lhs=bf16((8, 128)), rhs=(bf16((2, 128, 256)),) * 2) is None


@as_written
@pytest.mark.parametrize("sizes", [[40, 0, 130, 60], [0, 256, 0, 0]])
def test_gpu_kernels_interpreted(sizes, monkeypatch, capsys):
    """Two matrices; groups that begin and end inside tiles, an empty one, rows left over; two programs."""
    monkeypatch.setattr(gpu, "PROGRAMS", 2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    rng = np.random.default_rng(0)
    lhs, rhs, dy = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((256, 128), (4, 128, 256), (256, 256)))
    matrices = tuple(jnp.split(rhs, 2, axis=2))
    starts = gpu.group_starts(jnp.asarray(sizes))
    got = (
        gpu.rows_times(lhs, matrices, starts, transpose=False, interpret=interpret),
        gpu.rows_times(dy, matrices, starts, transpose=True, interpret=interpret),
        jnp.concatenate(gpu.outer_products(lhs, dy, starts, 4, parts=2, interpret=interpret), axis=2),
    )
    want = gradients(*(a.astype(jnp.float32) for a in (lhs, rhs)), jnp.asarray(sizes), dy, "reference")
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 4e-3
        np.testing.assert_array_equal(x[y == 0], 0)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1000, 2048, 40])
@pytest.mark.parametrize("shape, matrices", [((128, 256), 1), ((256, 384), 1), ((256, 384), 3), ((128, 512), 2)])
def test_gpu_kernel(shape, matrices, rows):
    """Groups that begin and end inside tiles, some empty, some rows left over."""
    rng = np.random.default_rng(4)
    for sizes in (rng.multinomial(rows, [0.5, 0, 0.3, 0.2, 0, 0, 0]), [0, 0, rows // 2, 3, 1, 0, rows // 3], [0] * 7):
        arrays = [(rows, shape[0]), (7, *shape), (rows, shape[1])]
        arrays = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in arrays]
        got = gradients(*arrays[:2], jnp.asarray(sizes), arrays[2], "pallas_gpu", matrices)
        want = gradients(*(a.astype(jnp.float32) for a in arrays[:2]), jnp.asarray(sizes), arrays[2], "reference")
        for x, y in zip(got, want, strict=True):
            assert relative_error(x, y) < 1e-2
            np.testing.assert_array_equal(x[y == 0], 0)


@pytest.mark.quick
def test_errors_name_the_argument():
    lhs, rhs, _ = map(jnp.asarray, inputs())
    sizes = jnp.asarray(SIZES["uneven"])
    for message, arguments in {
        r"rhs.shape = \(5, 9, 12\): must be \[E, K, N\] with K = 12": (lhs, rhs.swapaxes(1, 2), sizes),
        r"group_sizes.shape = \(4,\): must be \(5,\)": (lhs, rhs, sizes[:4]),
        "group_sizes.dtype = float32: must be an integer type": (lhs, rhs, sizes.astype(jnp.float32)),
    }.items():
        with pytest.raises(ValueError, match=message):
            api.grouped_matmul(*arguments)
    with pytest.raises(ValueError, match=r"rhs.shape = \(4, 12, 9\): must be \(5, 12, 9\)"):
        api.grouped_matmul(lhs, (rhs, rhs[:4]), sizes)
    with pytest.raises(ValueError, match="'cudnn' cannot run grouped_matmul: there is no cudnn kernel"):
        api.grouped_matmul(lhs, rhs, sizes, implementation="cudnn")


@pytest.mark.quick
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_several_matrices_give_their_products_side_by_side(implementation):
    lhs, rhs, cotangent = map(jnp.asarray, inputs())
    got = gradients(lhs, rhs, jnp.asarray(SIZES["uneven"]), cotangent, implementation, matrices=3)
    for x, y in zip(got, exact(lhs, rhs, SIZES["uneven"], cotangent), strict=True):
        assert relative_error(x, y) < 1e-6
