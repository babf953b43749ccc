"""Choices that move a fit, and the choice between laws."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import cli, model_selection, sensitivity
from analysis.laws import get_law
from analysis.load import load_table
from analysis.model_selection import select, verdict
from analysis.result import Options
from tests.analysis.coverage import as_table, sweep

OPTIONS = Options(bootstrap=60, thin=40)


def test_outliers_are_seen_in_the_table():
    """Two losses 30 % too high: leaving out the highest brings back the truth, least squares leaves the interval."""
    law = get_law("chinchilla")
    data = law.simulate(seed=2)
    top = np.argsort(data["loss"])[-2:]
    data["loss"][top] *= 1.3
    rows = sensitivity.sensitivity(law, load_table(pd.DataFrame(data)), OPTIONS)
    found = {row["change"]: row for row in rows}
    assert rows[0]["change"] == "as fitted" and rows[0]["n"] == 60 and not rows[0]["moved"]
    truth = law.synthetic.params
    assert found["without the 3 highest losses"]["n"] == 57
    assert found["without the 3 highest losses"]["values"]["alpha"]["value"] == pytest.approx(truth["alpha"], rel=0.03)
    assert {"E", "alpha"} & set(found["least squares"]["moved"])
    assert abs(found["least squares"]["values"]["E"]["value"] / truth["E"] - 1) > 0.01
    text = sensitivity.text_table(rows)
    assert "*" in text.splitlines()[4] and "without the dearest fifth" in text


def test_budgets_and_end_sizes_are_left_out():
    table = as_table(sweep(np.random.default_rng(0), 1e-3))
    rows = sensitivity.sensitivity("isoflop", table, Options(bootstrap=120))
    counts = {row["change"]: row["n"] for row in rows}
    assert counts == {
        "as fitted": 28, "minima weighted by 1/sigma^2": 28, "without the 1 highest loss": 27,
        "without the dearest budget": 21, "without the cheapest budget": 21,
        "without both end sizes of each budget": 20,
    }  # fmt: skip
    assert not any(row["refused"] for row in rows)
    for row in rows:
        assert row["values"]["a"]["value"] == pytest.approx(0.32 / 0.66, abs=0.08)
    seeds = pd.concat([table.rows, table.rows.assign(loss=table.rows["loss"] + 1e-3)], ignore_index=True)
    last = sensitivity.sensitivity("isoflop", as_table(seeds), Options(bootstrap=120))[-1]
    assert last["n"] == 40  # every run of an end size goes, not one of them
    few = as_table(sweep(np.random.default_rng(0), 1e-3, budgets=(1e18, 1e19, 1e20), sizes=5))
    last = sensitivity.sensitivity("isoflop", few, OPTIONS)[-1]
    assert "budgets have a minimum" in last["refused"] and last["values"] == {}


@pytest.mark.parametrize(("truth", "laws"), [("kaplan", ("kaplan", "chinchilla")), ("chinchilla", ("tied_exponents",
                                              "chinchilla"))])  # fmt: skip
def test_the_law_that_made_the_data_is_chosen(truth, laws):
    data = dict(chinchilla=dict(E=1.8, A=1500.0, B=400.0, alpha=0.45, beta=0.25), kaplan=None)[truth]
    law = get_law(truth)
    x = law.simulate(n=60)
    if data:
        x["loss"] = law.predict(data, x) * np.exp(1e-3 * np.random.default_rng(0).standard_normal(60))
    rows = select(load_table(pd.DataFrame(x)), laws, OPTIONS)
    assert rows[0]["law"] == truth and rows[0]["aic"] == 0 and rows[0]["weight"] > 0.8
    assert sum(row["weight"] for row in rows) == pytest.approx(1)
    assert rows[0]["holdout"] < 2.5e-3 and min(row["holdout"] for row in rows) > 5e-4


def test_selection_says_when_it_is_not_resolved_and_refuses_what_it_cannot_compare():
    rows = [{"law": "a", "aic": 0.0, "holdout": 0.02}, {"law": "b", "aic": 3.0, "holdout": 0.01}]
    assert verdict(rows).startswith("not resolved: AIC prefers a, the hold-out b (error 1.00% against 2.00%)")
    assert (
        verdict([{**rows[0], "holdout": 0.005}, rows[1]])
        == "a by both AIC and hold-out, though AIC barely separates it from b"
    )
    assert "nothing to choose from" in verdict(rows[:1])
    few = load_table(pd.DataFrame(get_law("chinchilla").simulate(n=6)))
    assert select(few, ("chinchilla",), OPTIONS)[0]["refused"] == "too few points: 6 rows for 5 parameters"
    with pytest.raises(ValueError, match="laws predict different quantities: batch, loss"):
        select(few, ("chinchilla", "batch_data"))


def test_command_lines(tmp_path, capsys):
    path = tmp_path / "t.csv"
    pd.DataFrame(get_law("power").simulate(n=30)).to_csv(path, index=False)
    out = tmp_path / "out.json"
    argv = ["--data", str(path), "--law", "power", "--bootstrap", "20", "--out", str(out)]
    assert cli.run(sensitivity.main, sensitivity.parser(), argv) == 0
    assert "without the dearest fifth" in capsys.readouterr().out and len(json.loads(out.read_text())) == 8
    argv = ["--data", str(path), "--law", "power", "power0", "--out", str(out)]
    assert cli.run(model_selection.main, model_selection.parser(), argv) == 0
    assert "verdict: power by both" in capsys.readouterr().out
    assert [row["law"] for row in json.loads(out.read_text())] == ["power", "power0"]
    for module in (sensitivity, model_selection):
        assert cli.run(module.main, module.parser(), ["--data", str(path), "--law", "chinchilla"]) == 2
        assert "column 'N' is missing" in capsys.readouterr().err
