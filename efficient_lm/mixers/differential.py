"""Differential attention (2410.05258): o = (softmax(Q_1 K_1^T) - lambda softmax(Q_2 K_2^T)) V per head.

Heads have queries and keys of two maps and values of twice their width: half as many heads as attention for the same
parameters. lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_0, one for all heads of a layer, lambda_0 = 0.8 - 0.6
exp(-0.3 l) in 0-based layer l. RMSNorm per head, times 1 - lambda_0, output matrix.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, width_multiplier
from efficient_lm.mixers import cache
from efficient_lm.mixers.attention import divisors, softmax_flops
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.mixers.parts import HeadNorm
from efficient_lm.positions import apply_rope, rope_table
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api


@dataclass(frozen=True)
class DifferentialConfig(MixerConfig):
    n_heads: int = setting(2, "heads, each with two maps", low=1)
    n_kv_heads: int = setting(0, "key-value heads; 0 = n_heads", low=0)
    position: str = setting("rope", "position encoding", choices=("rope", "none"))
    rope_base: float = setting(10000.0, "wavelength base of RoPE", low=1.0)
    implementation: str = setting(
        "auto", "operator implementation", choices=("auto", "reference", "xla", "cudnn"), volatile=True
    )

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(query heads, key-value heads, channels of one map's queries)."""
        return self.n_heads, self.n_kv_heads or self.n_heads, d_model // (2 * self.n_heads)


@MIXERS.register("differential")
class Differential(Mixer):
    Config = DifferentialConfig
    kernel = "softmax attention"
    at_340M = {"n_heads": 8}
    variants = {"mqa-nope": {"n_heads": 4, "n_kv_heads": 1, "position": "none"}}

    def __init__(self, cfg, model, make):
        d, (heads, kv_heads, width) = model.d_model, cfg.sizes(model.d_model)
        self.cfg, self.sizes, self.dtype = cfg, (heads, kv_heads, width), model.dtype
        # Under muP 1 / width, equal to the usual scale at the base width (2203.03466).
        self.scale = width**-0.5 / width_multiplier(model) ** 0.5
        self.q = Linear(make, d, 2 * heads * width)
        self.k = Linear(make, d, 2 * kv_heads * width)
        self.v = Linear(make, d, 2 * kv_heads * width)
        self.lambdas = make.vector(0.1 * jax.random.normal(make.next_key(), (2, 2, width)))
        self.lambda_0 = make.state(0.8 - 0.6 * jnp.exp(-0.3 * make.layer))  # differs between layers of one scan
        self.norm = HeadNorm(make, 2 * width, model.norm_eps)
        self.o = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._parallel(x, ctx)[0], {}

    def _parallel(self, x, ctx):
        """y [B, T, d], keys [B, T, 2 kv heads, D] and values [B, T, kv heads, 2 D]."""
        q, k, v = self._project(x, ctx.positions)
        how = None if self.cfg.implementation == "auto" else self.cfg.implementation
        options = dict(scale=self.scale, segment_ids=ctx.segment_ids, implementation=how)
        return self._output(api.attention(q, k, self._twice(v), **options), x), k, v

    def _project(self, x, positions):
        """Both maps' heads stand behind each other, so that each map is grouped-query attention of its own."""
        heads, kv_heads, width = self.sizes
        q = self.q(x).reshape(*x.shape[:-1], 2 * heads, width)
        k = self.k(x).reshape(*x.shape[:-1], 2 * kv_heads, width)
        v = self.v(x).reshape(*x.shape[:-1], kv_heads, 2 * width)
        if self.cfg.position == "rope":
            cos, sin = rope_table(positions, width, self.cfg.rope_base)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def _twice(self, v):
        return jnp.concatenate([v, v], -2)

    def _output(self, y, x):
        start = jax.lax.stop_gradient(self.lambda_0[...])
        first, second = jnp.exp(jnp.sum(self.lambdas[...][:, 0] * self.lambdas[...][:, 1], -1))
        y_1, y_2 = jnp.split(y, 2, -2)
        y = y_1 - (first - second + start).astype(y.dtype) * y_2
        return self.o(self.norm(y, x) * (1 - start).astype(x.dtype))

    def init_state(self, batch, max_len):
        _, kv_heads, width = self.sizes
        keys = jnp.zeros((batch, 2 * kv_heads, max_len, width), self.dtype)
        return {"k": keys, "v": keys.reshape(batch, kv_heads, max_len, 2 * width)}

    def prefill(self, x, ctx, max_len):
        y, k, v = self._parallel(x, ctx)
        return y, {"k": cache.fill_heads(k, max_len, self.dtype), "v": cache.fill_heads(v, max_len, self.dtype)}

    def step(self, x, state, ctx):
        q, k, v = self._project(x, ctx.positions)
        state = {
            "k": cache.write_heads(state["k"], k, ctx.positions),
            "v": cache.write_heads(state["v"], v, ctx.positions),
        }
        keys, values = (cache.read_heads(state[name], x.dtype) for name in "kv")
        filled = cache.filled(keys.shape[1], ctx.positions)
        y = api.attention_step(q, keys, self._twice(values), filled, scale=self.scale)
        return self._output(y, x), state

    @classmethod
    def check(cls, cfg, model, path):
        d, (heads, kv_heads, width) = model.d_model, cfg.sizes(model.d_model)
        if d % (2 * heads):
            raise ConfigError(
                f"{path}.n_heads = {heads}: 2 n_heads must divide d_model = {d}; allowed: {divisors(d // 2)}"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"{path}.n_kv_heads = {kv_heads}: must divide n_heads = {heads}; allowed: {divisors(heads)}"
            )
        if cfg.position == "rope" and width % 2:
            raise ConfigError(f"{path}.n_heads = {heads}: d_model / (2 n_heads) = {width} must be even for RoPE")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        heads, _, width = cfg.sizes(model.d_model)
        # The difference of the two maps reads the values once; what runs reads them twice.
        ideal = softmax_flops(seq_len, heads, 2 * width, 2 * width)
        executed = softmax_flops(seq_len, 2 * heads, width, 2 * width).hardware
        return dense(_matrices(cfg, model)) + Flops(ideal.causal, ideal.full, executed)

    @staticmethod
    def param_count(cfg, model):
        width = cfg.sizes(model.d_model)[2]
        return _matrices(cfg, model) + 4 * width + 1 + 2 * width

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        _, kv_heads, width = cfg.sizes(model.d_model)
        return 4 * seq_len * kv_heads * width * jnp.dtype(model.dtype).itemsize


def _matrices(cfg, model) -> int:
    heads, kv_heads, width = cfg.sizes(model.d_model)
    return model.d_model * width * (4 * heads + 4 * kv_heads)
