"""Softmax attention variants against closed forms, and as special cases of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.layers import Context
from tests.mixers.test_equivalences import B, D, H, T, close, compiled, copy, make, run, x  # noqa: F401

CAUSAL = np.tril(np.ones((T, T), bool))


def softmax(scores):
    """Over visible keys, in float64."""
    e = np.where(CAUSAL, np.exp(scores - np.max(np.where(CAUSAL, scores, -np.inf), -1, keepdims=True)), 0.0)
    return e / e.sum(-1, keepdims=True)


def heads(y, n):
    """[B, T, n D] -> [B, n, T, D] in float64."""
    return np.asarray(y, np.float64).reshape(B, T, n, -1).swapaxes(1, 2)


def joined(y):
    """[B, n, T, D] -> [B, T, n D] in float32."""
    return jnp.asarray(y.swapaxes(1, 2).reshape(B, T, -1), jnp.float32)


def scores_of(mixer, x, n=H):  # noqa: F811
    q, k = heads(mixer.q(x), n), heads(mixer.k(x), n)
    return np.einsum("bhtd,bhsd->bhts", q, k)


@pytest.mark.quick
def test_a_window_of_all_tokens_is_full_attention(x):  # noqa: F811
    full = make("attention", n_heads=H)
    for settings, same in (({"window": T}, True), ({"window": T - 1}, False), ({"kv": "give"}, True)):
        other = make("attention", n_heads=H, **settings)
        copy(full, other, "q", "k", "v", "o")
        assert np.allclose(run(other, x), run(full, x), atol=1e-6) == same


def test_grouped_queries_are_repeated_keys(x):  # noqa: F811
    grouped, full = make("attention", n_heads=4, n_kv_heads=2), make("attention", n_heads=4)
    copy(grouped, full, "q", "o")
    for name in "kv":
        kernel = getattr(grouped, name).kernel[...].reshape(D, 2, 1, D // 4)
        getattr(full, name).kernel[...] = jnp.broadcast_to(kernel, (D, 2, 2, D // 4)).reshape(D, D)
    close(run(grouped, x), run(full, x))


def test_clipped_softmax(x):  # noqa: F811
    """clip((1 - g) softmax + g, 0, 1), g = -alpha / n: softmax for alpha = 0, exact zeros else."""
    plain = make("attention", n_heads=H, position="none", qk_norm=False)
    for alpha in (0.0, 3.0):
        settings = dict(weights="clipped", clip_alpha=alpha, weights_length=T, position="none", qk_norm=False)
        clipped = make("attention", n_heads=H, **settings)
        copy(plain, clipped, "q", "k", "v", "o")
        if alpha == 0:
            close(run(clipped, x), run(plain, x))
        weights = softmax(scores_of(plain, x) * (D // H) ** -0.5)
        weights = np.clip((1 + alpha / T) * weights - alpha / T, 0, 1)
        assert alpha == 0 or np.mean(weights[..., CAUSAL] == 0) > 0.1
        close(run(clipped, x), plain.o(joined(weights @ heads(plain.v(x), H))))


def test_softplus_attention_with_equal_scores_is_a_running_mean(x):  # noqa: F811
    for power in (0, 15):
        mixer = make("lssar", n_heads=H, power=power, position="none")
        mixer.q.kernel[...] = jnp.zeros((D, D))
        mean = jnp.cumsum(mixer.v(x), 1) / jnp.arange(1, T + 1)[:, None]
        close(run(mixer, x), mixer.o(mean), rel=1e-4)


def test_softplus_attention_with_reweighting(x):  # noqa: F811
    """2501.13428 as written, in float64."""
    mixer = make("lssar", n_heads=H, power=4, position="none")
    q, k = (heads(part(x), H) for part in (mixer.q, mixer.k))
    q, k = (y / np.sqrt(np.sum(y * y, -1, keepdims=True) + 1e-6) for y in (q, k))
    n = np.arange(1, T + 1)[:, None]
    scores = np.log(D // H) * np.log(n) * np.einsum("bhtd,bhsd->bhts", q, k)
    a = np.where(CAUSAL, np.log1p(np.exp(scores)), 0.0)
    a /= a.sum(-1, keepdims=True)
    r = np.maximum(n * a - np.where(n <= 3, 0, 1), 0.0) ** 4
    r /= r.sum(-1, keepdims=True)
    close(run(mixer, x), mixer.o(joined(r @ heads(mixer.v(x), H))))


def test_differential_attention(x):  # noqa: F811
    """Both maps in float64; lambda = 0 leaves one map."""
    mixer = make("differential", n_heads=H, position="none")
    width = D // (2 * H)
    assert mixer.lambda_0[...] == pytest.approx(0.8 - 0.6 * np.exp(-0.3 * 1))  # make() takes layer 1
    lambdas = np.asarray(mixer.lambdas[...], np.float64)
    scores = scores_of(mixer, x, 2 * H) * width**-0.5
    for with_second in (True, False):
        start = float(mixer.lambda_0[...])
        if not with_second:
            mixer.lambdas[...] = jnp.zeros((2, 2, width))
            mixer.lambda_0[...] = jnp.zeros(())
            start, lambdas = 0.0, np.zeros((2, 2, width))
        first, second = (np.exp(np.sum(pair[0] * pair[1])) for pair in lambdas)
        weights = softmax(scores[:, :H]) - (first - second + start) * softmax(scores[:, H:])
        y = weights @ heads(mixer.v(x), H)
        y = y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1e-6) * (1 - start)
        close(run(mixer, x), mixer.o(joined(y)))


def test_latent_attention(x):  # noqa: F811
    """Expanded in float64, without rotation; and the absorbed step over a cache equals it."""
    mixer = make("mla", n_heads=H, position="none")
    rank, nope, rope, width = mixer.sizes
    down = np.asarray(mixer.down(x), np.float64)
    latent = down[..., :rank] / np.sqrt(np.mean(down[..., :rank] ** 2, -1, keepdims=True) + 1e-6)
    up = heads(latent @ np.asarray(mixer.up.kernel[...], np.float64), H)
    q = heads(mixer.q(x), H)
    scores = np.einsum("bhtn,bhsn->bhts", q[..., :nope], up[..., :nope])
    scores += np.einsum("bhtr,bsr->bhts", q[..., nope:], down[..., rank:])
    expected = mixer.o(joined(softmax(scores * (nope + rope) ** -0.5) @ up[..., nope:]))
    close(run(mixer, x), expected)

    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, state = mixer.prefill(x[:, :-1], Context(None, positions[:, :-1]), T)
    assert state.shape == (B, T, rank + rope)
    y, _ = compiled(lambda x, state: mixer.step(x, state, Context(None, positions[:, -1])))(x[:, -1], state)
    close(y, expected[:, -1])


def test_shared_rotated_keys_see_only_differences_of_positions(x):  # noqa: F811
    for kind in ("attention", "mla", "differential", "lssar"):
        mixer = make(kind, n_heads=H)
        shifted = jnp.broadcast_to(jnp.arange(T) + 5, (B, T))
        close(run(mixer, x, shifted), run(mixer, x), rel=1e-4)
        assert not np.allclose(run(mixer, x, 2 * shifted), run(mixer, x), rtol=1e-2)


def test_caches_of_windows_hold_the_window_and_nothing_else():
    """A ring of `window` slots, whatever the number of tokens, by prefill and by steps."""
    mixer = make("attention", n_heads=H, window=4)
    long = jax.random.normal(jax.random.key(3), (B, T, D))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    state = mixer.init_state(B, T)
    assert state["k"].shape == (B, H, 4, D // H)
    step = compiled(lambda token, state, t: mixer.step(token, state, Context(None, t))[1])
    for t in range(T):
        state = step(long[:, t], state, positions[:, t])
    _, at_once = mixer.prefill(long, Context(None, positions), T)
    for name in ("k", "v"):
        np.testing.assert_allclose(state[name], at_once[name], rtol=1e-5, atol=1e-6)
