"""The operator families that the conformance suite runs over, and random inputs for each.

A new implementation joins by a line in IMPLEMENTATIONS, a new family by one in FAMILIES.
"""
import dataclasses
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import api

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
# Gates: ordinary; decays near 0 (forget all), near 1 (forget nothing), a mix of both extremes.
MODES = ("plain", "forget", "keep", "mixed")


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    B: int = 2
    T: int = 45
    H: int = 4
    G: int = 2
    K: int = 8
    V: int = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """`make(rng, shape, mode)` gives the array arguments as float64 NumPy, by the names of the operator."""
    name: str
    op: str
    make: Callable
    options: dict = dataclasses.field(default_factory=dict)
    chunked: bool = True
    steps_per_token: int = 1

    def call(self, arrays, segment_ids, implementation, *, final=True, chunk_size=None):
        chunk = {"chunk_size": chunk_size} if self.chunked else {}
        return getattr(api, self.op)(**arrays, segment_ids=segment_ids, implementation=implementation,
                                     output_final_state=final, **self.options, **chunk)


def log_decays(rng, mode, *shape):
    u = rng.random(shape)
    return {"plain": -u, "forget": -20 - 20 * u, "keep": -1e-4 * u, "mixed": -30.0 * (u < 0.4)}[mode]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _qkv(rng, s, n=1):
    normal = rng.standard_normal
    return dict(q=normal((s.B, s.T, s.G, s.K)), k=normal((s.B, s.T * n, s.G, s.K)), v=normal((s.B, s.T * n, s.H, s.V)),
                initial_state=normal((s.B, s.H, s.K, s.V)))


def _linear(decay, bonus=False, normalise=False):
    def make(rng, s, mode):
        shape = {"head": (s.H,), "token": (s.B, s.T, s.H), "channel": (s.B, s.T, s.H, s.K)}
        arrays = _qkv(rng, s)
        if normalise and mode == "forget":  # would leave o = v whatever q, whose gradient 0 has no relative error
            mode = "mixed"
        if decay != "none":
            arrays["log_decay"] = log_decays(rng, mode, *shape[decay])
        if bonus:
            arrays["bonus"] = rng.standard_normal((s.H, s.K))
        if normalise:  # weights must be positive
            arrays["initial_state"] = rng.standard_normal((s.B, s.H, s.K, s.V + 1))
            arrays["initial_state"][..., -1] **= 2
            arrays |= {name: np.abs(arrays[name]) for name in ("q", "k")}
        return arrays
    return make


def _delta(decay, n=1):
    def make(rng, s, mode):
        shape = {"token": (s.B, s.T, s.H), "channel": (s.B, s.T, s.H, s.K)}
        arrays = _qkv(rng, s, n)
        # 'keep' is the hard case of the triangular inverse: one key again and again, reflected by beta near 2.
        arrays["k"] = unit(arrays["k"][:, :1] + 0.1 * arrays["k"] if mode == "keep" else arrays["k"])
        beta = rng.random((s.B, s.T * n, s.H))
        arrays["beta"] = 2 - 0.01 * beta if mode == "keep" else 2 * beta
        if decay != "none":
            arrays["log_decay"] = log_decays(rng, mode, *shape[decay])
        return arrays
    return make


def _dplr(rng, s, mode):
    arrays = _qkv(rng, s)
    kappa, eta = rng.standard_normal((s.B, s.T, s.G, s.K)), rng.random((s.B, s.T, s.G, 1))
    if mode == "keep":  # as for the delta rules
        kappa, eta = kappa[:, :1] + 0.1 * kappa, 2 - 0.01 * eta
    kappa = unit(kappa)
    return arrays | dict(a=-kappa, b=kappa * eta,
                         log_decay=log_decays(rng, mode, s.B, s.T, s.H, s.K))


def _mlstm(activation):
    def make(rng, s, mode):
        arrays = _qkv(rng, s)
        offset = {"plain": 1.0, "forget": -20.0, "keep": 15.0, "mixed": 0.0}[mode]
        # Wider gates leave one key per state: n . q then falls to 1e-5 of its terms, where float32 itself errs by 1e-5.
        gates = rng.standard_normal((2, s.B, s.T, s.H)) * (3 if mode == "mixed" else 1)
        arrays |= dict(input_gate=gates[0], forget_gate=gates[1] + offset)
        if activation == "exp":
            arrays["initial_state"] = (arrays["initial_state"], rng.standard_normal((s.B, s.H, s.K)),
                                       rng.standard_normal((s.B, s.H)))
        return arrays
    return make


def _diagonal(complex_):
    def make(rng, s, mode):
        d = s.H * s.K
        x, state = rng.standard_normal((s.B, s.T, d)), rng.standard_normal((s.B, d))
        log_decay = log_decays(rng, mode, s.B, s.T, d)
        if complex_:
            log_decay = log_decay + 1j * rng.standard_normal(log_decay.shape)
            state = state + 1j * rng.standard_normal(state.shape)
        return dict(x=x, log_decay=log_decay, initial_state=state)
    return make


def _conv(rng, s, mode):
    d = s.H * s.K
    return dict(x=rng.standard_normal((s.B, s.T, d)), weight=rng.standard_normal((4, d)), bias=rng.standard_normal(d),
                initial_state=rng.standard_normal((s.B, 3, d)))


FAMILIES = [
    Family("linear", "linear_attention", _linear("none")),
    Family("retention", "linear_attention", _linear("head")),
    Family("simple_gla", "linear_attention", _linear("token")),
    Family("gla", "linear_attention", _linear("channel")),
    Family("rwkv6", "linear_attention", _linear("channel", bonus=True)),
    Family("normalised", "linear_attention", _linear("none", normalise=True), {"normalise": True}),
    Family("normalised_gla", "linear_attention", _linear("channel", normalise=True), {"normalise": True}),
    Family("deltanet", "delta_rule", _delta("none")),
    Family("gated_deltanet", "delta_rule", _delta("token")),
    Family("kda", "delta_rule", _delta("channel")),
    Family("deltaproduct", "delta_rule", _delta("token", 2), steps_per_token=2),
    Family("rwkv7", "dplr", _dplr),
    Family("mlstm", "mlstm", _mlstm("exp")),
    Family("mlstm_sigmoid", "mlstm", _mlstm("sigmoid"), {"input_activation": "sigmoid"}),
    Family("diagonal", "diagonal_scan", _diagonal(False), chunked=False),
    Family("diagonal_reverse", "diagonal_scan", _diagonal(False), {"reverse": True}, chunked=False),
    Family("diagonal_complex", "diagonal_scan", _diagonal(True), chunked=False),
    Family("causal_conv", "causal_conv1d", _conv, {"activation": "silu"}, chunked=False),
]
# Arguments that stay float32 when the others are bfloat16.
KEEP_FLOAT32 = ("log_decay", "beta", "bonus", "initial_state", "input_gate", "forget_gate", "weight", "bias")


def cast(arrays, dtype):
    """Arrays in `dtype` (complex ones in its complex type), gates and states in float32 or wider."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def leaf(name, x):
        kind = wide if name in KEEP_FLOAT32 else dtype
        if np.iscomplexobj(x):
            kind = jnp.complex128 if wide == jnp.float64 else jnp.complex64
        return jnp.asarray(x).astype(kind)

    return {name: jax.tree.map(lambda x, name=name: leaf(name, x), x) for name, x in arrays.items()}


def segment_ids(rng, s, boundaries=True):
    """[B, T] ids; with boundaries some segments are one token long and one id comes back later."""
    if not boundaries:
        return np.ones((s.B, s.T), np.int32)
    return (np.cumsum(rng.random((s.B, s.T)) < 0.12, 1) % 3 + 1).astype(np.int32)


def has_kernel(op, implementation):
    """Whether this package has such a kernel; mLSTM runs on linear attention."""
    package = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}.get(implementation, implementation)
    op = "linear_attention" if op == "mlstm" else op
    return importlib.util.find_spec(f"pallas_kernels.{package}.{op}") is not None


def relative_error(x, reference, size=0.0):
    """‖x - reference‖ over ‖reference‖, or over `size` where that is larger."""
    x, reference = (np.asarray(a).astype(np.complex128) for a in (x, reference))
    assert np.isfinite(x).all()
    return np.linalg.norm(x - reference) / max(np.linalg.norm(reference), size, 1e-30)
