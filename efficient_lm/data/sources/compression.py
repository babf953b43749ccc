"""Task 'compression': T // 2 random symbols, then questions for the symbol at each place, in random order.

The state has to hold the whole row. The compression task of 2403.17844 asks the same of one summary vector, through a
decoder of its own; here the model answers itself. Tokens: `symbols` symbols, then one token for each place.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.synthetic import random_order
from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task
from efficient_lm.schema import setting


@task("compression")
@dataclass(frozen=True)
class Compression(Task):
    symbols: int = setting(16, "different symbols", low=2)

    def answers(self, V):
        return self.symbols

    def check(self, T, V):
        need_length(T >= 2, T, "compression needs at least 2")
        need_vocabulary(
            V >= self.symbols + T // 2,
            V,
            f"compression of {T // 2} places and {self.symbols} symbols needs at least {self.symbols + T // 2}",
        )

    def n_uniforms(self, T, V):
        return 2 * (T // 2)

    def make(self, u, T, V):
        L = T // 2
        symbols = (u[:, :L] * self.symbols).astype(np.int64)
        asked = random_order(u[:, L:])
        inputs, targets = np.zeros((len(u), T), np.int64), np.zeros((len(u), T), np.int64)
        inputs[:, :L] = symbols
        inputs[:, L : 2 * L] = self.symbols + asked
        targets[:, L : 2 * L] = np.take_along_axis(symbols, asked, axis=1)
        counts = np.zeros((len(u), T), bool)
        counts[:, L : 2 * L] = True
        return inputs, targets, counts
