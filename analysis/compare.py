"""Compute-equivalent gain of one architecture over another.

    python -m analysis.compare --store runs/NAME --base attention --variant gla

gain(C) = (compute that the base needs for the variant's loss at C) / C; above 1 the variant is the more efficient. It
is what arXiv:2507.17702 calls efficiency leverage. The same ratio is given for training tokens, for wall time and for
forward FLOPs per token (the cost of use), each architecture at its compute-optimal size. Wall times mean something only
if all runs had the same hardware to themselves.
"""

import argparse
import json
import sys

from analysis import cli
from analysis.frontier import COSTS, Frontier, compare, frontier_points
from analysis.load import DataError, Table, check_comparable, load_table
from analysis.result import Options, plain
from analysis.tables import number, with_interval


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
    lines = [f"{'C':>10} {comparison['base'][:14]:>24} {comparison['variant'][:14]:>24} {'gain':>24}"]
    for point in comparison["points"]:
        note = "  extrapolated" if point["extrapolated"] else ""
        losses = [with_interval(point[key], 4) for key in ("base_loss", "variant_loss")]
        lines.append(
            f"{number(point['C']):>10} {losses[0]:>24} {losses[1]:>24} {with_interval(point['gain']):>24}{note}"
        )
    if comparison.get("constant_gain"):
        lines.append(f"one gain at all compute (shared exponent): {with_interval(comparison['constant_gain'])}")
    judged = comparison.get("judged", {})
    for name, (title, _) in COSTS.items():
        if name in judged:
            entry = judged[name]
            open_ = "" if entry["lo"] > 1 or entry["hi"] < 1 else ": not resolved"
            lines.append(f"{title} at the same loss, base over variant: {with_interval(entry)}{open_}")
    lines += [f"note: {text}" for text in comparison["notes"]]
    return "\n".join([*lines, f"verdict: {comparison['verdict']}"])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m analysis.compare",
        description="Compute-equivalent gain of architectures over a base, from IsoFLOP runs, with bootstrap bands.",
    )
    out.add_argument("--store", required=True, metavar="PATH", help="run store runs/NAME, or a CSV with N, C, loss")
    out.add_argument("--base", required=True, help="architecture to compare with")
    out.add_argument("--variant", required=True, nargs="+", help="architecture(s) to judge")
    out.add_argument("--axis", default="arch", help="column that names the architecture (default arch)")
    out.add_argument("--out", metavar="COMPARE.JSON", help="write the numbers as JSON")
    out.add_argument("--plot", metavar="GAIN.PNG", help="draw the gain over compute (png, svg or pdf)")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, bootstrap=2000)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    if args.bootstrap == 0:
        raise ValueError("--bootstrap 0: a comparison needs draws to say whether it is resolved")
    required = ("N", "C", "loss")
    table = load_table(args.store, required=required, **cli.table_options(args))
    options = Options(bootstrap=args.bootstrap, level=args.level, seed=args.seed, seed_noise=args.seed_noise)
    frontiers, comparisons = compare_architectures(table, args.base, args.variant, args.axis, options)
    print("\n\n".join(text_table(comparison) for comparison in comparisons))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(plain(comparisons), file, indent=1)
    if args.plot:
        from analysis import plots  # matplotlib is slow to import

        plots.gain(frontiers, args.base, args.level).savefig(args.plot, dpi=150)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
