"""What a data source is: a numbered set of rows.

A source is one file in `efficient_lm/data/sources` with one function

    @SOURCES.register("name")
    def open_rows(cfg, *, seq_len, seed, split) -> Rows

where `cfg` is a `DataConfig` and `split` is "train" or "validation". Everything else (order, batches, hosts,
padding of the last validation batch) is shared and lives in `efficient_lm.data.batches`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from efficient_lm.registry import Registry

SOURCES = Registry("data source")

ROW_DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to training rows.

    rows: ids int64 [R] -> dict of arrays [R, T] with the keys and dtypes of `ROW_DTYPES`. Row i must not depend
      on which other rows are asked for.
    n_rows: rows in one epoch, or None when the source generates new ones for ever.
    spec: JSON-able facts: name, tokenizer, vocab_size, n_tokens, bytes_per_token, and what the source adds
      (for example `loss_floor`, nats per token).
    bytes_per_token: bytes of text per token of this split; nats per token / (ln 2 * this) = bits per byte.
    tokenizer: encodes and decodes text, or None for synthetic tokens.
    """

    rows: Callable[[np.ndarray], dict[str, np.ndarray]]
    n_rows: int | None
    spec: dict[str, Any]
    vocab_size: int
    bytes_per_token: float = 1.0
    tokenizer: Any = None
