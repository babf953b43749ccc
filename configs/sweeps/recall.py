"""Recall against state: mixers x state sizes x seeds on multi-query associative recall (MQAR, 2312.04927).

    python -m sweeps.launch --config configs/sweeps/recall.py:cpu --store runs/recall
    python -m analysis.recall --store runs/recall --out runs/recall/recall.html
    python -m analysis.recall --store analysis/results/recall/*.jsonl --out recall.html     # from stored rows, no runs

Each model is a gated short convolution, which brings key and value together, and one layer of the mixer.
:cpu    16 pairs in 64 tokens, 31 keys; the width of the model sets the state; 36 cells for two cores
:heads  8 pairs in 32 tokens, 15 keys, 32 wide; the number of heads sets the state; 30 cells for two cores
:gpu    as :cpu with more mixers and widths, 84 cells for one GPU with 8 workers (not run yet)

What came out (analysis/results/recall): softmax attention answers everything from width 32 on. With 16 pairs the delta
rule leaves linear attention far behind at equal state, but seeds differ by when they leave the plateau of guessing
among the values of the row, and some never do. With 8 pairs linear attention learns too.
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell, axis, product

# Two heads unless said otherwise; keys and values of all heads together are as wide as the model.
MIXERS = {
    "attention": {},
    "linear_attention": {},
    "gla": {"expand_k": 1.0},
    "mamba2": {"expand": 1.0},
    "deltanet": {},
    "gated_deltanet": {"expand_k": 1.0, "expand_v": 1.0},
    "rwkv7": {},
}
SMALL = ["attention", "linear_attention", "gla", "deltanet"]
SHAPES = {
    "cpu": [(mixer, width, 2) for mixer in SMALL for width in (16, 32, 64)],
    "heads": [(mixer, 32, heads) for mixer in SMALL for heads in (8, 4, 2) if mixer != "attention" or heads == 2],
    "gpu": [(mixer, width, 2) for mixer in MIXERS for width in (16, 32, 64, 128)],
}
SEEDS = (0, 1, 2)


def get_config(preset="cpu"):
    check(preset)
    pairs, tokens, steps, beta2 = (8, 32, 1500, 0.95) if preset == "heads" else (16, 64, 1000, 0.99)
    return ConfigDict({
        "model": {
            "n_layers": 2, "prefix": ("short_conv",), "vocab_size": tokens, "dtype": "float32",
            "ffns": {"dense": {"activation": "relu2", "glu": False}},
        },
        "data": {"source": "mqar", "task": {"pairs": pairs}, "vocab_size": tokens, "pack": "stream"},
        "optim": {
            "lr": 3e-3, "schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": beta2,
            "weight_decay": 0.0,
        },
        "train": {
            "seq_len": tokens, "batch_size": 64, "steps": steps, "steps_per_call": 25, "log_every": 100,
        },
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep(preset="cpu"):
    check(preset)
    return product([cell(*shape) for shape in SHAPES[preset]], axis("seed", SEEDS))


def cell(mixer, width, heads):
    values = {"n_heads": heads, **MIXERS[mixer]}
    if mixer == "mamba2":
        values["d_state"] = width // heads  # as many as a head of the others has keys
    return Cell(
        {"model.pattern": (mixer,), "model.d_model": width, f"model.mixers.{mixer}": values},
        {"arch": mixer, "d_model": width, "heads": heads},
    )


def check(preset):
    if preset not in SHAPES:
        raise ConfigError(f"config = recall.py:{preset}: no such preset; {nearest(preset, SHAPES)}")
