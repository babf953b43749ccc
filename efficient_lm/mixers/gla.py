"""Gated linear attention (GLA, 2312.06635): S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K)."""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.schema import setting
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class GLAConfig(OperatorConfig):
    expand_k: float = setting(0.5, "key channels of all heads, as a multiple of d_model", low=0.0)
    expand_v: float = setting(1.0, "value channels of all heads, as a multiple of d_model", low=0.0)
    gate_rank: int = setting(16, "rank of the map from x to the log decay", low=1)
    gate_normalizer: float = setting(16.0, "log decay = logsigmoid(.) / gate_normalizer", low=1e-3)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(key channels, value channels) of all heads."""
        return round(d_model * self.expand_k), round(d_model * self.expand_v)


@MIXERS.register("gla")
class GLA(Recurrent):
    Config = GLAConfig
    kernel = "linear attention, decay per channel"
    variants = {"strong-decay": {"n_heads": 2, "gate_normalizer": 0.1}}

    def __init__(self, cfg, model, make):
        d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
        self.cfg, self.widths = cfg, (d_k, d_v)
        self.q = Linear(make, d, d_k)
        self.k = Linear(make, d, d_k)
        self.v = Linear(make, d, d_v)
        self.gate = Linear(make, d, d_v)
        self.decay_down = Linear(make, d, cfg.gate_rank)
        self.decay_up = Linear(make, cfg.gate_rank, d_k, role="fixed", bias=True)
        self.norm = HeadNorm(make, d_v // cfg.n_heads, model.norm_eps)
        self.o = Linear(make, d_v, d)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def inputs(self, u, x):
        log_decay = jax.nn.log_sigmoid(wide(self.decay_up(self.decay_down(x)))) / self.cfg.gate_normalizer
        q, k, v, log_decay = (split_heads(part, self.cfg.n_heads) for part in (*u, log_decay))
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
        sizes = dict(T=seq_len, H=cfg.n_heads, K=d_k // cfg.n_heads, V=d_v // cfg.n_heads, decay="channel")
        return dense(_matrices(cfg, model)) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        d_k, d_v = cfg.widths(model.d_model)
        return _matrices(cfg, model) + d_k + d_v // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        return 4 * d_k * d_v // cfg.n_heads


def _matrices(cfg, model) -> int:
    d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
    return d * (2 * d_k + 3 * d_v) + cfg.gate_rank * (d + d_k)
