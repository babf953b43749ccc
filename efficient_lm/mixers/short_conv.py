"""Gated short convolution (BaseConv of 2402.18668, without its bias): y = W_o (SiLU(x W_g) * conv(x W_x)).

Mixes the last few tokens only, and so shifts and compares neighbours; Based and the recall studies of 2312.04927 give
it to every other layer. The convolution is causal and depthwise, with bias and without activation.
"""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.mixers.parts import ShortConv, conv_flops, conv_state_bytes
from efficient_lm.schema import setting


@dataclass(frozen=True)
class GatedConvConfig(MixerConfig):
    conv_size: int = setting(4, "taps of the convolution", low=1)


@MIXERS.register("short_conv")
class GatedConv(Mixer):
    Config = GatedConvConfig
    kernel = "short convolution"

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.x = Linear(make, d, d)
        self.gate = Linear(make, d, d)
        self.conv = ShortConv(make, d, cfg.conv_size, bias=True, activation=None)
        self.o = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._output(self.conv(self.x(x), ctx.segment_ids), x), {}

    def _output(self, u, x):
        return self.o(u * jax.nn.silu(self.gate(x)))

    def init_state(self, batch, max_len):
        return self.conv.init_state(batch)

    def step(self, x, state, ctx):
        u, state = self.conv.step(self.x(x), state)
        return self._output(u, x), state

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        return dense(3 * model.d_model**2) + conv_flops(model.d_model, cfg.conv_size)

    @staticmethod
    def param_count(cfg, model):
        return 3 * model.d_model**2 + model.d_model * (cfg.conv_size + 1)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return conv_state_bytes(model.d_model, cfg.conv_size)
