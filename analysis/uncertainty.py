"""Bootstrap draws, prediction intervals and the hold-out."""

from collections.abc import Callable

import numpy as np

from analysis.isoflop import budget_groups
from analysis.search import Optimum, Problem, search


def bootstrap(
    prob: Problem,
    optimum: Optimum,
    draws: int,
    *,
    weights=None,
    seed: int = 0,
    progress: Callable | None = None,
):
    """Nonparametric bootstrap: resamples rows with replacement and refits each sample from the optimum.

    `weights` [n] of 0 and 1 restricts the rows that are resampled. Returns parameters name -> [draws].
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(np.ones(len(prob.y)) if weights is None else weights)
    picked = rows[rng.integers(len(rows), size=(draws, len(rows)))]
    counts = np.stack([np.bincount(sample, minlength=len(prob.y)) for sample in picked])
    found = prob.minimize(np.tile(optimum.z, (draws, 1)), counts, near=optimum.z, progress=progress)
    found = prob.params(found.z)
    return {name: np.broadcast_to(values, (draws,)) for name, values in found.items()}


def prediction_draws(prob: Problem, draws, residuals, x, *, free: int, seed: int = 0) -> np.ndarray:
    """Draws [draws, points] of a new observation at `x`: a law draw plus a residual of the fit.

    Residuals are inflated by sqrt(n / (n - free)), since the fit has already used `free` degrees of freedom.
    """
    rng = np.random.default_rng(seed)
    law = prob.predict({name: values[:, None] for name, values in draws.items()}, x)
    residuals = residuals * np.sqrt(len(residuals) / max(len(residuals) - free, 1))
    noise = rng.choice(residuals, size=law.shape)
    if prob.law.residual == "linear":
        return law + noise
    return law * np.exp(noise * (np.log(10) if prob.law.residual == "log10" else 1.0))


def holdout(prob: Problem, frame, near, draws: int = 400, *, level: float = 0.95, seed: int = 0) -> dict:
    """Fits without the dearest budget and predicts it: errors beside the predicted spread.

    `frame` holds the rows of `prob` in order; `near` is the optimum of the whole table, [free], one start besides every
    seventh of the grid. The dearest budget is the last of its budget groups (`budget_groups`), or the top fifth by
    compute where there are none. Errors are ln(observed/predicted), or differences for a law with linear residuals.
    Returns `{"refused": reason}` where the cheaper rows are too few.
    """
    column, order = _cost(prob, frame)
    groups = budget_groups(frame, order)
    if groups is not None and len(groups) >= 3:
        held = np.zeros(len(order), bool)
        held[groups[-1]] = True
        how = "dearest budget"
    else:
        held = order > np.quantile(order, 0.8)
        how = "dearest fifth"
    n_fit, free = int((~held).sum()), len(prob.free)
    out = {"held": how, "column": column, "n_fit": n_fit, "n_heldout": int(held.sum())}
    if not held.any() or n_fit < free + 2:
        return {**out, "refused": f"{n_fit} rows remain for {free} parameters without the {how}"}
    out |= {"fitted_up_to": float(order[~held].max()), "predicted_from": float(order[held].min())}
    weights = (~held).astype(float)
    optimum = search(prob, weights, extra=near, thin=7)
    sample = bootstrap(prob, optimum, draws, weights=weights, seed=seed)
    x = {name: values[held] for name, values in prob.x.items()}
    predicted = prob.predict(optimum.params, x) + 0 * prob.y[held]
    residuals = prob.residuals(optimum.params)
    error = residuals[held]
    spread = prediction_draws(prob, sample, residuals[~held], x, free=free, seed=seed)
    lo, hi = np.nanquantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
    width = (hi - lo) / 2 if prob.law.residual == "linear" else np.log(hi / lo) / 2
    points = [
        {"row": str(row), **{k: float(v[i]) for k, v in x.items()}, "observed": float(prob.y[held][i]),
         "predicted": float(predicted[i]), "lo": float(lo[i]), "hi": float(hi[i])}
        for i, row in enumerate(frame.index[held])
    ]  # fmt: skip
    return {
        **out,
        "refused": None,
        "rms_error": float(np.sqrt(np.mean(error**2))),
        "mean_error": float(np.mean(error)),
        "predicted_halfwidth": float(np.median(width)),
        "share_inside": float(np.mean((prob.y[held] >= lo) & (prob.y[held] <= hi))),
        "params": optimum.params,
        "points": points,
    }


def _cost(prob: Problem, frame) -> tuple[str, np.ndarray]:
    if "C" in frame:
        return "C", np.asarray(frame["C"], float)
    if {"N", "D"} <= set(prob.x):
        return "6*N*D", 6 * prob.x["N"] * prob.x["D"]
    first = prob.law.variables[0].name
    return first, prob.x[first]
