"""HGRN2 (2404.07904): S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = S_t^T q_t: GLA with keys tied to the gate.

q = SiLU(x W_q), v = x W_i, f = b + (1 - b) sigmoid(x W_f) per key channel with a lower bound b that grows with depth.
RMS norm over all heads together, no gate, output matrix. b starts at l / L in layer l of L; see `hgrn.BoundedForget`.
"""

from dataclasses import dataclass

import jax

from efficient_lm.flops import dense
from efficient_lm.layers import Linear
from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.hgrn import BoundedForget
from efficient_lm.mixers.parts import OperatorConfig, Recurrent, check_heads, head_state, split_heads
from efficient_lm.norms import RMSNorm
from pallas_kernels.flops import linear_attention_flops


@dataclass(frozen=True)
class HGRN2Config(OperatorConfig):
    pass


@MIXERS.register("hgrn2")
class HGRN2(Recurrent):
    Config = HGRN2Config
    kernel = "linear attention, decay per channel"
    at_340M = {"n_heads": 8}

    def __init__(self, cfg, model, make):
        d = model.d_model
        self.cfg, self.width = cfg, d // cfg.n_heads
        self.q = Linear(make, d, d)
        self.f = Linear(make, d, d)
        self.i = Linear(make, d, d)
        self.forget = BoundedForget(make, d)
        self.norm = RMSNorm(make, d, model.norm_eps)
        self.o = Linear(make, d, d)

    def project(self, x):
        return self.q(x), self.f(x), self.i(x)

    def inputs(self, u, x):
        q, f, v = u
        log_f, k = self.forget(f)
        arguments = {"q": jax.nn.silu(q), "k": k.astype(x.dtype), "v": v, "log_decay": log_f}
        return {name: split_heads(y, self.cfg.n_heads) for name, y in arguments.items()}

    def output(self, o, u, x):
        return self.o(self.norm(o.reshape(*x.shape[:-1], -1)))

    def memory(self, batch):
        return head_state(batch, self.cfg.n_heads, self.width, self.width)

    @classmethod
    def check(cls, cfg, model, path):
        check_heads(cfg, path, d_model=model.d_model)

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        width = model.d_model // cfg.n_heads
        sizes = dict(T=seq_len, H=cfg.n_heads, K=width, V=width, decay="channel")
        return dense(4 * model.d_model**2) + cfg.flops(linear_attention_flops, **sizes)

    @staticmethod
    def param_count(cfg, model):
        return 4 * model.d_model**2 + 2 * model.d_model

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model**2 // cfg.n_heads
