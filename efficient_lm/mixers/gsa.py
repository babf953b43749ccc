"""Gated slot attention (GSA, 2409.07146): softmax attention over M slots that keys and values decay into.

s = 1 - f, f = sigmoid(x W_f)^(1/8) per head and slot;  K_t = K_{t-1} diag(f_t) + k_t s_t^T,  p_t = softmax(K_t^T q_t);
V_t = diag(f_t) V_{t-1} + s_t v_t^T,  o_t = V_t^T p_t.  SiLU on q, k and v, no scale. SiLU of o, RMS norm over all heads
together, output matrix, no gate. The second pass is linear attention with a decay per key channel (per slot); in the
first one the decay stands on the value side, see `slot_scores`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import (
    OperatorConfig,
    check_heads,
    from_chunks,
    head_state,
    in_chunks,
    split_heads,
)
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import linear_attention_flops

# Tokens whose pairwise decays per slot are held at a time by `slot_scores`.
CHUNK = 16


@dataclass(frozen=True)
class GSAConfig(OperatorConfig):
    n_slots: int = setting(64, "slots per head", low=1)
    gate_normalizer: float = setting(8.0, "log f = logsigmoid(x W_f) / gate_normalizer", low=1e-3)


@MIXERS.register("gsa")
class GSA(Mixer):
    Config = GSAConfig
    kernel = "linear attention, decay per channel"

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.f = Linear(make, d, cfg.n_heads * cfg.n_slots)
        self.norm = RMSNorm(make, d, model.norm_eps)
        self.o = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._forward(x, ctx.segment_ids)[0], {}

    def _forward(self, x, segment_ids=None, **options):
        """y and the state after the last token."""
        q, k, v, s, log_f = self._project(x)
        chunk = 1 if self.cfg.implementation == "reference" else CHUNK
        scores, keys = slot_scores(q, k, s, log_f, segment_ids, chunk)
        p = jax.nn.softmax(scores)
        options |= self.cfg.options() | {"scale": 1.0, "segment_ids": segment_ids}
        o, values = api.linear_attention(p.astype(v.dtype), s.astype(v.dtype), v, log_f, **options)
        return self._output(o, x), {"keys": keys, "values": values}

    def _project(self, x):
        """q, k, v [..., H, K] and 1 - f, log f [..., H, M] in float32."""
        q, k, v, f = (split_heads(part(x), self.cfg.n_heads) for part in (self.q, self.k, self.v, self.f))
        log_f = jax.nn.log_sigmoid(wide(f)) / self.cfg.gate_normalizer
        return jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v), -jnp.expm1(log_f), log_f

    def _output(self, o, x):
        return self.o(self.norm(jax.nn.silu(o).reshape(*x.shape[:-1], -1)))

    def init_state(self, batch, max_len):
        heads, slots = self.cfg.n_heads, self.cfg.n_slots
        return {
            "keys": head_state(batch, heads, self.width, slots),
            "values": head_state(batch, heads, slots, self.width),
        }

    def prefill(self, x, ctx, max_len):
        return self._forward(x, output_final_state=True)

    def step(self, x, state, ctx):
        q, k, v, s, log_f = self._project(x)
        keys = state["keys"] * jnp.exp(log_f)[..., None, :] + wide(k)[..., None] * s[..., None, :]
        p = jax.nn.softmax(jnp.einsum("bhk,bhkm->bhm", wide(q), keys, precision="highest"))
        o, values = api.linear_attention_step(p, s, v, log_f, state["values"], scale=1.0)
        return self._output(o, x), {"keys": keys, "values": values}

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        heads, slots, width = cfg.n_heads, cfg.n_slots, model.d_model // cfg.n_heads
        ideal = linear_attention_flops(T=seq_len, H=heads, K=width, V=slots, decay="channel")
        padded = -(-seq_len // CHUNK) * CHUNK / seq_len
        executed = padded * heads * (2 * CHUNK * width + 4 * width * slots)
        read = cfg.flops(linear_attention_flops, T=seq_len, H=heads, K=slots, V=width, decay="channel")
        return dense(_matrices(cfg, model)) + Flops(ideal, ideal, executed) + read

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + model.d_model

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * 2 * model.d_model * cfg.n_slots


def slot_scores(q, k, s, log_f, segment_ids=None, chunk=CHUNK):
    """K_t^T q_t of K_t = K_{t-1} diag(exp(log_f_t)) + k_t s_t^T, and the last K, in float32.

    q, k [B, T, H, K]; s, log_f [B, T, H, M], log_f <= 0 -> [B, T, H, M], [B, H, K, M]. Chunks one after the other,
    recomputed in the backward pass; decays between the tokens of a chunk are explicit, so that no exponent is positive.
    """
    (batch, length, heads, slots), width = s.shape, q.shape[-1]
    document = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        document = document.at[:, 1:].set(jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], 1))
    q, k, s, log_f = (wide(a) for a in (q, k, s, log_f))

    @jax.checkpoint
    def one(carry, inputs):
        memory, last = carry  # K [B, H, K, M] and the document that it belongs to
        q, k, s, log_f, document = inputs
        total = jnp.cumsum(log_f, 1)
        visible = (document[:, :, None] == document[:, None]) & jnp.tri(chunk, dtype=bool)
        gap = jnp.where(visible[..., None, None], total[:, :, None] - total[:, None], -jnp.inf)
        weights = jnp.einsum("bihk,bjhk->bijh", q, k, precision="highest")
        scores = jnp.sum(weights[..., None] * jnp.exp(gap) * s[:, None], 2)
        entering = jnp.exp(total) * (document == last[:, None])[..., None, None]
        scores += jnp.einsum("bihk,bhkm->bihm", q, memory, precision="highest") * entering
        kept = entering[:, -1, :, None]
        memory = kept * memory + jnp.einsum("bjhk,bjhm->bhkm", k, jnp.exp(gap[:, -1]) * s, precision="highest")
        return (memory, document[:, -1]), scores

    start = jnp.zeros((batch, heads, width, slots), s.dtype), document[:, 0]
    inputs = *(in_chunks(a, chunk) for a in (q, k, s, log_f)), in_chunks(document, chunk, "edge")
    (memory, _), scores = jax.lax.scan(one, start, inputs)
    return from_chunks(scores, length), memory


def _matrices(cfg, model) -> int:
    return 4 * model.d_model**2 + model.d_model * cfg.n_heads * cfg.n_slots
