"""Markdown tables from the rows of `bench_gpu`, beside recorded timings of public kernels.

  python -m pallas_kernels.gpu.bench_table                      # prints the full table and the short one
  python -m pallas_kernels.gpu.bench_table --write docs/kernels_gpu.md README.md

`--write` puts the tables between the lines <!-- kernels: full --> (or short) and <!-- kernels: end --> of the files. A
row of a later `--rows` file takes the place of an earlier one. A cell holds forward / forward + backward.
"""

import argparse
import json
import re
import sys

from pallas_kernels.gpu.bench_cases import FAMILIES

ROWS = ("analysis/results/kernels/h200.json", "analysis/results/kernels/h200_delta_rule.json")
PEERS = ("analysis/results/kernels/h100_peers.json",)
PEER_NAMES = {
    "gdn_flashqla": "FlashQLA",
    "kda_cudnn": "cuDNN",
    "mlstm_exp_tfla": "TFLA",
    "ssd_mamba": "mamba_ssm",
    "softmax_cudnn": "cuDNN from torch",
    "softmax_flash": "FlashAttention-2",
}  # the others are fla's
MODES = ("fwd", "fwdbwd")


def read(paths):
    """(documents, {(family, implementation, shape): {mode: row}}, {family: errors}) of the benchmark's files."""
    rows, errors, docs = {}, {}, []
    for path in paths:
        with open(path) as f:
            docs.append(json.load(f))
        for row in docs[-1]["rows"]:
            if "errors" in row:
                errors[row["family"]] = row["errors"]
            elif "failed" not in row:
                row["device"] = docs[-1]["device"]
                rows.setdefault((row["family"], row["implementation"], tuple(row["shape"])), {})[row["mode"]] = row
    return docs, rows, errors


def read_peers(paths):
    """{(peer, shape): {mode: row}}; kernel_ms is CUDA-graph time, or with the L2 cache flushed where there is none."""
    peers = {}
    for path in paths:
        with open(path) as f:
            doc = json.load(f)
            for row in doc["rows"]:
                if "ms" in row:
                    mode = peers.setdefault((row["op"], tuple(row["shape"])), {})
                    mode[row["mode"]] = {"device": doc["device"], "kernel_ms": row.get("graph_ms", row["ms"])}
    return peers


def _pair(modes, key, digits, unit=1):
    return " / ".join(f"{unit * modes[m][key]:.{digits}f}" for m in MODES if key in modes.get(m, ()))


def _against(own, peers, names, shape):
    """'fla 0.518 / 2.009: 2.2x / 2.3x' for each peer timed at the shape: how many times its time is ours.

    No such ratio where the peer ran on another GPU model, which is named instead.
    """
    cells = []
    for name in names:
        if theirs := peers.get((name, shape)):
            both = [m for m in MODES if m in theirs and m in own]
            cell = f"{PEER_NAMES.get(name, 'fla ' + name)} {_pair(theirs, 'kernel_ms', 3)}"
            if all(theirs[m]["device"] == own[m]["device"] for m in both):
                cell += ": " + " / ".join(f"{theirs[m]['kernel_ms'] / own[m]['kernel_ms']:.1f}x" for m in both)
            else:
                cell += f" ({theirs[both[0]]['device'].split()[1]})"
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
                cells = [name, ", ".join(map(str, shape)), *cells, xla, _against(own, peers, family.peers, shape)]
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
                ", ".join(map(str, shape)),
                _pair(own, "kernel_ms", 3),
                _pair(own, "of_floor", 0, 100),
                _against(own, peers, family.peers, shape),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text, tables):
    """`text` with each table in the place marked for it."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- kernels: {name} -->\n).*?(<!-- kernels: end -->)", re.S)
        text = place.sub(lambda found: found[1] + table + "\n" + found[2], text)  # noqa: B023
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="pallas_kernels.gpu.bench_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="JSON", help="files of bench_gpu")
    parser.add_argument(
        "--peers", nargs="+", default=PEERS, metavar="JSON", help="timings of public kernels, as --rows"
    )
    parser.add_argument("--write", nargs="+", metavar="FILE", help="put the tables into these Markdown files")
    args = parser.parse_args(argv)
    try:
        docs, rows, errors = read(args.rows)
        peers = read_peers(args.peers)
    except FileNotFoundError as error:
        parser.error(f"{error.filename}: no such file")
    limits = "; ".join(
        f"{doc['device']}: matmul {doc['matmul_tflops']:.0f} TFLOP/s, copy {doc['copy_gbs']:.0f} GB/s" for doc in docs
    )
    worst = "; ".join(
        f"{name}: " + ", ".join(f"{a} {e:.4f}" for a, e in found.items()) for name, found in errors.items()
    )
    notes = f"{limits}." + (f"\n\nRelative errors against the float64 recurrence. {worst}." if worst else "")
    tables = {"full": full(rows, peers) + f"\n\n{notes}", "short": short(rows, peers)}
    if not args.write:
        print("\n\n".join(tables.values()))
    for path in args.write or ():
        with open(path) as f:
            text = f.read()
        with open(path, "w") as f:
            f.write(insert(text, tables))


if __name__ == "__main__":
    sys.exit(main())
