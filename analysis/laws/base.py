"""What a law is: its variables, its parameters, the formula, and how to search for its optimum.

A law is one file in this folder that calls `register(Law(...))`; every file here is imported by `analysis.laws`, and
being registered buys fitting, bootstrap, hold-out, the command line and a recovery test on synthetic data.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Variable:
    """An input column or the target: unit and meaning. Laws are only ever evaluated in this unit."""

    name: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Parameter:
    """One free parameter.

    `transform` is the coordinate of the search: 'log' (parameter > 0), 'linear', or 'logit' between `lo` and `hi`.
    `start` lists the start values in that coordinate (for 'log': natural logarithms). A fit that ends at or beyond
    `lo` or `hi` (in natural units) is refused: the data do not determine that parameter.
    """

    name: str
    start: Sequence[float]
    transform: str = "linear"
    lo: float = -np.inf
    hi: float = np.inf
    meaning: str = ""

    def to_search(self, value):
        if self.transform == "log":
            return np.log(value)
        if self.transform == "logit":
            unit = (np.asarray(value) - self.lo) / (self.hi - self.lo)
            return np.log(unit) - np.log1p(-unit)
        return np.asarray(value, float)

    def from_search(self, z, xp=np):
        if self.transform == "log":
            return xp.exp(z)
        if self.transform == "logit":
            return self.lo + (self.hi - self.lo) / (1 + xp.exp(-z))
        return z


@dataclass(frozen=True)
class Constants:
    """Published parameter values, as data; `fitted_on` is the range in which they were found."""

    source: str
    values: Mapping[str, float]
    fitted_on: str = ""
    note: str = ""


@dataclass(frozen=True)
class Synthetic:
    """How to draw a data set from the law for its recovery test.

    `ranges` are log-uniform per variable, `noise` is the standard deviation of the Gaussian noise on the residual
    scale, and `tolerance` the relative error allowed when parameters (or derived quantities) are fitted back.
    """

    params: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    tolerance: Mapping[str, float]
    noise: float = 1e-3
    n: int = 60


@dataclass(frozen=True)
class Law:
    """A scaling law.

    Attributes:
      predict: `(p, x, xp) -> target`: the formula, with `p` a dict of parameters, `x` a dict of variables and `xp`
        numpy or jax.numpy. Must broadcast, and be differentiable in `p`.
      residual: scale on which residuals are taken and noise is assumed: 'log', 'log10' or 'linear'.
      delta: Huber threshold on that scale; None means squared error.
      centre: `(coefficient, exponent, variable)` for each term `coefficient * variable^-exponent` with a 'log'
        coefficient: the search runs on the term's value at the centroid, which decorrelates the pair (laws 2.3).
      basis, linear: for variable projection: `basis(p, x)` lists the functions [n] that the parameters named in
        `linear` multiply, given the others; those must be >= 0.
      derived: `(p) -> dict` of quantities computed from the parameters (broadcasts over bootstrap draws).
      optimum: `(p, C, flops_factor) -> {"N", "D", "loss"}`: the best allocation of `C = flops_factor * N * D`.
      frontier: the law describes the best run of each compute budget: the other runs of a budget are left out.
      n_starts: when the full product of starts is too large, sample this many from its box (Sobol sequence).
      fitter: replaces the generic fit for laws of another kind: `(table, options) -> analysis.fit.Fit`.
    """

    name: str
    title: str
    formula: str
    source: str
    variables: tuple[Variable, ...]
    target: Variable
    parameters: tuple[Parameter, ...]
    predict: Callable
    limits: str
    residual: str = "log"
    delta: float | None = 1e-3
    centre: tuple[tuple[str, str, str], ...] = ()
    basis: Callable | None = None
    linear: tuple[str, ...] = ()
    derived: Callable[[dict], dict] | None = None
    optimum: Callable | None = None
    frontier: bool = False
    n_starts: int | None = None
    constants: Mapping[str, Constants] = field(default_factory=dict)
    synthetic: Synthetic | None = None
    fitter: Callable | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a table must have: the variables, then the target."""
        return (*(variable.name for variable in self.variables), self.target.name)

    def parameter(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        names = ", ".join(parameter.name for parameter in self.parameters)
        raise ValueError(f"law {self.name} has no parameter {name!r}; it has {names}")

    def starts(self, fixed: Mapping[str, float] = {}) -> np.ndarray:
        """Start points [starts, free parameters] in search coordinates."""
        free = [parameter for parameter in self.parameters if parameter.name not in fixed]
        if self.n_starts is None:
            return np.array(list(itertools.product(*(parameter.start for parameter in free))), float)
        from scipy.stats import qmc  # slow import

        lo, hi = np.array([[min(parameter.start), max(parameter.start)] for parameter in free]).T
        return lo + (hi - lo) * qmc.Sobol(len(free), seed=0).random(self.n_starts)

    def check(self, name: str, values) -> None:
        """Raises ValueError where `values` cannot be the variable or target `name` (must be positive, finite)."""
        values = np.asarray(values, float)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"law {self.name}: {name} must be positive and finite, got {values[~(values > 0)][:3]}")

    def evaluate(self, params: Mapping[str, float], **variables):
        """The law's prediction in the unit of `target`; variables by name, in the units that `variables` declares."""
        wanted = {variable.name for variable in self.variables}
        if set(variables) != wanted:
            raise ValueError(f"law {self.name} takes {sorted(wanted)}, got {sorted(variables)}")
        for name, values in variables.items():
            self.check(name, values)
        return self.predict(dict(params), {k: np.asarray(v, float) for k, v in variables.items()}, np)

    def simulate(self, seed: int = 0, n: int | None = None, noise: float | None = None) -> dict[str, np.ndarray]:
        """Draws a synthetic data set: a dict of columns [n], from `synthetic`."""
        spec, rng = self.synthetic, np.random.default_rng(seed)
        n, noise = n or spec.n, spec.noise if noise is None else noise
        x = {name: np.exp(rng.uniform(np.log(lo), np.log(hi), n)) for name, (lo, hi) in spec.ranges.items()}
        y, eps = self.predict(dict(spec.params), x, np), noise * rng.standard_normal(n)
        y = {"log": y * np.exp(eps), "log10": y * 10**eps, "linear": y + eps}[self.residual]
        return {**x, self.target.name: y}


_LAWS: dict[str, Law] = {}


def register(law: Law) -> Law:
    if law.name in _LAWS:
        raise ValueError(f"law {law.name!r} is registered twice")
    _LAWS[law.name] = law
    return law


def get_law(name: str) -> Law:
    """The law of that name; ValueError names the choices."""
    if name not in _LAWS:
        raise ValueError(f"law {name!r} is unknown; choose one of {', '.join(sorted(_LAWS))}")
    return _LAWS[name]


def all_laws() -> dict[str, Law]:
    return dict(_LAWS)
