"""Gated retention, also called simple GLA (2405.05254): S_t = a_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K).

One gate per head and token, log a_t = logsigmoid(x W_a) / 16: GLA with equal decays of all channels. Norm per head,
gate SiLU(x W_g), output matrix.
"""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.schema import setting
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class SimpleGLAConfig(OperatorConfig):
    expand_k: float = setting(0.5, "key channels of all heads, as a multiple of d_model", low=0.0)
    expand_v: float = setting(1.0, "value channels of all heads, as a multiple of d_model", low=0.0)
    gate_normalizer: float = setting(16.0, "log decay = logsigmoid(.) / gate_normalizer", low=1e-3)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(key channels, value channels) of all heads."""
        return round(d_model * self.expand_k), round(d_model * self.expand_v)


@MIXERS.register("simple_gla")
class SimpleGLA(Recurrent):
    Config = SimpleGLAConfig
    kernel = "linear attention, decay per token"

    def __init__(self, cfg, model, make):
        d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
        self.cfg, self.widths = cfg, (d_k, d_v)
        self.q = Linear(make, d, d_k)
        self.k = Linear(make, d, d_k)
        self.v = Linear(make, d, d_v)
        self.decay = Linear(make, d, cfg.n_heads)
        self.gate = Linear(make, d, d_v)
        self.norm = HeadNorm(make, d_v // cfg.n_heads, model.norm_eps)
        self.o = Linear(make, d_v, d)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in u)
        log_decay = jax.nn.log_sigmoid(wide(self.decay(x))) / self.cfg.gate_normalizer
        return {"q": q, "k": k, "v": v, "log_decay": log_decay}

    def output(self, o, u, x):
        return self.o(self.norm(o, x) * jax.nn.silu(self.gate(x)))

    def memory(self, batch):
        heads = self.cfg.n_heads
        return head_state(batch, heads, *(width // heads for width in self.widths))

    @classmethod
    def check(cls, cfg, model, path):
        d_k, d_v = cfg.widths(model.d_model)
        check_heads(cfg, path, **{"expand_k x d_model": d_k, "expand_v x d_model": d_v})

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=d_k // cfg.n_heads, V=d_v // cfg.n_heads, decay="token")
        return dense(_matrices(cfg, model)) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + cfg.widths(model.d_model)[1] // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        return 4 * d_k * d_v // cfg.n_heads


def _matrices(cfg, model) -> int:
    d_k, d_v = cfg.widths(model.d_model)
    return model.d_model * (2 * d_k + 3 * d_v + cfg.n_heads)
