"""Joint law of mixtures of experts, Ludziejewski et al., arXiv:2502.05172: the form only.

    L(N, D, E) = a S^delta N^(alpha + gamma ln S) + b S^omega D^(beta + zeta ln S) + c,    S = saturated(E)

N counts active parameters, E experts, and S is the saturation of `clark` with natural logarithms in the exponents.
Constants are not shipped: those in circulation make the loss rise with E for every N and D.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register
from analysis.laws.clark import saturated


def predict(p, x, xp=np):
    s = xp.log(saturated(x["E"], p["E_s"], p["E_m"]))
    size = p["a"] * xp.exp(p["delta"] * s + (p["alpha"] + p["gamma"] * s) * xp.log(x["N"]))
    data = p["b"] * xp.exp(p["omega"] * s + (p["beta"] + p["zeta"] * s) * xp.log(x["D"]))
    return size + data + p["c"]


register(
    Law(
        name="ludziejewski",
        title="Loss of mixtures of experts in active parameters, tokens and experts",
        formula="loss = a*S^delta*N^(alpha + gamma*ln S) + b*S^omega*D^(beta + zeta*ln S) + c; "
        "1/S = 1/(E - 1 + 1/(1/E_s - 1/E_m)) + 1/E_m",
        source="arXiv:2502.05172",
        variables=(
            Variable("N", "parameters", "active parameters"),
            Variable("D", "tokens", "training tokens"),
            Variable("E", "experts", "experts; 1 is dense", 1.0, 1e6),
        ),
        target=Variable("loss", "nats/token", "mean next-token cross-entropy"),
        parameters=(
            Parameter("a", (2.0, 6.0), "log", 1e-6, 1e20, "size of the parameter term"),
            Parameter("alpha", (-0.4, -0.1), "linear", -3.0, -0.005, "exponent of N, signed"),
            Parameter("delta", (-0.5, 0.5), "linear", -5.0, 5.0, "exponent of S in the parameter term", True),
            Parameter("gamma", (-0.05, 0.05), "linear", -1.0, 1.0, "change of the exponent of N with ln S", True),
            Parameter("b", (2.0, 8.0), "log", 1e-6, 1e20, "size of the data term"),
            Parameter("beta", (-0.4, -0.1), "linear", -3.0, -0.005, "exponent of D, signed"),
            Parameter("omega", (-0.5, 0.5), "linear", -5.0, 5.0, "exponent of S in the data term", True),
            Parameter("zeta", (-0.05, 0.05), "linear", -1.0, 1.0, "change of the exponent of D with ln S", True),
            Parameter("c", (-1.0, 0.7), "log", 0.02, np.inf, "irreducible loss"),
            Parameter("E_s", (0.2, 2.0), "log", 1.0, 100.0, "effective experts of a dense model"),
            Parameter("E_m", (4.0, 8.0), "log", 1.0, 1e8, "effective experts of infinitely many"),
        ),
        n_starts=64,
        predict=predict,
        limits="the saturation is held at the paper's E_s and E_m unless freed: few designs determine it",
        held=dict(E_s=2.07, E_m=290.45),
        synthetic=Synthetic(
            params=dict(a=400.0, alpha=-0.33, delta=-0.3, gamma=0.005, b=900.0, beta=-0.3, omega=0.1, zeta=0.004,
                        c=1.4, E_s=2.07, E_m=290.45),
            ranges={"N": (1e7, 1e11), "D": (1e8, 1e12), "E": (1, 64)},
            tolerance=dict(alpha=0.1, beta=0.1, c=0.05),
            n=160,
        ),
    )
)  # fmt: skip
