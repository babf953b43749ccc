"""Markdown tables from the rows of `bench_gpu`, beside timings of public kernels.

  python -m pallas_kernels.gpu.bench_table                      # prints the full table and the short one
  python -m pallas_kernels.gpu.bench_table --write docs/kernels_gpu.md README.md

`--write` puts the tables between the lines <!-- kernels: full --> (or short) and <!-- kernels: end --> of the files. A
row of a later `--rows` or `--peers` file takes the place of an earlier one. A cell holds forward / forward + backward.
Rows of a file with a "note" (on what sets its timings apart) carry a star; the note stands below the table.

A file of `--peers` is {"device", "date", "rows": [{"family", "name", "shape", "mode", "kernel_ms", "ms"}]}: `family` as
in `bench_cases`, `name` to print, `mode` fwd or fwdbwd, `kernel_ms` without launches (a CUDA graph) and `ms` with the
L2 cache flushed, at least one of them; ours are set against the same one. Rows with a "failed" are left out.
"""

import argparse
import json
import re
import sys

from pallas_kernels.commands import BadInput, Parser, command
from pallas_kernels.gpu.bench_cases import FAMILIES

ROWS = ("analysis/results/kernels/h100.json",)
PEERS = ("analysis/results/kernels/h100_peers_recorded.json", "analysis/results/kernels/h100_peers.json")
MODES = ("fwd", "fwdbwd")


def document(path):
    """The JSON object of a file, which has rows. Raises BadInput."""
    with open(path) as f:
        try:
            doc = json.load(f)
        except ValueError as error:
            raise BadInput(f"{path}: not JSON ({error})") from None
    if "rows" not in doc:
        raise BadInput(f"{path}: has no 'rows'")
    return doc


def read(paths):
    """(documents, {(family, implementation, shape): {mode: row}}, {family: errors}) of the benchmark's files."""
    rows, errors, docs, notes = {}, {}, [], 0
    for path in paths:
        docs.append(document(path))
        notes += "note" in docs[-1]
        docs[-1]["star"] = "*" * notes if "note" in docs[-1] else ""
        for row in docs[-1]["rows"]:
            if "errors" in row:
                errors[row["family"]] = row["errors"]
            elif "failed" not in row:
                row |= {key: docs[-1].get(key) for key in ("device", "date", "star")}
                rows.setdefault((row["family"], row["implementation"], tuple(row["shape"])), {})[row["mode"]] = row
    return docs, rows, errors


def read_peers(paths):
    """{(family, shape): {name: {mode: row}}} of the files' rows; BadInput where a row cannot be placed."""
    peers = {}
    for path in paths:
        doc = document(path)
        for i, row in enumerate(doc["rows"]):
            if "failed" in row:
                continue
            if missing := [key for key in ("family", "name", "shape", "mode") if key not in row]:
                raise BadInput(f"{path}: row {i} lacks {missing[0]}")
            if row["family"] not in FAMILIES:
                raise BadInput(f"{path}: row {i} has family {row['family']}: allowed are {', '.join(FAMILIES)}")
            if row["mode"] not in MODES or not {"kernel_ms", "ms"} & set(row):
                raise BadInput(f"{path}: row {i} needs mode {' or '.join(MODES)}, and kernel_ms or ms")
            named = peers.setdefault((row["family"], tuple(row["shape"])), {})
            named.setdefault(row["name"], {})[row["mode"]] = row | {"device": doc["device"], "date": doc.get("date")}
    return peers


def _pair(modes, key, digits, unit=1):
    return " / ".join(f"{unit * modes[m][key]:.{digits}f}" for m in MODES if key in modes.get(m, ()))


def _shape(own, shape):
    return f"{', '.join(map(str, shape))} {own['fwd']['star']}".strip()


def _against(own, peers):
    """'fla 0.518 / 2.009: 2.2x / 2.3x' for each of {name: {mode: row}}: how many times its time is ours.

    'recorded' stands where it ran on the same GPU model on another day than ours; where it ran on another model, that
    model instead of the ratio.
    """
    cells = []
    for name, theirs in peers.items():
        key = "kernel_ms" if all("kernel_ms" in row for row in theirs.values()) else "ms"
        both = [m for m in MODES if m in theirs and key in own.get(m, ())]
        cell = f"{name} {_pair(theirs, key, 3)}" + (" flushed" if key == "ms" else "")
        if other := [row["device"] for m, row in theirs.items() if m in own and row["device"] != own[m]["device"]]:
            cell += f" ({other[0].split()[1]})"
        elif both:
            if any(theirs[m]["date"] is None or theirs[m]["date"] != own[m]["date"] for m in both):
                cell += ", recorded"
            cell += ": " + " / ".join(f"{theirs[m][key] / own[m][key]:.1f}x" for m in both)
        cells.append(cell)
    return "; ".join(cells)


def full(rows, peers):
    head = [
        "family",
        "shape",
        "kernel ms",
        "flushed ms",
        "TFLOP/s",
        "GB/s",
        "% of floor",
        "first step, s",
        "XLA, ms",
        "public kernels, ms: times ours",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, family in FAMILIES.items():
        for shape in family.shapes:
            if own := rows.get((name, family.implementation, shape)):
                cells = [
                    _pair(own, *column)
                    for column in (
                        ("kernel_ms", 3),
                        ("ms", 3),
                        ("tflops", 0),
                        ("gbs", 0),
                        ("of_floor", 0, 100),
                        ("first_step_s", 0),
                    )
                ]
                xla = _pair(rows.get((name, "xla", shape), {}), "kernel_ms", 2)
                cells = [name, _shape(own, shape), *cells, xla, _against(own, peers.get((name, shape), {}))]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(rows, peers):
    """A line per family at its first shape, for the README."""
    lines = [
        "| family | shape | forward / forward + backward, ms | % of floor | public kernels, ms: times ours |",
        "|---" * 5 + "|",
    ]
    for name, family in FAMILIES.items():
        shape = family.shapes[0]
        if own := rows.get((name, family.implementation, shape)):
            cells = [
                name,
                _shape(own, shape),
                _pair(own, "kernel_ms", 3),
                _pair(own, "of_floor", 0, 100),
                _against(own, peers.get((name, shape), {})),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text, tables):
    """`text` with each table in the place marked for it."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- kernels: {name} -->\n).*?(<!-- kernels: end -->)", re.S)
        text = place.sub(lambda found: found[1] + table + "\n" + found[2], text)  # noqa: B023
    return text


@command
def main(argv=None):
    parser = Parser(
        prog="python -m pallas_kernels.gpu.bench_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="JSON", help="files of bench_gpu")
    parser.add_argument("--peers", nargs="+", default=PEERS, metavar="JSON", help="timings of public kernels")
    parser.add_argument("--write", nargs="+", metavar="FILE", help="put the tables into these Markdown files")
    args = parser.parse_args(argv)
    docs, rows, errors = read(args.rows)
    peers = read_peers(args.peers)
    limits = "; ".join(
        f"{doc['device']}: matmul {doc['matmul_tflops']:.0f} TFLOP/s, copy {doc['copy_gbs']:.0f} GB/s" for doc in docs
    )
    worst = "; ".join(
        f"{name}: " + ", ".join(f"{a} {e:.4f}" for a, e in found.items()) for name, found in errors.items()
    )
    notes = [f"\\{doc['star']} {doc['note']}." for doc in docs if doc["star"]]
    errors = [f"Relative errors against the float64 recurrence. {worst}."] if worst else []
    tables = {
        "full": "\n\n".join([full(rows, peers), *notes, f"{limits}.", *errors]),
        "short": "\n\n".join([short(rows, peers), *notes]),
    }
    if not args.write:
        print("\n\n".join(tables.values()))
    for path in args.write or ():
        with open(path) as f:
            text = f.read()
        with open(path, "w") as f:
            f.write(insert(text, tables))


if __name__ == "__main__":
    sys.exit(main())
