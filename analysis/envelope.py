"""Compute-optimal size from learning curves (approach 1 of arXiv:2203.15556): the lower envelope over all runs.

    python -m analysis.envelope --store runs/NAME [--where "arch == 'gla'"]

Each training curve is smoothed in log compute and evaluated on one log-spaced grid. At each compute the run with the
lowest loss gives N* and D*; stretches where the smallest or the largest model is best are dropped, since there the
optimum may lie outside the sizes that were run. Two power laws through the rest give N* ~ C^a and D* ~ C^b. Curves of a
schedule that has not decayed yet lie above those of runs of that length, so approach 2 is to be trusted more.

Intervals: bootstrap over runs (models of the sweep are resampled, the two ends kept), since neighbouring points of a
curve are not independent.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from analysis import cli
from analysis.isoflop import power_law
from analysis.laws import get_law
from analysis.load import Table, load_curves, load_table
from analysis.result import Fit, Options, interval
from pallas_kernels.commands import Parser

POINTS = 300  # compute grid
WIDTH = 0.05  # smoothing, standard deviation in ln C


def smooth(flops, loss, grid, width: float = WIDTH) -> np.ndarray:
    """Local linear regression of loss on ln C with Gaussian weights, at `grid`; NaN outside the curve's range."""
    u, y, at = np.log(np.asarray(flops, float)), np.asarray(loss, float), np.log(grid)
    inside = (at >= u.min()) & (at <= u.max())
    out = np.full(len(at), np.nan)
    # a curve may be sampled more sparsely than the width: then widen to its spacing
    width = np.maximum(width, 1.5 * np.interp(at, (u[1:] + u[:-1]) / 2, np.diff(u)))
    offset = u[None] - at[inside, None]
    w = np.exp(-0.5 * (offset / width[inside, None]) ** 2)
    s0, s1, s2 = w.sum(1), (w * offset).sum(1), (w * offset**2).sum(1)
    t0, t1 = w @ y, (w * offset) @ y
    out[inside] = (s2 * t0 - s1 * t1) / np.maximum(s0 * s2 - s1**2, 1e-300)
    return out


def fit_envelope(curves, table: Table, options: Options | None = None) -> Fit:
    """Approach 1 from `load_curves` (columns run_id, flops, tokens, loss) and the table of the same runs.

    Returns a `Fit` with the parameters of the law `isoflop`; `refused` where fewer than two models take turns as best,
    apart from the smallest and the largest.
    """
    began, options = time.perf_counter(), options or Options()
    runs = table.rows.set_index("run_id")
    curves = curves[curves["run_id"].isin(runs.index)].dropna(subset=["flops", "tokens", "loss"])
    curves = curves[(curves["flops"] > 0) & (curves["tokens"] > 0)]
    parts = {run: part.sort_values("flops") for run, part in curves.groupby("run_id") if len(part) >= 8}
    fit = Fit("isoflop", len(parts), None, {}, {}, {"curves": len(parts)}, None, None)
    law = get_law("isoflop").formula
    fit.settings = {"law": law, "approach": "envelope of learning curves", "smoothing": WIDTH, "grid": POINTS}
    short = sorted(set(runs.index) - set(parts))
    fit.warnings += [f"run {run}: fewer than 8 points in its learning curve" for run in short]
    excluded = [{"row": str(row), "reason": reason} for row, reason in table.excluded["reason"].items()]
    fit.data = {"source": table.source, "filters": table.filters, "counts": table.counts, "excluded": excluded}
    fit.data["conventions"] = table.conventions() or "N: parameters; D: tokens; C: FLOP"
    if len(parts) < 3:
        fit.refused = f"{len(parts)} runs have a learning curve of 8 points or more; 3 sizes are needed"
        return fit
    lo, hi = min(p["flops"].min() for p in parts.values()), max(p["flops"].max() for p in parts.values())
    grid = np.geomspace(lo, hi, POINTS)
    loss = np.stack([smooth(p["flops"], p["loss"], grid) for p in parts.values()])
    N = runs.loc[list(parts), "N"].to_numpy(float)
    per_token = np.array([(p["flops"] / p["tokens"]).median() for p in parts.values()])

    def laws(which):
        keep = _envelope(loss[which], N[which])
        if keep is None:
            return None
        columns, best = keep
        run = np.asarray(which)[best]
        return power_law(grid[columns], N[run]), power_law(grid[columns], grid[columns] / per_token[run])

    found = laws(np.arange(len(parts)))
    if found is None:
        fit.refused = "fewer than two sizes besides the smallest and the largest are ever the best: add sizes"
        return fit
    rng, draws = np.random.default_rng(options.seed), {}
    ends = np.flatnonzero((N == N.min()) | (N == N.max()))
    for _ in range(min(options.bootstrap, 400)):
        drawn = laws(np.concatenate([ends, rng.integers(len(parts), size=len(parts))]))
        if drawn is not None:
            for axis, (A, a) in zip("ND", drawn, strict=True):
                draws.setdefault(f"A_{axis}", []).append(float(A))
                draws.setdefault(f"a_{axis}", []).append(float(a))
    for axis, (A, a) in zip("ND", found, strict=True):
        fit.params[f"A_{axis}"] = interval(A, draws.get(f"A_{axis}"), options.level)
        fit.params[f"a_{axis}"] = interval(a, draws.get(f"a_{axis}"), options.level)
    fit.derived = {"a": fit.params["a_N"], "b": fit.params["a_D"]}
    columns, best = _envelope(loss, N)
    fit.quality |= {
        "grid_points": len(columns), "sizes_on_envelope": len(np.unique(N[best])),
        "compute": [float(grid[columns[0]]), float(grid[columns[-1]])],
        "bootstrap_share_usable": len(draws.get("a_N", [])) / max(min(options.bootstrap, 400), 1),
        "envelope": [{"C": float(grid[c]), "N": float(N[b]), "loss": float(loss[b, c])}
                     for c, b in zip(columns, best, strict=True)],
    }  # fmt: skip
    share = fit.quality["bootstrap_share_usable"]
    if options.bootstrap and share < 0.8:
        fit.warnings.append(
            f"intervals rest on {share:.0%} of the bootstrap draws, the others have no two inner sizes: add sizes"
        )
    fit.seconds = time.perf_counter() - began
    return fit


def _envelope(loss, N):
    """Grid columns whose best run is of an inner size, and that run: ([k], [k]); None with fewer than two sizes."""
    columns = np.flatnonzero(np.isfinite(loss).any(0))
    best = np.nanargmin(loss[:, columns], axis=0)
    inner = (N[best] > N.min()) & (N[best] < N.max())
    if len(np.unique(N[best][inner])) < 2:
        return None
    return columns[inner], best[inner]


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.envelope",
        description="Compute-optimal size from the lower envelope of learning curves (approach 1).",
    )
    out.add_argument("--store", required=True, metavar="PATH", help="run store runs/NAME, or a table with --curves")
    out.add_argument("--curves", metavar="CSV", help="wandb history of the runs of the table (default: in the store)")
    out.add_argument("--out", metavar="FIT.JSON", help="write the result as JSON")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, bootstrap=400, seed_noise=False)
    return out


def main(args: argparse.Namespace) -> None:
    from analysis.fit import summary

    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    table = load_table(args.store, required=("N", "D", "C", "loss"), **cli.table_options(args))
    if "run_id" not in table.rows or not (args.curves or Path(args.store).is_dir()):
        raise ValueError(f"--store {args.store}: learning curves are in a run store (a directory): give --curves")
    options = cli.fit_options(args)
    fit = fit_envelope(load_curves(args.curves or args.store), table, options)
    print(summary(fit))
    cli.write_json(args.out, fit.to_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
