"""The Markov source: its stated loss floor is what the tokens have."""

import math

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import open_data
from efficient_lm.data.random_access import key, uniforms
from efficient_lm.data.sources.zipf_markov import chain


def open_train(source, seq_len, batch_size=8, vocab_size=64):
    cfg = DataConfig(source=source, vocab_size=vocab_size)
    return open_data(cfg, seq_len=seq_len, batch_size=batch_size, seed=0, split="train")


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(key("test"), np.arange(2000), 50)
    assert 0 <= u.min() and u.max() < 1
    n = u.size
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * math.sqrt(2 * 99)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


@pytest.mark.parametrize("vocab_size", [2, 16, 300])
def test_zipf_marginal_is_stationary(vocab_size):
    p, transitions, rate, unigram = chain(vocab_size)
    np.testing.assert_allclose(transitions.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(p @ transitions, p, rtol=1e-9)
    np.testing.assert_allclose(p * np.arange(1, vocab_size + 1), p[0], rtol=1e-12)
    assert 0 < rate < 0.95 * unigram


@pytest.mark.quick
def test_zipf_markov_sequences_have_the_stated_entropies():
    vocab_size = 16
    source = open_train("zipf_markov", seq_len=512, batch_size=400, vocab_size=vocab_size)
    batch = source[0]
    n = batch["inputs"].size
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (batch["inputs"].ravel(), batch["targets"].ravel()), 1)
    joint = pairs / n
    marginal = joint.sum(axis=1)

    def entropy(q):
        q = q[q > 0]
        return -(q * np.log(q)).sum()

    # Plug-in estimates; with 2e5 samples bias (Miller-Madow, about V^2 / 2n) and noise are a few 1e-3.
    assert entropy(joint) - entropy(marginal) == pytest.approx(source.spec["loss_floor"], abs=0.01)
    assert entropy(marginal) == pytest.approx(source.spec["unigram_loss"], abs=0.01)


def test_the_best_predictor_reaches_the_floor_at_the_first_position_too():
    """A row starts in the stationary law, so that position 0 costs no more than others."""
    source = open_train("zipf_markov", seq_len=4, batch_size=40_000)
    _, transitions, rate, _ = chain(64)
    batch = source[0]
    losses = -np.log(transitions[batch["inputs"], batch["targets"]])
    error = 4 * losses.std(axis=0) / math.sqrt(len(losses))
    assert (np.abs(losses.mean(axis=0) - rate) < error).all()
