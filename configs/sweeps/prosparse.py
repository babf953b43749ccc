"""ProSparse (2402.13516) with seeds: trained SiLU models go on with ReLU, and with ReLU under a growing L1 penalty.

    python -m sweeps.launch --config configs/sweeps/sparsing_law.py:gpu --store runs/sparsing
    python -m sweeps.launch --config configs/sweeps/prosparse.py:gpu,from=runs/sparsing --store runs/prosparse
    python -m efficient_lm.sparsity --store runs/prosparse --out prosparse.jsonl --methods cett,fatrelu
    python -m analysis.sparsity --rows prosparse.jsonl --compare relu

Every finished SiLU run of the middle size in the store given by `from` is the start of one run of each arm, on data in
another order. The penalty grows in three stages (ffn/prosparse.py), then the learning rate falls to 0 under the last.

:cpu  300 steps of 8 x 128 bytes
:gpu  1000 steps of 64 x 256 bytes; nine cells in 58 s on an H200 with one worker
"""

from pathlib import Path

from configs.sweeps import sparsing_law
from efficient_lm import metrics
from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell, choices, product

STEPS = {"cpu": 300, "gpu": 1000}
PENALTIES = {"prosparse": 3e-3, "prosparse_strong": 1e-2}
OTHER_ORDER = 100  # added to the seed of the run that is gone on with


def get_config(arg="cpu"):
    preset, _ = parse(arg)
    values = sparsing_law.get_config(preset)
    width, layers = sparsing_law.SIZES[preset][1]
    values.model.update({"d_model": width, "n_layers": layers, "mixers": {"attention": {"n_heads": width // 32}}})
    values.optim.update({"lr": 0.005, "schedule": "linear", "decay": 0.3, "final_lr": 0.0})
    values.train.update({"steps": STEPS[preset], "checkpoint_every": 0, "keep_checkpoints": 1})
    return values


def get_sweep(arg="cpu"):
    preset, store = parse(arg)
    ends = tuple(round(share * STEPS[preset]) for share in (0.1, 0.4, 0.7))
    arms = {"relu": {"activation": "relu"}}
    for name, penalty in PENALTIES.items():
        stages = {"l1": (penalty / 30, penalty / 3, penalty), "l1_steps": ends}
        arms[name] = {"kind": "prosparse", "activation": "relu", **stages}
    arms = {name: {f"model.ffns.dense.{key}": value for key, value in arm.items()} for name, arm in arms.items()}
    return product(starts(preset, store), choices("arch", arms))


def starts(preset: str, store: str) -> list[Cell]:
    """A cell for each finished SiLU run of the middle size."""
    width, layers = sparsing_law.SIZES[preset][1]
    cells = []
    for path in sorted(Path(store).glob("*/run.json")):
        run, config = metrics.read_json(path) or {}, metrics.read_json(path.parent / "config.json") or {}
        model = config.get("model", {})
        shape = (model.get("d_model"), model.get("n_layers"), model.get("ffns", {}).get("dense", {}).get("activation"))
        if run.get("status") == "done" and shape == (width, layers, "silu") and (path.parent / "ckpt").is_dir():
            settings = {"seed": run["seed"] + OTHER_ORDER, "train.upcycle_from": str(path.parent)}
            cells.append(Cell(settings, {"start": run["seed"]}))
    if not cells:
        raise ConfigError(f"config = prosparse.py: {store} has no finished SiLU run of {layers} layers x {width}")
    return cells


def parse(arg: str) -> tuple[str, str]:
    """(preset, store of the runs to start from) of 'gpu' or 'gpu,from=STORE'."""
    preset, _, store = arg.partition(",from=")
    if preset not in STEPS:
        raise ConfigError(f"config = prosparse.py:{arg}: no such preset; {nearest(preset, STEPS)}")
    return preset, store or "runs/sparsing"
