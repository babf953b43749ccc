"""Linear and recurrent mixers against closed forms, and feature maps against the kernels that they stand for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.layers import Context
from efficient_lm.mixers.feature_maps import FEATURE_MAPS, monomials, taylor
from efficient_lm.mixers.gsa import slot_scores
from efficient_lm.mixers.lightnet import prefix_softmax
from efficient_lm.mixers.state_space import states_readout
from efficient_lm.schema import ConfigError
from pallas_kernels import api
from tests.mixers.test_equivalences import B, D, H, T, close, compiled, copy, make, run

pytestmark = pytest.mark.usefixtures("quick_compile")

K = D // H
CAUSAL = np.tril(np.ones((T, T)))
LAGS = np.maximum(np.arange(T)[:, None] - np.arange(T), 0)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (B, T, D))


def random_heads(scale=1.0, width=K):
    """q, k, v [B, T, H, width]."""
    return tuple(scale * jax.random.normal(jax.random.key(i), (B, T, H, width)) for i in range(3))


def projected(mixer, x):
    """q, k, v of a mixer [B, T, H, .] in float64."""
    parts = (np.asarray(part(x), np.float64) for part in (mixer.q, mixer.k, mixer.v))
    return tuple(part.reshape(B, T, mixer.cfg.n_heads, -1) for part in parts)


def weighted(weights, v, normalise=True, visible=CAUSAL):
    """sum_s weights_ts v_s over the visible s, rows normalised or not: [B, H, T, T], [B, T, H, V] -> [B, T, H V]."""
    weights = weights * visible
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", weights, np.asarray(v, np.float64)).reshape(B, T, -1)


def scores(q, k):
    return np.einsum("bthk,bshk->bhts", np.asarray(q, np.float64), np.asarray(k, np.float64))


def matrix(linear):
    return np.asarray(linear.kernel[...], np.float64)


def rms_normed(o):
    return o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-6)


# ------------------------------------------------------------------------------------------------ feature maps


def test_monomials_have_the_powers_of_inner_products():
    q, k, _ = random_heads(width=3)
    for degree in range(5):
        features = monomials(q, degree), monomials(k, degree)
        assert features[0].shape[-1] == math.comb(3 + degree - 1, degree)
        close(scores(*features), scores(q, k) ** degree / math.factorial(degree))


def test_taylor_of_rising_order_tends_to_softmax_attention():
    q, k, v = random_heads(0.4, width=4)
    softmax = weighted(np.exp(scores(q, k) / 2), v)
    errors = []
    for order in (1, 2, 8):
        o, _ = api.linear_attention(taylor(q, order), taylor(k, order), v, normalise=True)
        errors.append(np.abs(np.asarray(o).reshape(B, T, -1) - softmax).max())
    assert errors[2] < 1e-5 and errors[2] < 0.1 * errors[1] < 0.1 * errors[0], errors


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_map_declares_what_it_has(name):
    """Features, parameters, and whether weights can be negative."""
    cls, phi = FEATURE_MAPS[name], make("linear_attention", n_heads=H, feature_map=name, normalise=False).phi_q
    q, k, _ = random_heads()
    features = phi(q), phi(k)
    assert features[0].shape == (B, T, H, cls.width(K))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(phi)))
    assert cls.weights(H, K) == sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    assert cls.vectors(H, K) == sum(leaf.size for path, leaf in leaves if path[-1].key != "kernel")
    least = scores(*features).min()
    assert least < -0.1 if cls.signed else least >= 0


def test_signed_feature_maps_are_not_normalised():
    for name in ("identity", "hadamard"):
        with pytest.raises(ConfigError, match=f"normalise = True: weights of feature_map '{name}'"):
            make("linear_attention", n_heads=H, feature_map=name)


def test_values_of_feature_maps():
    """Both Hedgehog maps start from the identity; DPFP multiplies rolled copies; matrices act on one head each."""
    make_map = lambda name: make("linear_attention", n_heads=H, feature_map=name, normalise=False).phi_q  # noqa: E731
    y, _, _ = random_heads()
    softmax = np.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], -1)
    close(make_map("hedgehog")(y), softmax)
    close(make_map("hedgehog_exp")(y), np.exp(np.concatenate([y, -y], -1)))
    r = np.maximum(np.concatenate([y, -y], -1), 0)
    features = np.asarray(make_map("dpfp")(y)).reshape(B, T, H, 4, 2 * K)
    close(features[..., 2, 5], r[..., 5] * r[..., 2])
    t2r = make_map("t2r")
    per_head = matrix(t2r.linear).reshape(K, H, K)
    close(t2r(y), np.maximum(np.einsum("bthi,ihj->bthj", y, per_head), 0))


# ------------------------------------------------------------------------------------------ linear attention's kin


def test_based_has_the_weights_of_the_exponential_to_second_order(x):
    mixer = make("based", n_heads=H)
    q, k, v = projected(mixer, x)
    assert q.shape[-1] == 16 and v.shape[-1] == K
    s = scores(q, k) / 4
    close(run(mixer, x), weighted(1 + s + s**2 / 2, v) @ matrix(mixer.o), 2e-5)


def test_rebased_has_squared_weights_of_normed_queries_and_keys(x):
    mixer = make("rebased", n_heads=H)
    q, k, v = projected(mixer, x)
    q, k = ((y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) for y in (q, k))
    close(run(mixer, x), weighted(scores(q, k) ** 2, v) @ matrix(mixer.o), 2e-5)


def test_norm_attention_is_linear_attention_with_a_wide_norm_for_the_denominator(x):
    mixer = make("norm_attention", n_heads=H)
    q, k, v = projected(mixer, x)
    q, k = (np.where(y > 0, 1 + y, np.exp(y)) for y in (q, k))
    o = weighted(scores(q, k) * K**-0.5, v, normalise=False)
    close(run(mixer, x), rms_normed(o) @ matrix(mixer.o), 2e-5)


@pytest.mark.parametrize("position", ("rope", "none"))
def test_diag_attention_in_one_block_is_softmax_attention(x, position):
    diag = make("diag_attention", n_heads=H, block=T, position=position)
    full = make("attention", n_heads=H, position=position, qk_norm=False)
    copy(full, diag, "q", "k", "v", "o")
    close(run(diag, x), run(full, x))


def test_diag_attention_sees_its_own_block_only(x):
    """Of 5 tokens, counted from the start of the document; the first of a block sees itself alone."""
    mixer = make("diag_attention", n_heads=H, block=5, position="none")
    q, k, v = projected(mixer, x)
    block = np.arange(T) // 5
    y = weighted(np.exp(scores(q, k) * K**-0.5), v, visible=CAUSAL * (block[:, None] == block)) @ matrix(mixer.o)
    close(run(mixer, x), y)
    close(y[:, 5], v[:, 5].reshape(B, D) @ matrix(mixer.o))


def test_lrpe_turns_weights_by_learned_angles(x):
    """sum_j q_tj k_sj cos(theta_j (t - s)) lambda^(t - s), whatever the offset of the positions."""
    mixer = make("lightning", n_heads=H, lrpe=True)
    theta, rate = np.asarray(mixer.theta[...], np.float64), np.exp(np.asarray(mixer.log_rate[...], np.float64))
    np.testing.assert_allclose(theta.ravel(), 10000.0 ** (-2 * np.arange(D) / D), rtol=1e-5)
    q, k, v = projected(mixer, x)
    q, k = (y / (1 + np.exp(-y)) for y in (q, k))
    weights = np.einsum("bthk,bshk,tshk->bhts", q, k, np.cos(LAGS[..., None, None] * theta))
    o = weighted(weights * np.exp(-rate[:, None, None] * LAGS), v, normalise=False)
    y = (rms_normed(o) * np.asarray(mixer.u(x), np.float64)) @ matrix(mixer.o)
    close(run(mixer, x), y, 2e-5)
    close(run(mixer, x, jnp.broadcast_to(jnp.arange(T) + 7, (B, T))), y, 2e-5)


# --------------------------------------------------------------------------------------- averages and state spaces


def test_hgrn_is_a_moving_average_with_bounded_gates(x):
    mixer = make("hgrn", layer=2)
    z, i = (np.asarray(part(x), np.float64) for part in (mixer.f, mixer.i))
    f = 0.5 + 0.5 / (1 + np.exp(-z))  # l / L = 2 / 4
    h, outputs = np.zeros((B, D)), []
    for t in range(T):
        h = f[:, t] * h + (1 - f[:, t]) * i[:, t] / (1 + np.exp(-i[:, t]))
        outputs.append(h)
    gate = np.asarray(jax.nn.silu(mixer.gate(x)), np.float64)
    close(run(mixer, x), (rms_normed(np.stack(outputs, 1)) * gate) @ matrix(mixer.o), 2e-5)


def test_lightnet_averages_values_by_a_softmax_over_the_past_in_every_key_channel(x):
    mixer = make("lightnet", n_heads=H)
    q, k, v = projected(mixer, x)
    q, k = q / (1 + np.exp(-q)), 3 * k
    mixer.k.kernel[...] = 3 * mixer.k.kernel[...]
    o = np.zeros((B, T, H, K))
    for t in range(T):
        weights = np.exp(k[:, : t + 1])
        weights /= weights.sum(1, keepdims=True)
        average = np.einsum("bshk,bshv->bhkv", weights, v[:, : t + 1])
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], average) * K**-0.5
    gate = np.asarray(jax.nn.silu(mixer.gate(x)), np.float64)
    close(run(mixer, x), (rms_normed(o.reshape(B, T, D)) * gate) @ matrix(mixer.o), 2e-5)


def test_weights_of_lightnet_stay_finite_for_keys_of_any_size():
    k = jnp.array([[-500.0, 400.0, 399.0, -1e4, 401.0]])[..., None, None]
    weights, log_decay, z = prefix_softmax(k)
    np.testing.assert_allclose(weights[0, :, 0, 0], [1, 1, np.exp(-1) / (1 + np.exp(-1)), 0, 0.6652], atol=1e-4)
    assert np.all(log_decay <= 0) and np.all(np.isfinite(log_decay)) and np.all(np.isfinite(z))


def test_gsa_with_a_slot_per_token_is_softmax_attention():
    q, k, v = random_heads()
    write = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, H, T))
    keep = jnp.zeros((B, T, H, T))
    logits, keys = slot_scores(q, k, write, keep, chunk=5)
    close(keys, np.asarray(k).transpose(0, 2, 3, 1))
    p = jax.nn.softmax(jnp.where(CAUSAL[:, None] > 0, logits, -1e30))
    o, _ = api.linear_attention(p, write, v, keep, scale=1.0)
    close(o.reshape(B, T, D), weighted(np.exp(scores(q, k)), v))


def test_slot_scores_do_not_depend_on_the_chunk_and_survive_strong_decays():
    q, k, _ = random_heads()
    s, gate = jax.random.uniform(jax.random.key(5), (2, B, T, H, 3))
    log_f = 200 * jnp.log(gate)
    log_f = log_f.at[:, 5].set(-0.01)
    state, expected = np.zeros((B, H, K, 3)), []
    for t in range(T):
        state = state * np.exp(np.asarray(log_f[:, t], np.float64))[..., None, :]
        state = state + np.asarray(k[:, t])[..., None] * np.asarray(s[:, t])[..., None, :]
        expected.append(np.einsum("bhk,bhkm->bhm", q[:, t], state))
    for chunk in (1, 5, 16):
        close(slot_scores(q, k, s, log_f, chunk=chunk)[0], np.stack(expected, 1))
    assert np.all(np.isfinite(jax.grad(lambda log_f: slot_scores(q, k, s, log_f)[0].sum())(log_f)))


def convolved(kernel, x):
    """y_t = sum_{s <= t} kernel_{t-s} x_s per channel: [T, D], [B, T, D]."""
    return np.einsum("tsd,bsd->btd", kernel[LAGS] * CAUSAL[..., None], np.asarray(x, np.float64))


def test_s4d_is_a_convolution(x):
    """K_t = 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n e^{dt A_n t} of S4D-Lin, plus D."""
    mixer = make("s4d", d_state=6, chunk_size=5)
    a = -0.5 + 1j * np.pi * np.arange(3)
    dt, c = np.exp(np.asarray(mixer.log_dt[...], np.float64))[:, None], np.asarray(mixer.c[...], np.float64)
    assert 1e-3 <= dt.min() and dt.max() <= 0.1
    weights = (c[0] + 1j * c[1]) * (np.exp(dt * a) - 1) / a
    kernel = 2 * np.einsum("dn,tdn->td", weights, np.exp(dt * a * np.arange(T)[:, None, None])).real
    y = convolved(kernel, x) + np.asarray(mixer.skip[...]) * np.asarray(x)
    g = np.asarray(jax.nn.gelu(y), np.float64)
    close(run(mixer, x), g @ matrix(mixer.value) / (1 + np.exp(-g @ matrix(mixer.gate))), 2e-5)


def test_mega_ema_is_a_convolution(x):
    """K_t = sum_n gamma_n / sqrt(N) p_n beta_n (1 - p_n sigmoid(alpha_n))^t, and what the block makes of it."""
    mixer = make("mega_ema", d_state=4, chunk_size=5)
    names = ("delta", "alpha", "beta", "gamma", "omega")
    delta, alpha, beta, gamma, omega = (np.asarray(getattr(mixer.ema, name)[...], np.float64) for name in names)
    p, damping = 1 / (1 + np.exp(-delta)), 1 / (1 + np.exp(-alpha))
    kernel = np.einsum("dn,tdn->td", gamma / 2 * p * beta, (1 - p * damping) ** np.arange(T)[:, None, None])
    m = jax.nn.silu(convolved(kernel, x) + omega * np.asarray(x))
    u, h = jax.nn.sigmoid(m @ matrix(mixer.update)), jax.nn.silu(m @ matrix(mixer.candidate))
    close(run(mixer, x), u * (h - x), 2e-5)


def test_mega_is_gated_attention_inside_blocks(x):
    """The formulas of 2209.10655 with one mask for all blocks of 5, of two documents of 4 and 8 tokens."""
    mixer = make("mega", block=5, d_key=3)
    rng = np.random.default_rng(0)
    for part in (mixer.key_scale, mixer.key_bias, mixer.bias, mixer.base.bias, mixer.v.bias):
        part[...] = jnp.asarray(rng.normal(size=part.shape))
    positions, ids = (jnp.broadcast_to(jnp.array(a), (B, T)) for a in ([*range(4), *range(8)], [1] * 4 + [2] * 8))
    blocks = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    m = np.asarray(mixer.ema(x, ids)[0], np.float64)
    u, z, r, c = np.split(m @ matrix(mixer.base) + np.asarray(mixer.base.bias[...]), mixer.splits, -1)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    (q, k), v = silu(z) * mixer.key_scale[...][:, None, None] + mixer.key_bias[...][:, None, None], mixer.v(x)
    scores = np.einsum("bik,bjk->bij", q, k) / math.sqrt(3) + np.asarray(mixer.bias[...])[np.minimum(LAGS, 4)]
    weights = np.exp(scores) * CAUSAL * (blocks[:, None] == blocks)
    read = weights / weights.sum(-1, keepdims=True) @ silu(np.asarray(v, np.float64))
    h = silu(c + (silu(r) * read) @ matrix(mixer.o))
    y = compiled(lambda x: mixer(x, Context(ids, positions))[0])(x)
    close(y, (h - np.asarray(x)) / (1 + np.exp(-u)), 2e-5)


def test_mega_without_its_attention_is_its_ema(x):
    whole, plain = make("mega"), make("mega_ema")
    whole.ema = plain.ema
    whole.o.kernel[...] *= 0.0
    update, _, _, candidate = jnp.split(whole.base.kernel[...], whole.splits, -1)
    plain.update.kernel[...], plain.candidate.kernel[...] = update, candidate
    close(run(whole, x), run(plain, x))


def test_mamba_with_constant_dt_b_and_c_is_a_real_diagonal_convolution(x):
    """Inner channel 0, the constant SiLU(1) from the bias of the convolution, feeds dt, B and C."""
    mixer = make("mamba", d_state=3)
    mixer.conv.taps[...] = mixer.conv.taps[...].at[:, 0].set(0.0)
    mixer.conv.bias[...] = mixer.conv.bias[...].at[0].set(1.0)
    for part in (mixer.delta, mixer.b, mixer.c):
        part.kernel[...] = part.kernel[...].at[1:].set(0.0)
    u = np.asarray(compiled(lambda x: mixer.conv(mixer.x(x), None))(x), np.float64)
    delta, b, c = (u[0, 0] @ matrix(part) for part in (mixer.delta, mixer.b, mixer.c))
    dt = np.log1p(np.exp(delta @ matrix(mixer.dt) + np.asarray(mixer.dt_bias[...], np.float64)))[:, None]
    kernel = np.einsum("dn,tdn->td", dt * b * c, np.exp(-dt * np.arange(1, 4) * np.arange(T)[:, None, None]))
    y = convolved(kernel, u) + u
    close(run(mixer, x), (y * np.asarray(jax.nn.silu(mixer.z(x)))) @ matrix(mixer.o), 2e-5)


def test_states_restart_at_documents_across_chunks():
    """Chunks of 5 tokens, documents of 3, 6 and 3; the last state is that of the last document."""
    x = jax.random.normal(jax.random.key(2), (B, T, 3))
    write, log_decay, read = jnp.ones((3, 2)), -jnp.array([[0.1, 0.5]] * 3), jnp.array([[1.0, 2.0]] * 3)
    ids = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 1]), jnp.array([3, 6, 3])), (B, T))
    y, state = states_readout(x, write, log_decay, read, segment_ids=ids, chunk_size=5)
    for start, end in ((0, 3), (3, 9), (9, 12)):
        alone, last = states_readout(x[:, start:end], write, log_decay, read, chunk_size=5)
        close(y[:, start:end], alone)
    close(state, last)


# --------------------------------------------------------------------------------- mixers that become one another

ONE = 1.2784645427610738  # SiLU(ONE) = 1


def constant(linear, row):
    """Make x W a constant row for x whose channel 0 is 1."""
    linear.kernel[...] = jnp.zeros(linear.kernel.shape).at[0].set(row)


def test_gla_without_decay_and_gate_is_linear_attention(x):
    x = x.at[..., 0].set(1.0)
    gla = make("gla", n_heads=H, expand_k=1.0)
    linear = make("linear_attention", n_heads=H, feature_map="identity", normalise=False)
    copy(gla, linear, "q", "k", "v", "o")
    gla.decay_up.bias[...] = jnp.full(D, 1e4)
    constant(gla.gate, ONE)
    close(run(gla, x), run(linear, x))


def test_simple_gla_with_constant_gates_is_retnet(x):
    """Without rotation: log gamma_h = logsigmoid(z_h) / 16 for constant z."""
    x = x.at[..., 0].set(1.0)
    simple = make("simple_gla", n_heads=H, expand_k=1.0, expand_v=2.0)
    retnet = make("retnet", n_heads=H, rotation=False)
    copy(retnet, simple, "q", "k", "v", "gate", "o")
    power = 16 * np.log1p(-(2.0 ** (-5 - np.arange(H))))
    constant(simple.decay, power - np.log(-np.expm1(power)))
    close(run(simple, x), run(retnet, x))


def test_lightnet_with_equal_keys_averages_values(x):
    """Keys 0 weigh all tokens alike, so every row of the state is the running mean of the values."""
    mixer = make("lightnet", n_heads=H)
    mixer.k.kernel[...] = jnp.zeros((D, D))
    q, _, v = projected(mixer, x)
    mean = np.cumsum(v, 1) / np.arange(1, T + 1)[:, None, None]
    o = ((q / (1 + np.exp(-q))).sum(-1, keepdims=True) * mean * K**-0.5).reshape(B, T, D)
    gate = np.asarray(jax.nn.silu(mixer.gate(x)), np.float64)
    close(run(mixer, x), (rms_normed(o) * gate) @ matrix(mixer.o), 2e-5)
