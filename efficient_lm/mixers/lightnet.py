"""LightNet (2405.21022): every key channel of the state is a softmax average of the values so far.

With z_t = log sum_{j <= t} e^{k_j} per key channel, S_t = diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T, so
row c of S_t is sum_j softmax_j(k_jc) v_j; o_t = S_t^T SiLU(q_t) / sqrt(K). RMS norm over all heads together, times SiLU
of a low-rank map of x (the paper's rank is the width of a head), output matrix. The decay tends to 1 as 1 / t: nothing
is forgotten but by newer, larger keys. The paper's own relative position encoding is left out.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import LowRank, OperatorConfig, check_heads, head_state, split_heads
from efficient_lm.norms import RMSNorm
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import linear_attention_flops

# The normaliser before the first token, finite so that differences stay finite.
EMPTY = -1e30


@dataclass(frozen=True)
class LightNetConfig(OperatorConfig):
    gate_rank: int = setting(0, "rank of the map to the output gate; 0 = d_model / n_heads", low=0)

    def rank(self, d_model: int) -> int:
        return self.gate_rank or d_model // self.n_heads


@MIXERS.register("lightnet")
class LightNet(Mixer):
    Config = LightNetConfig
    kernel = "linear attention, decay per channel"
    at_340M = {"n_heads": 8}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.gate = LowRank(make, d, cfg.rank(d), d, role="fixed" if cfg.gate_rank else "hidden")
        self.norm = RMSNorm(make, d, model.norm_eps)
        self.o = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._forward(x, ctx.segment_ids)[0], {}

    def _forward(self, x, segment_ids=None, **options):
        """y and the state after the last token."""
        q, k, v = self._project(x)
        weights, log_decay, z = prefix_softmax(k, segment_ids)
        options |= self.cfg.options() | {"segment_ids": segment_ids}
        o, memory = api.linear_attention(q, weights.astype(v.dtype), v, log_decay, **options)
        return self._output(o, x), {"memory": memory, "z": z[:, -1]}

    def _project(self, x):
        q, k, v = (split_heads(part(x), self.cfg.n_heads) for part in (self.q, self.k, self.v))
        return jax.nn.silu(q), wide(k), v

    def _output(self, o, x):
        return self.o(self.norm(o.reshape(*x.shape[:-1], -1)) * jax.nn.silu(self.gate(x)))

    def init_state(self, batch, max_len):
        heads, width = self.cfg.n_heads, self.width
        return {"memory": head_state(batch, heads, width, width), "z": jnp.full((batch, heads, width), EMPTY)}

    def prefill(self, x, ctx, max_len):
        return self._forward(x, output_final_state=True)

    def step(self, x, state, ctx):
        q, k, v = self._project(x)
        z = jnp.logaddexp(state["z"], k)
        o, memory = api.linear_attention_step(q, jnp.exp(k - z), v, state["z"] - z, state["memory"])
        return self._output(o, x), {"memory": memory, "z": z}

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        sizes = dict(T=seq_len, H=cfg.n_heads, K=width, V=width, decay="channel")
        return dense(_matrices(cfg, model)) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + model.d_model

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model * (model.d_model // cfg.n_heads + 1)


def prefix_softmax(k, segment_ids=None):
    """Weights e^{k_t - z_t} of the tokens, log decays z_{t-1} - z_t of what came before, and z, like k [B, T, H, K].

    z_t = logsumexp of k over the tokens of the segment up to t.
    """
    start = jnp.zeros(k.shape[:2], bool).at[:, 0].set(True)
    if segment_ids is not None:
        start = start.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    start = start[..., None, None]

    def join(earlier, later):
        fresh = earlier[0] | later[0]
        return fresh, jnp.where(later[0], later[1], jnp.logaddexp(earlier[1], later[1]))

    _, z = jax.lax.associative_scan(join, (start, k), axis=1)
    before = jnp.concatenate([z[:, :1], z[:, :-1]], 1)
    return jnp.exp(k - z), jnp.where(start, 0.0, before - z), z


def _matrices(cfg, model) -> int:
    return 4 * model.d_model**2 + 2 * model.d_model * cfg.rank(model.d_model)
