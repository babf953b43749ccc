"""Retention (RetNet, 2307.08621): S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), gamma_h = 1 - 2^(-5-h).

Queries and keys are rotated by angles t 10000^(-j / (K/2 - 1)), j = 0 .. K/2 - 1: the grid ends at 1/10000, unlike
RoPE's. With decay 'gated' (gated retention of YOCO, 2405.05254) log gamma = logsigmoid(x W) / 16, per head and token.
Norm per head without weights, gate SiLU(x W_g), output matrix. Values have twice the width of keys, so that the mixer
has 8 d^2 parameters; the paper pairs it with an FFN of 4 d^2 instead of 8.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, check_heads, head_state, split_heads
from efficient_lm.positions import apply_rope
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api
from pallas_kernels.flops import linear_attention_flops

GATE_NORMALIZER = 16.0  # of gated retention


@dataclass(frozen=True)
class RetNetConfig(OperatorConfig):
    expand_v: float = setting(2.0, "value channels of all heads, as a multiple of d_model", low=0.0)
    decay: str = setting("fixed", "gamma_h, or from the token", choices=("fixed", "gated"))
    rotation: bool = setting(True, "rotate queries and keys by their position")

    def widths(self, d_model: int) -> tuple[int, int]:
        """(key channels, value channels) of all heads."""
        return d_model, round(d_model * self.expand_v)


@MIXERS.register("retnet")
class RetNet(Mixer):
    Config = RetNetConfig
    kernel = "linear attention, fixed decay"
    variants = {"plain": {"rotation": False, "n_heads": 2}, "gated": {"decay": "gated", "expand_v": 1.0}}

    def __init__(self, cfg, model, make):
        d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
        self.cfg = cfg

        def linear(d_in, d_out, gain):  # Xavier with the paper's gains
            return Linear(make, d_in, d_out, scale=gain * (2 * d_in / (d_in + d_out)) ** 0.5)

        self.q = linear(d, d_k, 2**-2.5)
        self.k = linear(d, d_k, 2**-2.5)
        self.v = linear(d, d_v, 2**-2.5)
        self.gate = linear(d, d_v, 2**-2.5)
        self.o = linear(d_v, d, 2**-1)
        self.decay = Linear(make, d, cfg.n_heads) if cfg.decay == "gated" else None
        self.norm = HeadNorm(make, d_v // cfg.n_heads, model.norm_eps, affine=False)
        self.sizes = cfg.n_heads, d_k // cfg.n_heads, d_v // cfg.n_heads

    def __call__(self, x, ctx):
        q, k, v = self._project(x, ctx.positions)
        o, _ = api.linear_attention(q, k, v, self._decay(x), segment_ids=ctx.segment_ids, **self.cfg.options())
        return self._output(o, x), {}

    def _decay(self, x):
        """[H] or [..., H]."""
        if self.decay is not None:
            return jax.nn.log_sigmoid(wide(self.decay(x))) / GATE_NORMALIZER
        return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.cfg.n_heads)))), jnp.float32)

    def _project(self, x, positions):
        q, k, v = (split_heads(part(x), self.cfg.n_heads) for part in (self.q, self.k, self.v))
        if self.cfg.rotation:
            frequencies = 10000.0 ** -jnp.linspace(0, 1, self.sizes[1] // 2, dtype=jnp.float32)
            angles = positions[..., None].astype(jnp.float32) * frequencies
            cos, sin = jnp.cos(angles), jnp.sin(angles)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def _output(self, o, x):
        return self.o(self.norm(o, x) * jax.nn.silu(self.gate(x)))

    def init_state(self, batch, max_len):
        return {"memory": head_state(batch, *self.sizes)}

    def prefill(self, x, ctx, max_len):
        inputs = *self._project(x, ctx.positions), self._decay(x)
        o, memory = api.linear_attention(*inputs, output_final_state=True, **self.cfg.options())
        return self._output(o, x), {"memory": memory}

    def step(self, x, state, ctx):
        q, k, v = self._project(x, ctx.positions)
        o, memory = api.linear_attention_step(q, k, v, self._decay(x), state["memory"])
        return self._output(o, x), {"memory": memory}

    @classmethod
    def check(cls, cfg, model, path):
        d_k, d_v = cfg.widths(model.d_model)
        check_heads(cfg, path, d_model=d_k, **{"expand_v x d_model": d_v})
        if cfg.rotation and (d_k // cfg.n_heads) % 2:
            raise ConfigError(f"{path}.n_heads = {cfg.n_heads}: d_model / n_heads must be even to rotate")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=d_k // cfg.n_heads, V=d_v // cfg.n_heads)
        sizes["decay"] = "token" if cfg.decay == "gated" else "head"
        return dense(_matrices(cfg, model)) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        return 4 * d_k * d_v // cfg.n_heads


def _matrices(cfg, model) -> int:
    d_k, d_v = cfg.widths(model.d_model)
    return model.d_model * (2 * d_k + 3 * d_v + (cfg.n_heads if cfg.decay == "gated" else 0))
