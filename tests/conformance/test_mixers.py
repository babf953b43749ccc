"""Every registered mixer keeps the contract of efficient_lm/mixers/base.py. Adding a mixer adds its cases here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.counting import traced_matmul_flops
from efficient_lm.layers import Context, Maker
from efficient_lm.mixers import MIXERS
from efficient_lm.model import LM, Part

B, T, D = 2, 40, 32
# More settings worth the whole suite; every mixer also runs with its defaults.
VARIANTS = {
    "attention": {
        "gqa-window-nope": {"n_heads": 4, "n_kv_heads": 2, "window": 7, "position": "none", "qk_norm": False},
        "mqa-cap": {"n_heads": 2, "n_kv_heads": 1, "logit_cap": 5.0},
    },
    "gla": {"strong-decay": {"n_heads": 2, "gate_normalizer": 0.1}},
}
CASES = {f"{name}": (name, {}) for name in MIXERS} | {
    f"{name}-{label}": (name, settings) for name, all_ in VARIANTS.items() for label, settings in all_.items()
}


class Case:
    """One mixer with settings, at width D, with the compiled functions that the tests share."""

    def __init__(self, kind, settings):
        values = {"d_model": D, "n_layers": 2, "vocab_size": 16, "dtype": "float32", "pattern": [kind]}
        self.values = {"model": values | {"mixers": {kind: settings}}, "train": {"seq_len": T}}
        self.model = from_dict(self.values).model
        self.cfg, self.cls = self.model.mixers[kind], MIXERS[kind]
        self.part = self._part(self.cfg)
        self.params = self.part.init(jax.random.key(0), 1)
        # Zero or one as initial value of a gate or norm would hide mistakes.
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        self.params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), self.params)
        self.forward = jax.jit(self.apply)

    def _part(self, cfg):
        return Part(lambda key, layer=1: self.cls(cfg, self.model, Maker(key, self.model, layer)), 1)

    def apply(self, params, x, segment_ids=None, positions=None, part=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        mixer = (part or self.part).bind(params)
        return mixer(x, Context(segment_ids, positions, {}))[0]

    def oracle(self):
        """The same mixer as slow and exact as it goes: token-by-token operators in float64."""
        fields = {f.name: f.metadata.get("choices") for f in dataclasses.fields(self.cfg)}
        if "reference" in (fields.get("implementation") or ()):
            return self._part(dataclasses.replace(self.cfg, implementation="reference"))
        return self.part


@functools.cache
def case(name) -> Case:
    return Case(*CASES[name])


def inputs(seed, shape=(B, T, D)):
    return jax.random.normal(jax.random.key(seed), shape)


all_cases = pytest.mark.parametrize("name", CASES)


@pytest.mark.quick
@all_cases
def test_shape_and_dtype(name):
    c = case(name)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = jax.eval_shape(c.apply, c.params, jax.ShapeDtypeStruct((B, T, D), dtype))
        assert (y.shape, y.dtype) == ((B, T, D), dtype)


@pytest.mark.quick
@all_cases
def test_no_leak_of_the_future(name):
    """Changing token t leaves all earlier outputs bit-equal, and changes later ones (else nothing is tested)."""
    c, x = case(name), inputs(2)
    for t in (1, T // 2, T - 1):
        before, after = c.forward(c.params, x), c.forward(c.params, x.at[:, t].add(3.0))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t], after[:, t])


@all_cases
def test_rows_of_a_batch_are_independent(name):
    c, x = case(name), inputs(3)
    np.testing.assert_array_equal(c.forward(c.params, x)[::-1], c.forward(c.params, x[::-1]))


@all_cases
def test_step_by_step_equals_parallel(name):
    c, x = case(name), inputs(4)
    part = c.part.bind(c.params)
    step = jax.jit(lambda params, x, state: c.part.bind(params).step(x, state))
    state, outputs = part.init_state(B, T), []
    for t in range(T):
        y, state = step(c.params, x[:, t], state)
        outputs.append(y)
    assert relative(jnp.stack(outputs, 1), c.forward(c.params, x)) < 2e-5


@all_cases
def test_document_resets_equal_separate_sequences(name):
    c, x = case(name), inputs(5)
    bounds = [0, 1, 17, 33, T]
    lengths = np.diff(bounds)
    segments = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 5), lengths), (B, T))
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(n) for n in lengths]), (B, T))
    packed = c.forward(c.params, x, segments, positions)
    alone = [c.forward(c.params, x[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert relative(packed, jnp.concatenate(alone, 1)) < 1e-5


@all_cases
def test_values_and_gradients_against_float64(name):
    c = case(name)
    x, cotangent = inputs(6), inputs(7)
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(c.apply(p, x) * cotangent), argnums=(0, 1)))
    y, grads = c.forward(c.params, x), gradient(c.params, x)
    oracle = c.oracle()
    with jax.enable_x64(True):
        p64, x64, ct64 = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (c.params, x, cotangent))
        loss = jax.jit(lambda p, x: jnp.sum(c.apply(p, x, part=oracle) * ct64))
        exact = jax.grad(loss, argnums=(0, 1))(p64, x64)
        exact_y = c.apply(p64, x64, part=oracle)
        assert exact_y.dtype == jnp.float64
    assert relative(y, exact_y) < 1e-5
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert relative(got, want) < 2e-5


@pytest.mark.quick
@all_cases
def test_parameters_flops_and_state_as_declared(name):
    c = case(name)
    assert c.cls.param_count(c.cfg, c.model) == sum(p.size for p in jax.tree.leaves(c.params))
    state = jax.eval_shape(lambda p: c.part.bind(p).init_state(1, T), c.params)
    stored = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state))
    assert c.cls.state_bytes(c.cfg, c.model, T) == stored
    flops = c.cls.flops_per_token(c.cfg, c.model, T)
    traced = traced_matmul_flops(c.apply, c.params, inputs(8, (1, T, D))) / T
    assert flops.hardware == pytest.approx(traced, rel=1e-6)
    assert flops.causal <= flops.full


@pytest.mark.parametrize("name", MIXERS)
def test_sharded_equals_one_device(name):
    """Loss and gradients of a model over data, fsdp and tensor axes are those of a single device."""
    # A large eps: the norm of an output that happens to be near 0 (q.k of a first token) would amplify rounding.
    lm = LM(dataclasses.replace(case(name).model, norm_eps=1e-2))
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, T), 0, 16)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), 4, jax.devices()[:8])
    assert mesh.size == 8

    def loss(params, tokens, constrain):
        return jnp.mean(jnp.sin(lm(params, tokens, constrain=constrain)[0]))

    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place(params, mesh))
    grad = jax.value_and_grad(functools.partial(loss, constrain=sharding.residual_constraint(mesh)))
    spread = jax.jit(grad, out_shardings=(sharding.replicated(mesh), places))
    got = spread(jax.device_put(params, places), jax.device_put(tokens, sharding.batch_sharding(mesh)))
    want = jax.jit(jax.value_and_grad(functools.partial(loss, constrain=lambda x: x)))(params, tokens)
    split = [leaf for leaf in jax.tree.leaves(got[1]) if not leaf.is_fully_replicated]
    assert len(split) >= 4
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 2e-5


@pytest.mark.parametrize("name", MIXERS)
def test_a_short_run_learns(name):
    """Loss of a two-layer model on 'repeat the token before last' falls well below the uniform log(16)."""
    c = case(name)
    config = from_dict(c.values)
    lm = LM(config.model)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        start = jax.random.randint(key, (16, 2), 0, 16)
        tokens = jnp.tile(start, (1, 8))

        def loss(params):
            logits, _ = lm(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, 2:], tokens[:, 3:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = lm.init(jax.random.key(0))
    state, losses = optimizer.init(params), []
    for i in range(60):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[:3]) > 2.0
    assert np.mean(losses[-5:]) < 0.7 * np.log(16)


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30)
