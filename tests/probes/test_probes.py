"""Every registered probe: exact values, no influence of padding or of the order of rows; and the model-wide pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.layers import Context, Maker
from efficient_lm.mixers import MIXERS, model_of
from efficient_lm.model import LM, Part
from efficient_lm.probes import PROBES, Layer
from efficient_lm.probes.parts import median_size
from efficient_lm.probes.run import Prober, by_layer, due, make_probe_step, next_step

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D, H = 4, 12, 6, 3
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def layer_of(seed=0, attention=True):
    """Rows of two documents and two tokens of padding."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1] * 4 + [2] * 6 + [0] * 2], B, 0)
    positions = np.repeat([[*range(4), *range(6), *range(2)]], B, 0)
    seen = (segments[:, :, None] == segments[:, None]) & (np.arange(T) <= np.arange(T)[:, None])
    weights = rng.exponential(size=(B, H, T, T)) * seen[:, None]
    weights[:, 0] *= 0.7 / weights[:, 0].sum(-1, keepdims=True)  # a head whose weights do not sum to 1
    weights[:, 1:] /= weights[:, 1:].sum(-1, keepdims=True)
    x, y = 3 * rng.normal(size=(2, B, T, D)) + 1
    y[0, 4, 3] = -400.0
    arrays = (x, y, positions, segments != 0, segments, weights if attention else None)
    return Layer(
        *(
            a if a is None else jnp.asarray(a, {"f": jnp.float32, "i": jnp.int32, "b": bool}[a.dtype.kind])
            for a in arrays
        )
    )


def values(name, layer):
    return {key: np.asarray(value) for key, value in jax.jit(lambda: PROBES[name](layer))().items()}


def changed(layer, **arrays):
    return Layer(**{**vars(layer), **arrays})


@pytest.mark.quick
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_measures_tokens_not_padding_nor_order(name):
    layer = layer_of()
    before = values(name, layer)
    assert before and all(v.shape == () and np.isfinite(v) for v in before.values())
    others = set().union(*(values(other, layer) for other in PROBES if other != name))
    assert not others & set(before)
    padding = ~layer.counted[..., None]
    garbage = changed(layer, x=jnp.where(padding, 1e6, layer.x), y=jnp.where(padding, -1e6, layer.y))
    garbage = changed(garbage, attention=jnp.where(padding[:, None], 0.9, layer.attention))
    shuffled = Layer(**{key: value[::-1] for key, value in vars(layer).items()})
    for other in (garbage, shuffled):
        for key, value in values(name, other).items():
            np.testing.assert_allclose(value, before[key], rtol=1e-6, err_msg=key)
    without = values(name, changed(layer, attention=None))
    assert without.keys() in (before.keys(), {}.keys())


@pytest.mark.quick
def test_values_against_numpy():
    layer = layer_of()
    x, y, weights = (np.asarray(a, np.float64) for a in (layer.x, layer.y, layer.attention))
    real, first = np.asarray(layer.counted), np.asarray(layer.positions) == 0
    rows = [np.abs(row[keep]) for row, keep in zip(y, real, strict=True)]
    tokens = y[real]
    centred = tokens - tokens.mean(-1, keepdims=True)
    later = real & ~first
    on_first = np.stack([(weights[:, h] * (first & real)[:, None]).sum(-1)[later].mean() for h in range(H)])
    normed = weights / weights.sum(-1, keepdims=True)
    nats = -(normed * np.log(np.where(normed > 0, normed, 1))).sum(-1)
    nats = np.stack([nats[:, h][later].mean() for h in range(H)])
    wanted = {
        "residual_max": np.mean([r.max() for r in rows]),
        "residual_median": np.mean([np.median(r) for r in rows]),
        "residual_ratio": np.mean([r.max() / np.median(r) for r in rows]),
        "residual_massive": 0.0,
        "residual_position": 0,
        "residual_channel": 3,
        "residual_at_first": np.mean([first[i, np.abs(y[i] * real[i][:, None]).max(-1).argmax()] for i in range(B)]),
        "residual_variance": tokens.var(),
        "layer_similarity": np.mean(
            [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x[real], tokens, strict=True)]
        ),
        "residual_kurtosis": np.mean((centred**4).mean(-1) / (centred**2).mean(-1) ** 2),
        "sink_mass": on_first.mean(),
        "sink_top": on_first.max(),
        "sink_heads": (on_first > 0.3).mean(),
        "attention_entropy": nats.mean(),
        "attention_entropy_low": nats.min(),
    }
    found = {key: value for name in PROBES for key, value in values(name, layer).items()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-5, err_msg=key)
    # 1000 medians and above 100: the definition of 2402.17762.
    large = changed(layer, y=layer.y.at[1, 0, 2].set(1e4).at[1, 11, 2].set(1e9))
    assert values("massive", large)["residual_massive"] == 1 / B


@pytest.mark.parametrize("counted", (1, 7, 12))
def test_median_is_exact(counted):
    x = np.random.default_rng(counted).normal(size=(3, T, 5)).astype(np.float32) ** 7
    x[1, :3] = 0.0
    keep = np.zeros((3, T), bool)
    keep[:, :counted] = True
    wanted = [np.median(np.abs(row[:counted])) for row in x]
    np.testing.assert_array_equal(median_size(jnp.asarray(x), jnp.asarray(keep)), wanted)


def test_schedule():
    assert [s for s in range(2101) if due(s, 1000)] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert [s for s in range(601) if due(s, 200)] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 200, 256, 400, 512, 600]
    for every in (1, 3, 64, 1000):
        for step in range(0, 1030):
            assert next_step(step, every) == next(s for s in range(step + 1, step + every + 1) if due(s, every))


def model(**settings):
    values = {"d_model": 16, "n_layers": 6, "vocab_size": 16, "dtype": "float32", "scan_unroll": 1, **settings}
    return from_dict({"model": {"prefix": ["gla"], "pattern": ["attention", "gla"], **values}}).model


@functools.cache
def measured(names=tuple(PROBES)):
    """(lm, params, batch, what the probes see) of a model with a prefix, a scanned pattern and a tail."""
    lm = LM(model())
    params = compiled(lm.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 16, (8, T)).astype(np.int32)
    batch = {"inputs": tokens, "counted": np.ones((8, T), bool)}
    return lm, params, batch, by_layer(lm, compiled(make_probe_step(lm, names))(params, batch))


def test_layers_come_in_order_and_without_attention_are_skipped():
    lm, params, batch, table = measured()
    assert all(len(row) == 6 for row in table.values())
    assert [value is None for value in table["sink_mass"]] == [True, False, True, False, True, False]
    assert None not in table["residual_max"]
    # The same stream, block by block without a scan.
    x = params["embed"]["table"][batch["inputs"]]
    ctx = Context(None, jnp.broadcast_to(jnp.arange(T), batch["inputs"].shape))
    places = [("prefix", "0", None), *(("pattern", name, i) for i in range(2) for name in "01"), ("tail", "0", None)]
    for layer, (group, name, repeat) in enumerate(places):
        own = params[group][name]
        own = own if repeat is None else jax.tree.map(lambda a: a[repeat], own)  # noqa: B023
        block = lm.parts[f"{group}/{name}"].bind(own)
        x = block(x, ctx)[0]
        np.testing.assert_allclose(table["residual_max"][layer], jnp.abs(x).max((1, 2)).mean(), rtol=1e-4)


def test_on_a_mesh_as_on_one_device():
    lm, params, batch, table = measured()
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), 8, jax.devices()[:8])
    placed = jax.device_put(params, jax.tree.map(lambda s: s.sharding, sharding.place(params, mesh)))
    spread = Prober(lm, tuple(PROBES), mesh, batch)(placed)
    assert spread.keys() == table.keys()
    for name, row in table.items():
        for one, other in zip(row, spread[name], strict=True):
            assert one == other is None or one == pytest.approx(other, rel=2e-4, abs=1e-6), name


CASES = {
    f"{name}-{label}": (name, settings)
    for name in MIXERS
    for label, settings in {"": {}, **MIXERS[name].variants}.items()
}


@pytest.mark.parametrize("case", CASES)
def test_attention_weights_read_visible_tokens_only(case):
    """Of every mixer that has weights; with what earlier layers give in the carry."""
    kind, settings = CASES[case]
    config = from_dict({"model": {"n_layers": 2, "vocab_size": 16, "dtype": "float32", **model_of(kind, settings, 32)}})
    cfg = config.model.mixers[kind]
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 12])
    positions = jnp.asarray([[*range(5), *range(7)], [*range(12)]])
    x = jax.random.normal(jax.random.key(3), (2, T, 32))

    def run(key):
        ctx = Context(segments, positions)
        for name in config.model.pattern[:-1]:
            giver = config.model.mixers[name]
            MIXERS[giver.kind](giver, config.model, Maker(key, config.model))(x, ctx)
        mixer = MIXERS[kind](cfg, config.model, Maker(key, config.model))
        return mixer.attention_weights(x, ctx)

    weights = jax.eval_shape(run, jax.random.key(0))
    if weights is None:
        return
    weights = np.asarray(compiled(run)(jax.random.key(0)))
    visible = (segments[:, :, None] == segments[:, None]) & (jnp.arange(T) <= jnp.arange(T)[:, None])
    assert weights.shape[0] == 2 and weights.shape[2:] == (T, T) and weights.dtype == np.float32
    assert (weights >= 0).all() and not weights[np.broadcast_to(~visible[:, None], weights.shape)].any()
    sums = weights.sum(-1)
    if getattr(cfg, "weights", "softmax") == "softmax":
        np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    else:
        assert (sums < T).all() and (sums != 1).any()


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind == "attention"])
def test_attention_weights_are_those_that_the_mixer_uses(case):
    kind, settings = CASES[case]
    if settings.get("kv") == "take" or settings.get("value_residual") == "take":
        pytest.skip("its values come from another layer")
    config = from_dict({"model": {"n_layers": 2, "vocab_size": 16, "dtype": "float32", **model_of(kind, settings, 32)}})
    cfg = config.model.mixers[kind]
    part = Part(lambda key, layer=0: MIXERS[kind](cfg, config.model, Maker(key, config.model)), 0)

    def run(key):
        mixer, x = part.bind(part.init(key, 0)), jax.random.normal(key, (2, T, 32))
        ctx = Context(None, jnp.broadcast_to(jnp.arange(T), (2, T)))
        values = jnp.repeat(mixer._keys_values(x, ctx)[1], mixer.sizes[0] // mixer.sizes[1], 2)
        read = jnp.einsum("bhts,bshd->bthd", mixer.attention_weights(x, ctx), values, precision="highest")
        return mixer._output(read, x), mixer(x, ctx)[0]

    by_weights, y = compiled(run)(jax.random.key(1))
    np.testing.assert_allclose(by_weights, y, rtol=1e-4, atol=1e-5)
