"""Training with experts: balance state moves by its rule, accumulates, survives a restart, works on every mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import checkpoint, sharding
from efficient_lm.ffn import FFNS
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.train import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, LENGTH, VOCAB = 8, 16, 32
MOE = {
    "model.n_layers": 3,
    "model.scan_unroll": 1,  # half of the program to compile
    "model.prefix": ["attention/dense"],
    "model.pattern": ["attention/moe"],
    "model.ffns.moe": {
        "n_experts": 4,
        "d_expert": 8,
        "score": "sigmoid",
        "bias_rate": 0.01,
        "temperature": 2.0,
        "balance_scope": "step",
    },
    "optim.weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": np.ones((ROWS, LENGTH), np.float32)}


def steps(cfg, batch, n=3, mesh=None):
    """[(parameters, metrics)] after each of n steps on one batch, the initial ones first."""
    lm = LM(cfg.model)
    params = jax.jit(lm.init)(jax.random.key(0))
    optimizer = make_optimizer(lm, cfg.optim)
    state = {"params": params, "opt_state": optimizer.init(params), "ema": {}, "step": jnp.array(0)}
    micro = {k: v.reshape(cfg.train.grad_accum, -1, LENGTH) for k, v in batch.items()}
    constrain = lambda x: x  # noqa: E731
    if mesh is not None:
        constrain = sharding.residual_constraint(mesh)
        state = jax.device_put(state, jax.tree.map(lambda s: s.sharding, sharding.place(state, mesh)))
        micro = jax.device_put(micro, sharding.batch_sharding(mesh, leading=1))
    step = jax.jit(make_train_step(lm, cfg, optimizer, constrain))
    history = [(jax.device_get(params), {})]
    for _ in range(n):
        state, logged = step(state, micro, 0.01)
        history.append(jax.device_get((state["params"], logged)))
    return history


def moe_of(params):
    return params["pattern"]["0"]["ffn"]


def test_bias_and_temperature_move_by_their_rules_only(small, batch):
    history = [moe_of(params) for params, _ in steps(small(**MOE), batch)]
    for before, after in zip(history, history[1:], strict=False):
        load = after["load"]
        assert load.shape == (2, 4)  # layers, experts
        np.testing.assert_array_equal(load.sum(-1), ROWS * LENGTH * 2)
        signs = np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(
            after["bias"] - before["bias"], 0.01 * (signs - signs.mean(-1, keepdims=True)), atol=1e-6
        )
        np.testing.assert_allclose(after["temperature"], before["temperature"] * 0.999, rtol=1e-6)
    assert np.abs(history[-1]["router"] - history[0]["router"]).max() > 0


def test_bias_stays_as_it_is_at_the_end_of_a_run(small):
    cfg = small(**MOE).model.ffns["moe"]
    assert cfg.bias_freeze == 0.034
    before = {"bias": jnp.zeros(4), "temperature": jnp.array(2.0)}
    load = {"load": jnp.array([1.0, 2.0, 3.0, 6.0])}
    for progress, moves in ((0.5, True), (0.96, True), (0.97, False), (1.0, False)):
        after = FFNS["moe"].next_state(cfg, before, load, progress)
        assert np.any(after["bias"]) == moves and after["temperature"] < 2.0, progress


def test_accumulation_sees_the_same_loads(small, batch):
    whole = steps(small(**MOE), batch)
    parts = steps(small(**MOE, **{"train.batch_size": ROWS, "train.grad_accum": 4}), batch)
    for (a, logged_a), (b, logged_b) in zip(whole[1:], parts[1:], strict=True):
        np.testing.assert_array_equal(moe_of(a)["load"], moe_of(b)["load"])
        np.testing.assert_allclose(moe_of(a)["bias"], moe_of(b)["bias"], atol=1e-7)
        for name in ("loss", "balance_loss", "router_z_loss", "grad_norm", "router_entropy"):
            assert logged_a[name] == pytest.approx(logged_b[name], rel=1e-5), name
        # Of the loads of the whole step, not the mean over micro-batches.
        relative = moe_of(b)["load"] / moe_of(b)["load"].mean(-1, keepdims=True)
        np.testing.assert_allclose(logged_b["router_load_profile"], relative, rtol=1e-6)
        assert logged_b["router_max_violation"] == pytest.approx(np.mean(relative.max(-1) - 1), rel=1e-5)
        assert logged_b["router_dead_experts"] == np.mean(relative == 0)


@pytest.mark.parametrize("axes", [(8, 1), (2, 2)], ids=["fsdp", "fsdp and tensor"])
def test_a_mesh_gives_the_losses_of_one_device(small, batch, axes):
    cfg = small(**MOE, **{"train.batch_size": ROWS, "mesh.fsdp": axes[0], "mesh.tensor": axes[1]})
    mesh = sharding.make_mesh(cfg.mesh, ROWS, jax.devices()[:8])
    one, many = steps(cfg, batch), steps(cfg, batch, mesh=mesh)
    for (a, logged_a), (b, logged_b) in zip(one[1:], many[1:], strict=True):
        np.testing.assert_array_equal(moe_of(a)["load"], moe_of(b)["load"])
        for name, value in logged_a.items():
            assert value == pytest.approx(logged_b[name], rel=1e-4), name


def test_killed_and_resumed_is_bit_equal(small, train_one, tmp_path):
    settings = MOE | {"model.ffns.moe": MOE["model.ffns.moe"] | {"bias_freeze": 0.4}}
    cfg = small(**settings, **{"train.checkpoint_every": 4, "train.keep_checkpoints": 0})
    whole = train_one(cfg, tmp_path / "whole")
    train_one(cfg, tmp_path / "cut", should_stop=lambda step: step >= 6)
    cut = train_one(cfg, tmp_path / "cut")
    assert (cut["status"], cut["final_loss"]) == ("done", whole["final_loss"])
    assert {"balance_loss", "router_z_loss", "router_max_violation"} <= read_last(tmp_path / "cut").keys()
    end, other = (checkpoint.restore(tmp_path / name / "ckpt", 12)["params"] for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, end, other)
    # The router's state is in the checkpoint, moved by all steps of both processes; the bias by the first 60 %.
    router = moe_of(end)
    biases = {step: moe_of(checkpoint.restore(tmp_path / "cut" / "ckpt", step)["params"])["bias"] for step in (4, 8)}
    assert np.any(biases[4] != router["bias"]) and np.all(biases[8] == router["bias"])
    assert np.any(router["bias"]) and np.ptp(router["load"]) > 0
    np.testing.assert_allclose(router["temperature"], 2.0 * 0.999**12, rtol=1e-5)


def read_last(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"][-1]


def test_the_loop_trains_experts_split_over_devices(small, train_one, tmp_path):
    settings = MOE | {"model.ffns.moe": MOE["model.ffns.moe"] | {"parallel": "expert", "exchange_factor": 4.0}}
    one = train_one(small(**settings), tmp_path / "one")
    many = train_one(small(**settings, **{"mesh.fsdp": 4}), tmp_path / "many", devices=jax.devices()[:4])
    assert many["hardware"]["n_devices"] == 4
    assert many["final_loss"] == pytest.approx(one["final_loss"], rel=1e-3)
    assert read_last(tmp_path / "many")["router_dropped"] == 0
