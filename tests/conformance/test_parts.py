"""Every registered FFN, activation, norm and residual topology: declared sizes, exact values, no mixing of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.blocks import RESIDUALS
from efficient_lm.config import from_dict
from efficient_lm.counting import count_params, forward_flops, traced_matmul_flops
from efficient_lm.ffn import ACTIVATIONS, FFNS
from efficient_lm.ffn.activations import activation_params, make_activation
from efficient_lm.layers import Maker
from efficient_lm.model import LM, Part
from efficient_lm.norms import NORMS
from efficient_lm.schema import ConfigError

D = 16
MODEL = from_dict({"model": {"d_model": D}}).model
# What a grouped product executes depends on how tokens fall (tests/ffn).
EXACT = {"moe": {"implementation": "dense"}}
FFN_CASES = {name: (name, EXACT.get(name, {})) for name in FFNS if FFNS[name].present} | {
    f"dense-{act}-{'glu' if glu else 'mlp'}": ("dense", {"activation": act, "glu": glu})
    for act in ACTIVATIONS
    for glu in (True, False)
}


def part_of(create):
    part = Part(lambda key, layer=0: create(Maker(key, MODEL, layer)), 0)
    return part, part.init(jax.random.key(0), 0)


def x_of(seed, shape=(2, 5, D), scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", FFN_CASES)
def test_ffn_declares_what_it_has_and_works_on_each_token_alone(name):
    kind, settings = FFN_CASES[name]
    model = from_dict({"model": {"d_model": D, "ffns": {kind: settings}, "pattern": [f"attention/{kind}"]}}).model
    cfg, cls = model.ffns[kind], FFNS[kind]
    part, params = part_of(lambda make: cls(cfg, model, make))
    assert cls.param_count(cfg, model) == sum(p.size for p in jax.tree.leaves(params))
    assert cls.active_param_count(cfg, model) <= cls.param_count(cfg, model)

    def apply(params, x):
        return part.bind(params)(x, None)[0]

    x = x_of(1)
    traced = traced_matmul_flops(apply, params, x[:1]) / x.shape[1]
    assert cls.flops_per_token(cfg, model).hardware == pytest.approx(traced)
    y, changed = apply(params, x), apply(params, x.at[:, 2].add(1.0))
    keep = jnp.array([0, 1, 3, 4])
    np.testing.assert_array_equal(y[:, keep], changed[:, keep])
    assert not np.array_equal(y[:, 2], changed[:, 2])
    assert jax.eval_shape(apply, params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.quick
@pytest.mark.parametrize("name", [*ACTIVATIONS, "polynorm:2", "fatrelu:1.5", "topk:0.25", "topk:1"])
def test_activation_values_and_parameters(name):
    part, params = part_of(functools.partial(make_activation, name))
    assert activation_params(name) == sum(p.size for p in jax.tree.leaves(params))
    x = np.asarray(x_of(2, scale=3.0), np.float64)
    relu = np.maximum(x, 0)

    def rms(p):
        return p / np.sqrt(np.mean(p**2, -1, keepdims=True))

    expected = {
        "identity": x,
        "relu": relu,
        "relu2": relu**2,
        "gelu": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": x / (1 + np.exp(-x)),
        "polyrelu": (relu + relu**2 + relu**3) / 3,
        "polynorm": (rms(x) + rms(x**2) + rms(x**3)) / 3,
        "polynorm:2": (rms(x) + rms(x**2)) / 2,
        "sigmoid": 1 / (1 + np.exp(-x)),
        "elu": np.where(x > 0, x, np.expm1(x)),
        "selu": 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
        "softplus": np.log1p(np.exp(x)),
        "crrelu": relu + 0.01 * x * np.exp(-(x**2) / 2),
        "fatrelu": np.where(x >= 0.1, x, 0),
        "fatrelu:1.5": np.where(x >= 1.5, x, 0),
        "topk:0.25": np.where(relu >= np.sort(relu, -1)[..., -4:-3], relu, 0),
        "topk:1": relu,
    }
    if name in expected:
        np.testing.assert_allclose(part.bind(params)(jnp.asarray(x, jnp.float32)), expected[name], rtol=2e-5, atol=2e-6)
    big = part.bind(params)(jnp.full((1, D), 300.0, jnp.bfloat16))
    assert bool(jnp.all(jnp.isfinite(big)))


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "topk"])
def test_activations_keep_their_input_alone_for_the_backward_pass(name):
    """In a layer scan all else would go through memory; sorting again, for topk, costs more than it saves."""
    part, params = part_of(functools.partial(make_activation, name))
    x = jax.ShapeDtypeStruct((2, 5, 64), jnp.bfloat16)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda p, x: part.bind(p)(x), params, x)[1], x)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) <= x.size * 2 + 64


def test_polycom_special_cases():
    """PolyNorm ignores the scale of its input; with a = (1, 0, 0) PolyReLU is ReLU and PolyNorm is RMSNorm."""
    x = x_of(3)
    only_first = {"a": jnp.array([1.0, 0, 0]), "a0": jnp.array(0.0)}
    polynorm, params = part_of(functools.partial(make_activation, "polynorm"))
    scaled, plain = polynorm.bind(params)(7.0 * x), polynorm.bind(params)(x)
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-4)
    norm, norm_params = part_of(lambda make: NORMS["rmsnorm"](make, D))
    np.testing.assert_allclose(polynorm.bind(only_first)(x), norm.bind(norm_params)(x), rtol=1e-5)
    polyrelu, _ = part_of(functools.partial(make_activation, "polyrelu"))
    np.testing.assert_array_equal(polyrelu.bind(only_first)(x), jax.nn.relu(x))


def test_activations_with_bad_arguments_are_refused():
    for name, message in (
        ("relu:2", "relu takes no argument"),
        ("polynorm:9", "the order must be a number in 1..8"),
        ("polynorm:2.5", "the order must be a number"),
        ("topk:0", "the share kept must be"),
        ("polynrm", "did you mean 'polynorm'"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict({"model": {"ffns": {"dense": {"activation": name}}}})
    with pytest.raises(ConfigError, match="activate_up = True: needs glu"):
        from_dict({"model": {"ffns": {"dense": {"activate_up": True, "glu": False}}}})


def test_drelu_activates_both_halves():
    x = x_of(5)
    outputs = {}
    for up in (False, True):
        model = from_dict({"model": {"d_model": D, "ffns": {"dense": {"activation": "relu", "activate_up": up}}}}).model
        part = Part(lambda key, layer=0, model=model: FFNS["dense"](model.ffns["dense"], model, Maker(key, model)), 0)
        params = part.init(jax.random.key(0), 0)
        outputs[up] = part.bind(params)(x, None)[0]
    hidden = jax.nn.relu(x @ params["gate"]["kernel"]) * jax.nn.relu(x @ params["up"]["kernel"])
    np.testing.assert_allclose(outputs[True], hidden @ params["down"]["kernel"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs[True], outputs[False])


@pytest.mark.quick
@pytest.mark.parametrize("name", NORMS)
def test_norm(name):
    part, params = part_of(lambda make: NORMS[name](make, D))
    assert NORMS[name].param_count(D) == sum(p.size for p in jax.tree.leaves(params))
    norm, x = part.bind(params), x_of(4, scale=5.0) + 2.0
    np.testing.assert_allclose(norm(x), norm(9.0 * x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jnp.mean(jnp.square(norm(x)), -1), 1.0, rtol=1e-4)
    centred = np.allclose(jnp.mean(norm(x), -1), 0, atol=1e-5)
    assert centred == (name == "layernorm")


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("residual", RESIDUALS)
def test_model_counts(residual, tied):
    """The sums over modules are what the whole model stores and multiplies."""
    config = from_dict({
        "model": {"d_model": D, "n_layers": 5, "vocab_size": 24, "prefix": ["attention/none"],
                  "pattern": ["gla", "attention"], "residual": residual, "norm": "layernorm", "tie_embeddings": tied,
                  "ffns": {"dense": {"activation": "polynorm"}}, "dtype": "float32"},
        "train": {"seq_len": 32},
    })  # fmt: skip
    lm, counts = LM(config.model), count_params(config)
    shapes = lm.shapes()
    assert counts["total"] == sum(p.size for p in jax.tree.leaves(shapes))
    tables = sum(shapes[name]["table"].size for name in ("embed", "head") if name in shapes)
    assert counts["non_embedding"] == counts["total"] - tables
    assert jax.tree.structure(lm.roles()) == jax.tree.structure(shapes)
    blocks, head = forward_flops(config)
    traced = traced_matmul_flops(lm, shapes, jax.ShapeDtypeStruct((1, 32), jnp.int32)) / 32
    assert (blocks + head).hardware == pytest.approx(traced)
