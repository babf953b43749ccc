"""What recurrent mixers share: operator settings, short convolution, gated output, decay gates, the call itself."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.flops import Flops
from efficient_lm.layers import Linear, wide, width_multiplier
from efficient_lm.mixers.attention import divisors
from efficient_lm.mixers.base import Mixer, MixerConfig
from efficient_lm.norms import RMSNorm, SimpleRMSNorm
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api
from pallas_kernels.flops import causal_conv1d_flops


@dataclass(frozen=True)
class BackendConfig(MixerConfig):
    """Settings of mixers that run on an operator of `pallas_kernels`."""

    implementation: str = setting(
        "auto",
        "operator implementation",
        choices=("auto", "reference", "xla", "pallas_tpu", "pallas_gpu"),
        volatile=True,
    )

    @property
    def backend(self) -> str | None:
        """What the operators take as `implementation`."""
        return None if self.implementation == "auto" else self.implementation


@dataclass(frozen=True)
class OperatorConfig(BackendConfig):
    """Settings of mixers with heads whose operator works in chunks."""

    n_heads: int = setting(4, "heads", low=1)
    chunk_size: int = setting(0, "tokens per chunk; 0 = the operator's default", low=0, volatile=True)

    def options(self) -> dict:
        """Keyword arguments for the operator."""
        return {"chunk_size": self.chunk_size or None, "implementation": self.backend}

    def flops(self, formula, **sizes) -> Flops:
        """FLOPs per token of the operator whose formula (pallas_kernels.flops) is given."""
        ideal = formula(**sizes)
        return Flops(ideal, ideal, formula(**sizes, chunk_size=self.chunk_size or None, implementation="xla"))


class Recurrent(Mixer):
    """A mixer around one operator: project -> (short convolution) -> operator with a state -> output.

    Subclasses name the `operator` and its single-token form `operator_step`, and define, for x [..., d] with any
    leading axes (so that training and decoding share them):
      project(x) -> u                   the channels [..., C] that the convolution sees, or what there is without
      inputs(u, x) -> dict              keyword arguments of the operator
      output(o, u, x) -> y [..., d]     from the operator's output o [..., H, V]
      memory(batch)                     the operator's state before the first token
    `self.conv` is a ShortConv or None.
    """

    operator = staticmethod(api.linear_attention)
    operator_step = staticmethod(api.linear_attention_step)
    conv = None

    def __call__(self, x, ctx):
        u = self.project(x)
        if self.conv is not None:
            u = self.conv(u, ctx.segment_ids)
        o, _ = self.operator(**self.inputs(u, x), segment_ids=ctx.segment_ids, **self.cfg.options())
        return self.output(o, u, x), {}

    def prefill(self, x, ctx, max_len):
        u, state = self.project(x), {}
        if self.conv is not None:
            u, state["conv"] = self.conv.prefill(u)
        o, state["memory"] = self.operator(**self.inputs(u, x), output_final_state=True, **self.cfg.options())
        return self.output(o, u, x), state

    def init_state(self, batch, max_len):
        state = {"memory": self.memory(batch)}
        return state | ({} if self.conv is None else {"conv": self.conv.init_state(batch)})

    def step(self, x, state, ctx):
        u, new = self.project(x), {}
        if self.conv is not None:
            u, new["conv"] = self.conv.step(u, state["conv"])
        o, new["memory"] = self.operator_step(**self.inputs(u, x), state=state["memory"])
        return self.output(o, u, x), new


class ShortConv(nnx.Module):
    """Causal depthwise convolution over the last `size` tokens, then SiLU; at document starts it reads zeros.

    Initial taps uniform in +-1/sqrt(size), as PyTorch's Conv1d.
    """

    def __init__(self, make, channels: int, size: int, *, bias=False, activation="silu"):
        bound = size**-0.5
        self.taps = make.vector(jax.random.uniform(make.next_key(), (size, channels), minval=-bound, maxval=bound))
        self.bias = make.vector(jnp.zeros(channels)) if bias else None
        self.activation = activation

    def _bias(self):
        return None if self.bias is None else self.bias[...]

    def __call__(self, x, segment_ids):
        """[B, T, channels] -> the same."""
        taps = self.taps[...]
        return api.causal_conv1d(x, taps, self._bias(), activation=self.activation, segment_ids=segment_ids)[0]

    def prefill(self, x):
        """[B, n, channels] -> the same, the state after n tokens."""
        y, state = api.causal_conv1d(
            x, self.taps[...], self._bias(), activation=self.activation, output_final_state=True
        )
        return y, state.astype(jnp.float32)

    def init_state(self, batch):
        size, channels = self.taps.shape
        return jnp.zeros((batch, size - 1, channels), jnp.float32)

    def step(self, x, state):
        return api.causal_conv1d_step(x, self.taps[...], self._bias(), state, activation=self.activation)


def conv_flops(channels: int, size: int) -> Flops:
    """A convolution is no matrix product: it counts as model FLOPs only."""
    flops = causal_conv1d_flops(channels, size)
    return Flops(flops, flops, 0.0)


def conv_state_bytes(channels: int, size: int) -> int:
    return 4 * (size - 1) * channels


class HeadNorm(nnx.Module):
    """RMSNorm over the channels of each head, with one weight vector for all heads or none: [..., H, V] -> [..., H V].

    The result has the dtype of `like`.
    """

    def __init__(self, make, width: int, eps: float, *, affine=True):
        self.norm = (RMSNorm if affine else SimpleRMSNorm)(make, width, eps)

    def __call__(self, o, like):
        return self.norm(o).reshape(*o.shape[:-2], -1).astype(like.dtype)


class LowRank(nnx.Module):
    """x W_down W_up (+ bias). `role` is that of W_up: 'fixed' for a rank that does not grow with the width."""

    def __init__(self, make, d_in: int, rank: int, d_out: int, *, bias=False, role="fixed"):
        self.down = Linear(make, d_in, rank)
        self.up = Linear(make, rank, d_out, role=role, bias=bias)

    def __call__(self, x):
        return self.up(self.down(x))


class ExpGate(nnx.Module):
    """log_decay = -exp(a_log) softplus(z + dt_bias), the gate of Mamba-2, Gated DeltaNet and KDA, in float32.

    exp(a_log) ~ U(1, 16), one per head; dt_bias such that softplus(dt_bias) is log-uniform in [1e-3, 0.1] (2405.21060).
    z is [..., H], or [..., H, K] with a bias per channel.
    """

    def __init__(self, make, heads: int, channels: int = 0):
        rate = jax.random.uniform(make.next_key(), (heads,), minval=1.0, maxval=16.0)
        self.a_log = make.vector(jnp.log(rate))
        self.dt_bias = make.vector(dt_bias(make.next_key(), (heads, channels) if channels else (heads,)))

    def dt(self, z):
        return jax.nn.softplus(wide(z) + self.dt_bias[...])

    def __call__(self, z):
        rate = jnp.exp(self.a_log[...])
        return -(rate[:, None] if self.dt_bias[...].ndim == 2 else rate) * self.dt(z)


def dt_bias(key, shape):
    """Inverse softplus of a step drawn log-uniformly from [1e-3, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=np.log(1e-3), maxval=np.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def split_heads(x, heads: int):
    """[..., H D] -> [..., H, D]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def unit_scale(model, width: int) -> float:
    """Scale of queries where q and k have unit norm: 1/sqrt(width of a head), under muP that at the base width.

    Products of unit vectors don't grow with the width. A scale that falls with it would let `norm_eps` damp the output.
    """
    return width**-0.5 * width_multiplier(model) ** 0.5


def in_chunks(a, size: int, mode: str = "constant"):
    """[B, T, ...] -> [n, B, size, ...], padded at the end (numpy.pad's `mode`), for a scan over chunks of tokens."""
    pad = [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2)
    return jnp.moveaxis(jnp.pad(a, pad, mode=mode).reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def from_chunks(a, length: int):
    """The inverse of `in_chunks`: [n, B, size, ...] -> [B, length, ...]."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :length]


def head_state(batch: int, heads: int, key_width: int, value_width: int):
    """Zero state [B, H, K, V]."""
    return jnp.zeros((batch, heads, key_width, value_width), jnp.float32)


def check_heads(cfg, path: str, **widths: int) -> None:
    """n_heads must divide every width, which must be at least 1. Raises ConfigError."""
    for name, width in widths.items():
        if width < 1 or width % cfg.n_heads:
            raise ConfigError(
                f"{path}.n_heads = {cfg.n_heads}: must divide {name} = {width}; allowed: {divisors(width)}"
            )
