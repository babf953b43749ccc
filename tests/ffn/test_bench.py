"""The benchmark of mixtures compares models that spend the same FLOPs per token, and says what it can't do."""

import json

import pytest

from efficient_lm.config import load
from efficient_lm.counting import count_flops
from efficient_lm.ffn import bench

TINY = ["--config", "configs/moe.py:tiny", "--config.model.d_model=16", "--config.train.seq_len=16", "--rows", "1"]


@pytest.mark.parametrize("variant", ["tiny", "small", "340M"])
def test_the_dense_twin_spends_the_same_but_for_routers(variant):
    cfg = load(f"configs/moe.py:{variant}")
    twin, moe = bench.dense_twin(cfg), cfg.model.ffns["moe"]
    routers = 6 * cfg.model.d_model * moe.n_experts * (cfg.model.n_layers - 1)
    assert count_flops(cfg)["model_causal"] - routers == pytest.approx(count_flops(twin)["model_causal"], rel=1e-9)


def test_a_table_of_a_tiny_model(tmp_path, monkeypatch):
    """All but whole training steps, which take long to compile."""
    monkeypatch.setattr(bench, "training", lambda cfg, rows: lambda: {"tokens_per_s": 1.0})
    out = tmp_path / "bench.json"
    assert bench.main([*TINY, "--implementations", "xla,pallas_gpu", "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["xla"]["share of the dense tokens/s"] == 1.0 and table["xla"]["parts"]["experts"]["tflops"] > 0
    assert all(row["tflops"] > 0 for row in table["xla"]["parts"]["products"].values())
    assert "cannot run grouped_matmul" in table["pallas_gpu"]["error"]


@pytest.mark.quick
def test_what_it_cannot_measure_is_one_line(capsys):
    for argv, message in (
        (["--config", "configs/dense.py:tiny"], "has 0 mixtures"),
        ([*TINY[:-1], "0"], "--rows 0: must be at least 1"),
    ):
        assert bench.main(argv) == 2
        assert message in capsys.readouterr().err
