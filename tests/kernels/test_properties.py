"""Properties of every family: causality, resets, padding, chunk sizes, decoding, memory, long sequences."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api
from tests.kernels.cases import FAMILIES, Shape, cast, relative_error

SHAPE = Shape(B=1, T=40)
FORWARD = [f for f in FAMILIES if not f.options.get("reverse")]
CHUNKED = [f for f in FAMILIES if f.chunked]


def by_name(families):
    return pytest.mark.parametrize("family", families, ids=lambda f: f.name)


@functools.cache
def compiled(family, final, chunk_size=16, implementation="xla"):
    """(o, final state) on float32 arrays."""
    return jax.jit(lambda arrays, ids: family.call(arrays, ids, implementation, final=final, chunk_size=chunk_size))


def random_case(family, seed, s=SHAPE, mode="plain"):
    rng = np.random.default_rng(seed)
    return cast(family.make(rng, s, mode), jnp.float32), rng


def along_time(family, arrays, edit):
    """Applies edit(x, rows per token) to the arrays that have a time axis."""
    timed = {"q", "k", "v", "x", "beta", "a", "b", "input_gate", "forget_gate", "log_decay"}
    return {name: edit(x, family.steps_per_token if name in ("k", "v", "beta") else 1)
            if name in timed and x.ndim > 2 else x for name, x in arrays.items()}


@by_name(FORWARD)
def test_no_output_depends_on_later_tokens(family):
    """Bit for bit, with changed tokens in the middle of a chunk and strongly changed gates."""
    arrays, rng = random_case(family, 0)
    for t in (5, 23):
        later = along_time(family, arrays, lambda x, n, t=t: x.at[:, t * n:].set(0.5 * x[:, t * n:] - (
            3.0 if jnp.issubdtype(x.dtype, jnp.floating) and (x <= 0).all() else 0)))
        run = compiled(family, False)
        assert np.array_equal(run(arrays, None)[0][:, :t], run(later, None)[0][:, :t])


@by_name(FAMILIES)
def test_segments_equal_separate_sequences(family):
    """Three segments in one row give what three calls give; the initial state reaches the first only."""
    arrays, _ = random_case(family, 1)
    reverse = family.options.get("reverse", False)
    bounds = [0, 13, 14, 40]
    ids = np.repeat([[1, 2, 1]], np.diff(bounds), axis=1).astype(np.int32)
    o, state = compiled(family, True)(arrays, jnp.asarray(ids))
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = along_time(family, arrays, lambda x, n, start=start, stop=stop: x[:, start * n:stop * n])
        if i != (2 if reverse else 0):
            del part["initial_state"]
        expected, last = compiled(family, True, None, "reference")(part, None)
        assert relative_error(o[:, start:stop], expected) < 1e-5
        if i == (0 if reverse else 2):
            for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
                assert relative_error(x, y) < 1e-5


@by_name([f for f in FORWARD if f.name != "causal_conv"])
def test_padded_tail_changes_nothing(family):
    """Zero keys, values and gates after the end leave outputs and the final state alone."""
    arrays, _ = random_case(family, 2)
    if family.name in ("mlstm", "mlstm_sigmoid"):
        padded = along_time(family, arrays, lambda x, n: jnp.pad(x, [(0, 0), (0, 9 * n)] + [(0, 0)] * (x.ndim - 2)))
        for name, value in (("input_gate", -1e4), ("forget_gate", 1e4)):
            padded[name] = padded[name].at[:, SHAPE.T:].set(value)
    elif family.name == "retention":
        pytest.skip("a constant decay has no gate to close")
    else:
        padded = along_time(family, arrays, lambda x, n: jnp.pad(x, [(0, 0), (0, 9 * n)] + [(0, 0)] * (x.ndim - 2)))
    o, state = compiled(family, True)(arrays, None)
    o_padded, state_padded = compiled(family, True)(padded, None)
    assert relative_error(o_padded[:, :SHAPE.T], o) < 1e-6
    for x, y in zip(jax.tree.leaves(state_padded), jax.tree.leaves(state), strict=True):
        assert relative_error(x, y) < 1e-6


@by_name(CHUNKED)
def test_chunk_sizes_agree(family):
    """Without initial state, final state or segments, T = 40 in chunks of 32 and in one of 64."""
    arrays, _ = random_case(family, 3)
    del arrays["initial_state"]
    expected = compiled(family, False, None, "reference")(arrays, None)[0]
    for chunk_size in (32, 64):
        assert relative_error(compiled(family, False, chunk_size)(arrays, None)[0], expected) < 1e-5


@by_name(FORWARD)
def test_steps_continue_the_chunked_form(family):
    """Prefill of 30 tokens, then one by one: the outputs of one pass over 40."""
    arrays, _ = random_case(family, 4)
    step = jax.jit(functools.partial(getattr(api, f"{family.op}_step"), **family.options))
    whole = compiled(family, False)(arrays, None)[0]
    prefix = along_time(family, arrays, lambda x, n: x[:, :30 * n])
    o, state = compiled(family, True)(prefix, None)
    assert relative_error(o, whole[:, :30]) < 1e-5
    order = {"linear_attention": ("q", "k", "v", "log_decay"), "delta_rule": ("q", "k", "v", "beta", "log_decay"),
             "dplr": ("q", "k", "v", "a", "b", "log_decay"), "mlstm": ("q", "k", "v", "input_gate", "forget_gate"),
             "diagonal_scan": ("x", "log_decay"), "causal_conv1d": ("x", "weight", "bias")}[family.op]
    for t in range(30, 40):
        token = along_time(family, arrays, lambda x, n, t=t: x[:, t] if n == 1 else x[:, t * n:(t + 1) * n])
        o, state = step(*(token.get(name) for name in order), state)
        assert relative_error(o, whole[:, t]) < 1e-5


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_deltanet", "kda"])
def test_sequences_of_8192_tokens(name):
    """Weak decay over 8k tokens: float32 stays within 1e-5 of float64 (1e-4 for the delta rule), gradients included."""
    family = next(f for f in FAMILIES if f.name == name)
    s = Shape(B=1, T=8192, H=1, G=1, K=8, V=8)
    rng = np.random.default_rng(5)
    arrays = family.make(rng, s, "plain")
    arrays["log_decay"] = arrays["log_decay"] * 0.01
    cotangent = rng.standard_normal((1, s.T, 1, s.V))

    def grads(arrays, implementation, **options):
        def loss(arrays):
            o = family.call(arrays, None, implementation, **options)[0]
            return (o * cotangent.astype(o.dtype)).sum(), o
        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    result = grads(cast(arrays, jnp.float32), "xla")
    with jax.enable_x64(True):
        rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), cast(arrays, jnp.float32))
        expected = jax.tree.map(np.asarray, grads(cast(rounded, jnp.float64), "reference"))
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) < 1e-5


@pytest.mark.parametrize("name,multiple", [("simple_gla", 12), ("gla", 20), ("gated_deltanet", 20), ("kda", 25)])
def test_memory_is_linear_in_length(name, multiple):
    """Peak temporaries of forward and backward: double with T, and stay below `multiple` times the inputs."""
    family = next(f for f in FAMILIES if f.name == name)

    def temporaries(length):
        s = Shape(B=1, T=length, H=2, G=2, K=32, V=32)
        arrays = jax.eval_shape(lambda: cast(family.make(np.random.default_rng(0), s, "plain"), jnp.float32))
        del arrays["initial_state"]
        grad = jax.grad(lambda arrays: family.call(arrays, None, "xla", final=False)[0].sum())
        memory = jax.jit(grad).lower(arrays).compile().memory_analysis()
        return memory.temp_size_in_bytes, sum(x.size * 4 for x in arrays.values())

    (small, _), (large, inputs) = temporaries(1024), temporaries(2048)
    assert large < 2.1 * small
    assert large < multiple * inputs


def test_segment_that_comes_back_is_a_new_segment():
    """Ids 1, 2, 1: the third segment does not see the first, not even through convolution taps."""
    rng = np.random.default_rng(6)
    x, w = jnp.asarray(rng.standard_normal((1, 6, 2)), jnp.float32), jnp.ones((4, 2))
    y, _ = api.causal_conv1d(x, w, segment_ids=jnp.asarray([[1, 1, 2, 1, 1, 1]]))
    np.testing.assert_allclose(y[:, 3], x[:, 3], rtol=1e-6)


def test_bad_calls_say_what_is_allowed():
    q, v = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 6))
    calls = {
        "implementation = 'cuda'": lambda: api.linear_attention(q, q, v, implementation="cuda"),
        "cannot run causal_conv1d": lambda: api.causal_conv1d(v[..., 0], jnp.ones((4, 2)), implementation="pallas_gpu"),
        "chunk_size = 48": lambda: api.linear_attention(q, q, v, chunk_size=48),
        "log_decay.shape = (4,)": lambda: api.linear_attention(q, q, v, jnp.zeros(4)),
        "heads of v = 3": lambda: api.linear_attention(q, q, jnp.ones((1, 4, 3, 6))),
        "k.shape = (1, 4, 2, 6)": lambda: api.linear_attention(q, v, v),
        "initial_state.shape": lambda: api.linear_attention(q, q, v, initial_state=jnp.ones((1, 2, 6, 8))),
        "segment_ids.dtype = float32": lambda: api.linear_attention(q, q, v, segment_ids=jnp.ones((1, 4))),
        "k.shape[1] = 6": lambda: api.delta_rule(q, jnp.ones((1, 6, 2, 8)), v, jnp.ones((1, 6, 2))),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_vmap_and_remat():
    """vmap and remat of one operator agree with the plain call."""
    arrays, rng = random_case(FAMILIES[2], 7, dataclasses.replace(SHAPE, B=3))
    call = jax.jit(lambda q, k, v, g, s: api.linear_attention(q, k, v, g, initial_state=s, implementation="xla")[0])
    args = [arrays[n] for n in ("q", "k", "v", "log_decay", "initial_state")]
    expected = call(*args)
    stacked = jax.vmap(call)(*(x[:, None] for x in args))[:, 0]
    assert relative_error(stacked, expected) < 1e-6
    grad = jax.grad(lambda v: (call(*args[:2], v, *args[3:]) ** 2).sum())
    again = jax.grad(lambda v: (jax.checkpoint(call)(*args[:2], v, *args[3:]) ** 2).sum())
    assert relative_error(again(args[2]), grad(args[2])) < 1e-6
