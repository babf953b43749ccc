"""IsoFLOP profiles (approach 2 of arXiv:2203.15556): one parabola per compute budget, a power law through the minima.

Per budget the loss is fitted by a quadratic in log10 x (x = parameters or tokens). Its minimum counts only when it is
interior to the sampled sizes and its curvature is positive with an interval that excludes 0; otherwise the budget is
refused with the reason. The power law x* = A C^a is least squares in log space over the accepted budgets, with C the
mean of the measured compute of the group (a nominal budget shifts exponents by .001-.003).

Uncertainty: each parabola's coefficients are drawn from their multivariate t distribution (least-squares posterior;
honest for the 4-8 points that a budget usually has, where resampling points degenerates), with the noise
pooled over budgets where these are small, or known from seeds (arXiv:2406.19146). Every draw passes through the power
law.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from analysis.load import Table
from analysis.result import Fit, Options, interval

MIN_POINTS = 4  # a parabola takes three; its curvature interval needs one more


@dataclass
class Profile:
    """One budget: the parabola `loss = c0 + c1 u + c2 u^2` with `u = log10 x - centre`, and draws of its minimum.

    `x_draws` and `loss_draws` [draws] are NaN where a draw has no minimum. `best` is the lowest loss of the parabola
    within the sampled sizes (draws in `best_draws`): defined even where the minimum is at an edge.
    """

    C: float
    x: np.ndarray
    loss: np.ndarray
    rows: np.ndarray
    centre: float
    coefficients: np.ndarray | None = None
    x_opt: float = np.nan
    loss_opt: float = np.nan
    x_draws: np.ndarray | None = None
    loss_draws: np.ndarray | None = None
    best: float = np.nan
    best_draws: np.ndarray | None = None
    curvature: dict | None = None
    refused: str | None = None
    edge: str | None = None

    def curve(self, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """The parabola over the sampled sizes: x [points], loss [points]."""
        u = np.linspace(np.log10(self.x.min()), np.log10(self.x.max()), points) - self.centre
        return 10 ** (u + self.centre), np.polynomial.polynomial.polyval(u, self.coefficients)


def budget_groups(frame, C) -> list[np.ndarray] | None:
    """Row positions of each compute budget, cheapest first.

    Uses a column `budget` where the frame has one; otherwise splits C [rows] at gaps of more than a quarter. None where
    that gives no budgets (fewer than two, or one that spans more than 40 %).
    """
    C = np.asarray(C, float)
    if "budget" in frame and frame["budget"].notna().all():
        groups = [np.flatnonzero(frame["budget"] == value) for value in frame["budget"].unique()]
        return sorted(groups, key=lambda rows: C[rows].mean())
    order = np.argsort(C, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(np.log10(C[order])) > 0.1) + 1)
    spans = [np.ptp(np.log10(C[rows])) for rows in groups]
    return groups if len(groups) > 1 and max(spans) < 0.15 else None


def best_of_budgets(table: Table) -> Table:
    """A table of the lowest loss of each compute budget; the others are excluded with the reason."""
    groups = budget_groups(table.rows, table.rows["C"])
    if groups is None:
        return table
    losses = table.rows["loss"].to_numpy()
    best = np.zeros(len(losses), bool)
    best[[rows[np.argmin(losses[rows])] for rows in groups]] = True
    out = replace(table, filters=[*table.filters, "best run of each budget"])
    out.exclude(~best, "not the best run of its budget")
    return out


def fit_profile(
    C: float, x, loss, rows, *, draws: int = 1000, level=0.95, noise: tuple[float, float] | None = None, seed: int = 0
) -> Profile:
    """Fits one budget's parabola; it refuses rather than raises.

    Args:
      x, loss, rows: [points], and the rows' labels.
      noise: standard deviation of the loss and its degrees of freedom (inf where it is known); None: from these points.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    profile = Profile(C, x, loss, np.asarray(rows), float(np.mean(np.log10(x))))
    sizes = len(np.unique(np.round(np.log10(x), 6)))
    if sizes < MIN_POINTS and not (noise and sizes == 3):
        profile.refused = f"too few points: {sizes} different sizes, at least {MIN_POINTS} are needed"
        return profile
    from scipy.stats import t as student

    u = np.log10(x) - profile.centre
    X = np.stack([np.ones_like(u), u, u * u], 1)
    coefficients = np.linalg.lstsq(X, loss, rcond=None)[0]
    inverse = np.linalg.inv(X.T @ X)
    sigma, dof = noise or (np.sqrt(np.sum((loss - X @ coefficients) ** 2) / (len(x) - 3)), len(x) - 3)
    half = student.ppf((1 + level) / 2, dof) * sigma * np.sqrt(inverse[2, 2])
    c0, c1, c2 = coefficients
    profile.coefficients = coefficients
    profile.curvature = {"value": float(c2), "lo": float(c2 - half), "hi": float(c2 + half)}

    rng = np.random.default_rng(seed)
    scale = sigma * (np.sqrt(dof / rng.chisquare(dof, (draws, 1))) if np.isfinite(dof) else 1.0)
    sample = coefficients + scale * (rng.standard_normal((draws, 3)) @ np.linalg.cholesky(inverse).T)
    profile.x_draws, profile.loss_draws = _minimum(sample, profile.centre)
    lo, hi = u.min(), u.max()
    profile.best, profile.best_draws = _lowest(coefficients[None], lo, hi)[0], _lowest(sample, lo, hi)

    if c2 <= 0:
        profile.refused = "no minimum: the curve bends downwards (negative curvature)"
        return profile
    vertex = -c1 / (2 * c2)
    if vertex <= lo or vertex >= hi:
        profile.edge = "small" if vertex <= lo else "large"
        side = "smallest" if vertex <= lo else "largest"
        profile.refused = (
            f"minimum at an edge: the {side} size is the best; add {'smaller' if vertex <= lo else 'larger'} sizes"
        )
        return profile
    profile.x_opt, profile.loss_opt = 10 ** (vertex + profile.centre), c0 - c1**2 / (4 * c2)
    if profile.curvature["lo"] <= 0:
        profile.refused = (
            f"flat: the interval of the curvature {c2:.3g}, [{c2 - half:.3g}, {c2 + half:.3g}], includes 0; "
            "add sizes further out, or seeds"
        )
    return profile


def _minimum(coefficients, centre):
    """x and loss at the vertex of parabolas [draws, 3]; NaN where they bend downwards."""
    c0, c1, c2 = np.where(coefficients[:, 2:] > 0, coefficients, np.nan).T
    with np.errstate(over="ignore"):
        return 10 ** (-c1 / (2 * c2) + centre), c0 - c1**2 / (4 * c2)


def _lowest(coefficients, lo, hi):
    """Lowest value of parabolas [draws, 3] on [lo, hi]."""
    c0, c1, c2 = coefficients.T
    vertex = np.clip(np.where(c2 > 0, -c1 / (2 * np.where(c2 > 0, c2, 1.0)), lo), lo, hi)
    values = [c0 + c1 * u + c2 * u * u for u in (vertex, np.full_like(c0, lo), np.full_like(c0, hi))]
    return np.min(values, axis=0)


def profiles(frame, variable: str = "N", options: Options | None = None) -> list[Profile]:
    """The profile of every budget of a frame with columns C, loss and `variable`, cheapest first.

    Where a budget has fewer than 9 points, too few to tell its own noise, all budgets share one noise level, pooled
    over their residuals. Raises ValueError where the rows do not form budgets.
    """
    options = options or Options()
    C = np.asarray(frame["C"], float)
    groups = budget_groups(frame, C)
    if groups is None and C.max() < 1.4 * C.min():
        raise ValueError(f"column 'C' holds one budget only ({C.mean():.3g} FLOP): a law of compute takes two or more")
    if groups is None:
        raise ValueError(
            "column 'C' does not form budgets (groups of nearly equal compute); name them in a column 'budget'"
        )
    x, loss = frame[variable].to_numpy(float), frame["loss"].to_numpy(float)

    def fit_all(noise):
        return [
            fit_profile(
                float(C[rows].mean()), x[rows], loss[rows], frame.index[rows], draws=max(options.bootstrap, 1),
                level=options.level, noise=noise, seed=options.seed + i,
            )
            for i, rows in enumerate(groups)
        ]  # fmt: skip

    if options.seed_noise:
        return fit_all((options.seed_noise, np.inf))
    found = fit_all(None)
    usable = [p for p in found if p.coefficients is not None]
    if len(usable) < 2 or min(len(p.x) for p in usable) >= 9:
        return found
    dof = sum(len(p.x) - 3 for p in usable)
    sigma = np.sqrt(sum(np.sum(_residuals(p) ** 2) for p in usable) / dof)
    return fit_all((max(sigma, 1e-12), dof))


def next_sizes(profile: Profile) -> list[float]:
    """Sizes to run next where a budget was refused: beyond the edge, or on both sides; [] for an accepted budget."""
    if profile.refused is None:
        return []
    sizes = np.unique(profile.x)
    ratio = float(np.clip((sizes[-1] / sizes[0]) ** (1 / max(len(sizes) - 1, 1)), 1.3, 4.0))
    below, above = [sizes[0] / ratio, sizes[0] / ratio**2], [sizes[-1] * ratio, sizes[-1] * ratio**2]
    return {"small": below, "large": above}.get(profile.edge, [below[0], above[0]])


def power_law(C, x, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of log x on log C, `x = A C^a`; C [budgets], x [..., budgets]; returns A [...], a [...].

    `weights` [budgets] in the squares; None: all equal.
    """
    u, v = np.log(np.asarray(C, float)), np.log(np.asarray(x, float))
    w = np.full(len(u), 1 / len(u)) if weights is None else np.asarray(weights, float) / np.sum(weights)
    centre, mean = (w * u).sum(), (w * v).sum(-1)
    a = (w * (v - mean[..., None]) * (u - centre)).sum(-1) / (w * (u - centre) ** 2).sum()
    return np.exp(np.clip(mean - a * centre, -700, 700)), a


def _weights(good: list[Profile], options: Options):
    """1/sigma^2 of each minimum, sigma from half of the central 68 % of the draws of its logarithm; None: all equal."""
    if not options.weighted:
        return None
    if options.bootstrap < 100:
        raise ValueError(f"bootstrap {options.bootstrap}: weights 1/sigma^2 need at least 100 draws")
    lo, hi = np.nanquantile(np.log(np.stack([p.x_draws for p in good], 1)), [0.16, 0.84], axis=0)
    return 1 / np.maximum((hi - lo) / 2, 1e-9) ** 2


def _evaluate(A, a, C):
    """A C^a through logarithms: bootstrap draws of A and a may overflow one by one but not together."""
    return np.exp(np.clip(np.log(A) + a * np.log(C), -700, 700))


def fit_isoflop(table: Table, options: Options) -> Fit:
    """The registered law `isoflop`: parabolas in N (and in D where there is such a column), then power laws."""
    if options.fix:
        raise ValueError(f"fix {dict(options.fix)}: law isoflop cannot hold parameters")
    began = time.perf_counter()
    frame, warnings = table.rows, []
    axes = [("N", "A_N", "a_N")] + ([("D", "A_D", "a_D")] if "D" in frame else [])
    by_axis = {name: profiles(frame, name, options) for name, _, _ in axes}
    params, draws, refused, holdout = {}, {}, None, None
    for name, A, a in axes:
        good = [p for p in by_axis[name] if p.refused is None]
        if len(good) < 2:
            reasons = "; ".join(f"C {p.C:.3g}: {p.refused}" for p in by_axis[name] if p.refused)
            refused = (
                refused
                or f"{len(good)} of {len(by_axis[name])} budgets have a minimum in {name}, 2 are needed ({reasons})"
            )
            continue
        C = np.array([p.C for p in good])
        weights = _weights(good, options)
        value = power_law(C, [p.x_opt for p in good], weights)
        sample = (None, None)
        if options.bootstrap:
            sample = power_law(C, np.stack([p.x_draws for p in good], -1), weights)
        for key, v, d in zip((A, a), value, sample, strict=True):
            params[key] = interval(v, d, options.level)
            if d is not None:
                draws[key] = d
        if len(good) == 2:
            warnings.append(f"the power law in {name} goes through two budgets: nothing checks that it is one")
        if name == "N" and options.holdout:
            holdout = _holdout(frame, good, options)
    entries = []
    for i, profile in enumerate(by_axis["N"]):
        entry = {
            "C": profile.C, "n": len(profile.x), "refused": profile.refused, "edge": profile.edge,
            "curvature": profile.curvature,
            "N": interval(profile.x_opt, profile.x_draws, options.level),
            "loss": interval(profile.loss_opt, profile.loss_draws, options.level),
            "best_loss": interval(profile.best, profile.best_draws, options.level),
        }  # fmt: skip
        if "D" in by_axis:
            other = by_axis["D"][i]
            entry["D"] = interval(other.x_opt, other.x_draws, options.level) | {"refused": other.refused}
        entries.append(entry)
    optimum = []
    for C in options.at or default_budgets(frame["C"]):
        point = {"C": C, "extrapolated": beyond(frame["C"], C)}
        for name, A, a in axes:
            if A in params:
                sample = _evaluate(draws[A], draws[a], C) if A in draws else None
                value = _evaluate(params[A]["value"], params[a]["value"], C)
                point[name] = interval(value, sample, options.level)
        optimum.append(point)
    accepted = [p for p in by_axis["N"] if p.refused is None]
    rest = [r for p in by_axis["N"] if p.coefficients is not None for r in _residuals(p)]
    quality = {
        "budgets": len(by_axis["N"]), "budgets_accepted": len(accepted),
        "rmse": float(np.sqrt(np.mean(np.square(rest)))) if rest else None, "space": "nats, within budgets",
        "converged": "closed form",
    }  # fmt: skip
    names = {"a_N": "a", "a_D": "b"}
    return Fit(
        law="isoflop", n=len(frame), objective=None if not rest else float(np.sum(np.square(rest)) / 2), params=params,
        derived={names[key]: params[key] for key in names if key in params}, quality=quality, holdout=holdout,
        refused=refused, seconds=time.perf_counter() - began, warnings=warnings, optimum=optimum, budgets=entries,
        draws=draws,
    )  # fmt: skip


def _residuals(profile: Profile) -> np.ndarray:
    u = np.log10(profile.x) - profile.centre
    return profile.loss - np.polynomial.polynomial.polyval(u, profile.coefficients)


def default_budgets(C) -> tuple[float, float]:
    return float(np.max(C)), 10 * float(np.max(C))


def beyond(sampled, C: float) -> bool:
    """Whether the compute C lies outside the runs' (by more than the spread of the compute of one budget)."""
    return bool(C > 1.03 * np.max(sampled) or C < np.min(sampled) / 1.03)


def _holdout(frame, good: list[Profile], options: Options) -> dict:
    """Predicts the minimum of the dearest budget from the cheaper ones, or from those up to `holdout_above`.

    Their parabolas are fitted again, so that the noise, which is pooled over budgets, is theirs alone.
    """
    last, above = good[-1], options.holdout_above
    rest = [p for p in good[:-1] if above is None or p.C <= above]
    if len(rest) >= 2:
        again = profiles(frame.loc[np.concatenate([p.rows for p in rest])], "N", options)
        rest = [p for p in again if p.refused is None]
    if len(rest) < 2:
        return {"refused": f"{len(good)} budgets with a minimum, {len(rest)} of them to fit; it takes 2 to predict one"}
    C = np.array([p.C for p in rest])
    weights = _weights(rest, options)
    A, a = power_law(C, [p.x_opt for p in rest], weights)
    sample_A, sample_a = power_law(C, np.stack([p.x_draws for p in rest], -1), weights)
    predicted = interval(_evaluate(A, a, last.C), _evaluate(sample_A, sample_a, last.C), options.level)
    found = interval(last.x_opt, last.x_draws, options.level)
    error = np.log(last.x_opt / predicted["value"])
    inside = predicted["lo"] <= found["hi"] and found["lo"] <= predicted["hi"]
    return {
        "refused": None, "held": "dearest budget", "column": "C", "fitted_up_to": rest[-1].C, "predicted_from": last.C,
        "n_fit": len(rest), "n_heldout": 1, "quantity": "N*", "predicted": predicted, "found": found,
        "rms_error": abs(float(error)), "mean_error": float(error), "intervals_overlap": inside,
        "predicted_halfwidth": float(np.log(predicted["hi"] / predicted["lo"]) / 2),
    }  # fmt: skip
