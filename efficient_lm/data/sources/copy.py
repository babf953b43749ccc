"""Task 'copy': L random symbols, a delimiter, the same L symbols again, with L = T // 2.

Only the second copy counts. The delimiter is token V - 1. As in a text, the second copy is fed back as input.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task


@task("copy")
@dataclass(frozen=True)
class Copy(Task):
    for_text = True

    def answers(self, V):
        return V - 1

    def check(self, T, V):
        need_vocabulary(V >= 3, V, "copy needs at least 3")
        need_length(T >= 2, T, "copy needs at least 2")

    def n_uniforms(self, T, V):
        return T // 2

    def make(self, u, T, V):
        length = T // 2
        symbols = (u * (V - 1)).astype(np.int64)
        tokens = np.full((len(u), T + 1), V - 1)  # an odd T leaves one delimiter, uncounted, at the end
        tokens[:, :length] = symbols
        tokens[:, length + 1 : 2 * length + 1] = symbols
        counts = np.zeros((len(u), T), bool)
        counts[:, length : 2 * length] = True
        return tokens[:, :-1], tokens[:, 1:], counts
