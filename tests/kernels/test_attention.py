"""Softmax attention: blockwise and plain forms against float64, memory, decoding, what may and may not be seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, flops
from pallas_kernels.tpu import attention as tpu_attention
from pallas_kernels.xla import attention as xla_attention
from tests.kernels.cases import relative_error
from tests.kernels.test_flops import executed

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, H, G, K, V = 2, 45, 4, 2, 8, 6
CASES = {
    "plain": ((), {}),
    "window": (("segments",), {"window": 20}),
    "window_of_one": ((), {"window": 1}),
    "sinks": (("sinks", "segments"), {}),
    "forget": (("log_forget", "segments"), {"window": 30}),
    "cap": (("log_forget",), {"logit_cap": 1.0, "scale": 1.0}),
    "sigmoid": (("segments", "log_forget"), {"sigmoid_bias": -3.0}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla_attention, "block_limit", lambda: 16)  # T = 45 is three blocks


def inputs(names=(), seed=0, length=T):
    """(arrays, segment ids, cotangent) in float32; the segments have every length, and an id comes back."""
    rng = np.random.default_rng(seed)
    shapes = dict(q=(B, length, H, K), k=(B, length, G, K), v=(B, length, G, V))
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if "sinks" in names:
        arrays["sinks"] = rng.standard_normal(H)
    if "log_forget" in names:
        arrays["log_forget"] = -np.where(rng.random((B, length, H)) < 0.1, 20, 1) * rng.random((B, length, H))
    ids = np.cumsum(rng.random((B, length)) < 0.12, 1) % 3 if "segments" in names else None
    return jax.tree.map(np.float32, arrays), ids, rng.standard_normal((B, length, H, V)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def gradients(arrays, ids, cotangent, implementation, options=()):
    """({"o": output, name: gradient})."""

    def loss(arrays):
        o = api.attention(**arrays, segment_ids=ids, implementation=implementation, **dict(options))
        return (o * cotangent.astype(o.dtype)).sum(), o

    grads, o = jax.grad(loss, has_aux=True)(arrays)
    return grads | {"o": o}


def exact(arrays, ids, cotangent, options):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arrays, cotangent))
        return jax.tree.map(np.asarray, gradients(wide[0], ids, wide[1], "reference", options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_match_float64(case, dtype):
    names, options = CASES[case]
    arrays, ids, cotangent = inputs(names)
    keep = ("sinks", "log_forget")
    arrays = {n: jnp.asarray(x, jnp.float32 if n in keep else dtype) for n, x in arrays.items()}
    options = tuple(options.items())
    got, want = gradients(arrays, ids, cotangent, "xla", options), exact(arrays, ids, cotangent, options)
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for name in want:
        assert got[name].dtype == (jnp.float32 if name in keep else dtype)
        if case == "window_of_one" and name in "qk":  # the only weight is 1 whatever they are
            assert not np.any(want[name]) and np.max(np.abs(got[name])) < tolerance
        else:
            assert relative_error(got[name], want[name]) < tolerance


@pytest.mark.parametrize(("case", "length"), [("plain", 45), ("window", 300), ("sinks", 45)])
def test_tpu_kernel_matches_float64(case, length):
    """Splash attention, interpreted; 300 tokens are three of its blocks."""
    names, options = CASES[case]
    options = tuple((options | {"logit_cap": 2.0}).items())
    arrays, ids, cotangent = inputs(names, length=length)
    got, want = (
        f(arrays, ids, cotangent, *rest) for f, rest in ((gradients, ("pallas_tpu", options)), (exact, (options,)))
    )
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5


@pytest.mark.quick
def test_tpu_kernel_lowers():
    """Mosaic takes the forward and both backward kernels, K = 192 and V = 128 as in MLA included."""
    shapes = (1, 200, 4, 192), (1, 200, 2, 192), (1, 200, 2, 128)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    options = dict(window=100, segment_ids=None, sinks=None, logit_cap=None, scale=0.1, interpret=False)
    grad = jax.grad(lambda x: tpu_attention.attention(*x, **options).astype(jnp.float32).sum())
    text = jax.jit(grad).trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.quick
def test_reference_is_softmax_attention():
    """The oracle against one head written out in NumPy."""
    arrays, _, _ = inputs()
    o = api.attention(**arrays, implementation="reference")
    q, k, v = arrays["q"][1, :, 3], arrays["k"][1, :, 1], arrays["v"][1, :, 1]
    e = np.tril(np.exp(q @ k.T / np.sqrt(K)))
    np.testing.assert_allclose(o[1, :, 3], e / e.sum(1, keepdims=True) @ v, rtol=1e-4, atol=1e-6)


def test_forget_gates_that_forget_all_cut_the_sequence():
    """A gate of -64 at the first tokens of documents is as good as segment ids, and -inf acts as -64."""
    arrays, ids, _ = inputs(("segments",))
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))[..., None] * np.ones(H)
    want = api.attention(**arrays, segment_ids=jnp.asarray(ids))
    for gate in (-64.0, -np.inf):
        for implementation in ("reference", "xla"):
            log_forget = jnp.where(starts == 1, gate, 0.0)
            got = api.attention(**arrays, log_forget=log_forget, implementation=implementation)
            assert relative_error(got, want) < 1e-6


def test_long_sums_of_gates_lose_no_digits():
    """Behind 4000 strong gates the weights still depend on differences of 1e-3."""
    arrays, _, _ = inputs(("log_forget",), length=300)
    gates = np.full((B, 300, H), -1e-3)
    gates[:, :200] = -20.0
    arrays["log_forget"] = gates
    want = exact(arrays, None, np.zeros((B, 300, H, V)), ())["o"]
    got = api.attention(**jax.tree.map(jnp.float32, arrays), implementation="xla")
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("case", ["window", "forget", "sinks"])
def test_no_output_depends_on_later_tokens(case):
    names, options = CASES[case]
    arrays, ids, _ = inputs(names)
    run = jax.jit(functools.partial(api.attention, **options, implementation="xla"))
    later = {n: x if n == "sinks" else x.copy() for n, x in arrays.items()}
    for n in later.keys() - {"sinks"}:
        later[n][:, 21:] -= 3.0
    before, after = run(**arrays, segment_ids=ids), run(**later, segment_ids=ids)
    np.testing.assert_array_equal(before[:, :21], after[:, :21])
    assert not np.array_equal(before[:, 21:], after[:, 21:])


@pytest.mark.parametrize("case", ["plain", "sinks", "forget", "sigmoid", "cap"])
def test_decoding_equals_the_parallel_form(case):
    """One step over a cache whose slots are filled in any order."""
    names, options = CASES[case]
    arrays, _, _ = inputs([n for n in names if n != "segments"])
    want = api.attention(**arrays, **options, implementation="xla")
    gates, order = arrays.pop("log_forget", None), np.random.default_rng(1).permutation(T)
    options = {n: value for n, value in options.items() if n != "window"}
    for t in (0, 17, T - 1):
        window = CASES[case][1].get("window", T)
        visible = np.broadcast_to((order <= t) & (order > t - window), (B, T))
        bias = None
        if gates is not None:
            total = np.cumsum(gates, 1)
            bias = jnp.asarray(total[:, [t]] - total[:, order]).swapaxes(1, 2)
        o = api.attention_step(
            *(arrays["q"][:, t], arrays["k"][:, order], arrays["v"][:, order], visible),
            bias=bias,
            sinks=arrays.get("sinks"),
            **options,
        )
        assert relative_error(o, want[:, t]) < 1e-5


def test_memory_is_linear_in_the_length(monkeypatch):
    """Temporaries of forward + backward double with T, and stay far below one matrix of scores."""
    monkeypatch.undo()

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        grad = jax.grad(lambda x: api.attention(x, x, x, implementation="xla").sum())
        return jax.jit(grad).lower(x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(8192)
    assert long < 10 * short
    assert long < 4 * 8192**2 / 10


@pytest.mark.quick
@pytest.mark.parametrize("window", [None, 1, 16, 20])
@pytest.mark.parametrize("length", [10, 45, 96])
def test_flops_count_the_visible_blocks(length, window):
    shapes = (B, length, H, K), (B, length, G, K), (B, length, G, V)
    for implementation in ("xla", "reference"):
        run = functools.partial(api.attention, window=window, implementation=implementation)
        declared = flops.attention_flops(length, H, K, V, window, implementation) * B * length
        assert executed(run, *shapes) == pytest.approx(declared, rel=1e-9)
    assert flops.attention_flops(length, H, K, V, window) <= flops.attention_flops(length, H, K, V, window, "xla")


@pytest.mark.quick
def test_errors_name_the_argument():
    q, k = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 3, 8))
    for message, arguments in {
        "heads of q = 4: must be a multiple of the 3 heads": dict(k=k, v=k),
        "window = 0: must be at least 1, or None": dict(window=0),
        r"sinks.shape = \(3,\): must be \(4,\)": dict(sinks=jnp.ones(3)),
        "sinks = given: must be None with sigmoid_bias": dict(sinks=jnp.ones(4), sigmoid_bias=0.0),
        "implementation = 'cudnn' cannot run attention": dict(implementation="cudnn"),
        "cannot run attention: no log_forget": dict(implementation="pallas_tpu", log_forget=jnp.zeros((1, 4, 4))),
    }.items():
        with pytest.raises(ValueError, match=message):
            api.attention(**(dict(q=q, k=q, v=q) | arguments))
