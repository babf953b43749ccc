"""Task 'fuzzy_recall' (fuzzy in-context recall of 2403.17844): keys and values are strings of 1 to `longest` tokens.

Entries key = value follow each other, each one of `entries` pairs that a row draws; keys differ as strings but share
tokens. When an entry comes again, every token of its value is an answer: the first at '=', the others at the value's
token before, which is fed back as in a text. (The '=', absent in the paper, says where a key ends; without it the
answer is not always determined.) Tokens: keys 0 .. `alphabet` - 1, then '=', then values.
"""

from dataclasses import dataclass

import numpy as np

from efficient_lm.data.synthetic import lay_out, need, random_order
from efficient_lm.data.tasks import Task, need_length, need_vocabulary, task
from efficient_lm.schema import setting

MAX_KEYS = 4096


@task("fuzzy_recall")
@dataclass(frozen=True)
class FuzzyRecall(Task):
    entries: int = setting(4, "key-value pairs of a row", low=1)
    longest: int = setting(2, "tokens of the longest key and value", low=1)
    alphabet: int = setting(8, "tokens that keys are made of", low=2)

    def possible_keys(self):
        return sum(self.alphabet**n for n in range(1, self.longest + 1))

    def answers(self, V):
        return V - self.alphabet - 1

    def check(self, T, V):
        keys = self.possible_keys()
        path = "config.data.task."
        need(keys <= MAX_KEYS, f"{path}longest", self.longest, f"gives {keys} keys, at most {MAX_KEYS} are allowed")
        need(self.entries <= keys, f"{path}entries", self.entries, f"there are only {keys} keys")
        need_vocabulary(V >= self.alphabet + 3, V, f"alphabet {self.alphabet} needs at least {self.alphabet + 3}")
        longest = (2 * self.longest + 1) * (self.entries + 1)
        need_length(T >= longest, T, f"fuzzy_recall of {self.entries} entries needs at least {longest}")

    def n_uniforms(self, T, V):
        return self.possible_keys() + self.entries * (1 + self.longest) + -(-T // 3)

    def make(self, u, T, V):
        E, m, A, keys = self.entries, self.longest, self.alphabet, self.possible_keys()
        number = random_order(u[:, :keys])[:, :E]  # each number is one string: shorter ones first
        first = np.cumsum([0] + [A**n for n in range(1, m)])  # number of the first string of each length
        key_length = np.searchsorted(first, number, side="right")
        rest = number - first[key_length - 1]
        key_tokens = np.stack([rest // A**i % A for i in range(m)], axis=-1)
        u = u[:, keys:]
        value_length = 1 + (u[:, :E] * m).astype(np.int64)
        value_tokens = A + 1 + (u[:, E : E * (1 + m)] * self.answers(V)).astype(np.int64).reshape(-1, E, m)
        entry = np.concatenate([key_tokens, np.full((len(u), E, 1), A), value_tokens], axis=-1)
        place = np.arange(m)
        is_key, is_value = (place < length[..., None] for length in (key_length, value_length))
        used = np.concatenate([is_key, np.ones((len(u), E, 1), bool), is_value], axis=-1)

        which = (u[:, E * (1 + m) :] * E).astype(np.int64)  # the entry of each unit
        seen = np.cumsum(which[..., None] == np.arange(E), axis=1)
        again = np.take_along_axis(seen, which[..., None], 2)[..., 0] > 1
        units, used = (np.take_along_axis(a, which[..., None], 1) for a in (entry, used))
        _, m_unit = units.shape[1:]
        following, asks = np.roll(units, -1, axis=2), used & np.roll(used, -1, axis=2)
        asks[..., :m] = asks[..., -1] = False
        inputs, index = lay_out(units, used, T)
        counts = np.take_along_axis(asks.reshape(len(u), -1), index, 1)
        counts &= np.take_along_axis(again, index // m_unit, 1)
        targets = np.take_along_axis(following.reshape(len(u), -1), index, 1)
        return inputs, np.where(counts, targets, 0), counts
