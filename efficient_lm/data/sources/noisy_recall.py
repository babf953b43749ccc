"""Task 'noisy_recall' (2403.17844): pairs of key and value that come again, and noise; 0 noise = in-context recall.

Pairs follow each other, each with one of K keys, which keeps its value within a row. Tokens without meaning stand
between them. Wherever a key comes again the answer is its value, which then follows as input, as in a
text. Keys are tokens 0 .. K - 1, then come as many noise tokens (none with noise 0), the rest are values.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.synthetic import lay_out, random_order
from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task
from efficient_lm.schema import setting


@task("noisy_recall")
@dataclass(frozen=True)
class NoisyRecall(Task):
    for_text = True

    keys: int = setting(8, "keys", low=1)
    noise: float = setting(0.2, "share of the row that is noise", low=0.0, high=0.9)

    def first_value(self):
        return (2 if self.noise else 1) * self.keys

    def answers(self, V):
        return V - self.first_value()

    def check(self, T, V):
        first = self.first_value()
        need_vocabulary(first + 2 <= V, V, f"noisy_recall with {self.keys} keys needs at least {first + 2}")
        _, pairs = self.sizes(T)
        need_length(pairs > self.keys, T, f"noisy_recall has {pairs} pairs in it, but {self.keys} keys")

    def sizes(self, T):
        """(noise tokens, pairs) of a row."""
        noise = round(self.noise * T)
        return noise, -(-(T - noise) // 2)

    def n_uniforms(self, T, V):
        noise, pairs = self.sizes(T)
        return self.keys + 2 * (noise + pairs)

    def make(self, u, T, V):
        K, (noise, pairs) = self.keys, self.sizes(T)
        U = noise + pairs
        values = self.first_value() + (u[:, :K] * self.answers(V)).astype(np.int64)
        keys = (u[:, K : K + U] * K).astype(np.int64)
        is_pair = random_order(u[:, K + U :]) < pairs
        units = np.stack([np.where(is_pair, keys, K + keys), np.take_along_axis(values, keys, 1)], axis=-1)
        used = np.stack([np.ones_like(is_pair), is_pair], axis=-1)
        inputs, index = lay_out(units, used, T)
        # A unit asks when an earlier pair has its key.
        seen = np.cumsum(is_pair[..., None] & (keys[..., None] == np.arange(K)), axis=1)
        again = is_pair & (np.take_along_axis(seen, keys[..., None], 2)[..., 0] > 1)
        counts = (index % 2 == 0) & np.take_along_axis(again, index // 2, 1)
        targets = np.take_along_axis(units[..., 1], index // 2, 1)
        return inputs, np.where(counts, targets, 0), counts
