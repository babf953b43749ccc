"""Operators that must coincide under special settings (and so check one another)."""
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api
from tests.kernels.cases import relative_error, unit

B, T, H, K, V = 1, 40, 2, 8, 6
STATIC = ("scale", "chunk_size", "implementation", "output_final_state", "qk_l2norm", "input_activation", "normalise")


def jitted(function):
    names = inspect.signature(function).parameters
    return jax.jit(function, static_argnames=[name for name in STATIC if name in names])


linear_attention, delta_rule, dplr, mlstm = map(jitted, (api.linear_attention, api.delta_rule, api.dplr, api.mlstm))
diagonal_scan = jitted(api.diagonal_scan)


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    return dict(q=normal(B, T, H, K), k=jnp.asarray(unit(rng.standard_normal((B, T, H, K))), jnp.float32),
                v=normal(B, T, H, V), beta=jnp.asarray(rng.random((B, T, H)), jnp.float32),
                token=jnp.asarray(-rng.random((B, T, H)), jnp.float32),
                channel=jnp.asarray(-rng.random((B, T, H, K)), jnp.float32), state=normal(B, H, K, V))


def close(a, b, tolerance=1e-5):
    assert relative_error(a[0] if isinstance(a, tuple) else a, b[0] if isinstance(b, tuple) else b) < tolerance


def linear(x, log_decay=None, **options):
    return linear_attention(x["q"], x["k"], x["v"], log_decay, chunk_size=16, implementation="xla", **options)


def delta(x, log_decay=None, **changed):
    x = x | changed
    return delta_rule(x["q"], x["k"], x["v"], x["beta"], log_decay, chunk_size=16, implementation="xla",
                          initial_state=x.get("initial_state"), output_final_state=True)


def spread(log_decay):
    return jnp.broadcast_to(log_decay[..., None], (B, T, H, K))


@pytest.mark.quick
def test_linear_attention_is_the_quadratic_form(x):
    scores = jnp.tril(jnp.einsum("bihk,bjhk->bhij", x["q"], x["k"]) * K ** -0.5)
    close(linear(x), jnp.einsum("bhij,bjhv->bihv", scores, x["v"]))


def test_constant_decay_is_retention(x):
    log_decay = jnp.log1p(-2.0 ** (-5.0 - jnp.arange(H)))
    close(linear(x, log_decay), linear(x, jnp.broadcast_to(log_decay, (B, T, H))))
    close(linear(x, jnp.zeros(H)), linear(x))


def test_equal_channels_are_a_scalar_decay(x):
    close(linear(x, spread(x["token"])), linear(x, x["token"]))
    close(linear(x, jnp.zeros((B, T, H, K))), linear(x))
    close(delta(x, spread(x["token"])), delta(x, x["token"]))


def test_no_decay_turns_gated_delta_into_deltanet(x):
    close(delta(x, jnp.zeros((B, T, H))), delta(x))
    close(delta(x, jnp.zeros((B, T, H, K))), delta(x))


def test_forgetting_everything_leaves_the_present_token(x):
    for log_decay in (jnp.full((B, T, H), -jnp.inf), jnp.full((B, T, H, K), -jnp.inf)):
        close(linear(x, log_decay, scale=1.0), (x["q"] * x["k"]).sum(-1, keepdims=True) * x["v"])


def test_bonus_of_one_without_decay_is_linear_attention(x):
    close(linear(x, jnp.zeros((B, T, H, K)), bonus=jnp.ones((H, K))), linear(x))


def test_normalised_linear_attention_is_a_weighted_mean(x):
    q, k = jnp.abs(x["q"]), jnp.abs(x["k"])
    weights = jnp.tril(jnp.einsum("bihk,bjhk->bhij", q, k))
    mean = jnp.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdims=True), x["v"])
    close(linear(x | {"q": q, "k": k}, normalise=True), mean)


def test_orthonormal_keys_turn_deltanet_into_linear_attention(x):
    k = jnp.tile(jnp.eye(K)[None, :, None], (B, 1, H, 1))
    short = {name: x[name][:, :K] for name in ("q", "v")} | {"k": k}
    close(delta(x, **short, beta=jnp.ones((B, K, H))), linear(x | short))


def test_deltanet_overwrites_the_value_of_a_repeated_key(x):
    k = jnp.broadcast_to(x["k"][:, :1], x["k"].shape)
    _, state = delta(x, k=k, beta=jnp.ones((B, T, H)))
    close(jnp.einsum("bhk,bhkv->bhv", k[:, 0], state), x["v"][:, -1])


def test_beta_two_reflects_and_keeps_the_norm(x):
    _, state = delta(x, beta=jnp.full((B, T, H), 2.0), v=jnp.zeros((B, T, H, V)), initial_state=x["state"])
    close(jnp.sqrt((state ** 2).sum((-1, -2))), jnp.sqrt((x["state"] ** 2).sum((-1, -2))))


@pytest.mark.quick
def test_dplr_covers_deltanet_kda_and_gla(x):
    beta = x["beta"][..., None]
    options = dict(scale=K ** -0.5, chunk_size=16, implementation="xla")
    zero = jnp.zeros_like(x["channel"])
    close(dplr(x["q"], beta * x["k"], x["v"], x["k"], -beta * x["k"], zero, **options), delta(x))
    decay = jnp.exp(x["channel"])
    kda = dplr(x["q"], beta * x["k"], x["v"], decay * x["k"], -beta * x["k"], x["channel"], **options)
    close(kda, delta(x, x["channel"]))
    gla = dplr(x["q"], x["k"], x["v"], zero, zero, x["channel"], **options)
    close(gla, linear(x, x["channel"]))


def test_deltaproduct_with_silent_second_steps_is_gated_deltanet(x):
    pair = lambda a, b: jnp.stack([a, b], 2).reshape(B, 2 * T, *a.shape[2:])  # noqa: E731
    k, v, beta = pair(x["k"], x["k"][::-1]), pair(x["v"], x["v"] + 1), pair(x["beta"], 0 * x["beta"])
    close(delta(x, x["token"], k=k, v=v, beta=beta), delta(x, x["token"]))


def test_qk_l2norm_is_the_callers_normalisation(x):
    k = 3 * x["k"]
    inside = delta_rule(x["q"], k, x["v"], x["beta"], qk_l2norm=True)
    q = x["q"] / jnp.sqrt((x["q"] ** 2).sum(-1, keepdims=True) + 1e-6)
    close(inside, delta(x, q=q, k=k / jnp.sqrt((k ** 2).sum(-1, keepdims=True) + 1e-6)))


def test_sigmoid_mlstm_is_simple_gla_with_gated_keys(x):
    gate, forget = 4 * x["token"], 2 - 3 * x["token"]
    log_forget = -jnp.log1p(jnp.exp(-forget))
    keys = x["k"] / (1 + jnp.exp(-gate))[..., None]
    close(mlstm(x["q"], x["k"], x["v"], gate, forget, input_activation="sigmoid"),
          linear(x | {"k": keys}, log_forget))


def test_stabilised_mlstm_is_the_plain_recurrence(x):
    """Input gate 0 and forget gate 1: linear attention divided by max(|scale n . q|, 1); large gates change nothing."""
    zeros = jnp.zeros((B, T, H))
    o, _ = mlstm(x["q"], x["k"], x["v"], zeros, zeros + 50)
    normaliser = (jnp.cumsum(x["k"], 1) * x["q"]).sum(-1, keepdims=True) * K ** -0.5
    close(o, linear(x)[0] / jnp.maximum(jnp.abs(normaliser), 1))
    o, _ = mlstm(x["q"], x["k"], x["v"], zeros + 300, zeros + 50)
    close(o, linear(x)[0] / jnp.abs(normaliser), 1e-3)


def test_diagonal_scan_is_an_exponential_average_and_an_s4d_convolution(x):
    u = x["v"].reshape(B, T, -1)
    decay = jnp.full(u.shape[-1], 0.9)
    close(diagonal_scan(0.1 * u, jnp.log(decay)),
          jnp.einsum("ts,bsd->btd", jnp.tril(0.1 * 0.9 ** (jnp.arange(T)[:, None] - jnp.arange(T)[None])), u))
    a = -0.5 + 1j * jnp.pi * jnp.arange(u.shape[-1])
    kernel = jnp.exp(a * jnp.arange(T)[:, None])
    columns = zip(np.asarray(u[0]).T, np.asarray(kernel).T, strict=True)
    close(diagonal_scan(u, a)[0][0], np.stack([np.convolve(c, k)[:T] for c, k in columns], -1))


def test_linear_attention_with_one_value_channel_is_a_diagonal_scan(x):
    """Mamba-1's selective scan as GLA: states are keys, the input is the value."""
    v = x["v"][..., :1]
    o, _ = linear(x | {"v": v}, x["channel"], scale=1.0)
    h, _ = diagonal_scan((x["k"] * v).reshape(B, T, -1), x["channel"].reshape(B, T, -1))
    close(o[..., 0], (x["q"] * h.reshape(B, T, H, K)).sum(-1))
