"""Compute-equivalent gain of one architecture over another.

    python -m analysis.compare --store runs/NAME --base attention --variant gla

gain(C) = (compute that the base needs for the variant's loss at C) / C; above 1 the variant is the more efficient. It
is what arXiv:2507.17702 calls efficiency leverage. The same ratio is given at every budget for training tokens, wall
time and forward FLOPs per token (the cost of use), each architecture at its compute-optimal size. Wall times mean
something only if all runs had the same hardware to themselves.
"""

import argparse
import sys

from analysis import cli
from analysis.frontier import TITLES, Frontier, compare, frontier_points, resolved
from analysis.load import DataError, Table, check_comparable, load_table
from analysis.result import Options
from analysis.tables import number, with_interval
from pallas_kernels.commands import Parser


def compare_architectures(table: Table, base: str, variants: list[str], axis="arch", options=None):
    """Frontiers and comparisons from one table of runs: `({name: Frontier}, [comparison])`.

    Raises DataError for an unknown architecture, or ValueError where an architecture has no frontier.
    """
    options = options or Options()
    check_comparable(table)
    if axis not in table.rows:
        raise DataError(f"column {axis!r} (--axis) is missing in {table.source}")
    groups = table.groups(axis)
    frontiers: dict[str, Frontier] = {}
    for name in [base, *variants]:
        if name not in groups or groups[name].rows.empty:
            names = ", ".join(key for key, part in groups.items() if len(part.rows))
            raise DataError(f"{axis} {name!r} has no finished run in {table.source}; it has {names}")
        frontiers[name] = frontier_points(groups[name].rows, name, options)
    return frontiers, [compare(frontiers[base], frontiers[name], options.level) for name in variants]


def text_table(comparison: dict) -> str:
    base, variant, judged = comparison["base"], comparison["variant"], comparison.get("judged", {})
    costs = {"gain" if name == "compute" else name: title for name, title in TITLES.items()}
    costs = {name: title for name, title in costs.items() if name in judged}
    lines = [f"what {base} spends for the loss of {variant}, over what {variant} spends", ""]
    names = " ".join(f"{name if len(name) <= 22 else '..' + name[-20:]:>22}" for name in (base, variant))
    lines.append(f"{'C':>10} {names} " + " ".join(f"{t:>24}" for t in costs.values()))
    for point in comparison["points"]:
        note = f"  beyond the losses of {base}" if point["extrapolated"] else ""
        losses = " ".join(f"{with_interval(point[key], 4):>22}" for key in ("base_loss", "variant_loss"))
        values = " ".join(f"{with_interval(point[name]):>24}" for name in costs)
        lines.append(f"{number(point['C']):>10} {losses} {values}{note}")
    if judged:
        lines += ["", f"judged at C = {judged['C']:.3g}, within the losses of both:"]
    for name, title in costs.items():
        entry = judged[name]
        lines.append(f"  {title}: {with_interval(entry)}{'' if resolved(entry) else ', not resolved'}")
    if comparison.get("constant_gain"):
        lines.append(f"one gain at all compute (shared exponent): {with_interval(comparison['constant_gain'])}")
    crossing = comparison.get("crossover")
    if crossing:
        found = f"at C = {with_interval(crossing)}" if crossing["resolved"] else "not resolved"
        lines.append(f"crossover: {found}")
    lines += [f"note: {text}" for text in comparison["notes"]]
    return "\n".join([*lines, f"verdict: {comparison['verdict']}"])


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.compare",
        description="Compute-equivalent gain of architectures over a base, from IsoFLOP runs, with bootstrap bands.",
    )
    out.add_argument("--store", required=True, metavar="PATH", help="run store runs/NAME, or a CSV with N, C, loss")
    out.add_argument("--base", required=True, help="architecture to compare with")
    out.add_argument("--variant", required=True, nargs="+", help="architecture(s) to judge")
    out.add_argument("--axis", default="arch", help="column that names the architecture (default arch)")
    out.add_argument("--out", metavar="COMPARE.JSON", help="write the numbers as JSON")
    out.add_argument("--plot", metavar="GAIN.SVG", help="draw the ratios over compute (svg, pdf or png)")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, bootstrap=2000)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    cli.check_out(args.plot, "--plot")
    if args.bootstrap == 0:
        raise ValueError("--bootstrap 0: a comparison needs draws to say whether it is resolved")
    required = ("N", "C", "loss")
    table = load_table(args.store, required=required, **cli.table_options(args))
    options = cli.fit_options(args)
    frontiers, comparisons = compare_architectures(table, args.base, args.variant, args.axis, options)
    print(table.summary())
    print("\n\n".join(text_table(comparison) for comparison in comparisons))
    known = f"{table.conventions()}; " if table.counts else ""
    print(f"{known}loss: nats per token; intervals: {args.level:.0%}, from {args.bootstrap} bootstrap draws")
    cli.write_json(args.out, comparisons)
    if args.plot:
        from analysis import plots  # matplotlib is slow to import

        plots.gain(frontiers, args.base, args.level).savefig(args.plot, dpi=150)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
