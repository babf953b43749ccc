"""The mixers as a set: matched configs, hybrids of several mixers, the table of the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import linear
from configs import mixers as mixer_configs
from efficient_lm import generate
from efficient_lm.config import from_dict
from efficient_lm.counting import count_flops, count_params, decode_state_bytes
from efficient_lm.layers import Maker, layer_specs
from efficient_lm.mixers import MIXERS, __main__, model_of
from efficient_lm.model import LM, Part
from efficient_lm.schema import ConfigError


@pytest.mark.quick
@pytest.mark.parametrize("size", mixer_configs.SIZES)
def test_configs_have_the_parameters_of_the_transformer(size):
    """Outside the embeddings, within 3 %; and the head sizes divide."""
    wanted = mixer_configs.non_embedding(mixer_configs.SIZES[size]())
    for mixer in MIXERS:
        config = from_dict(mixer_configs.get_config(f"{mixer}-{size}"))
        assert config.model.pattern[-1] == mixer
        assert count_params(config)["non_embedding"] == pytest.approx(wanted, rel=0.03), mixer


@pytest.mark.quick
@pytest.mark.parametrize("size", mixer_configs.SIZES)
def test_models_of_papers_have_the_parameters_of_the_transformer(size):
    wanted = mixer_configs.non_embedding(mixer_configs.SIZES[size]())
    for name in linear.MODELS:
        config = from_dict(linear.get_config(f"{name}-{size}"))
        assert count_params(config)["non_embedding"] == pytest.approx(wanted, rel=0.03), name


@pytest.mark.quick
def test_layouts_of_papers():
    """TransNormer: blocks first, norms later. TransNormerLLM: LRPE in the first layer, weightless norms, SGLU."""
    model = from_dict(linear.get_config("transnormer-340M")).model
    assert layer_specs(model) == [("diag_attention", "dense")] * 12 + [("norm_attention", "dense")] * 12
    model = from_dict(linear.get_config("transnormer_llm-small")).model
    lm = LM(model)
    params = lm.shapes()
    assert params["final_norm"] == {} and "theta" in params["prefix"]["0"]["mixer"]
    assert "theta" not in params["pattern"]["0"]["mixer"] and len(layer_specs(model)) == 4
    assert model.ffns["dense"].glu and model.ffns["dense"].activation == "identity"


def test_unknown_configs_are_refused():
    for arg, hint in (("delta_net-tiny", "did you mean 'deltanet'"), ("gla-1B", "allowed: 340M, small, tiny")):
        with pytest.raises(ConfigError, match=hint):
            mixer_configs.get_config(arg)
    for arg, hint in (("transnormerllm-tiny", "did you mean 'transnormer_llm'"), ("based-1B", "allowed: 340M, small")):
        with pytest.raises(ConfigError, match=hint):
            linear.get_config(arg)


def test_a_hybrid_of_three_mixers_decodes_as_in_parallel():
    model = {"d_model": 16, "n_layers": 3, "vocab_size": 32, "dtype": "float32", "scan_unroll": 1}
    model["pattern"] = ["mamba2/none", "rg_lru/none", "attention"]
    lm = LM(from_dict({"model": model}).model)
    params = jax.jit(lm.init)(jax.random.key(0, impl="unsafe_rbg"))
    prompt = np.array([[5, 9, 20], [7, 7, 1]])
    out = generate.sample(lm, params, prompt, 6, temperature=0)
    logits, _ = jax.jit(lm)(params, out)
    np.testing.assert_array_equal(out[:, 3:], np.argmax(logits, -1)[:, 2:-1])


@pytest.mark.quick
def test_all_mixers_in_one_pattern():
    """Every mixer scans beside every other, twice over, in training and in decoding; counts are sums."""
    names = sorted(MIXERS)
    givers = {name: cfg for kind in names for name, cfg in model_of(kind)["mixers"].items() if name != kind}
    values = {"d_model": 32, "vocab_size": 8, "prefix": list(givers), "pattern": names, "mixers": givers}
    values["n_layers"] = len(givers) + 2 * len(names)
    config = from_dict({"model": values, "train": {"seq_len": 8}})
    lm = LM(config.model)
    params = lm.shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_params(config)["total"]
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert jax.eval_shape(lm, params, tokens)[0].shape == (2, 8, 8)
    state = jax.eval_shape(lambda p: lm.init_state(p, 1, 8), params)
    assert sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state)) == decode_state_bytes(config, 8)
    logits, after = jax.eval_shape(lm.step, params, jax.ShapeDtypeStruct((1,), jnp.int32), state)
    assert logits.shape == (1, 8) and jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert count_flops(config)["model_causal"] > 0


@pytest.mark.quick
def test_roles_follow_the_fan_in():
    """Under muP a matrix is 'hidden' exactly when its fan-in grows with the width; all else is a vector."""
    for kind in MIXERS:

        def roles_and_shapes(d_model, kind=kind):
            model = from_dict({"model": model_of(kind, {}, d_model)}).model
            cls, cfg = MIXERS[kind], model.mixers[kind]
            part = Part(lambda key, layer=0: cls(cfg, model, Maker(key, model, layer)), 0)
            return part.roles(), jax.eval_shape(lambda: part.init(jax.random.key(0), 0))

        roles, small = roles_and_shapes(1024)
        _, large = roles_and_shapes(4096)
        paths = jax.tree_util.tree_leaves_with_path(roles)
        for (path, role), a, b in zip(paths, jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
            matrix = path[-1].key == "kernel"
            assert role in (("hidden", "fixed") if matrix else ("vector", "state")), (kind, path)
            # Ranks that follow sqrt(d_model), as those of RWKV-7, count as fixed.
            if matrix:
                assert (role == "hidden") == (b.shape[0] == 4 * a.shape[0]), (kind, path)


def test_table(capsys):
    assert __main__.main(["--d-model", "64", "--seq-len", "128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MIXERS) + 2
    attention = next(line.split() for line in lines if line.startswith("attention"))
    # 4 d^2 and the weights of the norms of queries and keys; keys and values of 128 tokens in bfloat16.
    assert attention[1:4] == ["16,416", "4.01", f"{2 * 2 * 128 * 64:,}"]
    assert __main__.main(["--d-model", "30"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
