"""ProSparse (2402.13516): the dense FFN with a growing L1 penalty on its hidden activations.

The loss gets, for each layer, lambda(step) * mean over tokens of ||h||_1, where the down projection reads h. Lambda
is constant in the first stage; in each later one it rises from the last value to the next along half a sine. The count
of steps is part of the parameters (role 'state'), so that it is stored with them and survives a resume. After training,
a threshold (activation 'fatrelu:t') takes out what is left near 0: `python -m efficient_lm.sparsity --methods fatrelu`.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from efficient_lm.ffn.base import FFNS
from efficient_lm.ffn.dense import Dense, DenseConfig
from efficient_lm.layers import wide
from efficient_lm.schema import ConfigError, setting


@dataclass(frozen=True)
class ProSparseConfig(DenseConfig):
    l1: tuple[float, ...] = setting((), "penalty at the end of each stage, the first stage constant", low=0.0)
    l1_steps: tuple[int, ...] = setting((), "the step at which each stage ends", low=1)


@FFNS.register("prosparse")
class ProSparse(Dense):
    Config = ProSparseConfig

    def __init__(self, cfg, model, make):
        super().__init__(cfg, model, make)
        self.cfg = cfg
        self.l1_step = make.state(0.0) if cfg.l1 else None

    def __call__(self, x, ctx):
        hidden = self.hidden(x)
        aux = {}
        if self.l1_step is not None and ctx is not None:
            real = jnp.ones(x.shape[:2]) if ctx.segment_ids is None else (ctx.segment_ids > 0).astype(jnp.float32)
            tokens = jnp.maximum(jnp.sum(real), 1.0)
            norm = jnp.sum(jnp.sum(jnp.abs(wide(hidden)), axis=-1) * real) / tokens
            active = jnp.sum(jnp.mean(hidden != 0, axis=-1, dtype=jnp.float32) * real) / tokens
            scale = coefficient(self.cfg, self.l1_step[...])
            aux = {"hidden_l1_loss": scale * norm, "hidden_l1": norm, "hidden_active": active, "l1_coefficient": scale}
            aux["observed"] = {"tokens": tokens}
        return self.down(hidden), aux

    @staticmethod
    def next_state(cfg, params, observed, progress):
        return params | {"l1_step": params["l1_step"] + 1.0}

    @classmethod
    def check(cls, cfg, model, path):
        super().check(cfg, model, path)
        if len(cfg.l1) != len(cfg.l1_steps):
            raise ConfigError(f"{path}.l1_steps = {cfg.l1_steps}: must have one step for each of l1 = {cfg.l1}")
        if list(cfg.l1_steps) != sorted(set(cfg.l1_steps)):
            raise ConfigError(f"{path}.l1_steps = {cfg.l1_steps}: must rise")


def coefficient(cfg: ProSparseConfig, step):
    """lambda at a step that counts from 0; constant after the last stage."""
    value = cfg.l1[0]
    for i in range(1, len(cfg.l1)):
        begin, end = cfg.l1_steps[i - 1 : i + 1]
        progress = jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
        value += (cfg.l1[i] - cfg.l1[i - 1]) * 0.5 * (1.0 + jnp.sin(jnp.pi * (progress - 0.5)))
    return jnp.asarray(value, jnp.float32)
