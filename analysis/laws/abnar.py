"""Parameters against FLOPs for sparse mixtures of experts, Abnar et al., arXiv:2501.12370.

    L(N, D, S) = a N^-alpha + b D^-beta + c (1 - S)^-lambda + d (1 - S)^-delta N^-gamma + e

S is the share of inactive experts (0 = dense) and N counts all parameters. The published lambda is negative: at fixed N
and D, fewer active experts lower the third term and raise the fourth.
"""

import numpy as np

from analysis.laws.base import Constants, Law, Parameter, Synthetic, Variable, register


def predict(p, x, xp=np):
    N, D, density = xp.log(x["N"]), xp.log(x["D"]), xp.log1p(-x["S"])
    size = p["a"] * xp.exp(-p["alpha"] * N) + p["b"] * xp.exp(-p["beta"] * D)
    sparsity = p["c"] * xp.exp(-p["lambda"] * density)
    return size + sparsity + p["d"] * xp.exp(-p["delta"] * density - p["gamma"] * N) + p["e"]


def _design(rng, n=96):
    return {
        "N": np.exp(rng.uniform(np.log(1e7), np.log(1e11), n)),
        "D": np.exp(rng.uniform(np.log(1e8), np.log(1e12), n)),
        "S": rng.choice([0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98], n),
    }


PUBLISHED = {
    "a": 16612.50, "alpha": 0.5962, "b": 5455.67, "beta": 0.3954, "c": 0.4598, "lambda": -0.1666, "d": 17.26,
    "delta": 0.1603, "gamma": 0.1595, "e": 0.94,
}  # fmt: skip

register(
    Law(
        name="abnar",
        title="Loss of mixtures of experts in total parameters, tokens and sparsity",
        formula="loss = a*N^-alpha + b*D^-beta + c*(1-S)^-lambda + d*(1-S)^-delta*N^-gamma + e",
        source="arXiv:2501.12370",
        variables=(
            Variable("N", "parameters", "all parameters"),
            Variable("D", "tokens", "training tokens"),
            Variable("S", "share", "share of inactive experts; 0 = dense", 0.0, 0.9999),
        ),
        target=Variable("loss", "nats/token", "mean next-token cross-entropy"),
        parameters=(
            Parameter("a", (3.0, 12.0), "log", 1e-6, 1e20, "size of the parameter term"),
            Parameter("alpha", (0.2, 0.9), "linear", 0.005, 3.0, "exponent of N"),
            Parameter("b", (3.0, 12.0), "log", 1e-6, 1e20, "size of the data term"),
            Parameter("beta", (0.2, 0.9), "linear", 0.005, 3.0, "exponent of D"),
            Parameter("c", (-3.0, 1.0), "log", 1e-6, 1e3, "size of the sparsity term"),
            Parameter("lambda", (-0.5, 0.1), "linear", -3.0, 3.0, "exponent of the active share", True),
            Parameter("d", (0.0, 5.0), "log", 1e-6, 1e12, "size of the coupled term"),
            Parameter("delta", (0.0, 0.5), "linear", -3.0, 3.0, "its exponent of the active share", True),
            Parameter("gamma", (0.05, 0.4), "linear", 0.005, 3.0, "its exponent of N"),
            Parameter("e", (-2.0, 0.7), "log", 0.02, np.inf, "irreducible loss"),
        ),
        n_starts=64,
        predict=predict,
        limits="two terms in N and two offsets at S = 0: single parameters are weakly determined, the curve is not; "
        "R2 .99 on the fitted runs and .68 on held-out ones",
        centre=(("a", "alpha", "N"), ("b", "beta", "D"), ("d", "gamma", "N")),
        constants={"abnar": Constants("arXiv:2501.12370", PUBLISHED, "S 0-.98")},
        synthetic=Synthetic(params=PUBLISHED, design=_design, tolerance=dict(beta=0.05), noise=5e-4),
    )
)
