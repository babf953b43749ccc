"""Kimi Delta Attention (2510.26692): Gated DeltaNet with a decay per key channel.

S' = diag(a_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = S_t^T q_t / sqrt(K), log a = -exp(A_h)
softplus(x W_1 W_2 + b) with a bias per channel. q, k, v pass a short convolution with SiLU; q and k have unit norm;
beta = sigmoid(x W_b), times 2 with `allow_neg_eigval`. Norm per head, then the gate sigmoid(x W_3 W_4 + b), which is
low-rank and no SiLU, then the output matrix. The paper's ranks are the width of a head.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import (
    ExpGate,
    HeadNorm,
    LowRank,
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
class KDAConfig(OperatorConfig):
    gate_rank: int = setting(0, "rank of the maps to decay and output gate; 0 = d_model / n_heads", low=0)
    conv_size: int = setting(4, "taps of the short convolutions", low=1)
    allow_neg_eigval: bool = setting(False, "beta in (0, 2) instead of (0, 1)")

    def rank(self, d_model: int) -> int:
        return self.gate_rank or d_model // self.n_heads


@MIXERS.register("kda")
class KDA(Recurrent):
    Config = KDAConfig
    kernel = "delta rule, decay per channel"
    at_340M = {"n_heads": 8}
    operator = staticmethod(api.delta_rule)
    operator_step = staticmethod(api.delta_rule_step)

    def __init__(self, cfg, model, make):
        d, rank = model.d_model, cfg.rank(model.d_model)
        self.cfg, self.width = cfg, d // cfg.n_heads
        role = "fixed" if cfg.gate_rank else "hidden"  # a rank that follows the head grows with the width
        self.scale = unit_scale(model, self.width)
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.beta = Linear(make, d, cfg.n_heads)
        self.decay = LowRank(make, d, rank, d, role=role)
        self.decay_gate = ExpGate(make, cfg.n_heads, self.width)
        self.conv = ShortConv(make, 3 * d, cfg.conv_size)
        self.gate = LowRank(make, d, rank, d, bias=True, role=role)
        self.norm = HeadNorm(make, self.width, model.norm_eps)
        self.o = Linear(make, d, d)

    def project(self, x):
        return jnp.concatenate([self.q(x), self.k(x), self.v(x)], -1)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in jnp.split(u, 3, -1))
        beta = jax.nn.sigmoid(wide(self.beta(x))) * (2 if self.cfg.allow_neg_eigval else 1)
        log_decay = self.decay_gate(split_heads(self.decay(x), self.cfg.n_heads))
        return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "qk_l2norm": True, "scale": self.scale}

    def output(self, o, u, x):
        return self.o(self.norm(o, x) * jax.nn.sigmoid(self.gate(x)))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.width, self.width)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        core = cfg.flops(delta_rule_flops, T=seq_len, H=cfg.n_heads, K=width, V=width, decay="channel")
        return dense(_matrices(cfg, model)) + conv_flops(3 * model.d_model, cfg.conv_size) + core

    @staticmethod
    def param_count(cfg, model):
        d = model.d_model
        vectors = cfg.n_heads + d + d + d // cfg.n_heads  # decay rate and bias, bias of the gate, norm
        return _matrices(cfg, model) + 3 * d * cfg.conv_size + vectors

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model**2 // cfg.n_heads + conv_state_bytes(3 * model.d_model, cfg.conv_size)


def _matrices(cfg, model) -> int:
    d = model.d_model
    return d * (4 * d + cfg.n_heads) + 4 * d * cfg.rank(d)
