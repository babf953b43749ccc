"""mLSTM (2405.04517) in the layout of xLSTM-7B (2503.13427): matrix memory with one input and forget gate per head.

C_t = f C_{t-1} + i k_t v_t^T, n_t = f n_{t-1} + i k_t, o_t = C_t^T q / max(|n_t . q|, 1), q scaled by 1/sqrt(K),
f = sigmoid. i = exp, or sigmoid without the normaliser n (2503.14376). Both gate logits are linear in x with a bias and
capped, 15 tanh(z / 15). RMS norm per head, gate sigmoid(x W_g), output matrix. Keys have half the width of values.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_lm.flops import dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.parts import HeadNorm, OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.schema import setting
from pallas_kernels import api
from pallas_kernels.flops import mlstm_flops
from pallas_kernels.steps import NO_STABILISER


@dataclass(frozen=True)
class MLSTMConfig(OperatorConfig):
    input_gate: str = setting("exp", "activation of the input gate", choices=("exp", "sigmoid"))
    expand_k: float = setting(0.5, "key channels of all heads, as a multiple of d_model", low=0.0)
    gate_cap: float = setting(15.0, "soft cap c tanh(z / c) of the gate logits", low=1e-3)

    def key_width(self, d_model: int) -> int:
        """Key channels of all heads."""
        return round(d_model * self.expand_k)


@MIXERS.register("mlstm")
class MLSTM(Recurrent):
    Config = MLSTMConfig
    kernel = "mLSTM: linear attention, decay per token"
    variants = {"sigmoid": {"input_gate": "sigmoid", "n_heads": 2}}
    operator = staticmethod(api.mlstm)
    operator_step = staticmethod(api.mlstm_step)

    def __init__(self, cfg, model, make):
        d, d_k, heads = model.d_model, cfg.key_width(model.d_model), cfg.n_heads
        self.cfg, self.sizes = cfg, (heads, d_k // heads, d // heads)
        self.q = Linear(make, d, d_k)
        self.k = Linear(make, d, d_k)
        self.v = Linear(make, d, d)
        # Gates start without dependence on x: input gates near 1, forget gates between sigmoid(3) and sigmoid(6).
        self.gates = Linear(make, d, 2 * heads, scale=0.0)
        self.input_bias = make.vector(0.1 * jax.random.normal(make.next_key(), (heads,)))
        self.forget_bias = make.vector(jnp.linspace(3.0, 6.0, heads))
        self.gate = Linear(make, d, d)
        self.norm = HeadNorm(make, d // heads, model.norm_eps)
        self.o = Linear(make, d, d)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def inputs(self, u, x):
        cap = self.cfg.gate_cap
        q, k, v = (split_heads(part, self.cfg.n_heads) for part in u)
        i, f = jnp.split(wide(self.gates(x)), 2, -1)
        gates = {"input_gate": i + self.input_bias[...], "forget_gate": f + self.forget_bias[...]}
        gates = {name: cap * jnp.tanh(z / cap) for name, z in gates.items()}
        return {"q": q, "k": k, "v": v, "input_activation": self.cfg.input_gate, **gates}

    def output(self, o, u, x):
        return self.o(self.norm(o, x) * jax.nn.sigmoid(self.gate(x)))

    def memory(self, batch):
        c = head_state(batch, *self.sizes)
        if self.cfg.input_gate == "sigmoid":
            return c
        return c, c[..., 0], jnp.full(c.shape[:2], NO_STABILISER, jnp.float32)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model, **{"expand_k x d_model": cfg.key_width(model.d_model)})

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        d, d_k, heads = model.d_model, cfg.key_width(model.d_model), cfg.n_heads
        sizes = dict(T=seq_len, H=heads, K=d_k // heads, V=d // heads, input_activation=cfg.input_gate)
        return dense(_matrices(cfg, model)) + cfg.flops(mlstm_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return _matrices(cfg, model) + 2 * cfg.n_heads + model.d_model // cfg.n_heads

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        d, d_k, heads = model.d_model, cfg.key_width(model.d_model), cfg.n_heads
        normaliser = d_k + heads if cfg.input_gate == "exp" else 0
        return 4 * (d * d_k // heads + normaliser)


def _matrices(cfg, model) -> int:
    d = model.d_model
    return d * (2 * cfg.key_width(d) + 3 * d + 2 * cfg.n_heads)
