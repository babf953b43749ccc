"""Mamba-2, state space duality (2405.21060): S_t = a_t S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t, per head.

dt = softplus(x W_dt + b), a = exp(-exp(A) dt); B and C are shared by all heads (one group). x, B and C pass a short
convolution with bias and SiLU. The gate comes before the norm: RMSNorm(y * SiLU(x W_z)) over all heads together, then
the output matrix. As linear attention: C is the query (unscaled), B the key, dt x the value. The paper uses no FFN
('mamba2/none' in a pattern) and twice the layers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import (
    ExpGate,
    OperatorConfig,
    Recurrent,
    ShortConv,
    check_heads,
    conv_flops,
    conv_state_bytes,
    head_state,
    split_heads,
)
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import setting
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class Mamba2Config(OperatorConfig):
    expand: float = setting(2.0, "inner channels of all heads, as a multiple of d_model", low=0.0)
    d_state: int = setting(64, "channels of B and C", low=1)
    conv_size: int = setting(4, "taps of the short convolution", low=1)

    def width(self, d_model: int) -> int:
        """Inner channels of all heads."""
        return round(self.expand * d_model)


@MIXERS.register("mamba2")
class Mamba2(Recurrent):
    Config = Mamba2Config
    kernel = "linear attention, decay per token"
    at_340M = {"n_heads": 32, "d_state": 128}

    def __init__(self, cfg, model, make):
        d, width = model.d_model, cfg.width(model.d_model)
        self.cfg, self.width = cfg, width
        self.z = Linear(make, d, width)
        self.x = Linear(make, d, width)
        self.b = Linear(make, d, cfg.d_state)
        self.c = Linear(make, d, cfg.d_state)
        self.dt = Linear(make, d, cfg.n_heads)
        self.decay_gate = ExpGate(make, cfg.n_heads)
        self.conv = ShortConv(make, width + 2 * cfg.d_state, cfg.conv_size, bias=True)
        self.skip = make.vector(jnp.ones(cfg.n_heads))
        self.norm = RMSNorm(make, width, model.norm_eps)
        self.o = Linear(make, width, d)

    def project(self, x):
        return jnp.concatenate([self.x(x), self.b(x), self.c(x)], -1)

    def inputs(self, u, x):
        values, b, c = jnp.split(u, (self.width, self.width + self.cfg.d_state), -1)
        z = self.dt(x)
        v = self.decay_gate.dt(z)[..., None] * split_heads(values, self.cfg.n_heads)
        q, k = c[..., None, :], b[..., None, :]
        return {"q": q, "k": k, "v": v.astype(x.dtype), "log_decay": self.decay_gate(z), "scale": 1.0}

    def output(self, o, u, x):
        values = split_heads(u[..., : self.width], self.cfg.n_heads)
        y = o + self.skip[...][:, None].astype(o.dtype) * values
        y = y.reshape(*x.shape[:-1], -1)
        return self.o(self.norm(y * jax.nn.silu(self.z(x))))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.cfg.d_state, self.width // self.cfg.n_heads)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, **{"expand x d_model": cfg.width(model.d_model)})

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = cfg.width(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=cfg.d_state, V=width // cfg.n_heads, decay="token", groups=1)
        core = cfg.flops(linear_attention_flops, **sizes)
        return dense(_matrices(cfg, model)) + conv_flops(width + 2 * cfg.d_state, cfg.conv_size) + core

    @staticmethod
    def param_count(cfg, model):
        width = cfg.width(model.d_model)
        conv = (width + 2 * cfg.d_state) * (cfg.conv_size + 1)
        return _matrices(cfg, model) + conv + 3 * cfg.n_heads + width

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        width = cfg.width(model.d_model)
        return 4 * width * cfg.d_state + conv_state_bytes(width + 2 * cfg.d_state, cfg.conv_size)


def _matrices(cfg, model) -> int:
    return model.d_model * (3 * cfg.width(model.d_model) + 2 * cfg.d_state + cfg.n_heads)
