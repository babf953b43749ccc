"""What configs/interventions.py changes: each part against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.interventions import INTERVENTIONS
from efficient_lm.config import from_dict, load
from efficient_lm.counting import count_params
from efficient_lm.layers import Context, Linear, Maker, power_iteration
from efficient_lm.model import LM, Part
from efficient_lm.norms import RMSNorm
from efficient_lm.optim import make_optimizer
from efficient_lm.train import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

D = 16
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(**model):
    values = {"d_model": D, "n_layers": 3, "vocab_size": 8, "dtype": "float32", "scan_unroll": 1, **model}
    return from_dict({"model": values})


def blocks(cfg, params, x, ctx):
    """The stream after every block of a model that is one scanned pattern."""
    lm, out = LM(cfg.model), []
    for layer in range(cfg.model.n_layers):
        own = jax.tree.map(lambda a: a[layer], params["pattern"]["0"])  # noqa: B023
        out.append((lm.parts["pattern/0"].bind(own), x))
        x = out[-1][0](x, ctx)[0]
    return out, x


def inputs(cfg):
    params = compiled(LM(cfg.model).init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    return params, x, Context(None, jnp.broadcast_to(jnp.arange(5), (2, 5)))


def test_layernorm_scaling_divides_what_a_branch_gets_by_the_root_of_the_layer():
    cfg = config(residual="layernorm_scaling")
    walked, _ = blocks(cfg, *inputs(cfg))
    ctx = inputs(cfg)[2]
    for layer, (block, x) in enumerate(walked, 1):
        h = x + block.mixer(block.mixer_norm(x) / layer**0.5, ctx)[0]
        wanted = h + block.ffn(block.ffn_norm(h) / layer**0.5, ctx)[0]
        np.testing.assert_allclose(block(x, ctx)[0], wanted, rtol=1e-5, atol=1e-6)
    # With one layer nothing is scaled.
    one, plain = config(residual="layernorm_scaling", n_layers=1), config(n_layers=1)
    params = compiled(LM(one.model).init)(jax.random.key(0))
    tokens = jnp.asarray([[1, 2, 3]])
    logits = LM(one.model)(params, tokens)[0]
    del params["pattern"]["0"]["norm_scale"]
    np.testing.assert_array_equal(logits, LM(plain.model)(params, tokens)[0])


def test_sandwich_norms_both_ends_of_a_branch():
    cfg = config(residual="sandwich")
    walked, _ = blocks(cfg, *inputs(cfg))
    ctx = inputs(cfg)[2]
    for block, x in walked:
        h = x + block.mixer_out_norm(block.mixer(block.mixer_norm(x), ctx)[0])
        wanted = h + block.ffn_out_norm(block.ffn(block.ffn_norm(h), ctx)[0])
        np.testing.assert_allclose(block(x, ctx)[0], wanted, rtol=1e-6)
        assert isinstance(block.mixer_out_norm, RMSNorm)


@functools.cache
def linear(width=7):
    model = config(parametrization="sigma").model
    part = Part(lambda key, layer=0: Linear(Maker(key, model), 12, width), 0)
    return part, part.init(jax.random.key(3), 0)


def test_sigma_reparam_is_gain_over_the_largest_singular_value():
    part, params = linear()
    kernel = np.asarray(params["kernel"], np.float64)
    largest = np.linalg.svd(kernel, compute_uv=False)[0]
    estimate = jnp.linalg.norm(params["kernel"] @ params["sigma_vector"])
    assert 0.95 * largest < estimate <= largest * (1 + 1e-6)
    for _ in range(200):
        params = power_iteration(params)
    params["sigma_gain"] = jnp.float32(1.7)
    weight = part.bind(params).weight(jnp.float32)
    np.testing.assert_allclose(weight, 1.7 / largest * kernel, rtol=1e-5)
    # The size of the kernel does not matter, so that the gradient stands at right angles to it.
    bigger = params | {"kernel": 9.0 * params["kernel"]}
    np.testing.assert_allclose(part.bind(bigger).weight(jnp.float32), weight, rtol=1e-5)
    x = jax.random.normal(jax.random.key(1), (4, 12))
    grad = jax.grad(lambda params: jnp.sum(jnp.sin(part.bind(params)(x))))(params)
    assert abs(jnp.vdot(grad["kernel"], kernel)) < 1e-4 * jnp.linalg.norm(grad["kernel"]) * np.linalg.norm(kernel)
    assert not grad["sigma_vector"].any()
    # d sigma / dW = v u^T of the singular vectors, in float64.
    left, values, right = np.linalg.svd(kernel)
    y = np.asarray(x, np.float64) @ kernel * 1.7 / values[0]
    dy = np.asarray(x, np.float64).T @ np.cos(y)
    wanted = 1.7 / values[0] * (dy - np.sum(dy * kernel) / values[0] * np.outer(left[:, 0], right[0]))
    np.testing.assert_allclose(grad["kernel"], wanted, rtol=1e-3, atol=1e-4)


def test_sigma_vectors_follow_the_kernels_in_training_and_are_counted():
    cfg = config(parametrization="sigma", pattern=["mla", "rg_lru"], n_layers=5)
    lm, optimizer = LM(cfg.model), make_optimizer(LM(cfg.model), cfg.optim)
    params = compiled(lm.init)(jax.random.key(0))
    assert count_params(cfg)["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 7)))
    batch = {"inputs": tokens[None, :, :-1], "targets": tokens[None, :, 1:], "loss_mask": jnp.ones((1, 2, 6))}
    state = {"params": params, "opt_state": optimizer.init(params), "ema": {}, "step": jnp.zeros((), jnp.int32)}
    step = compiled(make_train_step(lm, cfg, optimizer))
    for _ in range(3):
        state, _ = step(state, batch, 1e-3)
    leaves = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(state["params"])}
    vectors = [name for name in leaves if name.endswith("['sigma_vector']")]
    assert len(vectors) > 10
    for name in vectors:
        kernel = np.asarray(leaves[name.replace("sigma_vector", "kernel")], np.float64)
        largest = np.linalg.norm(kernel, 2, axis=(-2, -1))
        found = np.linalg.norm(np.einsum("...io,...o->...i", kernel, leaves[name]), axis=-1)
        assert (found > 0.93 * largest).all() and (found < largest * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_is_a_config_that_runs(name):
    tiny = {"model.d_model": 16, "model.n_layers": 2, "model.dtype": "float32", "train.seq_len": 16}
    cfg = load(f"configs/interventions.py:{name}", tiny)
    base = load("configs/interventions.py:baseline", tiny)
    assert (cfg.model != base.model) == (name != "baseline")
    lm = LM(cfg.model)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    logits, _ = jax.eval_shape(lm, params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert logits.shape == (2, 16, 256)
    assert count_params(cfg)["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
