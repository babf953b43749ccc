"""Efficiency leverage of mixtures of experts over dense models (2507.17702): by activation ratio, granularity, sharing.

    python -m sweeps.plan   --config configs/sweeps/efficiency_leverage.py:cpu
    python -m sweeps.launch --config configs/sweeps/efficiency_leverage.py:cpu --store runs/el --workers 2
    python -m analysis.leverage --dense runs/el --dense-where "G == 0" --variant runs/el --variant-where "G > 0"

Each architecture is an IsoFLOP sweep of its own, so that every one is compared at its best size; A, G and S are columns
of the run table (activation ratio, granularity 2 d_model / d_expert, shared ratio), 1, 0 and 0 for dense models. The
dense FFN is as wide as the activated experts at G = 2.

:cpu    two CPU cores; A from 1 to 9 % and two granularities, three budgets
:gpu    one GPU (`--budget "0.5 gpu-hours"`); A from 1 to 3 %, granularity 2 to 8, shared ratio, four budgets
:paper  the published ladder, 2e18 to 6e20 FLOPs, with its settings; needs prepared data and many GPUs. Experts are as
        wide as the model at G = 2 (the first published size has 320 of 384)
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell
from sweeps.isoflop import IsoFlop, Ladder
from sweeps.rules import BATCH_RULES, LR_RULES, constant, inverse_width

VARIANTS = ("cpu", "gpu", "paper")

# Layers, width, largest budget (table of 2507.17702; its head counts beyond the first row are not given there).
PAPER = [
    (8, 384, 2e18), (8, 512, 6e18), (10, 640, 2e19), (14, 768, 6e19), (16, 1024, 2e20), (22, 1280, 6e20),
]  # fmt: skip


def dense() -> Cell:
    settings = {"model.pattern": ("attention/dense",), "model.ffns.dense.expansion": 3.0}
    return Cell(settings, {"A": 1.0, "G": 0.0, "S": 0.0})


def moe(experts: int, granularity: int = 2, shared: int = 1) -> Cell:
    """`experts` of width d_model, 2 active and `shared` always on, each cut into granularity / 2 finer ones."""
    cut = granularity // 2
    routed, active, always = experts * cut, 2 * cut, shared * cut
    names = {"n_experts": routed, "top_k": active, "n_shared": always, "granularity": float(granularity)}
    settings = {"model.pattern": ("attention/moe",)} | {f"model.ffns.moe.{key}": value for key, value in names.items()}
    ratio = (active + always) / (routed + always)
    return Cell(settings, {"A": round(ratio, 4), "G": float(granularity), "S": round(always / (active + always), 4)})


def name(cell: Cell) -> str:
    axes = cell.axes
    return "dense" if axes["G"] == 0 else f"moe-A{axes['A']:.3g}-G{axes['G']:g}-S{axes['S']:.2g}"


def archs(*cells: Cell) -> dict[str, Cell]:
    return {name(cell): cell for cell in cells}


def get_config(variant="cpu"):
    if variant not in VARIANTS:
        raise ConfigError(f"config = efficiency_leverage.py:{variant}: no such variant; {nearest(variant, VARIANTS)}")
    moe = {"score": "softmax", "normalise": False, "balance": 0.01, "z_loss": 1e-3}
    values = {
        "model": {"dtype": "float32", "mixers": {"attention": {"n_heads": 2}}, "ffns": {"moe": moe}},
        "data": {"source": "sotu", "validation_tokens": 131072},
        "optim": {"schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": 0.99},
        "train": {"seq_len": 128, "batch_size": 4, "steps_per_call": 32, "log_every": 64},
        "log": {"progress": False},
    }
    if variant == "gpu":
        values["model"] |= {"dtype": "bfloat16", "vocab_size": 8192}
        values["data"] = {"source": "prepared", "path": "data/prepared", "pack": "stream"}
        values["train"] |= {"seq_len": 512, "batch_size": 64}
    if variant == "paper":
        values["model"] |= {"dtype": "bfloat16", "vocab_size": 126464, "init_std": 0.006}
        values["data"] = {"source": "prepared", "path": "data/prepared"}
        values["optim"] = {"schedule": "wsd", "warmup": 0.01, "decay": 0.2, "final_lr": 0.1}
        values["train"] |= {"seq_len": 4096, "batch_size": 98, "steps_per_call": 1}
    return ConfigDict(values)


def get_sweep(variant="cpu"):
    if variant == "cpu":
        return IsoFlop(
            archs=archs(dense(), moe(4), moe(8), moe(16), moe(32), moe(16, granularity=8)),
            shapes=[shape(2, width) for width in (12, 16, 24, 32, 48, 64, 80)],
            budgets=(7e10, 2.1e11, 6.3e11),
            points=4,
            tokens_per_parameter=(2.0, 300.0),
            lr=inverse_width(0.2),
            batch=constant(512),
        )
    if variant == "gpu":
        sizes = [(2, 64), (3, 128), (4, 192), (5, 256), (6, 320), (6, 384), (8, 512), (10, 640), (12, 768)]
        return IsoFlop(
            archs=archs(
                dense(), *(moe(experts) for experts in (4, 8, 16, 32, 64)),
                moe(64, granularity=4), moe(64, granularity=8), moe(64, shared=0),
            ),
            shapes=[shape(layers, width) | {"model.mixers.attention.n_heads": width // 64} for layers, width in sizes],
            budgets=Ladder(top=3e16, count=4, ratio=3.0),
            points=4,
            tokens_per_parameter=(4.0, 400.0),
            lr=inverse_width(0.5),
            batch=constant(64 * 512),
        )  # fmt: skip
    return IsoFlop(
        archs=archs(dense(), *(moe(experts) for experts in (2, 4, 8, 16, 32, 64, 128, 256)),
                    *(moe(64, granularity) for granularity in (4, 8, 16))),
        shapes={budget: [shape(layers, width) | heads(width)] for layers, width, budget in PAPER},
        budgets=tuple(budget for *_, budget in PAPER),
        lr=LR_RULES["ling"],
        batch=BATCH_RULES["ling"],
    )  # fmt: skip


def shape(layers: int, width: int) -> dict:
    return {"model.n_layers": layers, "model.d_model": width}


def heads(width: int) -> dict:
    return {"model.mixers.attention.n_heads": width // 64, "model.mixers.attention.n_kv_heads": max(1, width // 256)}
