"""Lightning attention of TransNormerLLM (2307.14995, 2401.04658): S_t = lambda S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

SiLU on q and k; one fixed decay per head and layer; RMS norm without weights over all heads together, product with
u = x W_u, output matrix. Of the two decay spectra in use, with layer l of L and head h of H counted from 0,
  alibi   -log lambda = 2^(-8 (h+1) / H) (1 - l / (L-1) + 1e-5)    the authors' code
  linear  -log lambda = (8 h / H) (1 - l / L)                      the paper; head 0 does not decay
With `lrpe` (LRPE-d) the weight of token s for token t is sum_j q_tj k_sj cos(theta_j (t - s)) lambda^(t-s): q and k
become [x cos(theta t), x sin(theta t)] of twice the width, theta learned, 10000^(-2j/d) at the start over all heads.
The authors use it in the first layer only: configs/linear.py.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import OperatorConfig, check_heads, head_state, split_heads
from efficient_lm.norms import SimpleRMSNorm
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class LightningConfig(OperatorConfig):
    decay: str = setting("alibi", "spectrum of the decays", choices=("alibi", "linear"))
    lrpe: bool = setting(False, "relative positions by learned angles, as in the first layer of the paper")

    def features(self, width: int) -> int:
        """Channels of q and k in the operator, of `width` channels of a head."""
        return 2 * width if self.lrpe else width


@MIXERS.register("lightning")
class Lightning(Mixer):
    Config = LightningConfig
    kernel = "linear attention, fixed decay"
    at_340M = {"n_heads": 8}
    variants = {"linear-lrpe": {"decay": "linear", "lrpe": True}}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.u = Linear(make, d, d)
        self.norm = SimpleRMSNorm(make, d, model.norm_eps)
        self.o = Linear(make, d, d)
        theta = 10000.0 ** (-2.0 * jnp.arange(d) / d).reshape(cfg.n_heads, self.width)
        self.theta = make.vector(theta) if cfg.lrpe else None
        # Kept among the parameters because it differs between layers of one scan; never trained.
        self.log_rate = make.vector(jnp.log(jnp.maximum(decay_rate(cfg, model, make.layer), 1e-9)))

    def __call__(self, x, ctx):
        inputs = self._inputs(x, ctx.positions)
        o, _ = api.linear_attention(**inputs, segment_ids=ctx.segment_ids, **self.cfg.options())
        return self._output(o, x), {}

    def _inputs(self, x, positions):
        q, k, v = (split_heads(part(x), self.cfg.n_heads) for part in (self.q, self.k, self.v))
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        if self.theta is not None:
            angles = positions[..., None, None] * self.theta[...]
            cos, sin = jnp.cos(angles).astype(q.dtype), jnp.sin(angles).astype(q.dtype)
            q, k = (jnp.concatenate([y * cos, y * sin], -1) for y in (q, k))
        log_decay = -jnp.exp(jax.lax.stop_gradient(self.log_rate[...]))
        return {"q": q, "k": k, "v": v, "log_decay": log_decay, "scale": 1.0}

    def _output(self, o, x):
        return self.o(self.norm(o.reshape(x.shape)) * self.u(x))

    def init_state(self, batch, max_len):
        return head_state(batch, self.cfg.n_heads, self.cfg.features(self.width), self.width)

    def prefill(self, x, ctx, max_len):
        inputs = self._inputs(x, ctx.positions)
        o, state = api.linear_attention(**inputs, output_final_state=True, **self.cfg.options())
        return self._output(o, x), state

    def step(self, x, state, ctx):
        o, state = api.linear_attention_step(**self._inputs(x, ctx.positions), state=state)
        return self._output(o, x), state

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        sizes = dict(T=seq_len, H=cfg.n_heads, K=cfg.features(width), V=width, decay="head")
        return dense(5 * model.d_model**2) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return 5 * model.d_model**2 + cfg.n_heads + (model.d_model if cfg.lrpe else 0)

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        return 4 * model.d_model * cfg.features(width)


def decay_rate(cfg, model, layer):
    """-log lambda of every head [H] in 0-based `layer`."""
    heads = jnp.arange(cfg.n_heads)
    if cfg.decay == "linear":
        return 8.0 * heads / cfg.n_heads * (1 - layer / model.n_layers)
    return 2.0 ** (-8.0 * (heads + 1) / cfg.n_heads) * (1 - layer / max(model.n_layers - 1, 1) + 1e-5)
