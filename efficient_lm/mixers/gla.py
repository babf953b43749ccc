"""Gated linear attention (GLA, 2312.06635): S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.attention import divisors
from efficient_lm.mixers.base import MIXERS, Mixer, MixerConfig
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class GLAConfig(MixerConfig):
    n_heads: int = setting(4, "heads", low=1)
    expand_k: float = setting(0.5, "key channels of all heads, as a multiple of d_model", low=0.0)
    expand_v: float = setting(1.0, "value channels of all heads, as a multiple of d_model", low=0.0)
    gate_rank: int = setting(16, "rank of the map from x to the log decay", low=1)
    gate_normalizer: float = setting(16.0, "log decay = logsigmoid(.) / gate_normalizer", low=1e-3)
    chunk_size: int = setting(0, "tokens per chunk; 0 = the operator's default", low=0, volatile=True)
    implementation: str = setting(
        "auto",
        "operator implementation",
        choices=("auto", "reference", "xla", "pallas_tpu", "pallas_gpu"),
        volatile=True,
    )

    def widths(self, d_model: int) -> tuple[int, int]:
        """(key channels, value channels) of all heads."""
        return round(d_model * self.expand_k), round(d_model * self.expand_v)


@MIXERS.register("gla")
class GLA(Mixer):
    Config = GLAConfig
    kernel = "linear attention, decay per channel"

    def __init__(self, cfg, model, make):
        d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
        self.cfg, self.heads = cfg, cfg.n_heads
        self.q = Linear(make, d, d_k)
        self.k = Linear(make, d, d_k)
        self.v = Linear(make, d, d_v)
        self.gate = Linear(make, d, d_v)
        self.decay_down = Linear(make, d, cfg.gate_rank)
        self.decay_up = Linear(make, cfg.gate_rank, d_k, role="fixed", bias=True)
        self.norm = RMSNorm(make, d_v // cfg.n_heads, model.norm_eps)
        self.o = Linear(make, d_v, d)

    def __call__(self, x, ctx):
        q, k, v, log_decay = self._project(x)
        o, _ = api.linear_attention(
            q,
            k,
            v,
            log_decay,
            segment_ids=ctx.segment_ids,
            chunk_size=self.cfg.chunk_size or None,
            implementation=None if self.cfg.implementation == "auto" else self.cfg.implementation,
        )
        return self._output(o, x), {}

    def _project(self, x):
        def heads(y):
            return y.reshape(*x.shape[:-1], self.heads, -1)

        logits = wide(self.decay_up(self.decay_down(x)))
        log_decay = jax.nn.log_sigmoid(logits) / self.cfg.gate_normalizer
        return heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), heads(log_decay)

    def _output(self, o, x):
        o = self.norm(o).reshape(*x.shape[:-1], -1).astype(x.dtype)
        return self.o(o * jax.nn.silu(self.gate(x)))

    def init_state(self, batch, max_len):
        d_k, d_v = self.q.kernel.shape[-1], self.v.kernel.shape[-1]
        return jnp.zeros((batch, self.heads, d_k // self.heads, d_v // self.heads), jnp.float32)

    def step(self, x, state):
        q, k, v, log_decay = self._project(x)
        o, state = api.linear_attention_step(q, k, v, log_decay, state=state)
        return self._output(o, x), state

    @classmethod
    def check(cls, cfg, model, path):
        for name, width in zip(("expand_k", "expand_v"), cfg.widths(model.d_model), strict=True):
            if width < 1 or width % cfg.n_heads:
                raise ConfigError(
                    f"{path}.n_heads = {cfg.n_heads}: must divide {name} x d_model = {width}; "
                    f"allowed: {divisors(width)}"
                )

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        sizes = dict(T=seq_len, H=cfg.n_heads, K=d_k // cfg.n_heads, V=d_v // cfg.n_heads, decay="channel")
        ideal = linear_attention_flops(**sizes)
        executed = linear_attention_flops(**sizes, chunk_size=cfg.chunk_size or None, implementation="xla")
        return dense(_matrices(cfg, model)) + Flops(ideal, ideal, executed)

    @staticmethod
    def param_count(cfg, model):
        d_k, d_v = cfg.widths(model.d_model)
        return _matrices(cfg, model) + d_k + d_v // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d_k, d_v = cfg.widths(model.d_model)
        return 4 * d_k * d_v // cfg.n_heads


def _matrices(cfg, model) -> int:
    d, (d_k, d_v) = model.d_model, cfg.widths(model.d_model)
    return d * (2 * d_k + 3 * d_v) + cfg.gate_rank * (d + d_k)
