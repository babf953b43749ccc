"""Do intervals hold what they say? Simulated sweeps, nominal 90 %: coverage must be 85 to 95 %."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from analysis import uncertainty
from analysis.fit import fit_law, summary
from analysis.isoflop import fit_isoflop
from analysis.laws import get_law
from analysis.load import Table
from analysis.result import Options
from analysis.search import Optimum, problem, search

TRUTH = dict(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.32)


def sweep(rng, noise, sizes=7, budgets=(1e18, 3e18, 1e19, 3e19)):
    """An IsoFLOP sweep, sizes within a factor 4 of the optimum, with seed noise in the loss (relative)."""
    law, rows = get_law("chinchilla"), []
    for C in budgets:
        best = law.optimum(TRUTH, C)["N"] * np.exp(0.3 * rng.standard_normal())
        for N in best * np.geomspace(1 / 4, 4, sizes):
            D = C / (6 * N)
            loss = law.evaluate(TRUTH, N=N, D=D) * np.exp(noise * rng.standard_normal())
            rows.append({"N": N, "D": D, "C": C, "loss": loss})
    return pd.DataFrame(rows)


def as_table(frame):
    return Table(frame, frame.iloc[:0].assign(reason=[]), "simulated")


@pytest.mark.parametrize("weighted", [False, True])
def test_isoflop_exponent_covers(weighted):
    truth = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    rng, inside, error = np.random.default_rng(0), [], []
    for seed in range(150):
        options = Options(bootstrap=300, level=0.9, seed=seed, holdout=False, weighted=weighted)
        a = fit_isoflop(as_table(sweep(rng, 1.5e-3)), options).params["a_N"]
        inside.append(a["lo"] <= truth <= a["hi"])
        error.append(a["value"] - truth)
    assert 0.85 <= np.mean(inside) <= 0.95
    assert abs(np.mean(error)) < 0.2 * np.std(error) + 0.005  # the parabola's own bias is small here


def test_weights_follow_the_noise_of_each_budget():
    """With one budget ten times noisier, 1/sigma^2 weights make the exponent less variable."""
    spread = {}
    for weighted in (False, True):
        rng, values = np.random.default_rng(1), []
        for seed in range(60):
            quiet = sweep(rng, 3e-4, sizes=9, budgets=(1e18, 3e18, 1e19))
            loud = sweep(rng, 3e-3, sizes=9, budgets=(3e19,))
            options = Options(bootstrap=200, seed=seed, holdout=False, weighted=weighted)
            table = as_table(pd.concat([quiet, loud], ignore_index=True))
            values.append(fit_isoflop(table, options).params["a_N"]["value"])
        spread[weighted] = np.std(values)
    assert spread[True] < 0.7 * spread[False]
    with pytest.raises(ValueError, match="weights 1/sigma.2 need at least 100 draws"):
        fit_isoflop(as_table(sweep(rng, 1e-3)), Options(bootstrap=0, weighted=True))


def test_parametric_intervals_cover():
    """Bootstrap of alpha and of a, profile likelihood of alpha, 80 points; the sampling error of coverage is 2 %."""
    law, rng = get_law("chinchilla"), np.random.default_rng(7)
    hits = {"bootstrap alpha": [], "bootstrap a": [], "profile alpha": []}
    for seed in range(200):
        N, D = np.exp(rng.uniform(np.log(1e7), np.log(1e10), 80)), np.exp(rng.uniform(np.log(1e9), np.log(1e12), 80))
        loss = law.evaluate(TRUTH, N=N, D=D) * np.exp(5e-3 * rng.standard_normal(80))
        prob = problem(law, {"N": N, "D": D, "loss": loss})
        start = prob.from_params(TRUTH)
        found = prob.minimize(start[None], np.ones(80), near=start, ftol=1e-14, lanes=8)
        params = {name: float(value) for name, value in prob.params(found.z[0]).items()}
        best = Optimum(found.z[0], params, float(found.f[0]), "converged", 1, 1.0, None)
        statistic = uncertainty.profile_statistic(prob, best, "alpha", TRUTH["alpha"])
        hits["profile alpha"].append(statistic < chi2.ppf(0.9, 1))
        draws = uncertainty.bootstrap(prob, best, 96, seed=seed)
        draws["a"] = law.derived(draws)["a"]
        for name, truth in (("alpha", TRUTH["alpha"]), ("a", law.derived(TRUTH)["a"])):
            lo, hi = np.quantile(draws[name], [0.05, 0.95])
            hits[f"bootstrap {name}"].append(lo <= truth <= hi)
    coverage = {name: np.mean(values) for name, values in hits.items()}
    assert all(0.85 <= value <= 0.95 for value in coverage.values()), coverage


@pytest.mark.quick
def test_profile_of_a_linear_problem_is_the_textbook_interval():
    """ln loss is linear in ln C: the profile interval of both parameters is estimate +- 1.96 standard errors."""
    law = get_law("power0")
    data = law.simulate(noise=0.01, n=30)
    prob = problem(law, data)
    best = search(prob)
    X = np.stack([np.ones(30), -np.log(data["C"])], 1)
    beta, rest, *_ = np.linalg.lstsq(X, np.log(data["loss"]), rcond=None)
    error = np.sqrt(np.diag(np.linalg.inv(X.T @ X)) * rest[0] / 28)
    for name, value, se, back in (("k", beta[0], error[0], np.log), ("gamma", beta[1], error[1], float)):
        found = uncertainty.profile(prob, best, name)
        half = np.sqrt(chi2.ppf(0.95, 1)) * se
        np.testing.assert_allclose([back(found["lo"]), back(found["hi"])], [value - half, value + half], rtol=1e-3)
    result = fit_law(law, as_table(pd.DataFrame(data)), Options(bootstrap=64, profile=True, holdout=False))
    assert result.quality["profile_likelihood"]["gamma"] == pytest.approx(found, rel=1e-6)
    assert "profile likelihood [" in summary(result)
    with pytest.raises(ValueError, match="parameter gamma is held"):
        uncertainty.profile(problem(law, data, {"gamma": 0.06}), best, "gamma")


def test_profile_says_where_the_data_do_not_bound_a_parameter():
    """All runs at nearly the same N: its exponent may be anything."""
    law, rng = get_law("chinchilla"), np.random.default_rng(0)
    N, D = 1e9 * np.exp(0.005 * rng.standard_normal(40)), np.exp(rng.uniform(np.log(1e9), np.log(1e12), 40))
    loss = law.evaluate(TRUTH, N=N, D=D) * np.exp(3e-3 * rng.standard_normal(40))
    prob = problem(law, {"N": N, "D": D, "loss": loss}, {"E": 1.7})
    found = uncertainty.profile(prob, search(prob, thin=7), "alpha")
    assert found["lo"] is None or found["hi"] is None or found["hi"] - found["lo"] > 0.5
