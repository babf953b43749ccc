"""Activation sparsity against tokens, size and width/depth ('Sparsing Law', 2411.02335): gated FFNs with ReLU and SiLU.

    python -m sweeps.launch --config configs/sweeps/sparsing_law.py:cpu --store runs/sparsing
    python -m efficient_lm.sparsity --store runs/sparsing --out rows.jsonl --methods cett --checkpoints 12
    python -m analysis.sparsity --rows rows.jsonl --svg sparsity_

As published where it can be: FFNs 2.5 times as wide as the model, muP, a constant learning rate (checkpoints of the
stable phase of WSD), one width/depth for all sizes. Then a line of ReLU models of about one size with other
width/depths. Checkpoints are all kept; which of them are measured is an option of the second command.

:cpu    three sizes up to 0.3M parameters in blocks, 0.6M tokens of the embedded text, three seeds; minutes on two cores
:gpu    three sizes up to 2.5M, 41M tokens of prepared text, three seeds; 30 cells for one GPU
        (`--where "seed == 0"` first, where time may run out)
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell, chain, choices, product

ACTIVATIONS = {name: {"model.ffns.dense.activation": name} for name in ("relu", "silu")}
# (width, layers): three sizes of one width/depth, then other width/depths at about the parameters of the second.
SIZES = {
    "cpu": [(32, 1), (64, 2), (96, 3)],
    "gpu": [(96, 3), (128, 4), (192, 6)],
}
LINE = {
    "cpu": [(88, 1), (44, 4), (32, 8)],
    "gpu": [(256, 1), (184, 2), (92, 8), (64, 16)],
}
HEADS = {88: 2, 44: 2, 92: 2, 184: 4}  # else one for each 32 channels
SEEDS = (0, 1, 2)
TRAIN = {
    "cpu": {"seq_len": 128, "batch_size": 8, "steps": 600, "steps_per_call": 30, "checkpoint_every": 30},
    "gpu": {"seq_len": 256, "batch_size": 64, "steps": 2500, "steps_per_call": 50, "checkpoint_every": 100},
}


def get_config(preset="cpu"):
    check(preset)
    values = {
        "model": {
            "parametrization": "mup", "base_width": 64, "dtype": "float32" if preset == "cpu" else "bfloat16",
            "ffns": {"dense": {"expansion": 2.5}},
        },
        "data": {"source": "sotu", "pack": "stream"},
        "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0.02},
        "train": {**TRAIN[preset], "log_every": 50, "keep_checkpoints": 0},
        "log": {"progress": False},
    }  # fmt: skip
    if preset == "gpu":
        values["data"] |= {"source": "prepared", "path": "data/prepared"}
    return ConfigDict(values)


def get_sweep(preset="cpu"):
    check(preset)
    seeds = [Cell({"seed": seed}) for seed in SEEDS]
    sizes = product(choices("arch", ACTIVATIONS), [shape(*size) for size in SIZES[preset]])
    line = product(choices("arch", {"relu": ACTIVATIONS["relu"]}), [shape(*size) for size in LINE[preset]])
    return product(seeds, chain(sizes, line))


def shape(width: int, layers: int) -> Cell:
    heads = HEADS.get(width, max(1, width // 32))
    settings = {"model.d_model": width, "model.n_layers": layers, "model.mixers.attention.n_heads": heads}
    return Cell(settings, {"ratio": width / layers})


def check(preset):
    if preset not in TRAIN:
        raise ConfigError(f"config = sparsing_law.py:{preset}: no such preset; {nearest(preset, TRAIN)}")
