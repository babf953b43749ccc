"""From nothing to a report: a small IsoFLOP sweep of two architectures on CPU cores, its fits and plots.

    python -m sweeps.demo            (`make demo`)

Running it again repeats only the report; after an interruption it goes on where it was.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from efficient_lm import config as configs
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command
from sweeps import launch
from sweeps.plan import make_plan
from sweeps.store import Store
from sweeps.tables import duration, table, totals

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "sweeps" / "demo.py"
# One core each is what pays for models this small; more than a few workers would wait for the longest cell.
MOST_WORKERS = 8


@command
def main(argv=None) -> int:
    parser = Parser(
        prog="python -m sweeps.demo",
        description="Train a small IsoFLOP sweep of two architectures on CPU, fit scaling laws, write report.html.",
        epilog="Config fields of every cell can be overridden: --config.train.seq_len=64",
    )
    parser.add_argument("--store", default="runs/demo", help="run store (default runs/demo)")
    parser.add_argument("--config", default=os.path.relpath(CONFIG), help="sweep file")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per core, at most 8)")
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be at least 1")
    return _demo(args, overrides)


def _demo(args, overrides) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the workers: the sweep is sized for CPU cores
    workers = args.workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    store, spent = Store(args.store), {}

    started = time.monotonic()
    plan = make_plan(args.config, overrides)
    print(f"plan ({args.config}):\n{table(plan, store)}\n{totals(plan, workers, store)}\n")
    spent["plan"], started = time.monotonic() - started, time.monotonic()

    code = launch.run_local(plan, store, workers)
    if code == launch.EXIT_STOPPED:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return code
    spent["training"], started = time.monotonic() - started, time.monotonic()

    report = store.path / "report.html"
    command = [sys.executable, "-m", "analysis.report", "--store", str(store.path), "--out", str(report)]
    command += ["--base", plan.cells[0].arch]
    reported = subprocess.run(command).returncode
    spent["report"] = time.monotonic() - started

    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in spent.items())
    print(f"\ntime: {parts}, {duration(sum(spent.values()))} in all")
    if reported:
        print(f"error: no report (analysis.report exited with code {reported})", file=sys.stderr)
        return reported
    print(f"report: {report.resolve()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
