"""python -m efficient_lm.mixers: every registered mixer, measured on a real instance with default settings."""

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax

from efficient_lm.config import from_dict
from efficient_lm.layers import Maker
from efficient_lm.mixers import MIXERS, model_of
from efficient_lm.model import Part
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command

COLUMNS = ("mixer", "parameters", "/ d^2", "state bytes", "MFLOPs/token", "executed")


@command
def main(argv=None) -> int:
    parser = Parser(
        prog="python -m efficient_lm.mixers",
        description="Parameters of one layer, decoding state per sequence after T tokens, forward FLOPs per token at "
        "training length T (model FLOPs, and matrix products that the XLA implementation executes).",
    )
    parser.add_argument("--d-model", type=int, default=1024, help="width of the residual stream (default 1024)")
    parser.add_argument("--seq-len", type=int, default=2048, help="T (default 2048)")
    parser.add_argument(
        "--runs",
        help="run store of configs/sweeps/mixers.py, or its run.json rows in a file: adds losses at equal FLOPs",
    )
    parser.add_argument(
        "--conformance", help="adds the outcome of `pytest tests/conformance/test_mixers.py --junitxml FILE`"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    columns, rows = table(args.d_model, args.seq_len)
    notes = [f"One layer, d_model {args.d_model}, T {args.seq_len}, default settings."]
    if args.conformance:
        add_column(columns, rows, "conformance", conformance(args.conformance))
    if args.runs:
        losses, note = matched_losses(args.runs)
        add_column(columns, rows, "loss", losses)
        notes.append(note)
    operators = [MIXERS[row[0]].kernel for row in rows]
    print("\n".join(notes), end="\n\n" if args.markdown else "\n")
    print("\n".join((as_markdown if args.markdown else as_text)(columns, rows, operators)))
    return 0


def as_text(columns, rows, operators):
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for (name, *numbers), operator in zip([columns, *rows], ["operator", *operators], strict=True):
        cells = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *cells, operator])


def as_markdown(columns, rows, operators):
    yield "| " + " | ".join([*columns, "operator"]) + " |"
    yield "|" + "---|" + "---:|" * (len(columns) - 1) + "---|"
    for row, operator in zip(rows, operators, strict=True):
        yield "| " + " | ".join([*row, operator]) + " |"


def add_column(columns, rows, name, values):
    columns.append(name)
    for row in rows:
        row.append(values.get(row[0], "-"))


def table(d_model: int, seq_len: int) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of text by name of the mixer). Raises ConfigError."""
    rows = []
    for kind in sorted(MIXERS):
        config = from_dict({"model": model_of(kind, {}, d_model), "train": {"seq_len": seq_len}})
        model, cls = config.model, MIXERS[kind]
        cfg = model.mixers[kind]
        params, state_bytes = measure(cls, cfg, model, seq_len)
        flops = cls.flops_per_token(cfg, model, seq_len)
        numbers = f"{params:,}", f"{params / d_model**2:.2f}", f"{state_bytes:,}"
        rows.append([kind, *numbers, f"{flops.causal / 1e6:.4g}", f"{flops.hardware / 1e6:.4g}"])
    return list(COLUMNS), rows


def measure(cls, cfg, model, seq_len: int) -> tuple[int, int]:
    """(parameters of one layer, bytes of decoding state of one sequence) of an instance, without allocating it."""
    part = Part(lambda key, layer=0: cls(cfg, model, Maker(key, model, layer)), 0)
    params = jax.eval_shape(lambda: part.init(jax.random.key(0), 0))
    state = jax.eval_shape(lambda p: part.bind(p).init_state(1, seq_len), params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return size, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def conformance(path: str) -> dict[str, str]:
    """{mixer: 'passed/ran'} from a JUnit file; a variant's tests count for its mixer. Raises ConfigError."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise ConfigError(f"--conformance {path}: not a JUnit file ({error})") from None
    counts = {}
    for case in cases:
        _, _, label = case.get("name").rstrip("]").partition("[")
        mixer = label.partition("-")[0]
        if mixer in MIXERS and case.find("skipped") is None:
            passed, ran = counts.get(mixer, (0, 0))
            failed = case.find("failure") is not None or case.find("error") is not None
            counts[mixer] = passed + (not failed), ran + 1
    return {mixer: f"{passed}/{ran}" for mixer, (passed, ran) in counts.items()}


def matched_losses(store: str) -> tuple[dict[str, str], str]:
    """({mixer: loss at its best learning rate, with the range over seeds}, a note on the runs). Raises ConfigError."""
    path = Path(store)
    rows = path.read_text().splitlines() if path.is_file() else [p.read_text() for p in sorted(path.glob("*/run.json"))]
    infos = [json.loads(row) for row in rows]
    infos = [info for info in infos if "mixer" in info["sweep"] and info["status"] in ("done", "diverged")]
    if not infos:
        raise ConfigError(f"--runs {store}: has no finished runs of configs/sweeps/mixers.py")
    losses, flops = {}, [info["flops"]["model_causal"] for info in infos if info["status"] == "done"]
    for info in infos:
        by_rate = losses.setdefault(info["sweep"]["mixer"], {})
        by_rate.setdefault(info["sweep"]["lr"], []).append(info["final_loss"])
    shown = {}
    for mixer, by_rate in losses.items():
        finished = {rate: values for rate, values in by_rate.items() if None not in values}
        if not finished:
            shown[mixer] = "diverged"
            continue
        rate, values = min(finished.items(), key=lambda item: statistics.mean(item[1]))
        spread = f" +-{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        shown[mixer] = f"{statistics.mean(values):.3f}{spread} (lr {rate:g})"
    note = (
        f"Loss: validation loss, nats per token, of {len(infos)} runs of {min(flops):.3g} to {max(flops):.3g} training "
        "FLOPs; the best of the learning rates tried, +- half the range over seeds where there are several."
    )
    return shown, note


if __name__ == "__main__":
    sys.exit(main())
