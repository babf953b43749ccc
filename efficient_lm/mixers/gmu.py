"""Gated memory unit (GMU) of SambaY (2507.06607): y = W_o (SiLU(x W_z) * m), m the memory that an earlier layer gives.

The memory is what a Mamba layer with `give_memory` reads from its states, before its own gate: a GMU mixes no tokens
and keeps nothing in decoding. With `norm`, meant for memories of linear attention, W_o RMSNorm(m * SiLU(x W_z)).
"""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import setting


@dataclass(frozen=True)
class GMUConfig(MixerConfig):
    expand: float = setting(2.0, "channels of the memory, as a multiple of d_model", low=0.1)
    norm: bool = setting(False, "RMSNorm of the gated memory")

    def width(self, d_model: int) -> int:
        """Channels of the memory."""
        return round(self.expand * d_model)


@MIXERS.register("gmu")
class GMU(Mixer):
    Config = GMUConfig
    kernel = "none"
    variants = {"norm": {"norm": True}}

    def __init__(self, cfg, model, make):
        d, width = model.d_model, cfg.width(model.d_model)
        self.z = Linear(make, d, width)
        self.norm = RMSNorm(make, width, model.norm_eps) if cfg.norm else None
        self.o = Linear(make, width, d)

    def __call__(self, x, ctx):
        y = ctx.carry["memory"] * jax.nn.silu(self.z(x))
        return self.o(y if self.norm is None else self.norm(y)), {}

    def init_state(self, batch, max_len):
        return {}

    def prefill(self, x, ctx, max_len):
        return self(x, ctx)[0], {}

    def step(self, x, state, ctx):
        return self(x, ctx)[0], state

    @staticmethod
    def takes(cfg, model):
        return {"memory": (cfg.width(model.d_model),)}

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        return dense(2 * model.d_model * cfg.width(model.d_model))

    @staticmethod
    def param_count(cfg, model):
        return (2 * model.d_model + cfg.norm) * cfg.width(model.d_model)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 0
