"""Efficiency leverage of mixtures of experts over dense models (2507.17702): by activation ratio, granularity, sharing.

    python -m sweeps.plan   --config configs/sweeps/efficiency_leverage.py:cpu
    python -m sweeps.launch --config configs/sweeps/efficiency_leverage.py:cpu --store runs/el --workers 2
    python -m analysis.leverage --dense runs/el --dense-where "G == 0" --variant runs/el --variant-where "G > 0"

Each architecture is an IsoFLOP sweep of its own, so that every one is compared at its best size; A, G and S are columns
of the run table (activation ratio, granularity 2 d_model / d_expert, shared ratio), 1, 0 and 0 for dense models. The
dense FFN is as wide as the activated experts, three times the model.

:cpu    two CPU cores; A from 9 to 60 % and two granularities, three budgets; 21 minutes by `sweeps.plan --calibrate` on
        two cores of a GPU server
:gpu    one GPU for half an hour, bytes of prepared text, 160M of which are read 1.5 times at most. A from 3 to 60 % at
        G = 2, G up to 8 at A = 9 %, with or without a shared expert; three budgets (two for A = 60 % and for no shared
        expert), a fourth for four of the architectures and a fifth for dense models, so that they reach the losses of
        the others. The learning rate is 0.7 / d_model and a step has 16384 tokens; the laws of :paper, fitted five
        decades higher, give 1.4 times that rate and 5800 tokens at 3.2e13 FLOPs and width 96, and :gpu-lr has half and
        twice the rate. The weights of a token's experts sum to 1 here, and "-raw" is the published way: it leaves them
        at 2 / experts at first, which costs short runs (300 steps of 4096 tokens, width 48, 16 experts, CPU: 1.652 nats
        per byte instead of 1.621, dense 1.747; half and twice the learning rate 1.668 and 1.740, dense 1.773 and 1.764,
        one seed each). 15 minutes of an H100: 9.4 with --workers 2 for a third of the cells, the dearest run first, and
        5.4 with --workers 3 for the rest, with XLA_FLAGS=--xla_gpu_enable_triton_gemm=false (with
        --xla_gpu_autotune_level=0 steps take 2 to 5 times as long)
:gpu-seeds  three seeds of the main architectures at one or two sizes of each budget: the noise between runs
:gpu-lr     half and twice the learning rate for four architectures at one size of the second budget
:gpu-small  sizes below those of :gpu, at which many mixtures are best there, and G = 8 at A = 33 %: 20 to 27 minutes
        Launch all four into one store: cells that are there are not run again. What came out:
        analysis/notebooks/efficiency_leverage.ipynb
:paper  the published ladder, 2e18 to 6e20 FLOPs, with its settings; needs prepared data and many GPUs. Experts are as
        wide as the model at G = 2 (the first published size has 320 of 384)
"""

from ml_collections import ConfigDict

from efficient_lm.schema import ConfigError, nearest
from sweeps.combine import Cell
from sweeps.isoflop import IsoFlop
from sweeps.rules import BATCH_RULES, LR_RULES, constant, inverse_width

VARIANTS = ("cpu", "gpu", "gpu-seeds", "gpu-lr", "gpu-small", "paper")

# Compute budget: widths. `MAIN` is for three activation ratios at G = 2, `OTHERS` for all other mixtures.
DENSE = {
    1e13: (32, 48, 64, 96), 3.2e13: (48, 64, 96, 128), 1e14: (64, 96, 128, 192), 3.2e14: (96, 128, 192),
    1e15: (128, 192, 256),
}  # fmt: skip
MAIN = {1e13: (32, 48, 64, 96), 3.2e13: (48, 64, 96, 128), 1e14: (64, 96, 128), 3.2e14: (64, 96, 128)}
OTHERS = {1e13: (48, 64, 96), 3.2e13: (64, 96, 128), 1e14: (64, 96, 128)}
# Many mixtures are best at the smallest of those, so that smaller ones belong to the parabola.
SMALL = {1e13: (24, 32, 48, 64), 3.2e13: (32, 48, 64, 96), 1e14: (48, 64, 96, 128), 3.2e14: (64, 96, 128)}
SEEDS = {1e13: (48,), 3.2e13: (64,), 1e14: (64, 96), 3.2e14: (128,)}

# Layers, width, largest budget (table of 2507.17702; its head counts beyond the first row are not given there).
PAPER = [
    (8, 384, 2e18), (8, 512, 6e18), (10, 640, 2e19), (14, 768, 6e19), (16, 1024, 2e20), (22, 1280, 6e20),
]  # fmt: skip


def dense() -> Cell:
    settings = {"model.pattern": ("attention/dense",), "model.ffns.dense.expansion": 3.0}
    return Cell(settings, {"A": 1.0, "G": 0.0, "S": 0.0})


def moe(experts: int, granularity: int = 2, shared: int = 1, **others) -> Cell:
    """`experts` of the width of the model, and one more that is always on or, without `shared`, routed like the others.

    A token uses three of them. Each is cut into granularity / 2 finer ones. `others` are further settings of the layer.
    """
    cut = granularity // 2
    always = shared * cut
    routed, active = (experts + 1) * cut - always, 3 * cut - always
    names = {"n_experts": routed, "top_k": active, "n_shared": always, "granularity": float(granularity)} | others
    settings = {"model.pattern": ("attention/moe",)} | {f"model.ffns.moe.{key}": value for key, value in names.items()}
    ratio = (active + always) / (routed + always)
    return Cell(settings, {"A": round(ratio, 4), "G": float(granularity), "S": round(always / (active + always), 4)})


def name(cell: Cell) -> str:
    axes = cell.axes
    raw = "-raw" if cell.overrides.get("model.ffns.moe.normalise") is False else ""
    return "dense" if axes["G"] == 0 else f"moe-A{axes['A']:.3g}-G{axes['G']:g}-S{axes['S']:.2g}{raw}"


def archs(*cells: Cell) -> dict[str, Cell]:
    return {name(cell): cell for cell in cells}


def get_config(variant="cpu"):
    if variant not in VARIANTS:
        raise ConfigError(f"config = efficiency_leverage.py:{variant}: no such variant; {nearest(variant, VARIANTS)}")
    moe = {"score": "softmax", "normalise": variant.startswith("gpu"), "balance": 0.01, "z_loss": 1e-3}
    values = {
        "model": {"dtype": "float32", "mixers": {"attention": {"n_heads": 2}}, "ffns": {"moe": moe}},
        "data": {"source": "sotu", "validation_tokens": 131072},
        "optim": {"schedule": "linear", "warmup": 0.05, "decay": 0.5, "final_lr": 0.0, "beta2": 0.99},
        "train": {"seq_len": 128, "batch_size": 4, "steps_per_call": 32, "log_every": 64},
        "log": {"progress": False},
    }
    if variant.startswith("gpu"):
        values["model"]["dtype"] = "bfloat16"
        moe["implementation"] = "xla"  # at all widths; the GPU kernel takes multiples of 128 only
        prepared = {"source": "prepared", "path": "data/prepared", "pack": "stream"}
        values["data"] = prepared | {"validation_tokens": 524288}
        values["train"] |= {"seq_len": 256, "batch_size": 64}
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
            tokens_per_parameter=(2.0, 300.0),  # active parameters
            lr=inverse_width(0.2),
            batch=constant(512),
        )
    if variant.startswith("gpu"):
        main = archs(moe(8), moe(32), moe(96))
        if variant == "gpu-lr":
            return [
                cell | Cell(axes={"lr_factor": factor})
                for factor in (0.5, 2.0)
                for cell in gpu(archs(dense()) | main, {3.2e13: (96,)}, lr_factor=factor)
            ]
        if variant == "gpu-seeds":
            return gpu(archs(dense()) | main, SEEDS, seeds=3)
        fine, raw = [moe(32, granularity=4), moe(32, granularity=8)], moe(32, normalise=False)
        three, two = archs(moe(16), *fine, raw), archs(moe(4), moe(32, shared=0))
        if variant == "gpu-small":
            fewer = {budget: SMALL[budget] for budget in OTHERS}
            return gpu(main, SMALL) + gpu(three | two | archs(moe(8, granularity=8)), fewer)
        cheap = {budget: OTHERS[budget] for budget in (1e13, 3.2e13)}
        return gpu(archs(dense()), DENSE) + gpu(main, MAIN) + gpu(three, OTHERS) + gpu(two, cheap)
    return IsoFlop(
        archs=archs(dense(), *(moe(experts) for experts in (2, 4, 8, 16, 32, 64, 128, 256)),
                    *(moe(64, granularity) for granularity in (4, 8, 16))),
        shapes={budget: [shape(layers, width) | heads(width)] for layers, width, budget in PAPER},
        budgets=tuple(budget for *_, budget in PAPER),
        lr=LR_RULES["ling"],
        batch=BATCH_RULES["ling"],
    )  # fmt: skip


def gpu(archs, widths, lr_factor=1.0, seeds=1) -> list[Cell]:
    """Three layers at every width: mixed depths make ragged curves. One batch size, so that shapes compile once."""
    attention = "model.mixers.attention.n_heads"
    sweep = IsoFlop(
        archs=archs,
        shapes={
            budget: [shape(3, width) | {attention: max(1, width // 32)} for width in some]
            for budget, some in widths.items()
        },
        budgets=tuple(widths),
        lr=inverse_width(0.7 * lr_factor),
        batch=constant(64 * 256),
        seeds=seeds,
    )
    return sweep.cells(f"{__file__}:gpu")[0]


def shape(layers: int, width: int) -> dict:
    return {"model.n_layers": layers, "model.d_model": width}


def heads(width: int) -> dict:
    return {"model.mixers.attention.n_heads": width // 64, "model.mixers.attention.n_kv_heads": max(1, width // 256)}
