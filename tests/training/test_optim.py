"""Optimizer and schedules against their definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import OptimConfig
from efficient_lm.layers import ROLES
from efficient_lm.model import LM
from efficient_lm.optim import SCHEDULES, make_optimizer, make_schedule, warmup_steps
from efficient_lm.optim.base import parameter_groups
from efficient_lm.schema import ConfigError


def adamw_by_hand(p, gradients, lr, cfg, decay, eps, factor):
    """1711.05101 with bias correction, float64."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
        direction = (m / (1 - cfg.beta1**t)) / (np.sqrt(v / (1 - cfg.beta2**t)) + cfg.eps * eps)
        p = p - lr * factor * (direction + cfg.weight_decay * decay * p)
    return p


@pytest.mark.parametrize("mup", [False, True], ids=["standard", "muP with depth"])
def test_adamw_equals_its_definition_for_every_role(small, mup):
    # A large eps makes its multiplier visible.
    changes = {"optim.eps": 0.05, "optim.clip_norm": 0.0, "model.tie_embeddings": False}
    if mup:
        changes |= {"model.parametrization": "mup", "model.base_width": 4, "model.base_depth": 1}
        changes |= {"model.depth_alpha": 0.5}
    cfg = small(**changes)
    lm = LM(cfg.model)
    params = jax.jit(lm.init)(jax.random.key(0))
    optimizer = make_optimizer(lm, cfg.optim)
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: rng.normal(0, 0.1, p.shape).astype(np.float32), params) for _ in range(4)]
    state, trained = optimizer.init(params), params
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, learning_rate=0.02))
    for g in gradients:
        updates, state = update(g, state, trained)
        trained = jax.tree.map(jnp.add, trained, updates)

    # (learning rate, weight decay, eps) by role: m = 4, l = 2, alpha = 1/2.
    table = dict.fromkeys(ROLES, (1, 1, 1)) | {"vector": (1, 0, 1), "embedding": (1, 0, 1)}
    if mup:
        root = 2**-0.5
        table = {
            "hidden": (root / 4, 4, root / 4),
            "fixed": (root, 1, root),
            "vector": (root, 0, root),
            "embedding": (1, 0, 1 / 4),
            "output": (1, 1, 1),
        }
    seen = set()
    for (path, p), role, *rest in zip(
        jax.tree_util.tree_leaves_with_path(params),
        *(jax.tree.leaves(tree) for tree in (lm.roles(), trained, *gradients)),
        strict=True,
    ):
        factor, decay, eps = table[role]
        wide = [np.asarray(a, np.float64) for a in (p, *rest)]
        expected = adamw_by_hand(wide[0], wide[2:], 0.02, cfg.optim, decay, eps, factor)
        np.testing.assert_allclose(wide[1], expected, rtol=2e-5, atol=2e-6, err_msg=f"{path} {role}")
        seen.add(role)
    assert {"hidden", "vector", "embedding", "output"} <= seen


def test_learning_rate_times_decay_of_hidden_matrices_does_not_depend_on_width(small):
    products = set()
    for width in (16, 32, 64):
        lm = LM(small(**{"model.d_model": width, "model.parametrization": "mup", "model.base_width": 16}).model)
        groups = parameter_groups(lm, OptimConfig())
        for role, lr, decay in zip(*map(jax.tree.leaves, (groups.roles, groups.lr, groups.decay)), strict=True):
            if role == "hidden":
                products.add(lr * decay)
    assert products == {1.0}


def test_embeddings_decay_only_when_asked(small):
    for asked in (False, True):
        groups = parameter_groups(LM(small().model), OptimConfig(decay_embeddings=asked))
        assert groups.decay["embed"]["table"] == float(asked)
        assert groups.decay["final_norm"]["scale"] == 0.0


def test_clipping_limits_the_global_norm_of_what_adam_sees(small):
    cfg = small(**{"optim.clip_norm": 0.5, "optim.eps": 1e3, "optim.weight_decay": 0.0, "optim.beta1": 0.0})
    lm = LM(cfg.model)
    params = jax.jit(lm.init)(jax.random.key(0))
    optimizer = make_optimizer(lm, cfg.optim)
    size = sum(p.size for p in jax.tree.leaves(params))
    for scale in (0.001, 10.0):
        gradients = jax.tree.map(lambda p: jnp.full(p.shape, scale), params)  # noqa: B023
        updates, _ = optimizer.update(gradients, optimizer.init(params), params, learning_rate=1.0)
        # With a huge eps Adam is u = g / eps, so the update shows the clipped gradient.
        norm = np.sqrt(sum(np.square(np.asarray(u, np.float64)).sum() for u in jax.tree.leaves(updates))) * 1e3
        np.testing.assert_allclose(norm, min(0.5, scale * size**0.5), rtol=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_rise_to_the_peak_and_end_where_they_should(name):
    cfg = OptimConfig(lr=0.3, schedule=name, warmup=0.1, decay=0.25, final_lr=0.2)
    schedule = make_schedule(cfg, 40)
    values = np.array([schedule(step) for step in range(41)])
    np.testing.assert_allclose(values[:4], 0.3 * np.array([0.25, 0.5, 0.75, 1.0]))
    assert np.all(np.diff(values[4:]) <= 1e-12)
    assert values[4] == 0.3
    np.testing.assert_allclose(values[40], 0.3 if name == "constant" else 0.06)
    if name in ("wsd", "linear"):
        assert np.all(values[4:31] == 0.3) and values[31] < 0.3
    halfway = {"cosine": (22, 0.18), "linear": (35, 0.18), "wsd": (35, 0.3 - 0.24 * 0.5**0.5)}
    if name in halfway:
        step, value = halfway[name]
        np.testing.assert_allclose(values[step], value)


def test_warmup_is_at_least_one_step_unless_off():
    assert warmup_steps(OptimConfig(warmup=0.001), 10) == 1
    assert warmup_steps(OptimConfig(warmup=0.0), 10) == 0
    assert make_schedule(OptimConfig(warmup=0.0, lr=0.5), 10)(0) == 0.5


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"config\.optim\.schedule = 'cosin'.*did you mean 'cosine'"):
        make_schedule(OptimConfig(schedule="cosin"), 10)
