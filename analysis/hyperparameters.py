"""Laws for the best learning rate and batch from a grid of runs, and how much they depend on what counts as best.

    python -m analysis.hyperparameters --data grid.csv --law lr_size_data batch_data --columns "batch=bs*2048"

For each group of runs that differ in nothing but the settings (equal N and D, or equal C), every run with a loss within
a share tau of the group's best takes part in the regression (arXiv:2507.17702 uses tau = .25 %). On published grids the
exponents move by more than their intervals between tau = .1 % and .5 %, so all of them are reported, with the variant
that keeps only the best run of each group.

Intervals resample runs. Where the optimum of each group lies a little off the law, as it does on the Step Law grid (.06
of ln lr, .09 of ln batch), nominal 90 % holds the truth in 85 % of simulations (tests/analysis/coverage.py); where
near-best runs reach the edge of what was tried the exponents are biased, and `sensitivity` counts those groups.
"""

import argparse
import sys
from dataclasses import replace

from analysis import cli
from analysis.fit import fit_law
from analysis.laws import get_law
from analysis.load import DataError, Table, load_table
from analysis.result import Options
from analysis.tables import with_interval
from pallas_kernels.commands import Parser

TAUS = (0.001, 0.0025, 0.005)


def near_optimal(table: Table, tau: float, by=("N", "D")) -> Table:
    """The runs with loss <= (1 + tau) * best of their group; tau = 0 keeps the best run (or ties). Others excluded."""
    for name in (*by, "loss"):
        if name not in table.rows:
            raise DataError(f"column {name!r} is missing in {table.source}: groups have equal {' and '.join(by)}")
        if table.rows[name].isna().any():
            raise DataError(f"column {name!r}, row {table.rows[name].isna().idxmax()}: empty")
    if not 0 <= tau < 1:
        raise ValueError(f"tau {tau:g}: must lie in [0, 1); it is a share, 0.0025 is .25 %")
    best = table.rows.groupby(list(by))["loss"].transform("min")
    filters = [*table.filters, f"loss within {tau:.3%} of its group's best"]
    out = replace(table, filters=filters)
    out.exclude(table.rows["loss"] > (1 + tau) * best, f"loss more than {tau:.3%} above the best of its group")
    return out


def sensitivity(table: Table, laws, by=("N", "D"), taus=TAUS, options: Options | None = None) -> list[dict]:
    """Fits each law at each tau and to the best runs alone: rows `{"law", "tau", "n", "params", "refused", "cut"}`.

    `cut` counts the groups whose near-best runs reach the smallest or largest setting that was tried there.
    """
    rows = []
    for law in map(get_law, laws):
        for tau in (*taus, 0.0):
            near = near_optimal(table, tau, by)
            fit = fit_law(law, near, options or Options(holdout=False))
            row = {"law": law.name, "tau": tau, "n": fit.n, "params": fit.params, "refused": fit.refused}
            rows.append(row | {"cut": _cut(table.rows, near.rows, law.target.name, list(by))})
    return rows


def _cut(every, near, setting: str, by: list[str]) -> int:
    """Groups where `near` reaches the smallest or largest value of `setting` in `every`."""
    tried, kept = (rows.groupby(by)[setting].agg(["min", "max"]) for rows in (every, near))
    return int(((kept["min"] <= tried["min"]) | (kept["max"] >= tried["max"])).sum())


def text_table(rows: list[dict]) -> str:
    lines = []
    for name in dict.fromkeys(row["law"] for row in rows):
        law, part = get_law(name), [row for row in rows if row["law"] == name]
        lines.append(f"{law.formula}   [{law.target.unit}]")
        for row in part:
            tau = f"tau {row['tau']:.2%}" if row["tau"] else "best run only"
            values = "  ".join(f"{key} {with_interval(entry)}" for key, entry in row["params"].items())
            lines.append(f"  {tau:<14} n {row['n']:<5} {'REFUSED: ' + row['refused'] if row['refused'] else values}")
        lines += [f"  {note}" for note in _spread(part)]
        cut = {f"{row['tau']:.2%}": row["cut"] for row in part if row["cut"]}
        if cut:
            counts = ", ".join(f"{count} at tau {tau}" for tau, count in cut.items())
            lines.append(
                f"  near-best runs reach the edge of the {law.target.name} tried in some groups ({counts}): biased"
            )
    return "\n".join(lines)


def _spread(rows: list[dict]) -> list[str]:
    """A line for each exponent that the threshold moves by more than half of its narrowest interval."""
    notes = []
    good = [row["params"] for row in rows if not row["refused"]]
    for name in good[0] if good else {}:
        values = [params[name]["value"] for params in good]
        half = min((p[name]["hi"] - p[name]["lo"]) / 2 for p in good) if good[0][name]["lo"] is not None else 0.0
        if name != "k" and max(values) - min(values) > half:
            span = f"{min(values):.3f} to {max(values):.3f}"
            notes.append(f"{name} depends on the threshold ({span}): more than its interval says")
    return notes


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.hyperparameters",
        description="Power laws of the best learning rate and batch, and how they depend on the near-best threshold.",
    )
    out.add_argument("--data", required=True, metavar="PATH", help="CSV, parquet, or a run store runs/NAME")
    out.add_argument("--law", nargs="+", default=["lr_size_data", "batch_data"], metavar="NAME",
                     help="laws to fit (default lr_size_data batch_data; also lr_compute, batch_compute)")  # fmt: skip
    out.add_argument("--by", default="N,D", help="columns whose equal values make a group (default N,D)")
    out.add_argument("--tau", default="0.001,0.0025,0.005", help="near-best thresholds (default .1, .25 and .5 %%)")
    out.add_argument("--out", metavar="TABLE.JSON", help="write the numbers as JSON")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, seed_noise=False)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    by = tuple(name.strip() for name in args.by.split(","))
    wanted = {column for name in args.law for column in get_law(name).columns}
    table = load_table(args.data, required=sorted(wanted | {"loss"}), **cli.table_options(args))
    options = cli.fit_options(args, holdout=False)
    rows = sensitivity(table, args.law, by, cli.parse_numbers(args.tau, "--tau"), options)
    print(table.summary())
    print(text_table(rows))
    cli.write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
