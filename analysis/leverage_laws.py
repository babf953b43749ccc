"""Laws of efficiency leverage (arXiv:2507.17702) fitted to measured leverages, and verdicts on the published ones.

Laws are least squares in ln EL, A_s by a grid, A_m infinite (it is not identified), for the values and for every draw.
In draws of the joint law each row also gets its own residual with a random sign, so that the intervals hold what the
form can't follow.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.frontier import Frontier
from analysis.laws import efficiency_leverage, get_law
from analysis.result import interval

SIZES = "edge != 'few'"  # enough sizes to know the best one
STARTS = np.geomspace(1e-4, 1.0, 120)  # of A_s
PUBLISHED = get_law("leverage").constants["ling"].values


@dataclass
class Leverages:
    """Leverages of a sweep.

    rows: arch, A, G, S (NaN where the runs don't say), budget, C, loss, EL, EL_lo, EL_hi, extrapolated (the loss is
    below those of the dense runs), edge ("small", "large": an outermost size is the best; "few": there are fewer than
    three; EL is a lower bound then).
    draws: [draws, rows] of EL.
    dense: the law that was inverted.
    """

    rows: pd.DataFrame
    draws: np.ndarray
    notes: list[str]
    level: float
    dense: Frontier

    def where(self, query: str) -> "Leverages":
        """The rows of a pandas query."""
        kept = self.rows.eval(query, engine="python").to_numpy(bool)
        return replace(self, rows=self.rows[kept].reset_index(drop=True), draws=self.draws[:, kept])

    @property
    def log(self) -> np.ndarray:
        """ln EL [1 + draws, rows], the value first."""
        return np.log(np.concatenate([self.rows["EL"].to_numpy(float)[None], self.draws]))


def usual(rows: pd.DataFrame) -> str:
    """Query of the rows that laws go through: the shared ratio S of most architectures, one way to weigh experts."""
    shared = rows.groupby("arch")["S"].first().round(2).mode()
    near = f"(S > {shared[0] - 0.05:.2f} and S < {shared[0] + 0.05:.2f}) and " if len(shared) else ""
    return f"{near}not arch.str.endswith('-raw') and {SIZES}"


def _least_squares(y, terms):
    """Coefficients [draws, terms] and sums of squares [draws] of y [draws, rows] on terms [rows, terms]."""
    coefficients = y @ np.linalg.pinv(terms).T
    return coefficients, np.sum((y - coefficients @ terms.T) ** 2, 1)


def _with_saturation(leverages: Leverages, terms, y):
    """Least squares of y [draws, rows] on ln(A + A_s) x terms [rows, terms], A_s from the grid, draw by draw."""
    A = leverages.rows["A"].to_numpy(float)
    best, chosen, found = np.full(len(y), np.inf), np.zeros(len(y)), np.zeros((len(y), terms.shape[1]))
    for A_s in STARTS:
        coefficients, error = _least_squares(y, np.log(A + A_s)[:, None] * terms)
        better = error < best
        best[better], chosen[better], found[better] = error[better], A_s, coefficients[better]
    return found, chosen


def joint_law(leverages: Leverages) -> dict[str, np.ndarray]:
    """Draws [1 + draws] of a, d, beta, gamma, A_s of the published form, the values first.

    Raises ValueError where the rows have fewer than three granularities, two budgets or two activation ratios.
    """
    rows = leverages.rows
    for name, needed in (("G", 3), ("C", 2), ("A", 2)):
        if rows[name].nunique() < needed:
            raise ValueError(f"column {name!r} has {rows[name].nunique()} values; the joint law needs {needed}")
    g, logC = np.log2(rows["G"].to_numpy(float)), np.log10(rows["C"].to_numpy(float))
    centre = logC.mean()
    terms, y = np.stack([np.ones_like(g), logC - centre, g, g * g], 1), leverages.log.copy()

    def fit(y):
        found, A_s = _with_saturation(leverages, terms, y)
        a, d, beta, gamma = found.T
        return {"a": a - d * centre, "d": d, "beta": beta, "gamma": gamma, "A_s": A_s, "A_m": np.full(len(a), 1e16)}

    y[1:] += residuals(fit(y[:1]), leverages)[:1] * np.random.default_rng(0).choice((-1.0, 1.0), y[1:].shape)
    return fit(y)


def activation_law(leverages: Leverages) -> dict[str, np.ndarray]:
    """ln EL = a ln(A + A_s) at one budget and granularity."""
    found, A_s = _with_saturation(leverages, np.ones((len(leverages.rows), 1)), leverages.log)
    return {"a": found[:, 0], "A_s": A_s}


def granularity_law(leverages: Leverages) -> dict[str, np.ndarray]:
    """ln EL = a + b log2 G (log2 G + c) at one budget and activation ratio; G_opt is NaN where there is no maximum."""
    g = np.log2(leverages.rows["G"].to_numpy(float))
    (a, bc, b), _ = (x.T for x in _least_squares(leverages.log, np.stack([np.ones_like(g), g, g * g], 1)))
    best = np.where(b < 0, 2.0 ** np.clip(-bc / (2 * b), -20, 20), np.nan)
    return {"a": a, "b": b, "c": bc / b, "G_opt": best}


def finest_gain(leverages: Leverages) -> dict[str, np.ndarray]:
    """ln EL at the largest granularity less that at the smallest, at one budget and activation ratio."""
    G = leverages.rows["G"].to_numpy(float)
    return {"gain": leverages.log[:, G.argmax()] - leverages.log[:, G.argmin()]}


def compute_law(leverages: Leverages) -> dict[str, np.ndarray]:
    """ln EL = a ln C + c of one architecture."""
    u = np.log(leverages.rows["C"].to_numpy(float))
    found, _ = _least_squares(leverages.log, np.stack([u, np.ones_like(u)], 1))
    return {"a": found[:, 0], "c": found[:, 1]}


def hangs_on(leverages: Leverages) -> list[float]:
    """Budgets without which the exponent of `compute_law` may be 0, where with all of them its interval excludes 0."""

    def resolved(part: Leverages) -> bool:
        if part.rows["budget"].nunique() < 2:
            return False
        a = intervals(compute_law(part), part.level)["a"]
        return a["lo"] > 0 or a["hi"] < 0

    budgets = sorted(map(float, leverages.rows["budget"].unique()))
    return [one for one in budgets if resolved(leverages) and not resolved(leverages.where(f"budget != {one}"))]


def sparsity_steps(leverages: Leverages) -> list[dict]:
    """EL of each activation ratio over that of the next larger one, at each budget; `bound`: one is a lower bound."""
    out = []
    for budget, part in leverages.rows.groupby("budget"):
        order = part.sort_values("A", ascending=False).index
        for large, small in zip(order, order[1:], strict=False):
            ratio = np.exp(leverages.log[:, small] - leverages.log[:, large])
            pair = part.loc[[small, large]]
            out.append({
                "budget": float(budget), "A": float(pair["A"].iloc[0]), "of": float(pair["A"].iloc[1]),
                "ratio": interval(ratio[0], ratio[1:], leverages.level), "bound": bool((pair["edge"] != "").any()),
            })  # fmt: skip
    return out


def intervals(law: dict[str, np.ndarray], level: float) -> dict[str, dict]:
    return {name: interval(draws[0], draws[1:], level) for name, draws in law.items() if name != "A_m"}


def evaluate(law: dict[str, np.ndarray], A, G, C) -> np.ndarray:
    """EL [1 + draws, ...] of the joint law."""
    p = {name: draws.reshape(-1, *(1,) * np.ndim(A)) for name, draws in law.items()}
    return efficiency_leverage.predict(p, {"A": np.asarray(A), "G": np.asarray(G), "C": np.asarray(C)}, np)


def holdout(leverages: Leverages) -> dict | None:
    """The joint law without the dearest budget against the leverages measured there; None where that leaves no law."""
    top = float(leverages.rows["budget"].max())
    held = leverages.where(f"budget == {top}")
    try:
        law = joint_law(leverages.where(f"budget < {top}"))
    except ValueError:
        return None
    off = held.log - np.log(evaluate(law, *(held.rows[name].to_numpy(float) for name in "AGC")))
    lo, hi = np.quantile(off[1:], [(1 - leverages.level) / 2, (1 + leverages.level) / 2], axis=0)
    covered = float(np.mean((lo <= 0) & (hi >= 0)))
    others = _rms(held.log[0] - np.log(published(held.rows)))
    return {"budget": top, "n": len(held.rows), "rms": _rms(off[0]), "covered": covered, "published_rms": others}


def _rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# ---------------------------------------------------------------------------------------------- against the published


def published(rows: pd.DataFrame) -> np.ndarray:
    """EL [rows] of the published joint law, which was fitted five decades higher, at A, G, C of the rows."""
    return efficiency_leverage.predict(PUBLISHED, {name: rows[name].to_numpy(float) for name in "AGC"}, np)


def verdict(entry: dict, published: float, zero: float = 0.0) -> str:
    """agree: the interval holds the published number and not `zero` (no effect); disagree: it does not hold it."""
    if not entry["lo"] <= published <= entry["hi"]:
        return "disagree"
    return "cannot tell" if entry["lo"] <= zero <= entry["hi"] else "agree"


def claim(entries: list[dict], sign: int) -> str:
    """Whether intervals lie on the published side of 0, `sign`: agree where all do, disagree where none does."""
    ends = [(entry["lo"], entry["hi"]) if sign > 0 else (-entry["hi"], -entry["lo"]) for entry in entries]
    if ends and all(lo > 0 for lo, _ in ends):
        return f"agree ({len(ends)} of {len(ends)})"
    against, held = sum(hi < 0 for _, hi in ends), sum(lo > 0 for lo, _ in ends)
    word = "disagree" if ends and against == len(ends) else "cannot tell"
    return f"{word} ({held} of {len(ends)} agree, {against} the other way round)"


def coverage(rows: pd.DataFrame) -> str:
    """How many leverages, lower bounds left out, have an interval that holds what the published law gives there.

    agree: at least nine of ten, disagree: at most half.
    """
    known = rows[(rows["edge"] == "") & rows["published"].notna()]
    inside = int(((known["EL_lo"] <= known["published"]) & (known["published"] <= known["EL_hi"])).sum())
    share = inside / len(known) if len(known) else np.nan
    word = "agree" if share >= 0.9 else "disagree" if share <= 0.5 else "cannot tell"
    return f"{word} ({inside} of {len(known)} intervals hold it)"


def report(leverages: Leverages) -> dict:
    """All laws with intervals, and the published claims that they can be held against."""
    level, rows = leverages.level, leverages.rows
    out = {"rows": rows.assign(published=published(rows)).to_dict("records"), "notes": leverages.notes}

    def each(law, by, query, needed):
        """The intervals of `law` in every group of the rows of `query` that has `needed` (column, values)."""
        found = []
        for key, part in rows.query(query, engine="python").groupby(by, sort=False):
            if part[needed[0]].nunique() >= needed[1]:
                chosen = replace(leverages, rows=part, draws=leverages.draws[:, part.index])
                found.append({**dict(zip(by, key, strict=True)), **intervals(law(chosen), level)})
        return found

    alike, coarse = usual(rows), rows["G"].min()
    same_grain = f"G == {coarse} and " if np.isfinite(coarse) else ""
    activation = each(activation_law, ["budget"], same_grain + alike, ("A", 3))
    granularity = each(granularity_law, ["budget", "A"], alike, ("G", 3))
    compute = each(compute_law, ["arch"], SIZES, ("budget", 2))
    for law in compute:
        law["hangs_on"] = hangs_on(leverages.where(f"arch == {law['arch']!r} and {SIZES}"))
    sturdy = [{"lo": 0.0, "hi": 0.0} if law["hangs_on"] else law["a"] for law in compute]
    finest = each(finest_gain, ["budget", "A"], alike, ("G", 2))
    out |= {"activation": activation, "granularity": granularity, "finest": finest, "compute": compute}
    out["steps"] = sparsity_steps(leverages.where(same_grain + alike))
    finer = claim([law["gain"] for law in finest], 1)
    out["claims"] = {
        "leverage grows as fewer experts are active": claim([law["a"] for law in activation], -1),
        "leverage grows with compute": claim(sturdy, 1),
        **({f"experts of G = {rows['G'].max():g} beat those of G = {coarse:g}": finer} if np.isfinite(coarse) else {}),
        "the joint law, extrapolated to these budgets": coverage(rows.assign(published=published(rows))),
    }
    shared = leverages.where(alike)
    other = sorted(set(rows.query(SIZES, engine="python")["arch"]) - set(shared.rows["arch"]))
    if other:
        out["notes"] = [
            *out["notes"],
            f"in no law of A or G, since shared ratio or weights are others: {', '.join(other)}",
        ]
    try:
        joint = joint_law(shared)
    except ValueError as error:
        return out | {"joint": None, "joint_refused": str(error)}
    top = float(shared.rows["C"].max())
    # a and d are at C = 1 FLOP, far from any run, and move together: their sum at the dearest runs says more.
    found = intervals(joint | {"alpha": joint["a"] + joint["d"] * np.log10(top)}, level)
    at_top = PUBLISHED | {"alpha": PUBLISHED["a"] + PUBLISHED["d"] * np.log10(top)}
    out["joint"] = {name: {**entry, "published": at_top[name]} for name, entry in found.items()}
    out["joint_rms"] = _rms(residuals(joint, shared)[0])
    out["holdout"] = holdout(shared)
    out["inverse"] = [_inverse(joint, wanted, G, top, level) for wanted in (1.5, 2.0, 3.0) for G in (2.0, 4.0)]
    return out


def residuals(joint, leverages: Leverages) -> np.ndarray:
    """ln of measured EL over that of the fitted law and its draws, [1 + draws, rows]."""
    x = (leverages.rows[name].to_numpy(float) for name in ("A", "G", "C"))
    return leverages.log[:1] - np.log(evaluate(joint, *x))


def _inverse(joint, wanted, G, C, level) -> dict:
    """The activation ratio that the fitted law asks for; draws without one are left out and counted."""
    with np.errstate(all="ignore"):
        A = efficiency_leverage.activation_ratio(joint, wanted, G, C)
    return {"EL": wanted, "G": G, "C": C, "A": interval(A[0], A[1:], level), "share": float(np.mean(~np.isnan(A[1:])))}
