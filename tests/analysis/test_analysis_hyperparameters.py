"""Near-optimal filter and the sensitivity of learning-rate and batch laws to it."""

import numpy as np
import pandas as pd
import pytest

from analysis import cli, hyperparameters
from analysis.load import load_table
from analysis.result import Options
from tests.analysis.conftest import public_table


def grid(noise=0.0, seed=0):
    """Loss rises with the squared distance of ln lr and ln batch from their laws."""
    rng = np.random.default_rng(seed)
    rows = []
    for N in (1e8, 3e8, 1e9):
        for D in (2e9, 1e10, 5e10):
            for lr in 2.0 ** np.arange(-13, -5):
                for batch in 2.0 ** np.arange(15, 23):
                    off = np.log(lr / (1.79 * N**-0.713 * D**0.307)) ** 2 + np.log(batch / (0.58 * D**0.571)) ** 2
                    loss = (1.8 + 300 / N**0.33) * (1 + 0.004 * off + noise * rng.standard_normal())
                    rows.append({"N": N, "D": D, "lr": lr, "batch": batch, "loss": loss})
    return pd.DataFrame(rows)


@pytest.mark.quick
def test_filter_keeps_what_is_near_the_best_and_says_so():
    table = load_table(grid(), required=("N", "D", "lr", "batch", "loss"))
    kept = hyperparameters.near_optimal(table, 0.0025)
    best = table.rows.groupby(["N", "D"])["loss"].min()
    assert all(row.loss <= 1.0025 * best[row.N, row.D] for row in kept.rows.itertuples())
    assert len(kept.rows) + len(kept.excluded) == len(table.rows)
    assert set(kept.excluded["reason"]) == {"loss more than 0.250% above the best of its group"}
    assert len(hyperparameters.near_optimal(table, 0.0).rows) == 9
    with pytest.raises(ValueError, match=r"tau 2.5: must lie in \[0, 1\)"):
        hyperparameters.near_optimal(table, 2.5)
    named = load_table(grid().assign(size=lambda rows: "N" + rows["N"].astype(str)), required=("loss",))
    assert len(hyperparameters.near_optimal(named, 0.0, by=("size", "D")).rows) == 9  # groups may have names
    with pytest.raises(ValueError, match="column 'C' is missing"):
        hyperparameters.near_optimal(table, 0.0025, by=("C",))


def test_known_laws_are_recovered_at_each_threshold():
    table = load_table(grid(noise=3e-4), required=("N", "D", "lr", "batch", "loss"))
    laws, options = ["lr_size_data", "batch_data"], Options(bootstrap=100, holdout=False)
    rows = hyperparameters.sensitivity(table, laws, taus=(0.0025,), options=options)
    assert [row["tau"] for row in rows] == [0.0025, 0.0] * 2
    for row in rows:
        truth = {"p": -0.713, "q": 0.307} if row["law"] == "lr_size_data" else {"p": 0.571}
        for name, value in truth.items():
            # settings lie on a grid of factors of two
            assert row["params"][name]["value"] == pytest.approx(value, abs=0.12), (row["law"], row["tau"])


def test_groups_whose_best_settings_lie_at_the_edge_of_the_grid_are_counted():
    """Their exponents are biased: with batches up to 2^18 tokens only, the best of most groups is the largest tried."""
    full = grid()
    cut = load_table(full[full["batch"] <= 2.0**18], required=("N", "D", "lr", "batch", "loss"))
    options = Options(bootstrap=50, holdout=False)
    near, best = hyperparameters.sensitivity(cut, ["batch_data"], taus=(0.0025,), options=options)
    assert near["cut"] >= 6 and best["cut"] >= 3
    assert abs(near["params"]["p"]["value"] - 0.571) > 0.12
    assert "near-best runs reach the edge of the batch tried in some groups" in hyperparameters.text_table([near, best])
    whole = load_table(full, required=("N", "D", "lr", "batch", "loss"))
    (row, _) = hyperparameters.sensitivity(whole, ["batch_data"], taus=(0.0025,), options=options)
    assert row["cut"] == 0 and "reach the edge" not in hyperparameters.text_table([row])


def test_published_grid_and_its_sensitivity():
    table = load_table(public_table("steplaw_dense.csv"), required=("N", "D", "lr", "batch", "loss"),
                       columns={"loss": "smooth loss", "batch": "bs * 2048"})  # fmt: skip
    assert len(table.rows) == 1911
    rows = hyperparameters.sensitivity(table, ["lr_size_data", "batch_data"], options=Options(holdout=False))
    found = {(row["law"], row["tau"]): row for row in rows}
    usual = found["lr_size_data", 0.0025]
    assert usual["n"] == 129
    for key, N, D in ((0.0025, -0.766, 0.197), (0.005, -0.712, 0.173), (0.0, -0.823, 0.288)):
        params = found["lr_size_data", key]["params"]
        assert [params["p"]["value"], params["q"]["value"]] == pytest.approx([N, D], abs=0.001), key
    for name, lo, hi in (("p", -0.877, -0.665), ("q", 0.136, 0.262)):
        assert [usual["params"][name][end] for end in ("lo", "hi")] == pytest.approx([lo, hi], abs=0.1 * (hi - lo))
    assert usual["params"]["k"]["value"] == pytest.approx(77.7, rel=1e-3)
    assert not usual["params"]["q"]["lo"] < 0.307 < usual["params"]["q"]["hi"]  # the published exponent of D
    batch = found["batch_data", 0.0025]["params"]
    assert batch["p"]["value"] == pytest.approx(0.613, abs=0.001)
    assert batch["k"]["value"] == pytest.approx(0.209, rel=0.01)
    assert batch["p"]["lo"] < 0.571 < batch["p"]["hi"]
    assert "p depends on the threshold" in hyperparameters.text_table(rows)


def test_published_bootstrap_draws_average_to_the_published_constants():
    draws = pd.read_csv(public_table("steplaw_bootstrap_params.csv"))
    numbers = draws.select_dtypes("number").mean().to_numpy()[-5:]
    found = [np.exp(numbers[0]), numbers[1], numbers[2], np.exp(numbers[3]), numbers[4]]
    assert found == pytest.approx([1.797, -0.7129, 0.3075, 0.5807, 0.5709], abs=0.002)


def test_command_line(tmp_path, capsys):
    frame = grid(noise=3e-4).rename(columns={"batch": "tokens per step"})
    frame.to_csv(tmp_path / "grid.csv", index=False)
    base = ["--data", str(tmp_path / "grid.csv"), "--columns", "batch=tokens per step", "--law", "batch_data"]
    argv = [*base, "--bootstrap", "50", "--out", str(tmp_path / "out.json")]
    assert cli.run(hyperparameters.main, hyperparameters.parser(), argv) == 0
    text = capsys.readouterr().out
    assert "batch = k*D^p   [tokens]" in text and "tau 0.25%" in text and "best run only" in text
    assert (tmp_path / "out.json").exists()
    assert cli.run(hyperparameters.main, hyperparameters.parser(), [*base, "--by", "N,seed"]) == 2
    assert "column 'seed' is missing" in capsys.readouterr().err
