"""Fits a scaling law to a table of runs.

python -m analysis.fit --law chinchilla --data points.csv --out fit.json
python -m analysis.fit --law isoflop --data runs/NAME --where "arch == 'gla'" --out fit.json
"""

import argparse
import sys
import time

import numpy as np

from analysis import cli
from analysis.isoflop import best_of_budgets, beyond, default_budgets
from analysis.laws import all_laws, get_law
from analysis.load import Table, check_comparable, count_reasons, load_table
from analysis.result import Fit, Options, interval, plain
from pallas_kernels.commands import Parser

LOST = 0.2  # share of bootstrap draws with a parameter at its bound above which a fit is refused


def fit_law(law, table: Table, options: Options | None = None) -> Fit:
    """Fits a registered law to `table.rows`.

    Args:
      law: name or `Law`.
      table: from `analysis.load.load_table`; its rows must have the law's columns, in the law's units.
      options: see `Options`.

    Returns:
      A `Fit`; its `refused` says why where the data do not determine the answer (then do not use the numbers).

    Raises:
      ValueError: unknown law, parameter or impossible fixed value.
    """
    law, options = get_law(law) if isinstance(law, str) else law, options or Options()
    check_comparable(table)
    law.check(table.rows)
    all_rows = len(table.rows)
    if law.frontier:
        table = best_of_budgets(table)
    # Draws whose parameters lie far off give infinities, which count in the intervals.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        fit = law.fitter(table, options) if law.fitter else fit_generic(law, table, options)
    if "arch" in table.rows and table.rows["arch"].nunique() > 1:
        names = ", ".join(map(str, table.rows["arch"].unique()[:4]))
        fit.warnings.append(f"column 'arch' is mixed ({names}): one law through all of them; choose one with --where")
    if law.frontier and len(table.rows) == all_rows:
        fit.warnings.append("no compute budget has more than one run: every row is taken for the best at its compute")
    fit.settings = plain({"law": law.formula, "source": law.source, **vars(options), **fit.settings})
    fit.data = plain(
        {
            "source": table.source,
            "filters": table.filters,
            "counts": table.counts,
            "conventions": _conventions(law, table),
            "units": {v.name: v.unit for v in (*law.variables, law.target)},
            "excluded": [{"row": str(row), "reason": reason} for row, reason in table.excluded["reason"].items()],
        }
    )
    return fit


def fit_generic(law, table: Table, options: Options) -> Fit:
    """Starts, bootstrap, hold-out and quality numbers; what `fit_law` does for a law without a `fitter`."""
    began = time.perf_counter()
    from analysis import search, uncertainty  # scipy and JAX are slow to import

    prob = search.problem(law, table.rows, options.fix, options.delta)
    n, free = len(prob.y), len(prob.free)
    fit = Fit(law.name, n, None, {}, {}, {"n": n, "free_parameters": free}, None, None)
    fit.settings = {"delta": prob.delta, "residual": law.residual, "fix": prob.fix}
    if n < free + 2:
        fit.refused = f"too few points: {n} rows for {free} parameters, at least {free + 2} are needed"
        return fit
    fit.refused = _one_value(prob, bool(options.fix))
    if fit.refused:
        return fit
    grid = -(-len(law.starts(prob.fix)) // options.thin)
    with _bar(grid, f"{law.name}: starts", options) as bar:
        best = search.search(prob, thin=options.thin, progress=bar.update)
    sample = None
    if options.bootstrap:
        with _bar(options.bootstrap, f"{law.name}: bootstrap", options) as bar:
            sample = uncertainty.bootstrap(prob, best, options.bootstrap, seed=options.seed, progress=bar.update)

    fit.objective = best.objective
    fit.params = {
        name: interval(value, _draws(sample, name, prob), options.level) for name, value in best.params.items()
    }
    fit.draws = dict(sample or {})
    if law.derived:
        drawn = law.derived(sample) if sample else {}
        fit.draws |= drawn
        fit.derived = {
            name: interval(value, drawn.get(name), options.level) for name, value in law.derived(best.params).items()
        }
    if law.optimum:
        fit.optimum, fit.settings["flops_factor"] = _optima(law, best.params, sample, table.rows, options)
    fit.quality |= _quality(prob, best, sample)
    if options.profile:
        found = {name: uncertainty.profile(prob, best, name, options.level) for name in prob.free}
        fit.quality["profile_likelihood"] = found
    fit.refused = _refusal(prob, fit)
    fit.warnings = [*_warnings(fit, options), *_outliers(prob, best)]
    if options.holdout:
        fit.holdout = uncertainty.holdout(
            prob, table.rows, best.z, above=options.holdout_above, level=options.level, seed=options.seed
        )
        fit.quality["holdout_rms_error"] = fit.holdout.get("rms_error")
        for name in fit.holdout.get("at_bound", ()):
            text = f"hold-out: without the {fit.holdout['held']} {name} runs to its bound: the cheaper rows do not"
            fit.warnings.append(f"{text} determine the law that predicts")
        fit.warnings += _misses(fit.holdout, options.level)
    fit.seconds = time.perf_counter() - began
    return fit


def _one_value(prob, held: bool) -> str | None:
    """Why a column, or the compute of all rows together, varies too little for any fit; or None.

    With parameters held by the user a variable may be constant: the Jacobian tells whether the rest is determined.
    """
    for name, values in {**({} if held else prob.x), prob.law.target.name: prob.y}.items():
        if len(np.unique(values)) < 2:
            return f"column {name!r} has one value only ({values[0]:g}): the law is not determined"
    if {"N", "D"} <= set(prob.x) and not held:
        product = prob.x["N"] * prob.x["D"]
        if product.max() < 1.4 * product.min():
            return (
                f"columns 'N' and 'D' hold one budget only (6*N*D about {6 * product.mean():.3g} FLOP in every row): "
                "what N does cannot be told from what D does"
            )
    return None


def _draws(sample, name: str, prob):
    return None if sample is None or name in prob.fix else sample[name]


def _optima(law, params, sample, frame, options: Options) -> tuple[list[dict], float]:
    """The best allocation at each budget of `options.at`, and the k of C = k N D that was used."""
    factor = options.flops_factor
    if factor is None:
        factor = float(np.median(frame["C"] / (frame["N"] * frame["D"]))) if "C" in frame else 6.0
    top = frame["C"] if "C" in frame else factor * frame["N"] * frame["D"]
    points = []
    for C in options.at or default_budgets(top):
        value = law.optimum(params, C, factor)
        drawn = law.optimum(sample, C, factor) if sample else {}
        found = {name: interval(v, drawn.get(name), options.level) for name, v in value.items()}
        points.append({"C": C, "extrapolated": beyond(top, C), **found})
    return points, factor


def _quality(prob, best, sample) -> dict:
    """Quality numbers that every fit reports; residuals are on the law's scale (observed minus predicted)."""
    from analysis.search import jacobian

    r = prob.residuals(best.params)
    y = prob.y if prob.law.residual == "linear" else np.log(prob.y) / prob.law.nats
    predicted, positive = prob.predict(best.params) + 0 * prob.y, prob.y > 0
    log_error = np.log(prob.y[positive]) - np.log(np.maximum(predicted[positive], 1e-300))
    J = jacobian(prob, best.z)
    size = np.linalg.norm(J, axis=0)
    worst = np.argsort(-np.abs(r))[:5]
    at_bound = prob.at_bound(best.params)
    quality = {
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "r2": float(1 - np.sum(r**2) / max(np.sum((y - y.mean()) ** 2), 1e-300)),
        "r2_space": prob.law.residual,
        "largest_residuals": [{"row": str(prob.rows[i]), "residual": float(r[i])} for i in worst],
        "converged": "parameter at bound" if at_bound else best.status,
        "at_bound": at_bound,
        "starts": best.starts,
        "share_of_starts_at_best": best.share_at_best,
        "jacobian_condition": float(np.linalg.cond(J / size)) if (size > 0).all() else float("inf"),
        "variable_projection": best.projection,
    }
    if sample:
        outside = {
            p.name: float(np.mean(~((sample[p.name] > p.lo) & (sample[p.name] < p.hi))))
            for p in prob.law.parameters
            if p.name in prob.free
        }
        quality["bootstrap_share_at_bound"] = {name: share for name, share in outside.items() if share}
    return quality


def _refusal(prob, fit: Fit) -> str | None:
    """Why the data do not determine the parameters, or None."""
    quality = fit.quality
    if quality["at_bound"]:
        name = quality["at_bound"][0]
        p = prob.law.parameter(name)
        return f"parameter {name} ran to its bound (allowed {p.lo:g} to {p.hi:g}): these data do not determine it"
    for name, entry in fit.params.items():
        p = prob.law.parameter(name)
        if p.transform == "linear" and not p.may_vanish and entry["lo"] is not None:
            if entry["hi"] - entry["lo"] > 2 * abs(entry["value"]):
                return (
                    f"{name} = {entry['value']:.3g} is not determined: interval {entry['lo']:.3g} to {entry['hi']:.3g}"
                )
    for name, share in quality.get("bootstrap_share_at_bound", {}).items():
        if share > LOST:
            return f"{name} is not determined: it runs to its bound in {share:.0%} of the bootstrap draws"
    if not quality["jacobian_condition"] < 1e5:
        return (
            f"parameters cannot be told apart on these data (Jacobian condition {quality['jacobian_condition']:.2g}): "
            "vary the columns independently"
        )
    return None


def _warnings(fit: Fit, options: Options) -> list[str]:
    from analysis.uncertainty import few_rows

    out, n, free = [], fit.n, fit.quality["free_parameters"]
    narrow = few_rows(n, free, options.level)
    if options.bootstrap and narrow > 1.15:
        out.append(f"{n} rows for {free} parameters: bootstrap intervals may need {narrow:.2f} times their width")
    for name, share in fit.quality.get("bootstrap_share_at_bound", {}).items():
        if 0.05 < share <= LOST:
            out.append(f"{name} runs to its bound in {share:.0%} of the bootstrap draws: weakly determined")
    if fit.quality["converged"] == "line-search failed":
        out.append("the line search of the best start failed: the optimum may not be exact")
    return out


def _misses(held: dict, level: float) -> list[str]:
    """A warning where the hold-out's intervals hold far too few runs.

    Fewer than 60 % in intervals of 95 %: .7 % of sweeps simulated from the fitted law itself (eight runs held out).
    """
    if held["refused"] or held["n_heldout"] < 5 or held["share_inside"] >= level - 0.35:
        return []
    inside = f"{held['share_inside']:.0%} of {held['n_heldout']} runs lie inside their {level:.0%} intervals"
    return [f"hold-out: {inside}: dearer runs depart from the law by more than its intervals say"]


def _outliers(prob, best) -> list[str]:
    """Names rows far outside the scatter of the others: they are kept, but their user should know them."""
    r = prob.residuals(best.params)
    spread = 1.4826 * np.median(np.abs(r - np.median(r)))
    far = np.flatnonzero(np.abs(r) > np.maximum(10 * spread, 1e-6))
    if not len(far):
        return []
    shown = ", ".join(str(prob.rows[i]) for i in far[np.argsort(-np.abs(r[far]))][:5])
    names = f"row{'s' if len(far) > 1 else ''} {shown}{', ...' if len(far) > 5 else ''}"
    return [
        f"{names}: more than 10 times as far from the law as the others (standard deviation {spread:.2g}, largest "
        f"{np.abs(r).max():.2g}): outliers or another unit; leave them out with --where or --drop-highest"
    ]


def _conventions(law, table: Table) -> str:
    """What the columns of the law count and their units, in words."""
    columns = {v.name: v.unit for v in (*law.variables, law.target)}
    meant = [words for words in table.conventions().split("; ") if words[:1] in columns]
    return "; ".join([*meant, *(f"{k}: {unit}" for k, unit in columns.items() if k not in table.counts and unit)])


def _bar(total: int, text: str, options: Options):
    from tqdm import tqdm

    disable = None if options.progress else True  # None: only on a terminal
    return tqdm(total=total, desc=text, disable=disable, leave=False)


def parser() -> Parser:
    laws = "\n".join(f"  {law.name:<12} {law.formula}   ({law.title})" for law in all_laws().values())
    out = Parser(
        prog="python -m analysis.fit",
        description="Fits a scaling law to a table of runs, with bootstrap intervals and a hold-out, and writes JSON.",
        epilog=f"laws:\n{laws}\n\nColumns are those of the law: N parameters, D tokens, C training FLOPs, "
        "loss in nats/token.\nThe fit is refused, with the reason in the field 'refused', where the data do not "
        "determine the answer.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--law", required=True, metavar="NAME", help="one of the laws below")
    out.add_argument("--data", required=True, metavar="PATH", help="CSV, parquet, or a run store runs/NAME")
    out.add_argument("--out", metavar="FIT.JSON", help="where to write the result (default: only a summary is printed)")
    out.add_argument("--delta", type=float, help="Huber threshold on the law's residual scale (default: the law's)")
    out.add_argument(
        "--fix", metavar="NAME=VALUE,...", help="hold parameters at a value, e.g. alpha=0.34; NAME=free fits a held one"
    )
    out.add_argument("--at", metavar="C,...", help="compute budgets in FLOP at which to report the optimum")
    out.add_argument(
        "--flops-factor", type=float, metavar="K", help="K of C = K*N*D for optima (default: from C, or 6)"
    )
    held = out.add_mutually_exclusive_group()
    held.add_argument("--no-holdout", action="store_true", help="skip the fit without the dearest budget")
    held.add_argument(
        "--holdout-above", type=float, metavar="C", help="predict the rows above this compute (default: dearest budget)"
    )
    out.add_argument("--quiet", action="store_true", help="no progress bars and no summary")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out)
    cli.add_weighted_argument(out)
    out.add_argument("--profile", action="store_true", help="also give intervals by profile likelihood")
    return out


def main(args: argparse.Namespace) -> int:
    cli.check_fit_arguments(args)
    law = get_law(args.law)
    own = law.fitter is not None
    unread = {
        "--delta": own and args.delta is not None, "--profile": own and args.profile,
        "--seed-noise": not own and args.seed_noise is not None, "--weighted": not own and args.weighted,
        "--at": args.at is not None and not (law.optimum or own),
        "--flops-factor": args.flops_factor is not None and not law.optimum,
    }  # fmt: skip
    cli.refuse_unread(law.name, unread)
    positive = {"--delta": args.delta, "--flops-factor": args.flops_factor, "--holdout-above": args.holdout_above}
    for flag, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value}: must be positive")
    options = Options(
        delta=args.delta, bootstrap=args.bootstrap, level=args.level, seed_noise=args.seed_noise,
        fix=cli.parse_assignments(args.fix, "--fix", free=True), at=cli.parse_numbers(args.at, "--at"),
        flops_factor=args.flops_factor, seed=args.seed, weighted=args.weighted,
        profile=args.profile, holdout=not args.no_holdout, holdout_above=args.holdout_above,
        progress=not args.quiet,
    )  # fmt: skip
    for name in options.fix:
        law.parameter(name)
    cli.check_out(args.out)
    table = load_table(args.data, required=law.columns, may_be_zero=law.may_be_zero, **cli.table_options(args))
    fit = fit_law(law, table, options)
    if args.out:
        fit.save(args.out)
    if not args.quiet:
        print(summary(fit))
    return 0


def summary(fit: Fit) -> str:
    """A few lines for a terminal."""
    from analysis.tables import number, with_interval

    reasons = [entry["reason"] for entry in fit.data["excluded"]]
    lines = [f"{fit.law}: {fit.n} rows from {fit.data['source']} ({len(reasons)} excluded), {fit.seconds:.1f} s"]
    if reasons:
        lines.append(f"  excluded: {count_reasons(reasons)}")
    lines += [f"  {fit.settings['law']}", f"  {fit.data['conventions']}"]
    if fit.settings.get("bootstrap"):
        lines.append(f"  intervals: {fit.settings['level']:.0%}, from {fit.settings['bootstrap']} bootstrap draws")
    lines += [f"  {name:<18} {with_interval(entry)}" for name, entry in {**fit.params, **fit.derived}.items()]
    for name, entry in fit.quality.get("profile_likelihood", {}).items():
        ends = [number(entry[end]) if entry[end] is not None else "unbounded" for end in ("lo", "hi")]
        lines.append(f"  {name:<18} profile likelihood [{', '.join(ends)}]")
    for budget in fit.budgets:
        note = f"refused: {budget['refused']}" if budget["refused"] else f"N* {with_interval(budget['N'])}"
        lines.append(f"  C {number(budget['C'])}: {note}")
    for point in fit.optimum:
        found = ", ".join(f"{name}* {with_interval(point[name])}" for name in ("N", "D", "loss") if name in point)
        lines.append(f"  at C {number(point['C'])}{' (beyond the runs)' if point['extrapolated'] else ''}: {found}")
    if fit.holdout and not fit.holdout["refused"]:
        unit = "unit of the target" if fit.settings.get("residual") == "linear" else "natural log"
        held = fit.holdout
        inside = f", {held['share_inside']:.0%} of {held['n_heldout']} inside" if "share_inside" in held else ""
        lines.append(
            f"  hold-out ({held['held']}): rms error {held['rms_error']:.4f}, mean {held['mean_error']:+.4f}, "
            f"predicted half-width {held['predicted_halfwidth']:.4f} ({unit}){inside}"
        )
    elif fit.holdout:
        lines.append(f"  hold-out: refused: {fit.holdout['refused']}")
    lines += [f"  warning: {text}" for text in fit.warnings]
    if fit.refused:
        lines.append(f"  REFUSED: {fit.refused}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
