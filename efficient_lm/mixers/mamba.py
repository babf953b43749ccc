"""Mamba, the selective state space S6 (2312.00752), with N states for each inner channel c:

h_cn <- exp(dt_c A_cn) h_cn + dt_c B_n u_c, y_c = sum_n C_n h_cn + D_c u_c. u = short convolution of x W_x with bias and
SiLU; [delta, B, C] = u W; dt = softplus(delta W_dt + b) per channel; A = -exp(A_log), at the start -(1 .. N) in every
channel. Output W_o (y * SiLU(x W_z)), no norm inside. The paper uses no FFN ('mamba/none' in a pattern) and twice the
layers. With `give_memory` later layers can read y before its gate (`gmu`). Training holds the states of all tokens,
d_state times the activations: remat or Mamba-2 for long sequences.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import BackendConfig, ShortConv, conv_flops, conv_state_bytes, dt_bias
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import diagonal_scan_flops


@dataclass(frozen=True)
class MambaConfig(BackendConfig):
    expand: float = setting(2.0, "inner channels, as a multiple of d_model", low=0.1)
    d_state: int = setting(16, "states per inner channel", low=1)
    dt_rank: int = setting(0, "rank of the map to dt; 0 = d_model / 16, rounded up", low=0)
    conv_size: int = setting(4, "taps of the short convolution", low=1)
    give_memory: bool = setting(False, "give y before the gate to later layers, as SambaY does for its GMUs")

    def sizes(self, d_model: int) -> tuple[int, int]:
        """(inner channels, rank of dt)."""
        return round(self.expand * d_model), self.dt_rank or -(-d_model // 16)


@MIXERS.register("mamba")
class Mamba(Mixer):
    Config = MambaConfig
    kernel = "diagonal scan"
    giving = {"memory": {"give_memory": True}}

    def __init__(self, cfg, model, make):
        d, (width, rank) = model.d_model, cfg.sizes(model.d_model)
        self.cfg, self.sizes = cfg, (width, rank)
        self.x = Linear(make, d, width)
        self.z = Linear(make, d, width)
        self.conv = ShortConv(make, width, cfg.conv_size, bias=True)
        self.delta = Linear(make, width, rank)
        self.b = Linear(make, width, cfg.d_state)
        self.c = Linear(make, width, cfg.d_state)
        self.dt = Linear(make, rank, width, role="fixed" if cfg.dt_rank else "hidden")
        self.dt_bias = make.vector(dt_bias(make.next_key(), (width,)))
        states = jnp.arange(1, cfg.d_state + 1, dtype=jnp.float32)
        self.a_log = make.vector(jnp.broadcast_to(jnp.log(states), (width, cfg.d_state)))
        self.skip = make.vector(jnp.ones(width))
        self.o = Linear(make, width, d)

    def __call__(self, x, ctx):
        u = self.conv(self.x(x), ctx.segment_ids)
        inputs, log_decay = self._inputs(u)
        h, _ = api.diagonal_scan(inputs, log_decay, segment_ids=ctx.segment_ids, implementation=self.cfg.backend)
        return self._output(h, u, x, ctx), {}

    def _inputs(self, u):
        """dt B u and dt A, both [..., channels x states] in float32."""
        dt = jax.nn.softplus(wide(self.dt(self.delta(u))) + self.dt_bias[...])
        inputs = (dt * wide(u))[..., None] * wide(self.b(u))[..., None, :]
        log_decay = -jnp.exp(self.a_log[...]) * dt[..., None]
        return (y.reshape(*u.shape[:-1], -1) for y in (inputs, log_decay))

    def _output(self, h, u, x, ctx):
        h = h.reshape(*u.shape, self.cfg.d_state)
        y = jnp.sum(h * wide(self.c(u))[..., None, :], -1) + self.skip[...] * wide(u)
        y = y.astype(x.dtype)
        if self.cfg.give_memory:
            ctx.carry["memory"] = y
        return self.o(y * jax.nn.silu(self.z(x)))

    def init_state(self, batch, max_len):
        memory = jnp.zeros((batch, self.sizes[0] * self.cfg.d_state), jnp.float32)
        return {"memory": memory, "conv": self.conv.init_state(batch)}

    def prefill(self, x, ctx, max_len):
        u, conv = self.conv.prefill(self.x(x))
        h, memory = api.diagonal_scan(*self._inputs(u), output_final_state=True, implementation=self.cfg.backend)
        return self._output(h, u, x, ctx), {"memory": memory, "conv": conv}

    def step(self, x, state, ctx):
        u, conv = self.conv.step(self.x(x), state["conv"])
        h, memory = api.diagonal_scan_step(*self._inputs(u), state["memory"])
        return self._output(h, u, x, ctx), {"memory": memory, "conv": conv}

    @staticmethod
    def gives(cfg, model):
        return {"memory": (cfg.sizes(model.d_model)[0],)} if cfg.give_memory else {}

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width, _ = cfg.sizes(model.d_model)
        # Input, recurrence and readout of every state: one multiply-add each.
        scan = 3 * diagonal_scan_flops(width * cfg.d_state)
        return dense(_matrices(cfg, model)) + conv_flops(width, cfg.conv_size) + Flops(scan, scan, 0.0)

    @staticmethod
    def param_count(cfg, model):
        width, _ = cfg.sizes(model.d_model)
        # Convolution with bias, bias of dt, A, D.
        return _matrices(cfg, model) + width * (cfg.conv_size + 1 + 1 + cfg.d_state + 1)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        width, _ = cfg.sizes(model.d_model)
        return 4 * width * cfg.d_state + conv_state_bytes(width, cfg.conv_size)


def _matrices(cfg, model) -> int:
    width, rank = cfg.sizes(model.d_model)
    return width * (3 * model.d_model + 2 * rank + 2 * cfg.d_state)
