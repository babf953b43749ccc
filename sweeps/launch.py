"""Run the cells of a sweep that are missing: `python -m sweeps.launch --config configs/sweeps/x.py --store runs/x`."""

import shlex
import sys
import time
from collections import Counter

from efficient_lm import config as configs
from efficient_lm.data.store import open_store
from pallas_kernels import commands
from sweeps import local, plan
from sweeps.store import Store
from sweeps.tables import duration, totals

LAUNCHERS = ("local", "slurm", "print")
ORDERS = ("dearest", "listed")
EXIT_FAILED, EXIT_DIVERGED, EXIT_STOPPED = 1, 3, 75


@commands.command
def main(argv=None) -> int:
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(rest)
    return _launch(args, overrides)


def _launch(args, overrides) -> int:
    store = Store(args.store)
    planned = plan.plan_from_arguments(args, overrides, store)
    plan.print_notes(planned, sys.stderr)
    cells = waiting_cells(planned.cells, store, again=args.resume, order=args.order)
    if args.launcher == "print":
        for cell in cells:
            print(command(cell, store))
        return 0
    workers = plan.default_workers(args.workers)
    print(totals(planned, workers, store))
    if args.launcher == "slurm":
        from sweeps import slurm

        with store.locked():
            save_plan(planned, store)
            return slurm.launch(cells, store, args)
    return run_local(planned, store, workers, again=args.resume, order=args.order)


def run_local(planned, store: Store, workers: int, *, again=False, order="dearest", progress=True, **options) -> int:
    """Trains what is missing on this machine, says how it went and returns the exit code of `launch`."""
    with store.locked():
        cells = waiting_cells(planned.cells, store, again=again, order=order)
        require_data(cells)
        save_plan(planned, store)
        started = time.monotonic()
        outcome = local.Launcher(store, workers, progress=progress, **options).run(cells) if cells else local.Outcome()
    print(summary(planned.cells, store, len(outcome.status), time.monotonic() - started))
    return exit_code(planned.cells, store, outcome.stopped)


def waiting_cells(cells, store: Store, *, again: bool, order: str = "dearest") -> list:
    """The cells to run: never started, preempted or left behind by a dead process; failed ones only if `again`.

    In the order (one of ORDERS) in which they start.
    """
    wanted = {"missing", "preempted", "stale"} | ({"failed"} if again else set())
    waiting = [cell for cell in cells if store.state(cell.run_id) in wanted]
    return longest_first(waiting) if order == "dearest" else waiting


def require_data(cells) -> None:
    """Raises ConfigError where prepared data are missing or damaged: every cell that reads them would fail."""
    for path in sorted({cell.config.data.path for cell in cells if cell.config.data.source == "prepared"}):
        open_store(path)


def longest_first(cells) -> list:
    """By predicted time, or by FLOPs where the time of some cell is unknown: leaves the least idle time at the end."""
    timed = all(cell.predicted_seconds is not None for cell in cells)
    return sorted(cells, key=lambda cell: cell.predicted_seconds if timed else cell.flops, reverse=True)


def save_plan(planned: plan.Plan, store: Store) -> None:
    store.write_sweep(planned.name, planned.config, [cell.as_json() for cell in planned.cells])


def summary(cells, store: Store, ran: int, seconds: float) -> str:
    """States of all cells in one line; one for each that failed or diverged; one where sources or tokens differ."""
    by_state = {}
    for cell in cells:
        by_state.setdefault(store.state(cell.run_id), []).append(cell)
    counts = ", ".join(f"{len(found)} {state}" for state, found in by_state.items())
    lines = [f"{len(cells)} cells: {counts} ({ran} run now, {duration(seconds)})"]
    for state in ("failed", "diverged"):
        for cell in by_state.get(state, []):
            lines.append(f"{state}: {cell.label} ({cell.run_id}): {store.run(cell.run_id).get('reason')}")
    if "failed" in by_state:
        lines.append("failed cells run again with --resume")
    if by_state.keys() & {"preempted", "missing", "stale"}:
        lines.append("the same command goes on with what is left")
    versions, texts = Counter(), {}
    for cell in by_state.get("done", []):
        run, data = store.run(cell.run_id), cell.config.data
        versions[run.get("code_hash")] += 1
        tokens = ((run.get("data") or {}).get("sha256") or {}).get("tokens.bin")
        if tokens:
            texts.setdefault(data.path or data.source, Counter())[tokens[:12]] += 1
    if len(versions) > 1 or any("+" in str(version) for version in versions):
        lines.append(f"note: cells were trained by different versions of the sources (code_hash): {_counts(versions)}")
    for name, found in texts.items():
        if len(found) > 1:
            lines.append(f"note: cells were trained on different tokens of {name!r} (tokens_hash): {_counts(found)}")
    return "\n".join(lines)


def _counts(found: Counter) -> str:
    return ", ".join(f"{count} by {name}" for name, count in found.most_common())


def exit_code(cells, store: Store, stopped: bool) -> int:
    states = {store.state(cell.run_id) for cell in cells}
    if stopped:
        return EXIT_STOPPED
    if "failed" in states:
        return EXIT_FAILED
    return EXIT_DIVERGED if "diverged" in states else 0


def command(cell, store: Store) -> str:
    """The shell command that trains one cell by itself."""
    words = [
        "python", "-m", "efficient_lm.train", "--config", cell.base, "--workdir", str(store.run_dir(cell.run_id)),
        f"--config.name={cell.config.name}",
    ]  # fmt: skip
    words += [f"--config.{key}={_literal(value)}" for key, value in cell.as_json()["overrides"].items()]
    return shlex.join(words)


def _literal(value) -> str:
    """Text that `config.parse_literal` reads back as the same value."""
    if isinstance(value, str):
        return value if configs.parse_literal(value) == value else repr(value)
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return repr(value)


def _parser() -> commands.Parser:
    parser = commands.Parser(
        prog="python -m sweeps.launch",
        description="Run the cells of a sweep. Finished and diverged cells are never run again; interrupted ones go "
        "on from their checkpoints.",
        epilog="Exit code: 0 all cells done, 1 some failed, 2 bad config, 3 some diverged, 75 stopped by a signal "
        "(launch again to go on). Config fields of every cell can be overridden: --config.train.seq_len=256",
    )
    plan.add_plan_arguments(parser)
    parser.add_argument("--store", required=True, help="run store, e.g. runs/NAME")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="print only shows the commands")
    parser.add_argument(
        "--order",
        choices=ORDERS,
        default="dearest",
        help="which cells start first: the dearest (default), which leaves the least idle time at the end, or as the "
        "sweep file lists them, for a sweep that may be cut short",
    )
    parser.add_argument("--resume", action="store_true", help="also run failed cells again")
    group = parser.add_argument_group("slurm")
    group.add_argument("--partition", help="SLURM partition")
    group.add_argument("--time", type=int, default=240, metavar="MINUTES", help="time limit of a job")
    group.add_argument("--gpus", type=int, default=0, help="GPUs of a job")
    group.add_argument("--cpus", type=int, default=1, help="cores of a job")
    group.add_argument("--mem", type=float, default=8, metavar="GB", help="memory of a job")
    group.add_argument("--wait", action="store_true", help="wait for the jobs and report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
