"""Pallas kernels over a mesh of 8 emulated devices (interpreted TPU kernels): the results of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_lm import sharding
from efficient_lm.config import from_dict
from efficient_lm.model import LM
from pallas_kernels import api, dispatch, partition
from tests.kernels.cases import FAMILIES, Shape, cast, relative_error, segment_ids

# What is tested is the traced program, not LLVM's optimiser, which would take most of the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def on(mesh):
    return partition.use_mesh(mesh, ("data", "fsdp"), ("tensor",))


def family(name):
    return next(f for f in FAMILIES if f.name == name)


def case(name, shape):
    """(gradient function of arrays, arrays in float32)."""
    f, rng = family(name), np.random.default_rng(0)
    arrays, ids = cast(f.make(rng, shape, "plain"), jnp.float32), segment_ids(rng, shape)

    def loss(arrays):
        o, state = f.call(arrays, ids, "pallas_tpu", chunk_size=8)
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(s)) for s in jax.tree.leaves(state)), (o, state)

    return compiled(jax.grad(loss, has_aux=True)), arrays


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 1e-5


SHAPES = {
    "retention": Shape(B=4, T=11, H=4, G=2),
    "simple_gla": Shape(B=4, T=11, H=4, G=1),  # one key head for all, whole on every device
    "gla": Shape(B=4, T=11, H=4, G=4),
    "gated_deltanet": Shape(B=4, T=11, H=4, G=2),
    "rwkv7": Shape(B=4, T=11, H=4, G=2),
    "mlstm": Shape(B=4, T=11, H=4, G=4),
    "diagonal": Shape(B=4, T=11, H=2, K=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sharded_equals_one_device(mesh, name):
    run, arrays = case(name, SHAPES[name])
    want = run(arrays)
    with on(mesh):
        got = run(arrays)
    assert_same(got, want)
    rows, heads = ("data", "fsdp"), "tensor"
    assert got[1][0].sharding.spec == PartitionSpec(rows, None, heads)
    assert jax.tree.leaves(got[1][1])[0].sharding.spec == PartitionSpec(rows, heads)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_sharded_attention(mesh, kv_heads):
    rng, shapes = np.random.default_rng(1), ((4, 11, 4, 8), (4, 11, kv_heads, 8), (4,))
    q, k, sinks = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    ids = jnp.asarray(rng.random((4, 11)) < 0.2, jnp.int32)

    def loss(q, k, sinks):
        o = api.attention(q, k, k, segment_ids=ids, sinks=sinks, implementation="pallas_tpu")
        return jnp.sum(jnp.sin(o)), o

    run = compiled(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    want = run(q, k, sinks)
    with on(mesh):
        got = run(q, k, sinks)
    assert_same(got, want)
    assert got[1].sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        (Shape(B=4, T=11, H=3, G=3), PartitionSpec(("data", "fsdp"))),
        (Shape(B=4, T=11, H=6, G=3), PartitionSpec(("data", "fsdp"))),
        (Shape(B=4, T=11, H=1, G=1), PartitionSpec(("data", "fsdp"))),
        (Shape(B=3, T=11, H=4, G=2), PartitionSpec(None, None, "tensor")),
    ],
)
def test_what_does_not_divide_stays_whole(mesh, shape, spec):
    run, arrays = case("simple_gla", shape)
    want = run(arrays)
    with on(mesh):
        got = run(arrays)
    assert_same(got, want)
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


def test_sharded_arguments_are_not_gathered(mesh):
    q = jax.ShapeDtypeStruct(
        (4, 16, 4, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    )
    run = compiled(lambda q: api.linear_attention(q, q, q, implementation="pallas_tpu", chunk_size=8)[0])
    with partition.use_mesh(mesh, ("data",), ("tensor",)):
        text = run.lower(q).compile().as_text()
    assert "all-gather" not in text and "f32[2,16,2,8]" in text and "f32[4,16,4,8]" not in text


def test_automatic_choice_takes_kernels_where_each_device_gets_its_part(mesh, monkeypatch):
    """On several TPUs: nowhere but under use_mesh and inside shard_map; a grouped matmul only in the latter."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q = jnp.ones((4, 8, 2, 8))
    arguments = dict(q=q, k=q, v=q, log_decay=None, initial_state=None, segment_ids=None, chunk_size=None)
    chosen = lambda: dispatch.choose("linear_attention", None, arguments)[0]  # noqa: E731
    assert chosen() == "xla"
    with on(mesh):
        assert chosen() == "pallas_tpu"
        assert partition.per_device("linear_attention") and not partition.per_device("grouped_matmul")
    assert chosen() == "xla"
    seen = []

    def body(x):
        seen.append((chosen(), partition.per_device("grouped_matmul")))
        return x

    jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(q)
    assert seen == [("pallas_tpu", True)]


def test_model_on_a_mesh(mesh):
    """A language model with such a mixer, wrapped as the training loop does it."""
    mixer = {"n_heads": 2, "implementation": "pallas_tpu", "chunk_size": 8}
    values = {"d_model": 16, "n_layers": 1, "vocab_size": 8, "dtype": "float32", "norm_eps": 1e-2, "pattern": ["gla"]}
    lm = LM(from_dict({"model": values | {"mixers": {"gla": mixer}}}).model)
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 8)
    constrain = sharding.residual_constraint(mesh)
    grad = jax.grad(lambda params, tokens, constrain: jnp.sum(jnp.sin(lm(params, tokens, constrain=constrain)[0])))
    want = compiled(functools.partial(grad, constrain=lambda x: x))(params, tokens)
    run = sharding.split_kernels(functools.partial(grad, constrain=constrain), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, sharding.place(params, mesh))
    assert "shard_map" in str(jax.make_jaxpr(run)(params, tokens))
    got = compiled(run)(jax.device_put(params, places), jax.device_put(tokens, sharding.batch_sharding(mesh)))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 2e-5
