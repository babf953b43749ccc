"""Learning-rate schedules, evaluated on the host so that runs of one shape share a compiled program.

A schedule is `shape(cfg, step, start, steps)` -> share of the peak: step counts from 0, `start` is the first step after
warm-up, `steps` the length of the run. Warm-up is common to all: step s < start has (s + 1) / start of the peak.
"""

import math

from efficient_lm.registry import Registry

SCHEDULES = Registry("schedule")


def make_schedule(cfg, steps: int):
    """step -> learning rate, from an OptimConfig. Raises ConfigError."""
    shape = SCHEDULES.find(cfg.schedule, "config.optim.schedule")
    warmup = warmup_steps(cfg, steps)

    def schedule(step: int) -> float:
        return cfg.lr * ((step + 1) / warmup if step < warmup else shape(cfg, step, warmup, steps))

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
    return 1.0


@SCHEDULES.register("cosine")
def cosine(cfg, step, start, steps):
    """Half a cosine from 1 to final_lr (1608.03983)."""
    return cfg.final_lr + (1.0 - cfg.final_lr) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, start, steps)))


@SCHEDULES.register("linear")
def linear(cfg, step, start, steps):
    """1, then a straight line to final_lr over the last `decay` of the run."""
    return 1.0 - (1.0 - cfg.final_lr) * _progress(step, steps - share(cfg.decay, steps), steps)


@SCHEDULES.register("wsd")
def wsd(cfg, step, start, steps):
    """Warmup-stable-decay (2404.06395): 1, then 1 - sqrt(progress) to final_lr over the last `decay` (2405.18392)."""
    return 1.0 - (1.0 - cfg.final_lr) * math.sqrt(_progress(step, steps - share(cfg.decay, steps), steps))


def _progress(step, begin, end):
    return min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
