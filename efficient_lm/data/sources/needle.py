"""Task 'needle': key-value pairs hidden in a haystack of random tokens; the last tokens of the row are asked keys.

needles = 1 is the single needle, more are the multi-key form (with the others as distractors), queries > 1 the
multi-query form of RULER (2404.06654). The answer at an asked key is its value; it is not fed back. Keys are tokens
0 .. K - 1 with K = V // 4, values K .. 2 K - 1, the rest is hay.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.synthetic import lay_out, need, random_order
from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task
from efficient_lm.schema import setting


@task("needle")
@dataclass(frozen=True)
class Needle(Task):
    for_text = True

    needles: int = setting(1, "pairs in the haystack", low=1)
    queries: int = setting(1, "keys asked for at the end", low=1)
    depth: float = setting(-1.0, "place of the first asked needle, 0 = start, 1 = end; -1 = random", low=-1.0, high=1.0)

    def answers(self, V):
        return V // 4

    def check(self, T, V):
        path = "config.data.task."
        need_vocabulary(V >= 8, V, "needle needs at least 8")
        need(self.needles <= V // 4, f"{path}needles", self.needles, f"vocab_size {V} has {V // 4} keys")
        need(self.queries <= self.needles, f"{path}queries", self.queries, f"there are {self.needles} needles")
        need(self.depth == -1 or self.depth >= 0, f"{path}depth", self.depth, "must be -1 or in 0..1")
        least = 2 * self.needles + self.queries
        need_length(T >= least, T, f"needle with {self.needles} needles, {self.queries} queries needs at least {least}")

    def units(self, T):
        return T - self.queries - self.needles

    def n_uniforms(self, T, V):
        return V // 4 + self.needles + 2 * self.units(T)

    def make(self, u, T, V):
        K, N, U = V // 4, self.needles, self.units(T)
        keys = random_order(u[:, :K])[:, :N]
        values = K + (u[:, K : K + N] * K).astype(np.int64)
        hay, order = u[:, K + N : K + N + U], u[:, K + N + U :]
        units = np.zeros((len(u), U, 2), np.int64)
        units[..., 0] = 2 * K + (hay * (V - 2 * K)).astype(np.int64)
        units[:, :N, 0], units[:, :N, 1] = keys, values
        used = np.ones(units.shape, bool)
        used[:, N:, 1] = False
        order = random_order(order)  # the unit at each place; units 0 .. N - 1 are needles
        if self.depth >= 0:
            others = order[order != 0].reshape(len(u), U - 1)
            order = np.insert(others, round(self.depth * (U - 1)), 0, axis=1)
        units, used = (np.take_along_axis(a, order[..., None], 1) for a in (units, used))
        inputs, targets = np.zeros((len(u), T), np.int64), np.zeros((len(u), T), np.int64)
        inputs[:, : T - self.queries], _ = lay_out(units, used, T - self.queries)
        inputs[:, T - self.queries :] = keys[:, : self.queries]
        targets[:, T - self.queries :] = values[:, : self.queries]
        counts = np.zeros((len(u), T), bool)
        counts[:, T - self.queries :] = True
        return inputs, targets, counts
