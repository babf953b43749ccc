"""Cheapest model over training and use: against a brute-force search, limits, the command line."""

import numpy as np
import pandas as pd
import pytest

from analysis import cli, inference
from analysis.laws import get_law

LAW = get_law("chinchilla")
P = LAW.constants["besiroglu"].values


@pytest.mark.quick
@pytest.mark.parametrize("tokens", [0.0, 1e11, 1e13])
def test_optimum_is_the_cheapest_of_a_fine_grid(tokens):
    best = inference.optimum(P, 2.2, tokens)
    assert LAW.evaluate(P, N=best["N"], D=best["D"]) == pytest.approx(2.2, rel=1e-9)
    N = best["N"] * np.geomspace(0.5, 2, 4001)
    rest = 2.2 - P["E"] - P["A"] * N ** -P["alpha"]
    N, rest = N[rest > 0], rest[rest > 0]
    cost = 6 * N * (P["B"] / rest) ** (1 / P["beta"]) + 2 * N * tokens
    assert best["total"] <= cost.min() * (1 + 1e-12)
    assert N[np.argmin(cost)] == pytest.approx(best["N"], rel=1e-3)


def test_without_use_it_is_the_compute_optimum_and_use_makes_it_smaller():
    chinchilla = LAW.optimum(P, 1e21)
    best = inference.optimum(P, chinchilla["loss"], 0.0)
    assert [best["N"], best["D"], best["C"], best["saving"]] == pytest.approx(
        [chinchilla["N"], chinchilla["D"], 1e21, 1.0], rel=1e-6
    )
    more = [inference.optimum(P, chinchilla["loss"], tokens) for tokens in (1e10, 1e12, 1e14)]
    sizes, savings = [b["N"] for b in more], [b["saving"] for b in more]
    assert sizes == sorted(sizes, reverse=True) and savings == sorted(savings) and sizes[0] < best["N"]
    draws = {name: np.array([value, value * 1.01]) for name, value in P.items()}
    assert inference.optimum(draws, 2.2, 1e12)["N"][0] == pytest.approx(inference.optimum(P, 2.2, 1e12)["N"])
    assert np.isnan(inference.optimum(P, 1.8, 1e12)["N"])  # below E


def test_command_line(tmp_path, capsys):
    path = tmp_path / "t.csv"
    pd.DataFrame(LAW.simulate()).to_csv(path, index=False)
    argv = ["--data", str(path), "--tokens", "0,1e12", "--bootstrap", "20"]
    assert cli.run(inference.main, inference.parser(), argv) == 0
    used, _, _, first, second = capsys.readouterr().out.splitlines()
    assert used == f"60 rows of {path}"
    assert first.split()[-3:] != second.split()[-3:] and "[" in second
    assert "extrapolated" not in first  # the optimum of the dearest run's compute
    far = ["--data", str(path), "--tokens", "1e18", "--bootstrap", "0"]
    assert cli.run(inference.main, inference.parser(), far) == 0
    assert "extrapolated: D, D/N beyond the runs" in capsys.readouterr().out
    base = ["--constants", "besiroglu", "--tokens"]
    for more, message in (
        (["-1"], "--tokens '-1': must be 0 or more"),
        (["1e12", "--loss", "0"], "--loss 0: must be positive"),
        (["1e12", "--compute=-1e20"], "--compute -1e+20: must be positive"),
        (["1e12", "--loss", "1.5"], "must lie above the irreducible loss E = 1.817"),
    ):
        assert cli.run(inference.main, inference.parser(), [*base, *more]) == 2
        assert message in capsys.readouterr().err
