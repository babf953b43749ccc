"""Leverage from two run sets, and how well laws come back from noisy data of a realistic design."""

import numpy as np
import pandas as pd
import pytest

from analysis import cli
from analysis.fit import fit_law
from analysis.laws import get_law, massive_activations
from analysis.leverage import frame, leverage, main, parser
from analysis.load import load_table
from analysis.result import Options
from analysis.search import problem

DENSE = dict(k=28.0, gamma=0.055)
OPTIONS = Options(bootstrap=200, holdout=False)


def dense_runs(noise=0.0, seed=0):
    """Seven budgets, three runs each, the best of which lie on the dense law."""
    rng = np.random.default_rng(seed)
    C = np.repeat(np.geomspace(1e17, 3e21, 7), 3)
    loss = DENSE["k"] * C ** -DENSE["gamma"] * np.tile([1.05, 1.0, 1.03], 7) * np.exp(noise * rng.standard_normal(21))
    return load_table(pd.DataFrame({"C": C, "loss": loss}), required=("C", "loss"))


def sparse_runs(noise=0.0, seed=1):
    """84 runs whose compute a dense model would have to multiply by the published leverage."""
    law, rng = get_law("leverage"), np.random.default_rng(seed)
    x = law.synthetic.design(rng)
    EL = law.evaluate(law.synthetic.params, **x)
    loss = DENSE["k"] * (EL * x["C"]) ** -DENSE["gamma"] * np.exp(noise * rng.standard_normal(len(EL)))
    return load_table(pd.DataFrame({**x, "loss": loss}), required=("A", "G", "C", "loss")), EL


def test_leverage_inverts_the_dense_law_and_flags_extrapolation():
    table, truth = sparse_runs()
    found = frame(leverage(dense_runs(), table, options=OPTIONS)[0])
    merged = found.merge(table.rows.assign(truth=truth), on=["A", "G", "C"])
    assert len(merged) == 84
    np.testing.assert_allclose(merged["EL"], merged["truth"], rtol=1e-6)
    far = merged["truth"] * merged["C"] > 3e21  # beyond the dearest dense run
    assert not far.any()
    short = dense_runs()
    short.rows = short.rows[short.rows["C"] < 2e20]
    found = frame(leverage(short, table, options=OPTIONS)[0]).merge(table.rows.assign(truth=truth), on=["A", "G", "C"])
    np.testing.assert_array_equal(found["extrapolated"], found["truth"] * found["C"] > short.rows["C"].max() * 1.0001)
    assert found["extrapolated"].any() and not found["extrapolated"].all()


def test_intervals_hold_the_true_leverage_and_the_table_can_be_fitted():
    inside = []
    for seed in range(4):
        table, truth = sparse_runs(2e-3, seed)
        found = frame(leverage(dense_runs(2e-3, seed + 50), table, options=OPTIONS)[0])
        merged = found.merge(table.rows.assign(truth=truth), on=["A", "G", "C"])
        inside += list((merged["EL_lo"] <= merged["truth"]) & (merged["truth"] <= merged["EL_hi"]))
    # seven dense runs give the noise poorly, and all 84 rows share them
    assert 0.8 < np.mean(inside) <= 1.0
    law = get_law("leverage")
    fit = fit_law(law, load_table(found, required=law.columns), Options(bootstrap=0, holdout=False))
    assert fit.values["a"] == pytest.approx(1.23, rel=0.4) and fit.values["beta"] == pytest.approx(-0.117, rel=0.4)


def test_command_line(tmp_path, capsys):
    dense_runs().rows.assign(kind="dense").to_csv(tmp_path / "dense.csv", index=False)
    sparse_runs()[0].rows.assign(kind="moe").to_csv(tmp_path / "moe.csv", index=False)
    base = ["--dense", str(tmp_path / "dense.csv"), "--variant", str(tmp_path / "moe.csv"), "--bootstrap", "50"]
    argv = [*base, "--variant-where", "C < 4e18", "--out", str(tmp_path / "el.csv")]
    assert cli.run(main, parser(), argv) == 0
    assert "leverage" in capsys.readouterr().out and len(pd.read_csv(tmp_path / "el.csv")) == 14
    for argv, text in ((["--at", "A=0.031,G=12,C=1e22"], "EL = 7.24"), (["--wanted", "7.2449", "--at", "G=12,C=1e22"],
                       "A = 0.031"), (["--wanted", "7", "--at", "A=0.031,C=1e22"], "G from 6.4 to 20.1")):  # fmt: skip
        assert cli.run(main, parser(), argv) == 0
        assert capsys.readouterr().out.startswith(text)
    assert cli.run(main, parser(), ["--wanted", "7", "--at", "C=1e22"]) == 0
    designs = [line.split() for line in capsys.readouterr().out.splitlines()]
    ratio = {float(words[2]): float(words[5]) for words in designs}
    assert max(ratio, key=ratio.get) == pytest.approx(2 ** (0.117 / 0.0334), rel=5e-3) and 2.0 in ratio
    for G, A in ratio.items():
        assert get_law("leverage").evaluate(get_law("leverage").constants["ling"].values, A=A, G=G, C=1e22) == (
            pytest.approx(7.0, rel=0.02)
        )
    for argv, text in (
        (["--at", "A=3.1,G=12,C=1e22"], "A must be within"),
        (["--at", "A=0.031"], "give A, G and C"),
        ([*base, "--variant-where", "C < 1"], "no row of"),
        ([], "give --dense and --variant"),
    ):
        assert cli.run(main, parser(), argv) == 2
        assert text in capsys.readouterr().err


def spread(name, params, x, noise, simulations=60, relative=False):
    """Parameters name -> [simulations] fitted to data drawn from the law with Gaussian noise."""
    law, rng, found = get_law(name), np.random.default_rng(0), []
    y = law.predict(params, x, np)
    for _ in range(simulations):
        eps = noise * rng.standard_normal(len(y))
        prob = problem(law, {**x, law.target.name: y * np.exp(eps) if relative or law.residual == "log" else y + eps})
        start = prob.from_params(params)
        best = prob.minimize(start[None], np.ones(len(y)), near=start, ftol=1e-14, lanes=8)
        found.append(prob.params(best.z[0]))
    return {key: np.array([float(values[key]) for values in found]) for key in found[0]}


def width(draws):
    """Half of the central 68 %: the standard deviation, but for a rare far-off fit of a flat surface."""
    return np.ptp(np.quantile(draws, [0.16, 0.84])) / 2


def test_recovery_spread_of_the_leverage_law():
    """84 points of the published design: standard deviations worked out elsewhere, and the prediction at 1e22 FLOP."""
    law = get_law("leverage")
    p, x = law.constants["ling"].values, law.synthetic.design(None)
    for noise, expected in ((0.01, (0.010, 5e-4, 5e-4, 2.4e-3, 6e-4, 0.03)),
                            (0.03, (0.04, 2.3e-3, 1.7e-3, 8e-3, 1.8e-3, 0.12))):  # fmt: skip
        draws = spread("leverage", p, x, noise)
        draws["far"] = law.predict(draws, {"A": 0.031, "G": 12.0, "C": 1e22}, np)
        found = [width(draws[key]) for key in ("a", "d", "gamma", "beta", "A_s", "far")]
        ratio = np.array(found) / expected  # the expected ones have one digit
        assert (ratio > 0.6).all() and (ratio < 1.7).all(), (noise, ratio)
        assert draws["far"].mean() == pytest.approx(7.245, abs=0.06)


def test_recovery_spread_of_the_sparsing_law():
    """The limit A0 comes back; b and c of the smallest model do not."""
    law, x = get_law("sparsing_relu"), {"D": np.linspace(5e9, 2e11, 60)}
    for size, alpha, A0 in (("0.2B", 0.07, 8e-4), ("0.8B", 0.08, 2e-3)):
        draws = spread("sparsing_relu", law.constants[size].values, x, 5e-4)
        assert width(draws["alpha"]) == pytest.approx(alpha, rel=0.35)
        assert width(draws["A0"]) == pytest.approx(A0, rel=0.35)
    draws = spread("sparsing_relu", law.constants["0.1B"].values, x, 5e-4)
    assert width(draws["A0"]) == pytest.approx(1.7e-3, rel=0.35)
    assert width(draws["b"]) > abs(law.constants["0.1B"].values["b"]) and width(draws["c"]) > 3.2


def test_recovery_spread_of_massive_activations():
    """2 % noise on 154 checkpoints: peak, level and lambda*gamma come back, the paper's parameters trade off."""
    law = get_law("massive_activations")
    paper = dict(zip(("A", "lambda", "gamma", "t0", "K"), (5, 0.5, 1e-4, 1, 2), strict=True))
    p = massive_activations.from_paper(paper)
    draws = spread("massive_activations", p, massive_activations.checkpoints(), 0.02, relative=True)
    derived, truth = law.derived(draws), law.derived(p)
    for name, limit in (("beta", 0.07), ("K", 0.005)):
        assert width(draws[name]) < limit * p[name], name
    for name, limit in (("t_peak", 0.03), ("f_peak", 0.006)):
        assert width(derived[name]) < limit * truth[name], name
    assert np.corrcoef(np.log(derived["lambda"]), np.log(derived["gamma"]))[0, 1] < -0.98
    assert width(derived["lambda"]) > 0.12 * paper["lambda"] and width(derived["A"]) > 0.12 * paper["A"]


def test_the_command_says_what_it_counts_and_where_the_best_of_several_tries_counts(tmp_path, capsys):
    rows = pd.DataFrame({"run_id": [f"r{i}" for i in range(8)], "budget": [1e17, 1e18, 1e19, 1e20] * 2, "N": 1e6})
    C = rows["budget"].to_numpy()
    rows = rows.assign(C=C, loss=DENSE["k"] * C ** -DENSE["gamma"] * np.repeat([1.0, 0.97], 4))
    again = rows.iloc[4:5].assign(run_id="again", loss=4.0)
    rows.iloc[:4].to_csv(tmp_path / "dense.csv", index=False)
    pd.concat([rows.iloc[4:], again]).to_csv(tmp_path / "moe.csv", index=False)
    files = ["--dense", str(tmp_path / "dense.csv"), "--variant", str(tmp_path / "moe.csv"), "--bootstrap", "0"]
    assert cli.run(main, parser(), files) == 0
    printed = capsys.readouterr().out
    assert "r4 " in printed and "again" not in printed
    assert "C: FLOP; loss: nats per token; no intervals" in printed
    assert "moe.csv: 1 of 4 sizes have several runs, the best of which counts" in printed
    assert "dense.csv: 1" not in printed.partition("note:")[2]
    assert cli.run(main, parser(), [*files[:-1], "50"]) == 0
    assert (
        "note: dense law: 4 rows for 2 parameters: bootstrap intervals may need 3.10 times" in capsys.readouterr().out
    )
    rows.iloc[4:].assign(tokens_hash="b").to_csv(tmp_path / "moe.csv", index=False)
    assert cli.run(main, parser(), files) == 0  # the dense runs do not say on which tokens
    rows.iloc[:4].assign(tokens_hash="a").to_csv(tmp_path / "dense.csv", index=False)
    assert cli.run(main, parser(), files) == 2 and "column 'tokens_hash' is mixed ('a', 'b')" in capsys.readouterr().err
