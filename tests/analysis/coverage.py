"""Do intervals hold what they say? Share of simulated sweeps whose nominal 90 % interval holds the truth.

    python -m tests.analysis.coverage [--simulations 1000] [--seed 0] [--only parametric ...]

Noise is relative, 0.5 % of the loss for the parametric fit and 0.15 % for the others; of leverages .004 nats, known.
That is the spread of seeds of small runs.
"""

import argparse
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import chi2

from analysis import frontier, uncertainty
from analysis.hyperparameters import near_optimal
from analysis.isoflop import fit_isoflop
from analysis.laws import get_law
from analysis.leverage_laws import compute_law, intervals
from analysis.leverage_sweep import sweep_leverages
from analysis.load import Table
from analysis.result import Options
from analysis.search import Optimum, problem

LEVEL = 0.9
TRUTH = dict(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.32)
BUDGETS = (1e18, 3e18, 1e19, 3e19)
GAIN, GROWTH = 1.3, 0.2


def steeper(growth: float) -> dict[str, float]:
    """A truth with the same optimum at the cheapest budget C_0, from where its gain grows as (C / C_0)^growth."""
    best = get_law("chinchilla").optimum(TRUTH, BUDGETS[0])
    alpha, beta = (TRUTH[name] * (1 + growth) for name in ("alpha", "beta"))
    share = (best["loss"] - TRUTH["E"]) / (alpha + beta)
    return dict(TRUTH, alpha=alpha, beta=beta, A=beta * share * best["N"] ** alpha, B=alpha * share * best["D"] ** beta)


def sweep(rng, noise, sizes=7, budgets=BUDGETS, speed=1.0, truth=TRUTH):
    """An IsoFLOP sweep, sizes within a factor 4 of the optimum, with seed noise in the loss (relative).

    `speed`: compute counts this many times, so that the true gain over an architecture of speed 1 is `speed`.
    """
    law, rows = get_law("chinchilla"), []
    for C in budgets:
        best = law.optimum(truth, speed * C)["N"] * np.exp(0.3 * rng.standard_normal())
        for N in best * np.geomspace(1 / 4, 4, sizes):
            loss = law.evaluate(truth, N=N, D=speed * C / (6 * N)) * np.exp(noise * rng.standard_normal())
            rows.append({"N": N, "D": C / (6 * N), "C": C, "loss": loss})
    return pd.DataFrame(rows)


def as_table(frame):
    return Table(frame, frame.iloc[:0].assign(reason=[]), "simulated")


def near_truth(law, data, truth=TRUTH) -> tuple:
    """The problem and its optimum, searched from the true parameters only."""
    prob = problem(law, data)
    start = prob.from_params(truth)
    found = prob.minimize(start[None], np.ones(len(prob.y)), near=start, ftol=1e-14, lanes=8)
    params = {name: float(value) for name, value in prob.params(found.z[0]).items()}
    return prob, Optimum(found.z[0], params, float(found.f[0]), "converged", 1, 1.0, None)


def parametric(rng, seed, n=80, noise=5e-3) -> dict[str, bool]:
    """Bootstrap and profile likelihood of the parametric law on n points spread over N and D."""
    law = get_law("chinchilla")
    N, D = np.exp(rng.uniform(np.log(1e7), np.log(1e10), n)), np.exp(rng.uniform(np.log(1e9), np.log(1e12), n))
    loss = law.evaluate(TRUTH, N=N, D=D) * np.exp(noise * rng.standard_normal(n))
    prob, best = near_truth(law, {"N": N, "D": D, "loss": loss})
    statistic = uncertainty.profile_statistic(prob, best, "alpha", TRUTH["alpha"])
    hits = {"profile alpha": statistic < chi2.ppf(LEVEL, 1)}
    draws = uncertainty.bootstrap(prob, best, 96, seed=seed)
    truth = {**TRUTH, **law.derived(TRUTH), "L*": law.optimum(TRUTH, 1e22)["loss"]}
    draws |= {**law.derived(draws), "L*": law.optimum(draws, 1e22)["loss"]}
    for name in ("alpha", "a", "L*"):
        lo, hi = np.quantile(draws[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        hits[f"bootstrap {name}"] = lo <= truth[name] <= hi
    return hits


def few(rng, seed, n=8, noise=5e-3) -> dict[str, bool]:
    """A power law through few rows: bootstrap intervals as they are, and times `few_rows`."""
    law, truth, C = get_law("power0"), dict(k=30.0, gamma=0.1), np.geomspace(1e13, 1e16, n)
    loss = law.evaluate(truth, C=C) * np.exp(noise * rng.standard_normal(n))
    prob, best = near_truth(law, {"C": C, "loss": loss}, truth)
    lo, hi = np.quantile(uncertainty.bootstrap(prob, best, 96, seed=seed)["gamma"], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value, factor = best.params["gamma"], uncertainty.few_rows(n, 2, LEVEL)
    wider = value + factor * (lo - value) <= truth["gamma"] <= value + factor * (hi - value)
    return {"gamma": lo <= truth["gamma"] <= hi, "gamma, wider": wider}


def settings(rng, seed, noise=1e-3, scatter=0.1, step=0.35) -> dict[str, bool]:
    """Exponents of the best learning rate from near-optimal runs of a grid; each group is a little off the law."""
    law, truth, rows = get_law("lr_size_data"), dict(k=1.79, p=-0.713, q=0.307), []
    for N in (2e8, 4e8, 8e8):
        for D in (1e10, 2e10, 4e10, 8e10, 1.6e11):
            best = [np.log(law.evaluate(truth, N=N, D=D)), np.log(0.58 * D**0.571)] + scatter * rng.standard_normal(2)
            lr, batch = np.meshgrid(step * np.arange(-24, -8), step * np.arange(36, 48))
            x, y = lr.ravel() - best[0], batch.ravel() - best[1]
            loss = 0.007 * x * x - 0.004 * x * y + 0.006 * y * y + noise * rng.standard_normal(len(x))
            rows.append(pd.DataFrame({"N": N, "D": D, "lr": np.exp(lr.ravel()), "loss": 2.5 * np.exp(loss)}))
    near = near_optimal(as_table(pd.concat(rows, ignore_index=True)), 0.0025).rows
    draws = uncertainty.bootstrap(*near_truth(law, near, truth), 96, seed=seed)
    ends = {name: np.quantile(draws[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) for name in ("p", "q")}
    return {f"settings {name}": lo <= truth[name] <= hi for name, (lo, hi) in ends.items()}


def isoflop(rng, seed) -> dict[str, bool]:
    """The exponent of N* from IsoFLOP minima, plain and weighted."""
    table, truth = as_table(sweep(rng, 1.5e-3)), TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    hits = {}
    for weighted in (False, True):
        options = Options(bootstrap=300, level=LEVEL, seed=seed, holdout=False, weighted=weighted)
        a = fit_isoflop(table, options).params["a_N"]
        hits["isoflop a weighted" if weighted else "isoflop a"] = a["lo"] <= truth <= a["hi"]
    return hits


def holdout(rng, seed) -> dict[str, float]:
    """Prediction intervals for the runs of the dearest budget, fitted on the others: share of runs inside."""
    frame = sweep(rng, 1.5e-3, sizes=8, budgets=(*BUDGETS, 1e20))
    law = replace(get_law("chinchilla"), n_starts=8)  # `near` is the optimum: the grid of starts only costs time
    prob, best = near_truth(law, frame)
    return {"hold-out runs": uncertainty.holdout(prob, frame, best.z, 96, level=LEVEL, seed=seed)["share_inside"]}


def gain(rng, seed) -> dict[str, bool]:
    """Compute-equivalent gain at the dearest common compute, the one gain for all compute, and a gain that grows."""
    hits = {}
    for truth in (GAIN, 1.0):
        result = _compared(rng, seed, speed=truth)
        for key, entry in (("", result["judged"]["gain"]), ("constant ", result["constant_gain"])):
            hits[f"{key}gain {truth:g}"] = entry["lo"] <= truth <= entry["hi"]
    result = _compared(rng, seed, truth=steeper(GROWTH))
    truth, entry = (result["judged"]["C"] / BUDGETS[0]) ** GROWTH, result["judged"]["gain"]
    hits["growing gain"] = entry["lo"] <= truth <= entry["hi"]
    hits["growth of the gain"] = result["trend"]["lo"] <= GROWTH <= result["trend"]["hi"]
    return hits


def leverage(rng, seed, noise=4e-3, speed=2.0) -> dict[str, bool]:
    """Leverage by the best size of a budget and its neighbours, one run each, and its growth, which is none."""
    dense = sweep(rng, 0.0, budgets=(*BUDGETS, 1e20)).assign(arch="dense", A=1.0)
    sparse = sweep(rng, 0.0, speed=speed).assign(arch="moe", A=0.1)
    rows = pd.concat([dense, sparse], ignore_index=True)
    rows = rows.assign(budget=rows["C"], loss=rows["loss"] + noise * rng.standard_normal(len(rows)))
    options = Options(bootstrap=300, level=LEVEL, seed=seed, seed_noise=noise)
    found = sweep_leverages(as_table(rows), points="best", options=options)
    at, growth = found.rows.iloc[1], intervals(compute_law(found), LEVEL)["a"]
    return {"leverage": at["EL_lo"] <= speed <= at["EL_hi"], "growth of leverage": growth["lo"] <= 0 <= growth["hi"]}


def _compared(rng, seed, **variant) -> dict:
    sweeps = {"base": sweep(rng, 1.5e-3), "variant": sweep(rng, 1.5e-3, **variant)}
    options = Options(bootstrap=300, seed=seed)
    return frontier.compare(*(frontier.frontier_points(rows, name, options) for name, rows in sweeps.items()), LEVEL)


SIMULATIONS = {f.__name__: f for f in (parametric, few, settings, isoflop, holdout, gain, leverage)}


def coverage(name: str, simulations: int, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    hits = [SIMULATIONS[name](rng, 10**6 * seed + i) for i in range(simulations)]
    return {key: float(np.mean([hit[key] for hit in hits])) for key in hits[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.analysis.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SIMULATIONS, default=list(SIMULATIONS))
    args = parser.parse_args()
    for chosen in args.only:
        for key, share in coverage(chosen, args.simulations, args.seed).items():
            error = np.sqrt(share * (1 - share) / args.simulations)
            print(f"{key:<20} {share:.3f} +- {error:.3f}", flush=True)
