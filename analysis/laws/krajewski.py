"""Fine-grained mixtures of experts, Krajewski et al., arXiv:2402.07871.

    L(N, D, G) = c + (g G^-gamma + a) N^-alpha + b D^-beta

N counts all parameters without embeddings, with every expert: a dense base N0 with an expansion of E has
N = N0 (1/3 + 2/3 E). The granularity here is G = d_ff / d_expert (4 d_model / d_expert), twice that of the
efficiency-leverage laws.
"""

import numpy as np

from analysis.laws.base import Constants, Law, Parameter, Synthetic, Variable, register


def predict(p, x, xp=np):
    size = (p["g"] * xp.exp(-p["gamma"] * xp.log(x["G"])) + p["a"]) * xp.exp(-p["alpha"] * xp.log(x["N"]))
    return p["c"] + size + p["b"] * xp.exp(-p["beta"] * xp.log(x["D"]))


EXPONENT = (0.05, 0.4)
register(
    Law(
        name="krajewski",
        title="Loss of fine-grained mixtures of experts",
        formula="loss = c + (g*G^-gamma + a)*N^-alpha + b*D^-beta",
        source="arXiv:2402.07871",
        variables=(
            Variable("N", "parameters", "all parameters without embeddings, every expert counted"),
            Variable("D", "tokens", "training tokens"),
            Variable("G", "d_ff/d_expert", "granularity; 1 = experts as wide as the dense layer", 0.1, 1e4),
        ),
        target=Variable("loss", "nats/token", "mean next-token cross-entropy"),
        parameters=(
            Parameter("c", (-2.0, 0.7), "log", 0.02, np.inf, "irreducible loss"),
            Parameter("g", (-1.0, 3.0), "log", 1e-6, 1e12, "size of the granularity term"),
            Parameter("gamma", (0.2, 1.5), "linear", 0.01, 5.0, "exponent of G"),
            Parameter("a", (0.0, 7.0), "log", 1e-6, 1e20, "size of the parameter term"),
            Parameter("alpha", EXPONENT, "linear", 0.005, 2.5, "exponent of N"),
            Parameter("b", (0.0, 7.0), "log", 1e-6, 1e20, "size of the data term"),
            Parameter("beta", EXPONENT, "linear", 0.005, 2.5, "exponent of D"),
        ),
        n_starts=64,
        predict=predict,
        limits="expansion rate 64 (G = 1: Switch); the router's own cost bounds G in practice",
        delta=0.1,
        centre=(("g", "alpha", "N"), ("a", "alpha", "N"), ("b", "beta", "D")),
        constants={
            "moe_64": Constants(
                "arXiv:2402.07871",
                dict(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47),
                "base 1.3e8-3.7e9 parameters expanded 64 times, D 1.6e10-1.3e11, G 1-16",
            ),
        },
        synthetic=Synthetic(
            params=dict(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47),
            ranges={"N": (1e8, 1e12), "D": (1e8, 1e12), "G": (1, 32)},
            tolerance=dict(alpha=0.1, beta=0.1, gamma=0.2),
            noise=5e-4,
            n=120,
        ),
    )
)
