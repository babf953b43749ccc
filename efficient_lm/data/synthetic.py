"""Shared by the synthetic sources: rows made on the fly from (source, seed, split, row number)."""

import math

import numpy as np

from efficient_lm.data.base import ROW_DTYPES, Rows
from efficient_lm.data.random_access import key, uniforms
from efficient_lm.schema import ConfigError


def synthetic_rows(name, cfg, *, vocab_size, seq_len, seed, split, n_uniforms, make, facts) -> Rows:
    """Rows of a synthetic source.

    make: uniforms float64 [R, n_uniforms] -> (inputs [R, T], targets [R, T], counts [R, T] bool or None). A row is one
      document; `counts` marks the targets that enter the loss (None: all).
    facts: what goes into the spec, for example `loss_floor` in nats per counted token.
    Validation rows are the same for every seed.
    """
    need(cfg.pack != "bos", "config.data.pack", cfg.pack, "for text only; synthetic rows take 'documents' or 'stream'")
    address = key(name, split, seed if split == "train" else 0)
    positions = np.arange(seq_len, dtype=np.int32)

    def rows(ids):
        inputs, targets, counts = make(uniforms(address, ids, n_uniforms))
        shape = (len(ids), seq_len)
        batch = {
            "inputs": inputs,
            "targets": targets,
            "segment_ids": np.ones(shape),
            "positions": np.broadcast_to(positions, shape),
            "loss_mask": np.ones(shape) if counts is None else counts,
        }
        return {name: np.array(array, ROW_DTYPES[name]) for name, array in batch.items()}

    spec = {
        "name": name,
        "about": {"what": "synthetic"},
        "tokenizer": {"name": "none", "hash": "none", "vocab_size": vocab_size, "eos_id": None},
        "tokenizer_hash": "none",
        "vocab_size": vocab_size,
        "n_tokens": None,
        "bytes_per_token": 1.0,
        "split": split,
        **facts,
    }
    n_rows = None if split == "train" else math.ceil(cfg.validation_tokens / seq_len)
    return Rows(rows=rows, n_rows=n_rows, spec=spec, vocab_size=vocab_size)


def need(condition, field, value, allowed):
    """ConfigError `field = value: allowed` unless `condition`."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {allowed}")


def random_order(u):
    """A random permutation per row: [R, n] uniforms -> int64 [R, n]."""
    return np.argsort(u, axis=1, kind="stable")


def lay_out(units, used, seq_len):
    """Units of several tokens one after the other: [R, U, m], used [R, U, m] bool -> [R, T], cut off at T.

    Every row must have at least T used entries. Returns the tokens and the flat index [R, T] into U x m of each.
    """
    flat = used.reshape(len(used), -1)
    index = np.argsort(~flat, axis=1, kind="stable")[:, :seq_len]
    return np.take_along_axis(units.reshape(len(units), -1), index, axis=1), index
