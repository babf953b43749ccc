"""Fits emergence curves of massive activations, and predicts their parameters from the architecture (2508.03616).

A curve is the ratio of the largest to the median activation of one layer over training. It is fitted with the law
`massive_activations` by variable projection and compared by AIC with step responses. Intervals resample checkpoints as
if they were independent; neighbouring ones are not quite, so compare them with the spread over seeds.
"""

import numpy as np
import pandas as pd

from analysis.fit import fit_law
from analysis.laws import get_law
from analysis.load import load_table
from analysis.result import Options, interval

LAWS = ("massive_activations", "first_order_step", "second_order_step")
RAW = ("A", "lambda", "gamma", "t0", "K")  # the paper's parameters, degenerate in data
CHECKPOINTS = 27  # fewest that determine a curve
DETERMINED = ("beta", "t_peak", "f_peak", "t_half", "f_end", "K")


# ---------------------------------------------------------------------------------------------- one curve


def fit_curve(t, f, *, draws: int = 200, level: float = 0.9, seed: int = 0) -> dict:
    """One layer's curve: steps t [n] >= 0 and ratios f [n].

    Returns a flat dict: each parameter of LAWS[0], each derived quantity, t_half (`half_rise`) and f_end, the law's
    value at the last step, with NAME_lo and NAME_hi; r2, `peak`
    ("seen" where the curve has a maximum within the steps in a share `level` of the draws, "no" where it has none in as
    many, else "unclear"; without a maximum t_peak is the minimum of a curve that falls first), aic_LAW (corrected for
    small samples, minus that of the best), best (the law of lowest AIC) and refused. Where `refused` says that the
    parameters trade off, a peak that is seen is determined all the same.
    """
    law, last = get_law(LAWS[0]), float(np.max(t))
    frame = pd.DataFrame({"t": np.asarray(t, float), "f": np.asarray(f, float)})
    table = load_table(frame, required=law.columns, may_be_zero=law.may_be_zero)
    with np.errstate(invalid="ignore"):  # the paper's parameters of some draws are infinite
        fit = fit_law(law, table, Options(bootstrap=draws, level=level, seed=seed, holdout=False, progress=False))
    out, found = {"n": len(frame), "refused": fit.refused, "r2": fit.quality.get("r2")}, {**fit.params, **fit.derived}
    if found:
        values = {name: entry["value"] for name, entry in fit.params.items()}
        for name, of in (("t_half", half_rise), ("f_end", lambda p, last: law.predict(p, {"t": last}))):
            found[name] = interval(of(values, last), of(fit.draws, last), level)
        share = np.mean((fit.draws["A1"] > 0) & (fit.draws["t_peak"] > 0) & (fit.draws["t_peak"] < last))
        out["peak"] = "seen" if share >= level else "no" if share <= 1 - level else "unclear"
    for name, entry in found.items():
        out |= {name: entry["value"], f"{name}_lo": entry["lo"], f"{name}_hi": entry["hi"]}
    scores = {name: _aic(name, frame) for name in LAWS}
    best = min(scores, key=scores.get)
    return out | {f"aic_{name}": score - scores[best] for name, score in scores.items()} | {"best": best}


def half_rise(params: dict, last: float):
    """The step at which the law is half-way from its lowest value to its highest after that, up to the step `last`.

    `params` are scalars or draws [n], the result alike; NaN where the lowest value is the last. Within 2 %.
    """
    law, t = get_law(LAWS[0]), np.concatenate([[0.0], np.geomspace(1.0, last, 500)])
    f = law.predict({p.name: np.asarray(params[p.name])[..., None] for p in law.parameters}, {"t": t})
    f = np.where(np.arange(len(t)) < f.argmin(-1)[..., None], f.min(-1, keepdims=True), f)
    risen = f > 0.5 * (f.min(-1, keepdims=True) + f.max(-1, keepdims=True))
    return np.where(risen.any(-1), t[risen.argmax(-1)], np.nan)[()]


def _aic(name: str, frame: pd.DataFrame) -> float:
    """Akaike's criterion of the least-squares fit, corrected for small samples; the variance counts as a parameter."""
    from analysis.search import problem, project, search  # scipy and JAX are slow to import

    prob = problem(get_law(name), frame)
    params = project(prob, np.ones(len(prob.y))) or search(prob).params
    n, k = len(prob.y), len(prob.free) + 1
    square = max(np.mean(np.square(prob.residuals(params))), 1e-300)
    return n * np.log(square) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


# ---------------------------------------------------------------------------------------------- architecture


def features(layer, n_layers, d_model, n_heads, d_ff) -> dict:
    """What 2508.03616 predicts from; `layer` counts from 1."""
    depth = layer / n_layers
    return {
        "depth": depth, "depth^2": depth**2, "depth^3": depth**3, "sqrt depth": depth**0.5,
        "heads/width": n_heads / d_model, "d_ff/d": d_ff / d_model, "d/layers": d_model / n_layers,
        "heads/layers": n_heads / n_layers, "ln d": np.log(d_model), "layer*layers": layer * n_layers,
    }  # fmt: skip


def regression(fits: pd.DataFrame, *, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    """How well the parameters of curves follow from the architecture, out of sample.

    `fits` has a row for each curve: what `fit_curve` returns and run_id, layer (from 0), n_layers, d_model, n_heads,
    d_ff. For each target the curves count that determine it (`determined`), even where the law's parameters together
    were refused. A row of the result is a target and a model (linear, boosted stumps): r2 on held-out layers, each with
    all its seeds, and on held-out architectures where there are more than two. Targets are transformed as in the paper:
    log1p, K by Yeo-Johnson.

    Targets with fewer than 2 `folds` curves are left out. Raises ValueError where none is left.
    """
    rows = []
    for name in dict.fromkeys((*RAW, *DETERMINED)):
        used = fits[determined(fits, name) & ((fits[name] > -1) | (name == "K"))].reset_index(drop=True)
        if len(used) < 2 * folds:
            continue
        facts = used[["n_layers", "d_model", "n_heads", "d_ff"]].to_dict("records")
        x = np.array([list(features(i + 1, **fact).values()) for i, fact in zip(used["layer"], facts, strict=True)])
        y = _transformed(name, used[name].to_numpy(float))
        places = used.groupby(["n_layers", "d_model", "layer"]).ngroup().to_numpy()
        layers = np.random.default_rng(seed).permutation(places.max() + 1)[places] % folds
        shapes = used.groupby(["n_layers", "d_model"]).ngroup().to_numpy()
        for model, predict in (("linear", linear), ("boosted stumps", boosted)):
            row = {"target": name, "model": model, "n": len(y), "r2_layers": cross_validated(predict, x, y, layers)}
            row["r2_architectures"] = cross_validated(predict, x, y, shapes) if shapes.max() > 1 else None
            rows.append(row)
    if not rows:
        raise ValueError(f"no quantity is determined by {2 * folds} of {len(fits)} curves: too few for {folds} folds")
    return pd.DataFrame(rows)


def determined(fits: pd.DataFrame, name: str) -> pd.Series:
    """Which rows of `fits` know quantity `name`: its interval is narrower than its value, and a peak is seen.

    The paper's A, lambda, gamma and t0 hang on all parameters, so a refusal speaks for them: with one at its bound
    their intervals are narrow for no reason.
    """
    width = fits[f"{name}_hi"] - fits[f"{name}_lo"]
    known = np.isfinite(fits[name]) & (width <= fits[name].abs())
    if name in ("t_peak", "f_peak"):
        return known & (fits["peak"] == "seen")
    return known & fits["refused"].isna() if name in RAW[:-1] else known


def _transformed(name: str, y):
    if name != "K":
        return np.log1p(y)
    from scipy.stats import yeojohnson  # slow import

    return yeojohnson(y)[0]


def cross_validated(predict, x, y, fold) -> float:
    """R^2 of predict(x, y, x_new) over all rows, each predicted from the other folds; below 0 = worse than the mean."""
    out = np.empty(len(y))
    for held in np.unique(fold):
        rows = fold == held
        out[rows] = predict(x[~rows], y[~rows], x[rows])
    return float(1 - np.sum((y - out) ** 2) / np.sum((y - y.mean()) ** 2))


def linear(x, y, new, ridge: float = 1e-2):
    """Ridge regression on standardised features; the penalty keeps features apart that one architecture fixes."""
    centre, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12 * np.maximum(np.abs(centre), 1e-300), scale, np.inf)
    z = (x - centre) / scale
    w = np.linalg.solve(z.T @ z + ridge * len(y) * np.eye(x.shape[1]), z.T @ (y - y.mean()))
    return y.mean() + (new - centre) / scale @ w


def boosted(x, y, new, rounds: int = 200, rate: float = 0.1):
    """Gradient boosting of trees with one split (stumps) on squared error."""
    cuts = [(j, c) for j in range(x.shape[1]) for c in (np.unique(x[:, j])[1:] + np.unique(x[:, j])[:-1]) / 2]
    out, rest = np.full(len(new), y.mean()), y - y.mean()
    if not cuts:
        return out
    left = np.array([x[:, j] < c for j, c in cuts])  # [cuts, n]
    n = left.sum(1)
    for _ in range(rounds):
        total = left @ rest
        gain = total**2 / n + (rest.sum() - total) ** 2 / (len(y) - n)
        best = int(np.argmax(gain))
        low, high = rate * total[best] / n[best], rate * (rest.sum() - total[best]) / (len(y) - n[best])
        rest = rest - np.where(left[best], low, high)
        j, c = cuts[best]
        out += np.where(new[:, j] < c, low, high)
    return out
