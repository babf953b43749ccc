"""Gated DeltaNet (2412.06464): S' = a_t S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = S_t^T q_t / sqrt(K).

log a = -exp(A) softplus(x W_a + b) per head and token. q, k, v pass a short convolution with SiLU; q and k have unit
norm; beta = sigmoid(x W_b), times 2 with `allow_neg_eigval` (2411.12537). With n_householder = n > 1 every token takes
n delta steps, each with keys, values and beta of its own, after one decay (Gated DeltaProduct, 2502.10297).
Norm per head, gate SiLU(x W_g), output matrix.
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
class GatedDeltaNetConfig(OperatorConfig):
    expand_k: float = setting(0.75, "key channels of all heads, as a multiple of d_model", low=0.0)
    expand_v: float = setting(1.5, "value channels of all heads, as a multiple of d_model", low=0.0)
    conv_size: int = setting(4, "taps of the short convolutions", low=1)
    allow_neg_eigval: bool = setting(False, "beta in (0, 2) instead of (0, 1)")
    n_householder: int = setting(1, "delta steps per token", low=1)

    def options(self) -> dict:
        return super().options() | {"max_beta": 2.0 if self.allow_neg_eigval else 1.0}

    def widths(self, d_model: int) -> tuple[int, int]:
        """(key channels, value channels) of all heads."""
        return round(d_model * self.expand_k), round(d_model * self.expand_v)

    def channels(self, d_model: int) -> tuple[int, int, int]:
        """Widths of q, k and v; k and v of every delta step."""
        d_k, d_v = self.widths(d_model)
        return d_k, self.n_householder * d_k, self.n_householder * d_v


@MIXERS.register("gated_deltanet")
class GatedDeltaNet(Recurrent):
    Config = GatedDeltaNetConfig
    kernel = "delta rule, decay per token"
    at_340M = {"n_heads": 3}
    variants = {"product": {"n_householder": 2, "allow_neg_eigval": True, "expand_k": 0.5, "expand_v": 1.0}}
    operator = staticmethod(api.delta_rule)
    operator_step = staticmethod(api.delta_rule_step)

    def __init__(self, cfg, model, make):
        d, channels, (d_k, d_v) = model.d_model, cfg.channels(model.d_model), cfg.widths(model.d_model)
        self.cfg, self.channels, self.widths = cfg, channels, (d_k // cfg.n_heads, d_v // cfg.n_heads)
        self.scale = unit_scale(model, self.widths[0])
        self.q = Linear(make, d, channels[0])
        self.k = Linear(make, d, channels[1])
        self.v = Linear(make, d, channels[2])
        self.beta = Linear(make, d, cfg.n_householder * cfg.n_heads)
        self.decay = Linear(make, d, cfg.n_heads)
        self.decay_gate = ExpGate(make, cfg.n_heads)
        self.conv = ShortConv(make, sum(channels), cfg.conv_size)
        self.gate = Linear(make, d, d_v)
        self.norm = HeadNorm(make, self.widths[1], model.norm_eps)
        self.o = Linear(make, d_v, d)

    def project(self, x):
        return jnp.concatenate([self.q(x), self.k(x), self.v(x)], -1)

    def inputs(self, u, x):
        c_q, c_k, _ = self.channels
        q, k, v = jnp.split(u, (c_q, c_q + c_k), -1)
        beta = jax.nn.sigmoid(wide(self.beta(x))) * (2 if self.cfg.allow_neg_eigval else 1)
        k, v, beta = self._steps(k, self.widths[0]), self._steps(v, self.widths[1]), self._steps(beta, 1)[..., 0]
        log_decay = self.decay_gate(self.decay(x))
        q = split_heads(q, self.cfg.n_heads)
        return {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "qk_l2norm": True, "scale": self.scale}

    def _steps(self, y, width):
        """[B, T, n H D] -> [B, n T, H, D] as the operator wants it; one token [B, n H D] -> [B, n, H, D]."""
        n, heads = self.cfg.n_householder, self.cfg.n_heads
        if n == 1:
            return y.reshape(*y.shape[:-1], heads, width)
        return y.reshape(y.shape[0], -1, heads, width)

    def output(self, o, u, x):
        return self.o(self.norm(o, x) * jax.nn.silu(self.gate(x)))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, *self.widths)

    @classmethod
    def check(cls, cfg, model, path):
        d_k, d_v = cfg.widths(model.d_model)
        check_heads(cfg, path, **{"expand_k x d_model": d_k, "expand_v x d_model": d_v})

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=d_k // cfg.n_heads, V=d_v // cfg.n_heads, decay="token")
        core = cfg.flops(delta_rule_flops, **sizes, steps_per_token=cfg.n_householder)
        return dense(_matrices(cfg, model)) + conv_flops(sum(cfg.channels(model.d_model)), cfg.conv_size) + core

    @staticmethod
    def param_count(cfg, model):
        conv = sum(cfg.channels(model.d_model)) * cfg.conv_size
        return _matrices(cfg, model) + conv + 2 * cfg.n_heads + cfg.widths(model.d_model)[1] // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        return 4 * d_k * d_v // cfg.n_heads + conv_state_bytes(sum(cfg.channels(model.d_model)), cfg.conv_size)


def _matrices(cfg, model) -> int:
    d_v = cfg.widths(model.d_model)[1]
    gates = (cfg.n_householder + 1) * cfg.n_heads
    return model.d_model * (sum(cfg.channels(model.d_model)) + 2 * d_v + gates)
