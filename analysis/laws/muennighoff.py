"""Repeated data, Muennighoff et al., arXiv:2305.16264.

    L = E + A / N'^alpha + B / D'^alpha
    D' = U + U R_D (1 - e^(-(D/U - 1)/R_D))          U: unique tokens
    N' = V + V R_N (1 - e^(-(N/V - 1)/R_N)),         V = min(N, U (A/B)^(1/alpha)): the best size for U tokens

Fitted in two stages: the base law (A, B, E, alpha) on the runs of one epoch (they should have no excess parameters,
N < V, or the base is biased), then R_D and R_N on all others with the base held. The surface over R_D and R_N is flat:
the range of both that fits about as well is reported.
"""

from dataclasses import replace

import numpy as np

from analysis.laws.base import Constants, Law, Parameter, Synthetic, Variable, register

FLAT = 1.05  # an objective up to this factor above the best counts as fitting about as well


def effective(p, x, xp=np):
    """(N', D') of runs x."""
    best = x["U"] * xp.exp((xp.log(p["A"]) - xp.log(p["B"])) / p["alpha"])
    V = xp.minimum(x["N"], best)
    D = x["U"] * (1 - p["R_D"] * xp.expm1(-(x["D"] / x["U"] - 1) / p["R_D"]))
    return V * (1 - p["R_N"] * xp.expm1(-(x["N"] / V - 1) / p["R_N"])), D


def predict(p, x, xp=np):
    N, D = effective(p, x, xp)
    return p["E"] + p["A"] * xp.exp(-p["alpha"] * xp.log(N)) + p["B"] * xp.exp(-p["alpha"] * xp.log(D))


def fit(table, options):
    """Two stages; intervals of the base law come from its own fit, those of R_D and R_N hold the base."""
    from analysis.fit import fit_generic
    from analysis.laws import get_law
    from analysis.result import Options

    law, base, rows = get_law("muennighoff"), get_law("tied_exponents"), table.rows
    once = rows["D"] <= 1.001 * rows["U"]
    if once.all() or not once.any():
        which = "none of the runs repeats data" if once.all() else "every run repeats data: no run for the base law"
        raise ValueError(f"law muennighoff: columns D and U: {which}")
    plain = {**vars(options), "fix": {k: v for k, v in options.fix.items() if not k.startswith("R_")}}
    first = fit_generic(base, replace(table, rows=rows[once]), Options(**plain))
    if first.refused:
        first.law, first.refused = law.name, f"base law, {int(once.sum())} runs of one epoch: {first.refused}"
        return first
    held = {name: entry["value"] for name, entry in first.params.items()}
    second = fit_generic(law, table.take(~once), Options(**{**vars(options), "fix": {**held, **options.fix}}))
    second.params |= first.params
    second.draws = {**first.draws, **{name: second.draws[name] for name in ("R_D", "R_N") if name in second.draws}}
    second.n, second.seconds = len(rows), first.seconds + second.seconds
    second.quality |= {"base": first.quality, "flat_set": _flat_set(law, rows[~once], second.values, options.delta)}
    return second


def _flat_set(law, rows, values, delta) -> dict:
    """Ranges of R_D and R_N whose objective, with the other one the best of the grid, stays within FLAT of the best."""
    from analysis.search import huber, problem

    prob = problem(law, rows, delta=delta)
    axes = np.geomspace(0.2, 500, 60)
    grid = [[{**values, "R_D": R_D, "R_N": R_N} for R_N in axes] for R_D in axes]
    objective = np.array([[huber(prob.residuals(point), prob.delta).sum() for point in line] for line in grid])
    near = objective <= FLAT * huber(prob.residuals(values), prob.delta).sum()
    out = {"within": FLAT}
    for k, name in enumerate(("R_D", "R_N")):
        inside = [*axes[near.any(axis=1 - k)], values[name]]
        out[name] = {"lo": min(inside), "hi": max(inside)}
    return out


TERMS = (
    Parameter("E", np.arange(-1, 1.1, 0.5), "log", 0.02, np.inf, "irreducible loss"),
    Parameter("A", np.arange(0, 21, 5), "log", 1e-8, 1e20, "size of the parameter term"),
    Parameter("B", np.arange(0, 21, 5), "log", 1e-8, 1e20, "size of the data term"),
    Parameter("alpha", (0.1, 0.3, 0.6, 1.0), "linear", 0.005, 2.5, "exponent of N and of D"),
)
SIZE = Variable("N", "parameters", "trainable parameters")
DATA = Variable("D", "tokens", "training tokens, repeats counted")
LOSS = Variable("loss", "nats/token", "mean next-token cross-entropy")
BASE = dict(A=np.exp(6.255414), B=np.exp(7.3049974), E=np.exp(0.6254804), alpha=0.3526596)
SOURCE = "arXiv:2305.16264"


def _tied(p, x, xp=np):
    return p["E"] + p["A"] * xp.exp(-p["alpha"] * xp.log(x["N"])) + p["B"] * xp.exp(-p["alpha"] * xp.log(x["D"]))


register(
    Law(
        name="tied_exponents",
        title="Parametric loss with one exponent for parameters and tokens",
        formula="loss = E + A*N^-alpha + B*D^-alpha",
        source=SOURCE,
        variables=(SIZE, DATA),
        target=LOSS,
        parameters=TERMS,
        predict=_tied,
        limits="base law of muennighoff; one epoch",
        centre=(("A", "alpha", "N"), ("B", "alpha", "D")),
        basis=lambda p, x: [np.ones_like(x["N"]), x["N"] ** -p["alpha"], x["D"] ** -p["alpha"]],
        linear=("E", "A", "B"),
        constants={"c4": Constants(SOURCE, BASE, "C4, N 7e6-9e9")},
        synthetic=Synthetic(BASE, {"N": (1e7, 1e10), "D": (1e8, 1e12)}, dict(E=0.02, alpha=0.03)),
    )
)


def _design(rng):
    """40 runs of one epoch without excess parameters, then 80 of 2 to 60 epochs."""
    N = np.exp(rng.uniform(np.log(2e7), np.log(9e9), 120))
    U = np.exp(rng.uniform(np.log(1e8), np.log(2e10), 120))
    U[:40] = N[:40] * np.exp(rng.uniform(np.log(25), np.log(2000), 40))
    epochs = np.concatenate([np.ones(40), np.exp(rng.uniform(np.log(2), np.log(60), 80))])
    return {"N": N, "D": U * epochs, "U": U}


register(
    Law(
        name="muennighoff",
        title="Loss with repeated data",
        formula="loss = E + A*N'^-alpha + B*D'^-alpha; D' = U + U*R_D*(1 - exp(-(D/U - 1)/R_D)); "
        "N' = V + V*R_N*(1 - exp(-(N/V - 1)/R_N)); V = min(N, U*(A/B)^(1/alpha))",
        source=SOURCE,
        variables=(SIZE, DATA, Variable("U", "tokens", "unique training tokens")),
        target=LOSS,
        parameters=(
            *TERMS,
            Parameter("R_D", np.log((1.0, 4.0, 15.0, 60.0)), "log", 0.02, 1e4, "epochs over which repeats lose value"),
            Parameter("R_N", np.log((1.0, 4.0, 15.0, 60.0)), "log", 0.02, 1e4, "the same for excess parameters"),
        ),
        predict=predict,
        limits="R_N and R_D come from a flat surface: use the range, not the value; needs runs of one epoch too",
        constants={
            "c4": Constants(SOURCE, {**BASE, "R_D": 15.387756, "R_N": 5.309743}, "C4, up to 1500 epochs, N 7e6-9e9")
        },
        synthetic=Synthetic(
            params={**BASE, "R_D": 15.387756, "R_N": 5.309743}, design=_design, tolerance=dict(alpha=0.05, R_D=0.3)
        ),
        fitter=fit,
    )
)
