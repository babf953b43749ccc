"""Facts about accelerators: peak matmul throughput of known ones, for MFU, and where compiled programs are kept."""

import os
import re
import socket

import jax

from efficient_lm.schema import ConfigError

# Dense (no sparsity) peak FLOP/s by (device_kind prefix, compute dtype), from the vendors' data sheets. The longest
# matching prefix wins. TPU v2 and v3 show one device per core, so they get half of a chip. float32 is listed only
# where one number is honest: JAX multiplies float32 as TF32 on NVIDIA or in bf16 passes on TPU, by precision flag.
PEAK_FLOPS = {
    ("NVIDIA B200", "bfloat16"): 2250e12,
    ("NVIDIA H200", "bfloat16"): 989.4e12,
    ("NVIDIA H100 NVL", "bfloat16"): 835.5e12,
    ("NVIDIA H100 PCIe", "bfloat16"): 756e12,
    ("NVIDIA H100 80GB HBM3", "bfloat16"): 989.4e12,
    ("NVIDIA A100", "bfloat16"): 312e12,
    ("NVIDIA L40S", "bfloat16"): 362e12,
    ("NVIDIA L4", "bfloat16"): 121e12,
    ("TPU v2", "bfloat16"): 22.5e12,
    ("TPU v3", "bfloat16"): 61.5e12,
    ("TPU v4", "bfloat16"): 275e12,
    ("TPU v5 lite", "bfloat16"): 197e12,
    ("TPU v5", "bfloat16"): 459e12,
    ("TPU v6 lite", "bfloat16"): 918e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, or None when it is not in the table."""
    known = [kind for kind, of in PEAK_FLOPS if of == dtype and _matches(device_kind, kind)]
    return PEAK_FLOPS[max(known, key=len), dtype] if known else None


def _matches(device_kind, prefix):
    # 'NVIDIA L4' must not serve 'NVIDIA L40', nor 'TPU v4' 'TPU v4 lite'; a memory size or form factor may follow.
    rest = device_kind.removeprefix(prefix)
    return device_kind.startswith(prefix) and (not rest or rest[0] in " -") and "lite" not in rest


def require_devices() -> None:
    """Raises ConfigError where JAX finds no device of the kind that is asked for."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # JAX asserts where the platform is known but has no device
        raise ConfigError(
            f"JAX_PLATFORMS = {jax.config.jax_platforms!r}: JAX finds no such device here; set it to 'cpu', or leave "
            "it unset for what there is (GPUs need the extra 'gpu', TPUs 'tpu')"
        ) from None


def enable_compile_cache() -> None:
    """Keep compiled programs on disk: in $JAX_COMPILATION_CACHE_DIR, or the user's cache directory."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "efficient_lm", "jax"))
    # The default keeps only programs that took a second to compile; a small model has many that take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def join_hosts(how: str) -> None:
    """Join the other processes of a run: `how` is 'auto' (jax finds a SLURM or MPI job, a TPU pod) or what names them.

    'ADDRESS:PORT,INDEX,COUNT': where process 0 listens, the number of this process, how many there are. Call it before
    anything else touches JAX. Raises ConfigError.
    """
    if how == "auto":
        try:
            return jax.distributed.initialize()
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"--distributed: no cluster was found ({reason}); give ADDRESS:PORT,INDEX,COUNT"
            ) from None
    address, *numbers = how.split(",")
    if not re.fullmatch(r".+:\d+", address) or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ConfigError(f"--distributed = {how!r}: must be ADDRESS:PORT,INDEX,COUNT, as in 10.0.0.1:9876,0,2")
    index, count = map(int, numbers)
    if index >= count:
        raise ConfigError(f"--distributed = {how!r}: the index must be from 0 to {count - 1}")
    jax.distributed.initialize(address, num_processes=count, process_id=index)


def compile_quickly(mesh) -> dict:
    """Compiler options for a function that runs once: without LLVM passes a CPU compiles it in a third of the time."""
    return {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}


def describe(mesh) -> dict:
    """What a mesh consists of, for run.json."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "n_devices": mesh.size,
        "host": socket.gethostname(),
    }
