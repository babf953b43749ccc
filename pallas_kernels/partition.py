"""Pallas kernels on several devices. XLA partitions no Pallas call but gathers its arguments; here `jax.shard_map`
cuts them, as the recurrences are independent over batch and heads. Time stays whole.

    with partition.use_mesh(mesh, batch_axes=("data", "fsdp"), head_axes=("tensor",)):
        ...                      # whatever is traced here runs Pallas kernels on each device's rows and heads
"""

import contextlib
import contextvars
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

OPERATORS = ("linear_attention", "normalised_linear_attention", "delta_rule", "dplr", "mlstm", "diagonal_scan",
             "attention")
_TOKENS = ("batch", None, "heads")
# What the axes of an argument are; further ones are whole. The channels of a diagonal scan count as heads.
_PER_TOKEN = ("q", "k", "v", "a", "b", "beta", "log_decay", "log_forget", "input_gate", "forget_gate", "x")
_LAYOUT = dict.fromkeys(_PER_TOKEN, _TOKENS) | {
    "initial_state": ("batch", "heads"),  # each array of it
    "segment_ids": ("batch",),
    "sinks": ("heads",),
}


class _Axes(NamedTuple):
    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]


_axes = contextvars.ContextVar("axes", default=None)


@contextlib.contextmanager
def use_mesh(mesh, batch_axes, head_axes=()):
    """While tracing inside: Pallas kernels run per device, rows split over `batch_axes`, heads over `head_axes`.

    An axis whose size does not divide the rows or heads of a call leaves them whole on each of its devices.
    """
    token = _axes.set(_Axes(mesh, tuple(batch_axes), tuple(head_axes)))
    try:
        # JAX keys its caches of traces on this mesh, so that none made inside is taken outside.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _axes.reset(token)


def current_axes():
    """(mesh, batch axes, head axes) of `use_mesh`; None outside of it and inside `jax.shard_map`."""
    return None if _inside_shard_map() else _axes.get()


def _inside_shard_map():
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def per_device(op):
    """Whether a Pallas kernel of `op` called here would get one device's part of its arguments."""
    return jax.device_count() == 1 or _inside_shard_map() or (op in OPERATORS and _axes.get() is not None)


def split(op, function):
    """`function`, an implementation of `op`, on each device's part where `use_mesh` says so; else as it is."""
    axes = _axes.get()
    if axes is None or axes.mesh.size == 1 or op not in OPERATORS or _inside_shard_map():
        return function

    def run(**arguments):
        arrays = {name: x for name, x in arguments.items() if hasattr(x, "shape") or isinstance(x, tuple)}
        options = {name: x for name, x in arguments.items() if name not in arrays}
        names = _divisible(axes, arrays)
        specs = {name: _spec(name, x, names) for name, x in arrays.items()}
        tokens, state = (PartitionSpec(*(names.get(axis) for axis in layout)) for layout in (_TOKENS, _TOKENS[::2]))
        return jax.shard_map(
            lambda arrays: function(**arrays, **options),
            mesh=axes.mesh,
            in_specs=(specs,),
            out_specs=tokens if op == "attention" else (tokens, state),
            check_vma=False,  # Pallas calls don't say over which axes their results vary
        )(arrays)

    return run


def _divisible(axes, arrays):
    """{"batch": mesh axes, "heads": mesh axes}, without those that do not divide their dimension."""
    tokens = [x.shape for name, x in arrays.items() if _layout(name, x) == _TOKENS]
    # A single head that serves all others (multi-query attention, B and C of Mamba-2) stays whole.
    heads = max(shape[2] for shape in tokens), *(shape[2] for shape in tokens if shape[2] > 1)
    counts = {"batch": [tokens[0][0]], "heads": heads}
    sizes = {name: math.prod(axes.mesh.shape[axis] for axis in getattr(axes, name)) for name in counts}
    return {name: getattr(axes, name) for name in counts if all(n % sizes[name] == 0 for n in counts[name])}


def _layout(name, x):
    return ("heads",) if name == "log_decay" and x.ndim == 1 else _LAYOUT[name]


def _spec(name, x, names):
    layout = _layout(name, x)
    if layout == _TOKENS and x.shape[2] == 1:
        layout = ("batch",)
    return PartitionSpec(*(names.get(axis) for axis in layout))
