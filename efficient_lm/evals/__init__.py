"""Evaluations of a trained run on its own validation data and on synthetic tasks, at any length.

python -m efficient_lm.evals --run runs/x --tasks mqar:pairs=16,needle --lengths 128,512
"""

from efficient_lm.evals.evaluate import TaskSpec, evaluate_run

__all__ = ["TaskSpec", "evaluate_run"]
