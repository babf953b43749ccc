"""DiagAttention of TransNormer (2210.10340): softmax attention inside blocks of tokens that don't overlap.

A query sees the keys of its own block up to itself, so the first token of a block sees only itself: not a sliding
window. For the earlier half of the layers; the later half are 'norm_attention'. Blocks are counted from the start of a
document. Rotary positions stand for the paper's own relative encoding.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, width_multiplier
from efficient_lm.mixers import cache
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.mixers.parts import check_heads, split_heads
from efficient_lm.positions import apply_rope, rope_table
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api
from pallas_kernels.flops import attention_flops

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class DiagAttentionConfig(MixerConfig):
    n_heads: int = setting(4, "heads", low=1)
    block: int = setting(64, "tokens per block", low=1)
    position: str = setting("rope", "position encoding", choices=("rope", "none"))
    implementation: str = setting(
        "auto", "operator implementation", choices=("auto", "reference", "xla", "cudnn"), volatile=True
    )


@MIXERS.register("diag_attention")
class DiagAttention(Mixer):
    Config = DiagAttentionConfig
    kernel = "softmax attention"
    at_340M = {"n_heads": 16}
    variants = {"short": {"block": 7, "position": "none"}}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width, self.dtype = cfg, d // cfg.n_heads, model.dtype
        # Under muP 1 / K, equal to 1 / sqrt(K) at the base width (2203.03466).
        self.scale = self.width**-0.5 / width_multiplier(model) ** 0.5
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.o = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._parallel(x, ctx)[0], {}

    def _parallel(self, x, ctx):
        """y [B, T, d], keys and values [B, T, H, D]."""
        q, k, v = self._project(x, ctx.positions)
        # A block is a segment, and a window of its length spares the work on other blocks.
        blocks = jnp.cumsum(ctx.positions % self.cfg.block == 0, axis=1)
        implementation = None if self.cfg.implementation == "auto" else self.cfg.implementation
        options = dict(window=self.cfg.block, segment_ids=blocks, scale=self.scale, implementation=implementation)
        return self.o(api.attention(q, k, v, **options).reshape(x.shape)), k, v

    def _project(self, x, positions):
        q, k, v = (split_heads(part(x), self.cfg.n_heads) for part in (self.q, self.k, self.v))
        if self.cfg.position == "rope":
            cos, sin = rope_table(positions, self.width, ROPE_BASE)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def init_state(self, batch, max_len):
        keys = jnp.zeros((batch, self.cfg.n_heads, min(self.cfg.block, max_len), self.width), self.dtype)
        return {"k": keys, "v": keys}

    def prefill(self, x, ctx, max_len):
        y, k, v = self._parallel(x, ctx)
        slots = min(self.cfg.block, max_len)
        return y, {"k": cache.fill_heads(k, slots, self.dtype), "v": cache.fill_heads(v, slots, self.dtype)}

    def step(self, x, state, ctx):
        position = ctx.positions % self.cfg.block
        q, k, v = (part[:, 0] for part in self._project(x[:, None], ctx.positions[:, None]))
        state = {
            "k": cache.write_heads(state["k"], k, position),
            "v": cache.write_heads(state["v"], v, position),
        }
        keys, values = (cache.read_heads(state[name], x.dtype) for name in "kv")
        y = api.attention_step(q, keys, values, cache.filled(keys.shape[1], position), scale=self.scale)
        return self.o(y.reshape(x.shape)), state

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)
        if cfg.position == "rope" and model.d_model // cfg.n_heads % 2:
            raise ConfigError(f"{path}.n_heads = {cfg.n_heads}: d_model / n_heads must be even for RoPE")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        block, width = min(cfg.block, seq_len), model.d_model // cfg.n_heads
        whole, rest = divmod(seq_len, block)
        visible = (whole * block * (block + 1) + rest * (rest + 1)) / 2 / seq_len
        executed = attention_flops(seq_len, cfg.n_heads, width, width, cfg.block, implementation="xla")
        return dense(4 * model.d_model**2) + Flops(4 * model.d_model * visible, 4 * model.d_model * block, executed)

    @staticmethod
    def param_count(cfg, model):
        return 4 * model.d_model**2

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 2 * min(cfg.block, seq_len) * model.d_model * jnp.dtype(model.dtype).itemsize
