import jax
import pytest

from efficient_lm.config import from_dict, set_path
from efficient_lm.train import train

SMALL = {
    "name": "test",
    "model": {"d_model": 16, "n_layers": 2, "vocab_size": 32, "dtype": "float32"},
    "data": {"source": "zipf_markov", "vocab_size": 32, "validation_tokens": 256},
    "optim": {"lr": 0.01, "warmup": 0.2, "schedule": "cosine"},
    "train": {"steps": 12, "batch_size": 4, "seq_len": 16, "log_every": 1},
    "log": {"progress": False},
}


def small_config(**changes):
    """A run of 12 steps that takes a fraction of a second once compiled; keys are dotted paths."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALL.items()}
    for key, value in changes.items():
        set_path(values, key, value)
    return from_dict(values)


@pytest.fixture
def small():
    return small_config


@pytest.fixture
def train_one():
    """train() on one device, whatever the number of emulated ones."""

    def run(cfg, workdir, **kwargs):
        return train(cfg, workdir, **{"devices": jax.devices()[:1], **kwargs})

    return run
