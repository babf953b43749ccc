"""Emergence of massive activations (2402.17762, 2508.03616): sizes of one baseline, and interventions at one size.

    python -m sweeps.launch --config configs/sweeps/massive_activations.py:cpu --store runs/massive --workers 2
    python -m analysis.massive_activations --store runs/massive --svg runs/massive/
    python -m analysis.massive_activations --store analysis/results/massive_activations/gpu.jsonl --svg out_  # no runs

Every cell carries the probes of configs/interventions.py, and every row of text begins with the same token, on which
attention sinks and massive activations are reported to gather (2410.10781, 2410.13835). Axes: size, intervention, seed;
the interventions include what is said to make or unmake both (CAUSES).

:cpu            two CPU cores: 4 layers x 32, 6 x 48 and 8 x 64, 400 steps of 8 x 128 bytes; interventions at 6 x 48
:gpu            one GPU: 6 layers x 128, 8 x 256 and 12 x 384, 10000 steps of 16 x 256 bytes of prepared data, and
                gated attention at 8 x 256; on an H200 some 20, 41 and 70 s a cell
:interventions  one GPU: all interventions at 8 x 256, 4000 steps, 17 s a cell; all at the baseline's learning rate,
                twice which makes sigma-reparam worse (training loss 1.198 instead of 1.168 after 1600 steps)
"""

from ml_collections import ConfigDict

from configs.interventions import ATTENTION, INTERVENTIONS, base
from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell

CPU = {"small": (4, 32), "middle": (6, 48), "large": (8, 64)}
GPU = {"small": (6, 128), "middle": (8, 256), "large": (12, 384)}
STEPS = {"cpu": 400, "gpu": 10000, "interventions": 4000}
LENGTHS = {"cpu": 128, "gpu": 256, "interventions": 256}
LR = 0.5  # times 1 / width
SEEDS = (0, 1)
# The first token, effective optimisation and weight decay (2410.10781), wide heads (2603.05498); and a learning rate
# for gains that move by one rate a step. `lr` and `heads` are factors on those of the size.
CAUSES = {
    "no_bos": {"data.pack": "stream"},
    "double_lr": {"lr": 2},
    "no_decay": {"optim.weight_decay": 0.0},
    "narrow_heads": {"heads": 4},
    "sigma_reparam_double_lr": INTERVENTIONS["sigma_reparam"] | {"lr": 2},
}


def get_config(preset="cpu"):
    check(preset)
    values = base()
    values["model"]["vocab_size"] = 264  # 256 bytes and the first token of a row, in a multiple of 8
    values["data"]["pack"] = "bos"
    values["train"] |= {"steps": STEPS[preset], "seq_len": LENGTHS[preset]}
    if preset == "cpu":
        values["model"]["dtype"] = "float32"
        values["train"] |= {"batch_size": 8, "steps_per_call": 25}
        values["probes"]["every"] = 20
        return ConfigDict(values)
    values["data"] |= {"source": "prepared", "path": "data/prepared"}
    values["train"]["batch_size"] = 16
    values["probes"]["every"] = 200 if preset == "gpu" else 100
    return ConfigDict(values)


def get_sweep(preset="cpu"):
    check(preset)
    named = {name: dict(settings) for name, settings in (INTERVENTIONS | CAUSES).items()}
    named["clipped_softmax"][ATTENTION + "weights_length"] = LENGTHS[preset]
    sizes = CPU if preset == "cpu" else GPU
    once = [("middle", name) for name in named]
    if preset == "cpu":
        once = [(size, "baseline") for size in sizes if size != "middle"] + once
    elif preset == "gpu":
        once = [(size, "baseline") for size in sizes] + [("middle", "gated_attention")]
    return [cell(size, sizes[size], name, named[name], seed) for seed in SEEDS for size, name in once]


def cell(size: str, shape: tuple, intervention: str, settings: dict, seed: int) -> Cell:
    """Heads of 64 channels (16 in narrow models); the learning rate falls with the width."""
    (layers, width), settings = shape, dict(settings)
    heads = width // (64 if width >= 128 else 16) * settings.pop("heads", 1)
    rate = LR / width * settings.pop("lr", 1)
    values = {"model.n_layers": layers, "model.d_model": width, ATTENTION + "n_heads": heads, "optim.lr": rate}
    axes = {"size": size, "intervention": intervention, "n_layers": layers, "d_model": width, "seed": seed}
    return Cell(values | settings | {"seed": seed}, axes)


def check(preset):
    if preset not in STEPS:
        raise ConfigError(f"config = massive_activations.py:{preset}: no such preset; {nearest(preset, STEPS)}")
