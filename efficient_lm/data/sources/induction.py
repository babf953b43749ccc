"""Task 'induction' (induction heads, 2312.00752): a special token once among random symbols, and again at the end.

The answer at the end is the symbol that followed the special token the first time. Symbols are tokens 0 .. V - 2.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task


@task("induction")
@dataclass(frozen=True)
class Induction(Task):
    for_text = True

    def answers(self, V):
        return V - 1

    def check(self, T, V):
        need_vocabulary(V >= 3, V, "induction needs at least 3")
        need_length(T >= 3, T, "induction needs at least 3")

    def n_uniforms(self, T, V):
        return T

    def make(self, u, T, V):
        rows = np.arange(len(u))
        inputs = (u * (V - 1)).astype(np.int64)
        place = (u[:, -1] * (T - 2)).astype(np.int64)
        inputs[rows, place] = V - 1
        inputs[:, -1] = V - 1
        targets, counts = np.zeros((len(u), T), np.int64), np.zeros((len(u), T), bool)
        targets[:, -1] = inputs[rows, place + 1]
        counts[:, -1] = True
        return inputs, targets, counts
