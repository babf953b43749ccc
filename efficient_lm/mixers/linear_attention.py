"""Linear attention (2006.16236): S_t = S_{t-1} + phi(k_t) v_t^T, o_t = S_t^T phi(q_t) / sqrt(K).

Normalised, o_t is divided by phi(q_t) . sum_s phi(k_s) / sqrt(K). Then a norm per head and the output matrix. There is
no position information beside causality.
"""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.schema import ConfigError, setting
from pallas_kernels.flops import linear_attention_flops

FEATURE_MAPS = {"elu1": lambda x: 1 + jax.nn.elu(x), "relu": jax.nn.relu, "identity": lambda x: x}


@dataclass(frozen=True)
class LinearAttentionConfig(OperatorConfig):
    feature_map: str = setting("elu1", "phi; elu1 = 1 + ELU", choices=tuple(FEATURE_MAPS))
    normalise: bool = setting(True, "divide by the sum of the weights; needs phi >= 0")


@MIXERS.register("linear_attention")
class LinearAttention(Recurrent):
    Config = LinearAttentionConfig
    kernel = "linear attention, no decay"
    at_340M = {"n_heads": 8}
    variants = {"relu": {"feature_map": "relu", "normalise": False}}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.norm = HeadNorm(make, self.width, model.norm_eps)
        self.o = Linear(make, d, d)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in u)
        phi = FEATURE_MAPS[self.cfg.feature_map]
        return {"q": phi(q), "k": phi(k), "v": v, "log_decay": None, "normalise": self.cfg.normalise}

    def output(self, o, u, x):
        return self.o(self.norm(o, x))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.width, self.width + self.cfg.normalise)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)
        if cfg.normalise and cfg.feature_map == "identity":
            raise ConfigError(f"{path}.normalise = True: weights of feature_map 'identity' may sum to 0; use False")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        sizes = dict(T=seq_len, H=cfg.n_heads, K=width, V=width + cfg.normalise)
        return dense(4 * model.d_model**2) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return 4 * model.d_model**2 + model.d_model // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        return 4 * model.d_model * (width + cfg.normalise)
