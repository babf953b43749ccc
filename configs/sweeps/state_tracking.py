"""State tracking: parity and permutations of three things (S_3), with eigenvalues in [0, 1] and in [-1, 1].

    python -m sweeps.launch --config configs/sweeps/state_tracking.py:cpu --store runs/states
    python -m efficient_lm.evals --store runs/states --tasks word_problem --lengths 40,80,160,320 --no-validation
    python -m analysis.recall --store runs/states --out runs/states/states.html

Trained on words of 40 letters, evaluated on longer ones. By 2411.12537 a recurrence with eigenvalues in [0, 1] only
can't keep parity at every length; with beta in [0, 2] the delta rule can reflect, which is all that parity and swaps
of two things take. :cpu is parity alone, 12 cells for two cores; :gpu has both groups and more mixers, 42 cells (not
run yet).

S_3 with all six elements as letters was not learned in 1000 steps, not even with two reflections per token
(2502.10297).
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import axis, choices, product

ARCHS = {
    "attention": {"model.pattern": ("attention",)},
    "gla": {"model.pattern": ("gla",)},
    "mamba2": {"model.pattern": ("mamba2",), "model.mixers.mamba2.expand": 1.0, "model.mixers.mamba2.d_state": 16},
    "rwkv7": {"model.pattern": ("rwkv7",)},
    "deltanet [0, 1]": {"model.pattern": ("deltanet",)},
    "deltanet [0, 2]": {"model.pattern": ("deltanet",), "model.mixers.deltanet.allow_neg_eigval": True},
    "gated deltanet [0, 2]": {
        "model.pattern": ("gated_deltanet",),
        "model.mixers.gated_deltanet": {"n_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "allow_neg_eigval": True},
    },
}
TASKS = {
    "parity": {"data.task.group": "z2"},
    "S_3": {"data.task.group": "s3", "data.task.swaps": True, "train.steps": 1500},
}
PRESETS = {
    "cpu": {"archs": ["attention", "gla", "deltanet [0, 1]", "deltanet [0, 2]"], "tasks": ["parity"]},
    "gpu": {"archs": list(ARCHS), "tasks": ["parity", "S_3"]},
}
SEEDS = (0, 1, 2)


def get_config(preset="cpu"):
    preset_of(preset)
    mixers = ("attention", "gla", "mamba2", "rwkv7", "deltanet")
    return ConfigDict({
        "model": {
            "d_model": 32, "n_layers": 2, "vocab_size": 8, "dtype": "float32",
            "mixers": {name: {"n_heads": 2} for name in mixers},
            "ffns": {"dense": {"activation": "relu2", "glu": False}},
        },
        "data": {"source": "word_problem", "pack": "stream"},
        "optim": {
            "lr": 3e-3, "schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": 0.99,
            "weight_decay": 0.0,
        },
        "train": {
            "seq_len": 40, "batch_size": 64, "steps": 800, "steps_per_call": 25, "log_every": 100,
        },
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep(preset="cpu"):
    settings = preset_of(preset)
    archs = {name: ARCHS[name] for name in settings["archs"]}
    return product(
        choices("arch", archs), choices("task", {name: TASKS[name] for name in settings["tasks"]}), axis("seed", SEEDS)
    )


def preset_of(name):
    if name not in PRESETS:
        raise ConfigError(f"config = state_tracking.py:{name}: no such preset; {nearest(name, PRESETS)}")
    return PRESETS[name]
