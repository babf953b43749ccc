"""Speculative decoding, Leviathan et al., arXiv:2211.17192.

    tokens(gamma)  = (1 - alpha^(gamma+1)) / (1 - alpha)           tokens per run of the target model
    speedup(gamma) = tokens(gamma) / (gamma c + 1)

gamma tokens are drafted per run of the target; alpha is the chance that one is accepted, taken as independent, and c
the time of one draft step over that of one target step.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register

DRAFTED = Variable("gamma", "tokens", "tokens drafted per run of the target model", 0.0, 1e4)
ACCEPTANCE = Parameter("alpha", (-3.0, 0.0, 3.0), "logit", 0.0, 1.0, "chance that a drafted token is accepted")
SOURCE = "arXiv:2211.17192"
LIMITS = "acceptance independent of position and context; one draft and target model"


def tokens(p, x, xp=np):
    return (1 - xp.exp((x["gamma"] + 1) * xp.log(p["alpha"]))) / (1 - p["alpha"])


def speedup(p, x, xp=np):
    return tokens(p, x, xp) / (x["gamma"] * p["c"] + 1)


def best_drafted(p, most: int = 64) -> dict:
    """The number of drafted tokens that is fastest, 0 to `most` (0: do not draft), and its speed-up."""
    gamma = np.arange(most + 1.0)
    alpha, c = np.asarray(p["alpha"], float)[..., None], np.asarray(p["c"], float)[..., None]
    gain = speedup({"alpha": alpha, "c": c}, {"gamma": gamma})
    return {"gamma_best": gamma[np.argmax(gain, -1)], "speedup_best": np.max(gain, -1)}


register(
    Law(
        name="speculative_tokens",
        title="Tokens per run of the target in speculative decoding",
        formula="tokens = (1 - alpha^(gamma+1))/(1 - alpha)",
        source=SOURCE,
        variables=(DRAFTED,),
        target=Variable("tokens", "tokens", "tokens generated per run of the target model", 1.0, 1e4),
        parameters=(ACCEPTANCE,),
        predict=tokens,
        limits=LIMITS,
        delta=None,
        synthetic=Synthetic(
            dict(alpha=0.8), design=lambda rng: {"gamma": np.repeat(np.arange(1.0, 11), 3)}, tolerance=dict(alpha=0.02),
            noise=0.02,
        ),
    )
)  # fmt: skip

register(
    Law(
        name="speculative_speedup",
        title="Speed-up of speculative decoding",
        formula="speedup = (1 - alpha^(gamma+1))/((1 - alpha)*(gamma*c + 1))",
        source=SOURCE,
        variables=(DRAFTED,),
        target=Variable("speedup", "ratio", "time without drafting over time with it"),
        parameters=(
            ACCEPTANCE,
            Parameter("c", (-6.0, -3.0, -1.0), "log", 1e-6, 10.0, "time of a draft step over that of a target step"),
        ),
        predict=speedup,
        limits=LIMITS + "; the target must verify gamma + 1 tokens in the time of one",
        delta=None,
        derived=best_drafted,
        synthetic=Synthetic(
            dict(alpha=0.75, c=0.06),
            design=lambda rng: {"gamma": np.repeat(np.arange(1.0, 17), 3)},
            tolerance=dict(alpha=0.03, c=0.15, speedup_best=0.02),
            noise=0.01,
        ),
    )
)
