"""Efficiency leverage: how much more compute a dense model needs for the loss of a sparse one, arXiv:2507.17702.

    python -m analysis.leverage --dense runs/NAME --dense-where "arch == 'dense'" \\
        --variant runs/NAME --variant-where "arch == 'moe'" --columns "A=active/total,G=2*d_model/d_expert" --out el.csv
    python -m analysis.leverage --at A=0.031,G=12,C=1e22             # from the published law
    python -m analysis.leverage --wanted 7 --at C=1e22               # which A and G give a leverage of 7 there
    python -m analysis.leverage --wanted 7 --at G=12,C=1e22          # only the activation ratio

From runs: a power law L = k C^-gamma goes through the best dense run of each budget, and is inverted at the loss of
each sparse run: EL = C_dense / C. Where losses have a floor that law is too straight, and leverages bend: too high
amid the dense budgets, too low at their ends. `--law power` has a floor; it takes 5 budgets. A loss outside those of
the dense runs is marked as extrapolated. The table that is written can be fitted: `python -m analysis.fit --law
leverage --data el.csv`. For a sweep with several sizes per budget `analysis.leverage_sweep` says more.
"""

import argparse
import dataclasses
import sys

import numpy as np
import pandas as pd

from analysis import cli
from analysis.fit import fit_law
from analysis.isoflop import best_of_budgets, budget_groups
from analysis.laws import efficiency_leverage, get_law
from analysis.laws.power import compute_for
from analysis.load import Table, check_comparable, load_table
from analysis.result import Options, interval
from analysis.tables import number, with_interval
from pallas_kernels.commands import Parser


def leverage(
    dense: Table, variant: Table, law: str = "power0", by=("arch", "A", "G", "S"), options: Options | None = None
) -> tuple[list, list[str]]:
    """The leverage of the best run of each budget of `variant` (one per value of the columns `by` that it has).

    Both tables need C and loss. `law` is the dense frontier: power0 as in the paper, or power with a floor.

    Returns:
      Rows `{"row", the columns `by`, "C", "loss", "EL": {"value", "lo", "hi"}, "extrapolated"}` and the warnings of the
      dense fit. Intervals hold the uncertainty of the dense law, and the noise of the sparse run taken as that of the
      dense runs about their law.

    Raises:
      DataError, or ValueError where the dense runs do not determine the law.
    """
    options = options or Options()
    fit, dense = fit_law(law, dense, options), best_of_budgets(dense)
    if fit.refused:
        raise ValueError(f"the dense runs do not give a law of compute: {fit.refused}")
    noise = fit.quality["rmse_log"] * np.sqrt(fit.n / (fit.n - fit.quality["free_parameters"]))
    by = [name for name in by if name in variant.rows]
    groups = [part for _, part in variant.rows.groupby(by, sort=False)] if by else [variant.rows]
    rng, out = np.random.default_rng(options.seed), []
    for part in groups:
        runs = best_of_budgets(variant.take(variant.rows.index.isin(part.index))).rows
        for label, run in runs.sort_values("C").iterrows():
            drawn = run["loss"] * np.exp(noise * rng.standard_normal(len(fit.draws["k"]))) if fit.draws else None
            draws = None if drawn is None else compute_for(fit.draws, drawn) / run["C"]
            inside = dense.rows["loss"].min() <= run["loss"] <= dense.rows["loss"].max()
            out.append({
                "row": str(run.get("run_id", label)), **{name: run[name] for name in by}, "C": float(run["C"]),
                "loss": float(run["loss"]), "EL": interval(compute_for(fit.values, run["loss"]) / run["C"], draws,
                options.level), "extrapolated": not inside,
            })  # fmt: skip
    return out, [f"dense law: {text}" for text in fit.warnings]


def frame(rows: list[dict]) -> pd.DataFrame:
    """`leverage` as a table with columns EL, EL_lo, EL_hi."""
    flat = [{**row, "EL": row["EL"]["value"], "EL_lo": row["EL"]["lo"], "EL_hi": row["EL"]["hi"]} for row in rows]
    return pd.DataFrame(flat)


def repeats(table: Table) -> str:
    """A note where sizes were trained more than once: the best of several tries flatters. '' where none was."""
    groups = budget_groups(table.rows, table.rows["C"])
    if "N" not in table.rows or groups is None:
        return ""
    budget = pd.Series(0, table.rows.index)
    for i, rows in enumerate(groups):
        budget.iloc[rows] = i
    by = [table.rows[name] for name in ("arch", "A", "G", "S", "N") if name in table.rows]
    tries = table.rows["loss"].groupby([*by, budget]).size()
    more = int((tries > 1).sum())
    found = f"note: {table.source}: {more} of {len(tries)} sizes have several runs, the best of which counts"
    return found if more else ""


def text_table(rows: list[dict]) -> str:
    names = [name for name in ("A", "G") if name in rows[0]]
    lines = [f"{'run':<16} {' '.join(f'{name:>8}' for name in names)} {'C':>10} {'loss':>7}  leverage"]
    for row in rows:
        values = " ".join(f"{number(row[name]):>8}" for name in names)
        note = "   extrapolated: outside the losses of the dense runs" if row["extrapolated"] else ""
        lines.append(
            f"{row['row'][:16]:<16} {values} {number(row['C']):>10} {row['loss']:>7.4f}  "
            f"{with_interval(row['EL'])}{note}"
        )
    return "\n".join(lines)


def published(at: dict[str, float], wanted: float | None) -> str:
    """What the published joint law says at A, G, C, or which of A and G, or both, reach a wanted leverage at C."""
    law = get_law("leverage")
    p, names = law.constants["ling"].values, {variable.name for variable in law.variables}
    need = names if wanted is None else {"C"}
    if not need <= set(at) or not set(at) <= names or (wanted is not None and len(at) > 2):
        kind = "A, G and C" if wanted is None else "C and at most one of A and G"
        raise ValueError(
            f"--at {','.join(at)}: give {kind}, e.g. --at {'A=0.031,' if wanted is None else ''}G=12,C=1e22"
        )
    for variable in law.variables:
        if variable.name in at:
            variable.check(at[variable.name], law.name)
    if wanted is None:
        return f"EL = {float(law.evaluate(p, **at)):.3g}"
    if "A" not in at:
        best, lines = law.derived(p)["G_opt"], []
        for G in [at["G"]] if "G" in at else sorted([2.0, 4.0, 8.0, best, 16.0]):
            A = float(efficiency_leverage.activation_ratio(p, wanted, G, at["C"]))
            found = f"no activation ratio gives EL {wanted:g}" if np.isnan(A) else f"A = {A:.3g}"
            note = "   the best granularity: most experts active" if G == best else ""
            lines.append(found if "G" in at else f"G = {G:<5.3g} {found}{note}")
        return "\n".join(lines)
    lo, hi = efficiency_leverage.granularities(p, wanted, at["A"], at["C"])
    return f"no granularity gives EL {wanted:g}" if np.isnan(lo) else f"G from {lo:.3g} to {hi:.3g} gives at least that"


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.leverage",
        description="Efficiency leverage of sparse over dense models, from two sets of runs or from the published law. "
        "Of each budget the best run counts; where every budget has several sizes analysis.leverage_sweep says more.",
    )
    out.add_argument("--dense", metavar="PATH", help="dense runs: CSV, parquet, wandb export or run store with C, loss")
    out.add_argument("--variant", metavar="PATH", help="the runs to judge, with columns A and G where they vary")
    out.add_argument("--dense-where", metavar="QUERY", help="rows of --dense to use")
    out.add_argument("--variant-where", metavar="QUERY", help="rows of --variant to use")
    out.add_argument(
        "--law",
        choices=("power0", "power"),
        default="power0",
        help="dense law: power0, as in the paper (default), or power: where losses have a floor power0 bends leverages",
    )
    out.add_argument("--out", metavar="EL.CSV", help="write the table, to be fitted by the laws leverage_*")
    out.add_argument("--at", metavar="A=,G=,C=", help="evaluate the published law there instead")
    out.add_argument("--wanted", type=float, metavar="EL", help="with --at: which A and G reach this leverage")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, seed_noise=False)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    if args.at:
        if args.wanted is not None and not args.wanted > 0:
            raise ValueError(f"--wanted {args.wanted:g}: must be positive")
        print(published(cli.parse_assignments(args.at, "--at"), args.wanted))
        return
    if not (args.dense and args.variant):
        raise ValueError("give --dense and --variant, or --at for the published law")
    tables = []
    for path, query in ((args.dense, args.dense_where), (args.variant, args.variant_where)):
        both = " and ".join(f"({text})" for text in (args.where, query) if text)
        options = {**cli.table_options(args), "where": both or None}
        tables.append(load_table(path, required=("C", "loss"), **options))
    check_comparable(dataclasses.replace(tables[0], rows=pd.concat([table.rows for table in tables])))
    options = cli.fit_options(args, holdout=False)
    rows, warnings = leverage(*tables, args.law, options=options)
    for table in tables:
        print(table.summary())
    print(text_table(rows))
    print("leverage: C of the dense law at that loss over C")
    print("A: experts used over all, shared ones in both; G: 2 d_model / d_expert")
    counted = tables[1].conventions() or "C: FLOP"
    drawn = f"intervals: {args.level:.0%}, from {args.bootstrap} bootstrap draws" if args.bootstrap else "no intervals"
    print(f"{counted}; loss: nats per token; {drawn}")
    for note in dict.fromkeys([*(f"note: {text}" for text in warnings), *filter(None, map(repeats, tables))]):
        print(note)
    if args.out:
        frame(rows).to_csv(args.out, index=False)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
