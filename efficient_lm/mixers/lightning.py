"""Lightning attention of TransNormerLLM (2307.14995, 2401.04658): S_t = lambda S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

SiLU on q and k; one fixed decay per head and layer; RMS norm without weights over all heads together, product with
u = x W_u, output matrix. Of the two decay spectra in use, with layer l of L and head h of H counted from 0,
  alibi   -log lambda = 2^(-8 (h+1) / H) (1 - l / (L-1) + 1e-5)    the authors' code
  linear  -log lambda = (8 h / H) (1 - l / L)                      the paper; head 0 does not decay
Learned rotations (LRPE), which the authors use in the first layer only, are left out.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import OperatorConfig, Recurrent, check_heads, head_state, rms, split_heads
from efficient_lm.schema import setting
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class LightningConfig(OperatorConfig):
    decay: str = setting("alibi", "spectrum of the decays", choices=("alibi", "linear"))


@MIXERS.register("lightning")
class Lightning(Recurrent):
    Config = LightningConfig
    kernel = "linear attention, fixed decay"
    at_340M = {"n_heads": 8}
    variants = {"linear": {"decay": "linear"}}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width, self.eps = cfg, d // cfg.n_heads, model.norm_eps
        self.q = Linear(make, d, d)
        self.k = Linear(make, d, d)
        self.v = Linear(make, d, d)
        self.u = Linear(make, d, d)
        self.o = Linear(make, d, d)
        # Kept among the parameters because it differs between layers of one scan; never trained.
        self.log_rate = make.vector(jnp.log(jnp.maximum(decay_rate(cfg, model, make.layer), 1e-9)))

    def project(self, x):
        return jax.nn.silu(self.q(x)), jax.nn.silu(self.k(x)), self.v(x)

    def inputs(self, u, x):
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in u)
        log_decay = -jnp.exp(jax.lax.stop_gradient(self.log_rate[...]))
        return {"q": q, "k": k, "v": v, "log_decay": log_decay, "scale": 1.0}

    def output(self, o, u, x):
        o = rms(o.reshape(*x.shape[:-1], -1), self.eps)
        return self.o(o * self.u(x))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.width, self.width)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        sizes = dict(T=seq_len, H=cfg.n_heads, K=width, V=width, decay="head")
        return dense(5 * model.d_model**2) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return 5 * model.d_model**2 + cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model**2 // cfg.n_heads


def decay_rate(cfg, model, layer):
    """-log lambda of every head [H] in 0-based `layer`."""
    heads = jnp.arange(cfg.n_heads)
    if cfg.decay == "linear":
        return 8.0 * heads / cfg.n_heads * (1 - layer / model.n_layers)
    return 2.0 ** (-8.0 * (heads + 1) / cfg.n_heads) * (1 - layer / max(model.n_layers - 1, 1) + 1e-5)
