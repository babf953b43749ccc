"""Recall against state: mixers x widths x seeds on multi-query associative recall (MQAR, 2312.04927).

    python -m sweeps.launch --config configs/sweeps/recall.py:cpu --store runs/recall
    python -m analysis.recall --store runs/recall --out runs/recall/recall.html

16 pairs in 64 tokens, 31 keys, 32 values. Each model is a gated short convolution, which brings key and value together,
and one layer of the mixer. Expected: softmax attention answers everything; the delta rule needs a tenth of the state
that linear attention needs (it removes what it overwrites); decay without the delta rule is no better than none.
:cpu is 36 cells for two cores, :gpu 84 cells for one GPU with 8 workers.
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import axis, choices, product

# What all mixers have in common: two heads whose keys and values together have the width of the model.
MIXERS = {
    "attention": {},
    "linear_attention": {},
    "gla": {"expand_k": 1.0},
    "mamba2": {"expand": 1.0},
    "deltanet": {},
    "gated_deltanet": {"expand_k": 1.0, "expand_v": 1.0},
    "rwkv7": {},
}
PRESETS = {
    "cpu": {"mixers": ["attention", "linear_attention", "gla", "deltanet"], "widths": [16, 32, 64]},
    "gpu": {"mixers": list(MIXERS), "widths": [16, 32, 64, 128]},
}
SEEDS = (0, 1, 2)


def get_config(preset="cpu"):
    preset_of(preset)
    return ConfigDict({
        "model": {
            "n_layers": 2, "prefix": ("short_conv",), "vocab_size": 64, "dtype": "float32",
            "ffns": {"dense": {"activation": "relu2", "glu": False}},
        },
        "data": {"source": "mqar", "task": {"pairs": 16}, "vocab_size": 64, "pack": "stream"},
        "optim": {
            "lr": 3e-3, "schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": 0.99,
            "weight_decay": 0.0,
        },
        "train": {
            "seq_len": 64, "batch_size": 64, "steps": 1000, "steps_per_call": 25, "log_every": 100,
        },
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep(preset="cpu"):
    settings = preset_of(preset)
    archs = {
        name: {"model.pattern": (name,), f"model.mixers.{name}": {"n_heads": 2, **MIXERS[name]}}
        for name in settings["mixers"]
    }
    cells = product(choices("arch", archs), axis("model.d_model", settings["widths"]), axis("seed", SEEDS))
    return [with_state(cell) for cell in cells]


def with_state(cell):
    """Mamba-2 has a state of `d_state` channels for each channel: as many as a head of the others has keys."""
    if cell.axes["arch"] == "mamba2":
        return cell | type(cell)({"model.mixers.mamba2.d_state": cell.axes["d_model"] // 2})
    return cell


def preset_of(name):
    if name not in PRESETS:
        raise ConfigError(f"config = recall.py:{name}: no such preset; {nearest(name, PRESETS)}")
    return PRESETS[name]
