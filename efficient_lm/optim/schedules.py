"""Learning-rate schedules. Each gives the share of the peak after warm-up.

A schedule is `shape(cfg, step, start, steps)`: step counts from 0, `start` is the first step after warm-up, `steps`
the length of the run. Warm-up itself is common: step s < start has (s + 1) / start of the peak.
"""

import jax.numpy as jnp

from efficient_lm.registry import Registry

SCHEDULES = Registry("schedule")


def make_schedule(cfg, steps: int):
    """step (int array) -> learning rate (float32), from an OptimConfig. Raises ConfigError."""
    shape = SCHEDULES.find(cfg.schedule, "config.optim.schedule")
    warmup = warmup_steps(cfg, steps)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1.0) / max(warmup, 1)
        return cfg.lr * jnp.where(step < warmup, rising, shape(cfg, step, warmup, steps))

    return schedule


def warmup_steps(cfg, steps: int) -> int:
    """Steps with rising learning rate."""
    return share(cfg.warmup, steps)


def share(fraction: float, steps: int) -> int:
    """Whole steps in a share of the run; at least one when the share isn't 0."""
    return max(1, round(fraction * steps)) if fraction else 0


@SCHEDULES.register("constant")
def constant(cfg, step, start, steps):
    """1 until the end."""
    return jnp.ones_like(step)


@SCHEDULES.register("cosine")
def cosine(cfg, step, start, steps):
    """Half a cosine from 1 to final_lr (1608.03983)."""
    progress = _progress(step, start, steps)
    return cfg.final_lr + (1.0 - cfg.final_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


@SCHEDULES.register("linear")
def linear(cfg, step, start, steps):
    """1, then a straight line to final_lr over the last `decay` of the run."""
    return 1.0 - (1.0 - cfg.final_lr) * _progress(step, steps - share(cfg.decay, steps), steps)


@SCHEDULES.register("wsd")
def wsd(cfg, step, start, steps):
    """Warmup-stable-decay (2404.06395): 1, then 1 - sqrt(progress) to final_lr over the last `decay` (2405.18392)."""
    return 1.0 - (1.0 - cfg.final_lr) * jnp.sqrt(_progress(step, steps - share(cfg.decay, steps), steps))


def _progress(step, begin, end):
    return jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
