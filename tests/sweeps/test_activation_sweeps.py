"""What configs/sweeps/{polycom,sparsing_law,prosparse}.py promise: equal parameters, sizes, seeds, where runs start."""

import json
from collections import Counter

import pytest

from efficient_lm.schema import ConfigError
from sweeps.plan import make_plan

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("preset", ["cpu", "gpu", "gpu-large"])
def test_polynomial_activations_have_the_parameters_of_the_others(preset):
    cells = make_plan(f"configs/sweeps/polycom.py:{preset}").cells
    sizes = {cell.params["non_embedding"] for cell in cells}
    assert max(sizes) < 1.01 * min(sizes)
    rates = Counter((cell.arch, cell.config.optim.lr) for cell in cells)
    assert len(rates) == 25 and set(rates.values()) == {1}


def test_compared_seeds_take_the_best_rates_and_have_not_chosen_them(tmp_path):
    """Polynorm is best at 0.02 and SwiGLU at 0.005; a run that diverged or that was stopped has no say."""
    store, first = tmp_path / "rows.jsonl", make_plan("configs/sweeps/polycom.py:cpu").cells
    best = {"swiglu": 0.005, "polynorm": 0.02}
    rows = [
        {**cell.axes, "run_id": cell.run_id, "d_model": 48, "stage": "rates", "status": "done",
         "loss": 1.5 + abs(cell.config.optim.lr - best.get(cell.arch, 0.01))}
        for cell in first
    ]  # fmt: skip
    rows.append({**rows[0], "run_id": "stopped", "status": "preempted", "lr": 0.0025, "loss": None})
    store.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = make_plan(f"configs/sweeps/polycom.py:gpu,best={store}").cells
    assert {cell.config.seed for cell in cells} == {0, 1, 2} and {cell.config.seed for cell in first} == {3}
    assert len(cells) == 15 and {cell.config.model.d_model for cell in cells} == {128}
    assert all(cell.config.optim.lr == best.get(cell.arch, 0.01) for cell in cells)
    store.write_text("".join(json.dumps(row) + "\n" for row in rows if row["arch"] != "relu2"))
    with pytest.raises(ConfigError, match="rows.jsonl has no finished run of relu2"):
        make_plan(f"configs/sweeps/polycom.py:gpu,best={store}")


def test_prosparse_starts_from_the_finished_runs_of_the_middle_size(tmp_path):
    model = {"d_model": 64, "n_layers": 2, "ffns": {"dense": {"activation": "silu"}}}
    runs = {"a": ("done", model), "b": ("done", {**model, "n_layers": 3}), "c": ("preempted", model)}
    for name, (status, model) in runs.items():
        (tmp_path / name / "ckpt").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"status": status, "seed": 1}))
        (tmp_path / name / "config.json").write_text(json.dumps({"model": model}))
    cells = make_plan(f"configs/sweeps/prosparse.py:cpu,from={tmp_path}").cells
    assert [cell.arch for cell in cells] == ["relu", "prosparse", "prosparse_strong"]
    for cell in cells:
        assert cell.config.train.upcycle_from == str(tmp_path / "a") and cell.config.seed == 101
        assert (cell.config.model.ffns["dense"].kind == "prosparse") == ("prosparse" in cell.arch)
    (tmp_path / "a" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no finished SiLU run of 2 layers x 64"):
        make_plan(f"configs/sweeps/prosparse.py:cpu,from={tmp_path}")


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_sizes_have_one_width_over_depth_and_the_line_one_size(preset):
    cells = [cell for cell in make_plan(f"configs/sweeps/sparsing_law.py:{preset}").cells if cell.config.seed == 0]
    ratios = Counter(cell.axes["ratio"] for cell in cells)
    common = max(ratios, key=ratios.get)
    sizes = sorted({cell.params["non_embedding"] for cell in cells if cell.axes["ratio"] == common})
    assert ratios[common] == 2 * len(sizes) == 6
    line = [cell for cell in cells if cell.axes["ratio"] != common]
    assert {cell.arch for cell in line} == {"relu"}
    assert all(cell.params["non_embedding"] == pytest.approx(sizes[1], rel=0.1) for cell in line)
    assert all(cell.config.model.ffns["dense"].glu for cell in cells)


def test_unknown_presets_are_refused():
    for name in ("polycom", "sparsing_law", "prosparse"):
        with pytest.raises(ConfigError, match="no such preset; .*allowed: cpu, gpu"):
            make_plan(f"configs/sweeps/{name}.py:tpu")
