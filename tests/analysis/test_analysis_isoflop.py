"""IsoFLOP profiles: published minima, honest intervals, refusals."""

import numpy as np
import pandas as pd
import pytest

from analysis.fit import fit_law
from analysis.isoflop import best_of_budgets, budget_groups, fit_isoflop, fit_profile, next_sizes, profiles
from analysis.load import load_table
from analysis.result import Options
from tests.analysis.conftest import public_table
from tests.analysis.coverage import as_table, sweep

TARGETS = [
    ("llama", 2048, False, (0.006899, 0.553549), (74.0293, 0.422606)),
    ("llama", 8192, False, (0.002052, 0.577327), (64.9618, 0.421860)),
    ("llama", 8192, True, (0.002281, 0.574909), (58.4603, 0.424271)),
    ("llama", 16384, False, (0.0025000, 0.569337), (34.4774, 0.432544)),
    ("mlstm_v1", 16384, False, (0.0049990, 0.566040), (336.097, 0.385230)),
]


@pytest.mark.parametrize(("model", "context", "with_1e20", "params", "tokens"), TARGETS)
def test_published_isoflop_laws(model, context, with_1e20, params, tokens):
    skipped = "isoflop_budget != 'extra'" + ("" if with_1e20 else " and isoflop_budget != '1e+20'")
    table = load_table(
        public_table("xlstm_isoflop.csv"),
        columns="N=num_params,D=num_tokens_training,C=num_flops_training,loss=val_loss,budget=isoflop_budget",
        where=f"model_type == '{model}' and context_length == {context} and selected_by_authors and {skipped}",
    )
    result = fit_isoflop(table, Options(bootstrap=200))
    assert result.refused is None
    found = [result.params[key]["value"] for key in ("A_N", "a_N", "A_D", "a_D")]
    # coefficients are printed with 4 to 7 digits
    np.testing.assert_allclose(found[0::2], [params[0], tokens[0]], rtol=1.5e-4)
    np.testing.assert_allclose(found[1::2], [params[1], tokens[1]], atol=1e-6)


def parabola(noise=0.0, seed=0, sizes=6, centre=20e6, curvature=0.3, spread=4.0):
    x = centre * np.geomspace(1 / spread, spread, sizes)
    loss = 3.0 + curvature * np.log10(x / 20e6) ** 2
    return x, loss + noise * np.random.default_rng(seed).standard_normal(sizes)


@pytest.mark.quick
def test_exact_parabola_and_interval_coverage():
    x, loss = parabola()
    profile = fit_profile(1e18, x, loss, range(6))
    assert profile.refused is None
    assert profile.x_opt == pytest.approx(20e6) and profile.loss_opt == pytest.approx(3.0)
    inside = []
    for seed in range(200):
        p = fit_profile(1e18, *parabola(0.004, seed), range(6), draws=400, seed=seed)
        lo, hi = np.nanquantile(p.x_draws, [0.025, 0.975])
        inside.append(lo <= 20e6 <= hi)
    # 200 trials of a 95 % interval: within three standard errors
    assert np.mean(inside) == pytest.approx(0.95, abs=0.047)


@pytest.mark.parametrize(
    ("profile", "reason", "edge"),
    [
        (parabola(centre=200e6), "minimum at an edge: the smallest size is the best; add smaller sizes", "small"),
        (parabola(centre=2e6), "minimum at an edge: the largest size is the best; add larger sizes", "large"),
        (parabola(curvature=-0.3), "no minimum: the curve bends downwards (negative curvature)", None),
        (parabola(sizes=3), "too few points: 3 different sizes, at least 4 are needed", None),
        (parabola(curvature=0.02, noise=0.03, seed=1), "flat: the interval of the curvature", None),
    ],
)
def test_budgets_without_a_minimum_are_refused(profile, reason, edge):
    found = fit_profile(1e18, *profile, range(len(profile[0])))
    assert found.refused.startswith(reason) and found.edge == edge
    more = next_sizes(found)
    if edge == "small":
        assert max(more) < found.x.min()
    elif edge == "large":
        assert min(more) > found.x.max()
    else:
        assert min(more) < found.x.min() and max(more) > found.x.max()


def test_known_seed_noise_allows_three_sizes():
    x, loss = parabola(sizes=3)
    found = fit_profile(1e18, x, loss, range(3), noise=(0.002, np.inf))
    assert found.refused is None and found.x_opt == pytest.approx(20e6)
    wider = fit_profile(1e18, x, loss, range(3), noise=(0.004, np.inf))
    assert np.nanstd(np.log(wider.x_draws)) > 1.5 * np.nanstd(np.log(found.x_draws))


@pytest.mark.quick
def test_recovers_the_exponents_of_a_known_law(store):
    table = load_table(store, where="arch == 'gla'")
    result = fit_isoflop(table, Options())
    truth = 0.32 / (0.32 + 0.35)
    assert result.params["a_N"]["lo"] < truth < result.params["a_N"]["hi"]
    assert result.params["a_D"]["lo"] < 1 - truth < result.params["a_D"]["hi"]
    assert result.holdout["intervals_overlap"] and abs(result.holdout["mean_error"]) < 0.1
    assert len(result.budgets) == 3 and result.optimum[1]["C"] == pytest.approx(1e13, rel=1e-3)
    assert [point["extrapolated"] for point in result.optimum] == [False, True]


def test_hold_out_does_not_look_at_the_dearest_budget():
    """Noise in the runs that are predicted changes neither the prediction nor its interval."""
    rng = np.random.default_rng(0)
    frame = sweep(rng, 1e-3)
    noisy = frame.copy()
    noisy.loc[frame["C"] == frame["C"].max(), "loss"] *= np.exp(2e-3 * rng.standard_normal(7))
    one, other = (fit_isoflop(as_table(rows), Options(bootstrap=100)).holdout for rows in (frame, noisy))
    assert one["found"]["value"] != other["found"]["value"] and one["n_fit"] == 3
    assert one["predicted"] == other["predicted"]


def test_too_few_accepted_budgets_are_refused(store):
    table = load_table(store, where="arch == 'gla'", x_range={"N": (0, 9000)})
    result = fit_isoflop(table, Options(bootstrap=50))
    assert "budgets have a minimum in N, 2 are needed" in result.refused
    assert result.params == {}


def test_a_fit_through_mixed_architectures_is_marked(store):
    result = fit_law("isoflop", load_table(store), Options(bootstrap=50))
    assert "column 'arch' is mixed (attention, gla)" in result.warnings[0]
    with pytest.raises(ValueError, match="law isoflop cannot hold parameters"):
        fit_law("isoflop", load_table(store), Options(fix={"a_N": 0.5}))


def test_budgets_by_column_by_gaps_or_none():
    C = np.array([1.0, 1.02, 9.0, 8.9, 1.01, 9.1]) * 1e18
    groups = budget_groups(pd.DataFrame({"C": C}), C)
    assert [sorted(g.tolist()) for g in groups] == [[0, 1, 4], [2, 3, 5]]
    named = budget_groups(pd.DataFrame({"budget": list("bbaaba")}), C)
    assert [sorted(g.tolist()) for g in named] == [[0, 1, 4], [2, 3, 5]]
    one = pd.DataFrame({"C": C[[0, 1, 4]], "N": [1e6, 2e6, 3e6], "loss": [3.0, 2.9, 3.0]})
    with pytest.raises(ValueError, match=r"column 'C' holds one budget only \(1.01e\+18 FLOP\)"):
        profiles(one)
    spread = np.geomspace(1e18, 1e20, 40)
    assert budget_groups(pd.DataFrame({"C": spread}), spread) is None


def test_frontier_keeps_one_run_a_budget(store):
    table = best_of_budgets(load_table(store, where="arch == 'gla'"))
    assert len(table.rows) == 3
    fit = fit_law("power0", table, Options(bootstrap=0, holdout=False))
    assert fit.warnings == ["no compute budget has more than one run: every row is taken for the best at its compute"]
    assert (table.excluded["reason"] == "not the best run of its budget").sum() == 15


def test_small_budgets_share_one_noise_level():
    """With 5 points a budget, 95 % intervals of all minima hold, and are narrower than from each budget's own noise."""
    inside, widths = [], []
    for seed in range(60):
        parts = [parabola(0.006, 100 * seed + i, sizes=5) for i in range(3)]
        frame = pd.DataFrame(
            {
                "C": np.repeat([1e18, 3e18, 1e19], 5),
                "N": np.concatenate([x for x, _ in parts]),
                "loss": np.concatenate([loss for _, loss in parts]),
            }
        )
        pooled = profiles(frame, "N", Options(bootstrap=300, seed=seed))
        own = [fit_profile(1e18, x, loss, range(5), draws=300, seed=seed) for x, loss in parts]
        for p, q in zip(pooled, own, strict=True):
            lo, hi = np.nanquantile(p.x_draws, [0.025, 0.975])
            inside.append(lo <= 20e6 <= hi)
            widths.append((p.curvature["hi"] - p.curvature["lo"]) / (q.curvature["hi"] - q.curvature["lo"]))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)  # 180 intervals, three at a time correlated
    assert np.median(widths) < 0.8
