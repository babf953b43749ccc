"""Activation sparsity of trained runs: A(D) curves with fits of the sparsing laws, width/depth, loss against sparsity.

    python -m analysis.sparsity --rows rows.jsonl --svg sparsity_
    python -m analysis.sparsity --rows old.jsonl new.jsonl --save all.jsonl   # merges
    python -m analysis.sparsity --rows prosparse.jsonl --compare relu         # arms that started from the same runs

Rows come from `python -m efficient_lm.sparsity`. A curve is the share of active neurons (method cett) of one activation
and one shape over training tokens, all its seeds together; ReLU gets the law sparsing_relu, others sparsing_silu.
Checkpoints of a run are not independent, so every interval counts runs: Student's t over seeds, and for the parameters
of a law the jackknife that leaves out one run at a time.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from analysis import cli
from analysis.activations import mean_interval
from analysis.fit import fit_law
from analysis.laws import get_law
from analysis.load import DataError, load_table, read_lines
from analysis.result import Fit, Options
from analysis.tables import with_interval
from pallas_kernels.commands import Parser

NEEDED = ("run_id", "activation", "d_model", "n_layers", "N", "D", "method", "at", "dial", "loss", "active")
SHAPE = ["activation", "d_model", "n_layers"]


LEVEL = 0.95
ONE_SIZE = 1.3  # runs whose parameters differ by no more than this factor show what width/depth does


def load(paths) -> pd.DataFrame:
    """Rows of all files with `ratio` = width/depth; of a run those that were measured latest in its training, once.

    Raises DataError.
    """
    rows = []
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"--rows {path}: no such file")
        rows += read_lines(path, NEEDED)
    if not rows:
        raise DataError(f"--rows {' '.join(map(str, paths))}: no rows")
    frame = pd.DataFrame(rows)
    if "last_step" in frame:
        frame = frame[frame["last_step"] == frame.groupby(["run_id", "method"])["last_step"].transform("max")]
        frame = frame.assign(asked=frame["dial"].where(frame["at"] == "dial"))
        frame = frame.drop_duplicates(["run_id", "method", "at", "step", "asked"], keep="last").drop(columns="asked")
    return frame.assign(ratio=frame["d_model"] / frame["n_layers"])


def curves(rows: pd.DataFrame, at: str = "held", first: float = 0.0) -> dict[tuple, pd.DataFrame]:
    """{(activation, d_model, n_layers): rows of method cett with columns D and A}, in order of N.

    Args:
      at: 'held', one CETT for all checkpoints of a run; 'rise', each checkpoint at its own rise in perplexity; 'zero',
        exact zeros only.
      first: leave out what was seen before so many tokens (warm-up).
    """
    mine = rows[(rows["method"] == "cett") & (rows["at"] == at) & (rows["D"] >= first)].rename(columns={"active": "A"})
    out = {key: part.sort_values("D").reset_index(drop=True) for key, part in mine.groupby(SHAPE)}
    return dict(sorted(out.items(), key=lambda item: (item[0][0], item[1]["N"].iloc[0], item[0][1])))


def chosen(rows: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows that satisfy a pandas query. Raises DataError."""
    try:
        found = rows[rows.eval(where).astype(bool)]
    except Exception as error:  # pandas raises many kinds
        raise DataError(f"--where {where!r}: not a query over the columns ({error})") from None
    if found.empty:
        raise DataError(f"--where {where!r}: no row satisfies it")
    return found


def label(key: tuple, rows: pd.DataFrame) -> str:
    return f"{key[0]} {rows['N'].iloc[0] / 1e6:.2g}M ({key[1]} x {key[2]})"


def law_of(activation: str):
    return get_law("sparsing_relu" if activation == "relu" else "sparsing_silu")


@dataclass
class Curve:
    """A law through the checkpoints of some runs, and through those of all runs but one, for each of them."""

    fit: Fit
    without: list[Fit]

    @property
    def refused(self) -> str | None:
        return self.fit.refused

    def predict(self, D) -> tuple:
        """A at D [n] and the ends of its interval, (value, lo, hi); lo and hi are NaN for a single run."""
        law, at = get_law(self.fit.law), {"D": D}
        value, *others = (np.asarray(law.predict(fit.values, at, np)) for fit in (self.fit, *self.without))
        return value, *jackknife(value, others)


def fit_curves(found: dict) -> dict[tuple, Curve]:
    """The law of its activation through each curve; `refused` says where the data don't determine its parameters."""
    return {key: fit_curve(law_of(key[0]), rows) for key, rows in found.items()}


def fit_curve(law, rows: pd.DataFrame) -> Curve:
    """A law through the rows of some runs, with jackknife intervals of its parameters over the runs."""
    fit, runs = _fit(law, rows), rows["run_id"].unique()
    if fit.objective is None or len(runs) < 2:
        return Curve(fit, [])
    curve = Curve(fit, [_fit(law, rows[rows["run_id"] != run]) for run in runs])
    failed = [(run, other.refused) for run, other in zip(runs, curve.without, strict=True) if other.refused]
    if failed and not fit.refused:
        fit.refused = f"without run {failed[0][0]}: {failed[0][1]}"
    if any(other.objective is None for other in curve.without):
        return Curve(fit, [])
    for p in law.parameters:
        others = [p.to_search(other.values[p.name]) for other in curve.without]
        with np.errstate(over="ignore"):
            lo, hi = (float(p.from_search(end)) for end in jackknife(p.to_search(fit.values[p.name]), others))
        fit.params[p.name] |= {"lo": lo, "hi": hi}
        if p.transform == "linear" and not p.may_vanish and not fit.refused and hi - lo > 2 * abs(fit.values[p.name]):
            fit.refused = f"{p.name} is not determined: {with_interval(fit.params[p.name])}"
    return curve


def _fit(law, rows: pd.DataFrame) -> Fit:
    table = load_table(rows[["D", "A"]], required=law.columns, duplicates="keep")
    return fit_law(law, table, Options(bootstrap=0, holdout=False))


def jackknife(value, without, level: float = LEVEL) -> tuple:
    """(lo, hi) of an estimate from n independent runs and its n values without one of them (Tukey 1958).

    value -+ t s, s^2 = (n - 1)/n sum (without_i - their mean)^2, with n - 1 degrees of freedom. NaN for n < 2.
    """
    n = len(without)
    if n < 2:
        return np.full_like(value, np.nan, dtype=float), np.full_like(value, np.nan, dtype=float)
    spread = np.sqrt((n - 1) * np.var(without, axis=0))
    half = stats.t.ppf((1 + level) / 2, n - 1) * spread
    return value - half, value + half


def ends(found: dict) -> pd.DataFrame:
    """Of each curve the share at its first and last checkpoint and the change between, t intervals over runs."""
    out = []
    for (activation, d_model, n_layers), rows in found.items():
        of_run = rows.groupby("run_id")["A"].agg(["first", "last"])
        shape = {"activation": activation, "d_model": d_model, "n_layers": n_layers, "N": rows["N"].iloc[0]}
        values = {"first": of_run["first"], "last": of_run["last"], "change": of_run["last"] - of_run["first"]}
        entries = {name: _entry(*mean_interval(series, LEVEL)) for name, series in values.items()}
        out.append({**shape, "runs": len(of_run), "from": rows["D"].min(), "to": rows["D"].max(), **entries})
    return pd.DataFrame(out)


def trend(x, y) -> dict:
    """Slope of y in ln x, a value of each run, with its t interval (`{"value", "lo", "hi"}`)."""
    found = stats.linregress(np.log(x), y)
    half = stats.t.ppf((1 + LEVEL) / 2, len(x) - 2) * found.stderr
    return _entry(found.slope, found.slope - half, found.slope + half)


def _entry(value, lo, hi) -> dict:
    return {"value": value, "lo": lo, "hi": hi}


def compare(rows: pd.DataFrame, base: str, by: str = "start") -> pd.DataFrame:
    """Arms of runs that share their start: dense loss minus that of `base`, and the shares of active neurons.

    A row for each arm and method, with t intervals over starts (`{"value", "lo", "hi"}`): `loss`, the difference;
    `zero`, neurons that are not exactly 0; `rise`, those kept at the rise in perplexity that was measured.
    """
    if by not in rows or base not in set(rows["arch"]):
        raise DataError(f"--compare {base}: no rows of it; they come from a sweep like configs/sweeps/prosparse.py")
    out, zero = [], rows[rows["at"] == "zero"].set_index(["arch", by])
    for (arch, method), mine in rows[rows["at"] == "rise"].groupby(["arch", "method"], sort=False):
        pairs = (zero["dense_loss"][arch] - zero["dense_loss"][base]).dropna()
        values = {"loss": pairs, "zero": zero["active"][arch], "rise": mine["active"]}
        entries = {name: _entry(*mean_interval(series, LEVEL)) for name, series in values.items()}
        out.append({"arch": arch, "method": method, "runs": len(mine), **entries})
    return pd.DataFrame(out)


def as_text(table: pd.DataFrame) -> str:
    """A table whose cells can be `{"value", "lo", "hi"}`."""
    shown = table.map(lambda cell: with_interval(cell) if isinstance(cell, dict) else cell)
    return shown.to_string(index=False)


def last(rows: pd.DataFrame, at: str = "rise") -> pd.DataFrame:
    """The rows of method cett at each run's last checkpoint."""
    mine = rows[(rows["method"] == "cett") & (rows["at"] == at)]
    return mine[mine["step"] == mine.groupby("run_id")["step"].transform("max")]


def fit_ratio(rows: pd.DataFrame, activation: str = "relu", at: str = "rise", bootstrap: int = 200) -> Fit:
    """The broken line sparsing_limit through the last checkpoints of an activation, A there in place of its limit.

    Rows should be of about one size, `rows.query("7e5 < N < 8e5")`: A depends on it.
    """
    mine = last(rows, at)
    mine = mine[mine["activation"] == activation].rename(columns={"ratio": "r", "active": "A0"})
    table = load_table(mine[["r", "A0"]], required=("r", "A0"), duplicates="keep")
    return fit_law(get_law("sparsing_limit"), table, Options(bootstrap=bootstrap, holdout=False))


def text(fits: dict, found: dict) -> str:
    """A line for each curve: parameters with intervals, or why they are not determined."""
    lines = []
    for key, curve in fits.items():
        lines.append(f"{label(key, found[key])}, {found[key]['run_id'].nunique()} runs: {fit_text(curve.fit)}")
    return "\n".join(lines)


def fit_text(fit: Fit) -> str:
    values = ", ".join(f"{name} {with_interval(entry)}" for name, entry in fit.params.items())
    return values + (f"; refused: {fit.refused}" if fit.refused else "")


def parser() -> Parser:
    out = Parser(prog="python -m analysis.sparsity", description=__doc__.partition("\n")[0])
    out.add_argument("--rows", required=True, nargs="+", metavar="JSONL", help="made by efficient_lm.sparsity")
    out.add_argument("--at", default="held", choices=("held", "rise", "zero"), help="which rows make A(D) (held)")
    out.add_argument("--first", type=float, default=0.0, metavar="TOKENS", help="leave out checkpoints before")
    out.add_argument("--where", metavar="QUERY", help='pandas query that a row must satisfy, e.g. "7e5 < N < 8e5"')
    out.add_argument("--compare", metavar="ARM", help="compare arms that share their starts with this one instead")
    out.add_argument("--save", metavar="ROWS.JSONL", help="write what was read, each measurement once, and no fits")
    out.add_argument("--svg", metavar="PREFIX", help="write PREFIX{curves,loss,ratio,layers}.svg")
    return out


def main(args: argparse.Namespace) -> None:
    rows = load(args.rows)
    if args.where:
        rows = chosen(rows, args.where)
    if args.save:
        rows.drop(columns="ratio").to_json(args.save, orient="records", lines=True)
        print(f"wrote {args.save}: {len(rows)} rows of {rows['run_id'].nunique()} runs")
        return
    if args.compare:
        print(as_text(compare(rows, args.compare)))
        return
    found = curves(rows, args.at, args.first)
    fits = fit_curves(found)
    print(as_text(ends(found)))
    print(text(fits, found))
    relu = rows[rows["activation"] == "relu"]
    if relu["ratio"].nunique() > 2 and relu["N"].max() < ONE_SIZE * relu["N"].min():
        print("ReLU in width/depth: " + fit_text(fit_ratio(relu)))
    if args.svg:
        from analysis import sparsity_plot  # matplotlib is slow to import

        figures = {
            "curves": sparsity_plot.over_training(found, fits),
            "ratio": sparsity_plot.width_depth(rows),
            "layers": sparsity_plot.by_layer(rows),
        }
        if (rows["at"] == "dial").any():
            figures["loss"] = sparsity_plot.against_loss(rows)
        for name, figure in figures.items():
            figure.savefig(f"{args.svg}{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
