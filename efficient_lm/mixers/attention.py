"""Causal softmax attention: MHA, GQA, MQA (2305.13245), RoPE or NoPE, QK-norm, sliding window, logit cap.

Options: an output gate o * sigmoid(x W) per head or channel (2505.06708); weights e^s_j / (e^b + sum e^s) with b = 0
('off_by_one') or learned per head ('sink'); weights sigmoid(s_j - log n) (2409.04431); a forget gate, which adds the
sum of log sigmoid(f) over the tokens after j to s_j (2503.02130).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers import cache
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.norms import RMSNorm
from efficient_lm.positions import apply_rope, rope_table
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api
from pallas_kernels.flops import attention_flops


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    n_heads: int = setting(0, "query heads; 0 = d_model / head_dim", low=0)
    n_kv_heads: int = setting(0, "key-value heads; 0 = n_heads, 1 = MQA", low=0)
    head_dim: int = setting(0, "channels per head; 0 = d_model / n_heads", low=0)
    position: str = setting("rope", "position encoding", choices=("rope", "none"))
    rope_base: float = setting(10000.0, "wavelength base of RoPE", low=1.0)
    qk_norm: bool = setting(True, "RMSNorm of queries and keys per head, before RoPE")
    window: int = setting(0, "keys visible to a query, itself included; 0 = all", low=0)
    logit_cap: float = setting(0.0, "soft cap c tanh(s / c) on scores; 0 = none", low=0.0)
    weights: str = setting("softmax", "from scores to weights", choices=("softmax", "off_by_one", "sink", "sigmoid"))
    sigmoid_length: int = setting(1024, "n of the bias -log n of sigmoid weights, at any length", low=1)
    forget_gate: bool = setting(False, "scores decay with the forget gates of the tokens between (use position none)")
    output_gate: str = setting("none", "sigmoid gate on the output", choices=("none", "headwise", "elementwise"))
    implementation: str = setting(
        "auto",
        "operator implementation; auto = cudnn on NVIDIA GPUs where it is legal, else xla",
        choices=("auto", "reference", "xla", "cudnn"),
        volatile=True,
    )

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(query heads, key-value heads, head_dim); the default is 4 heads."""
        heads = self.n_heads or (d_model // self.head_dim if self.head_dim else 4)
        return heads, self.n_kv_heads or heads, self.head_dim or d_model // heads


@MIXERS.register("attention")
class Attention(Mixer):
    Config = AttentionConfig
    kernel = "softmax attention"
    at_340M = {"n_heads": 16}
    variants = {
        "gqa-window-nope": {"n_heads": 4, "n_kv_heads": 2, "window": 7, "position": "none", "qk_norm": False},
        "mqa-cap": {"n_heads": 2, "n_kv_heads": 1, "logit_cap": 5.0},
        "forget-sink-gate": {
            "n_kv_heads": 2,
            "position": "none",
            "window": 9,
            "forget_gate": True,
            "weights": "sink",
            "output_gate": "elementwise",
        },
        "sigmoid-headwise": {"weights": "sigmoid", "sigmoid_length": 40, "output_gate": "headwise"},
        "off-by-one": {"weights": "off_by_one"},
    }

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.sizes = cfg, cfg.sizes(d)
        heads, kv_heads, width = self.sizes
        self.scale, self.dtype = score_scale(cfg, model), model.dtype
        self.q = Linear(make, d, heads * width)
        self.k = Linear(make, d, kv_heads * width)
        self.v = Linear(make, d, kv_heads * width)
        self.o = Linear(make, heads * width, d)
        self.q_norm = RMSNorm(make, width, model.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(make, width, model.norm_eps) if cfg.qk_norm else None
        self.forget = Linear(make, d, heads, bias=True) if cfg.forget_gate else None
        self.gate = Linear(make, d, _gate_width(cfg, model)) if cfg.output_gate != "none" else None
        self.sink = make.vector(jnp.zeros(heads)) if cfg.weights == "sink" else None

    def __call__(self, x, ctx):
        return self._parallel(x, ctx)[0], {}

    def _parallel(self, x, ctx):
        """y [B, T, d], keys, values [B, T, kv heads, D] and log forget gates [B, T, H] or None."""
        q, k, v = self._project(x, ctx.positions)
        log_forget = None if self.forget is None else self._log_forget(x)
        y = api.attention(
            *(q, k, v),
            window=self.cfg.window or None,
            segment_ids=ctx.segment_ids,
            log_forget=log_forget,
            implementation=None if self.cfg.implementation == "auto" else self.cfg.implementation,
            **self._weights(),
        )
        return self._output(y, x), k, v, log_forget

    def _log_forget(self, x):
        return jax.nn.log_sigmoid(wide(self.forget(x)))

    def _weights(self):
        """How the operator makes weights of q.k."""
        cfg, heads = self.cfg, self.sizes[0]
        sinks = jnp.zeros(heads) if cfg.weights == "off_by_one" else None
        if self.sink is not None:
            sinks = self.sink[...]
        bias = -math.log(cfg.sigmoid_length) if cfg.weights == "sigmoid" else None
        return dict(scale=self.scale, logit_cap=cfg.logit_cap or None, sinks=sinks, sigmoid_bias=bias)

    def _output(self, y, x):
        if self.gate is not None:
            gate = jax.nn.sigmoid(self.gate(x))
            y = y * gate.reshape(*y.shape[:-1], gate.shape[-1] // y.shape[-2])
        return self.o(y.reshape(*x.shape[:-1], -1))

    def _project(self, x, positions):
        heads, kv_heads, width = self.sizes
        q = self.q(x).reshape(*x.shape[:-1], heads, width)
        k = self.k(x).reshape(*x.shape[:-1], kv_heads, width)
        v = self.v(x).reshape(*x.shape[:-1], kv_heads, width)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.position == "rope":
            cos, sin = rope_table(positions, width, self.cfg.rope_base)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v

    def init_state(self, batch, max_len):
        heads, kv_heads, width = self.sizes
        slots = self._slots(max_len)
        keys = jnp.zeros((batch, slots, kv_heads, width), self.dtype)
        state = {"k": keys, "v": keys}
        if self.cfg.forget_gate:  # sums of log forget gates: at the cached keys, and until now
            state |= {"totals": jnp.zeros((batch, slots, heads)), "total": jnp.zeros((batch, heads))}
        return state

    def prefill(self, x, ctx, max_len):
        y, k, v, log_forget = self._parallel(x, ctx)
        slots = self._slots(max_len)
        state = {"k": cache.fill(k, slots, self.dtype), "v": cache.fill(v, slots, self.dtype)}
        if log_forget is not None:
            totals = jnp.cumsum(log_forget, 1)
            state |= {"totals": cache.fill(totals, slots), "total": totals[:, -1]}
        return y, state

    def step(self, x, state, ctx):
        position = ctx.positions
        q, k, v = (part[:, 0] for part in self._project(x[:, None], position[:, None]))
        new, bias = {"k": cache.write(state["k"], k, position), "v": cache.write(state["v"], v, position)}, None
        if self.cfg.forget_gate:
            total = state["total"] + self._log_forget(x)
            totals = cache.write(state["totals"], total, position)
            bias = (total[:, None] - totals).swapaxes(1, 2)
            new |= {"total": total, "totals": totals}
        keys, values, filled = new["k"].astype(q.dtype), new["v"].astype(q.dtype), cache.filled(new["k"], position)
        return self._output(api.attention_step(q, keys, values, filled, bias=bias, **self._weights()), x), new

    def _slots(self, max_len):
        return min(max_len, self.cfg.window) if self.cfg.window else max_len

    @classmethod
    def check(cls, cfg, model, path):
        d, (heads, kv_heads, width) = model.d_model, cfg.sizes(model.d_model)
        if cfg.head_dim and not cfg.n_heads and d % cfg.head_dim:
            raise ConfigError(f"{path}.head_dim = {cfg.head_dim}: must divide d_model = {d}; allowed: {divisors(d)}")
        if not cfg.head_dim and d % heads:
            raise ConfigError(f"{path}.n_heads = {heads}: must divide d_model = {d}; allowed: {divisors(d)}")
        if heads % kv_heads:
            raise ConfigError(
                f"{path}.n_kv_heads = {kv_heads}: must divide n_heads = {heads}; allowed: {divisors(heads)}"
            )
        if cfg.position == "rope" and width % 2:
            raise ConfigError(f"{path}.head_dim = {width}: must be even for RoPE")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        heads, _, width = cfg.sizes(model.d_model)
        window = min(cfg.window or seq_len, seq_len)
        visible = window - window * (window - 1) / (2 * seq_len)
        per_key = 2 * heads * 2 * width
        executed = attention_flops(seq_len, heads, width, width, cfg.window or None, implementation="xla")
        scores = Flops(per_key * visible, per_key * window, executed)
        return dense(_matrices(cfg, model)) + scores

    @staticmethod
    def param_count(cfg, model):
        heads, _, width = cfg.sizes(model.d_model)
        vectors = (2 * width if cfg.qk_norm else 0) + heads * (cfg.forget_gate + (cfg.weights == "sink"))
        return _matrices(cfg, model) + vectors

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        heads, kv_heads, width = cfg.sizes(model.d_model)
        slots = min(seq_len, cfg.window or seq_len)
        forget = 4 * heads * (slots + 1) if cfg.forget_gate else 0
        return 2 * slots * kv_heads * width * jnp.dtype(model.dtype).itemsize + forget


def divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def score_scale(cfg, model) -> float:
    """1/sqrt(head_dim); under muP sqrt(base head_dim)/head_dim, the same at the base width (2203.03466)."""
    heads, _, width = cfg.sizes(model.d_model)
    if model.parametrization == "mup" and not cfg.head_dim:
        return (model.base_width / heads) ** 0.5 / width
    return width**-0.5


def _gate_width(cfg, model) -> int:
    heads, _, width = cfg.sizes(model.d_model)
    return {"none": 0, "headwise": heads, "elementwise": heads * width}[cfg.output_gate]


def _matrices(cfg, model) -> int:
    heads, kv_heads, width = cfg.sizes(model.d_model)
    forget = heads if cfg.forget_gate else 0
    return model.d_model * (width * (2 * heads + 2 * kv_heads) + forget + _gate_width(cfg, model))
