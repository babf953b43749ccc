"""Emergence curves: what a fit finds in made-up ones, AIC between laws, regression on the architecture."""

import numpy as np
import pandas as pd
import pytest

from analysis import emergence
from analysis.laws import get_law, massive_activations, step_response

STEPS = np.array(sorted({0, *(2**i for i in range(10)), *range(100, 4001, 100)}), float)
PEAK = massive_activations.from_paper({"A": 60.0, "lambda": 0.3, "gamma": 2e-3, "t0": 1.2, "K": 8.0})


def curve(law, params, noise=0.02, seed=0):
    f = get_law(law).evaluate(params, t=STEPS)
    return f * (1 + noise * np.random.default_rng(seed).standard_normal(len(f)))


def test_a_peak_is_found_with_its_interval_and_the_law_chosen():
    truth = massive_activations.derived(PEAK)
    found = emergence.fit_curve(STEPS, curve("massive_activations", PEAK))
    assert found["refused"] is None and found["peak"] == "seen" and found["best"] == "massive_activations"
    assert found["r2"] > 0.98
    end = get_law("massive_activations").evaluate(PEAK, t=STEPS)[-1]
    assert found["f_end"] == pytest.approx(end, rel=0.05) and found["f_end_hi"] - found["f_end_lo"] < 0.1 * end
    for name in ("t_peak", "f_peak"):
        width = found[f"{name}_hi"] - found[f"{name}_lo"]
        assert abs(found[name] - truth[name]) < width < 0.1 * truth[name]
    assert found["aic_first_order_step"] > 20


@pytest.mark.quick
def test_the_peak_is_known_where_the_parameters_of_the_paper_overflow():
    p = {"beta": 1e-3, "tau0": 0.5, "A1": 2.0, "A2": 1600.0, "K": 7.0}
    found = massive_activations.derived(p)
    assert np.isinf(found["gamma"]) and found["t_peak"] > 0
    near = found["t_peak"] + np.array([-1e-3, 0.0, 1e-3])
    below, top, above = massive_activations.predict(p, {"t": near})
    assert found["f_peak"] == top > max(below, above)


@pytest.mark.quick
def test_half_of_the_rise():
    # A slow logarithm: f = ln(1 + t / 100) reaches half of ln 101 where t = 100 (sqrt(101) - 1).
    log = {"beta": 1e-12, "tau0": 100.0, "A1": 1.0, "A2": -np.log(100.0), "K": 0.0}
    down = log | {"A1": -1.0, "A2": np.log(100.0)}
    assert emergence.half_rise(log, 1e4) == pytest.approx(100 * (101**0.5 - 1), rel=0.02)
    both = emergence.half_rise({name: np.array([log[name], down[name]]) for name in log}, 1e4)
    assert both[0] == emergence.half_rise(log, 1e4) and np.isnan(both[1])
    # The fall before the lowest value does not count.
    dip = log | {"A1": 0.0, "A2": 1.0, "K": 0.0, "beta": 1e-3}
    assert np.isnan(emergence.half_rise(dip, 1e4))


def test_step_responses_are_told_from_the_emergence_curve():
    rising = curve("first_order_step", {"tau": 700.0, "A": 50.0, "K": 9.0})
    found = emergence.fit_curve(STEPS, rising, draws=100)
    assert found["peak"] != "seen" and found["aic_first_order_step"] < 6
    ringing = curve("second_order_step", {"omega": 5e-3, "zeta": 0.3, "A": 50.0, "K": 9.0})
    found = emergence.fit_curve(STEPS, ringing, draws=100)
    assert found["best"] == "second_order_step" and found["aic_massive_activations"] > 20


@pytest.mark.quick
def test_second_order_decay_solves_its_equation():
    t = np.linspace(0, 60, 6001)
    for zeta in (0.2, 0.999, 1.0, 1.001, 3.0):
        h = step_response.decay(0.3, zeta, t)
        first, second = np.gradient(h, t), np.gradient(np.gradient(h, t), t)
        rest = second + 2 * zeta * 0.3 * first + 0.09 * h
        assert np.abs(rest[5:-5]).max() < 2e-4 and h[0] == pytest.approx(1.0) and abs(first[0]) < 1e-3
        over = 1 - h.min() - 1 if h.min() < 0 else 0.0
        assert step_response.overshoot({"zeta": zeta})["overshoot"] == pytest.approx(over, abs=1e-3)


def made_up(seed=0, shapes=((6, 128, 4), (8, 192, 6), (12, 256, 8), (10, 320, 10))):
    """Curves whose t_peak and K follow from the architecture and whose A is noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for layers, width, heads in shapes:
        for layer in range(layers):
            facts = {"n_layers": layers, "d_model": width, "n_heads": heads, "d_ff": 8 * width // 3}
            depth = (layer + 1) / layers
            values = {"t_peak": np.expm1(6 + 2 * depth - depth**2), "K": 5 + 3 * depth, "A": rng.exponential(50.0)}
            values |= dict.fromkeys(("lambda", "gamma", "t0", "beta", "f_peak", "t_half", "f_end"), np.nan)
            ends = {f"{name}_lo": 0.9 * value for name, value in values.items()}
            ends |= {f"{name}_hi": 1.1 * value for name, value in values.items()}
            rows.append({"run_id": str(width), "layer": layer, "peak": "seen", "refused": None} | facts | values | ends)
    return pd.DataFrame(rows)


@pytest.mark.quick
def test_regression_predicts_what_the_architecture_decides_and_nothing_else():
    table = emergence.regression(made_up()).set_index(["target", "model"])
    assert set(table.index.get_level_values("target")) == {"A", "K", "t_peak"}
    for model in ("linear", "boosted stumps"):
        assert table.loc[("t_peak", model), "r2_layers"] > 0.9
        assert table.loc[("K", model), "r2_architectures"] > 0.9
        assert table.loc[("A", model), "r2_layers"] < 0.25
    # Curves that do not determine a quantity do not count for it.
    fits = made_up()
    fits.loc[fits["layer"] % 2 == 0, "K_hi"] = 1e3
    fits.loc[fits["n_layers"] == 12, "peak"] = "no"
    fits.loc[fits["n_layers"] == 8, "refused"] = "tau0 ran to its bound"
    used = emergence.regression(fits).set_index(["target", "model"])["n"]
    assert used[("K", "linear")] == 18 and used[("t_peak", "linear")] == 24 and used[("A", "linear")] == 28
    with pytest.raises(ValueError, match="no quantity is determined by 10 of 3 curves: too few for 5 folds"):
        emergence.regression(fits.head(3))


def test_a_layer_is_held_out_with_all_its_seeds():
    """Two runs of one architecture, A noise but the same in both: knowing one run's layer would give it away."""
    fits = pd.concat([made_up(), made_up().assign(run_id="again")])
    table = emergence.regression(fits).set_index(["target", "model"])
    assert table.loc[("A", "boosted stumps"), "n"] == 72 and table.loc[("A", "boosted stumps"), "r2_layers"] < 0.25


def test_held_out_rows_never_train():
    x, y, fold = np.arange(12.0)[:, None], np.arange(12.0), np.arange(12) % 3
    seen = []

    def predict(x, y, new):
        seen.append((set(x[:, 0]), set(new[:, 0])))
        return np.zeros(len(new))

    emergence.cross_validated(predict, x, y, fold)
    assert all(not train & test and len(train | test) == 12 for train, test in seen) and len(seen) == 3
