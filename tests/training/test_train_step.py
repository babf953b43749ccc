"""The compiled step: exact token weighting, accumulation, meshes, EMA, z-loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.train import make_eval_step, make_loss, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, LENGTH, VOCAB = 8, 16, 32


@pytest.fixture(scope="module")
def batch():
    """Rows with very different numbers of tokens that count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < np.linspace(0.1, 1.0, ROWS)[:, None]).astype(np.float32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "loss_mask": mask,
    }


def initial(cfg):
    lm = LM(cfg.model)
    params = jax.jit(lm.init)(jax.random.key(cfg.seed))
    optimizer = make_optimizer(lm, cfg.optim)
    ema = jax.tree.map(jnp.copy, params) if cfg.train.ema else {}
    return lm, optimizer, {"params": params, "opt_state": optimizer.init(params), "ema": ema, "step": jnp.array(0)}


def run(cfg, batch, steps=3, mesh=None):
    """(state, metrics of each step) after steps on one batch."""
    lm, optimizer, state = initial(cfg)
    micro = {k: v.reshape(cfg.train.grad_accum, -1, LENGTH) for k, v in batch.items()}
    constrain = lambda x: x  # noqa: E731
    if mesh is not None:
        constrain = sharding.residual_constraint(mesh)
        state = jax.device_put(state, jax.tree.map(lambda s: s.sharding, sharding.place(state, mesh)))
        micro = jax.device_put(micro, sharding.batch_sharding(mesh, leading=1))
    step = jax.jit(make_train_step(lm, cfg, optimizer, constrain))
    rows = []
    for _ in range(steps):
        state, logged = step(state, micro, 0.01)
        rows.append(jax.device_get(logged))
    return state, rows


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), jax.device_get(a), jax.device_get(b))


@pytest.mark.quick
def test_loss_and_gradients_are_means_over_counted_tokens(small, batch):
    cfg = small()
    lm, _, state = initial(cfg)
    weight = batch["loss_mask"].sum()
    value, (logged, _) = jax.jit(make_loss(lm, cfg, lambda x: x))(state["params"], batch, weight)
    logits = np.asarray(lm(state["params"], batch["inputs"], batch["segment_ids"], batch["positions"])[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(value, (nll * batch["loss_mask"]).sum() / weight, rtol=1e-6)
    np.testing.assert_allclose(logged["loss"], value, rtol=1e-7)
    sums = jax.jit(make_eval_step(lm, lambda x: x))(state["params"], batch)
    right = logits.argmax(-1) == batch["targets"]
    expected = [(x * batch["loss_mask"]).sum(-1) for x in (nll, right, np.ones_like(nll))]
    np.testing.assert_allclose(sums, expected, rtol=1e-6)


def test_z_loss_adds_the_mean_squared_logsumexp(small, batch):
    cfg = small(**{"train.z_loss": 0.1})
    lm, _, state = initial(cfg)
    weight = batch["loss_mask"].sum()
    value, (logged, _) = jax.jit(make_loss(lm, cfg, lambda x: x))(state["params"], batch, weight)
    logits = np.asarray(lm(state["params"], batch["inputs"], batch["segment_ids"], batch["positions"])[0], np.float64)
    z = (np.log(np.exp(logits).sum(-1)) ** 2 * batch["loss_mask"]).sum() / weight
    np.testing.assert_allclose(value, logged["loss"] + 0.1 * z, rtol=1e-6)


def test_accumulated_micro_batches_equal_one_batch_with_uneven_masks(small, batch):
    sizes = {"train.batch_size": ROWS, "train.z_loss": 1e-3}
    one, rows_one = run(small(**sizes, **{"train.grad_accum": 1}), batch)
    for parts in (2, 4):
        many, rows_many = run(small(**sizes, **{"train.grad_accum": parts}), batch)
        # Adam divides by the root of the second moment, so a rounding difference in a tiny gradient shows in full.
        assert_close(many["params"], one["params"], rtol=1e-4, atol=2e-5)
        assert_close(rows_many, rows_one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=["data", "fsdp", "all three"])
def test_every_mesh_gives_the_losses_of_one_device(small, batch, axes):
    cfg = small(**{"train.batch_size": ROWS, "mesh.fsdp": axes[1], "mesh.tensor": axes[2]})
    mesh = sharding.make_mesh(cfg.mesh, ROWS, jax.devices()[:8])
    assert tuple(mesh.shape.values()) == axes
    _, one = run(cfg, batch, steps=4)
    state, many = run(cfg, batch, steps=4, mesh=mesh)
    assert_close(many, one, rtol=2e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        spec = sharding.spec_for(sharding.path_of(path), leaf.shape, mesh)
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim), path


def test_ema_follows_the_parameters_with_a_rising_decay(small, batch):
    cfg = small(**{"train.batch_size": ROWS, "train.ema": 0.5})
    lm, optimizer, state = initial(cfg)
    step = jax.jit(make_train_step(lm, cfg, optimizer))
    expected = jax.device_get(state["params"])
    micro = {k: v[None] for k, v in batch.items()}
    for k in range(12):
        state, _ = step(state, micro, 0.01)
        decay = min(0.5, (1 + k) / (10 + k))
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, jax.device_get(state["params"]))  # noqa: B023
    assert_close(state["ema"], expected, rtol=1e-5, atol=1e-6)


def test_aux_losses_are_trained_on_and_other_statistics_only_logged(small, batch):
    cfg = small()
    lm, _, state = initial(cfg)

    def with_aux(params, *args):
        logits, _ = lm(params, *args)
        return logits, {"balance_loss": jnp.float32(0.25), "entropy": jnp.float32(3.0)}

    weight = batch["loss_mask"].sum()
    value, (logged, _) = make_loss(with_aux, cfg, lambda x: x)(state["params"], batch, weight)
    np.testing.assert_allclose(value, logged["loss"] + 0.25, rtol=1e-6)
    assert logged["entropy"] == 3.0 and logged["balance_loss"] == 0.25
