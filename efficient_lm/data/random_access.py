"""Random numbers by address: the same (key, row, column) always gives the same number, in any order.

numpy's Generator distributions may change between versions and a generator per row is slow, so synthetic sources
draw from a counter-based hash: the SplitMix64 output function (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195)
applied to row and column counters.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts) -> int:
    """A 64-bit key from names and numbers."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(key: int, rows, n: int) -> np.ndarray:
    """float64 [R, n] in [0, 1): n numbers for each row id of `rows` (int [R])."""
    rows = np.asarray(rows).astype(np.uint64)
    with np.errstate(over="ignore"):
        start = _mix(_mix(rows * _GOLDEN + np.uint64(key)) + np.uint64(key))
        columns = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(start[:, None] + columns[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53
