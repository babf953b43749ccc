"""Command line: python -m efficient_lm.evals --run runs/x --tasks mqar,needle:needles=4 --lengths 128,512"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from efficient_lm import metrics
from efficient_lm.cli import field_lines
from efficient_lm.data.batches import load_sources
from efficient_lm.data.tasks import TASKS
from efficient_lm.evals.evaluate import TaskSpec, evaluate_run
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command

COLUMNS = ("task", "length", "accuracy", "+-", "rows right", "chance", "loss")


@command
def main(argv=None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(argv)
    specs = [TaskSpec.parse(text) for text in _split(args.tasks)]
    lengths = [_whole(text, "--lengths") for text in _split(args.lengths)]
    options = {
        "lengths": lengths,
        "rows": _whole(args.rows, "--rows"),
        "vocab_size": _whole(args.vocab_size, "--vocab-size", low=0),
        "step": _whole(args.step, "--step", low=0),
        "validation": not args.no_validation,
    }
    for run in _runs(args):
        result = evaluate_run(run, specs, **options, each=lambda work: tqdm(work, disable=None, leave=False))
        metrics.write_json(Path(run) / "evals.json", result)
        print(table(run, result), flush=True)
    return 0


def table(run, result: dict) -> str:
    """The result of one run as text."""
    lines = [f"{run} at step {result['step']}"]
    if "validation" in result:
        v = result["validation"]
        lines.append(
            f"validation: loss {v['loss']:.4f} nats per token, perplexity {v['perplexity']:.4g}, {v['bpb']:.4f} bits "
            f"per byte, accuracy {v['accuracy']:.4f} +- {v['stderr']:.4f}"
        )
    rows = [
        (
            ":".join([t["task"], *(f"{k}={v}" for k, v in t["options"].items())]), str(t["length"]),
            *(f"{t[key]:.4f}" for key in ("accuracy", "stderr", "exact", "chance_accuracy", "loss")),
        )
        for t in result["tasks"]
    ]  # fmt: skip
    if rows:
        widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
        lines += [
            "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))])
            for row in [COLUMNS, *rows]
        ]
    return "\n".join(lines)


def _runs(args) -> list[str]:
    """The run directories asked for: one, or all finished ones of a store."""
    if args.run:
        return args.run
    if not Path(args.store).is_dir():
        raise ConfigError(f"--store {args.store}: no such directory")
    infos = {path.parent: metrics.read_json(path) or {} for path in sorted(Path(args.store).glob("*/run.json"))}
    done = [str(path) for path, info in infos.items() if info.get("status") == "done"]
    if not done:
        raise ConfigError(f"--store {args.store}: has no finished run")
    return done


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text, name: str, low: int = 1) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise ConfigError(f"{name} {text}: must be a whole number, at least {low}")
    return value


def _parser():
    load_sources()
    lines = []
    for name in sorted(TASKS):
        about = sys.modules[TASKS[name].__module__].__doc__.partition(": ")[2].partition("\n\n")[0]
        lines += [f"\n{name}: {' '.join(about.split())}", *field_lines(TASKS[name])]
    parser = Parser(
        prog="python -m efficient_lm.evals",
        description="Evaluate a run on its own validation data and on synthetic tasks; writes evals.json into the run "
        "directory and prints a table. Tasks have the options of the run, if it was trained on that task.",
        epilog="exit codes: 0 done, 2 bad arguments\n\ntasks and their options:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", nargs="+", metavar="DIR", help="run directories of efficient_lm.train")
    what.add_argument("--store", metavar="DIR", help="run store: every finished run in it")
    parser.add_argument("--tasks", default="", metavar="TASK,...", help="for example mqar:pairs=16,needle")
    parser.add_argument("--lengths", default="", metavar="N,...", help="tokens per row (default: as in training)")
    parser.add_argument("--rows", default=1024, metavar="N", help="rows per task and length (default 1024)")
    parser.add_argument("--vocab-size", default=0, metavar="N", help="vocabulary of the tasks (default: of the run)")
    parser.add_argument("--step", default=0, metavar="N", help="checkpoint to use (default: the last)")
    parser.add_argument("--no-validation", action="store_true", help="leave out the run's own validation data")
    return parser


if __name__ == "__main__":
    sys.exit(main())
