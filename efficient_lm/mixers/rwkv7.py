"""RWKV-7 time mixing (2503.14456): S_t = (diag(w_t) - (kappa * a)_t kappa_t^T) S_{t-1} + k_t v_t^T, y_t = S_t^T r_t.

Token shift x_c = x_t + mu_c (x_{t-1} - x_t) for each of r, w, k, v, a, g; r, k, v = x_c W; log w = -e^(-1/2)
sigmoid(w_0 + tanh(x_w A_w) B_w); a = sigmoid(a_0 + x_a A_a B_a); g = sigmoid(x_g A_g) B_g; kappa = k * xi of unit norm
per head; k <- k (1 + (a - 1) alpha). Then GroupNorm per head, plus (sum_K r k rho) v, times g, output matrix.
The removal kappa^T S reads the state before its decay. With value_residual = 'take' v moves towards the values of the
layer that gives them, the first one in the paper: v <- v + (v_first - v) sigmoid(v_0 + x_v A_v B_v); configs/linear.py
has the whole model. Differences from the paper: normal instead of orthogonal initial matrices, any FFN in the block.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.attention import SHARING
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import LowRank, OperatorConfig, check_heads, head_state, split_heads
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import dplr_flops
from pallas_kernels.steps import l2_normalise

NORM_EPS = 64e-5
MIN_LOG_DECAY = -(jnp.e**-0.5)
# Exponents of the initial token shift 1 - (channel / d)^(c (1 - layer / L)).
SHIFT = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


@dataclass(frozen=True)
class RWKV7Config(OperatorConfig):
    decay_rank: int = setting(0, "rank of the maps to w and a; 0 = 2.5 sqrt(d_model) in steps of 32", low=0)
    gate_rank: int = setting(0, "rank of the map to g; 0 = 5 sqrt(d_model) in steps of 32", low=0)
    value_residual: str = setting("own", "give the values to later layers, or mix in theirs", choices=SHARING)

    def ranks(self, d_model: int) -> tuple[int, ...]:
        """Ranks of w, a, g and, where values are taken, of their mixture."""
        small, large, mix = (max(32, 32 * round(c * d_model**0.5 / 32)) for c in (2.5, 5.0, 1.7))
        ranks = self.decay_rank or small, self.decay_rank or small, self.gate_rank or large
        return ranks + ((mix,) if self.value_residual == "take" else ())

    def value_shape(self, model) -> tuple[int, int]:
        return self.n_heads, model.d_model // self.n_heads


@MIXERS.register("rwkv7")
class RWKV7(Mixer):
    Config = RWKV7Config
    kernel = "diagonal plus low rank"
    at_340M = {"n_heads": 16}
    giving = {"values": {"value_residual": "give"}}
    variants = {"take-values": {"value_residual": "take"}}

    def __init__(self, cfg, model, make):
        d, (w_rank, a_rank, g_rank, *v_rank) = model.d_model, cfg.ranks(model.d_model)
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.r = Linear(make, d, d)
        self.k = Linear(make, d, d, scale=0.1)
        self.v = Linear(make, d, d)
        self.o = Linear(make, d, d, scale=0.0)
        self.decay = LoRA(make, d, w_rank, d)
        self.rate = LoRA(make, d, a_rank, d)
        self.gate = LoRA(make, d, g_rank, d)
        self.mix = LoRA(make, d, *v_rank, d) if v_rank else None

        channel = jnp.arange(d) / d
        early = 1 - make.layer / model.n_layers  # 1 in the first layer
        depth = make.layer / max(model.n_layers - 1, 1)
        centred = jnp.arange(d) / max(d - 1, 1) - 0.5
        zigzag = (jnp.arange(d) % self.width - (self.width - 1) / 2) / max((self.width - 1) / 2, 1)
        self.shift = make.vector(jnp.stack([1 - channel ** (c * early) for c in SHIFT.values()]))
        ramp = (centred + 0.5) ** (1 + depth**0.3)
        self.decay_bias = make.vector(-5.5 + 6 * ramp + 2.5 * zigzag * jnp.abs(zigzag))
        self.rate_bias = make.vector(-0.19 + 0.3 * zigzag * jnp.abs(zigzag) + 0.4 * centred)
        self.mix_bias = make.vector(0.73 - 0.4 * centred) if v_rank else None
        self.removal_scale = make.vector(0.71 - 0.1 * centred)
        self.write_scale = make.vector(jnp.full(d, 1.02))
        self.bonus = make.vector(jnp.full(d, -0.04))
        self.norm_scale = make.vector(jnp.full(d, ((make.layer + 1) / model.n_layers) ** 0.7))
        self.norm_bias = make.vector(jnp.zeros(d))

    def __call__(self, x, ctx):
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        if ctx.segment_ids is not None:
            ids = ctx.segment_ids
            same = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
            before = jnp.where(same[..., None], before, 0)
        inputs, bonus, gate = self._project(x, before, ctx)
        y, _ = api.dplr(**inputs, min_log_decay=MIN_LOG_DECAY, segment_ids=ctx.segment_ids, **self.cfg.options())
        return self._output(y, bonus, gate), {}

    def _project(self, x, before, ctx):
        """Arguments of the operator, the bonus [..., H, V] and the output gate [..., d]."""
        shift = self.shift[...].astype(x.dtype)
        xs = {name: x + shift[i] * (before - x) for i, name in enumerate(SHIFT)}
        r, k, v = self.r(xs["r"]), self.k(xs["k"]), self._values(xs["v"], ctx)
        log_w = MIN_LOG_DECAY * jax.nn.sigmoid(self.decay_bias[...] + wide(self.decay(xs["w"], jnp.tanh)))
        a = jax.nn.sigmoid(self.rate_bias[...] + wide(self.rate(xs["a"])))
        gate = self.gate(xs["g"], jax.nn.sigmoid)
        removal = self._heads(wide(k) * self.removal_scale[...])
        kappa = l2_normalise(removal)
        k = (wide(k) * (1 + (a - 1) * self.write_scale[...])).astype(x.dtype)
        bonus = self._heads(wide(r) * wide(k) * self.bonus[...]).sum(-1, keepdims=True) * v
        r, k, log_w = (self._heads(y) for y in (r, k, log_w))
        a, b = -kappa.astype(x.dtype), (kappa * self._heads(a)).astype(x.dtype)
        return {"q": r, "k": k, "v": v, "a": a, "b": b, "log_decay": log_w}, bonus, gate

    def _values(self, x, ctx):
        """Values [..., H, V] of the shifted x, given or moved towards those taken."""
        v = self._heads(self.v(x))
        if self.cfg.value_residual == "give":
            ctx.carry["values"] = v
        if self.mix is not None:
            share = jax.nn.sigmoid(self.mix_bias[...] + wide(self.mix(x)))
            v = v + self._heads(share).astype(v.dtype) * (ctx.carry["values"] - v)
        return v

    def _heads(self, y):
        return split_heads(y, self.cfg.n_heads)

    def _output(self, y, bonus, gate):
        y = wide(y)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + NORM_EPS)
        y = y * self._heads(self.norm_scale[...]) + self._heads(self.norm_bias[...]) + bonus
        return self.o(y.reshape(gate.shape).astype(gate.dtype) * gate)

    def init_state(self, batch, max_len):
        d = self.cfg.n_heads * self.width
        memory = head_state(batch, self.cfg.n_heads, self.width, self.width)
        return {"memory": memory, "before": jnp.zeros((batch, d), jnp.float32)}

    def prefill(self, x, ctx, max_len):
        inputs, bonus, gate = self._project(x, jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))), ctx)
        y, memory = api.dplr(**inputs, min_log_decay=MIN_LOG_DECAY, output_final_state=True, **self.cfg.options())
        return self._output(y, bonus, gate), {"memory": memory, "before": x[:, -1].astype(jnp.float32)}

    def step(self, x, state, ctx):
        inputs, bonus, gate = self._project(x, state["before"].astype(x.dtype), ctx)
        y, memory = api.dplr_step(**inputs, state=state["memory"])
        return self._output(y, bonus, gate), {"memory": memory, "before": x.astype(jnp.float32)}

    @staticmethod
    def gives(cfg, model):
        return {"values": cfg.value_shape(model)} if cfg.value_residual == "give" else {}

    @staticmethod
    def takes(cfg, model):
        return {"values": cfg.value_shape(model)} if cfg.value_residual == "take" else {}

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        return dense(_matrices(cfg, model)) + cfg.flops(dplr_flops, T=seq_len, H=cfg.n_heads, K=width, V=width)

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + (len(SHIFT) + 7 + (cfg.value_residual == "take")) * model.d_model

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * (model.d_model**2 // cfg.n_heads + model.d_model)


class LoRA(LowRank):
    """f(x A) B with A = 0 and a small B at the start."""

    def __init__(self, make, d_in: int, rank: int, d_out: int):
        self.down = Linear(make, d_in, rank, scale=0.0)
        self.up = Linear(make, rank, d_out, role="fixed", scale=0.1)

    def __call__(self, x, activation=lambda y: y):
        return self.up(activation(self.down(x)))


def _matrices(cfg, model) -> int:
    return 4 * model.d_model**2 + 2 * model.d_model * sum(cfg.ranks(model.d_model))
