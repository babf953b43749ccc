"""Where arrays live: a mesh with axes data, fsdp, tensor, and regex rules on parameter paths.

Parameters are split over `fsdp` and `tensor`, batches over `data` and `fsdp`. A rule names mesh axes for the last
dimensions of a parameter (the leading axis of scanned layers is never split); an axis that does not divide its
dimension is dropped, so every model runs on every mesh.
"""

import functools
import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_lm.schema import ConfigError
from pallas_kernels import partition

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (regex searched in the path, mesh axes of the last dimensions); the first match wins. Optimizer moments have the
# path of their parameter behind a prefix, so the same rules serve them. Matrices that write to the residual stream
# are split the other way round, so that a tensor-parallel block needs one reduction.
RULES = (
    (r"(embed|head)/table$", ("tensor", "fsdp")),
    (r"/experts/\w+/kernel$", ("fsdp", None, None)),
    (r"(^|/)(o|down|out|o_proj|out_proj)/kernel$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", "tensor")),
    (r"", ("fsdp", "tensor")),
)


def make_mesh(mesh, rows: int, devices=None) -> Mesh:
    """Mesh for a MeshConfig over `devices` (default: all), with rows (of a micro-batch) divisible by data x fsdp.

    When not all devices can be used, the largest number that can is, and a line says so. Raises ConfigError when
    there are fewer devices than fsdp x tensor.
    """
    devices = list(jax.devices() if devices is None else devices)
    unit = mesh.fsdp * mesh.tensor
    if unit > len(devices):
        raise ConfigError(
            f"config.mesh.fsdp x config.mesh.tensor = {unit}: must be at most the number of devices, {len(devices)}"
        )
    usable = [n for n in range(unit, len(devices) + 1, unit) if rows % (n // mesh.tensor) == 0]
    if not usable:
        raise ConfigError(f"config.mesh.fsdp = {mesh.fsdp}: must divide train.batch_size / train.grad_accum = {rows}")
    used = usable[-1]
    if jax.process_count() > 1 and jax.local_device_count() % mesh.tensor:
        raise ConfigError(
            f"config.mesh.tensor = {mesh.tensor}: must divide the devices of a host, {jax.local_device_count()}"
        )
    if jax.process_count() > 1 and used < len(devices):
        raise ConfigError(
            f"config.train.batch_size: {rows} rows per micro-batch don't split over {len(devices)} devices"
        )
    if used < len(devices):
        print(f"note: using {used} of {len(devices)} devices, since a micro-batch has {rows} rows")
    shape = (used // unit, mesh.fsdp, mesh.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:used])


def describe(mesh: Mesh) -> str:
    """'data 1 x fsdp 2 x tensor 1'."""
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items())


def path_of(key_path) -> str:
    """'params/embed/table' of a jax key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Partition of the array at `path`; scalars and vectors are replicated."""
    stacked = 1 if re.search(r"(^|/)pattern/", path) else 0
    trailing = len(shape) - stacked
    if trailing < 2:
        return PartitionSpec()
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    padded = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *[
            axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(padded, shape, strict=True)
        ]
    )


def place(tree, mesh: Mesh):
    """ShapeDtypeStructs like the arrays of `tree`, with the sharding that the rules give them."""

    def one(path, leaf):
        spec = spec_for(path_of(path), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp, behind `leading` unsplit axes."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH))


def residual_constraint(mesh: Mesh):
    """The function for LM(constrain=...): keeps the residual stream [B, T, d] split over the batch only.

    Without it the partitioner may split d over fsdp, like the parameters, and gather in every block.
    """
    if mesh.size == 1:
        return lambda x: x
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def split_kernels(function, mesh: Mesh):
    """`function` with the Pallas kernels that it traces split over `mesh`: rows as the batch, heads over tensor."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with partition.use_mesh(mesh, BATCH, ("tensor",)):
            return function(*args, **kwargs)

    return run


def any_host(flag: bool) -> bool:
    """Whether `flag` is set on any host. All hosts must ask at the same step, since they wait for each other."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This host's part of a batch as global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
