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
from sweeps.combine import Cell, axis, chain, choices, product

# Keys and values of all heads together are as wide as the model, so that the state falls as 1 / heads.
MIXERS = {
    "linear_attention": {},
    "gla": {"expand_k": 1.0},
    "mamba2": {"expand": 1.0},
    "deltanet": {},
    "gated_deltanet": {"expand_k": 1.0, "expand_v": 1.0},
    "rwkv7": {},
}
PRESETS = {
    "cpu": {"mixers": ["linear_attention", "gla", "deltanet"], "heads": [8, 4, 2]},
    "gpu": {"mixers": list(MIXERS), "heads": [8, 4, 2, 1]},
}
WIDTH, SEEDS = 32, (0, 1, 2)


def get_config(preset="cpu"):
    preset_of(preset)
    return ConfigDict({
        "model": {
            "d_model": WIDTH, "n_layers": 2, "prefix": ("short_conv",), "vocab_size": 32, "dtype": "float32",
            "ffns": {"dense": {"activation": "relu2", "glu": False}},
        },
        "data": {"source": "mqar", "task": {"pairs": 8}, "vocab_size": 32, "pack": "stream"},
        "optim": {
            "lr": 3e-3, "schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "weight_decay": 0.0,
        },
        "train": {
            "seq_len": 32, "batch_size": 64, "steps": 1500, "steps_per_call": 25, "log_every": 100,
        },
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep(preset="cpu"):
    settings = preset_of(preset)
    attention = choices("arch", {"attention": {"model.pattern": ("attention",), "model.mixers.attention.n_heads": 2}})
    linear = [cell(mixer, heads) for mixer in settings["mixers"] for heads in settings["heads"]]
    return product(chain(attention, linear), axis("seed", SEEDS))


def cell(mixer, heads):
    values = {"n_heads": heads, **MIXERS[mixer]}
    if mixer == "mamba2":
        values["d_state"] = WIDTH // heads
    return Cell({"model.pattern": (mixer,), f"model.mixers.{mixer}": values}, {"arch": mixer, "heads": heads})


def preset_of(name):
    if name not in PRESETS:
        raise ConfigError(f"config = recall.py:{name}: no such preset; {nearest(name, PRESETS)}")
    return PRESETS[name]
