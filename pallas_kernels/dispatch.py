"""Which implementation of an operator runs: explicit choice, or the best one that can serve the call.

An accelerator implementation is a module `pallas_kernels.<tpu|gpu>.<operator>`, or for cuDNN
`pallas_kernels.gpu.cudnn_<operator>`, with a function named like the operator and

    supports(**arguments) -> None | str

called with every array argument of the operator by name (`jax.ShapeDtypeStruct`, or None where absent) and the
static options. It returns None when the call can be served, else one line saying why not. `reference` and `xla`
serve every call. The TPU kernels run anywhere when asked for (interpreted off a TPU), the GPU kernels on a GPU only.
"""
import importlib
import importlib.util

import jax

from pallas_kernels import partition

# name: (platform, module of its kernel for an operator)
_KERNELS = {
    "pallas_tpu": ("tpu", "pallas_kernels.tpu.{}"),
    "pallas_gpu": ("gpu", "pallas_kernels.gpu.{}"),
    "cudnn": ("gpu", "pallas_kernels.gpu.cudnn_{}"),
}
IMPLEMENTATIONS = ("reference", "xla", *_KERNELS)


def _load(op, implementation):
    """(operator function, supports function), or (None, reason) when this package has no such kernel."""
    if implementation == "reference":
        return getattr(importlib.import_module("pallas_kernels.reference"), op), None
    if implementation == "xla":
        return getattr(importlib.import_module(f"pallas_kernels.xla.{op}"), op), None
    platform, module = _KERNELS[implementation]
    name = module.format(op)
    if importlib.util.find_spec(name) is None:
        return None, f"there is no {implementation} kernel for {op}"
    if platform == "gpu" and jax.default_backend() != "gpu":
        return None, f"needs an NVIDIA GPU, the default backend is {jax.default_backend()}"
    module = importlib.import_module(name)
    return getattr(module, op), module.supports


def _structs(arguments):
    """Arrays as ShapeDtypeStructs, the rest unchanged."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for name, x in arguments.items()}


def choose(op, implementation, arguments):
    """(name, function) for operator `op` called with `arguments` (dict by name).

    `implementation` None: the kernels of the default platform when they support the call, else 'xla'. With several
    devices Pallas ones are taken inside `jax.shard_map` and `partition.use_mesh` only, since XLA partitions no Pallas
    call (cuDNN's it does).
    Raises ValueError when an explicit choice is unknown or cannot serve the call, with the reason.
    """
    if implementation is None:
        return automatic(op, arguments) or ("xla", _load(op, "xla")[0])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r}: allowed are None and {', '.join(IMPLEMENTATIONS)}")
    function, supports = _load(op, implementation)
    reason = supports if function is None else supports and supports(**_structs(arguments))
    if reason is not None:
        raise ValueError(f"implementation = {implementation!r} cannot run {op}: {reason}")
    return implementation, _split(op, implementation, function)


def automatic(op, arguments):
    """(name, function) of the default platform's kernel for this call of `op`, or None."""
    for name, (platform, _) in _KERNELS.items():
        if platform == jax.default_backend() and (name == "cudnn" or partition.per_device(op)):
            function, supports = _load(op, name)
            if function is not None and supports(**_structs(arguments)) is None:
                return name, _split(op, name, function)
    return None


def _split(op, implementation, function):
    return partition.split(op, function) if implementation.startswith("pallas") else function
