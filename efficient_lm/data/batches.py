"""Batches by number on top of a source's rows, through a grain `MapDataset`.

Batch k is a pure function of (source, seed, k): to resume at step k, ask for `source[k]`. The global batch does not
depend on how many hosts read it; host h gets rows h*B/H .. (h+1)*B/H of it.

Order: each epoch visits every row once, shuffled; epochs are shuffled differently (grain's counter-based
permutation, so nothing of the size of the corpus is held in memory). Validation rows come in a fixed order that
depends neither on the seed nor on the batch size; the last batch is filled up with padding rows (segment id 0, loss
mask 0), so each validation token counts once when losses are summed over the mask.
"""

import functools
import importlib
import pkgutil

import numpy as np

from efficient_lm.data import sources
from efficient_lm.data.base import SOURCES
from efficient_lm.schema import ConfigError

ENDLESS = 2**62  # rows; lengths must fit an index even before batching


class Batches:
    """Sequence of batches: `batches[k]` is a dict of arrays [B / host_count, T]; see `open_data`."""

    def __init__(self, rows, *, batch_size, seed, shuffle, host_index=0, host_count=1):
        if batch_size < 1 or batch_size % host_count:
            raise ConfigError(f"batch_size = {batch_size}: must be a positive multiple of {host_count} hosts")
        if not 0 <= host_index < host_count:
            raise ConfigError(f"host_index = {host_index}: must be in 0..{host_count - 1}")
        self._rows = rows
        per_host = batch_size // host_count
        self._host = slice(host_index * per_host, (host_index + 1) * per_host)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self.spec = rows.spec
        self.vocab_size = rows.vocab_size
        self.bytes_per_token = rows.bytes_per_token
        self.tokenizer = rows.tokenizer

    @functools.cached_property
    def dataset(self):
        """The grain `MapDataset` behind this object, for grain's own prefetching iterators."""
        import grain  # takes seconds to import (it brings JAX), and listing sources must stay fast

        rows = self._rows
        if rows.n_rows is None:
            order = grain.MapDataset.range(ENDLESS)
        elif self._shuffle:
            order = grain.MapDataset.range(rows.n_rows).seed(self._seed).shuffle().repeat(ENDLESS // rows.n_rows)
        else:
            order = grain.MapDataset.range(-(-rows.n_rows // self._batch_size) * self._batch_size)
        return order.batch(self._batch_size, batch_fn=np.asarray).map(self._load)

    def _load(self, ids):
        ids = ids[self._host]
        real = ids if self._rows.n_rows is None else ids[ids < self._rows.n_rows]
        batch = self._rows.rows(real)
        missing = len(ids) - len(real)
        if missing:
            pad = ((0, missing), (0, 0))
            batch = {name: np.pad(array, pad) for name, array in batch.items()}
        return batch

    def __len__(self):
        """Validation: number of batches, the padded last one included. Training has no end: a huge number."""
        return len(self.dataset)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k}: must be in 0..{len(self) - 1}")
        return self.dataset[k]

    def __iter__(self):
        return (self[k] for k in range(len(self)))


def load_sources():
    """Import every file of `efficient_lm.data.sources`, which fills the registry."""
    for module in pkgutil.iter_modules(sources.__path__):
        importlib.import_module(f"{sources.__name__}.{module.name}")
    return SOURCES


def open_data(cfg, *, seq_len, batch_size, seed, split, host_index=0, host_count=1) -> Batches:
    """Batches of the source that `cfg` (a DataConfig) names.

    Returns an object with `[k]`, `len`, `.spec` (JSON-able), `.vocab_size`, `.bytes_per_token` and `.tokenizer`.
    A batch has inputs, targets int32 [B, T]; segment_ids int32 [B, T] (from 1 in each row; 0 = padding); positions
    int32 [B, T] (from 0 at each document start and at each row start); loss_mask float32 [B, T] (1 where the target
    counts). With host_count H the rows are this host's B/H rows of the same global batch.

    Args:
      seq_len: T, tokens per row.
      batch_size: B, rows per global batch.
      seed: order of training rows, or which synthetic rows are made. Validation ignores it.
      split: "train" (no end) or "validation" (`cfg.validation_tokens` tokens, the same for every seed and B).
    Raises:
      ConfigError: one line naming field, value and what is allowed.
    """
    if split not in ("train", "validation"):
        raise ConfigError(f"split = {split!r}: must be 'train' or 'validation'")
    open_rows = load_sources().find(cfg.source, "config.data.source")
    rows = open_rows(cfg, seq_len=seq_len, seed=seed, split=split)
    return Batches(
        rows,
        batch_size=batch_size,
        seed=seed,
        shuffle=split == "train",
        host_index=host_index,
        host_count=host_count,
    )
