"""Mixture of experts: every way to run it against the dense oracle, special cases, routing, balance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import from_dict
from efficient_lm.counting import traced_matmul_flops
from efficient_lm.ffn import FFNS, dispatch, routing
from efficient_lm.layers import Context, Maker
from efficient_lm.model import LM, Part
from efficient_lm.schema import ConfigError

pytestmark = pytest.mark.usefixtures("quick_compile")

D, B, T = 16, 3, 20
SETTINGS = {
    "default": {},
    "fine": {"n_experts": 12, "top_k": 4, "granularity": 8.0, "n_shared": 2, "normalise": False},
    "groups-bias": {
        "n_experts": 8,
        "top_k": 3,
        "n_groups": 4,
        "top_groups": 2,
        "score": "sigmoid",
        "bias_rate": 1e-3,
        "route_scale": 2.5,
        "n_shared": 0,
    },
    "switch": {"top_k": 1, "normalise": False, "glu": False, "activation": "polynorm", "temperature": 2.0},
}


@functools.cache
def moe(name=None, **settings):
    """(apply(params, x) -> y, aux; params; cfg) of a layer at width D, with parameters away from 0 and 1."""
    settings = SETTINGS[name] | settings if name else settings
    model = from_dict({"model": {"d_model": D, "ffns": {"moe": settings}, "pattern": ["attention/moe"]}}).model
    cfg = model.ffns["moe"]
    part = Part(lambda key, layer=0: FFNS["moe"](cfg, model, Maker(key, model, layer)), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float32), part.init(jax.random.key(0), 0)
    )

    @jax.jit
    def apply(params, x, segment_ids=None):
        return part.bind(params)(x, Context(segment_ids))

    return apply, params, cfg


def x_of(seed, shape=(B, T, D)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", [{}, {"capacity_factor": 12.0}])
def test_values_and_gradients_are_those_of_the_dense_oracle(name, how):
    apply, params, _ = moe(name, **how)
    oracle, _, _ = moe(name, implementation="dense")
    x, cotangent = x_of(1), x_of(2)

    def objective(function, params, x, cotangent):
        y, aux = function(params, x)
        losses = sum(v for k, v in aux.items() if k.endswith("_loss"))
        return jnp.sum(y * cotangent) + 10.0 * losses, y

    grad = jax.grad(functools.partial(objective, apply), argnums=(0, 1), has_aux=True)
    grads, y = grad(params, x, cotangent)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (params, x, cotangent))
        exact = jax.grad(functools.partial(objective, oracle), argnums=(0, 1), has_aux=True)
        exact_grads, exact_y = exact(*wide)
    assert relative(y, exact_y) < 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        assert relative(a, b) < 2e-5 or np.abs(b).max() == 0 == np.abs(a).max()


@pytest.mark.parametrize("how", [{}, {"capacity_factor": 1.0}, {"implementation": "dense"}])
def test_no_leak_of_the_future_or_between_rows(how):
    """Bit-equal, also where tokens are dropped: capacity counts within a sequence, in the order of its tokens."""
    apply, params, _ = moe("fine", **how)
    x = x_of(3)
    y = apply(params, x)[0]
    for t in (1, T // 2, T - 1):
        changed = apply(params, x.at[:, t].add(3.0))[0]
        np.testing.assert_array_equal(y[:, :t], changed[:, :t])
        assert not np.array_equal(y[:, t], changed[:, t])
    np.testing.assert_array_equal(y[::-1], apply(params, x[::-1])[0])


def test_one_expert_is_a_dense_ffn():
    apply, params, cfg = moe(n_experts=1, top_k=1, n_shared=0)
    model = from_dict({"model": {"d_model": D, "ffns": {"dense": {"d_ff": cfg.width(D)}}}}).model
    part = Part(lambda key, layer=0: FFNS["dense"](model.ffns["dense"], model, Maker(key, model, layer)), 0)
    one = {name: {"kernel": params["experts"][name]["kernel"][0]} for name in ("up", "gate", "down")}
    x = x_of(4)
    np.testing.assert_allclose(apply(params, x)[0], part.bind(one)(x, Context())[0], rtol=1e-5, atol=1e-6)


def test_all_experts_chosen_are_a_dense_mixture():
    apply, params, cfg = moe(n_experts=4, top_k=4, n_shared=0)
    model = from_dict({"model": {"d_model": D, "ffns": {"dense": {"d_ff": cfg.width(D)}}}}).model
    part = Part(lambda key, layer=0: FFNS["dense"](model.ffns["dense"], model, Maker(key, model, layer)), 0)
    x = x_of(9)
    weights = jax.nn.softmax(x @ params["router"], axis=-1)
    want = 0.0
    for e in range(4):
        one = {name: {"kernel": params["experts"][name]["kernel"][e]} for name in ("up", "gate", "down")}
        want += weights[..., e : e + 1] * part.bind(one)(x, Context())[0]
    np.testing.assert_allclose(apply(params, x)[0], want, rtol=2e-5, atol=1e-6)


def test_loads_come_in_the_order_of_the_layers():
    """Also where a pattern has several mixtures, each of which is scanned over its own repeats."""
    sizes = {"first": 3, "even": 4, "odd": 6}
    ffns = {name: {"kind": "moe", "n_experts": n, "d_expert": 8} for name, n in sizes.items()}
    blocks = {"prefix": ["attention/first"], "pattern": ["attention/even", "attention/odd"]}
    model = from_dict({"model": {"d_model": D, "n_layers": 6, "dtype": "float32", "ffns": ffns, **blocks}}).model
    lm = LM(model)
    _, aux = jax.jit(lm)(jax.jit(lm.init)(jax.random.key(0)), jnp.arange(B * T).reshape(B, T))
    # Loads over their mean add up to the number of experts.
    profile = lm.statistics(aux["observed"])["router_load_profile"]
    np.testing.assert_allclose(jnp.sum(profile, axis=-1), [3, 4, 6, 4, 6, 4], rtol=1e-5)


def test_the_router_is_float32_whatever_the_inputs():
    """Where x is bfloat16, its product with the router is added up in another order: nothing more than that differs."""
    apply, params, _ = moe("default")
    x = x_of(8).astype(jnp.bfloat16)
    y, aux = apply(params, x)
    _, exact = apply(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(aux["observed"]["load"], exact["observed"]["load"])
    for name in ("router_entropy", "router_z_loss", "balance_loss", "router_logit_rms"):
        assert aux[name].dtype == jnp.float32
        np.testing.assert_allclose(aux[name], exact[name], rtol=1e-6)


@pytest.mark.quick
def test_router_logits_of_bfloat16_tokens_are_those_of_float64():
    """Also for columns that are small beside others; the gradient to x is no worse than its own rounding."""
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(256, 16)) * 10.0 ** rng.uniform(-4, 0, 16), jnp.float32)
    g = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    logits, pull = jax.vjp(routing.router_logits, x, kernel)
    dx, dkernel = pull(g)
    assert (logits.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wide_x, wide_kernel, wide_g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    for got, want in ((logits, wide_x @ wide_kernel), (dkernel, wide_x.T @ wide_g)):
        for column in range(16):
            assert relative(got[:, column], want[:, column]) < 3e-7
    assert relative(dx, wide_g @ wide_kernel.T) < 2.0**-8


def test_split_experts_with_the_same_routing_are_the_coarse_ones():
    apply, params, _ = moe(n_experts=4, top_k=2, n_shared=0, d_expert=8, glu=True)
    halves, split, _ = moe(n_experts=8, top_k=4, n_shared=0, d_expert=4, glu=True, route_scale=2.0)
    split = split | {"router": jnp.repeat(params["router"], 2, axis=1), "experts": dict(split["experts"])}
    for name, axis in (("up", 2), ("gate", 2), ("down", 1)):
        pieces = jnp.stack(jnp.split(params["experts"][name]["kernel"], 2, axis), 1)
        split["experts"][name] = {"kernel": pieces.reshape(8, *pieces.shape[2:])}
    x = x_of(5)
    np.testing.assert_allclose(halves(split, x)[0], apply(params, x)[0], rtol=1e-5, atol=1e-6)


def test_bias_selects_but_does_not_weigh():
    apply, params, cfg = moe("groups-bias", n_groups=1, top_groups=1)
    x = x_of(6)
    forced = dict(params, bias=jnp.where(jnp.arange(8) < 3, 10.0, 0.0))
    logits = x.reshape(-1, D) @ params["router"]
    scores = np.asarray(jax.nn.sigmoid(logits))[:, :3]
    routed = routing.route(logits, forced["bias"], cfg)
    np.testing.assert_array_equal(np.sort(routed.experts), np.broadcast_to([0, 1, 2], (B * T, 3)))
    want = cfg.route_scale * scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(want, np.asarray(routed.experts), 1), routed.weights, rtol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(apply(p, x)[0] ** 2))(params)
    assert not np.any(gradient["bias"])


def test_balancing_by_bias_evens_loads_out():
    _, _, cfg = moe("groups-bias", n_groups=1, top_groups=1)
    rng = np.random.default_rng(1)
    skew = np.linspace(-1.5, 1.5, 8)
    bias, violations = jnp.zeros(8), []
    for _ in range(150):
        logits = jnp.asarray(rng.normal(size=(256, 8)) + skew, jnp.float32)
        load = routing.loads(routing.route(logits, bias, cfg), jnp.ones(256))
        violations.append(float(jnp.max(load) / jnp.mean(load) - 1))
        bias = routing.next_bias(bias, load, 0.02)
    assert violations[0] > 0.8 and np.mean(violations[-20:]) < 0.25
    assert abs(float(jnp.sum(bias))) < 1e-4


def test_temperature_divides_the_logits():
    apply, params, _ = moe("switch")
    plain, _, _ = moe("switch", temperature=1.0)
    cooled = {name: value for name, value in params.items() if name != "temperature"}
    cooled["router"] = params["router"] / params["temperature"]
    x = x_of(10)
    np.testing.assert_allclose(apply(params, x)[0], plain(cooled, x)[0], rtol=1e-5, atol=1e-6)
    assert apply(params, x)[1]["router_entropy"] > apply(params | {"temperature": jnp.ones(())}, x)[1]["router_entropy"]


def test_groups_limit_the_choice():
    _, _, cfg = moe("groups-bias")
    ranking = np.random.default_rng(2).random((50, 8)).astype(np.float32)
    allowed = np.asarray(routing.best_groups(jnp.asarray(ranking), cfg.n_groups, cfg.top_groups))
    strength = np.sort(ranking.reshape(50, 4, 2), -1).sum(-1)
    best = np.argsort(-strength, -1)[:, :2]
    want = np.zeros((50, 4), bool)
    np.put_along_axis(want, best, True, -1)
    np.testing.assert_array_equal(allowed, np.repeat(want, 2, -1))


def test_capacity_says_what_it_drops_and_z_loss_by_hand():
    apply, params, cfg = moe("fine", capacity_factor=1.0)
    x = x_of(10)
    _, aux = apply(params, x)
    logits = np.asarray(x.reshape(-1, D) @ params["router"], np.float64)
    chosen = np.argsort(-logits, -1)[:, : cfg.top_k].reshape(B, -1)
    counts = np.stack([np.bincount(row, minlength=cfg.n_experts) for row in chosen])
    lost = np.maximum(counts - cfg.rows_per_expert(T), 0).sum() / chosen.size
    assert float(aux["router_dropped"]) == pytest.approx(lost, rel=1e-5) and 0 < lost < 0.5
    log_z = np.log(np.exp(logits).sum(-1))
    assert float(aux["router_z_loss"]) == pytest.approx(cfg.z_loss * np.mean(log_z**2), rel=1e-5)


def test_capacity_drops_as_counted_by_hand():
    rng, rows, capacity, n = np.random.default_rng(3), 2, 3, 4
    experts = np.argsort(rng.random((rows * 10, n)), -1)[:, :2]
    slots, sources = dispatch.assign_capacity(jnp.asarray(experts), n, rows, capacity)
    want = np.full(experts.shape, rows * n * capacity)
    for row in range(rows):
        used = [0] * n
        for t in range(row * 10, row * 10 + 10):
            for j, expert in enumerate(experts[t]):
                if used[expert] < capacity:
                    want[t, j] = (row * n + expert) * capacity + used[expert]
                    used[expert] += 1
    np.testing.assert_array_equal(slots, want)
    for slot, source in enumerate(np.asarray(sources)):
        found = np.argwhere(want.reshape(-1) == slot)
        assert source == (found[0, 0] if len(found) else experts.size)


@pytest.mark.parametrize("rows", [1, 3])
def test_balance_loss_by_hand(rows):
    """1 where loads are even; a mean over sequences where each counts alone; padding does not count."""
    rng, n, k = np.random.default_rng(4), 5, 2
    logits = rng.normal(size=(30, n))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts = np.argsort(-logits, -1)[:, :k]
    real = (np.arange(30) % 10 < 8).astype(np.float32)
    total = 0.0
    for part in np.split(np.arange(30), rows):
        kept = part[real[part] > 0]
        share = np.bincount(experts[kept].reshape(-1), minlength=n) / (k * len(kept))
        total += n * np.sum(share * probabilities[kept].mean(0)) / rows
    routed = routing.Routing(jnp.asarray(experts), jnp.ones((30, k)), jnp.asarray(probabilities))
    assert float(routing.balance_loss(routed, jnp.asarray(real), rows)) == pytest.approx(total, rel=1e-5)
    even = routing.Routing(jnp.arange(30)[:, None] % n, jnp.ones((30, 1)), jnp.full((30, n), 1 / n))
    assert float(routing.balance_loss(even, jnp.ones(30), 1)) == pytest.approx(1.0)


def route_to(experts, n_experts=8):
    """Routing of tokens to given experts [N, k]."""
    experts = jnp.asarray(experts)
    return routing.Routing(experts, jnp.ones(experts.shape), jnp.full((len(experts), n_experts), 1 / n_experts))


def test_specialisation_in_documents():
    """Each document on its own experts: ln(documents); experts drawn alike in all of them: 0, in spite of chance."""
    documents = jnp.asarray(np.repeat([[1, 2, 3, 4]], 4, 0).repeat(32, 1))  # 4 rows of 4 documents of 32 tokens
    known = np.stack([2 * (np.asarray(documents) - 1), 2 * (np.asarray(documents) - 1) + 1], -1).reshape(-1, 2)
    ones = jnp.ones(documents.size)
    chance = (16 - 1) * (8 - 1) / 2 / known.size
    found = routing.document_information(route_to(known), ones, 4, documents)
    assert float(found) == pytest.approx(np.log(4) - chance, rel=1e-5)
    rng = np.random.default_rng(5)
    information = jax.jit(lambda e: routing.document_information(route_to(e), ones, 4, documents))
    blind = [float(information(rng.integers(0, 8, (documents.size, 1)))) for _ in range(40)]
    assert abs(np.mean(blind)) < 0.1 * (16 - 1) * (8 - 1) / 2 / documents.size
    # Padding counts for nothing, and without documents a row is one.
    half = (np.arange(128) < 64).astype(np.float32)
    real = jnp.asarray(np.tile(half, 4))
    assert float(routing.document_information(route_to(known), real, 4, documents)) == pytest.approx(
        np.log(2) - (8 - 1) * (4 - 1) / 2 / known[:256].size, rel=1e-5
    )
    rows_alone = routing.document_information(route_to(known), ones, 4)
    assert float(rows_alone) < 0  # all rows are alike
    same = routing.document_information(route_to(known), ones, 4, jnp.ones_like(documents))
    assert float(rows_alone) == pytest.approx(float(same), rel=1e-5)


def test_statistics_ignore_padding():
    apply, params, _ = moe("default", balance_scope="step")
    x = x_of(7)
    ids = jnp.where(jnp.arange(T) < T - 5, 1, 0) * jnp.ones((B, 1), jnp.int32)
    _, aux = apply(params, x, ids)
    assert float(jnp.sum(aux["observed"]["load"])) == B * (T - 5) * 2
    _, changed = apply(params, x.at[:, -5:].add(2.0), ids)
    for name, value in aux.items():
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), value, changed[name])), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 9}, "top_k = 9: must be at most the 8 experts"),
        ({"n_groups": 3}, "n_groups = 3: must divide n_experts = 8"),
        ({"n_groups": 4, "top_groups": 5}, "top_groups = 5: must be at most n_groups"),
        ({"n_groups": 4, "top_k": 3}, "top_k = 3: must be at most the 2 experts"),
        ({"capacity_factor": 1.0, "implementation": "dense"}, "implementation = 'dense': drops nothing"),
        ({"capacity_factor": 1.0, "parallel": "expert"}, "capacity_factor = 1.0: must be 0 with parallel"),
        ({"top_k": 1}, "normalise = True: must be False with top_k = 1"),
        ({"activation": "reul"}, "did you mean 'relu'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": {"pattern": ["attention/moe"], "ffns": {"moe": settings}}})


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_executed_flops_are_those_declared_and_padding(factor):
    _, _, cfg = moe("fine", capacity_factor=factor)
    model = from_dict({"model": {"d_model": D}}).model
    part = Part(lambda key, layer=0: FFNS["moe"](cfg, model, Maker(key, model, layer)), 0)
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
    params = jax.eval_shape(lambda: part.init(jax.random.key(0), 0))
    traced = traced_matmul_flops(lambda params, x: part.bind(params)(x, None)[0], params, x) / length
    declared = FFNS["moe"].flops_per_token(cfg, model)
    assert declared.hardware <= traced * (1 + 1e-9)
    if factor:
        assert traced == pytest.approx(declared.hardware)
    else:  # at most one tile of padding per expert
        assert traced < 1.1 * declared.hardware
