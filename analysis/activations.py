"""Final losses of activations (or any named arms) at equal size, with seeds and intervals, from stores or stored rows.

    python -m analysis.activations --store runs/polycom --base swiglu --svg polycom.svg
    python -m analysis.activations --store rows.jsonl runs/polycom --save rows.jsonl --curves curves.jsonl  # merges

Runs of the stage 'rates' give each arm its learning rate and are not compared; those of the stage 'seeds' are. Where no
run has a stage, the rates are chosen on the runs that are compared. Differences to the base are taken seed by seed
(same data order) and have the t interval of their mean.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis import cli
from analysis.load import DataError, load_curves, load_runs, made_by
from pallas_kernels.commands import Parser


def load(paths) -> pd.DataFrame:
    """Runs of stores (`load_runs` without other accountings) and of files that `--save` wrote, whatever their status.

    A run that is in several of them counts once, as it is where it came furthest, or else in the last. `code` is the
    hash of the sources that trained it.
    """
    frame = pd.concat([_load(Path(path)) for path in paths], ignore_index=True)
    steps = frame["steps_done"].fillna(0) if "steps_done" in frame else 0
    order = frame.assign(done=frame["status"] == "done", steps=steps).sort_values(["done", "steps"], kind="stable")
    return frame.loc[sorted(order.drop_duplicates("run_id", keep="last").index)].reset_index(drop=True)


def _load(path: Path) -> pd.DataFrame:
    if path.is_dir():
        frame = load_runs(path, n="nonemb")
        frame = frame.drop(columns=[name for name in frame if name.startswith(("N_", "C_"))])
        facts = [made_by(path / run) for run in frame["run_id"]]
        return frame.assign(device=[fact["device"] for fact in facts], code=[fact["code_hash"] for fact in facts])
    return read_rows(path)


def read_rows(path) -> pd.DataFrame:
    """A file that `--save` or `--curves` wrote. Raises DataError."""
    if not Path(path).is_file():
        raise DataError(f"--store {path}: no such store or file")
    try:
        return pd.read_json(path, orient="records", lines=True, dtype={"run_id": str})
    except ValueError as err:
        raise DataError(f"--store {path}: is not a file of JSON rows ({err})") from None


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs that ended with a loss. Raises DataError where there is none, or where a column is missing."""
    missing = [name for name in ("arch", "d_model", "seed", "loss") if name not in frame]
    if missing:
        raise DataError(f"--store: has no column {missing[0]!r}; it is made for sweeps like configs/sweeps/polycom.py")
    rows = frame[(frame["status"] == "done") & frame["loss"].notna()]
    if rows.empty:
        raise DataError("--store: has no finished run")
    return rows


def of_stage(rows: pd.DataFrame, stage: str) -> pd.DataFrame:
    """The rows of a stage, 'rates' or 'seeds'; all rows where none has a stage."""
    if "stage" not in rows or rows["stage"].isna().all():
        return rows
    return rows[rows["stage"] == stage]


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean loss of each learning rate (index) and arm (columns) at the smallest width of the stage 'rates'."""
    rows = of_stage(rows, "rates")
    return rows[rows["d_model"] == rows["d_model"].min()].pivot_table(index="lr", columns="arch", values="loss")


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """{arm: its best learning rate}, of `rates`. Raises DataError where no run has a rate."""
    if "lr" not in rows or of_stage(rows, "rates").empty:
        raise DataError("--store: has no finished run of the stage 'rates' that gives the best learning rates")
    return {str(arch): float(losses.idxmin()) for arch, losses in rates(rows).items()}


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of the stage 'seeds' at each arm's best rate; a width that was run at one rate keeps it."""
    seeds = of_stage(rows, "seeds")
    if "lr" not in rows or of_stage(rows, "rates").empty:
        return seeds
    several = seeds.groupby(["arch", "d_model"])["lr"].transform("nunique") > 1
    return seeds[~several | (seeds["lr"] == seeds["arch"].map(best_rates(rows)))]


def mean_interval(values, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, lo, hi) by Student's t; lo and hi are NaN where there are fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def differences(rows: pd.DataFrame, base: str, level: float = 0.95) -> pd.DataFrame:
    """loss - loss of `base` in nats for each size and arm: mean over seeds with lo, hi, and the number of seeds."""
    if rows.empty:
        raise DataError("--store: has no finished run of the stage 'seeds'")
    if base not in set(rows["arch"]):
        raise DataError(f"--base {base!r}: no finished run of it; there are {', '.join(sorted(set(rows['arch'])))}")
    out = []
    for size, part in rows.groupby("d_model"):
        losses = part.pivot_table(index="seed", columns="arch", values="loss")
        for arch in losses if base in losses else ():
            paired = (losses[arch] - losses[base]).dropna()
            if not len(paired):
                continue
            mean, lo, hi = mean_interval(paired, level) if arch != base else (0.0, 0.0, 0.0)
            mine = part[part["arch"] == arch]
            facts = {"d_model": size, "N": mine["N"].iloc[0], "arch": arch, "loss": mine["loss"].mean()}
            rate = {"lr": mine["lr"].iloc[0]} if "lr" in mine else {}
            out.append({**facts, **rate, "difference": mean, "lo": lo, "hi": hi, "seeds": len(paired)})
    return pd.DataFrame(out)


def figure(rows: pd.DataFrame, base: str, level: float = 0.95):
    """Differences to the base for each size, with each seed as a point; and losses over learning rates."""
    from analysis import plots

    tried = rates(rows) if "lr" in rows else []
    chosen = compared(rows)
    table = differences(chosen, base, level)
    archs = sorted(set(rows["arch"]))
    with plots.plt.rc_context(plots.STYLE):
        result, axes = plots.new_figure(2 if len(tried) > 1 else 1)
        ax, sizes = axes[0, 0], sorted(table["d_model"].unique())
        for i, arch in enumerate(archs):
            colour, marker = plots.ARCH_COLOURS[i % 7], plots.MARKERS[i % 7]
            mine = table[table["arch"] == arch]
            at = np.array([sizes.index(size) for size in mine["d_model"]]) + 0.12 * (i - (len(archs) - 1) / 2)
            bars = np.abs(mine[["lo", "hi"]].to_numpy().T - mine["difference"].to_numpy())
            ax.errorbar(at, mine["difference"], yerr=bars, fmt=marker, color=colour, capsize=3, label=arch)
            for x, size in zip(at, mine["d_model"], strict=True):
                losses = chosen[chosen["d_model"] == size].pivot_table(index="seed", columns="arch", values="loss")
                points = (losses[arch] - losses[base]).dropna()
                ax.plot(np.full(len(points), x), points, ".", color=colour, alpha=0.5, ms=4)
        ax.axhline(0.0, color="0.5", lw=0.8)
        labels = [f"{size}\n{table[table['d_model'] == size]['N'].iloc[0] / 1e6:.2g}M" for size in sizes]
        ax.set_xticks(range(len(sizes)), labels)
        ax.set(xlabel="width, parameters in blocks", ylabel=f"validation loss minus {base} (nats per token)")
        ax.legend()
        if len(tried) > 1:
            for i, arch in enumerate(archs):
                style = {"color": plots.ARCH_COLOURS[i % 7], "marker": plots.MARKERS[i % 7]}
                axes[0, 1].plot(tried.index, tried.get(arch), label=arch, **style)
            axes[0, 1].set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
            axes[0, 1].set_title("choice of the rate")
            plots.few_labels(axes[0, 1].xaxis)
    return result


def over_training(curves: pd.DataFrame, rows: pd.DataFrame, base: str):
    """Training loss minus that of `base` against tokens at the same batches: a line for each seed, a panel per size.

    `curves` has run_id, step, tokens and loss (`load.load_curves`); `rows` are the runs to compare, finished or not.
    """
    from analysis import plots

    curves = curves[curves["step"] > 1].merge(rows[["run_id", "arch", "d_model", "seed"]], on="run_id")
    sizes, archs = sorted(curves["d_model"].unique()), sorted(set(rows["arch"]))
    with plots.plt.rc_context(plots.STYLE):
        result, axes = plots.new_figure(len(sizes), sharey=True)
        for ax, size in zip(axes[0], sizes, strict=True):
            mine = curves[curves["d_model"] == size]
            losses = mine.pivot_table(index=["seed", "tokens"], columns="arch", values="loss")
            for i, arch in enumerate(archs):  # the base keeps its colour in `figure`
                if arch == base:
                    continue
                for number, (_, seed) in enumerate((losses[arch] - losses[base]).groupby("seed")):
                    style = {"color": plots.ARCH_COLOURS[i % 7], "ls": ("-", "--", ":", "-.")[number % 4]}
                    ax.plot(seed.index.get_level_values("tokens"), seed, label="" if number else arch, lw=1.2, **style)
            ax.axhline(0.0, color="0.5", lw=0.8)
            ax.set(xlabel="training tokens", title=f"width {size}")
        axes[0, 0].set_ylabel(f"training loss minus {base} (nats per token)")
        axes[0, 0].legend()
    return result


def text(table: pd.DataFrame, base: str) -> str:
    """The table of `differences` for a terminal."""
    shown = table.rename(columns={"difference": f"minus {base}"}).round(5)
    return shown.to_string(index=False)


def parser() -> Parser:
    out = Parser(prog="python -m analysis.activations", description=__doc__.partition("\n")[0])
    out.add_argument("--store", required=True, nargs="+", metavar="PATH", help="run stores, or files made by --save")
    out.add_argument("--base", metavar="NAME", help="the arm that others are compared with")
    out.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")
    out.add_argument("--svg", metavar="FILE", help="write the figure")
    out.add_argument("--save", metavar="ROWS.JSONL", help="write what was read, each run once, as rows of JSON")
    out.add_argument("--curves", metavar="ROWS.JSONL", help="write the training losses of the stores to the rows there")
    return out


def save_curves(stores, path) -> int:
    """Training losses of stores into a file of rows, beside those of other runs that it holds; returns its length."""
    found = [load_curves(store)[["run_id", "step", "tokens", "loss"]] for store in stores]
    if Path(path).is_file():
        found.append(read_rows(path))
    frame = pd.concat(found, ignore_index=True).drop_duplicates(["run_id", "step"])
    frame.round({"loss": 6}).to_json(path, orient="records", lines=True)
    return len(frame)


def main(args: argparse.Namespace) -> None:
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level}: must be between 0 and 1")
    if not (args.base or args.save or args.curves):
        raise ValueError("nothing to do: give --base, --save or --curves")
    frame = load(args.store)
    if args.save:
        frame.to_json(args.save, orient="records", lines=True)
        print(f"wrote {args.save}: {len(frame)} runs")
    if args.curves:
        count = save_curves([path for path in args.store if Path(path).is_dir()], args.curves)
        print(f"wrote {args.curves}: {count} rows")
    if args.base:
        rows = finished(frame)
        print(f"{len(rows)} of {len(frame)} runs finished")
        if "lr" in rows:
            print(rates(rows).round(4).to_string())
        print(text(differences(compared(rows), args.base, args.level), args.base))
        if args.svg:
            figure(rows, args.base, args.level).savefig(args.svg)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
