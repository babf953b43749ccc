"""What the share of full-attention layers in a hybrid model costs and buys.

    loss(s)   = L_best + k (log2 s - log2 s_best)^2                 language-model loss: a shallow U in log share
    recall(s) = R_0 + (R_1 - R_0) s (1 + s_half) / (s + s_half)     retrieval: rises fast, then saturates

s is the share of layers with full attention: n linear layers to one full layer are s = 1/(n + 1); s = 1 is the
transformer and, for recall only, s = 0 the pure linear model. R_0 and R_1 are the recall of these two ends, half of
the way being reached near s_half. Local descriptions of the sweeps of arXiv:2507.06457 and 2510.26692, not laws of
those papers; they describe one size and one training length.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register

SHARES = (1 / 25, 1 / 16, 1 / 13, 1 / 8, 1 / 7, 1 / 4, 1 / 2, 1.0)  # 24:1 ... 1:1, all


def loss(p, x, xp=np):
    return p["L_best"] + p["k"] * (xp.log2(x["s"]) - xp.log2(p["s_best"])) ** 2


def recall(p, x, xp=np):
    rise = x["s"] * (1 + p["s_half"]) / (x["s"] + p["s_half"])
    return p["R_0"] + (p["R_1"] - p["R_0"]) * rise


register(
    Law(
        name="hybrid_loss",
        title="Loss of a hybrid model in its share of full-attention layers",
        formula="loss = L_best + k*(log2(s) - log2(s_best))^2",
        source="arXiv:2510.26692 (sweep over ratios)",
        variables=(Variable("s", "share", "share of layers with full attention, above 0", 1e-4, 1.0),),
        target=Variable("loss", "nats/token", "mean next-token cross-entropy"),
        parameters=(
            Parameter("L_best", (-0.5, 0.5, 1.5), "log", 0.02, np.inf, "loss at the best share"),
            Parameter("k", (-8.0, -4.0), "log", 1e-7, 10.0, "curvature per octave squared"),
            Parameter("s_best", tuple(np.log((0.03, 0.1, 0.3, 0.8))), "log", 1e-3, 1.0, "best share"),
        ),
        predict=loss,
        limits="one size and length; differences between ratios are often no larger than those between seeds",
        delta=None,
        basis=lambda p, x: [np.ones_like(x["s"]), (np.log2(x["s"]) - np.log2(p["s_best"])) ** 2],
        linear=("L_best", "k"),
        derived=lambda p: {"linear_per_full": 1 / p["s_best"] - 1},
        synthetic=Synthetic(
            params=dict(L_best=1.73, k=0.006, s_best=0.28),
            design=lambda rng: {"s": np.tile(SHARES, 3)},
            tolerance=dict(L_best=0.005, k=0.3, s_best=0.2),
            noise=2e-3,
            curve=0.1,
        ),
    )
)

register(
    Law(
        name="hybrid_recall",
        title="Recall of a hybrid model in its share of full-attention layers",
        formula="recall = R_0 + (R_1 - R_0)*s*(1 + s_half)/(s + s_half)",
        source="arXiv:2507.06457 (sweep over ratios)",
        variables=(Variable("s", "share", "share of layers with full attention; 0 = none", 0.0, 1.0),),
        target=Variable("recall", "share", "accuracy of a retrieval task", 0.0, 1.0),
        parameters=(
            Parameter("R_0", (0.1, 0.4), "linear", -0.2, 1.2, "recall without full attention", True),
            Parameter("R_1", (0.4, 0.9), "linear", -0.2, 1.2, "recall of the transformer"),
            Parameter("s_half", (-5.0, -2.0, 0.0), "log", 1e-4, 1e2, "share that gives about half of the rise"),
        ),
        predict=recall,
        limits="recall that rises with the share; one task, size and length",
        residual="linear",
        delta=None,
        basis=lambda p, x: [1 - recall(dict(R_0=0.0, R_1=1.0, **p), x), recall(dict(R_0=0.0, R_1=1.0, **p), x)],
        linear=("R_0", "R_1"),
        synthetic=Synthetic(
            params=dict(R_0=0.2, R_1=0.85, s_half=0.1),
            design=lambda rng: {"s": np.tile((0.0, *SHARES), 3)},
            tolerance=dict(R_0=0.1, R_1=0.05, s_half=0.4),
            noise=0.01,
            curve=0.05,
        ),
    )
)
