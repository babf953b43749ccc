"""DeltaNet (2406.06484): S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = S_t^T q_t / sqrt(K).

q, k and v pass a short convolution with SiLU, then q and k are divided by their norm; beta = sigmoid(x W_b), times 2
with `allow_neg_eigval` (eigenvalues 1 - beta in (-1, 1) track states such as parity, 2411.12537). Norm per head, an
optional gate SiLU(x W_g), output matrix.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import (
    HeadNorm,
    OperatorConfig,
    Recurrent,
    ShortConv,
    check_heads,
    conv_flops,
    conv_state_bytes,
    head_state,
    split_heads,
    unit_scale,
)
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import delta_rule_flops


@dataclass(frozen=True)
class DeltaNetConfig(OperatorConfig):
    conv_size: int = setting(4, "taps of the short convolutions", low=1)
    allow_neg_eigval: bool = setting(False, "beta in (0, 2) instead of (0, 1)")
    output_gate: bool = setting(False, "multiply the normed output by SiLU(x W_g)")

    def options(self) -> dict:
        return super().options() | {"max_beta": 2.0 if self.allow_neg_eigval else 1.0}


@MIXERS.register("deltanet")
class DeltaNet(Recurrent):
    Config = DeltaNetConfig
    kernel = "delta rule, no decay"
    at_340M = {"n_heads": 8}
    variants = {"reflecting-gated": {"allow_neg_eigval": True, "output_gate": True, "n_heads": 2}}
    operator = staticmethod(api.delta_rule)
    operator_step = staticmethod(api.delta_rule_step)

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.scale = unit_scale(model, self.width)
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.beta = Linear(make, d, cfg.n_heads)
        self.conv = ShortConv(make, 3 * d, cfg.conv_size)
        self.gate = Linear(make, d, d) if cfg.output_gate else None
        self.norm = HeadNorm(make, self.width, model.norm_eps)
        self.o = Linear(make, d, d)

    def project(self, x):
        return jnp.concatenate([self.q(x), self.k(x), self.v(x)], -1)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in jnp.split(u, 3, -1))
        beta = jax.nn.sigmoid(wide(self.beta(x))) * (2 if self.cfg.allow_neg_eigval else 1)
        return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": None, "qk_l2norm": True, "scale": self.scale}

    def output(self, o, u, x):
        o = self.norm(o, x)
        return self.o(o if self.gate is None else o * jax.nn.silu(self.gate(x)))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.width, self.width)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        core = cfg.flops(delta_rule_flops, T=seq_len, H=cfg.n_heads, K=width, V=width)
        return dense(_matrices(cfg, model)) + conv_flops(3 * model.d_model, cfg.conv_size) + core

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + 3 * model.d_model * cfg.conv_size + model.d_model // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model**2 // cfg.n_heads + conv_state_bytes(3 * model.d_model, cfg.conv_size)


def _matrices(cfg, model) -> int:
    return model.d_model * ((5 if cfg.output_gate else 4) * model.d_model + cfg.n_heads)
