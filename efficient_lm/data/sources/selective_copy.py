"""Task 'selective_copy' (2312.00752, 2403.17844): random symbols scattered among blanks, then asked for in order.

The row ends in n markers; the answer at the i-th marker is the i-th symbol. Symbols are tokens 0 .. V - 3, blank is
V - 2, the marker V - 1.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.synthetic import random_order
from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task
from efficient_lm.schema import setting


@task("selective_copy")
@dataclass(frozen=True)
class SelectiveCopy(Task):
    symbols: int = setting(8, "symbols to copy", low=1)

    def answers(self, V):
        return V - 2

    def check(self, T, V):
        need_vocabulary(V >= 4, V, "selective_copy needs at least 4")
        need_length(
            T >= 2 * self.symbols, T, f"selective_copy of {self.symbols} symbols needs at least {2 * self.symbols}"
        )

    def n_uniforms(self, T, V):
        return T

    def make(self, u, T, V):
        n = self.symbols
        symbols = (u[:, :n] * (V - 2)).astype(np.int64)
        places = np.sort(random_order(u[:, n:])[:, :n], axis=1)
        inputs, targets = np.full((len(u), T), V - 2), np.zeros((len(u), T), np.int64)
        np.put_along_axis(inputs, places, symbols, axis=1)
        inputs[:, T - n :] = V - 1
        targets[:, T - n :] = symbols
        counts = np.zeros((len(u), T), bool)
        counts[:, T - n :] = True
        return inputs, targets, counts
