"""How much the numbers of a fit depend on choices: Huber threshold, outliers, the dearest and cheapest runs, weights.

    python -m analysis.sensitivity --law chinchilla --data points.csv --columns 'D=C/(6*N)'

Published laws moved by more than their intervals through such choices (the five highest losses and the threshold of the
Chinchilla fit, arXiv:2404.10102). What N and C count is varied by `analysis.accounting`, the near-optimal threshold of
settings by `analysis.hyperparameters`.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np

from analysis import cli
from analysis.isoflop import best_of_budgets, budget_groups
from analysis.laws import Law, get_law
from analysis.load import Table, check_comparable, load_table
from analysis.result import Options, interval
from analysis.tables import with_interval
from pallas_kernels.commands import Parser

DRAWS = 200  # per variation: the table compares values, their intervals need no second digit


def variations(law: Law, table: Table) -> list[tuple[str, np.ndarray, dict]]:
    """`(what changes, rows kept [rows], options changed)` of each variation that the data allow; the first: none."""
    rows = table.rows
    every = np.ones(len(rows), bool)
    out = [("as fitted", every, {})]
    if law.fitter is None and law.delta is not None:
        out += [(f"Huber threshold {scale * law.delta:g}", every, {"delta": scale * law.delta}) for scale in (0.1, 10)]
        out.append(("least squares", every, {"delta": 1e6}))
    if law.name == "isoflop":
        out.append(("minima weighted by 1/sigma^2", every, {"weighted": True}))
    if "loss" in rows:
        order = rows["loss"].rank(method="first", ascending=False).to_numpy()
        for k in sorted({1, round(0.02 * len(rows)), round(0.05 * len(rows))} - {0}):
            out.append((f"without the {k} highest loss{'es' if k > 1 else ''}", order > k, {}))
    cost = rows["C"] if "C" in rows else rows["N"] * rows["D"] if {"N", "D"} <= set(rows) else None
    groups = None if cost is None else budget_groups(rows, cost)
    if groups is not None and len(groups) >= 3:
        out += [("without the dearest budget", _without(every, groups[-1]), {}),
                ("without the cheapest budget", _without(every, groups[0]), {})]  # fmt: skip
        if "N" in rows:
            N = rows["N"].to_numpy(float)  # a size may have several runs (seeds)
            ends = [
                group[(N[group] <= 1.001 * N[group].min()) | (N[group] >= 0.999 * N[group].max())] for group in groups
            ]
            out.append(("without both end sizes of each budget", _without(every, np.concatenate(ends)), {}))
    elif cost is not None:
        rank = cost.rank(pct=True).to_numpy()
        out += [("without the dearest fifth", rank <= 0.8, {}), ("without the cheapest fifth", rank > 0.2, {})]
    return out


def _without(every, positions):
    keep = every.copy()
    keep[positions] = False
    return keep


def sensitivity(law: Law | str, table: Table, options: Options | None = None) -> list[dict]:
    """Fits every variation: rows `{"change", "n", "values": {name: interval}, "moved", "refused"}`.

    `values` are the parameters and derived quantities; `moved` names those whose value leaves the interval of the first
    row. The search starts from the optimum of the first row and from some 60 starts of the law's grid.
    """
    law = get_law(law) if isinstance(law, str) else law
    options = replace(options or Options(), holdout=False, progress=False, profile=False)
    options = replace(options, bootstrap=min(options.bootstrap, DRAWS))
    if law.frontier:
        table = best_of_budgets(table)
    refit = _with_fitter if law.fitter else _Refit(law, table, options)
    out = []
    for change, keep, changes in variations(law, table):
        row = {"change": change, "n": int(keep.sum()), "values": {}, "moved": [], "refused": None}
        out.append(row)
        try:
            row["values"], row["refused"] = refit(law, table, keep, replace(options, **changes))
        except ValueError as err:
            row["refused"] = str(err)
        for name, entry in row["values"].items():
            first = out[0]["values"].get(name)
            if first and first["lo"] is not None and not first["lo"] <= entry["value"] <= first["hi"]:
                row["moved"].append(name)
    return out


def _with_fitter(law: Law, table: Table, keep, options: Options) -> tuple[dict, str | None]:
    fit = law.fitter(table.take(keep), options)
    return {**fit.params, **fit.derived}, fit.refused


class _Refit:
    """Refits one problem with rows of weight 0, so that every variation shares the compiled functions."""

    def __init__(self, law: Law, table: Table, options: Options):
        from analysis.search import problem  # scipy and JAX are slow to import

        self.prob, self.near = problem(law, table.rows, options.fix, options.delta), None

    def __call__(self, law: Law, table: Table, keep, options: Options) -> tuple[dict, str | None]:
        from analysis.search import search
        from analysis.uncertainty import bootstrap

        if keep.sum() < len(self.prob.free) + 2:
            raise ValueError(f"too few points: {keep.sum()} rows for {len(self.prob.free)} parameters")
        prob = replace(self.prob, delta=options.delta or self.prob.delta)
        weights = keep.astype(float)
        best = search(
            prob,
            weights,
            extra=self.near,
            thin=options.thin if self.near is None else max(1, len(law.starts(prob.fix)) // 60),
        )
        self.near = best.z if self.near is None else self.near
        sample = {}
        if options.bootstrap:
            sample = bootstrap(prob, best, options.bootstrap, weights=weights, seed=options.seed)
        values = {name: interval(value, sample.get(name), options.level) for name, value in best.params.items()}
        if law.derived:
            drawn = law.derived(sample) if sample else {}
            derived = law.derived(best.params)
            values |= {name: interval(value, drawn.get(name), options.level) for name, value in derived.items()}
        lost = [p for p in map(law.parameter, prob.free) if not p.lo < best.params[p.name] < p.hi]
        return values, f"parameter {lost[0].name} ran to its bound" if lost else None


def shown(rows: list[dict], most: int = 5) -> list[str]:
    """Names worth a column: all where they are few, otherwise exponents and floors before sizes."""
    names = list(rows[0]["values"])
    first = [name for name in ("a", "b", "E", "alpha", "beta", "gamma", "p", "q") if name in names]
    return (first or names)[:most] if len(names) > most else names


def text_table(rows: list[dict]) -> str:
    names = shown(rows)
    lines = [f"{'':<38} {'n':>5} " + " ".join(f"{name:<22}" for name in names)]
    for row in rows:
        values = " ".join(
            f"{with_interval(row['values'][name]) + ('*' if name in row['moved'] else ''):<22}"
            for name in names if name in row["values"]
        )  # fmt: skip
        note = f"refused: {row['refused']}" if row["refused"] else ""
        lines.append(f"{row['change']:<38} {row['n']:>5} {values} {note}".rstrip())
    return "\n".join([*lines, "* outside the interval of the first row"])


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.sensitivity",
        description="Fits a law again under other thresholds, without outliers and without the dearest runs.",
    )
    out.add_argument("--law", default="chinchilla", metavar="NAME", help="law to fit (default chinchilla)")
    out.add_argument("--data", required=True, metavar="PATH", help="CSV, parquet, wandb export or run store")
    out.add_argument("--out", metavar="TABLE.JSON", help="write the numbers as JSON")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, bootstrap=DRAWS)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    law = get_law(args.law)
    cli.refuse_unread(law.name, {"--seed-noise": args.seed_noise is not None and law.fitter is None})
    table = load_table(args.data, required=law.columns, may_be_zero=law.may_be_zero, **cli.table_options(args))
    check_comparable(table)
    law.check(table.rows)
    options = cli.fit_options(args)
    rows = sensitivity(law, table, options)
    print(table.summary())
    print(text_table(rows))
    cli.write_json(args.out, rows)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
