"""Scaling exponents of one sweep under every accounting of parameters and of FLOPs, side by side.

    python -m analysis.accounting --store runs/NAME [--where "arch == 'gla'"]

Published exponents disagree mostly through what N and C count (arXiv:2406.19146, 2406.12907): the same runs are fitted
again with N = all parameters, all but the input embedding, or all but both embeddings, and C = causal, full, hardware
or 6 N D FLOPs, by IsoFLOP minima (approach 2) and by the parametric loss (approach 3).
"""

import argparse
import sys
from dataclasses import replace

from analysis import cli
from analysis.fit import fit_law
from analysis.load import C_ACCOUNTING, N_ACCOUNTING, Table, load_table
from analysis.result import Options
from analysis.tables import with_interval
from pallas_kernels.commands import Parser


def exponents(table: Table, laws=("isoflop", "chinchilla"), options: Options | None = None) -> list[dict]:
    """One row per law and accounting: `{"law", "n", "c", "a", "b", "refused"}` with intervals for N* ~ C^a, D* ~ C^b.

    The table must come from a run store. C = 6 N D uses the N of the row. The budgets stay those that were planned (the
    column `budget`), so every row compares the same runs. The parametric loss does not see C, except through N: it is
    fitted once per N.
    """
    options = replace(options or Options(), holdout=False)
    out = []
    for n, size in N_ACCOUNTING.items():
        for c, compute in C_ACCOUNTING.items():
            if size not in table.rows or compute not in table.rows or table.rows[[size, compute]].isna().any(axis=None):
                continue
            rows = table.rows.assign(N=table.rows[size])
            rows["C"] = 6 * rows["N"] * rows["D"] if c == "6nd" else rows[compute]
            part = replace(table, rows=rows, counts={"N": n, "C": c})
            for law in laws:
                if law != "isoflop" and c != "6nd":
                    continue
                fit = fit_law(law, part, options)
                found = {key: fit.derived.get(key) for key in ("a", "b")}
                out.append({"law": law, "n": n, "c": c if law == "isoflop" else "-", **found, "refused": fit.refused})
    if not out:
        raise ValueError(f"{table.source}: no columns N_*, C_* of parameters and FLOPs by accounting: give a run store")
    return sorted(out, key=lambda row: laws.index(row["law"]))


def text_table(rows: list[dict]) -> str:
    lines = [f"{'law':<12} {'N counts':<13} {'C counts':<13} {'N* ~ C^a':<24} {'D* ~ C^b':<24}"]
    for row in rows:
        values = " ".join(f"{with_interval(row[key]) if row[key] else '-':<24}" for key in ("a", "b"))
        note = f"  REFUSED: {row['refused']}" if row["refused"] else ""
        lines.append(f"{row['law']:<12} {row['n']:<13} {row['c']:<13} {values}{note}".rstrip())
    return "\n".join(lines)


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.accounting",
        description="Scaling exponents of one sweep under every accounting of parameters and FLOPs, side by side.",
    )
    out.add_argument("--store", required=True, metavar="PATH", help="run store runs/NAME")
    out.add_argument("--law", nargs="+", default=["isoflop", "chinchilla"], choices=["isoflop", "chinchilla"],
                     help="fits to compare (default both)")  # fmt: skip
    out.add_argument("--out", metavar="TABLE.JSON", help="write the numbers as JSON")
    cli.add_table_arguments(out, counts=False)
    cli.add_fit_arguments(out)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    options = cli.fit_options(args)
    table = load_table(args.store, required=("N", "D", "C", "loss"), **cli.table_options(args))
    rows = exponents(table, tuple(args.law), options)
    print(table.summary())
    print(text_table(rows))
    cli.write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
