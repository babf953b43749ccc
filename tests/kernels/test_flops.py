"""The FLOP formulas of the XLA forms and the TPU kernels against the dot_general operations of their traces."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, flops

B, H, G, K, V = 2, 4, 2, 8, 6


def dot_flops(jaxpr, times=1):
    """FLOPs of all dot_general in a jaxpr, bodies of scans and kernels counted once per iteration or program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * times * terms * np.prod(eqn.outvars[0].aval.shape)
        programs = np.prod(eqn.params["grid_mapping"].grid) if eqn.primitive.name == "pallas_call" else 1
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                total += dot_flops(sub, times * programs * eqn.params.get("length", 1))
    return total


def executed(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return dot_flops(getattr(jaxpr, "jaxpr", jaxpr))


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [16, 32, None])
@pytest.mark.parametrize("T", [30, 96])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_linear_attention(decay, T, chunk):
    shapes = {"none": [], "head": [(H,)], "token": [(B, T, H)], "channel": [(B, T, H, K)]}[decay]
    for implementation in ("xla", "pallas_tpu", "reference"):
        run = lambda *a, i=implementation: api.linear_attention(*a, chunk_size=chunk, implementation=i)  # noqa: E731
        expected = flops.linear_attention_flops(T, H, K, V, decay, chunk, implementation, groups=G) * B * T
        count = executed(run, (B, T, G, K), (B, T, G, K), (B, T, H, V), *shapes)
        shared = 0
        if decay == "head" and implementation == "xla":
            c = min(chunk or 64, T)
            shared = 4 * c * c * H * (1 if T % c == 0 else -(-T // c))
        assert count == pytest.approx(expected + shared, rel=1e-9)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("T", [30, 96])
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_delta_rule(decay, T, n, implementation):
    shapes = {"none": [], "token": [(B, T, H)], "channel": [(B, T, H, K)]}[decay]
    run = lambda *a: api.delta_rule(*a, chunk_size=32, implementation=implementation)  # noqa: E731
    count = executed(run, (B, T, G, K), (B, n * T, G, K), (B, n * T, H, V), (B, n * T, H), *shapes)
    expected = flops.delta_rule_flops(T, H, K, V, decay, 32, implementation, steps_per_token=n) * B * T
    assert count == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("T", [30, 96])
def test_dplr_and_mlstm(T, implementation):
    qk, v, gate = (B, T, H, K), (B, T, H, V), (B, T, H)
    options = dict(chunk_size=16, implementation=implementation)
    count = executed(lambda *a: api.dplr(*a, **options), qk, qk, v, qk, qk, qk)
    assert count == pytest.approx(flops.dplr_flops(T, H, K, V, 16, implementation) * B * T, rel=1e-9)
    for kind in ("exp", "sigmoid"):
        run = lambda *a, kind=kind: api.mlstm(*a, input_activation=kind, **options)  # noqa: E731
        count = executed(run, qk, qk, v, gate, gate)
        assert count == pytest.approx(flops.mlstm_flops(T, H, K, V, kind, 16, implementation) * B * T, rel=1e-9)


def test_idealised_form_at_the_published_example():
    """K = V = 128, C = 64: 98 kFLOPs per head for linear attention, 181 for the delta rule."""
    assert flops.linear_attention_flops(4096, 1, 128, 128) == pytest.approx(98e3, rel=0.01)
    assert flops.delta_rule_flops(4096, 1, 128, 128) == pytest.approx(181e3, rel=0.01)
