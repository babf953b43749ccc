"""The whole model: layouts, decoding, precision, caps, depth scaling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import sharding
from efficient_lm.config import MeshConfig, from_dict
from efficient_lm.layers import layer_specs, logits_product
from efficient_lm.model import LM

pytestmark = pytest.mark.usefixtures("quick_compile")

VOCAB, T = 24, 20


def make(**model):
    values = {"d_model": 16, "vocab_size": VOCAB, "dtype": "float32", **model}
    lm = LM(from_dict({"model": values}).model)
    return lm, lm.init(jax.random.key(0))


def tokens(seed=1, shape=(2, T)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


@pytest.mark.quick
def test_layout_prefix_pattern_tail():
    lm, params = make(n_layers=6, prefix=["attention/none"], pattern=["gla", "attention"])
    assert [mixer for mixer, _ in layer_specs(lm.model)] == [
        "attention",
        "gla",
        "attention",
        "gla",
        "attention",
        "gla",
    ]
    assert {group: sorted(blocks) for group, blocks in params.items() if group in lm.groups} == {
        "prefix": ["0"],
        "pattern": ["0", "1"],
        "tail": ["0"],
    }
    assert params["pattern"]["0"]["mixer"]["q"]["kernel"].shape[0] == 2
    first, second = params["pattern"]["0"]["mixer"]["q"]["kernel"]
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("layout", [
    {"n_layers": 4, "pattern": ["gla", "attention"], "scan_unroll": 1},
    {"n_layers": 4, "prefix": ["gla"], "pattern": ["attention", "gla"], "residual": "sandwich", "tie_embeddings": True},
])  # fmt: skip
def test_decoding_equals_the_parallel_form(layout):
    """Token by token from the start, and after a prompt in parallel form."""
    lm, params = make(**layout)
    x = tokens()
    parallel, _ = jax.jit(lm)(params, x)
    step = jax.jit(lm.step)
    for n in (0, 7):
        if n:
            out, state = jax.jit(lm.prefill, static_argnums=2)(params, x[:, :n], T)
            np.testing.assert_allclose(out, parallel[:, n - 1], rtol=1e-4, atol=2e-5)
        else:
            state = lm.init_state(params, 2, T)
        for t in range(n, T):
            out, state = step(params, x[:, t], state)
            np.testing.assert_allclose(out, parallel[:, t], rtol=1e-4, atol=2e-5)


def test_prompts_longer_than_the_state_are_refused():
    lm, params = make()
    with pytest.raises(ValueError, match="no longer than max_len = 19"):
        lm.prefill(params, tokens(), T - 1)


def test_unrolling_and_remat_change_nothing_but_time():
    values = {"n_layers": 2, "pattern": ["gla"]}
    lm, params = make(**values)
    x = tokens()

    def loss(lm):
        return lambda params: jnp.sum(jnp.sin(lm(params, x)[0]))

    value, grads = jax.jit(jax.value_and_grad(loss(lm)))(params)
    for change in ({"scan_unroll": 1}, {"remat": "full"}, {"remat": "dots", "scan_unroll": 1}):
        other, _ = make(**values, **change)
        value2, grads2 = jax.jit(jax.value_and_grad(loss(other)))(params)
        np.testing.assert_allclose(value, value2, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_packed_documents_equal_separate_ones():
    lm, params = make(n_layers=2, pattern=["gla", "attention"])
    x = tokens()
    segments = jnp.broadcast_to(jnp.where(jnp.arange(T) < 7, 1, 2), x.shape)
    positions = jnp.broadcast_to(jnp.where(jnp.arange(T) < 7, jnp.arange(T), jnp.arange(T) - 7), x.shape)
    packed, _ = jax.jit(lm)(params, x, segments, positions)
    alone = jnp.concatenate([lm(params, x[:, :7])[0], lm(params, x[:, 7:])[0]], 1)
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [
    ["gla", "gated_deltanet", "attention"],
    ["giver", "mamba2/none", "taker", "mla"],
])  # fmt: skip
def test_eight_devices_equal_one(pattern):
    """Loss and gradients with rows over data and fsdp, matrices over fsdp and tensor, in a scan over repeats."""
    mixers = {"giver": {"kind": "attention", "kv": "give"}, "taker": {"kind": "attention", "kv": "take"}}
    # A large norm_eps, since tiny heads make the first token's norm ill-conditioned.
    settings = {"n_layers": 2 * len(pattern), "scan_unroll": 1, "norm_eps": 1e-2, "mixers": mixers}
    lm, params = make(pattern=pattern, **settings)
    x = tokens(shape=(8, T))
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), len(x), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}

    def loss(constrain):
        return lambda params, x: jnp.mean(jnp.square(lm(params, x, constrain=constrain)[0]))

    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    want, want_grads = compiled(jax.value_and_grad(loss(lambda x: x)))(params, x)
    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place(params, mesh))
    spread = jax.value_and_grad(loss(sharding.residual_constraint(mesh)))
    spread = compiled(spread, out_shardings=(sharding.replicated(mesh), places))
    got, grads = spread(jax.device_put(params, places), jax.device_put(x, sharding.batch_sharding(mesh)))
    split = [leaf for leaf in jax.tree.leaves(grads) if not leaf.is_fully_replicated]
    assert len(split) > len(jax.tree.leaves(grads)) / 3
    np.testing.assert_allclose(got, want, rtol=1e-5)
    size = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(want_grads)) ** 0.5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b) + 1e-6 * size


@pytest.mark.quick
def test_compute_dtype_logit_cap_and_depth_scaling():
    lm, params = make(dtype="bfloat16", logit_cap=2.0)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    logits, _ = lm(params, tokens())
    assert logits.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(logits))) <= 2.0
    exact, _ = make(logit_cap=2.0)[0](params, tokens())
    error = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 3e-2, "bfloat16 compute should differ from float32, a little"
    # Branches scaled to nothing leave embedding -> norm -> head.
    deep, deep_params = make(n_layers=2, base_depth=1, depth_alpha=1.0)
    plain, _ = make(n_layers=2, base_depth=2)
    assert not np.allclose(deep(deep_params, tokens())[0], plain(deep_params, tokens())[0])


@pytest.mark.quick
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradients_of_logits_are_those_of_the_product(dtype, bound):
    """Up to one rounding of the cotangent: bf16 keeps 8 bits, so 2^-9 of it on average and 2^-8 at most."""
    x, table, weight = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, T, 16), (VOCAB, 16), (VOCAB,)])
    )
    x, table = x.astype(dtype), table.astype(dtype)

    def loss(product, x, table):
        return jnp.sum(jax.nn.softmax(product(x, table)) * weight)

    def plain(x, table):
        return jnp.matmul(x, table.T, precision="highest")

    assert logits_product(x, table).dtype == jnp.float32
    got = jax.grad(loss, (1, 2))(logits_product, x, table)
    want = jax.grad(loss, (1, 2))(plain, x.astype(jnp.float32), table.astype(jnp.float32))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert np.linalg.norm(g.astype(jnp.float32) - w) <= bound * np.linalg.norm(w)


def test_parameters_that_do_not_fit_are_refused():
    lm, params = make()
    other, _ = make(mixers={"attention": {"qk_norm": False}})
    with pytest.raises(ValueError, match="do not fit"):
        other(params, tokens())
