"""Source 'zipf_markov': a first-order Markov chain with Zipf word frequencies and a known entropy rate.

Token i has stationary probability p_i proportional to 1 / (i + 1) (Zipf's law). The joint law of neighbours is a
fixed random positive matrix with heavy-tailed entries, scaled to have both marginals equal to p (Sinkhorn-Knopp), so
p is stationary by construction. Then the best possible loss is exactly the entropy rate H(X_t | X_{t-1}), given as
`loss_floor` in nats per token beside `unigram_loss` = H(p), what a model without context can reach. The chain is the
same for every seed; the seed chooses the sequences.
"""

import functools

import numpy as np

from efficient_lm.data.base import SOURCES
from efficient_lm.data.random_access import key, uniforms
from efficient_lm.data.synthetic import need, synthetic_rows

MAX_VOCAB = 2048  # the transition table has vocab_size^2 entries; 1 s to make at 2048
_TAIL = 4.0  # entries are (exponential variable)^4: the rate comes out at about 0.6 of H(p)


@functools.lru_cache(maxsize=4)
def chain(vocab_size: int):
    """(p [V], transition matrix [V, V], entropy rate, H(p)); float64, nats."""
    p = 1.0 / np.arange(1, vocab_size + 1)
    p /= p.sum()
    joint = (-np.log1p(-uniforms(key("zipf_markov", vocab_size), np.arange(vocab_size), vocab_size))) ** _TAIL
    joint = (joint + 1e-6) * p[:, None] * p
    for _ in range(2000):
        joint *= (p / joint.sum(0))[None, :]
        rows = joint.sum(1)
        joint *= (p / rows)[:, None]
        if np.abs(rows / p - 1).max() < 1e-11:
            break
    transitions = joint / joint.sum(1, keepdims=True)
    rate = -(joint * np.log(transitions)).sum()
    return p, transitions, float(rate), float(-(p * np.log(p)).sum())


@functools.lru_cache(maxsize=4)
def _tables(vocab_size: int):
    """Start distribution's and all rows' cumulative sums; row s lies in (s, s + 1] of one increasing array."""
    p, transitions, _, _ = chain(vocab_size)
    ladder = np.cumsum(transitions, axis=1)
    ladder /= ladder[:, -1:]
    return np.cumsum(p) / p.sum(), (ladder + np.arange(vocab_size)[:, None]).ravel()


def sample(u, vocab_size: int) -> np.ndarray:
    """Uniforms [R, n] -> int64 [R, n], stationary sequences of the chain."""
    start, ladder = _tables(vocab_size)
    tokens = np.empty(u.shape, np.int64)
    state = np.minimum(np.searchsorted(start, u[:, 0], side="right"), vocab_size - 1)
    tokens[:, 0] = state
    for t in range(1, u.shape[1]):
        place = np.searchsorted(ladder, state + u[:, t], side="right")
        state = np.minimum(place - state * vocab_size, vocab_size - 1)  # state + u may round up to state + 1
        tokens[:, t] = state
    return tokens


@SOURCES.register("zipf_markov")
def open_rows(cfg, *, seq_len, seed, split):
    V = cfg.vocab_size
    need(2 <= V <= MAX_VOCAB, "config.data.vocab_size", V, f"zipf_markov needs 2..{MAX_VOCAB}")
    _, _, rate, unigram = chain(V)

    def make(u):
        tokens = sample(u, V)
        return tokens[:, :-1], tokens[:, 1:], None

    return synthetic_rows(
        "zipf_markov",
        cfg,
        vocab_size=V,
        seq_len=seq_len,
        seed=seed,
        split=split,
        n_uniforms=seq_len + 1,
        make=make,
        facts={"loss_floor": rate, "unigram_loss": unigram},
    )
