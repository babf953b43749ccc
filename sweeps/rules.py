"""Peak learning rate and batch size as functions of a run's size: named, cited, with the range they were fitted in.

A rule takes a `RunSize` and gives a number; `warnings(size)` says where the run lies outside the fitted range. The
published laws were fitted far above the sizes that fit on a laptop, and extrapolate there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunSize:
    """What rules may depend on. N: parameters without embedding and head; D: training tokens; C: training FLOPs."""

    N: float
    D: float
    C: float
    d_model: int


@dataclass(frozen=True)
class Rule:
    """`function(size)`; `fitted` maps N, D or C to the (low, high) in which the rule was fitted."""

    name: str
    formula: str
    source: str
    function: Callable[[RunSize], float]
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, size: RunSize) -> float:
        return self.function(size)

    def warnings(self, size: RunSize) -> list[str]:
        return [
            f"{self.name} ({self.source}): {key} = {getattr(size, key):.2g} outside the fitted {low:.2g}..{high:.2g}"
            for key, (low, high) in self.fitted.items()
            if not low <= getattr(size, key) <= high
        ]


_STEP_LAW = {"N": (2.1e8, 1.07e9), "D": (4e9, 1e11)}
_LING = {"C": (3e17, 3e20)}


def constant(value: float, name: str = "constant") -> Rule:
    """The same value for every run: learning rate, or batch in tokens."""
    return Rule(name, f"{value:g}", "fixed", lambda size: value)


def inverse_width(coefficient: float) -> Rule:
    """lr = coefficient / d_model: muP's scaling of Adam's learning rate of hidden matrices (2203.03466)."""
    return Rule("inverse_width", f"{coefficient:g} / d_model", "2203.03466", lambda size: coefficient / size.d_model)


def power(name: str, coefficient: float, source: str, fitted: dict, **exponents: float) -> Rule:
    """coefficient x N^a D^b C^c with the exponents given by name."""

    def value(size: RunSize) -> float:
        result = coefficient
        for key, exponent in exponents.items():
            result *= getattr(size, key) ** exponent
        return result

    formula = " ".join([f"{coefficient:g}", *(f"{key}^{exponent:g}" for key, exponent in exponents.items())])
    return Rule(name, formula, source, value, fitted)


# Batch sizes are in tokens. DeepSeek's range is that of its fit (1e17 to 2e19 FLOPs of 2401.02954, figure 3).
LR_RULES = {
    "step_law": power("step_law", 1.79, "2503.04715", _STEP_LAW, N=-0.713, D=0.307),
    "ling": power("ling", 1.1576, "2507.17702", _LING, C=-0.1529),
    "deepseek": power("deepseek", 0.3118, "2401.02954", {"C": (1e17, 2e19)}, C=-0.1250),
}
BATCH_RULES = {
    "step_law": power("step_law", 0.58, "2503.04715", _STEP_LAW, D=0.571),
    "ling": power("ling", 0.0694, "2507.17702", _LING, C=0.3644),
    "deepseek": power("deepseek", 0.2920, "2401.02954", {"C": (1e17, 2e19)}, C=0.3271),
    "schaipp": power("schaipp", 0.667, "2607.01487", {}, D=0.566),
}
