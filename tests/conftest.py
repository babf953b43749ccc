"""Shared by all tests: 8 emulated CPU devices, persistent compile cache, strict rank promotion."""

import os
from pathlib import Path

# Before JAX starts: multi-device tests run on emulated devices.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
import pytest  # noqa: E402

MEMORY_MAPS = Path("/proc/self/maps")
MANY = 10_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Every program compiled for a CPU takes some memory maps; Linux allows 65530, and XLA crashes beyond."""
    yield
    if MEMORY_MAPS.exists() and len(MEMORY_MAPS.read_bytes().splitlines()) > MANY:
        jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compile():
    """For modules where compiling for a CPU takes most of the time: about a third less of it."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
