"""Approach 1 from learning curves, and exponents under every accounting."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import accounting, cli, envelope
from analysis.laws import get_law
from analysis.load import Table, load_table
from analysis.result import Options

TRUTH = dict(E=1.7, A=400.0, B=900.0, alpha=0.34, beta=0.32)


def curves_and_table(sizes, noise=0.002, seed=0):
    """Learning curves that follow the law at every horizon, as of a constant learning rate."""
    rng, law, curves, rows = np.random.default_rng(seed), get_law("chinchilla"), [], []
    for i, N in enumerate(sizes):
        D = np.geomspace(0.5 * N, 400 * N, 120)
        loss = law.evaluate(TRUTH, N=N, D=D) * np.exp(noise * rng.standard_normal(120))
        curves.append(pd.DataFrame({"run_id": f"run{i}", "tokens": D, "flops": 6 * N * D, "loss": loss}))
        rows.append({"run_id": f"run{i}", "N": N, "D": D[-1], "C": 6 * N * D[-1], "loss": loss[-1]})
    rows = pd.DataFrame(rows)
    return pd.concat(curves), Table(rows, rows.iloc[:0].assign(reason=[]), "simulated")


def test_envelope_recovers_the_exponents():
    fit = envelope.fit_envelope(*curves_and_table(np.geomspace(1e6, 1e9, 16)), Options(bootstrap=100))
    a = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    assert fit.refused is None
    assert fit.params["a_N"]["value"] == pytest.approx(a, abs=0.03)
    assert fit.params["a_D"]["value"] == pytest.approx(1 - a, abs=0.03)
    assert fit.params["a_N"]["lo"] < a < fit.params["a_N"]["hi"]
    assert fit.params["a_N"]["value"] + fit.params["a_D"]["value"] == pytest.approx(1, abs=1e-6)  # C = 6 N D here
    assert fit.quality["sizes_on_envelope"] >= 8 and not fit.warnings


def test_envelope_says_where_few_draws_make_its_intervals():
    """Two inner sizes: a draw of the runs lacks one of them more often than not."""
    fit = envelope.fit_envelope(*curves_and_table(np.geomspace(1e6, 1e9, 4)), Options(bootstrap=100))
    assert fit.refused is None and fit.quality["bootstrap_share_usable"] < 0.8
    assert any("of the bootstrap draws, the others have no two inner sizes" in text for text in fit.warnings)


def test_envelope_refuses_where_only_the_ends_are_best():
    fit = envelope.fit_envelope(*curves_and_table([1e6, 3e7, 1e9]), Options(bootstrap=10))
    assert fit.refused.startswith("fewer than two sizes besides the smallest and the largest")
    fit = envelope.fit_envelope(*curves_and_table([1e6, 3e7]), Options(bootstrap=10))
    assert fit.refused == "2 runs have a learning curve of 8 points or more; 3 sizes are needed"


def test_smoothing_keeps_a_line_and_does_not_extrapolate():
    flops = np.geomspace(1e10, 1e12, 50)
    grid = np.geomspace(1e9, 1e13, 41)
    found = envelope.smooth(flops, 5 - 0.1 * np.log(flops), grid)
    inside = (grid >= 1e10) & (grid <= 1e12)
    np.testing.assert_allclose(found[inside], 5 - 0.1 * np.log(grid[inside]), rtol=1e-9)
    assert np.isnan(found[~inside]).all()


def test_exponents_change_with_what_is_counted(store):
    table = load_table(store, where="arch == 'gla'", required=("N", "D", "C", "loss"))
    # at these sizes the embedding is a larger share of small models: counting it lowers the exponent
    table.rows["N_total"] = table.rows["N_nonemb_head"] + 256 * np.sqrt(table.rows["N_nonemb_head"])
    rows = accounting.exponents(table, ("isoflop",), Options(bootstrap=50))
    found = {(row["n"], row["c"]): row["a"]["value"] for row in rows}
    assert len(found) == 12 and not any(row["refused"] for row in rows)
    assert found["total", "model_causal"] < found["nonemb_head", "model_causal"] - 0.02
    # in this store full and causal FLOPs differ by a constant factor only
    assert found["nonemb", "model_full"] == pytest.approx(found["nonemb", "model_causal"], abs=1e-6)
    text = accounting.text_table(rows)
    assert "nonemb_head" in text and "hardware" in text and text.count("\n") == 12


def test_command_lines(store, tmp_path, capsys):
    argv = ["--store", str(store), "--where", "arch == 'gla'", "--bootstrap", "20"]
    out = tmp_path / "table.json"
    assert cli.run(accounting.main, accounting.parser(), [*argv, "--law", "isoflop", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 12 and "N* ~ C^a" in capsys.readouterr().out
    assert cli.run(envelope.main, envelope.parser(), argv) == 0
    assert "isoflop: " in capsys.readouterr().out
    path = tmp_path / "t.csv"
    pd.DataFrame({"N": [1e6, 2e6], "D": [1e8, 1e8], "C": [6e14, 1.2e15], "loss": [3.0, 2.9]}).to_csv(path)
    for module in (accounting, envelope):
        assert cli.run(module.main, module.parser(), ["--store", str(path)]) == 2
        assert "run store" in capsys.readouterr().err
