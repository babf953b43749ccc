"""Which law describes a table of runs best: Akaike's criterion and the error on the dearest runs, held out.

    python -m analysis.model_selection --data points.csv --law chinchilla tied_exponents kaplan farseer

AIC rewards the fit to all rows, less two for each parameter (corrected for small samples); the hold-out asks what a
scaling law is for, to predict dearer runs from cheaper ones. Where the two disagree, believe the hold-out. For AIC
every law is fitted by least squares on its own scale, since the Huber objective is no likelihood.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np

from analysis import cli
from analysis.isoflop import best_of_budgets
from analysis.laws import get_law
from analysis.load import Table, check_comparable, load_table
from analysis.result import Options
from analysis.tables import number
from pallas_kernels.commands import Parser

STARTS = 200  # of each law's grid
DENSE = ("chinchilla", "tied_exponents", "kaplan")


def select(table: Table, laws=DENSE, options: Options | None = None) -> list[dict]:
    """Compares laws of one target on the same rows, best AIC first.

    Returns:
      Rows `{"law", "free", "n", "rmse" (relative), "aic" (minus that of the best), "weight" (Akaike), "holdout" (rms
      relative error), "holdout_mean", "refused"}`; those that could not be fitted come last.

    Raises:
      ValueError where the laws predict different quantities.
    """
    from analysis.search import problem, search  # scipy and JAX are slow to import
    from analysis.uncertainty import holdout

    options, laws = options or Options(), [get_law(name) for name in laws]
    targets = {law.target.name for law in laws}
    if len(targets) > 1:
        raise ValueError(f"laws predict different quantities: {', '.join(sorted(targets))}")
    if any(law.frontier for law in laws):
        table = best_of_budgets(table)
    out = []
    for law in laws:
        row = {"law": law.name, "n": len(table.rows), "aic": None, "weight": None, "holdout": None, "refused": None}
        out.append(row)
        if law.fitter:
            row["refused"] = "has a procedure of its own"
            continue
        prob = problem(law, table.rows)
        n, k = len(prob.y), len(prob.free) + 1  # and the variance
        row["free"] = k - 1
        if n < k + 2:
            row["refused"] = f"too few points: {n} rows for {k - 1} parameters"
            continue
        squares = replace(prob, delta=prob.delta and 1e6)  # Huber with so large a threshold is least squares
        thin = max(1, len(law.starts()) // STARTS)
        best = search(squares, thin=thin)
        r = squares.residuals(best.params)
        # density of the target itself, so that laws with residuals on different scales can be compared
        jacobian, scale = (0.0, 1.0) if law.residual == "linear" else (np.sum(np.log(prob.y)), law.nats)
        row["aic"] = n * np.log(np.mean((scale * r) ** 2)) + 2 * jacobian + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        row["rmse"] = float(np.sqrt(np.mean((prob.y / prob.predict(best.params) - 1) ** 2)))
        held = holdout(prob, table.rows, best.z, draws=1, seed=options.seed, thin=thin)
        if held["refused"]:
            row["refused"] = f"hold-out: {held['refused']}"
            continue
        error = np.array([point["observed"] / point["predicted"] - 1 for point in held["points"]])
        row |= {"holdout": float(np.sqrt(np.mean(error**2))), "holdout_mean": float(np.mean(error))}
    scores = np.array([np.inf if row["aic"] is None else row["aic"] for row in out])
    if np.isfinite(scores).any():
        weights = np.exp(-(scores - scores.min()) / 2)
        for row, score, weight in zip(out, scores, weights / weights.sum(), strict=True):
            if row["aic"] is not None:
                row |= {"aic": float(score - scores.min()), "weight": float(weight)}
    return sorted(out, key=lambda row: np.inf if row["aic"] is None else row["aic"])


def verdict(rows: list[dict]) -> str:
    """One line: which law AIC and the hold-out prefer, and whether they agree."""
    scored = [row for row in rows if row["holdout"] is not None]
    if len(scored) < 2:
        return "nothing to choose from: fewer than two laws could be fitted and held out"
    by_aic, by_error = scored[0], min(scored, key=lambda row: row["holdout"])
    runner = scored[1]["aic"] - by_aic["aic"]
    if by_aic is by_error:
        strength = "" if runner > 4 else f", though AIC barely separates it from {scored[1]['law']}"
        return f"{by_aic['law']} by both AIC and hold-out{strength}"
    return (
        f"not resolved: AIC prefers {by_aic['law']}, the hold-out {by_error['law']} "
        f"(error {by_error['holdout']:.2%} against {by_aic['holdout']:.2%})"
    )


def text_table(rows: list[dict]) -> str:
    lines = [f"{'law':<18} {'free':>4} {'rmse':>8} {'AIC - best':>10} {'weight':>7} {'hold-out rms':>12} {'mean':>8}"]
    for row in rows:
        if row["aic"] is None:
            lines.append(f"{row['law']:<18} refused: {row['refused']}")
            continue
        held = f"{row['holdout']:>12.3%} {row['holdout_mean']:>+8.3%}" if row["holdout"] is not None else row["refused"]
        score = f"{row['rmse']:>8.3%} {number(row['aic']):>10} {row['weight']:>7.3f}"
        lines.append(f"{row['law']:<18} {row['free']:>4} {score} {held}")
    return "\n".join([*lines, f"verdict: {verdict(rows)}"])


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.model_selection",
        description="Compares laws on one table by AIC and by their error on the dearest runs, held out.",
    )
    out.add_argument("--data", required=True, metavar="PATH", help="CSV, parquet, wandb export or run store")
    out.add_argument("--law", nargs="+", default=list(DENSE), metavar="NAME",
                     help=f"laws of one target (default {' '.join(DENSE)})")  # fmt: skip
    out.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    out.add_argument("--out", metavar="TABLE.JSON", help="write the numbers as JSON")
    cli.add_table_arguments(out)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_out(args.out)
    laws = [get_law(name) for name in args.law]
    columns = dict.fromkeys(column for law in laws for column in law.columns)
    zero = {name for law in laws for name in law.may_be_zero}
    table = load_table(args.data, required=tuple(columns), may_be_zero=zero, **cli.table_options(args))
    check_comparable(table)
    rows = select(table, args.law, Options(seed=args.seed))
    print(table.summary())
    print(text_table(rows))
    cli.write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
