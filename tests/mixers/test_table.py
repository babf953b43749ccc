"""The table of `python -m efficient_lm.mixers` with conformance and losses of runs, and the sweep behind it."""

import json

import pytest

from efficient_lm.mixers import MIXERS, __main__
from efficient_lm.schema import ConfigError
from sweeps.plan import make_plan

JUNIT = """<testsuites><testsuite name="pytest">
<testcase name="test_shape_and_dtype[gla]"/>
<testcase name="test_shape_and_dtype[gla-strong-decay]"><failure>x</failure></testcase>
<testcase name="test_a_short_run_learns[gla]"><skipped/></testcase>
<testcase name="test_shape_and_dtype[simple_gla]"/>
</testsuite></testsuites>"""


def write_run(store, mixer, lr, seed, loss):
    path = store / f"{mixer}-{lr}-{seed}"
    path.mkdir(parents=True)
    info = {"sweep": {"mixer": mixer, "lr": lr}, "seed": seed, "flops": {"model_causal": 8e11}, "final_loss": loss}
    (path / "run.json").write_text(json.dumps(info | {"status": "diverged" if loss is None else "done"}))


def test_losses_are_those_of_the_best_learning_rate(tmp_path):
    for lr, seed, loss in ((0.01, 0, 1.5), (0.01, 1, 1.6), (0.003, 0, 1.7), (0.003, 1, 1.3), (0.1, 0, None)):
        write_run(tmp_path, "gla", lr, seed, loss)
    write_run(tmp_path, "kda", 0.01, 0, None)
    losses, note = __main__.matched_losses(tmp_path)
    assert losses == {"gla": "1.500 +-0.200 (lr 0.003)", "kda": "diverged"}
    assert "6 runs of 8e+11" in note
    rows = "".join((path / "run.json").read_text() + "\n" for path in tmp_path.iterdir())
    (tmp_path / "rows.jsonl").write_text(rows)
    assert __main__.matched_losses(tmp_path / "rows.jsonl") == (losses, note)


def test_conformance_counts_variants_and_not_skipped_tests(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert __main__.conformance(tmp_path / "junit.xml") == {"gla": "1/2", "simple_gla": "1/1"}


def test_columns_of_the_printed_table(tmp_path, capsys):
    (tmp_path / "junit.xml").write_text(JUNIT)
    write_run(tmp_path, "gla", 0.01, 0, 1.5)
    arguments = ["--d-model", "64", "--seq-len", "64", "--runs", str(tmp_path), "--markdown"]
    assert __main__.main([*arguments, "--conformance", str(tmp_path / "junit.xml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if line[:1] == "|"
    }
    assert cells["gla"][-4:-1] == ["1/2", "1.500 (lr 0.01)", MIXERS["gla"].kernel]
    assert cells["mamba"][-4:-2] == ["-", "-"]


@pytest.mark.parametrize("function", [__main__.matched_losses, __main__.conformance])
def test_missing_results_are_refused(function, tmp_path):
    with pytest.raises(ConfigError, match="^--(runs|conformance) .*absent"):
        function(tmp_path / "absent")


def test_the_sweep_trains_all_mixers_at_equal_flops():
    cells = make_plan("configs/sweeps/mixers.py:2").cells
    assert len(cells) == len(MIXERS) * 2 * 2 == len({cell.run_id for cell in cells})
    flops = [cell.flops for cell in cells]
    assert max(flops) < 1.01 * min(flops)
