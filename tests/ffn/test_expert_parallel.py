"""Experts over 8 emulated devices: values and gradients of one device; what does not fit is dropped and counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.ffn import FFNS
from efficient_lm.layers import Context, Maker
from efficient_lm.model import Part

D, B, T = 16, 8, 12


@functools.cache
def layer(**settings):
    settings = {"n_experts": 8, "top_k": 3, "d_expert": 8, "activation": "polynorm"} | settings
    model = from_dict({"model": {"d_model": D, "pattern": ["attention/moe"], "ffns": {"moe": settings}}}).model
    cfg = model.ffns["moe"]
    return Part(lambda key, layer=0: FFNS["moe"](cfg, model, Maker(key, model, layer)), 0)


def objective(part, params, x, cotangent):
    y, aux = part.bind(params)(x, Context())
    return jnp.sum(y * cotangent) + aux["balance_loss"] + aux["router_z_loss"], (y, aux)


def on_mesh(part, params, x, cotangent, fsdp):
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), B, jax.devices()[:8])
    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place({"prefix/0/ffn": params}, mesh))["prefix/0/ffn"]
    rows = sharding.batch_sharding(mesh)
    grad = jax.grad(functools.partial(objective, part), argnums=(0, 1), has_aux=True)
    function = jax.jit(sharding.split_kernels(grad, mesh), out_shardings=((places, rows), None))
    kernel = places["experts"]["up"]["kernel"]
    assert kernel.spec[0] == ("fsdp" if fsdp > 1 else None)
    return function(jax.device_put(params, places), *jax.device_put((x, cotangent), rows))


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
    one = jax.jit(jax.grad(functools.partial(objective, part), argnums=(0, 1), has_aux=True))(*inputs)
    many = on_mesh(part, *inputs, fsdp)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b) + 1e-7


def test_experts_that_overflow_drop_rows_and_say_so(inputs):
    """One expert gets everything: a device holds the rows of the first factor x mean only."""
    params, x, cotangent = inputs
    part = layer(parallel="expert", exchange_factor=1.0)
    skewed = dict(params, router=params["router"].at[:, :3].add(100.0 * jnp.ones((D, 1))))
    _, (y, aux) = on_mesh(part, skewed, jnp.abs(x), cotangent, 4)
    # Experts 0-2 are all chosen: devices 0 and 1 of 4 get 2/3 and 1/3 of the choices and have room for 1/4.
    assert float(aux["router_dropped"]) == pytest.approx(1 - 2 * 0.25, abs=0.02)
    assert np.all(np.isfinite(y))
