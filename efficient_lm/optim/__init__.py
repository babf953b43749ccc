"""Optimizers and learning-rate schedules: one file each, registered by importing this package."""

from efficient_lm.optim import adamw, schedules  # noqa: F401  (registers)
from efficient_lm.optim.base import OPTIMIZERS, Groups, make_optimizer
from efficient_lm.optim.schedules import SCHEDULES, make_schedule, warmup_steps

__all__ = ["OPTIMIZERS", "SCHEDULES", "Groups", "make_optimizer", "make_schedule", "warmup_steps"]
