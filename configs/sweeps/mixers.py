"""Every registered mixer at the same training FLOPs: the short-run losses of docs/mixers.md.

    python -m sweeps.launch --config configs/sweeps/mixers.py --store runs/mixers
    python -m efficient_lm.mixers --runs runs/mixers

Each mixer in the model of configs/mixers.py:MIXER-tiny (parameters matched to the transformer within 3 %), on bytes of
real text, for as many steps as cost what 400 of the transformer do. Two learning rates, since one does not suit all.
The argument is the number of seeds (default 1).
"""

from ml_collections import ConfigDict

from configs import mixers
from efficient_lm.config import from_dict
from efficient_lm.counting import count_flops
from efficient_lm.mixers import MIXERS
from efficient_lm.schema import ConfigError
from sweeps.combine import Cell, axis, product

LEARNING_RATES = (0.003, 0.01)
TRANSFORMER_STEPS = 400


def get_config(arg="1"):
    """What all cells start from; their own mixer comes by `get_sweep`."""
    return ConfigDict(mixers.get_config("attention-tiny"))


def get_sweep(arg="1"):
    """`arg` is the number of seeds."""
    if not arg.isdigit() or int(arg) < 1:
        raise ConfigError(f"config = mixers.py:{arg}: must be the number of seeds, 1 or more")
    budget = step_flops("attention") * TRANSFORMER_STEPS
    cells = [cell(mixer, round(budget / step_flops(mixer))) for mixer in sorted(MIXERS)]
    return product(cells, axis("optim.lr", LEARNING_RATES), axis("seed", range(int(arg))))


def cell(mixer, steps):
    """One mixer for `steps` steps, in calls of 25 and without evaluations on the way."""
    train = {"steps": steps, "steps_per_call": 25, "log_every": 100, "eval_every": 0, "checkpoint_every": 0}
    overrides = {f"train.{name}": value for name, value in train.items()}
    return Cell(overrides | {"log.progress": False}, {"mixer": mixer}, f"configs/mixers.py:{mixer}-tiny")


def step_flops(mixer) -> float:
    """Training FLOPs (model_causal) of one step."""
    config = from_dict(mixers.get_config(f"{mixer}-tiny"))
    return count_flops(config)["model_causal"] * config.train.batch_size * config.train.seq_len
