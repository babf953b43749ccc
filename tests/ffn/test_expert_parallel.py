"""Experts over 8 emulated devices: values and gradients of one device; what does not fit is dropped and counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.ffn import FFNS, routing
from efficient_lm.layers import Context, Maker
from efficient_lm.model import Part
from tests.ffn.test_moe_extremes import forced, kept_by_capacity, weighing_only

D, B, T = 16, 8, 12


@functools.cache
def layer(**settings):
    settings = {"n_experts": 8, "top_k": 3, "d_expert": 8, "activation": "polynorm"} | settings
    model = from_dict({"model": {"d_model": D, "pattern": ["attention/moe"], "ffns": {"moe": settings}}}).model
    cfg = model.ffns["moe"]
    part = Part(lambda key, layer=0: FFNS["moe"](cfg, model, Maker(key, model, layer)), 0)
    part.cfg = cfg
    return part


def objective(part, params, x, cotangent):
    y, aux = part.bind(params)(x, Context())
    return jnp.sum(y * cotangent) + aux["balance_loss"] + aux["router_z_loss"], (y, aux)


def on_mesh(part, params, x, cotangent, fsdp):
    function, places, rows = compiled(part, fsdp)
    return function(jax.device_put(params, places), *jax.device_put((x, cotangent), rows))


@functools.cache
def compiled(part, fsdp):
    """(gradient on a mesh, shardings of parameters, of rows)."""
    params = jax.eval_shape(lambda: part.init(jax.random.key(0), 0))
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), B, jax.devices()[:8])
    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place({"prefix/0/ffn": params}, mesh))["prefix/0/ffn"]
    rows = sharding.batch_sharding(mesh)
    grad = jax.grad(functools.partial(objective, part), argnums=(0, 1), has_aux=True)
    kernel = places["experts"]["up"]["kernel"]
    assert kernel.spec[0] == ("fsdp" if fsdp > 1 else None)
    return jax.jit(sharding.split_kernels(grad, mesh), out_shardings=((places, rows), None)), places, rows


def on_one(part, *inputs):
    return jax.jit(jax.grad(functools.partial(objective, part), argnums=(0, 1), has_aux=True))(*inputs)


def assert_equal(many, one):
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b) + 1e-7


@pytest.fixture(scope="module")
def inputs():
    params = layer().init(jax.random.key(0), 0)
    x, cotangent = (jax.random.normal(jax.random.key(seed), (B, T, D)) for seed in (1, 2))
    return params, x, cotangent


@pytest.mark.parametrize(
    "settings, fsdp",
    [
        ({"parallel": "data"}, 8),
        ({"parallel": "data"}, 1),
        ({"parallel": "data", "capacity_factor": 1.0}, 4),
        ({"parallel": "expert", "exchange_factor": 8.0}, 8),
        ({"parallel": "expert", "exchange_factor": 4.0}, 4),
    ],
    ids=["fsdp", "replicated", "capacity", "experts over 8", "experts over 4 of 8"],
)
def test_devices_give_what_one_gives(inputs, settings, fsdp):
    part = layer(**settings)
    assert_equal(on_mesh(part, *inputs, fsdp), on_one(part, *inputs))


@pytest.mark.parametrize(
    "settings, fsdp", [({"parallel": "data"}, 8), ({"parallel": "expert", "exchange_factor": 4.0}, 4)]
)
def test_one_device_may_get_every_token(inputs, settings, fsdp):
    """Experts 0 to 2 take everything: with the experts over 4 devices two of these have no row at all."""
    params, x, cotangent = inputs
    params, x = forced(params, x, [0, 1, 2])
    many = on_mesh(layer(**settings), params, x, cotangent, fsdp)
    (grads, _), (_, aux) = many
    np.testing.assert_array_equal(aux["observed"]["load"], B * T * (np.arange(8) < 3))
    assert settings["parallel"] == "data" or float(aux["router_dropped"]) == 0.0
    assert not np.any(grads["experts"]["down"]["kernel"][3:])
    assert_equal(many, on_one(layer(**settings), params, x, cotangent))


def test_rows_beyond_the_exchange_are_the_oracle_without_them(inputs, monkeypatch):
    """Each device sends another at most 9 of its 36 choices, the first by place: values, gradients, the share lost."""
    params, x, cotangent = inputs
    params, x = forced(params, x, [0, 1, 2])
    many = on_mesh(layer(parallel="expert", exchange_factor=1.0), params, x, cotangent, 4)
    part = layer(implementation="dense")
    routed = routing.route((x @ params["router"]).reshape(-1, 8), None, part.cfg)
    kept = kept_by_capacity(np.asarray(routed.experts) // 2, B, 9)
    aux = many[1][1]
    assert float(aux.pop("router_dropped")) == pytest.approx(1 - kept.mean()) and 0.4 < 1 - kept.mean() < 0.6
    weighing_only(monkeypatch, kept)
    assert_equal(many, on_one(part, params, x, cotangent))
