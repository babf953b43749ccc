import pytest

from sweeps.rules import BATCH_RULES, LR_RULES, RunSize, constant, inverse_width


def size(**values):
    return RunSize(**{"N": 5e8, "D": 1e10, "C": 1e19, "d_model": 1024, **values})


@pytest.mark.parametrize(
    "rule, expected",
    [
        # By hand from the printed formulas: lr at N 5e8, D 1e10, C 1e19; batch in tokens.
        (LR_RULES["step_law"], 1.79 * 5e8**-0.713 * 1e10**0.307),
        (LR_RULES["ling"], 1.1576 / 1e19**0.1529),
        (LR_RULES["deepseek"], 0.3118 / 1e19**0.125),
        (BATCH_RULES["step_law"], 0.58 * 1e10**0.571),
        (BATCH_RULES["ling"], 0.0694 * 1e19**0.3644),
        (BATCH_RULES["deepseek"], 0.2920 * 1e19**0.3271),
        (BATCH_RULES["schaipp"], 0.667 * 1e10**0.566),
        (inverse_width(0.6), 0.6 / 1024),
        (constant(512), 512),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_values(rule, expected):
    assert rule(size()) == pytest.approx(expected, rel=1e-12)


def test_step_law_is_in_the_plausible_range_for_a_model_it_was_fitted_on():
    assert 5e-4 < LR_RULES["step_law"](size()) < 5e-3
    assert 1e5 < BATCH_RULES["step_law"](size()) < 1e6


def test_warnings_only_outside_the_fitted_range():
    assert LR_RULES["step_law"].warnings(size()) == []
    assert [w.split(": ")[1][:1] for w in LR_RULES["step_law"].warnings(size(N=1e4, D=1e6))] == ["N", "D"]
    assert "outside the fitted 3e+17..3e+20" in LR_RULES["ling"].warnings(size(C=1e12))[0]
    assert inverse_width(1.0).warnings(size(N=1, D=1, C=1)) == []
