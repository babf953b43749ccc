"""Transformer (softmax attention + gated FFN), the baseline of every comparison.

    python -m efficient_lm.train --config configs/dense.py:tiny --workdir runs/dense_tiny

:tiny   bytes of State of the Union addresses; 45 s on two CPU cores, validation loss 1.538 nats per byte
:small  the same text with a 3M-parameter model; a minute or two on a GPU (3.8M tokens/s on an H100)
:340M   shape of the 340M models in the linear-attention literature (2406.06484); needs prepared data
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest


def get_config(arg="tiny"):
    """`arg` is one of the variants above."""
    variants = {"tiny": tiny, "small": small, "340M": large}
    if arg not in variants:
        raise ConfigError(f"config variant {arg!r}: {nearest(arg, variants)}")
    return ConfigDict(variants[arg]())


def tiny():
    return {
        "name": "dense-tiny",
        "model": {"d_model": 64, "n_layers": 2, "dtype": "float32"},
        "data": {"source": "sotu", "pack": "stream"},
        "optim": {"lr": 0.01, "schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0},
        "train": {"steps": 1000, "batch_size": 8, "seq_len": 128, "eval_every": 250, "checkpoint_every": 250},
    }


def small():
    return {
        "name": "dense-small",
        "model": {"d_model": 256, "n_layers": 4},
        "data": {"source": "sotu", "pack": "stream"},
        "optim": {"lr": 0.003, "schedule": "wsd", "warmup": 0.02},
        "train": {"steps": 4000, "batch_size": 64, "seq_len": 256, "eval_every": 500, "checkpoint_every": 500},
    }


def large():
    return {
        "name": "dense-340M",
        "model": {"d_model": 1024, "n_layers": 24, "vocab_size": 32000, "mixers": {"attention": {"n_heads": 16}}},
        "data": {"source": "prepared", "path": "data/prepared"},
        "optim": {"lr": 3e-4, "schedule": "cosine", "warmup": 0.02},
        # 8 sequences at a time fill an 80 GB GPU.
        "train": {
            **{"steps": 28672, "batch_size": 256, "grad_accum": 32, "seq_len": 2048},
            **{"eval_every": 2000, "checkpoint_every": 1000},
        },
    }
