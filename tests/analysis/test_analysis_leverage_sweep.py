"""Leverage and its laws from an IsoFLOP sweep whose truth is known, and their words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import cli, leverage_plot
from analysis.laws import get_law
from analysis.leverage_laws import (
    Leverages,
    claim,
    coverage,
    hangs_on,
    joint_law,
    report,
    sparsity_steps,
    usual,
    verdict,
)
from analysis.leverage_sweep import average_repeats, gather, main, parser, seed_noise, sweep_leverages
from analysis.load import load_table
from analysis.result import Options
from sweeps.plan import make_plan

STORED = Path(analysis.__file__).parent / "results" / "efficiency_leverage" / "runs.csv"
LAW, TRUTH = get_law("leverage"), dict(a=1.0, d=-0.1, beta=-0.08, gamma=0.012, A_s=0.02, A_m=1e16)
SPARSE = ((0.6, 2), (0.33, 2), (0.18, 2), (0.09, 2), (0.03, 2), (0.09, 4), (0.09, 8))
BUDGETS = (1e13, 3.2e13, 1e14, 3.2e14)


def sweep(noise=0.0, seed=0, factors=(0.3, 0.7, 1.5, 3.0)):
    """Sizes around the best one per budget and architecture; dense models have a fifth budget."""
    rng, rows = np.random.default_rng(seed), []
    for A, G in ((1.0, 0), *SPARSE):
        for budget in (*BUDGETS, 1e15) if A == 1 else BUDGETS:
            EL = 1.0 if A == 1 else float(LAW.evaluate(TRUTH, A=A, G=G, C=budget))
            for factor in factors:
                loss = 0.6 + 0.9 * (EL * budget / 1e13) ** -0.12 + 0.03 * np.log10(factor) ** 2
                rows.append({
                    "arch": "dense" if A == 1 else f"moe-A{A}-G{G}", "A": A, "G": float(G), "S": 1 / 3 if G else 0.0,
                    "budget": budget, "C": budget, "N": 2e5 * (budget / 1e13) ** 0.5 * factor,
                    "loss": loss + noise * rng.standard_normal(), "seed": seed,
                })  # fmt: skip
    return pd.DataFrame(rows)


def measured(noise, seed=0, points="isoflop", repeats=1):
    runs = pd.concat([sweep(noise, seed + 100 * i) for i in range(repeats)], ignore_index=True)
    table = load_table(runs, required=("N", "C", "loss"))
    found = sweep_leverages(table, points=points, options=Options(bootstrap=300))
    x = {name: found.rows[name].to_numpy() for name in "AGC"}
    return found, LAW.evaluate(TRUTH, **x)


def test_leverage_and_joint_law_come_back():
    """Leverage grows with compute here, which one exponent for all architectures would hide in the floor."""
    found, truth = measured(1e-5)
    np.testing.assert_allclose(found.rows["EL"], truth, rtol=3e-3)
    reached = truth * found.rows["C"] < 1.03e15
    assert (found.rows["extrapolated"] == ~reached).all() and not reached.all()
    law = joint_law(found)
    for name, tolerance in (("a", 0.02), ("d", 0.02), ("beta", 0.05), ("gamma", 0.1), ("A_s", 0.1)):
        assert law[name][0] == pytest.approx(TRUTH[name], rel=tolerance), name


def test_intervals_hold_the_truth_at_the_noise_of_seeds():
    inside, joint = [], []
    for seed in range(4):
        found, truth = measured(2e-3, seed)
        inside += list((found.rows["EL_lo"] <= truth) & (truth <= found.rows["EL_hi"]))
        law = report(found)["joint"]
        joint += [law[name]["lo"] <= TRUTH[name] <= law[name]["hi"] for name in ("a", "d", "beta", "gamma", "A_s")]
    assert 0.85 < np.mean(inside) <= 1.0  # 112 leverages; those of one sweep share its dense law
    assert np.mean(joint) > 0.7  # of 20


def test_best_three_sizes_with_the_noise_between_seeds():
    inside = []
    for seed in range(4):
        found, truth = measured(2e-3, seed, "best", repeats=2)
        inside += list((found.rows["EL_lo"] <= truth) & (truth <= found.rows["EL_hi"]))
    assert 0.85 < np.mean(inside) <= 1.0
    np.testing.assert_allclose(measured(1e-6, 0, "best", repeats=2)[0].rows["EL"], truth, rtol=1e-3)
    with pytest.raises(ValueError, match="no size near the best was run with two seeds"):
        measured(2e-3, 0, "best")


def test_an_outermost_best_size_is_flagged():
    """Without the sizes below the optimum of sparse models, their leverage comes out smaller and is marked so."""
    runs = sweep(1e-5)
    large = pd.concat([runs[runs["A"] == 1], sweep(1e-5, factors=(1.5, 3.0, 6.0)).query("A < 1")], ignore_index=True)
    whole, cut = (
        sweep_leverages(
            load_table(rows, required=("N", "C", "loss")), "dense", "best", Options(bootstrap=50, seed_noise=1e-5)
        ).rows
        for rows in (runs, large)
    )
    assert (whole["edge"] == "").all() and (cut["edge"] == "small").all()
    assert (cut["EL"] < whole["EL"]).all()
    top = runs["budget"] == BUDGETS[-1]
    table = load_table(runs[~top | (runs["A"] != 0.6) | (runs["N"] > 3e6)], required=("N", "C", "loss"))
    found = sweep_leverages(table, "dense", "best", Options(bootstrap=50, seed_noise=1e-5))
    few = found.rows[found.rows["edge"] == "few"]
    assert few[["A", "budget"]].values.tolist() == [[0.6, BUDGETS[-1]]]
    assert len(report(found)["activation"]) == 4 and len(found.where(usual(found.rows)).rows) == len(found.rows) - 1


def test_repeats_with_one_seed_are_no_seeds():
    rows = pd.concat([sweep(2e-3, 0), sweep(2e-3, 1)], ignore_index=True).assign(
        run_id=lambda x: x.index.map("{:x}".format)
    )
    again = rows.assign(loss=rows["loss"] + 1e-3, run_id=rows["run_id"] + "-2")
    averaged = average_repeats(pd.concat([rows, again], ignore_index=True))
    assert len(averaged) == len(rows)
    np.testing.assert_allclose(averaged["loss"], rows["loss"] + 5e-4)
    noise, freedom = seed_noise(averaged)
    assert noise == pytest.approx(2e-3, rel=0.2) and freedom > 50
    assert seed_noise(rows) == pytest.approx((noise, freedom))
    with pytest.raises(ValueError, match="seed 0: several runs that differ in something else"):
        average_repeats(pd.concat([rows, rows.assign(run_id="a" + rows["run_id"])], ignore_index=True))


def test_rows_of_several_sources_are_kept_once(tmp_path):
    rows = sweep(1e-3).assign(run_id=lambda x: [f"{i:012x}" for i in x.index])
    rows.to_csv(tmp_path / "a.csv", index=False)
    changed = rows.tail(5).assign(loss=lambda x: x["loss"] + [0, 0, 1e-3, 1e-3, np.nan])
    changed.to_csv(tmp_path / "b.csv", index=False)
    merged = tmp_path / "merged.csv"
    argv = ["--store", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--save", str(merged)]
    assert cli.run(main, parser(), argv) == 0
    found = pd.read_csv(merged)
    assert len(found) == len(rows) + 2 and found["run_id"].is_unique
    assert set(found["run_id"]) - set(rows["run_id"]) == {f"{i}-2" for i in rows["run_id"].iloc[-3:-1]}
    again = gather([merged, tmp_path / "b.csv", merged])
    assert again["run_id"].tolist() == found["run_id"].tolist() and again["loss"].tolist() == found["loss"].tolist()
    rows.drop(columns="run_id").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="'run_id' and 'loss' are needed"):
        gather([tmp_path / "b.csv"])


def test_runs_of_a_store_say_what_they_ran_on(store, tmp_path):
    copy, before = shutil.copytree(store, tmp_path / "store"), gather([store])
    run = before["run_id"].iloc[0]
    ran = {"hardware": {"device_kind": "abacus"}, "mean_step_seconds": 2.5, "code_hash": "c0de"}
    path = copy / run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ran))
    for step, value in ((98, 3.0), (99, 2.0)):
        with open(copy / run / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"kind": "train", "step": step, "router_entropy": value}) + "\n")
    rows = gather([copy]).set_index("run_id")
    assert rows.index.tolist() == before["run_id"].tolist() and "reason" not in rows
    assert rows["hardware"].dropna().to_dict() == {run: "abacus"}
    assert rows["router_entropy"].dropna().to_dict() == {run: 2.0} and "router_entropy" not in before
    assert rows.loc[run, ["mean_step_seconds", "code_hash"]].tolist() == [2.5, "c0de"]


def test_stored_rows_hold_the_whole_preset_and_give_the_leverages_that_are_reported():
    """One machine and one revision ran every planned cell, each of which was run elsewhere too: its noise is known."""
    rows = pd.read_csv(STORED)
    h100 = rows[rows["hardware"] == "NVIDIA H100 80GB HBM3"]
    planned = make_plan("configs/sweeps/efficiency_leverage.py:gpu").cells
    cells = set(zip(h100["arch"], h100["budget"], h100["d_model"], strict=True))
    assert cells == {(cell.arch, cell.axes["budget"], cell.config.model.d_model) for cell in planned}
    assert len(h100) == len(planned) and h100["code_hash"].nunique() == 1 and (h100["seed"] == 0).all()
    run = rows["run_id"].str.split("-").str[0]
    assert (rows[run.isin(run[h100.index])].groupby(run)["hardware"].nunique() == 2).all()
    table = load_table(h100, required=("N", "C", "loss"))
    found = sweep_leverages(table, points="best", options=Options(bootstrap=200, seed_noise=0.01))
    at = found.rows[found.rows["arch"] == "moe-A0.0909-G2-S0.33"]
    assert at["EL"].tolist() == pytest.approx([2.87, 3.28, 2.59, 3.18], abs=0.005)
    words = [answer.split(" (")[0] for answer in report(found)["claims"].values()]
    assert words == ["agree", "cannot tell", "cannot tell", "disagree"]


def test_figures_are_drawn():
    found, _ = measured(2e-3)
    law = joint_law(found)
    for figure in (leverage_plot.curves(found, law), leverage_plot.surface(found, law)):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_verdicts():
    assert verdict({"lo": -0.1, "hi": -0.05}, -0.076) == "agree"
    assert verdict({"lo": -0.2, "hi": 0.1}, -0.076) == "cannot tell"
    assert verdict({"lo": 0.02, "hi": 0.1}, -0.076) == "disagree"
    up, down, open_ = {"lo": 0.1, "hi": 0.2}, {"lo": -0.2, "hi": -0.1}, {"lo": -0.1, "hi": 0.1}
    assert claim([up, up], 1) == "agree (2 of 2)" == claim([down, down], -1)
    assert claim([up, down], 1).startswith("cannot tell (1 of 2 agree, 1 the other") and claim([], 1).startswith(
        "cannot"
    )
    assert claim([down], 1).startswith("disagree") and claim([up, open_], 1).startswith("cannot tell (1 of 2")


def test_what_the_published_law_gives_is_looked_up_in_each_interval():
    rows = pd.DataFrame({"EL_lo": 1.0, "EL_hi": 2.0, "published": [1.5] * 3 + [2.5], "edge": [""] * 4})
    assert coverage(rows) == "cannot tell (3 of 4 intervals hold it)" and coverage(rows[:3]).startswith("agree (3 of 3")
    assert coverage(rows[3:]).startswith("disagree (0 of 1")
    assert coverage(rows.assign(edge="small")).startswith("cannot tell (0 of 0")


def test_growth_that_one_budget_makes_is_said_to_hang_on_it():
    """Exponents count as published only where they stay resolved whichever budget is left out."""
    rng, C = np.random.default_rng(0), np.array(BUDGETS)
    for EL, budgets in (((2.0, 2.0, 2.0, 4.0), [BUDGETS[-1]]), (2.0 * (C / 1e13) ** 0.2, []), ((2.0,) * 4, [])):
        rows = pd.DataFrame({"arch": "moe", "budget": C, "C": C, "EL": EL, "edge": ""})
        draws = np.array(EL) * np.exp(0.05 * rng.standard_normal((400, 4)))
        assert hangs_on(Leverages(rows, draws, [], 0.95, None)) == budgets
    assert hangs_on(Leverages(rows.assign(EL=C)[:2], np.tile(C[:2], (9, 1)), [], 0.95, None)) == list(BUDGETS[:2])


def test_steps_from_one_activation_ratio_to_the_next():
    found, truth = measured(1e-5)
    shared = found.where("G == 2")
    known = dict(
        zip(zip(shared.rows["budget"], shared.rows["A"], strict=True), truth[found.rows["G"] == 2], strict=True)
    )
    steps = sparsity_steps(shared)
    assert len(steps) == 16 and not any(step["bound"] for step in steps)
    for step in steps:
        assert step["A"] < step["of"]
        expected = known[step["budget"], step["A"]] / known[step["budget"], step["of"]]
        assert step["ratio"]["value"] == pytest.approx(expected, rel=5e-3)


def test_command_line(tmp_path, capsys):
    sweep(1e-3).to_csv(tmp_path / "runs.csv", index=False)
    base = ["--store", str(tmp_path / "runs.csv"), "--bootstrap", "50"]
    assert cli.run(main, parser(), [*base, "--out", str(tmp_path / "el.json")]) == 0
    text = capsys.readouterr().out
    assert "joint law" in text and "beyond the dense runs" in text and "published -0.0761" in text
    found = json.loads((tmp_path / "el.json").read_text())
    assert len(found["rows"]) == 28 and len(found["activation"]) == 4 and len(found["granularity"]) == 4
    few = [*base, "--where", "G < 4"]
    assert cli.run(main, parser(), few) == 0
    assert "no joint law: column 'G' has 1 values" in capsys.readouterr().out
    for argv, message in (
        ([*base, "--base", "desne"], "arch 'desne' and another one are needed"),
        ([*base, "--bootstrap", "0"], "the laws need draws"),
        ([*base, "--save", str(tmp_path / "rows.csv"), "--where", "A < 1"], "--save keeps every run"),
    ):
        assert cli.run(main, parser(), argv) == 2
        assert message in capsys.readouterr().err


def test_own_runs_need_neither_granularity_nor_shared_experts():
    def run(frame):
        table = load_table(frame, required=("N", "C", "loss"))
        return report(sweep_leverages(table, options=Options(bootstrap=50)))

    rows = sweep(1e-4)
    rows = rows[rows["G"] <= 2]
    whole, plain = run(rows), run(rows.drop(columns=["G", "S"]))
    assert [law["a"] for law in plain["activation"]] == [law["a"] for law in whole["activation"]]
    assert not any("beat" in claim for claim in plain["claims"])
    assert plain["claims"]["the joint law, extrapolated to these budgets"].startswith("cannot tell (0 of 0")
    unshared = run(rows.assign(S=0.0))  # the shared ratio of most, whatever it is
    assert [law["a"] for law in unshared["activation"]] == [law["a"] for law in whole["activation"]]
    mixed = run(rows.assign(S=rows["S"].where(rows["A"] != 0.6, 0.0)))
    assert any("in no law of A or G" in note and "moe-A0.6-G2" in note for note in mixed["notes"])
    with pytest.raises(ValueError, match="column 'arch' is missing"):
        run(rows.drop(columns="arch"))
