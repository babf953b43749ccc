"""Source 'copy': L random symbols, a delimiter, the same L symbols again, with L = T // 2.

Only the second copy counts (loss_mask). The delimiter is token vocab_size - 1. A model that copies reaches loss 0
(`loss_floor`); one that can't stays at log(vocab_size - 1) (`chance_loss`).
"""

import numpy as np

from efficient_lm.data.base import SOURCES
from efficient_lm.data.synthetic import need, synthetic_rows


@SOURCES.register("copy")
def open_rows(cfg, *, seq_len, seed, split):
    V, length = cfg.vocab_size, seq_len // 2
    need(V >= 3, "config.data.vocab_size", V, "copy needs at least 3")
    need(seq_len >= 2, "config.train.seq_len", seq_len, "copy needs at least 2")

    def make(u):
        symbols = (u * (V - 1)).astype(np.int64)
        tokens = np.full((len(u), seq_len + 1), V - 1)  # an odd T leaves one delimiter, uncounted, at the end
        tokens[:, :length] = symbols
        tokens[:, length + 1 : 2 * length + 1] = symbols
        counts = np.zeros((len(u), seq_len), bool)
        counts[:, length : 2 * length] = True
        return tokens, counts

    facts = {"loss_floor": 0.0, "chance_loss": float(np.log(V - 1)), "counted_per_row": length}
    return synthetic_rows(
        "copy", cfg, seq_len=seq_len, seed=seed, split=split, n_uniforms=length, make=make, facts=facts
    )
