"""IsoFLOP sweep of two architectures from a budget, on GPUs or on CPU: compute budgets that fit the time you have.

    python -m sweeps.plan   --config configs/sweeps/isoflop.py --calibrate --budget "2 gpu-hours"
    python -m sweeps.launch --config configs/sweeps/isoflop.py --budget "2 gpu-hours" --store runs/isoflop
    python -m analysis.report --store runs/isoflop --out runs/isoflop/report.html

The variant `:bf16` computes in bfloat16, `:step_law` takes learning rate and batch size from 2503.04715.
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.isoflop import IsoFlop, Ladder
from sweeps.rules import BATCH_RULES, LR_RULES, constant, inverse_width

SEQ_LEN = 256

# (layers, width): depth grows with the square root of the width, about 64 channels per head.
SHAPES = [
    (1, 16), (2, 16), (2, 24), (2, 32), (2, 48), (2, 64), (3, 64), (3, 96), (4, 96), (4, 128), (5, 128), (5, 160),
    (6, 192), (7, 256), (8, 320), (9, 384), (10, 448), (10, 512), (12, 640), (13, 768), (15, 896), (16, 1024),
    (18, 1280), (20, 1536),
]  # fmt: skip


VARIANTS = ("float32", "bf16", "step_law")


def get_config(variant="float32"):
    if variant not in VARIANTS:
        raise ConfigError(f"config = isoflop.py:{variant}: no such variant; {nearest(variant, VARIANTS)}")
    return ConfigDict({
        "model": {"dtype": "bfloat16" if variant == "bf16" else "float32"},
        "data": {"source": "sotu"},
        "optim": {"schedule": "wsd", "warmup": 0.05, "decay": 0.3, "final_lr": 0.0, "beta2": 0.99},
        "train": {"seq_len": SEQ_LEN, "batch_size": 16, "steps_per_call": 16, "log_every": 64},
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep(variant="float32"):
    published = variant == "step_law"
    return IsoFlop(
        archs={"attention": {"model.pattern": ("attention",)}, "gla": {"model.pattern": ("gla",)}},
        shapes=[shape(layers, width) for layers, width in SHAPES],
        budgets=Ladder(top=3e13, count=5, ratio=3.0),
        points=6,
        tokens_per_parameter=(3.0, 300.0),
        # Near the optimum at width 32 with batches of 512 tokens; check it with a small sweep before large runs.
        lr=LR_RULES["step_law"] if published else inverse_width(0.2),
        batch=BATCH_RULES["step_law"] if published else constant(16 * SEQ_LEN),
    )


def shape(layers, width):
    heads = max(2, width // 64)
    return {
        "model.n_layers": layers,
        "model.d_model": width,
        "model.mixers.attention.n_heads": heads,
        "model.mixers.gla.n_heads": heads,
    }
