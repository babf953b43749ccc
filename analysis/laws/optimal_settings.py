"""Power laws for the best settings of a run: learning rate, batch, and the split of compute into model and data.

    lr = k C^p           lr = k N^p D^q           batch = k C^p           batch = k D^q
    M* = k C^p           D* = k C^p               batch_crit = k loss^p

Exponents are signed. Batches are in tokens, C in FLOP, and M in training FLOPs per token without
embeddings (C = M D). Constants printed for PF-days are converted.
"""

import numpy as np

from analysis.laws.base import PF_DAY, Constants, Law, Parameter, Synthetic, Variable, register

COMPUTE = Variable("C", "FLOP", "training compute, C = M*D")
SIZE = Variable("N", "parameters", "parameters without embeddings")
DATA = Variable("D", "tokens", "training tokens")
LOSS = Variable("loss", "nats/token", "mean next-token cross-entropy")
LR = Variable("lr", "1", "best peak learning rate (Adam)")
BATCH = Variable("batch", "tokens", "best batch")
LING = ("arXiv:2507.17702", "C 3e17-3e20, MoE with A 7.8 %, G 2, WSD schedule")
DEEPSEEK = ("arXiv:2401.02954", "dense, C 1e17-2e19, multi-step schedule")
STEP = ("arXiv:2503.04715", "dense, N 2.1e8-1.07e9, D 4e9-1e11, cosine to 1e-5")
SHEN = ("arXiv:2406.16690", "70M-7B, 300B tokens")


def _product(target: str, *names: str):
    """k * names[0]^p * names[1]^q."""

    def predict(p, x, xp=np):
        exponents = zip(("p", "q"), names, strict=False)
        return xp.exp(xp.log(p["k"]) + sum(p[power] * xp.log(x[name]) for power, name in exponents))

    predict.__name__ = f"predict_{target}"
    return predict


def _register(name, title, target, variables, constants, limits, synthetic, tolerance):
    """`constants`: name -> (source and range, k, p[, q])."""
    powers = ("p", "q")[: len(variables)]
    formula = "*".join(f"{v.name}^{power}" for v, power in zip(variables, powers, strict=True))
    ranges = {"FLOP": (1e17, 1e21), "parameters": (1e7, 1e10), "tokens": (1e9, 1e12)}
    ranges |= {"nats/token": (2.0, 6.0), "tokens/parameter": (1.0, 1e3)}
    register(
        Law(
            name=name,
            title=title,
            formula=f"{target.name} = k*{formula}",
            source="; ".join(dict.fromkeys(where[0] for where, *_ in constants.values())),
            variables=variables,
            target=target,
            parameters=(
                Parameter("k", (-20.0, -5.0, 0.0, 5.0, 20.0), "log", 1e-60, 1e60, "size"),
                *(
                    Parameter(power, (-1.0, -0.3, 0.3, 1.0), "linear", -20.0, 20.0, f"exponent of {v.name}", True)
                    for v, power in zip(variables, powers, strict=True)
                ),
            ),
            predict=_product(target.name, *(v.name for v in variables)),
            limits=limits,
            delta=None,
            constants={
                key: Constants(where[0], dict(zip(("k", *powers), values, strict=True)), where[1])
                for key, (where, *values) in constants.items()
            },
            synthetic=Synthetic(
                dict(zip(("k", *powers), synthetic, strict=True)), {v.name: ranges[v.unit] for v in variables},
                dict.fromkeys(powers, tolerance), noise=0.05,
            ),
        )
    )  # fmt: skip


ADVICE = "depends on the near-optimum threshold and on the sampling grid: see analysis.hyperparameters"

_register(
    "lr_compute", "Best learning rate in compute", LR, (COMPUTE,),
    {"ling": (LING, 1.1576, -0.1529), "deepseek": (DEEPSEEK, 0.3118, -0.1250)}, ADVICE, (1.1576, -0.1529), 0.1,
)  # fmt: skip
_register(
    "batch_compute", "Best batch in compute", BATCH, (COMPUTE,),
    {"ling": (LING, 0.0694, 0.3644), "deepseek": (DEEPSEEK, 0.2920, 0.3271)}, ADVICE, (0.0694, 0.3644), 0.1,
)  # fmt: skip
_register(
    "lr_size_data", "Best learning rate in parameters and tokens", LR, (SIZE, DATA),
    {"step_law": (STEP, 1.79, -0.713, 0.307)}, ADVICE, (1.79, -0.713, 0.307), 0.1,
)  # fmt: skip
_register(
    "batch_data", "Best batch in tokens", BATCH, (DATA,),
    {"step_law": (STEP, 0.58, 0.571), "schaipp": (("arXiv:2607.01487", ""), 0.667, 0.566)}, ADVICE, (0.58, 0.571), 0.1,
)  # fmt: skip
_register(
    "batch_critical", "Critical batch in loss", Variable("batch", "tokens", "critical batch"), (LOSS,),
    {"kaplan": (("arXiv:2001.08361", ""), 2e8, -1 / 0.21)}, "steps against examples at equal loss", (2e8, -4.76), 0.1,
)  # fmt: skip
_register(
    "model_compute", "Best FLOPs per token in compute", Variable("M", "FLOP/token", "training FLOPs per token"),
    (COMPUTE,),
    {
        "ling_moe": (LING, 0.1915, 0.5095), "ling_dense": (LING, 0.0655, 0.5422),
        "deepseek": (DEEPSEEK, 0.1715, 0.5243),
    },
    "C = M*D: use with the matching data law", (0.1915, 0.5095), 0.1,
)  # fmt: skip
_register(
    "size_compute", "Best parameters in compute", SIZE, (COMPUTE,),
    {
        f"shen_{name}": (SHEN, k / PF_DAY**p, p)
        for name, k, p in (("llama", 1.82e8, 0.7118), ("tnl", 2.74e8, 0.6470), ("hgrn2", 2.66e8, 0.6427),
                           ("cosformer2", 2.65e8, 0.6516))
    },
    "fitted apart from the data law: N*D may exceed the budget", (1e-3, 0.6), 0.1,
)  # fmt: skip
_register(
    "data_compute", "Best tokens in compute", DATA, (COMPUTE,),
    {
        "ling_moe": (LING, 5.2232, 0.4905), "ling_dense": (LING, 15.2582, 0.4578),
        "deepseek": (DEEPSEEK, 5.8316, 0.4757),
        **{
            f"shen_{name}": (SHEN, k / PF_DAY**p, p)
            for name, k, p in (("llama", 2.56e10, 0.5102), ("tnl", 4.43e10, 0.4684), ("hgrn2", 4.80e10, 0.4500),
                               ("cosformer2", 4.23e10, 0.4529))
        },
    },
    "C = M*D for Ling and DeepSeek; Shen et al. fitted it apart from the size law", (5.2232, 0.4905), 0.1,
)  # fmt: skip
_register(
    "decay_timescale", "Best AdamW timescale in tokens per parameter",
    Variable("tau", "share of training", "batch/(lr * weight decay * D)"),
    (Variable("TPP", "tokens/parameter", "tokens per parameter", 1e-3, 1e7),),
    {"power_lines": (("arXiv:2505.13738", "muP"), 1.084, -0.527)}, "muP, AdamW", (1.084, -0.527), 0.1,
)  # fmt: skip
