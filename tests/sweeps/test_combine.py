import itertools

import pytest

from efficient_lm.schema import ConfigError
from sweeps.combine import Cell, as_cells, axis, based_on, chain, choices, product, zip_cells

D = axis("model.d_model", [32, 64])
L = axis("model.n_layers", [1, 2, 3], label="depth")


@pytest.mark.quick
def test_product_has_every_combination_once_in_order():
    cells = product(D, L)
    assert [(c.overrides["model.d_model"], c.overrides["model.n_layers"]) for c in cells] == list(
        itertools.product([32, 64], [1, 2, 3])
    )
    assert cells[-1].axes == {"d_model": 64, "depth": 3}


def test_zip_pairs_and_refuses_unequal_lengths():
    cells = zip_cells(D, axis("optim.lr", [0.1, 0.2]))
    assert [c.overrides for c in cells] == [
        {"model.d_model": 32, "optim.lr": 0.1},
        {"model.d_model": 64, "optim.lr": 0.2},
    ]
    with pytest.raises(ConfigError, match=r"equal length, got \[2, 3\]"):
        zip_cells(D, L)


def test_chain_and_base():
    cells = chain(D, based_on("configs/x.py:tiny", L))
    assert [c.base for c in cells] == [""] * 2 + ["configs/x.py:tiny"] * 3
    with pytest.raises(ConfigError, match="two base configs"):
        product(based_on("a.py", D), based_on("b.py", L))


def test_two_values_for_one_field_is_an_error_and_equal_values_are_not():
    with pytest.raises(ConfigError, match="'model.d_model' is set to 32 and to 16"):
        product(D, [Cell({"model.d_model": 16})])
    assert len(product(D[:1], [Cell({"model.d_model": 32})])) == 1


def test_choices_label_and_tuples_become_readable_axes():
    cells = choices("arch", {"gla": {"model.pattern": ("gla",)}})
    assert cells == [Cell({"model.pattern": ("gla",)}, {"arch": "gla"})]
    assert axis("model.pattern", [("gla", "attention")])[0].axes == {"pattern": "gla+attention"}


def test_plain_dicts_are_cells_and_other_things_are_refused():
    assert as_cells([{"optim.lr": 0.1}]) == [Cell({"optim.lr": 0.1}, {"lr": 0.1})]
    for bad in (3, {"optim.lr": 0.1}, ["optim.lr"]):
        with pytest.raises(ConfigError, match="sweep: "):
            as_cells(bad)
