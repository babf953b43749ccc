"""Linear attention (2006.16236): S_t = S_{t-1} + phi(k_t) v_t^T, o_t = S_t^T phi(q_t) / sqrt(K).

Normalised, o_t is divided by phi(q_t) . sum_s phi(k_s) / sqrt(K). phi is one of `feature_maps`. Then a norm and the
output matrix. There is no position information beside causality.
"""

from dataclasses import dataclass

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.feature_maps import FEATURE_MAPS
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import ConfigError, setting
from pallas_kernels.flops import linear_attention_flops


def feature_map_setting(default):
    return setting(default, "phi, see mixers/feature_maps.py", choices=tuple(FEATURE_MAPS))


def norm_setting(default):
    return setting(default, "RMS norm of the output, per head or over all heads", choices=("head", "wide", "none"))


@dataclass(frozen=True)
class LinearAttentionConfig(OperatorConfig):
    feature_map: str = feature_map_setting("elu1")
    normalise: bool = setting(True, "divide by the sum of the weights; needs phi >= 0")
    key_width: int = setting(0, "channels per head of queries and keys before phi; 0 = d_model / n_heads", low=0)
    norm: str = norm_setting("head")

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(channels of q and k, features, channels of v) of one head."""
        width = self.key_width or d_model // self.n_heads
        return width, FEATURE_MAPS[self.feature_map].width(width), d_model // self.n_heads


@MIXERS.register("linear_attention")
class LinearAttention(Recurrent):
    Config = LinearAttentionConfig
    kernel = "linear attention, no decay"
    at_340M = {"n_heads": 8}
    variants = {
        "relu": {"feature_map": "relu", "normalise": False},
        "hadamard-wide": {"feature_map": "hadamard", "normalise": False, "norm": "wide"},
    }

    def __init__(self, cfg, model, make):
        d, heads, (width, _, value_width) = model.d_model, cfg.n_heads, cfg.sizes(model.d_model)
        self.cfg, self.sizes = cfg, cfg.sizes(d)
        self.q = Linear(make, d, heads * width)
        self.k = Linear(make, d, heads * width)
        self.v = Linear(make, d, d)
        role = "fixed" if cfg.key_width else "hidden"
        self.phi_q = FEATURE_MAPS[cfg.feature_map](make, heads, width, role)
        self.phi_k = FEATURE_MAPS[cfg.feature_map](make, heads, width, role)
        self.head_norm = HeadNorm(make, value_width, model.norm_eps) if cfg.norm == "head" else None
        self.wide_norm = RMSNorm(make, d, model.norm_eps) if cfg.norm == "wide" else None
        self.o = Linear(make, d, d)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in u)
        features = {"q": self.phi_q(q), "k": self.phi_k(k)}
        return features | {"v": v, "log_decay": None, "normalise": self.cfg.normalise}

    def output(self, o, u, x):
        if self.head_norm is not None:
            return self.o(self.head_norm(o, x))
        o = o.reshape(x.shape)
        return self.o(o if self.wide_norm is None else self.wide_norm(o))

    def memory(self, batch):
        _, features, width = self.sizes
        return head_state(batch, self.cfg.n_heads, features, width + self.cfg.normalise)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)
        if cfg.normalise and FEATURE_MAPS[cfg.feature_map].signed:
            raise ConfigError(
                f"{path}.normalise = True: weights of feature_map {cfg.feature_map!r} may sum to 0; use False"
            )

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        _, features, width = cfg.sizes(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=features, V=width + cfg.normalise)
        return dense(_matrices(cfg, model)) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        width, _, value_width = cfg.sizes(model.d_model)
        norm = {"head": value_width, "wide": model.d_model, "none": 0}[cfg.norm]
        return _matrices(cfg, model) + 2 * FEATURE_MAPS[cfg.feature_map].vectors(cfg.n_heads, width) + norm

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        _, features, width = cfg.sizes(model.d_model)
        return 4 * cfg.n_heads * features * (width + cfg.normalise)


def _matrices(cfg, model) -> int:
    width, _, _ = cfg.sizes(model.d_model)
    maps = 2 * FEATURE_MAPS[cfg.feature_map].weights(cfg.n_heads, width)
    return 2 * model.d_model * (cfg.n_heads * width + model.d_model) + maps
