"""Mixture of experts at its edges: one expert takes everything, scores tie, capacity drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import from_dict
from efficient_lm.ffn import dispatch, routing
from efficient_lm.model import LM
from tests.ffn.test_moe import B, D, T, moe, relative, x_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def forced(params, x, experts):
    """Parameters and tokens whose logits are about 1 for `experts` and -2 for others: the first channel of x is 1.

    No wider apart: the derivative of a saturated score, s (1 - s), has few digits in float32.
    """
    router = (0.2 * params["router"]).at[0].set(-2.0).at[0, jnp.asarray(experts)].set(1.0)
    return params | {"router": router}, x.at[..., 0].set(1.0)


def gradients(apply, params, x, cotangent):
    """(gradients to params and x, y, aux) of <y, cotangent>."""

    def objective(params, x, cotangent):
        y, aux = apply(params, x)
        return jnp.sum(y * cotangent), (y, aux)

    grads, (y, aux) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x, cotangent)
    return grads, y, aux


def exact_gradients(apply, *arrays):
    with jax.enable_x64(True):
        return gradients(apply, *jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), arrays))


def assert_close(got, want):
    """Relative to each array; exactly 0 where the reference is."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 2e-5 or np.abs(b).max() == 0 == np.abs(a).max()


@pytest.mark.parametrize("name, experts", [("switch", [3]), ("groups-bias", [2, 3, 5])])
def test_dropless_is_exact_where_a_few_experts_take_everything(name, experts):
    """Against float64: values and all gradients, which are exactly 0 for the experts without a token."""
    apply, params, cfg = moe(name)
    oracle, _, _ = moe(name, implementation="dense")
    params, x = forced(params, x_of(1), experts)
    cotangent = x_of(2)
    grads, y, aux = jax.jit(functools.partial(gradients, apply))(params, x, cotangent)
    load = np.zeros(cfg.n_experts)
    load[experts] = y.size / D
    np.testing.assert_array_equal(aux["observed"]["load"], load)
    exact, exact_y, _ = exact_gradients(oracle, params, x, cotangent)
    assert relative(y, exact_y) < 1e-5
    assert_close(grads, exact)
    idle = np.setdiff1d(np.arange(cfg.n_experts), experts)
    for layer in ("up", "down"):
        kernel = grads[0]["experts"][layer]["kernel"]
        assert not np.any(kernel[idle]) and np.all(np.any(kernel, axis=(1, 2))[np.array(experts)])


def kept_by_capacity(experts, rows, capacity):
    """bool [N, k]: the choices that find room, by the order of tokens in each of `rows` sequences."""
    kept, used = np.zeros(experts.shape, bool), {}
    length = len(experts) // rows
    for t, j in np.ndindex(experts.shape):
        place = t // length, int(experts[t, j])
        used[place] = used.get(place, 0) + 1
        kept[t, j] = used[place] <= capacity
    return kept


def weighing_only(monkeypatch, kept):
    """From here on routing gives the choices outside `kept` [N, k] no weight."""
    route = routing.route

    def masked(*arguments):
        routed = route(*arguments)
        return routed._replace(weights=routed.weights * jnp.asarray(kept, routed.weights.dtype))

    monkeypatch.setattr(routing, "route", masked)


def test_capacity_that_drops_is_the_oracle_without_the_dropped_choices(monkeypatch):
    """Values, all gradients and the share that is reported; weights of the other choices do not grow."""
    apply, params, cfg = moe("fine", capacity_factor=0.5)
    x, cotangent = x_of(3), x_of(4)
    grads, y, aux = jax.jit(functools.partial(gradients, apply))(params, x, cotangent)
    logits = np.asarray(x.reshape(-1, D) @ params["router"])
    chosen = np.argsort(-logits, -1)[:, : cfg.top_k]
    kept = kept_by_capacity(chosen, B, cfg.rows_per_expert(T))
    assert float(aux["router_dropped"]) == pytest.approx(1 - kept.mean()) and 0.2 < 1 - kept.mean() < 0.8
    weighing_only(monkeypatch, kept)
    oracle = moe.__wrapped__("fine", implementation="dense")[0]
    exact, exact_y, _ = exact_gradients(oracle, params, x, cotangent)
    assert relative(y, exact_y) < 1e-5
    assert_close(grads, exact)


def test_capacity_with_all_tokens_on_one_expert_keeps_the_first_of_each_sequence():
    apply, params, cfg = moe("switch", temperature=1.0, capacity_factor=1.0, n_shared=0)
    params, x = forced(params, x_of(5), [3])
    y, aux = apply(params, x)
    room = cfg.rows_per_expert(T)
    assert float(aux["router_dropped"]) == pytest.approx(1 - room / T)
    assert np.all(np.any(y[:, :room], axis=-1)) and not np.any(y[:, room:])


@pytest.mark.quick
def test_group_limited_choice_against_a_search_and_at_ties():
    """Distinct experts out of `top_groups` groups, whatever ties; the bias may make every ranking negative."""
    _, _, cfg = moe("groups-bias")
    rng, size = np.random.default_rng(0), cfg.n_experts // cfg.n_groups
    logits = rng.normal(size=(200, 8)).astype(np.float32)
    logits[:40] = 0.0  # all tie
    logits[40:80] = np.round(logits[40:80])  # many tie
    for shift in (0.0, -5.0):
        bias = (shift + 0.3 * rng.normal(size=8) * (np.arange(8) > 3)).astype(np.float32)
        routed = routing.route(jnp.asarray(logits), jnp.asarray(bias), cfg)
        experts = np.asarray(routed.experts)
        ranking = np.asarray(jax.nn.sigmoid(jnp.asarray(logits)) + bias)
        strength = np.sort(ranking.reshape(200, cfg.n_groups, size), -1)[..., -2:].sum(-1)
        groups = np.argsort(-strength, axis=-1, kind="stable")[:, : cfg.top_groups]
        allowed = (np.arange(8) // size == groups[..., None]).any(1)
        want = np.argsort(-np.where(allowed, ranking, -np.inf), axis=-1, kind="stable")[:, : cfg.top_k]
        np.testing.assert_array_equal(experts, want)  # ties: the first
        assert all(len(set(row)) == cfg.top_k for row in experts)
        np.testing.assert_allclose(np.sum(routed.weights, -1), cfg.route_scale, rtol=1e-6)


@pytest.mark.quick
def test_ties_without_groups_choose_distinct_experts():
    """Also where probabilities underflow to 0: dispatch relies on a token's experts being different."""
    _, _, cfg = moe("fine")
    logits = jnp.zeros((6, 12)).at[1:3, 5].set(200.0).at[3:].set(-300.0 * jnp.arange(12))
    routed = routing.route(logits, None, cfg)
    assert all(len(set(row)) == cfg.top_k for row in np.asarray(routed.experts))
    slots, sources, sizes = dispatch.sort_by_expert(routed.experts, 12)
    assert sorted(np.asarray(slots).reshape(-1)) == list(range(24)) and int(sizes.sum()) == 24
    np.testing.assert_array_equal(np.asarray(slots).reshape(-1)[sources], np.arange(24))


def test_one_bias_for_all_experts_changes_nothing():
    """Neither outputs, nor losses, nor gradients: it takes part in the order of the scores only."""
    apply, params, cfg = moe("groups-bias", n_groups=1, top_groups=1, balance=0.1)
    x, cotangent = x_of(6), x_of(7)
    run = jax.jit(functools.partial(gradients, apply))
    plain = run(params | {"bias": jnp.zeros(8)}, x, cotangent)
    moved = run(params | {"bias": jnp.full(8, 0.25)}, x, cotangent)
    jax.tree.map(np.testing.assert_array_equal, plain, moved)


def test_losses_of_the_router_add_up_over_layers():
    """z-loss and balancing loss are sums over layers of means over tokens (2101.03961: added for each layer)."""
    ffn = {"n_experts": 4, "d_expert": 8, "z_loss": 0.5, "balance": 0.25}
    cfg = {"d_model": D, "n_layers": 3, "vocab_size": 16, "pattern": ["attention/moe"], "ffns": {"moe": ffn}}
    lm = LM(from_dict({"model": cfg}).model)
    params = lm.init(jax.random.key(0))
    params["pattern"]["0"]["ffn"]["router"] *= 0.0  # logits 0: z = ln 4, probabilities even
    aux = jax.jit(lm)(params, jnp.arange(24).reshape(2, 12) % 16)[1]
    assert float(aux["router_z_loss"]) == pytest.approx(3 * 0.5 * np.log(4) ** 2, rel=1e-5)
    assert float(aux["balance_loss"]) == pytest.approx(3 * 0.25, rel=1e-5)


def test_scopes_differ_where_each_sequence_has_its_own_expert():
    """Even over the batch (loss 1), one expert per sequence (loss about n_experts); bound to the loads of the scope."""
    loss = {}
    for scope in ("batch", "sequence", "step"):
        apply, params, _ = moe(n_experts=4, top_k=1, normalise=False, n_shared=0, balance=1.0, balance_scope=scope)
        router = jnp.zeros((D, 4)).at[:4].set(12.0 * jnp.eye(4))
        x = jnp.repeat(jnp.eye(4, D)[:, None], T, axis=1)  # sequence r goes to expert r
        params = params | {"router": router}
        if scope == "step":
            params["load"] = jnp.array([3.0, 1.0, 0.0, 0.0])
        loss[scope] = float(apply(params, x)[1]["balance_loss"])
    assert loss["batch"] == pytest.approx(1.0, rel=1e-3) and loss["sequence"] == pytest.approx(4.0, rel=1e-3)
    assert loss["step"] == pytest.approx(1.0, rel=1e-3)  # P is even: f of the last step does not matter
