"""Plans and times as text for a terminal."""


def table(plan, store=None) -> str:
    """The cells of a plan, one a line, with their states in `store`. "active": parameters that one token uses."""
    header = ["cell", "active", "tokens", "FLOPs", "tok/active", "lr", "batch", "steps", "seconds", "run_id", "state"]
    rows = []
    for cell in plan.cells:
        seconds = "-" if cell.predicted_seconds is None else f"{cell.predicted_seconds:.1f}"
        active = cell.params["active"]
        state = store.state(cell.run_id) if store else "-"
        rows.append([
            cell.label, f"{active:,}", f"{cell.tokens:,}", f"{cell.flops:.4g}", f"{cell.tokens / active:.1f}",
            f"{cell.config.optim.lr:.3g}", f"{cell.batch_tokens:,}", f"{cell.steps:,}", seconds, cell.run_id, state,
        ])  # fmt: skip
    return align(header, rows)


def align(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def totals(plan, workers: int, store=None) -> str:
    """One line: cells, FLOPs, tokens, predicted time, how many are done already."""
    parts = [
        f"{len(plan.cells)} cells",
        f"{sum(c.flops for c in plan.cells):.3g} FLOPs",
        f"{sum(c.tokens for c in plan.cells):,} tokens",
    ]
    seconds = plan.total_seconds()
    if seconds is None:
        parts.append("time unknown (--calibrate or --tokens-per-second)")
    else:
        where = f" (steps measured on {', '.join(plan.measured_on)})" if plan.measured_on else ""
        wall = duration(wall_seconds(plan.cells, workers))
        parts.append(f"{duration(seconds)} of device time{where}")
        parts.append(f"about {wall} on {workers} worker{'s' if workers != 1 else ''}")
    if store:
        parts.append(f"{sum(store.state(c.run_id) == 'done' for c in plan.cells)} done in {store.path}")
    return ", ".join(parts)


def wall_seconds(cells, workers: int) -> float:
    """Time on `workers` workers that take the longest remaining cell first."""
    free = [0.0] * max(1, workers)
    for seconds in sorted((c.predicted_seconds or 0.0 for c in cells), reverse=True):
        earliest = free.index(min(free))
        free[earliest] += seconds
    return max(free)


def duration(seconds: float) -> str:
    """'45 s', '12.3 min', '5.1 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
