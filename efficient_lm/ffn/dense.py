"""Dense FFN: W_o act(W_u x), or with a gate (GLU, 2002.05202) W_o (act(W_g x) * W_u x)."""

from dataclasses import dataclass

from efficient_lm.ffn.activations import ACTIVATIONS
from efficient_lm.ffn.base import FFN, FFNS, FFNConfig
from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.schema import setting


@dataclass(frozen=True)
class DenseConfig(FFNConfig):
    activation: str = setting("silu", "registered activation: relu, relu2, gelu, silu, polyrelu, polynorm, ...")
    glu: bool = setting(True, "gated: act(gate) * up")
    d_ff: int = setting(0, "hidden width; 0 = from expansion", low=0)
    expansion: float = setting(
        0.0, "hidden width / d_model; 0 = 8/3 with a gate, 4 without (equal parameters)", low=0.0
    )
    multiple_of: int = setting(8, "round the hidden width from expansion to a multiple of this", low=1)

    def width(self, d_model: int) -> int:
        """Hidden width."""
        wanted = d_model * (self.expansion or (8 / 3 if self.glu else 4))
        return self.d_ff or max(1, round(wanted / self.multiple_of)) * self.multiple_of


@FFNS.register("dense")
class Dense(FFN):
    Config = DenseConfig

    def __init__(self, cfg, model, make):
        d, width = model.d_model, cfg.width(model.d_model)
        self.up = Linear(make, d, width)
        self.gate = Linear(make, d, width) if cfg.glu else None
        self.down = Linear(make, width, d)
        self.act = ACTIVATIONS[cfg.activation](make)

    def __call__(self, x, ctx):
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(hidden), {}

    @classmethod
    def check(cls, cfg, model, path):
        ACTIVATIONS.find(cfg.activation, f"{path}.activation")

    @staticmethod
    def flops_per_token(cfg, model):
        return dense(_matrices(cfg, model))

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + ACTIVATIONS[cfg.activation].params


def _matrices(cfg, model) -> int:
    return model.d_model * cfg.width(model.d_model) * (3 if cfg.glu else 2)
