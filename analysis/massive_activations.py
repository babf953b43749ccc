"""Emergence of massive activations in a run store: curves per layer, fits with intervals, interventions compared.

    python -m analysis.massive_activations --store runs/massive --fits fits.jsonl --svg massive_
    python -m analysis.massive_activations --store analysis/results/massive_activations/gpu.jsonl --svg massive_

A store is a directory of runs with probes (`configs/sweeps/massive_activations.py`). `--save` keeps what the probes
saw as JSON, a line for each run, which can be given instead of a store. `--svg` draws PREFIXemergence.svg (a panel for
each size of the baseline) and PREFIXinterventions.svg.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import cli, emergence
from analysis.load import DataError, load_curves, read_lines, read_record
from pallas_kernels.commands import Parser

FACTS = (
    "run_id", "size", "intervention", "seed", "status", "n_layers", "d_model", "n_heads", "d_ff", "params",
    "lr", "tokens_per_step", "steps_total", "final_loss", "wall_seconds", "device", "data",
)  # fmt: skip


@dataclass
class Probed:
    """What the probes saw: `runs`, a row for each run (FACTS), and `rows`, one for each run, step and layer.

    `rows` has run_id, step, layer (from 0) and a column for each value of a probe, NaN where a layer has none.
    """

    runs: pd.DataFrame
    rows: pd.DataFrame


# ---------------------------------------------------------------------------------------------- reading


def load(paths) -> Probed:
    """Runs with probe rows of all stores and files made by `save`; of a run in several, the last. Raises DataError."""
    lines = _lines(paths)
    runs = pd.DataFrame([{name: line[name] for name in FACTS} for line in lines])
    return Probed(runs, pd.concat([_rows(line) for line in lines], ignore_index=True))


def save(paths, out) -> None:
    """Writes a line of JSON for each run, with five digits of every value."""
    lines = _lines(paths)
    with open(out, "w") as file:
        file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def _lines(paths) -> list[dict]:
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"--store {path}: no such store or file")
        lines = _of_store(path) if path.is_dir() else read_lines(path, (*FACTS, "steps", "probes"))
        found |= {line["run_id"]: line for line in lines}
    if not found:
        raise DataError(f"--store {' '.join(map(str, paths))}: no run with rows of kind 'probe'")
    return list(found.values())


def _of_store(store: Path) -> list[dict]:
    lines = []
    for directory in sorted(path.parent for path in store.glob("*/run.json")):
        run, config = (read_record(directory / name) for name in ("run.json", "config.json"))
        probes = load_curves(directory, "probe")
        if not probes.empty:
            lines.append(_line(run, config, probes))
    return lines


def _line(run: dict, config: dict, probes: pd.DataFrame) -> dict:
    model, train, axes = config["model"], config["train"], run.get("sweep") or {}
    mixer, ffn = (model[kind][name] for kind, name in zip(("mixers", "ffns"), _first_block(model), strict=True))
    width = model["d_model"]
    values = probes.drop(columns=["run_id", "kind", "step", "tokens", "flops", "nonfinite"], errors="ignore")
    return {
        "run_id": run["run_id"], "size": str(axes.get("size", "")),
        "intervention": str(axes.get("intervention", run.get("name") or "baseline")), "seed": run["seed"],
        "status": run["status"], "n_layers": model["n_layers"], "d_model": width,
        "n_heads": mixer.get("n_heads") or (width // mixer["head_dim"] if mixer.get("head_dim") else 4),
        "d_ff": ffn.get("d_ff") or round((ffn.get("expansion") or 8 / 3) * width / 8) * 8,
        "params": run["params"]["non_embedding"], "lr": config["optim"]["lr"],
        "tokens_per_step": train["batch_size"] * train["seq_len"], "steps_total": run["steps_total"],
        "final_loss": run["final_loss"], "wall_seconds": run.get("wall_seconds"),
        "device": run["hardware"]["device_kind"], "data": run["data"].get("name"), "steps": probes["step"].tolist(),
        "probes": {name: [_rounded(row) for row in values[name]] for name in values},
    }  # fmt: skip


def _first_block(model: dict) -> tuple[str, str]:
    mixer, _, ffn = (list(model["prefix"]) + list(model["pattern"]))[0].partition("/")
    return mixer, ffn or "dense"


def _rounded(row):
    return [None if value is None else float(f"{value:.5g}") for value in row]


def _rows(line: dict) -> pd.DataFrame:
    steps, layers = len(line["steps"]), line["n_layers"]
    frame = pd.DataFrame({
        "run_id": line["run_id"], "step": np.repeat(line["steps"], layers), "layer": np.tile(np.arange(layers), steps),
    })  # fmt: skip
    values = {name: np.array(table, float).reshape(-1) for name, table in line["probes"].items()}
    return frame.assign(**values)


def labelled(probed: Probed) -> pd.DataFrame:
    """`rows` with size, intervention, seed and n_layers of their run, `depth` = (layer + 1) / n_layers."""
    facts = probed.runs[["run_id", "size", "intervention", "seed", "n_layers"]]
    rows = probed.rows.merge(facts, on="run_id")
    return rows.assign(depth=(rows["layer"] + 1) / rows["n_layers"])


def until(probed: Probed, step: int) -> Probed:
    """The runs that reached `step`, up to it: what can be compared. Raises DataError where there is none."""
    reached = probed.rows.groupby("run_id")["step"].max() >= step
    runs = probed.runs[probed.runs["run_id"].map(reached)]
    if runs.empty:
        raise DataError(f"step {step}: no run reached it; the longest has {probed.rows['step'].max()}")
    return _of_runs(runs, probed.rows[probed.rows["step"] <= step])


def select(probed: Probed, query: str) -> Probed:
    """The runs that a query over FACTS selects. Raises DataError where it is none or selects none."""
    try:
        runs = probed.runs.query(query)
    except Exception as error:  # whatever the expression raises
        raise DataError(f"where {query!r} is not a query over {', '.join(FACTS)} ({error})") from None
    if runs.empty:
        raise DataError(f"where {query!r}: no run")
    return _of_runs(runs, probed.rows)


def _of_runs(runs: pd.DataFrame, rows: pd.DataFrame) -> Probed:
    return Probed(runs.reset_index(drop=True), rows[rows["run_id"].isin(runs["run_id"])].reset_index(drop=True))


# ---------------------------------------------------------------------------------------------- fits and tables


def fit_all(probed: Probed, *, draws: int = 200, level: float = 0.9) -> pd.DataFrame:
    """`emergence.fit_curve` of every layer of every run, a row for each.

    Curves with fewer than `emergence.CHECKPOINTS` are left out.
    """
    from tqdm import tqdm

    curves = probed.rows.groupby(["run_id", "layer"])
    facts = probed.runs.set_index("run_id")[["size", "intervention", "seed", "n_layers", "d_model", "n_heads", "d_ff"]]
    out = []
    for (run_id, layer), rows in tqdm(curves, desc="curves", disable=None, leave=False):
        if len(rows) < emergence.CHECKPOINTS:
            continue
        found = emergence.fit_curve(rows["step"], rows["residual_ratio"], draws=draws, level=level)
        out.append({"run_id": run_id, **facts.loc[run_id].to_dict(), "layer": int(layer), **found})
    return pd.DataFrame(out)


def read_fits(path) -> pd.DataFrame:
    """What `--fits` wrote. Raises DataError."""
    try:
        return pd.read_json(path, lines=True, dtype={"run_id": str})
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not the fits of --fits ({error})") from None


def summary(probed: Probed) -> pd.DataFrame:
    """A row for each size and intervention at the last step at which all its runs were probed: means over seeds.

    loss is that of the validation split, where this step ends the runs.
    ratio, max and massive are of the layer with most (ratio_lo and ratio_hi the smallest and largest seed); ratio_peak
    is the largest ratio at any step; sink_top is of the head with most in any layer, sink, sink_heads and entropy are
    means over layers; at_first is the share of rows whose largest entry stands at the first token, in `layer` (from 0),
    that of the largest ratio; variance is of the last layer; similarity and kurtosis are means over the later half of
    the layers.
    """
    rows, out = labelled(probed), []
    for (size, name), group in rows.groupby(["size", "intervention"], sort=False):
        seen_by = group.groupby("step")["run_id"].nunique()
        last = seen_by[seen_by == seen_by.max()].index.max()
        seeds = [_at_end(run, last) for _, run in group[group["step"] <= last].groupby("run_id")]
        runs = probed.runs[(probed.runs["size"] == size) & (probed.runs["intervention"] == name)]
        row = {"size": size, "intervention": name, "seeds": len(seeds), "step": last}
        row["loss"] = runs["final_loss"].mean() if runs["steps_total"].eq(last).all() else np.nan
        for key in seeds[0]:
            row[key] = np.mean([seed[key] for seed in seeds])
        row |= {f"ratio_{end}": pick(seed["ratio"] for seed in seeds) for end, pick in (("lo", min), ("hi", max))}
        out.append(row)
    order = probed.runs.groupby("size")["n_layers"].min()
    out.sort(key=lambda row: (order[row["size"]], row["intervention"] != "baseline", row["intervention"]))
    return pd.DataFrame(out)


def _at_end(run: pd.DataFrame, last: int) -> dict:
    end = run[run["step"] == last].sort_values("layer")
    top, late = end.loc[end["residual_ratio"].idxmax()], end[end["depth"] > 0.5]
    return {
        "ratio": top["residual_ratio"], "ratio_peak": run["residual_ratio"].max(), "max": end["residual_max"].max(),
        "massive": end["residual_massive"].max(), "at_first": top["residual_at_first"], "layer": top["layer"],
        "sink": end["sink_mass"].mean(), "sink_top": end["sink_top"].max(), "sink_heads": end["sink_heads"].mean(),
        "entropy": end["attention_entropy"].mean(), "variance": end["residual_variance"].iloc[-1],
        "similarity": late["layer_similarity"].mean(), "kurtosis": late["residual_kurtosis"].mean(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- drawing


def emergence_figure(probed: Probed, fits: pd.DataFrame | None = None, intervention: str = "baseline"):
    """Ratio of largest to median activation over training: a panel for each size, a line for each layer.

    Thick is the first seed, thin the others. With `fits` (of `fit_all`) the law of the first seed's curve is dashed,
    and its peak marked where it is seen.
    """
    from analysis import plots  # matplotlib is slow to import

    rows = labelled(probed)
    rows = rows[rows["intervention"] == intervention]
    sizes = list(dict.fromkeys(rows.sort_values("n_layers")["size"]))
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(len(sizes), width=4.6, height=4.0)
        for ax, size in zip(axes[0], sizes, strict=True):
            mine = rows[rows["size"] == size]
            layers = int(mine["n_layers"].iloc[0])
            first = mine["seed"].min()
            for (layer, seed), curve in mine.groupby(["layer", "seed"]):
                colour, main = plots.COMPUTE(layer / max(layers - 1, 1)), seed == first
                style = {"lw": 1.3, "label": f"layer {layer + 1}"} if main else {"lw": 0.7, "alpha": 0.5}
                ax.plot(curve["step"], curve["residual_ratio"], color=colour, **style)
                if main and fits is not None:
                    _draw_fit(ax, fits, size, intervention, layer, curve["step"].to_numpy(float), colour)
            ax.set(title=f"{size}: {layers} layers", xlabel="step", yscale="log")
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xlim(0, None)
            ax.legend(ncols=2, fontsize=7)
        axes[0, 0].set_ylabel("max |h| / median |h| after the layer")
    return figure


def _draw_fit(ax, fits, size, intervention, layer, steps, colour):
    """The curve is well determined even where its parameters trade off and the fit of them was refused."""
    from analysis.laws import get_law

    mine = fits[(fits["size"] == size) & (fits["intervention"] == intervention) & (fits["layer"] == layer)]
    if mine.empty:
        return
    one, law = mine.sort_values("seed").iloc[0], get_law(emergence.LAWS[0])
    ax.plot(steps, law.evaluate({p.name: one[p.name] for p in law.parameters}, t=steps), "--", color=colour, lw=0.9)
    if one["peak"] == "seen":
        bars = [[one["t_peak"] - one["t_peak_lo"]], [one["t_peak_hi"] - one["t_peak"]]]
        ax.errorbar([one["t_peak"]], [one["f_peak"]], xerr=np.maximum(bars, 0), fmt="v", ms=4, color=colour, capsize=2)


PANELS = (
    ("residual_ratio", "step", "largest ratio of all layers"),
    ("sink_mass", "step", "attention on the first token"),
    ("residual_kurtosis", "step", "kurtosis, largest of all layers"),
    ("residual_variance", "depth", "variance of the stream at the end"),
    ("layer_similarity", "depth", "cosine before and after the layer at the end"),
    ("attention_entropy", "depth", "entropy of attention at the end, nats"),
)


def interventions_figure(probed: Probed, size: str | None = None):
    """All interventions at one size (default: the one with most of them): three measures over training, three by depth.

    Lines are means over seeds, bands their range. Over training the largest of all layers, for the sink the mean.
    """
    from analysis import plots

    rows = labelled(probed)
    if size is None:
        size = rows.groupby("size")["intervention"].nunique().idxmax()
    rows = rows[rows["size"] == size]
    names = sorted(rows["intervention"].unique(), key=lambda name: (name != "baseline", name))
    colours = ("#000000", *plots.ARCH_COLOURS[:-1], "#888888")
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(3, 2, width=4.3, height=3.2)
        for ax, (column, against, title) in zip(axes.flat, PANELS, strict=True):
            for i, name in enumerate(names):
                mine = rows[rows["intervention"] == name]
                if against == "depth":
                    mine = mine[mine["step"] == mine.groupby("run_id")["step"].transform("max")]
                pick = "mean" if column == "sink_mass" else "max"
                curves = mine.groupby([against, "run_id"])[column].agg(pick).unstack()
                style = {"color": colours[i % len(colours)], "lw": 2.0 if name == "baseline" else 1.3}
                ax.plot(curves.index, curves.mean(axis=1), label=name, ls="-" if i < len(colours) else "--", **style)
                ax.fill_between(
                    curves.index, curves.min(axis=1), curves.max(axis=1), color=style["color"], alpha=0.12, lw=0
                )
            ax.set(title=title, xlabel="step" if against == "step" else "layer / layers")
            if against == "step":
                ax.set_xscale("symlog", linthresh=1)
                ax.set_xlim(0, None)
            if column in ("residual_ratio", "residual_kurtosis", "residual_variance"):
                ax.set_yscale("log")
                plots.few_labels(ax.yaxis)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


# ---------------------------------------------------------------------------------------------- the command


def parser() -> Parser:
    out = Parser(prog="python -m analysis.massive_activations", description=__doc__.partition("\n")[0])
    out.add_argument("--store", required=True, nargs="+", metavar="PATH", help="run stores, or files made by --save")
    out.add_argument("--step", type=int, help="compare at this step: only runs that reached it, and only up to it")
    out.add_argument("--save", metavar="RUNS.JSONL", help="write what the probes saw, a line for each run")
    out.add_argument("--fits", metavar="FITS.JSONL", help="fit every layer's curve and write the parameters")
    out.add_argument(
        "--where", metavar="QUERY", help="""runs to fit, e.g. "intervention == 'baseline'" (default: all)"""
    )
    out.add_argument("--draws", type=int, default=200, help="bootstrap draws of a fit (default 200)")
    out.add_argument("--level", type=float, default=0.9, help="of the intervals (default 0.9)")
    out.add_argument("--svg", metavar="PREFIX", help="write PREFIXemergence.svg and PREFIXinterventions.svg")
    return out


def main(args: argparse.Namespace) -> None:
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level}: must be between 0 and 1")
    if args.draws < 10:
        raise ValueError(f"--draws {args.draws}: must be at least 10")
    if args.where and not args.fits:
        raise ValueError(f"--where {args.where!r}: chooses the runs to fit, give --fits")
    probed, fits = load(args.store), None
    if args.step is not None:
        probed = until(probed, args.step)
    if args.save:
        save(args.store, args.save)
    if args.fits:
        fits = fit_all(select(probed, args.where) if args.where else probed, draws=args.draws, level=args.level)
        fits.to_json(args.fits, orient="records", lines=True, double_precision=10)
        for best, count in fits["best"].value_counts().items():
            print(f"best by AIC: {best} in {count} of {len(fits)} curves")
    if args.svg:
        for name, figure in (
            ("emergence", emergence_figure(probed, fits)),
            ("interventions", interventions_figure(probed)),
        ):
            figure.savefig(f"{args.svg}{name}.svg", metadata={"Date": None})
    with pd.option_context("display.width", 250, "display.max_columns", None, "display.float_format", "{:.4g}".format):
        print(summary(probed).to_string(index=False))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
