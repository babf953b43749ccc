"""What the GPU benchmark times: operator families with inputs as a model gives them, and their work.

A family is one entry of `FAMILIES`; everything else follows from its arrays. Gates come as a model's layers make them:
Mamba-2's and Gated DeltaNet's -A softplus(x + bias) with A in (0, 16) and softplus(bias) in (1e-3, 0.1), GLA's
log_sigmoid(x) / 16, KDA's bounded -5 sigmoid(x), RWKV-7's -0.6065 sigmoid(x), mLSTM's forget gates around 4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import api

SHAPES = ((8, 2048, 16, 128), (1, 16384, 16, 128), (4, 4096, 16, 128), (8, 2048, 32, 64))  # B, T, H, D
GROUPED = ((65536, 64, 1024, 256), (65536, 64, 256, 1024), (32768, 8, 1024, 4096))  # rows, groups, K, N
CHUNK = 64
RWKV_BOUND = -0.6065306597126334


def _unit(x):
    return x * lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True))


def _qkv(keys, b, t, h, d, *, unit=False):
    q, k, v = (jax.random.normal(key, (b, t, h, d)) for key in keys)
    q, k = (_unit(q), _unit(k)) if unit else (q, k)
    return {"q": q, "k": k, "v": v}


def _token_gates(key, b, t, h):
    rate, bias, x = jax.random.split(key, 3)
    a = jax.random.uniform(rate, (h,), minval=0.01, maxval=16.0)
    dt = jnp.exp(jax.random.uniform(bias, (h,), minval=math.log(1e-3), maxval=math.log(0.1)))
    return -a * jax.nn.softplus(jnp.log(jnp.expm1(dt)) + 0.5 * jax.random.normal(x, (b, t, h)))


def _gates(key, decay, b, t, h, d):
    if decay == "token":
        return {"log_decay": _token_gates(key, b, t, h)}
    if decay == "head":
        return {"log_decay": -8.0 / h * jnp.arange(1, h + 1)}
    if decay == "channel":
        return {"log_decay": (jax.nn.log_sigmoid(jax.random.normal(key, (b, t, h, d))) / 16).astype(jnp.bfloat16)}
    if decay == "bounded":
        return {"log_decay": -5.0 * jax.nn.sigmoid(jax.random.normal(key, (b, t, h, d)) - 2.0)}
    return {}


def _linear(decay):
    def make(key, b, t, h, d):
        *keys, gates = jax.random.split(key, 4)
        return _qkv(keys, b, t, h, d) | _gates(gates, decay, b, t, h, d)

    return make


def _delta(decay):
    def make(key, b, t, h, d):
        *keys, strength, gates = jax.random.split(key, 5)
        beta = jax.nn.sigmoid(jax.random.normal(strength, (b, t, h)))
        return _qkv(keys, b, t, h, d, unit=True) | {"beta": beta} | _gates(gates, decay, b, t, h, d)

    return make


def _dplr(key, b, t, h, d):
    *keys, erase, rate, gates = jax.random.split(key, 6)
    kappa = _unit(jax.random.normal(erase, (b, t, h, d)))
    eta = jax.nn.sigmoid(jax.random.normal(rate, (b, t, h, d)))
    log_decay = RWKV_BOUND * jax.nn.sigmoid(jax.random.normal(gates, (b, t, h, d)))
    return _qkv(keys, b, t, h, d) | {"a": -kappa, "b": kappa * eta, "log_decay": log_decay.astype(jnp.bfloat16)}


def _mlstm(key, b, t, h, d):
    *keys, first, second = jax.random.split(key, 5)
    return _qkv(keys, b, t, h, d) | {
        "input_gate": jax.random.normal(first, (b, t, h)),
        "forget_gate": 4.0 + jax.random.normal(second, (b, t, h)),
    }


def _diagonal(key, b, t, h, d):
    first, second = jax.random.split(key)
    log_decay = jax.nn.log_sigmoid(2.0 + jax.random.normal(second, (b, t, h * d)))
    return {"x": jax.random.normal(first, (b, t, h * d)), "log_decay": log_decay.astype(jnp.bfloat16)}


def _attention(key, b, t, h, d):
    return _qkv(jax.random.split(key, 3), b, t, h, d)


def _grouped(key, m, e, k, n):
    """Groups of about 0.5 to 1.6 times the mean size."""
    first, second, third = jax.random.split(key, 3)
    share = jnp.cumsum(jax.random.dirichlet(third, jnp.full((e,), 20.0)))
    sizes = jnp.diff(jnp.round(share / share[-1] * m).astype(jnp.int32), prepend=0)
    return {
        "lhs": jax.random.normal(first, (m, k)),
        "rhs": jax.random.normal(second, (e, k, n)) / math.sqrt(k),
        "group_sizes": sizes,
    }


# Model FLOPs of the chunked algorithms per token and head, forward and backward (chunk 64, causal halves not saved).
def _linear_flops(t, d):
    return 4 * CHUNK * d + 4 * d * d, 10 * CHUNK * d + 10 * d * d


def _delta_flops(t, d):
    return 10 * CHUNK * d + 6 * d * d + CHUNK**2, 28 * CHUNK * d + 16 * d * d + 4 * CHUNK**2


def _dplr_flops(t, d):
    forward = 18 * CHUNK * d + 8 * d * d + CHUNK**2
    return forward, 2.5 * forward


class Family(NamedTuple):
    op: str  # operator of `pallas_kernels.api`
    make: Callable  # key, *shape -> arguments by name; float32 ones listed in FLOAT32 stay so, the rest turn bf16
    flops: Callable  # T, D -> forward and backward FLOPs per token and head
    implementation: str = "pallas_gpu"
    options: dict[str, Any] = {}
    shapes: tuple = SHAPES


FLOAT32 = ("log_decay", "beta", "input_gate", "forget_gate")
FAMILIES = {
    "scalar decay per token": Family("linear_attention", _linear("token"), _linear_flops),
    "constant decay": Family("linear_attention", _linear("head"), _linear_flops),
    "channel decay (GLA)": Family("linear_attention", _linear("channel"), _linear_flops),
    "DeltaNet": Family("delta_rule", _delta("none"), _delta_flops, options={"max_beta": 1.0}),
    "Gated DeltaNet": Family("delta_rule", _delta("token"), _delta_flops, options={"max_beta": 1.0}),
    "KDA": Family("delta_rule", _delta("bounded"), _delta_flops),
    "DPLR (RWKV-7)": Family("dplr", _dplr, _dplr_flops, options={"min_log_decay": RWKV_BOUND}),
    "mLSTM (exponential gate)": Family("mlstm", _mlstm, _linear_flops),
    "diagonal scan": Family("diagonal_scan", _diagonal, lambda t, d: (2 * d, 4 * d), shapes=SHAPES[:2]),
    "grouped matmul": Family("grouped_matmul", _grouped, None, shapes=GROUPED),
    "causal attention": Family("attention", _attention, lambda t, d: (2 * t * d, 5 * t * d), implementation="cudnn"),
}


def chosen(parser, text, allowed):
    """The names of a comma list `text` of --families; the parser's error at one that is not `allowed`."""
    names = text.split(",")
    for name in names:
        if name not in allowed:
            parser.error(f"--families {name}: allowed are {', '.join(allowed)}")
    return names


def make_inputs(family, shape, key):
    """Arguments by name, in the dtypes that the kernels take."""
    arrays = family.make(key, *shape)
    return {
        n: x if n in FLOAT32 or jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.bfloat16)
        for n, x in arrays.items()
    }


def forward(family, implementation):
    """Function of the arguments by name: the output alone."""

    def run(arrays):
        out = getattr(api, family.op)(**arrays, **family.options, implementation=implementation)
        return out[0] if isinstance(out, tuple) else out

    return run


def forward_backward(family, implementation):
    """Function of (cotangent, arguments): the output and the gradients, by name, of all arguments but integers."""
    run = forward(family, implementation)

    def both(do, arrays):
        fixed = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.integer)}
        varied = {n: x for n, x in arrays.items() if n not in fixed}
        o, vjp = jax.vjp(lambda varied: run(varied | fixed), varied)
        return o, vjp(do)[0]

    return both


def work(family, shape, arrays, out):
    """{mode: (FLOPs, compulsory bytes)}: inputs and output once, and in the backward pass inputs, do and gradients.

    Attention's backward pass reads its output as well. `arrays`, `out`: shapes and dtypes are enough.
    """
    size = lambda x: math.prod(x.shape) * np.dtype(x.dtype).itemsize  # noqa: E731
    given = sum(size(x) for x in arrays.values() if not jnp.issubdtype(x.dtype, jnp.integer))
    back_bytes = 2 * given + size(out) * (2 if family.op == "attention" else 1)
    if family.op == "grouped_matmul":
        m, _, k, n = shape
        flops, back = 2 * m * k * n, 4 * m * k * n
    else:
        b, t, h, d = shape
        flops, back = (b * t * h * n for n in family.flops(t, d))
    return {"fwd": (flops, given + size(out)), "fwdbwd": (flops + back, given + size(out) + back_bytes)}
