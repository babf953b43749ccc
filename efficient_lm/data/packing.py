"""Rows of T tokens cut from a token stream, with document resets.

The stream of a split is cut into windows of T + 1 tokens that overlap by one, so every token is a target once per
epoch (the last partial window is left out). Documents are packed by this same cut ("concatenate and chunk") instead
of best-fit bins (arXiv 2404.10830): no padding, so each step trains on B*T tokens less the document ends, which is
what scaling laws count; every row costs the same; a row needs only arithmetic on offsets, so random access and
resume are free. What it loses is context where a document is cut at a row border.

pack = "documents": segment_ids count documents within the row from 1, positions restart at each of them, and the
  last token of a document isn't asked to predict the first token of the next one (loss_mask 0).
pack = "stream": one segment a row; the model reads on over document borders.
pack = "bos": as "stream", and each row begins with one more token, always the same: the first id that the tokenizer
  leaves free, so that the vocabulary grows by one. The row's T targets are then the window's first T tokens. Attention
  sinks gather on such a token (2410.10781, 2410.13835). efficient_lm.generate puts it before a
  prompt; evaluations on tasks have none.
"""

import numpy as np

from efficient_lm.schema import ConfigError

VALIDATION_BLOCK = 2048


class TokenWindows:
    """`rows(ids)` for windows of a token stream.

    tokens: [N] unsigned ints; offsets: int64 [documents + 1], starts of the split's documents in `tokens` and the
    end of the last. Windows lie inside offsets[0] .. offsets[-1].
    bos: id of the token of pack = "bos".
    limit: keep only about this many tokens, in blocks spread evenly over the split. Blocks are VALIDATION_BLOCK
      tokens (or T, if longer), so that every T that divides VALIDATION_BLOCK sees the same tokens.
    """

    def __init__(self, tokens, offsets, seq_len: int, pack: str, limit: int | None = None, bos: int = 0):
        self._tokens = tokens
        self._offsets = offsets
        self._seq_len = seq_len
        self._documents = pack == "documents"
        self._bos = bos if pack == "bos" else None
        n = int(offsets[-1] - offsets[0])
        if n < seq_len + 1:
            raise ConfigError(f"seq_len = {seq_len}: this split has {n} tokens and needs at least seq_len + 1")
        self._views = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
        self._blocks = None
        self.n_rows = (n - 1) // seq_len
        if limit is not None and limit < self.n_rows * seq_len:
            self._per_block = max(1, min(VALIDATION_BLOCK, limit) // seq_len)
            size = self._per_block * seq_len
            available = (n - 1) // size
            wanted = min(-(-limit // size), available)
            self._blocks = np.arange(wanted) * available // wanted * size
            self.n_rows = wanted * self._per_block

    def rows(self, ids) -> dict[str, np.ndarray]:
        """ids int64 [R] -> the arrays of a batch, [R, T]."""
        T = self._seq_len
        if self._blocks is None:
            starts = ids * T
        else:
            starts = self._blocks[ids // self._per_block] + ids % self._per_block * T
        starts = starts + self._offsets[0]
        window = self._views[starts]
        shape = (len(ids), T)
        inputs, targets = window[:, :-1].astype(np.int32), window[:, 1:].astype(np.int32)
        if self._bos is not None:
            targets, inputs = inputs, np.concatenate([np.full((len(ids), 1), self._bos, np.int32), inputs[:, :-1]], 1)
        batch = {
            "inputs": inputs,
            "targets": targets,
            "segment_ids": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), shape).copy(),
            "loss_mask": np.ones(shape, np.float32),
        }
        if self._documents:
            self._reset(batch, starts)
        return batch

    def _reset(self, batch, starts):
        """Write segment ids, positions and loss mask for the document starts at columns 1..T of each row."""
        T = self._seq_len
        first = np.searchsorted(self._offsets, starts, side="right")
        last = np.searchsorted(self._offsets, starts + T, side="right")
        counts = last - first
        row = np.repeat(np.arange(len(starts)), counts)
        # Document numbers first[r] .. last[r] - 1 of each row, one after another.
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        column = self._offsets[number] - starts[row]
        batch["loss_mask"][row, column - 1] = 0
        inside = column < T
        row, column = row[inside], column[inside]
        touched = np.unique(row)
        begins = np.zeros((len(starts), T), np.int32)
        begins[row, column] = 1
        begins = begins[touched]
        steps = np.arange(T, dtype=np.int32)
        batch["segment_ids"][touched] += np.cumsum(begins, axis=1, dtype=np.int32)
        batch["positions"][touched] = steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1)
