"""Rows of efficient_lm.sparsity to fits and figures; arms compared seed by seed."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import activations, sparsity
from analysis.laws import get_law
from analysis.load import DataError
from tests.analysis.synthetic_store import write_run

RELU = {"alpha": 0.8, "b": -2.0, "c": 40.0, "A0": 0.08}
SILU = {"alpha": 0.6, "c": 0.004, "A0": 0.42}


@pytest.fixture
def rows(tmp_path):
    """A file of rows with curves drawn from known laws at 1e6 to 4e7 tokens, two seeds."""
    rng, found = np.random.default_rng(0), []
    for activation, law, p, width in (("relu", "sparsing_relu", RELU, 64), ("silu", "sparsing_silu", SILU, 64)):
        for seed in range(2):
            for step, D in enumerate(np.geomspace(1e6, 4e7, 14), 1):
                active = float(get_law(law).evaluate(p, D=np.array([D]))[0] + 2e-4 * rng.standard_normal())
                shape = {"activation": activation, "d_model": width, "n_layers": 2, "N": 1e5, "seed": seed}
                facts = {"run_id": f"{activation}{seed}", "step": step, "D": D, "method": "cett", **shape}
                detail = {"active_layers": [active] * 2, "active_tokens": [active] * 5, "dense_loss": 1.5}
                for at in ("held", "rise", "dial"):
                    found.append({**facts, "at": at, "dial": 0.2, "loss": 1.51, "active": active, **detail})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_curves_are_recovered_from_rows(rows, tmp_path, capsys):
    frame = sparsity.load([rows])
    found = sparsity.curves(frame, first=1.5e6)
    assert list(found) == [("relu", 64, 2), ("silu", 64, 2)] and found["relu", 64, 2]["D"].min() > 1.5e6
    relu, silu = (curve.fit.values for curve in sparsity.fit_curves(found).values())
    assert relu["A0"] == pytest.approx(RELU["A0"], abs=0.005)
    assert silu["A0"] == pytest.approx(SILU["A0"], abs=0.005)
    assert silu["alpha"] == pytest.approx(SILU["alpha"], abs=0.05)
    assert len(sparsity.last(frame)) == 4
    sparsity.main(sparsity.parser().parse_args(["--rows", str(rows), "--svg", f"{tmp_path}/s_"]))
    assert "relu 0.1M (64 x 2), 2 runs: alpha" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"s_{n}.svg" for n in ("curves", "ratio", "layers", "loss")
    }


def test_intervals_count_runs_and_not_checkpoints():
    """Runs whose curves differ by a constant: A0 is their mean, and its interval that of Student for so many runs."""
    shifts, D = np.array([-0.004, 0.001, 0.006]), np.geomspace(1e6, 4e7, 30)
    curve = get_law("sparsing_silu").evaluate(SILU, D=D)
    found = pd.concat([pd.DataFrame({"run_id": f"r{i}", "D": D, "A": curve + s}) for i, s in enumerate(shifts)])
    fitted = sparsity.fit_curve(get_law("sparsing_silu"), found)
    mean, lo, hi = activations.mean_interval(SILU["A0"] + shifts)
    A0 = fitted.fit.params["A0"]
    np.testing.assert_allclose([A0["value"], A0["lo"], A0["hi"]], [mean, lo, hi], atol=2e-4)
    middle, low, high = fitted.predict(D)
    np.testing.assert_allclose(middle, curve + shifts.mean(), atol=1e-4)
    np.testing.assert_allclose(high - low, hi - lo, rtol=0.02)
    one = sparsity.fit_curve(get_law("sparsing_silu"), found[found["run_id"] == "r0"])
    assert one.fit.params["A0"]["lo"] is None and np.isnan(one.predict(D)[1]).all()


def test_a_fit_that_hangs_on_one_run_is_refused():
    """Flat curves but for one run: without it nothing determines the law."""
    D = np.geomspace(1e6, 4e7, 14)
    falling = get_law("sparsing_relu").evaluate(RELU, D=D)
    flat = 0.08 + 1e-4 * np.random.default_rng(0).standard_normal(14)
    found = pd.concat([pd.DataFrame({"run_id": name, "D": D, "A": A}) for name, A in (("a", falling), ("b", flat))])
    assert "without run a" in sparsity.fit_curve(get_law("sparsing_relu"), found).refused


def test_merged_rows_hold_each_measurement_once(rows, tmp_path, capsys):
    """A run measured again, further on, replaces what was measured before; a repeat adds nothing."""
    early = [json.loads(line) | {"last_step": 5} for line in rows.read_text().splitlines() if '"step": 3' in line]
    again = [json.loads(line) | {"last_step": 14, "loss": 1.6} for line in rows.read_text().splitlines()]
    for name, part in (("early", early), ("again", again)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    files = [str(tmp_path / name) for name in ("again", "early", "again")]
    command = ["--rows", *files, "--save", f"{tmp_path}/all.jsonl"]
    sparsity.main(sparsity.parser().parse_args(command))
    assert f"{len(again)} rows of 4 runs" in capsys.readouterr().out
    merged = sparsity.load([tmp_path / "all.jsonl"])
    assert len(merged) == len(again) and set(merged["last_step"]) == {14} and set(merged["loss"]) == {1.6}


def test_arms_that_start_from_the_same_runs_are_paired(tmp_path, capsys):
    found = []
    for start, level in enumerate((1.0, 1.3)):
        for arch, rise in (("relu", 0.0), ("prosparse", 0.01)):
            facts = {"run_id": f"{arch}{start}", "arch": arch, "start": start, "activation": "relu", "method": "cett"}
            facts |= {"d_model": 64, "n_layers": 2, "N": 1e5, "D": 1e6, "step": 9, "dense_loss": level + rise}
            active = {"zero": 0.2, "rise": 0.1 - 5 * rise + 0.01 * start}
            found += [{**facts, "at": at, "dial": 0.1, "loss": level, "active": a} for at, a in active.items()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    table = sparsity.compare(sparsity.load([path]), "relu").set_index("arch")
    entry = table.loc["prosparse", "loss"]
    np.testing.assert_allclose([entry["value"], entry["lo"], entry["hi"]], 0.01, atol=1e-9)
    assert table.loc["prosparse", "rise"]["value"] == pytest.approx(0.055)
    assert table.loc["prosparse", "rise"]["lo"] < 0.0 < 0.11 < table.loc["prosparse", "rise"]["hi"]
    sparsity.main(sparsity.parser().parse_args(["--rows", str(path), "--compare", "relu"]))
    assert "prosparse" in capsys.readouterr().out
    with pytest.raises(DataError, match="--compare silu: no rows of it"):
        sparsity.compare(sparsity.load([path]), "silu")


def test_rows_that_are_none_are_refused(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"run_id": "x"}\n')
    with pytest.raises(DataError, match="bad.jsonl, line 1: has no activation"):
        sparsity.load([bad])
    with pytest.raises(DataError, match="no such file"):
        sparsity.load([tmp_path / "none"])


def test_a_trend_is_in_the_logarithm_and_covers_the_truth():
    rng, x = np.random.default_rng(4), np.repeat([1.0, 10.0, 100.0], 3)
    found = [sparsity.trend(x, 2.0 - 0.3 * np.log(x) + 0.1 * rng.standard_normal(9)) for _ in range(400)]
    covered = np.mean([entry["lo"] < -0.3 < entry["hi"] for entry in found])
    assert 0.92 < covered < 0.98 and np.mean([entry["value"] for entry in found]) == pytest.approx(-0.3, abs=0.005)


def test_a_query_chooses_rows(rows):
    frame = sparsity.load([rows])
    assert set(sparsity.chosen(frame, "activation == 'relu' and D > 1e7")["activation"]) == {"relu"}
    for where, message in (("foo > 1", "not a query"), ("D > 1e9", "no row"), ("D >", "not a query")):
        with pytest.raises(DataError, match=f"--where '{where}': {message}"):
            sparsity.chosen(frame, where)


@pytest.fixture
def arms():
    """Arm 'b' is best at lr 2 and is then better than 'a' by 0.02; seed 9, whose losses are far off, says so."""
    found = []
    for arch, best, gain in (("a", 1.0, 0.0), ("b", 2.0, 0.02)):
        cells = [("rates", 32, 9, lr) for lr in (1.0, 2.0)]
        cells += [("seeds", size, seed, lr) for size, lr in ((32, 1.0), (32, 2.0), (64, 1.0)) for seed in range(3)]
        for stage, size, seed, lr in cells:
            # Noise is common to both arms: only pairs see through it.
            loss = 2.0 + 0.1 * seed - gain + 0.05 * (size == 32 and lr != best) + 1e-4 * seed * (arch == "b")
            cell = {"arch": arch, "d_model": size, "lr": lr, "seed": seed, "N": 1e5 * size, "status": "done"}
            found.append({"run_id": f"r{len(found)}", "loss": loss, "stage": stage, "steps_done": 10, **cell})
    return pd.DataFrame(found)


def test_arms_are_compared_at_their_own_rates_and_by_pairs_of_seeds(arms, tmp_path, capsys):
    table = activations.differences(activations.compared(arms), "a").set_index(["d_model", "arch"])
    assert table.loc[(32, "b"), "lr"] == 2.0 and table.loc[(64, "b"), "lr"] == 1.0
    for size in (32, 64):
        row = table.loc[(size, "b")]
        assert row["difference"] == pytest.approx(-0.0199, abs=1e-6) and row["seeds"] == 3
        assert -0.0205 < row["lo"] < row["difference"] < row["hi"] < -0.0193
    path = tmp_path / "runs.jsonl"
    arms.to_json(path, orient="records", lines=True)
    command = ["--store", str(path), "--base", "a", "--svg", str(tmp_path / "arms.svg")]
    activations.main(activations.parser().parse_args(command))
    assert "22 of 22 runs finished" in capsys.readouterr().out and (tmp_path / "arms.svg").exists()


def test_seeds_that_choose_the_rate_are_not_compared(arms):
    """Without stages there is no other way than to choose on what is compared."""
    assert set(activations.compared(arms)["seed"]) == {0, 1, 2}
    assert activations.best_rates(arms) == {"a": 1.0, "b": 2.0}
    plain = arms.drop(columns="stage")
    assert set(activations.compared(plain)["seed"]) == {0, 1, 2, 9}
    with pytest.raises(DataError, match="no finished run of the stage 'rates'"):
        activations.best_rates(arms[arms["stage"] == "seeds"])


def test_a_run_in_several_files_counts_once_as_far_as_it_came(arms, tmp_path):
    """The merge of rounds: a planned or stopped run never hides the finished one, whatever the order of files."""
    stopped = arms.assign(status="preempted", loss=np.nan, steps_done=3).head(4)
    files = [tmp_path / "stopped.jsonl", tmp_path / "all.jsonl"]
    for path, frame in zip(files, (stopped, arms.drop(index=0)), strict=True):
        frame.to_json(path, orient="records", lines=True)
    for order in (files, files[::-1]):
        merged = activations.load(order).set_index("run_id")
        assert len(merged) == 22 and merged.loc["r0", "status"] == "preempted"
        assert (merged["status"].drop("r0") == "done").all()


def test_a_run_again_counts_as_in_the_last_store_and_says_what_made_it(tmp_path):
    stores = [tmp_path / "before", tmp_path / "after"]
    for store, loss in zip(stores, (1.5, 1.4), strict=True):
        path = write_run(store, "r0", arch="gla", N=1e4, D=1e6, loss=loss, budget=1e11) / "run.json"
        made = {"code_hash": store.name, "hardware": {"device_kind": "card"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | made))
    assert activations.load(stores).loc[0, ["loss", "code", "device"]].to_list() == [1.4, "after", "card"]
    assert activations.load(stores[::-1]).loc[0, "code"] == "before"


def test_training_losses_are_compared_at_the_same_batches(arms):
    runs = arms[arms["d_model"] == 64]
    curves = pd.DataFrame(
        {"run_id": run.run_id, "step": step, "tokens": 10 * step, "loss": run.loss + 5 / step}
        for run in runs.itertuples()
        for step in (1, 2, 3)
    )
    axis = activations.over_training(curves, runs, "a").axes[0]
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 2 and line.get_xdata()[1] == 30]
    assert len(lines) == 3
    for seed, line in enumerate(lines):
        np.testing.assert_allclose(line.get_ydata(), -0.02 + 1e-4 * seed, atol=1e-9)


def test_the_broken_line_in_width_over_depth_is_found():
    """Last checkpoints only, from which the line up to a bottleneck is recovered."""
    rng, rows = np.random.default_rng(1), []
    for ratio in (4, 10, 30, 60, 100, 150, 250, 400):
        for step in (1, 2):
            active = 0.08 - 4e-4 * max(0.0, 114 - ratio) + 1e-4 * rng.standard_normal() + 0.1 * (step == 1)
            shape = {"activation": "relu", "d_model": ratio, "n_layers": 1, "ratio": ratio}
            rows.append({"run_id": str(ratio), "step": step, "method": "cett", "at": "rise", "active": active, **shape})
    fit = sparsity.fit_ratio(pd.DataFrame(rows), bootstrap=0)
    assert fit.values["r_b"] == pytest.approx(114, rel=0.03) and fit.values["A_inf"] == pytest.approx(0.08, abs=5e-4)


def test_an_interval_needs_two_seeds():
    mean, lo, hi = activations.mean_interval([1.0])
    assert mean == 1.0 and np.isnan(lo) and np.isnan(hi)
    mean, lo, hi = activations.mean_interval([1.0, 2.0, 3.0])
    assert (mean, hi - mean) == (2.0, pytest.approx(4.302653 / np.sqrt(3), rel=1e-6))


def test_a_base_that_is_not_there_is_refused(arms):
    with pytest.raises(DataError, match="--base 'c': no finished run of it; there are a, b"):
        activations.differences(arms, "c")
    with pytest.raises(DataError, match="no finished run"):
        activations.finished(arms.assign(status="failed"))
    with pytest.raises(DataError, match="no finished run of the stage 'seeds'"):
        activations.differences(activations.compared(arms[arms["stage"] == "rates"]), "a")
