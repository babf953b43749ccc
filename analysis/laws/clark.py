"""Unified law of routed models, Clark et al., arXiv:2202.01169.

    log10 L(N, E) = a log10 N + b log10 S + c log10 N * log10 S + d,    S = saturated(E),
    1 / saturated(E) = 1 / (E - 1 + (1/E_s - 1/E_m)^-1) + 1/E_m

N is the parameter count of the dense model without routing, E the number of experts (1 = dense): saturated(1) = E_s
and saturated(inf) = E_m. With alpha(S) = a + c log10 S, the dense size of equal loss is
N_eff = N^(alpha(S)/alpha(E_s)) (S/E_s)^(b/alpha(E_s)); routing stops helping at N_cut = 10^(-b/c).
"""

import numpy as np

from analysis.laws.base import Constants, Law, Parameter, Synthetic, Variable, register


def saturated(experts, E_s, E_m):
    """Experts that count after saturation; `experts` >= 1."""
    return 1 / (1 / (experts - 1 + 1 / (1 / E_s - 1 / E_m)) + 1 / E_m)


def predict(p, x, xp=np):
    n = xp.log10(x["N"])
    s = xp.log10(saturated(x["E"], p["E_s"], p["E_m"]))
    return 10 ** (p["a"] * n + p["b"] * s + p["c"] * n * s + p["d"])


def derived(p):
    return {"log10_N_cut": -p["b"] / p["c"]}


def effective_parameters(p, N, E):
    """Parameters of the dense model with the loss of a routed one."""
    s = saturated(np.asarray(E, float), p["E_s"], p["E_m"])
    dense = p["a"] + p["c"] * np.log10(p["E_s"])
    exponent = (p["a"] + p["c"] * np.log10(s)) / dense
    return np.asarray(N, float) ** exponent * (s / p["E_s"]) ** (p["b"] / dense)


register(
    Law(
        name="clark",
        title="Loss of routed models in dense parameters and experts",
        formula="log10 loss = a*log10(N) + b*log10(S) + c*log10(N)*log10(S) + d; "
        "1/S = 1/(E - 1 + 1/(1/E_s - 1/E_m)) + 1/E_m",
        source="arXiv:2202.01169",
        variables=(
            Variable("N", "parameters", "parameters of the dense model without routing"),
            Variable("E", "experts", "experts per routed layer; 1 is dense", 1.0, 1e6),
        ),
        target=Variable("loss", "nats/token", "validation cross-entropy"),
        parameters=(
            Parameter("a", (-0.15, -0.03), "linear", -1.0, -1e-3, "slope in log10 N"),
            Parameter("b", (-0.3, -0.02), "linear", -3.0, 0.5, "slope in log10 S"),
            Parameter("c", (-0.01, 0.03), "linear", -0.2, 0.2, "how the gain of experts shrinks with N", True),
            Parameter("d", (0.5, 1.6), "linear", -5.0, 10.0, "offset"),
            Parameter("E_s", (0.1, 2.0), "log", 1.0, 100.0, "effective experts of a dense model"),
            Parameter("E_m", (4.0, 8.0), "log", 1.0, 1e8, "effective experts of infinitely many"),
        ),
        n_starts=64,
        predict=predict,
        limits="one data set of 130B tokens for every run: no dependence on D; E_m needs runs with hundreds of experts",
        residual="log10",
        delta=None,
        derived=derived,
        constants={
            router: Constants("arXiv:2202.01169", dict(zip(("a", "b", "c", "d", "E_s", "E_m"), values, strict=True)),
                              "N 1.5e7-1.3e9, E 1-512", "rounded: they do not reproduce the published N_cut")
            for router, values in {
                "s_base": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
                "rl_r": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
                "hash": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
            }.items()
        },
        synthetic=Synthetic(
            params=dict(a=-0.082, b=-0.108, c=0.009, d=1.104, E_s=1.847, E_m=314.478),
            ranges={"N": (1.5e7, 1.3e9), "E": (1, 512)},
            tolerance=dict(a=0.05, d=0.05),
        ),
    )
)  # fmt: skip
