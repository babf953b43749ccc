"""Source 'assoc_recall': multi-query associative recall (the task of arXiv 2312.04927, MQAR).

A row lists N different keys, each followed by its value, then asks for them in random order: k1 v1 ... kN vN, then
keys again with their values. Keys are tokens 0 .. V/2 - 1, values the rest, drawn independently per pair. N is T // 4
or all keys if there are fewer; then keys are asked again, in the same order, until the row is full. Only the answers
count (loss_mask): the loss is 0 with perfect recall (`loss_floor`) and log(number of values) for a model that knows
the format only (`chance_loss`).
"""

import numpy as np

from efficient_lm.data.base import SOURCES
from efficient_lm.data.synthetic import need, random_order, synthetic_rows


@SOURCES.register("assoc_recall")
def open_rows(cfg, *, seq_len, seed, split):
    V = cfg.vocab_size
    need(V >= 4, "config.data.vocab_size", V, "assoc_recall needs at least 4")
    need(seq_len >= 4, "config.train.seq_len", seq_len, "assoc_recall needs at least 4")
    n_keys = V // 2
    n_values = V - n_keys
    pairs = min(seq_len // 4, n_keys)
    asked = (seq_len + 1 - 2 * pairs) // 2
    end = 2 * pairs + 2 * asked

    def make(u):
        keys = random_order(u[:, :n_keys])[:, :pairs]
        values = n_keys + (u[:, n_keys : n_keys + pairs] * n_values).astype(np.int64)
        order = random_order(u[:, n_keys + pairs :])
        order = np.take_along_axis(order, np.arange(asked)[None, :] % pairs, axis=1)
        tokens = np.zeros((len(u), seq_len + 1), np.int64)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        tokens[:, 2 * pairs : end : 2] = np.take_along_axis(keys, order, axis=1)
        tokens[:, 2 * pairs + 1 : end : 2] = np.take_along_axis(values, order, axis=1)
        counts = np.zeros((len(u), seq_len), bool)
        counts[:, 2 * pairs : end - 1 : 2] = True
        return tokens, counts

    return synthetic_rows(
        "assoc_recall",
        cfg,
        seq_len=seq_len,
        seed=seed,
        split=split,
        n_uniforms=n_keys + 2 * pairs,
        make=make,
        facts={"loss_floor": 0.0, "chance_loss": float(np.log(n_values)), "pairs": pairs, "counted_per_row": asked},
    )
