"""Checkpoints are exact, complete or absent, fit any mesh, and refuse what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm import checkpoint, sharding
from efficient_lm.config import MeshConfig
from efficient_lm.schema import ConfigError


@pytest.fixture(scope="module")
def state():
    params = {
        "embed": {"table": jax.random.normal(jax.random.key(0), (16, 8))},
        "pattern": {"0": {"mixer": {"o": {"kernel": jax.random.normal(jax.random.key(1), (3, 8, 8))}}}},
    }
    return {"params": params, "opt_state": optax.adam(0.1).init(params), "ema": {}, "step": jnp.array(7, jnp.int32)}


def structs(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


@pytest.mark.quick
def test_saved_state_comes_back_bit_equal_with_its_classes(state, tmp_path):
    checkpoint.save(tmp_path, 7, state)
    loaded = checkpoint.restore(tmp_path, 7, structs(state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


def test_restores_onto_another_mesh(state, tmp_path):
    def on(shape, devices):
        mesh = sharding.make_mesh(MeshConfig(fsdp=shape[1], tensor=shape[2]), 8, devices)
        return sharding.place(state, mesh)

    first = on((2, 4, 1), jax.devices()[:8])
    checkpoint.save(tmp_path, 1, jax.device_put(state, jax.tree.map(lambda s: s.sharding, first)))
    for shape, count in (((1, 2, 4), 8), ((1, 1, 1), 1)):
        like = on(shape, jax.devices()[:count])
        loaded = checkpoint.restore(tmp_path, 1, like)
        jax.tree.map(np.testing.assert_array_equal, loaded, state)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s.sharding, loaded, like))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"]["embed"].update(table=jnp.zeros((16, 9))), "params/embed/table is 16x8 float32 there"),
        (lambda s: s["params"]["embed"].update(table=jnp.zeros((16, 8), jnp.bfloat16)), "needs 16x8 bfloat16"),
        (lambda s: s["params"].update(head={"table": jnp.zeros(3)}), "params/head/table is nothing there"),
        (lambda s: s["params"].pop("pattern"), "but the config needs nothing"),
    ],
    ids=["shape", "dtype", "missing", "too much"],
)
def test_what_does_not_fit_is_refused_by_name(state, tmp_path, change, message):
    checkpoint.save(tmp_path, 1, state)
    other = jax.tree.map(lambda a: a, state)
    change(other)
    with pytest.raises(ConfigError, match=message) as error:
        checkpoint.restore(tmp_path, 1, structs(other))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["data cut short", "metadata gone"])
def test_a_damaged_checkpoint_is_refused_with_what_can_be_done(state, tmp_path, damage):
    checkpoint.save(tmp_path, 1, state)
    checkpoint.save(tmp_path, 2, state)
    for file in [f for f in (tmp_path / "2").rglob("*") if f.is_file()]:
        if damage == "data cut short" and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:8])
        elif damage == "metadata gone" and file.name == "_METADATA":
            file.unlink()
    with pytest.raises(ConfigError, match="2: can't be read .*; if it is damaged, delete it to go on from step 1") as e:
        checkpoint.restore(tmp_path, 2, structs(state))
    assert "\n" not in str(e.value)


def test_keeps_the_newest_and_ignores_what_is_unfinished(state, tmp_path):
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == []
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    with pytest.raises(ConfigError, match="no such checkpoint; there are: 3, 4"):
        checkpoint.restore(tmp_path, 1, structs(state))
