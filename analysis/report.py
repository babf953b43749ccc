"""One self-contained HTML file about a sweep: what was run, what was left out, the laws, and how far to trust them.

python -m analysis.report --store runs/NAME --out report.html [--figures DIR]
"""

import argparse
import base64
import importlib.metadata
import io
import platform
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import cli, tables
from analysis.accounting import exponents
from analysis.compare import compare_architectures
from analysis.envelope import fit_envelope
from analysis.fit import fit_law
from analysis.frontier import TITLES, Frontier, frontier_points, resolved, share_floor
from analysis.isoflop import next_sizes, power_law
from analysis.laws import get_law
from analysis.load import (
    C_ACCOUNTING,
    C_MEANING,
    N_ACCOUNTING,
    N_MEANING,
    Table,
    check_comparable,
    load_curves,
    load_table,
)
from analysis.model_selection import select, verdict
from analysis.result import Options
from analysis.sensitivity import sensitivity
from analysis.sensitivity import shown as columns_shown
from pallas_kernels.commands import Parser

DRAWS = 200  # of tables that compare many fits


def build(
    table: Table, *, curves=None, base: str | None = None, axis: str = "arch", options=None, title="Sweep"
) -> dict:
    """Everything that the template shows, as plain values and SVG text.

    A part that cannot be computed holds the reason instead, so that a report of a poor sweep is still a report.
    """
    from analysis import plots  # matplotlib is slow to import

    options = options or Options()
    check_comparable(table)
    groups = {name: part for name, part in table.groups(axis).items() if len(part.rows)}
    base = base or next(iter(groups))
    frontiers: dict[str, Frontier] = {}
    sections, figures = [], {}
    for name, part in groups.items():
        section = {"name": name, **_fits(part, options), **_checks(part, curves, options)}
        try:
            frontiers[name] = frontier_points(part.rows, name, options)
        except ValueError as err:
            section["frontier_reason"] = str(err)
        else:
            section["next"] = _next_cells(frontiers[name], part.rows)
        if section["fit"]:
            law = get_law("chinchilla")
            figures[f"parametric {name}"] = plots.parametric(section["fit"], law, part.rows, title=name)
            figures[f"residuals {name}"] = plots.residuals(section["fit"], law, part.rows, title=name)
        sections.append(section)
    held = {s["name"]: s["fit"] for s in sections if s["fit"] and s["fit"].holdout and not s["fit"].holdout["refused"]}
    if held:
        figures["hold-out"] = plots.holdout(held)
    variants = [name for name in frontiers if name != base]
    comparisons = []
    if base in frontiers and variants:
        _, comparisons = compare_architectures(table, base, variants, axis, options)
        if any(comparison["points"] for comparison in comparisons):
            figures["gain"] = plots.gain(frontiers, base, options.level)
    if frontiers:
        shown = dict(zip(frontiers, share_floor(list(frontiers.values())), strict=True))
        figures["isoflop"] = plots.isoflop({k: f.profiles for k, f in frontiers.items()}, level=options.level)
        figures["frontiers"] = plots.frontiers(shown, level=options.level)
    found = {s["name"]: s["envelope"] for s in sections if s["envelope"] and not s["envelope"].refused}
    if found:
        figures["envelope"] = plots.envelopes(found, curves, table.rows, group=axis)
    if curves is not None and len(curves) and "run_id" in table.rows:
        figures["loss curves"] = plots.loss_curves(curves, table.rows, group=axis, excluded=table.excluded)
    return {
        "title": title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "level": options.level,
        "source": table.source,
        "filters": table.filters,
        "cost": _cost(table, axis),
        "runs": _runs(table, groups, axis),
        "used": len(table.rows),
        "excluded": _excluded(table, axis),
        "base": base,
        "comparisons": comparisons,
        "sections": sections,
        "figures": figures,
        "bootstrap": options.bootstrap,
    }


def _fits(part: Table, options: Options) -> dict:
    """Parametric and IsoFLOP fits of one architecture."""
    law = get_law("chinchilla")
    out = {"fit": None, "fit_reason": None, "isoflop": None, "isoflop_reason": None}
    try:
        fit = fit_law(law, part, replace(options, profile=True))
        out["fit_reason"] = fit.refused
        if "run_id" in part.rows:
            names = {str(index): run for index, run in part.rows["run_id"].items()}
            for entry in fit.quality.get("largest_residuals", []):
                entry["row"] = names[entry["row"]]
        out["fit"] = fit if fit.params else None
    except ValueError as err:
        out["fit_reason"] = str(err)
    try:
        out["isoflop"] = fit_law("isoflop", part, options)
        out["isoflop_reason"] = out["isoflop"].refused
    except ValueError as err:
        out["isoflop_reason"] = str(err)
    return out


def _checks(part: Table, curves, options: Options) -> dict:
    """Approach 1, choices that could have been made otherwise, accountings and other laws: each a list or a reason."""
    few = replace(options, bootstrap=min(options.bootstrap, DRAWS), thin=20, progress=False)
    out = {"envelope": None}
    if curves is not None and len(curves) and "run_id" in part.rows:
        out["envelope"] = fit_envelope(curves, part, few)
    for key, compute in (
        ("sensitivity", lambda: {law: sensitivity(law, part, few) for law in ("isoflop", "chinchilla")}),
        ("accounting", lambda: exponents(part, options=few)),
        ("laws", lambda: select(part, options=few)),
    ):
        try:
            out[key] = compute()
        except ValueError as err:
            out[key], out[f"{key}_reason"] = [], str(err)
    return out


def _next_cells(found: Frontier, frame: pd.DataFrame) -> list[dict]:
    """Cells that would settle refused budgets; where none was refused, the next budget around the predicted optimum."""
    factor = float(np.median(frame["C"] / (frame["N"] * frame["D"])))
    cells = [
        {"C": p.C, "N": N, "D": p.C / (factor * N), "why": p.refused.split(":")[0]}
        for p in found.profiles
        for N in next_sizes(p)
    ]
    good = [p for p in found.profiles if p.refused is None]
    if not cells and len(good) >= 2:
        A, a = power_law([p.C for p in good], [p.x_opt for p in good])
        C = good[-1].C * good[-1].C / good[-2].C
        sizes = A * C**a * np.geomspace(1 / 3, 3, 5)
        cells = [{"C": C, "N": N, "D": C / (factor * N), "why": "next budget"} for N in sizes]
    return cells


def _cost(table: Table, axis: str) -> list[dict]:
    """Compute and wall time of every run that consumed any, excluded ones too."""
    every = pd.concat([table.rows, table.excluded])
    if "status" in every:
        every = every[every["status"] != "planned"]
    every = every.assign(group=every[axis].fillna("unknown") if axis in every else "all")
    out = []
    for name, part in [*every.groupby("group", sort=False), ("total", every)]:
        wall = part["wall_seconds"].sum() if "wall_seconds" in part else np.nan
        out.append({"name": name, "runs": len(part), "flops": part["C"].sum(), "wall": wall})
    return out


def _runs(table: Table, groups: dict[str, Table], axis: str) -> list[dict]:
    out = []
    for name, part in groups.items():
        key = "budget" if "budget" in part.rows else None
        budgets = part.rows.groupby(key) if key else [(None, part.rows)]
        for budget, rows in sorted(budgets, key=lambda item: item[1]["C"].mean()):
            excluded = part.excluded[part.excluded[key] == budget] if key and key in part.excluded else part.excluded
            best = rows.loc[rows["loss"].idxmin()]
            out.append({
                "name": name, "C": rows["C"].mean(), "used": len(rows), "excluded": len(excluded),
                "N": f"{tables.count(rows['N'].min())} to {tables.count(rows['N'].max())}",
                "D": f"{tables.count(rows['D'].min())} to {tables.count(rows['D'].max())}",
                "best": best["loss"], "bpb": best.get("bpb", np.nan), "best_N": best["N"],
            })  # fmt: skip
    return out


def _excluded(table: Table, axis: str) -> list[dict]:
    return [
        {
            "row": str(row.get("run_id", index)),
            "name": str(row[axis]) if isinstance(row.get(axis), str) else "-",
            "budget": row.get("budget"),
            "reason": str(row["reason"]),
        }
        for index, row in table.excluded.iterrows()
    ]


def _svg(figure) -> str:
    """A data URI: keeps each picture's identifiers apart and the file self-contained."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def render(context: dict) -> str:
    """The page, from what `build` returned."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": tables.number, "interval": tables.with_interval, "count": tables.count, "duration": tables.duration,
        "count_interval": tables.count_interval, "columns": columns_shown, "resolved": resolved,
    }  # fmt: skip
    pictures = {name: _svg(figure) for name, figure in context["figures"].items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "scipy", "pandas"))
    return environment.get_template("report.html").render(
        **context, pictures=pictures, verdict_of=verdict, titles=TITLES, n_kinds=list(N_ACCOUNTING),
        c_kinds=list(C_ACCOUNTING), versions=f"Python {platform.python_version()}, {versions}",
    )  # fmt: skip


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.report",
        description="Writes one self-contained HTML report of a sweep: runs, exclusions, fits with intervals, "
        "IsoFLOP minima, hold-out, comparison of architectures, cost, and the cells to run next.",
    )
    out.add_argument("--store", required=True, metavar="PATH", help="run store runs/NAME, or a CSV with N, D, C, loss")
    out.add_argument("--out", required=True, metavar="REPORT.HTML")
    out.add_argument("--base", help="architecture to compare with (default: the first in the table)")
    out.add_argument("--axis", default="arch", help="column that names the architecture (default arch)")
    out.add_argument("--title", help="heading (default: the name of the store)")
    out.add_argument("--figures", metavar="DIR", help="also write every figure there as SVG and PDF")
    out.add_argument("--quiet", action="store_true", help="no progress bars, no message")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    if args.bootstrap == 0:
        raise ValueError("--bootstrap 0: a report without intervals is not offered; use analysis.fit")
    cli.check_out(args.out)
    table = load_table(args.store, required=("N", "D", "C", "loss"), **cli.table_options(args))
    if args.base and args.axis in table.rows and args.base not in set(table.rows[args.axis]):
        names = ", ".join(map(str, table.rows[args.axis].unique()))
        raise ValueError(f"--base {args.base!r} has no finished run in {args.store}; it has {names}")
    curves = load_curves(args.store) if Path(args.store).is_dir() else None
    options = Options(
        bootstrap=args.bootstrap, level=args.level, seed=args.seed, seed_noise=args.seed_noise, progress=not args.quiet
    )
    title = args.title or Path(args.store).resolve().stem
    context = build(table, curves=curves, base=args.base, axis=args.axis, options=options, title=title)
    context["command"] = args.command
    for key, meaning in (("N", N_MEANING), ("C", C_MEANING)):
        if key in table.counts:
            context[f"{key.lower()}_meaning"] = meaning[table.counts[key]]
    Path(args.out).write_text(render(context))
    if args.figures:
        from analysis import plots  # matplotlib is slow to import

        plots.save(context["figures"], args.figures)
    if not args.quiet:
        print(f"{args.out}: {len(table.rows)} runs used, {len(table.excluded)} excluded")
        for comparison in context["comparisons"]:
            print(f"  {comparison['verdict']}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
