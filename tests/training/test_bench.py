"""Training speed of models side by side: whole steps of what the config says."""

import json

import pytest

from efficient_lm import bench

TINY = ["--config.model.d_model=8", "--config.model.n_layers=1", "--config.train.seq_len=16", "--jobs", "1"]


def test_a_table_of_one_model(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main(["--configs", "configs/dense.py:tiny", "--out", str(out), *TINY]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tokens"] == 8 * 16 and row["active_params"] < row["total_params"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
    assert row["first_step_s"] > row["ms"] / 1e3


def test_what_did_not_compile_in_time_is_said(capsys):
    assert bench.main(["--configs", "configs/dense.py:tiny", "--compile-seconds", "0", *TINY]) == 1
    assert "1 models did not compile within --compile-seconds 0" in capsys.readouterr().out


@pytest.mark.quick
def test_a_bad_config_ends_before_anything_compiles(capsys):
    assert bench.main(["--configs", "configs/dense.py:tiny,configs/dense.py:huge", *TINY]) == 2
    assert "'huge'" in capsys.readouterr().err
