"""How the cells of a store are doing: `python -m sweeps.status --store runs/NAME [--watch]`."""

import sys
import time

from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command
from sweeps.store import STATES, Store
from sweeps.tables import align, duration

HEADER = ["cell", "state", "step", "loss", "tokens/s", "ETA", "run_id"]
# What is going on or went wrong first, what is finished last.
ORDER = ("running", "stale", "failed", "diverged", "preempted", "missing", "done")


def rows_of(store: Store) -> list[dict]:
    """One dict per planned cell (and per run that no plan lists): state, steps, loss, tokens/s, seconds left."""
    cells = list(store.sweep().get("cells", []))
    planned = {cell["run_id"] for cell in cells}
    if store.path.is_dir():
        for path in sorted(store.path.iterdir()):
            if (path / "run.json").exists() and path.name not in planned:
                cells.append({"run_id": path.name, "axes": store.run(path.name).get("sweep") or {}})
    return [_row(store, cell) for cell in cells]


def _row(store, cell):
    run_id = cell["run_id"]
    run, last = store.run(run_id), store.last_metrics(run_id)
    state = store.state(run_id)
    steps = run.get("steps_total") or cell.get("steps")
    step = steps if state == "done" else max(last.get("step") or 0, run.get("steps_done") or 0)
    rate = last.get("tokens_per_s")
    tokens_per_step = cell["tokens"] / cell["steps"] if cell.get("steps") else None
    left = None
    if state == "running" and rate and steps and tokens_per_step:
        left = (steps - step) * tokens_per_step / rate
    loss = run.get("final_loss") if state == "done" else last.get("loss")
    label = " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.get("axes", {}).items())
    return {
        "run_id": run_id, "label": label or run.get("name") or run_id, "state": state, "step": step, "steps": steps,
        "loss": loss, "rate": rate, "left": left, "reason": run.get("reason"), "flops": cell.get("flops") or 0.0,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """A line a cell, and the reason under each that failed or diverged."""
    rows = sorted(rows, key=lambda row: ORDER.index(row["state"]))
    lines = [
        [
            row["label"],
            row["state"],
            f"{row['step']:,}/{row['steps']:,}" if row["steps"] else "-",
            f"{row['loss']:.4f}" if row["loss"] is not None else "-",
            f"{row['rate']:,.0f}" if row["rate"] else "-",
            duration(row["left"]) if row["left"] is not None else "-",
            row["run_id"],
        ]
        for row in rows
    ]
    text = [align(HEADER, lines)]
    text += [f"{r['state']}: {r['label']}: {r['reason']}" for r in rows if r["state"] in ("failed", "diverged")]
    return "\n".join(text)


def summary(rows: list[dict]) -> str:
    """One line: cells by state, and the share of the FLOPs that is done."""
    counts = {state: sum(row["state"] == state for row in rows) for state in STATES}
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    total = sum(row["flops"] for row in rows)
    if total:
        done = sum(row["flops"] * row["step"] / row["steps"] for row in rows if row["steps"])
        parts.append(f"{100 * done / total:.0f} % of {total:.3g} FLOPs")
    return f"{len(rows)} cells: " + ", ".join(parts)


@command
def main(argv=None) -> int:
    parser = Parser(prog="python -m sweeps.status", description="States of the cells of a run store.")
    parser.add_argument("--store", required=True, help="run store, e.g. runs/NAME")
    parser.add_argument("--watch", action="store_true", help="refresh until no cell is running")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between refreshes")
    args = parser.parse_args(argv)
    store = Store(args.store)
    if not store.path.is_dir():
        raise ConfigError(f"store = {args.store!r}: no such directory")
    while True:
        rows = rows_of(store)
        if not rows:
            raise ConfigError(f"store = {args.store!r}: holds neither sweep.json nor runs")
        text = table(rows) + "\n" + summary(rows)
        print("\x1b[2J\x1b[H" + text if args.watch and sys.stdout.isatty() else text, flush=True)
        if not args.watch or not any(row["state"] == "running" for row in rows):
            return 0
        time.sleep(args.interval)


if __name__ == "__main__":
    sys.exit(main())
