"""Search for a law's optimum: robust objective, centred coordinates, the whole start grid at once, variable projection.

The objective is the SUM of Huber_delta over residuals (arXiv:2404.10102: with the mean, gradients fall below the usual
tolerance and the search stops early). Each formula and its source are in `analysis.laws`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from analysis.laws import Law, get_law
from analysis.optimize import Minima, minimize


def huber(r, delta, xp=np):
    """Huber loss of residuals r, elementwise; squares / 2 for delta None."""
    if delta is None:
        return r * r / 2
    size = xp.abs(r)
    return xp.where(size <= delta, r * r / 2, delta * (size - delta / 2))


@dataclass(frozen=True)
class Problem:
    """A law with its data: columns `x` name -> [n], target `y` [n], held parameters, centroid, and the rows' labels."""

    law: Law
    x: dict[str, np.ndarray]
    y: np.ndarray
    fix: dict[str, float]
    delta: float | None
    centroid: dict[str, float]
    rows: list

    @property
    def free(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.law.parameters if p.name not in self.fix)

    @property
    def objective(self) -> Callable:
        return _objective(self.law.name, self.free, self.delta is None)

    def minimize(self, z0, weights, near=None, **options) -> Minima:
        """`optimize.minimize` from z0 [problems, free] with weights [n] or [problems, n].

        Rows are padded with weight 0 to a multiple of 32, so that tables of similar size share one compilation. With
        `near` [free], a point close to the optimum, the search runs in coordinates that are uncorrelated there.
        """
        origin, axes = np.zeros(len(self.free)), np.eye(len(self.free))
        if near is not None:
            origin, axes = np.asarray(near, float), whitening(jacobian(self, near))
        u0 = (np.asarray(z0) - origin) @ np.linalg.inv(axes).T
        return self.minimize_affine(u0, weights, origin, axes, **options)

    def minimize_affine(self, u0, weights, origin, axes, **options) -> Minima:
        """The same over z = origin [free] + axes [free, free] u, from u0 [problems, free]; returns z."""
        extra = -len(self.y) % 32
        pad = lambda v: np.concatenate([v, np.repeat(v[:1], extra)])  # noqa: E731
        data = {
            "x": {name: pad(values) for name, values in self.x.items()}, "y": pad(self.y), "fix": self.fix,
            "centroid": self.centroid, "delta": 0.0 if self.delta is None else float(self.delta),
        }  # fmt: skip
        weights = np.asarray(weights, float)
        weights = np.concatenate([weights, np.zeros((*weights.shape[:-1], extra))], -1)
        data |= {"origin": origin, "axes": axes}
        found = minimize(self.objective, u0, weights, data, **options)
        return replace(found, z=origin + found.z @ axes.T)

    def params(self, z) -> dict[str, np.ndarray]:
        """Natural parameters from centred search coordinates z [..., free]."""
        return _params(self.law, self.free, np.asarray(z), self.fix, self.centroid, np)

    def coordinates(self, starts) -> np.ndarray:
        """Centred coordinates from uncentred ones [..., free] (a' = a - alpha * mean ln N)."""
        z = np.array(starts, float)
        for coefficient, exponent, variable in self.law.centre:
            if coefficient in self.free:
                if exponent in self.free:
                    power = self.law.parameter(exponent).from_search(z[..., self.free.index(exponent)])
                else:
                    power = self.fix[exponent]
                z[..., self.free.index(coefficient)] -= power * self.centroid[variable]
        return z

    def from_params(self, params) -> np.ndarray:
        """Centred coordinates [free] of natural parameters."""
        return self.coordinates([self.law.parameter(name).to_search(params[name]) for name in self.free])

    def predict(self, params, x=None) -> np.ndarray:
        """Prediction for parameters that are scalars or draws [draws, 1]."""
        return self.law.predict(params, self.x if x is None else x, np)

    def at_bound(self, params) -> list[str]:
        """The free parameters that are at or beyond a bound."""
        return [p.name for p in self.law.parameters if p.name in self.free and not p.lo < params[p.name] < p.hi]

    def residuals(self, params) -> np.ndarray:
        """Observed minus predicted, on the law's residual scale."""
        if self.law.residual == "linear":
            return self.y - self.predict(params)
        return (np.log(self.y) - np.log(self.predict(params))) / self.law.nats


@dataclass(frozen=True)
class Optimum:
    """Best point of a search, the objective, and how the starts fared."""

    z: np.ndarray
    params: dict[str, float]
    objective: float
    status: str
    starts: int
    share_at_best: float
    projection: dict | None


def problem(law: Law, table, fix=None, delta: float | None = None) -> Problem:
    """Collects the law's columns from a data frame or mapping.

    `fix` holds parameters at values, or frees one that the law holds by default (None). Raises ValueError on an unknown
    parameter, an impossible value, or a column (the target too) outside the law's unit.
    """
    law.check(table)
    fix = {name: value for name, value in {**law.held, **(fix or {})}.items() if value is not None}
    for name, value in fix.items():
        parameter = law.parameter(name)
        if parameter.transform != "linear" and not max(parameter.lo, 0) <= value <= parameter.hi:
            raise ValueError(f"fix {name}={value:g}: allowed is {max(parameter.lo, 0):g} to {parameter.hi:g}")
    x = {variable.name: np.asarray(table[variable.name], float) for variable in law.variables}
    centroid = {name: float(np.mean(np.log(values))) for name, values in x.items() if (values > 0).all()}
    y = np.asarray(table[law.target.name], float)
    rows = getattr(table, "index", range(len(y)))
    return Problem(law, x, y, fix, law.delta if delta is None else delta, centroid, list(rows))


def search(prob: Problem, weights=None, extra=None, thin: int = 1, progress: Callable | None = None) -> Optimum:
    """Minimises from every start of the law's grid, from the variable-projection point and from `extra` [k, free].

    `thin` takes every thin-th start only. Rows of weight 0 take no part (the hold-out reuses the functions compiled for
    the whole table).
    """
    weights = np.ones(len(prob.y)) if weights is None else np.asarray(weights, float)
    starts = prob.coordinates(prob.law.starts(prob.fix))[::thin]
    grid = len(starts)
    projected = project(prob, weights)
    more = [] if projected is None else [prob.from_params(projected)]
    more += [] if extra is None else list(np.atleast_2d(extra))
    if more:
        starts = np.concatenate([starts, more])
    found = prob.minimize(starts, weights, progress=progress)
    order = np.argsort(found.f)[:32]
    polished = prob.minimize(found.z[order], weights, near=found.z[order[0]], ftol=1e-15, max_evals=1200)
    best = int(np.argmin(np.where(np.isfinite(polished.f), polished.f, np.inf)))
    z, f = polished.z[best], float(polished.f[best])
    if not np.isfinite(f):
        raise ValueError(f"law {prob.law.name}: no start gives a finite objective on these data")
    share = float(np.mean(found.f[:grid] <= f * 1.001 + 1e-300))
    params = {name: float(value) for name, value in prob.params(z).items()}
    status = "converged" if "converged" in (polished.status[best], found.status[order[best]]) else polished.status[best]
    return Optimum(z, params, f, str(status), grid, share, projected)


def project(prob: Problem, weights) -> dict | None:
    """Variable projection: least squares with the law's linear parameters eliminated, for at most two others.

    The others are searched on a grid over the box of their starts and polished with a simplex, in search coordinates.
    Linear parameters are >= 0 unless the law is `signed`. Returns natural parameters, or None where the law has no such
    form, parameters are held, or a term drops out.
    """
    law = prob.law
    outer = [p for p in law.parameters if p.name not in law.linear]
    if law.basis is None or prob.fix or len(outer) > 2:
        return None
    from scipy.optimize import minimize as simplex
    from scipy.optimize import nnls

    use = weights > 0
    x = {name: values[use] for name, values in prob.x.items()}
    y = prob.y[use]
    scale = np.sqrt(weights[use]) / (y if law.residual != "linear" else 1.0)  # relative errors for log residuals

    def linear(point):
        values = {p.name: p.from_search(z) for p, z in zip(outer, point, strict=True)}
        if not all(p.lo < values[p.name] < p.hi for p in outer):
            return None, np.inf
        columns = np.stack(law.basis(values, x), 1)
        size = np.linalg.norm(columns, axis=0)
        if not np.isfinite(size).all() or not (size > 0).all():
            return None, np.inf
        columns = columns / size * scale[:, None]
        if law.signed:
            values = np.linalg.lstsq(columns, y * scale, rcond=None)[0]
            return values / size, np.linalg.norm(columns @ values - y * scale)
        values, rest = nnls(columns, y * scale)
        return values / size, rest

    axes = [np.linspace(max(min(p.start), p.to_search(p.lo)) if p.lo > 0 else min(p.start), max(p.start), 24)
            for p in outer]  # fmt: skip
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(outer))
    point = grid[np.argmin([linear(point)[1] for point in grid])]
    point = simplex(lambda q: linear(q)[1], point, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
    values, rest = linear(point)
    if values is None or not (law.signed or (values > 0).all()):
        return None
    return {
        **dict(zip(law.linear, map(float, values), strict=True)),
        **{p.name: float(p.from_search(v)) for p, v in zip(outer, point, strict=True)},
    }


def jacobian(prob: Problem, z, step: float = 1e-6) -> np.ndarray:
    """d residual / d search coordinate at z by central differences, [n, free]."""
    shifts = step * np.eye(len(prob.free))
    columns = [(prob.residuals(prob.params(z + h)) - prob.residuals(prob.params(z - h))) / (2 * step) for h in shifts]
    return np.stack(columns, 1)


def whitening(J) -> np.ndarray:
    """Axes [free, free] in whose coordinates the columns of J [n, free] are orthogonal and of equal length."""
    if not np.isfinite(J).all():
        return np.eye(J.shape[1])
    _, size, rows = np.linalg.svd(J, full_matrices=False)
    return rows.T / np.maximum(size, max(1e-8 * size[0], 1e-300)) * max(size[0], 1e-300)


def _params(law, free, z, fix, centroid, xp):
    search = {name: z[..., i] for i, name in enumerate(free)}
    for coefficient, exponent, variable in law.centre:
        if coefficient in search:
            power = law.parameter(exponent).from_search(search[exponent], xp) if exponent in search else fix[exponent]
            search[coefficient] = search[coefficient] + power * centroid[variable]
    values = {name: law.parameter(name).from_search(value, xp) for name, value in search.items()}
    return {**values, **fix}


@functools.lru_cache(maxsize=64)
def _objective(law_name: str, free: tuple[str, ...], squared: bool) -> Callable:
    """`(z [free], weights [n], data) -> sum of weights * Huber(residual)`; cached so that it is compiled once."""
    import jax.numpy as jnp

    law = get_law(law_name)

    def objective(z, weights, data):
        z = data["origin"] + data["axes"] @ z
        params = _params(law, free, z, data["fix"], data["centroid"], jnp)
        y = law.predict(params, data["x"], jnp)
        if law.residual == "linear":
            r = y - data["y"]
        else:
            r = (jnp.log(y) - jnp.log(data["y"])) / law.nats
        return jnp.sum(weights * huber(r, None if squared else data["delta"], jnp))

    return objective
