"""A mixture that starts from a dense run computes what that did, and trains on from there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import checkpoint, metrics
from efficient_lm.model import LM
from efficient_lm.schema import ConfigError
from efficient_lm.upcycle import upcycled

DENSE = {"model.pattern": ["attention/ffn"], "model.ffns.ffn": {"kind": "dense", "d_ff": 24}}
MOE = {"kind": "moe", "n_experts": 4, "n_shared": 0, "d_expert": 24}


def test_the_new_model_computes_what_the_dense_one_did(small, train_one, tmp_path):
    cfg = small(**DENSE)
    dense = train_one(cfg, tmp_path / "dense")
    params = checkpoint.restore(tmp_path / "dense" / "ckpt", 12)["params"]
    changes = DENSE | {"model.ffns.ffn": MOE, "train.upcycle_from": str(tmp_path / "dense")}
    moe = small(**changes)
    lm = LM(moe.model)
    start = upcycled(moe.train.upcycle_from, lm, jax.jit(lm.init)(jax.random.key(0)))
    tokens = jnp.arange(32).reshape(2, 16)
    np.testing.assert_allclose(lm(start, tokens)[0], LM(cfg.model)(params, tokens)[0], rtol=1e-4, atol=1e-5)
    info = train_one(moe, tmp_path / "moe")
    assert info["status"] == "done" and info["final_loss"] < dense["final_loss"] + 0.05


def test_layers_keep_their_place_whatever_the_pattern(small, train_one, tmp_path):
    """As in configs/moe.py: a dense first layer outside the layer scan, experts in the others."""
    cfg = small(**DENSE | {"model.n_layers": 3})
    train_one(cfg, tmp_path / "dense")
    params = checkpoint.restore(tmp_path / "dense" / "ckpt", 12)["params"]
    ffns = {"model.ffns.ffn": cfg.model.ffns["ffn"], "model.ffns.moe": MOE}
    moe = small(**{"model.n_layers": 3, "model.prefix": ["attention/ffn"], "model.pattern": ["attention/moe"]} | ffns)
    lm = LM(moe.model)
    start = upcycled(str(tmp_path / "dense"), lm, jax.jit(lm.init)(jax.random.key(0)))
    tokens = jnp.arange(32).reshape(2, 16)
    np.testing.assert_allclose(lm(start, tokens)[0], LM(cfg.model)(params, tokens)[0], rtol=1e-4, atol=1e-5)


def test_no_setting_of_the_router_changes_the_function(small, monkeypatch, quick_compile):
    """Nor room for all choices, nor the activation's own parameters; in a prefix and in the scanned pattern."""
    ffn = {"glu": False, "activation": "polynorm"}
    dense = {"kind": "dense", "d_ff": 24} | ffn
    router = {"score": "sigmoid", "bias_rate": 0.01, "n_groups": 2, "top_groups": 1, "temperature": 2.0}
    moe = MOE | ffn | router | {"balance_scope": "step", "capacity_factor": 2.0}
    layers = {"model.n_layers": 3, "model.prefix": ["attention/ffn"], "model.pattern": ["attention/ffn"]}
    cfg = small(**layers, **{"model.ffns.ffn": dense})
    before, after = LM(cfg.model), LM(small(**layers, **{"model.ffns.ffn": moe}).model)
    params = jax.tree.map(lambda p: 1.1 * p, jax.jit(before.init)(jax.random.key(0)))
    monkeypatch.setattr(checkpoint, "steps", lambda directory: [1])
    monkeypatch.setattr(checkpoint, "restore", lambda directory, step: {"params": params})
    monkeypatch.setattr(metrics, "read_json", lambda path: dataclasses.asdict(cfg))
    start = upcycled("dense", after, jax.jit(after.init)(jax.random.key(1)))
    tokens = jnp.arange(32).reshape(2, 16)
    np.testing.assert_allclose(
        jax.jit(after)(start, tokens)[0], jax.jit(before)(params, tokens)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "moe, message",
    [
        ({"n_shared": 1}, "has no .*shared.*n_shared = 0"),
        ({"d_expert": 12}, "which can't become .*d_expert must be the d_ff"),
    ],
)
def test_models_that_do_not_fit_are_refused(small, train_one, tmp_path, moe, message):
    train_one(small(**DENSE), tmp_path / "dense")
    cfg = small(**DENSE | {"model.ffns.ffn": MOE | moe, "train.upcycle_from": str(tmp_path / "dense")})
    with pytest.raises(ConfigError, match=message):
        train_one(cfg, tmp_path / "moe")
    with pytest.raises(ConfigError, match="upcycle_from = '/nowhere': has no checkpoint"):
        upcycled("/nowhere", LM(cfg.model), {})
