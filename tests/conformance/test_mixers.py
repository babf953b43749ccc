"""Every registered mixer keeps the contract of efficient_lm/mixers/base.py. Adding a mixer adds its cases here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.counting import traced_matmul_flops
from efficient_lm.flops import Flops
from efficient_lm.layers import Context, Maker
from efficient_lm.mixers import MIXERS, model_of
from efficient_lm.model import Part

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, D = 2, 40, 32
PREFILL = 23  # tokens; longer than the windows in the variants, and no multiple of anything
# What is tested is the traced program, not LLVM's optimiser, which would take most of the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CASES = {f"{name}": (name, {}) for name in MIXERS} | {
    f"{name}-{label}": (name, settings) for name in MIXERS for label, settings in MIXERS[name].variants.items()
}


class Case:
    """One mixer with settings, at width D, with the compiled functions that the tests share."""

    def __init__(self, kind, settings):
        # A large norm_eps, since the norm of an output that happens to be near 0 (q.k of a first token) would amplify
        # rounding.
        values = {"n_layers": 2, "vocab_size": 16, "dtype": "float32", "norm_eps": 1e-2}
        self.model = from_dict({"model": values | model_of(kind, settings, D)}).model
        self.cfg, self.cls = self.model.mixers[kind], MIXERS[kind]
        self.part = self._part(self.cfg)
        # Layers that give what this one takes: they run first, on the same x.
        self.givers = [self.model.mixers[name] for name in self.model.pattern[:-1]]
        parts = [*map(self._part, self.givers), self.part]
        # This generator compiles much faster than the default one; op by op, since mixers share most shapes.
        key = jax.random.key(0, impl="unsafe_rbg")
        initial = jax.device_get([part.init(key, 1) for part in parts])
        self.initial = initial[-1]
        # Zero or one as initial value of a gate or norm would hide mistakes.
        rng = np.random.default_rng(1)
        noisy = jax.tree.map(lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float32), initial[::-1])
        self.params, self.before = noisy[0], list(zip(parts[:-1], noisy[:0:-1], strict=True))
        self.forward = compiled(self.apply)
        self.prefill = compiled(self._prefill)
        self.step = compiled(self._step)
        # (params, x, cotangent of y, part) -> (gradients of both, y)
        self.gradient = compiled(jax.grad(self.weighted_sum, argnums=(0, 1), has_aux=True), static_argnums=3)

    def _part(self, cfg):
        cls = MIXERS[cfg.kind]
        return Part(lambda key, layer=1: cls(cfg, self.model, Maker(key, self.model, layer)), 1)

    def layers(self, params, x, part=None):
        """The givers and the mixer itself, with parameters at least as wide as x."""
        for giver, values in self.before:
            yield giver.bind(jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, x.dtype)), values))
        yield (part or self.part).bind(params)

    def apply(self, params, x, segment_ids=None, positions=None, part=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        ctx = Context(segment_ids, positions)
        return [layer(x, ctx)[0] for layer in self.layers(params, x, part)][-1]

    def init_state(self):
        return [layer.init_state(B, T) for layer in self.layers(self.params, jnp.zeros(()))]

    def _prefill(self, params, x):
        ctx = Context(None, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
        outputs, states = zip(*(layer.prefill(x, ctx, T) for layer in self.layers(params, x)), strict=True)
        return outputs[-1], list(states)

    def _step(self, params, x, states, position):
        ctx, layers = Context(None, position), self.layers(params, x)
        steps = [layer.step(x, state, ctx) for layer, state in zip(layers, states, strict=True)]
        return steps[-1][0], [state for _, state in steps]

    def weighted_sum(self, params, x, weights, part=None):
        y = self.apply(params, x, part=part)
        return jnp.sum(y * weights), y

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
def test_prefill_and_steps_equal_parallel(name):
    """Steps from the empty state, and from the state after n tokens in parallel form."""
    c, x = case(name), inputs(4)
    for n in (0, PREFILL):
        outputs, state = c.prefill(c.params, x[:, :n]) if n else (x[:, :0], c.init_state())
        later = []
        for t in range(n, T):
            y, state = c.step(c.params, x[:, t], state, jnp.full(B, t))
            later.append(y)
        assert relative(np.concatenate([outputs, np.stack(later, 1)], 1), c.forward(c.params, x)) < 2e-5


@all_cases
def test_document_resets_equal_separate_sequences(name):
    c, x = case(name), inputs(5)
    bounds = [0, 1, 17, 33, T]
    lengths = np.diff(bounds)
    segments = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 5), lengths), (B, T))
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(n) for n in lengths]), (B, T))
    packed = c.forward(c.params, x, segments, positions)
    # Each document alone, in front of zeros that it can't see: one compiled length.
    for start, end in zip(bounds, bounds[1:], strict=False):
        alone = c.forward(c.params, jnp.zeros_like(x).at[:, : end - start].set(x[:, start:end]))
        assert relative(packed[:, start:end], alone[:, : end - start]) < 1e-5


@all_cases
def test_values_and_gradients_against_float64(name):
    c = case(name)
    x, cotangent = inputs(6), inputs(7)
    grads, y = c.gradient(c.params, x, cotangent)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (c.params, x, cotangent))
        exact, exact_y = c.gradient(*wide, c.oracle())
        assert exact_y.dtype == jnp.float64
    assert relative(y, exact_y) < 1e-5
    assert_gradients_agree(grads, exact)


@pytest.mark.quick
@all_cases
def test_parameters_flops_and_state_as_declared(name):
    c = case(name)
    assert c.cls.param_count(c.cfg, c.model) == sum(p.size for p in jax.tree.leaves(c.params))
    state = jax.eval_shape(lambda p: c.part.bind(p).init_state(1, T), c.params)
    stored = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(state))
    assert c.cls.state_bytes(c.cfg, c.model, T) == stored
    flops = sum((MIXERS[cfg.kind].flops_per_token(cfg, c.model, T) for cfg in [*c.givers, c.cfg]), Flops())
    # What one more sequence costs: work on fixed decays is done once a call.
    two, one = (traced_matmul_flops(c.apply, c.params, inputs(8, (rows, T, D))) for rows in (2, 1))
    traced = (two - one) / T
    assert flops.hardware == pytest.approx(traced, rel=1e-6)
    assert flops.causal <= flops.full


@pytest.mark.parametrize("name", MIXERS)
def test_sharded_equals_one_device(name):
    """Values and gradients with parameters over fsdp and tensor, rows over data and fsdp, are those of one device."""
    c, x, cotangent = case(name), inputs(9), inputs(10)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), B, jax.devices()[:4])
    assert mesh.size == 4
    rows = sharding.batch_sharding(mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place({"prefix/0/mixer": c.params}, mesh))
    places = places["prefix/0/mixer"]
    spread = compiled(jax.grad(c.weighted_sum, argnums=(0, 1), has_aux=True), out_shardings=((places, rows), rows))
    (got, got_x), got_y = spread(jax.device_put(c.params, places), *jax.device_put((x, cotangent), rows))
    (want, want_x), want_y = c.gradient(c.params, x, cotangent)
    assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(got)) >= 2
    assert relative(got_y, want_y) < 2e-5 and relative(got_x, want_x) < 2e-5
    assert_gradients_agree(got, want)


@pytest.mark.parametrize("name", MIXERS)
def test_a_short_run_learns(name):
    """Adam learns to tell the sign of a row from many noisy tokens, better than any function of one token can."""
    c, rng = case(name), np.random.default_rng(0)
    params, errors = c.initial, []
    m = v = jax.tree.map(np.zeros_like, params)
    for k in range(1, 61):
        sign = rng.choice([-1.0, 1.0], size=(B, 1, 1))
        # Every other channel is the sign plus noise of the token; the others are 1, for gates that need a constant.
        x = np.where(np.arange(D) % 2 == 0, sign + rng.normal(size=(B, T, 1)), 1.0).astype(np.float32)
        error = np.mean(c.forward(params, x), -1, keepdims=True) - sign
        weights = np.where(np.arange(T)[:, None] < T // 2, 0.0, error) / D
        grads, _ = c.gradient(params, x, np.broadcast_to(weights, x.shape).astype(np.float32))
        # Adam in NumPy: a compiled update for each mixer's tree would take longer than the run.
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * np.asarray(g), m, grads[0])
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * np.square(g), v, grads[0])
        rate = 1e-2 * np.sqrt(1 - 0.999**k) / (1 - 0.9**k)
        params = jax.tree.map(lambda p, m, v: np.float32(p - rate * m / (np.sqrt(v) + 1e-8)), params, m, v)  # noqa: B023
        errors.append(np.mean(np.square(error[:, T // 2 :])))
    memoryless = 0.449  # E (1 - tanh z)^2 for z ~ N(1, 1), the error of the posterior mean
    assert np.mean(errors[-10:]) < memoryless / 2


def assert_gradients_agree(got, want):
    """Each to 2e-5; a sum that cancels (the scale of something normalised later) keeps the rounding of its terms."""
    got, want = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (got, want))
    rounding = 1e-7 * np.sqrt(sum(np.sum(leaf**2) for leaf in want))
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b) + rounding


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30)
