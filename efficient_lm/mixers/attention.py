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
    weights: str = setting("softmax", "from scores to weights", choices=("softmax", "off_by_one", "sink", "sigmoid"))
    sigmoid_length: int = setting(1024, "n of the bias -log n of sigmoid weights, at any length", low=1)
    forget_gate: bool = setting(False, "scores decay with the forget gates of the tokens between (use position none)")
    output_gate: str = setting("none", "sigmoid gate on the output", choices=("none", "headwise", "elementwise"))
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
        self.scale = score_scale(cfg, model)
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
        q, k, v = self._project(x, ctx.positions)
        total = None if self.forget is None else jnp.cumsum(self._log_forget(x), 1)
        y = attend(q, k, v, self.scale, self.cfg, segment_ids=ctx.segment_ids, total=total, sink=self._sink())
        return self._output(y, x), {}

    def _log_forget(self, x):
        return jax.nn.log_sigmoid(wide(self.forget(x)))

    def _sink(self):
        return None if self.sink is None else self.sink[...]

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
        slots = min(max_len, self.cfg.window) if self.cfg.window else max_len
        cache = jnp.zeros((batch, slots, kv_heads, width), jnp.float32)
        state = {"k": cache, "v": cache, "position": jnp.zeros(batch, jnp.int32)}
        if self.cfg.forget_gate:  # sums of log forget gates: at the cached keys, and until now
            state |= {"totals": jnp.zeros((batch, slots, heads)), "total": jnp.zeros((batch, heads))}
        return state

    def step(self, x, state):
        position = state["position"]
        q, k, v = self._project(x[:, None], position[:, None])
        # A ring buffer: with a window, a new key takes the slot of the one that just left it.
        slots = state["k"].shape[1]
        write = jax.nn.one_hot(position % slots, slots, dtype=jnp.bool_)[..., None]
        keys = jnp.where(write[..., None], k.astype(jnp.float32), state["k"])
        values = jnp.where(write[..., None], v.astype(jnp.float32), state["v"])
        new, bias = {"k": keys, "v": values, "position": position + 1}, None
        if self.cfg.forget_gate:
            total = state["total"] + self._log_forget(x)
            totals = jnp.where(write, total[:, None], state["totals"])
            bias = (total[:, None] - totals).swapaxes(1, 2)[:, :, None]
            new |= {"total": total, "totals": totals}
        filled = (jnp.arange(slots) <= position[:, None])[:, None, None, :]
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        y = weighted_values(q, keys, values, filled, self.scale, self.cfg, bias=bias, sink=self._sink())
        return self._output(y[:, 0], x), new

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
        heads, _, width = cfg.sizes(model.d_model)
        vectors = (2 * width if cfg.qk_norm else 0) + heads * (cfg.forget_gate + (cfg.weights == "sink"))
        return _matrices(cfg, model) + vectors

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        heads, kv_heads, width = cfg.sizes(model.d_model)
        slots = min(seq_len, cfg.window or seq_len)
        forget = 4 * heads * (slots + 1) if cfg.forget_gate else 0
        return 2 * 4 * slots * kv_heads * width + 4 + forget


def divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


def score_scale(cfg, model) -> float:
    """1/sqrt(head_dim); under muP sqrt(base head_dim)/head_dim, the same at the base width (2203.03466)."""
    heads, _, width = cfg.sizes(model.d_model)
    if model.parametrization == "mup" and not cfg.head_dim:
        return (model.base_width / heads) ** 0.5 / width
    return width**-0.5


def attend(q, k, v, scale, cfg, *, segment_ids=None, total=None, sink=None):
    """Causal attention of q [B, T, H, D] over k, v [B, T, Hkv, D] -> [B, T, H, D].

    total [B, T, H]: cumulative log forget gates. sink [H]: the learned logits of weights 'sink'.
    """
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
    bias = None
    if total is not None:
        # Later keys are masked; without the bound their bias, positive, could overflow in the backward pass.
        bias = jnp.minimum(total[:, :, None] - total[:, None], 0.0).transpose(0, 3, 1, 2)
    return weighted_values(q, k, v, mask, scale, cfg, bias=bias, sink=sink)


def weighted_values(q, k, v, mask, scale, cfg, *, bias=None, sink=None):
    """weights(q k^T scale + bias) v; query head h reads key head h // (H / Hkv).

    mask [B or 1, 1, Tq, Tk], bias [B, H, Tq, Tk], sink [H].
    """
    batch, length, heads, width = q.shape
    grouped = k.shape[2], heads // k.shape[2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, *grouped, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    if cfg.logit_cap:
        scores = cfg.logit_cap * jnp.tanh(scores / cfg.logit_cap)
    if bias is not None:
        scores = scores + bias.reshape(scores.shape)
    scores = jnp.where(mask[:, :, None], scores, -1e30)
    if cfg.weights == "sigmoid":
        weights = jax.nn.sigmoid(scores - math.log(cfg.sigmoid_length))
    elif cfg.weights == "softmax":
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        logit = jnp.zeros(()) if sink is None else sink.reshape(*grouped, 1, 1)
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), logit))
        weights = jnp.exp(scores - top)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(logit - top))
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
    return y.reshape(batch, length, heads, v.shape[-1])


def _cudnn_serves(q, cfg) -> bool:
    # cuDNN's flash attention takes half precision, head sizes up to 128 in steps of 8, and no score cap.
    return (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and cfg.weights == "softmax"
        and not (cfg.logit_cap or cfg.forget_gate)
    )


def _gate_width(cfg, model) -> int:
    heads, _, width = cfg.sizes(model.d_model)
    return {"none": 0, "headwise": heads, "elementwise": heads * width}[cfg.output_gate]


def _matrices(cfg, model) -> int:
    heads, kv_heads, width = cfg.sizes(model.d_model)
    forget = heads if cfg.forget_gate else 0
    return model.d_model * (width * (2 * heads + 2 * kv_heads) + forget + _gate_width(cfg, model))
