"""The sweep of mixtures of experts: its labels are those of the models it describes."""

import pytest

from efficient_lm.counting import count_flops
from sweeps.combine import Cell, choices
from sweeps.plan import make_plan


def test_cells_as_choices_keep_their_axes():
    assert choices("arch", {"a": Cell({"x": 1}, {"A": 0.5}), "b": {"x": 2}}) == [
        Cell({"x": 1}, {"A": 0.5, "arch": "a"}),
        Cell({"x": 2}, {"arch": "b"}),
    ]


@pytest.mark.parametrize("variant", ["cpu", "gpu", "paper"])
def test_labels_match_the_models_and_active_flops_the_dense_ones(variant):
    cells = make_plan(f"configs/sweeps/efficiency_leverage.py:{variant}").cells
    assert len({cell.run_id for cell in cells}) == len(cells)
    dense = {cell.config.model.d_model: cell for cell in cells if cell.arch == "dense"}
    names = {}
    for cell in cells:
        moe, axes, width = cell.config.model.ffns.get("moe"), cell.axes, cell.config.model.d_model
        names.setdefault(cell.arch, set()).add((axes["A"], axes["G"], axes["S"]))
        if cell.arch == "dense":
            assert cell.config.model.pattern == ("attention/dense",)
            continue
        assert cell.config.model.pattern == ("attention/moe",)
        assert axes["A"] == pytest.approx((moe.top_k + moe.n_shared) / (moe.n_experts + moe.n_shared), abs=1e-4)
        assert axes["G"] == pytest.approx(2 * width / moe.width(width), rel=0.35 if width < 32 else 0.02)
        assert axes["S"] == pytest.approx(moe.n_shared / (moe.top_k + moe.n_shared), abs=1e-4)
        if moe.n_shared and width in dense and width >= 128:
            # The same activated width as the dense FFN; the router is extra.
            same = count_flops(cell.config)["model_causal"] / count_flops(dense[width].config)["model_causal"]
            assert 1.0 < same < 1.15
    assert all(len(labels) == 1 for labels in names.values()) and len(names) == len({*map(tuple, names.values())})
