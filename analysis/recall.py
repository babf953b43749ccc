"""Accuracy on synthetic tasks against state and against length, with seeds and intervals: one HTML file, or SVGs.

    python -m analysis.recall --store runs/recall --out recall.html
    python -m analysis.recall --store analysis/results/recall/*.jsonl --out recall.html

A store is a directory of runs that were trained on tasks (`configs/sweeps/recall.py`, `state_tracking.py`); what
`efficient_lm.evals` wrote into the runs is read too. `--save` keeps what was read as rows of JSON, which can be given
instead of a store. Where several learning rates were tried, what is shown is the best one of each task, architecture
and state (`best_rates`). An interval is the t interval of the mean over seeds, cut to [0, 1].
"""

import argparse
import base64
import io
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis import cli
from analysis.load import DataError, read_lines, read_record
from pallas_kernels.commands import Parser

COLUMNS = (
    "run_id", "task", "trained_task", "arch", "lr", "seed", "state_bytes", "params", "steps", "trained_length",
    "length", "accuracy", "chance", "device",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- reading


def load(paths) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of all stores and JSONL files, one for each run, task and length, and the runs left out with reasons.

    Columns are COLUMNS: `task` is a name with its options and the tokens that occur, `state_bytes` the decoding state
    of one sequence after `trained_length` tokens, `chance` the accuracy of a model that knows the format only. Raises
    DataError.
    """
    rows, excluded = [], []
    for path in map(Path, paths):
        if path.is_dir():
            found, left_out = _store_rows(path)
            rows, excluded = rows + found, excluded + left_out
        elif path.is_file():
            rows += [{name: row[name] for name in COLUMNS} for row in read_lines(path, COLUMNS)]
        else:
            raise DataError(f"--store {path}: no such store or file")
    if not rows:
        raise DataError(f"--store {' '.join(map(str, paths))}: no finished run that was trained on a task")
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(["task", "arch", "state_bytes", "seed", "length"])
    return table.reset_index(drop=True), pd.DataFrame(excluded, columns=("run_id", "arch", "reason"))


def _store_rows(store: Path) -> tuple[list[dict], list[dict]]:
    rows, excluded = [], []
    for directory in sorted(path.parent for path in store.glob("*/run.json")):
        run, config = (read_record(directory / name) for name in ("run.json", "config.json"))
        arch = str(run["sweep"].get("arch", "+".join(config["model"]["pattern"])))
        if run["status"] != "done" or not config["data"]["task"]:
            reason = f"{run['status']}: {run['reason']}" if run["status"] != "done" else "not trained on a task"
            excluded.append({"run_id": run["run_id"], "arch": arch, "reason": reason})
            continue
        trained = config["train"]["seq_len"]
        facts = {
            **{"run_id": run["run_id"], "arch": arch, "seed": run["seed"], "state_bytes": run["state_bytes"]},
            **{"params": run["params"]["total"], "steps": run["steps_total"], "trained_length": trained},
            **{"lr": config["optim"]["lr"], "device": run["hardware"]["device_kind"]},
        }
        data = run["data"]
        own = _label(data["name"], data["asked"], data["vocab_size"])
        facts["trained_task"] = own
        at = {(own, trained): {"accuracy": run["final_accuracy"], "chance": data["chance_accuracy"]}}
        evals = directory / "evals.json"
        for score in read_record(evals)["tasks"] if evals.exists() else ():
            key = (_label(score["task"], score["options"], score["vocab_size"]), score["length"])
            at[key] = {"accuracy": score["accuracy"], "chance": score["chance_accuracy"]}
        rows += [{**facts, "task": task, "length": length, **score} for (task, length), score in at.items()]
    return rows, excluded


def _label(task: str, options: dict, vocab_size: int) -> str:
    """Options that are off (False, 0) are left out."""
    return " ".join([task, *(f"{k}={v}" for k, v in options.items() if v), f"vocab={vocab_size}"])


def best_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one learning rate for each task, architecture and state, with a column `rates`: how many were tried.

    It is the rate with the highest mean accuracy over seeds on the task and at the length of training; of those less
    than 0.01 below it, the one with the most seeds. The same validation rows choose and score, so a maximum of several
    noisy means is a little too high, the more rates the more.
    """
    shape = ["trained_task", "arch", "state_bytes"]
    own = rows[(rows["task"] == rows["trained_task"]) & (rows["length"] == rows["trained_length"])]
    means = own.groupby([*shape, "lr"])["accuracy"].agg(["mean", "size"]).reset_index()
    top = means.groupby(shape)["mean"].transform("max")
    order = means[means["mean"] > top - 0.01].sort_values(["size", "mean"], ascending=False, kind="stable")
    best = order.drop_duplicates(shape)[[*shape, "lr"]]
    tried = means.groupby(shape)["lr"].size().rename("rates").reset_index()
    return rows.merge(best).merge(tried)


def summary(rows: pd.DataFrame, by: list[str], level: float = 0.95) -> pd.DataFrame:
    """Mean accuracy over seeds with `lo` and `hi` (equal to the mean where there is one seed) and `seeds`."""
    out = []
    for key, part in rows.groupby(by, sort=False):
        values = part["accuracy"].to_numpy(float)
        mean, half = values.mean(), 0.0
        if len(values) > 1:
            half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        interval = {"lo": max(mean - half, 0.0), "hi": min(mean + half, 1.0), "seeds": len(values)}
        out.append({**dict(zip(by, key, strict=True)), "accuracy": mean, **interval})
    return pd.DataFrame(out)


def gaps(rows: pd.DataFrame, base: str, level: float = 0.95) -> pd.DataFrame:
    """Accuracy of every architecture minus that of `base` at about the same state: `gap` with `lo`, `hi` (Welch's t).

    A row for each task, length, architecture and state, against the state of `base` that is nearest on a log scale
    (`base_state_bytes`), where both have two seeds or more. Where both have one value at all seeds the interval is a
    point. Raises DataError.
    """
    if base not in set(rows["arch"]):
        raise DataError(f"base = {base!r}: no such architecture; there are {', '.join(sorted(set(rows['arch'])))}")
    out = []
    for (task, length), part in best_rates(rows).groupby(["task", "length"], sort=False):
        groups = {key: group["accuracy"].to_numpy(float) for key, group in part.groupby(["arch", "state_bytes"])}
        sizes = [size for arch, size in groups if arch == base]
        for (arch, size), values in groups.items() if sizes else ():
            nearest = min(sizes, key=lambda other: abs(np.log(other / size)))
            other = groups[base, nearest]
            if arch == base or min(len(values), len(other)) < 2:
                continue
            gap, half = values.mean() - other.mean(), _welch(values, other, level)
            facts = {"task": task, "length": length, "arch": arch, "state_bytes": size, "base_state_bytes": nearest}
            out.append({**facts, "gap": gap, "lo": gap - half, "hi": gap + half})
    columns = ("task", "length", "arch", "state_bytes", "base_state_bytes", "gap", "lo", "hi")
    return pd.DataFrame(out, columns=columns)


def _welch(a, b, level) -> float:
    """Half the interval of the difference of two means, with variances of their own."""
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    return stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(sum(parts))


# ---------------------------------------------------------------------------------------------- drawing


def against_state(rows: pd.DataFrame, level: float = 0.95):
    """Accuracy at the training length against state bytes, a panel for each task; None where no state varies."""
    rows = best_rates(rows)
    rows = rows[rows["length"] == rows["trained_length"]]
    sizes = rows.groupby(["task", "arch"])["state_bytes"].nunique().groupby("task").max()
    tasks = _natural(task for task in rows["task"].unique() if sizes[task] > 1)
    if not tasks:
        return None
    return _panels(rows, tasks, "state_bytes", "decoding state of a sequence", level, _bytes)


def against_length(rows: pd.DataFrame, level: float = 0.95):
    """Accuracy against the length of a row, a panel for each task; None where there is one length only."""
    rows = best_rates(rows)
    lengths = rows.groupby("task")["length"].nunique()
    tasks = _natural(task for task in rows["task"].unique() if lengths[task] > 1)
    if not tasks:
        return None
    rows = rows[rows["task"].isin(tasks)]
    if rows.groupby("arch")["state_bytes"].nunique().max() > 1:
        rows = rows.assign(arch=rows["arch"] + ", " + rows["state_bytes"].map(_bytes))
    return _panels(rows, tasks, "length", "tokens in a row", level, str)


def _natural(names) -> list[str]:
    """Sorted, numbers in them by value."""
    return sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)])


def _panels(rows, tasks, x, xlabel, level, show):
    """Means over seeds with intervals as lines, each seed as a small point; colours are the same in all panels."""
    from analysis import plots  # matplotlib is slow to import

    archs = list(rows["arch"].unique())
    n = len(plots.ARCH_COLOURS)
    with plots.plt.rc_context(plots.STYLE):
        size = (4.6 * len(tasks) + 1.9, 3.8)
        figure, axes = plots.plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True)
        plots.plt.close(figure)
        for ax, task in zip(axes[0], tasks, strict=True):
            mine = rows[rows["task"] == task]
            ax.axhline(mine["chance"].iloc[0], color="0.5", lw=1, ls=":", label="chance")
            if x == "length":
                ax.axvline(mine["trained_length"].iloc[0], color="0.5", lw=1, ls="--", label="trained length")
            for i, arch in enumerate(archs):
                colour, marker = plots.ARCH_COLOURS[i % n], plots.MARKERS[i % n]
                line = marker + ("-" if i < n else "--")  # colours come again
                points = mine[mine["arch"] == arch]
                ax.plot(points[x], points["accuracy"], marker, color=colour, ms=4, mew=0, alpha=0.6)
                means = summary(points, ["arch", x], level).sort_values(x) if len(points) else None
                if means is not None:
                    bars = np.abs(means[["lo", "hi"]].to_numpy().T - means["accuracy"].to_numpy())
                    style = {"color": colour, "ms": 5, "mec": "white", "mew": 0.5, "lw": 1.5, "capsize": 2}
                    ax.errorbar(means[x], means["accuracy"], bars, fmt=line, elinewidth=0.9, label=arch, **style)
            ax.set_xscale("log", base=2)
            ticks = sorted(mine[x].unique()) if x == "length" else None
            if ticks:
                ax.set_xticks(ticks)
            ax.minorticks_off()
            ax.xaxis.set_major_formatter(lambda value, _: show(round(value)))
            ax.set(xlabel=xlabel, ylim=(-0.03, 1.03))
            ax.set_title(task, fontsize="small")
        axes[0, 0].set_ylabel("accuracy")
        handles = {}
        for ax in axes[0]:
            handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right center")
        if rows["rates"].max() > 1:
            tried = " to ".join(str(n) for n in sorted({rows["rates"].min(), rows["rates"].max()}))
            figure.supxlabel(f"best of {tried} learning rates for each task, architecture and state", fontsize="small")
    return figure


def _bytes(value) -> str:
    return f"{value / 1024:.3g} KiB" if value >= 1024 else f"{value} B"


# ---------------------------------------------------------------------------------------------- the page


def build(rows: pd.DataFrame, excluded: pd.DataFrame, *, title: str, sources, level: float = 0.95) -> dict:
    """Everything that the template shows."""
    figures = {"state": against_state(rows, level), "length": against_length(rows, level)}
    table = summary(best_rates(rows), ["task", "arch", "state_bytes", "params", "lr", "rates", "length"], level)
    table = table.sort_values(["task", "length", "state_bytes"], kind="stable")
    return {
        "title": title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "sources": [str(source) for source in sources],
        "level": level,
        "runs": rows["run_id"].nunique(),
        "devices": sorted(rows["device"].unique()),
        "plots": {name: _uri(figure) for name, figure in figures.items() if figure is not None},
        "figures": figures,
        "table": table.to_dict("records"),
        "excluded": excluded.to_dict("records"),
    }


def _svg(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _uri(figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(_svg(figure)).decode()


def render(context: dict) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": _bytes}
    return environment.get_template("recall.html").render(**context)


def parser() -> Parser:
    out = Parser(prog="python -m analysis.recall", description=__doc__.partition("\n")[0])
    out.add_argument("--store", required=True, nargs="+", metavar="PATH", help="run stores, or files made by --save")
    out.add_argument("--out", metavar="REPORT.HTML", help="one self-contained page")
    out.add_argument("--svg", metavar="PREFIX", help="write PREFIXstate.svg and PREFIXlength.svg")
    out.add_argument("--save", metavar="ROWS.JSONL", help="write what was read as rows of JSON")
    out.add_argument("--title", default="Recall and state tracking", help="heading of the page")
    out.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")
    return out


def main(args: argparse.Namespace) -> None:
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level}: must be between 0 and 1")
    if not (args.out or args.svg or args.save):
        raise ValueError("nothing to write: give --out, --svg or --save")
    rows, excluded = load(args.store)
    if args.save:
        rows.to_json(args.save, orient="records", lines=True)
    context = build(rows, excluded, title=args.title, sources=args.store, level=args.level)
    if args.out:
        Path(args.out).write_text(render(context))
    for name, figure in context["figures"].items():
        if args.svg and figure is not None:
            Path(f"{args.svg}{name}.svg").write_bytes(_svg(figure))
    print(f"{context['runs']} runs, {len(excluded)} left out")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
