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


@pytest.mark.parametrize("variant", ["cpu", "gpu", "gpu-seeds", "gpu-lr", "gpu-small", "paper"])
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
    assert all(len(labels) == 1 for labels in names.values())
    plain = [labels for name, labels in names.items() if not name.endswith("-raw")]
    assert len(plain) == len({*map(tuple, plain)})


def test_seeds_and_learning_rates_add_to_the_gpu_sweep():
    """In one store, the first seed and the middle rate are run once."""
    file = "configs/sweeps/efficiency_leverage.py"
    whole = {cell.run_id: cell for cell in make_plan(f"{file}:gpu").cells}
    seeds = make_plan(f"{file}:gpu-seeds").cells
    assert {cell.config.seed for cell in seeds} == {0, 1, 2}
    assert all((cell.run_id in whole) == (cell.config.seed == 0) for cell in seeds)
    middle = {(cell.arch, cell.axes["budget"], cell.axes["d_model"]): cell.config.optim.lr for cell in whole.values()}
    for cell in make_plan(f"{file}:gpu-lr").cells:
        lr = middle[cell.arch, cell.axes["budget"], cell.axes["d_model"]]
        assert cell.config.optim.lr == pytest.approx(cell.axes["lr_factor"] * lr, rel=1e-3)


def test_flops_in_the_convention_of_the_paper():
    """Per layer d^2 (2 + 2 n_kv / n_h) + 4 T d of attention and 6 d d_ffn of activated experts; 2 d V of the head."""
    for cell in make_plan("configs/sweeps/efficiency_leverage.py:paper").cells[::5]:
        model, length, d = cell.config.model, cell.config.train.seq_len, cell.config.model.d_model
        heads, kv_heads, _ = model.mixers["attention"].sizes(d)
        ffn = next(iter(model.ffns.values()))
        width = ffn.width(d) if cell.arch == "dense" else ffn.activated_width(d)
        layer = d * d * (2 + 2 * kv_heads / heads) + 4 * length * d + 6 * d * width
        assert count_flops(cell.config)["el_paper"] == pytest.approx(model.n_layers * layer + 2 * d * model.vocab_size)
