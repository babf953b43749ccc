"""Causal softmax attention: MHA, GQA, MQA (2305.13245), RoPE or NoPE, QK-norm, sliding window, logit cap."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.norms import RMSNorm
from efficient_lm.positions import apply_rope, rope_table
from efficient_lm.schema import ConfigError, setting


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
    implementation: str = setting(
        "auto",
        "auto = cudnn on NVIDIA GPUs where it is legal, else xla",
        choices=("auto", "xla", "cudnn"),
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

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.sizes = cfg, cfg.sizes(d)
        heads, kv_heads, width = self.sizes
        self.scale = score_scale(cfg, model)
        self.q = Linear(make, d, heads * width)
        self.k = Linear(make, d, kv_heads * width)
        self.v = Linear(make, d, kv_heads * width)
        self.o = Linear(make, heads * width, d)
        self.q_norm = RMSNorm(make, width, model.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(make, width, model.norm_eps) if cfg.qk_norm else None

    def __call__(self, x, ctx):
        q, k, v = self._project(x, ctx.positions)
        y = attend(q, k, v, self.scale, self.cfg, segment_ids=ctx.segment_ids)
        return self.o(y.reshape(*x.shape[:-1], -1)), {}

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
        _, kv_heads, width = self.sizes
        slots = min(max_len, self.cfg.window) if self.cfg.window else max_len
        cache = jnp.zeros((batch, slots, kv_heads, width), jnp.float32)
        return {"k": cache, "v": cache, "position": jnp.zeros(batch, jnp.int32)}

    def step(self, x, state):
        position = state["position"]
        q, k, v = self._project(x[:, None], position[:, None])
        # A ring buffer: with a window, a new key takes the slot of the one that just left it.
        slots = state["k"].shape[1]
        write = jax.nn.one_hot(position % slots, slots, dtype=jnp.bool_)[..., None, None]
        keys = jnp.where(write, k.astype(jnp.float32), state["k"])
        values = jnp.where(write, v.astype(jnp.float32), state["v"])
        filled = jnp.arange(slots) <= position[:, None]
        y = softmax_attention(
            q, keys.astype(q.dtype), values.astype(q.dtype), filled[:, None, None, :], self.scale, self.cfg.logit_cap
        )
        return self.o(y.reshape(x.shape[0], -1)), {"k": keys, "v": values, "position": position + 1}

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
        scores = Flops(per_key * visible, per_key * window, per_key * seq_len)
        return dense(_matrices(cfg, model)) + scores

    @staticmethod
    def param_count(cfg, model):
        width = cfg.sizes(model.d_model)[2]
        return _matrices(cfg, model) + (2 * width if cfg.qk_norm else 0)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        _, kv_heads, width = cfg.sizes(model.d_model)
        return 2 * 4 * min(seq_len, cfg.window or seq_len) * kv_heads * width + 4


def divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def score_scale(cfg, model) -> float:
    """1/sqrt(head_dim); under muP sqrt(base head_dim)/head_dim, the same at the base width (2203.03466)."""
    heads, _, width = cfg.sizes(model.d_model)
    if model.parametrization == "mup" and not cfg.head_dim:
        return (model.base_width / heads) ** 0.5 / width
    return width**-0.5


def attend(q, k, v, scale, cfg, *, segment_ids=None):
    """Causal attention of q [B, T, H, D] over k, v [B, T, Hkv, D] -> [B, T, H, D]."""
    same_document = None
    if segment_ids is not None:
        same_document = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if cfg.implementation == "cudnn" or (cfg.implementation == "auto" and _cudnn_serves(q, cfg)):
        window = (cfg.window - 1, 0) if cfg.window else None
        return jax.nn.dot_product_attention(
            q, k, v, mask=same_document, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
        )
    t = jnp.arange(q.shape[1])
    mask = t[:, None] >= t
    if cfg.window:
        mask &= t[:, None] - t < cfg.window
    mask = mask[None, None]
    if same_document is not None:
        mask = mask & same_document
    return softmax_attention(q, k, v, mask, scale, cfg.logit_cap)


def softmax_attention(q, k, v, mask, scale, cap):
    """softmax(q k^T scale) v for mask [B or 1, H or 1, Tq, Tk]; query head h reads key head h // (H / Hkv)."""
    batch, length, heads, width = q.shape
    groups = heads // k.shape[2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], groups, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=wide)
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, :, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, v.shape[-1])


def _cudnn_serves(q, cfg) -> bool:
    # cuDNN's flash attention takes half precision, head sizes up to 128 in steps of 8, and no score cap.
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and not cfg.logit_cap
    )


def _matrices(cfg, model) -> int:
    heads, kv_heads, width = cfg.sizes(model.d_model)
    return model.d_model * width * (2 * heads + 2 * kv_heads)
