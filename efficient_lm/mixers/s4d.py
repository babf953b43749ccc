"""S4D (2206.11893): a diagonal state space with complex states for each channel, the same at all times.

h_n <- exp(dt A_n) h_n + (exp(dt A_n) - 1) / A_n u, y = 2 Re sum_n C_n h_n + D u, over N / 2 of N conjugate pairs of
states; A = -exp(a_re) + i a_im, zero-order hold with B = 1. Output (g W_1) * sigmoid(g W_2) with g = GELU(y). At the
start A_n = -1/2 + i pi n (S4D-Lin), dt log-uniform in [1e-3, 0.1], C complex normal. Computed as a recurrence in
chunks, which packed documents can reset, and not as one long convolution.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.flops import Flops, dense
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers.base import MIXERS, Mixer
from efficient_lm.mixers.parts import BackendConfig
from efficient_lm.mixers.state_space import states_input, states_output, states_readout
from efficient_lm.schema import ConfigError, setting
from pallas_kernels import api


@dataclass(frozen=True)
class S4DConfig(BackendConfig):
    d_state: int = setting(64, "states per channel, of which conjugate pairs are stored once; even", low=2)
    chunk_size: int = setting(32, "tokens whose states are held at a time", low=1, volatile=True)


@MIXERS.register("s4d")
class S4D(Mixer):
    Config = S4DConfig
    kernel = "diagonal scan, complex"

    def __init__(self, cfg, model, make):
        d, modes = model.d_model, cfg.d_state // 2
        self.cfg = cfg
        self.log_dt = make.vector(jax.random.uniform(make.next_key(), (d,), minval=np.log(1e-3), maxval=np.log(0.1)))
        self.a_re = make.vector(jnp.full((d, modes), jnp.log(0.5)))
        self.a_im = make.vector(jnp.broadcast_to(jnp.pi * jnp.arange(modes), (d, modes)))
        # Real and imaginary parts.
        self.c = make.vector(0.5**0.5 * jax.random.normal(make.next_key(), (2, d, modes)))
        self.skip = make.vector(jax.random.normal(make.next_key(), (d,)))
        self.value = Linear(make, d, d)
        self.gate = Linear(make, d, d)

    def __call__(self, x, ctx):
        return self._forward(x, ctx.segment_ids)[0], {}

    def _forward(self, x, segment_ids=None):
        """y and the state after the last token."""
        options = {"chunk_size": self.cfg.chunk_size, "implementation": self.cfg.backend}
        y, state = states_readout(wide(x), *self.discrete(), segment_ids=segment_ids, **options)
        return self._output(y, x), state

    def discrete(self):
        """B, log A and 2 C of the recurrence in discrete time, [d, modes] complex."""
        a = jax.lax.complex(-jnp.exp(self.a_re[...]), self.a_im[...])
        log_decay = jnp.exp(self.log_dt[...])[:, None] * a
        return jnp.expm1(log_decay) / a, log_decay, 2 * jax.lax.complex(*self.c[...])

    def _output(self, y, x):
        y = y.real + self.skip[...] * wide(x)
        y = jax.nn.gelu(y).astype(x.dtype)
        return self.value(y) * jax.nn.sigmoid(self.gate(y))

    def init_state(self, batch, max_len):
        return jnp.zeros((batch, self.a_re.size), jnp.complex64)

    def prefill(self, x, ctx, max_len):
        return self._forward(x)

    def step(self, x, state, ctx):
        write, log_decay, read = self.discrete()
        h, state = api.diagonal_scan_step(states_input(wide(x), write), log_decay.reshape(-1), state)
        return self._output(states_output(h, read), x), state

    @classmethod
    def check(cls, cfg, model, path):
        if cfg.d_state % 2:
            raise ConfigError(f"{path}.d_state = {cfg.d_state}: must be even")

    @staticmethod
    def flops_per_token(cfg, model, seq_len):
        # Of each complex state: 4 multiply-adds for the recurrence, 2 for the input, 2 for the real part of the output.
        scan = 2.0 * 8 * model.d_model * cfg.d_state / 2
        return dense(2 * model.d_model**2) + Flops(scan, scan, 0.0)

    @staticmethod
    def param_count(cfg, model):
        return 2 * model.d_model**2 + model.d_model * (2 * cfg.d_state + 2)  # A, C; dt, D

    @staticmethod
    def state_bytes(cfg, model, seq_len):
        return 4 * model.d_model * cfg.d_state
