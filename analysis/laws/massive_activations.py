"""Emergence of massive activations over training, arXiv:2508.03616.

    f(t) = A e^(-lambda x) ln x + K,   x = gamma t + t0

t is the step, f the ratio of the largest to the median |h| of a layer's residual output. These five parameters are
degenerate in data (ln lambda and ln gamma correlate at -.999), so the law is fitted in equivalent ones,

    f(t) = e^(-beta t) (A1 ln(t + tau0) + A2) + K,
    beta = lambda gamma,  tau0 = t0 / gamma,  A1 = A e^(-lambda t0),  A2 = A1 ln gamma,

which is linear in A1, A2 and K; the search is over beta and tau0 only. beta, the peak and K are well determined; the
paper's parameters are given as derived quantities and inherit the degeneracy.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register


def predict(p, x, xp=np):
    return xp.exp(-p["beta"] * x["t"]) * (p["A1"] * xp.log(x["t"] + p["tau0"]) + p["A2"]) + p["K"]


def basis(p, x):
    decay = np.exp(-p["beta"] * x["t"])
    return [decay * np.log(x["t"] + p["tau0"]), decay, np.ones_like(decay)]


def to_paper(p):
    """(A, lambda, gamma, t0, K) of the paper from the fitted parameters (scalars or draws)."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        gamma = np.exp(p["A2"] / p["A1"])
        t0, decay = gamma * p["tau0"], p["beta"] / gamma
        return {"A": p["A1"] * np.exp(decay * t0), "lambda": decay, "gamma": gamma, "t0": t0, "K": p["K"]}


def from_paper(q):
    """The fitted parameters from those of the paper."""
    A1 = q["A"] * np.exp(-q["lambda"] * q["t0"])
    return {
        "beta": q["lambda"] * q["gamma"],
        "tau0": q["t0"] / q["gamma"],
        "A1": A1,
        "A2": A1 * np.log(q["gamma"]),
        "K": q["K"],
    }


def derived(p):
    """The peak, where 1/x = lambda ln x, and the paper's parameters.

    With u = ln x at the peak this is u + ln u = A2 / A1 - ln beta, which has an answer even where gamma overflows.
    """
    from scipy.special import wrightomega  # slow import

    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # a peak at infinity has no value
        u = wrightomega(p["A2"] / p["A1"] - np.log(p["beta"]))
        t = 1 / (p["beta"] * u) - p["tau0"]
        peak = predict(p, {"t": t})
    q = to_paper(p)
    del q["K"]
    return {"t_peak": t, "f_peak": peak, **q}


def checkpoints(rng=None):
    """0, 1, 2, 4 ... 512, then every 1000 to 143,000: the 154 checkpoints of the paper's models."""
    return {"t": np.concatenate([[0], 2.0 ** np.arange(10), np.arange(1000, 143001, 1000)])}


EXAMPLE = from_paper({"A": 300.0, "lambda": 0.15, "gamma": 2e-4, "t0": 1.2, "K": 40.0})

register(
    Law(
        name="massive_activations",
        title="Ratio of the largest to the median activation over training",
        formula="f = exp(-beta*t)*(A1*ln(t + tau0) + A2) + K",
        source="arXiv:2508.03616",
        variables=(Variable("t", "steps", "training step of the checkpoint", 0.0, 1e9),),
        target=Variable("f", "ratio", "max |h| / median |h| of a layer's residual output"),
        parameters=(
            Parameter("beta", (-18.0, -3.0), "log", 1e-12, 10.0, "decay per step, lambda*gamma"),
            Parameter("tau0", (-2.0, 13.0), "log", 1e-6, 1e12, "offset in steps, t0/gamma"),
            Parameter("A1", (-100.0, 300.0), "linear", -1e12, 1e12, "size of the logarithm", True),
            Parameter("A2", (-1000.0, 1000.0), "linear", -1e14, 1e14, "offset under the decay, A1*ln(gamma)", True),
            Parameter("K", (0.0, 100.0), "linear", -1e12, 1e12, "level after the decay", True),
        ),
        n_starts=16,
        predict=predict,
        limits="at least 27 checkpoints; K needs the tail (beta*t above 1 at the end); A, lambda, gamma and t0 are "
        "degenerate",
        residual="linear",
        delta=None,
        basis=basis,
        linear=("A1", "A2", "K"),
        signed=True,
        derived=derived,
        synthetic=Synthetic(
            params=EXAMPLE, design=checkpoints, tolerance=dict(beta=0.2, t_peak=0.05, f_peak=0.01), noise=2.0
        ),
    )
)
