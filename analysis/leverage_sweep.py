"""Efficiency leverage from an IsoFLOP sweep of dense and sparse architectures, its laws, and what was published.

    python -m analysis.leverage_sweep --store runs/el --out el.json
    python -m analysis.leverage_sweep --store analysis/results/efficiency_leverage/runs.csv --points best \\
        --where "hardware == 'NVIDIA H100 80GB HBM3'" --seed-noise 0.01 # one sweep with one seed, by one revision
    python -m analysis.leverage_sweep --store analysis/results/efficiency_leverage/runs.csv --points best \\
        --where "lr_factor != lr_factor"                                # all runs without the learning-rate arm
    python -m analysis.leverage_sweep --store rows.csv runs/el --save rows.csv     # adds the runs of a store to rows

The leverage (arXiv:2507.17702) of an architecture at a budget is the compute at which the dense law reaches its lowest
loss there, over the budget. That loss is the minimum of an IsoFLOP parabola: through all sizes, or ("best") through the
best size and the nearest two, where the others lie too far out for a parabola; the noise between seeds is then that of
sizes run with several, or given. A budget with fewer than three sizes gives a bound, which no law is fitted to.

A run repeated with the same seed (on a GPU it does not give the same bits) is no second seed: repeats are kept in the
rows, told apart by "-2", "-3" after the run_id, and averaged here before anything is fitted.

The dense law is E + k C^-gamma. The floor E is one for all architectures, k and gamma each has its own: a gamma for all
would deny that leverage changes with compute. Every draw of all losses gives a draw of all leverages, so that the
intervals of the laws know that one dense law is behind them.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import cli
from analysis.frontier import Frontier, frontier_points, share_floor
from analysis.isoflop import Profile, fit_profile
from analysis.leverage_laws import Leverages, report, verdict
from analysis.load import DataError, Table, check_comparable, load_curves, load_table, made_by, read
from analysis.result import Options, interval
from analysis.tables import number, with_interval
from pallas_kernels.commands import Parser

AXES = ("A", "G", "S")
POINTS = ("isoflop", "best")  # parabola through all sizes of a budget, or through its best size and the nearest two
EDGES = {
    "small": "the smallest size is the best",
    "large": "the largest size is the best",
    "few": "fewer than three sizes",
}
REDUNDANT = ["name", "reason", "steps_done", "N_nonemb_head", "C_model_causal"]  # of ended runs: arch, -, steps, N, C


def gather(paths, **options) -> pd.DataFrame:
    """The finished runs of run stores and tables, every run once; `options` as in `analysis.load.read`.

    Rows of one run_id whose losses agree in six decimals are one run. A run_id with another loss was run again and
    becomes "ID-2", "ID-3", ... Raises DataError where there is no column run_id.
    """
    frame = pd.concat([_rows(path, **options) for path in paths], ignore_index=True)
    if not {"run_id", "loss"} <= set(frame):
        raise DataError("columns 'run_id' and 'loss' are needed to tell the runs of several sources apart")
    frame = frame[frame["loss"].notna()].dropna(axis=1, how="all")
    frame = frame.assign(run_id=frame["run_id"].astype(str).str.split("-").str[0])
    frame = frame[~pd.DataFrame({"run": frame["run_id"], "loss": frame["loss"].round(6)}).duplicated()]
    again = frame.groupby("run_id").cumcount() + 1
    return frame.assign(run_id=frame["run_id"].where(again == 1, frame["run_id"] + "-" + again.astype(str)))


def _rows(path, **options) -> pd.DataFrame:
    """The rows of `read`; those of the ended runs of a store with what they ran on and how their routers ended."""
    frame = read(path, **options)[0]
    if not Path(path).is_dir():
        return frame
    frame = frame[frame["loss"].notna()].drop(columns=REDUNDANT)
    facts = pd.DataFrame([made_by(Path(path) / run) for run in frame["run_id"]], index=frame.index)
    routers = load_curves(path).set_index("run_id").filter(like="router_").select_dtypes("number").groupby("run_id")
    return frame.join(facts.rename(columns={"device": "hardware"})).join(routers.last(), on="run_id")


def average_repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each run_id without its "-2": the mean loss of runs that only the hardware tells apart.

    Raises ValueError where two runs have the same arch, budget, size and seed, and so differ in something else.
    """
    if not {"run_id", "seed"} <= set(rows):
        return rows
    run = rows["run_id"].astype(str).str.split("-").str[0]
    clash = run.groupby([rows[name] for name in ("arch", "budget", "N", "seed")]).transform("nunique") > 1
    if clash.any():
        row = rows[clash].iloc[0]
        raise ValueError(
            f"arch {row['arch']!r}, budget {row['budget']:.3g}, N {row['N']:.4g}, seed {row['seed']:g}: several runs "
            "that differ in something else (a learning rate?); choose with --where"
        )
    return rows.assign(loss=rows.groupby(run)["loss"].transform("mean"))[~run.duplicated()]


def sweep_leverages(
    table: Table, base: str = "dense", points: str = "isoflop", options: Options | None = None
) -> Leverages:
    """The leverage of every architecture but `base` at each of its budgets; columns N, C, loss, budget, A, G, S.

    `points` as in POINTS. Raises ValueError where `base`, or all others, have no two budgets that can be used.
    """
    options, notes = options or Options(), []
    check_comparable(table)
    if "arch" not in table.rows:
        raise DataError(
            f"column 'arch' is missing in {table.source}: it names the architecture; name it with --columns"
        )
    for name in {"G", "S"} - set(table.rows):
        notes.append(f"no column {name}: all sparse architectures are taken to have the same")
    every = average_repeats(table.rows)
    noise = (options.seed_noise, np.inf) if options.seed_noise else None
    if points == "best":
        noise = noise or seed_noise(every)
        source = f"{noise[1]:g} degrees of freedom" if np.isfinite(noise[1]) else "given"
        notes.append(f"loss between seeds varies by {noise[0]:.2g} nats ({source})")
    frontiers, labels = [], {}
    for name, rows in every.groupby("arch", sort=False):
        try:
            if points == "best":
                frontiers.append(best_sizes(rows, name, noise, options))
            else:
                frontiers.append(frontier_points(rows, name, options))
        except ValueError as error:
            if name == base:
                raise
            notes.append(str(error))
            continue
        labels[name] = {key: float(rows[key].iloc[0]) if key in rows else np.nan for key in AXES}
    names = [frontier.name for frontier in frontiers]
    if base not in names or len(names) < 2:
        raise ValueError(f"arch {base!r} and another one are needed; {table.source} has {', '.join(names) or 'none'}")
    frontiers = share_floor(frontiers)
    dense = frontiers[names.index(base)]
    off = np.sqrt(np.mean((dense.law(dense.C)[0] - dense.loss) ** 2))
    notes.append(
        f"{base} law: {dense.floor:.3g} + {dense.k:.3g} C^-{dense.gamma:.3g} through {len(dense.C)} budgets, rms error "
        f"{off:.2g} nats"
    )
    rows, draws = [], []
    for frontier in frontiers:
        usable = [profile for profile in frontier.profiles if profile.coefficients is not None]
        budgets = [float(every.loc[profile.rows[0], "budget"]) for profile in usable]
        if frontier is dense:
            edges = ", ".join(f"{budget:.3g}" for budget, at in zip(budgets, usable, strict=True) if at.edge)
            if edges:
                notes.append(
                    f"{base}: the best size lacks a neighbour at {edges} FLOP, so these losses are upper bounds"
                )
            continue
        value, drawn = dense.compute_for(frontier.loss, frontier.loss_draws)
        for i, (C, budget, profile) in enumerate(zip(frontier.C, budgets, usable, strict=True)):
            EL = interval(value[i] / C, drawn[:, i] / C, options.level)
            inside = dense.C.min() * 0.97 <= value[i] <= dense.C.max() * 1.03
            rows.append({
                "arch": frontier.name, **labels[frontier.name], "budget": budget, "C": C,
                "loss": frontier.loss[i], "EL": EL["value"], "EL_lo": EL["lo"], "EL_hi": EL["hi"],
                "extrapolated": not inside, "edge": profile.edge or "",
            })  # fmt: skip
            draws.append(drawn[:, i] / C)
    return Leverages(pd.DataFrame(rows), np.stack(draws, 1), notes, options.level, dense)


def best_sizes(rows: pd.DataFrame, name: str, noise: tuple[float, float], options: Options) -> Frontier:
    """The frontier through the minima of parabolas, each of the best size of a budget and the nearest two.

    A budget with fewer sizes gives the loss of its best one. `noise`: standard deviation of the loss of a run and its
    degrees of freedom. Raises ValueError where there is only one budget.
    """
    found = []
    for i, (_, part) in enumerate(rows.groupby("budget")):
        seed = options.seed + (zlib.crc32(name.encode()) << 32) + i  # no two architectures share their draws
        mean = part.groupby("N")["loss"].mean()
        at = int(mean.argmin())
        if len(mean) < 3:
            found.append(_one_size(part[part["N"] == mean.index[at]], noise, options.bootstrap, seed))
            continue
        first = min(max(at - 1, 0), len(mean) - 3)
        part = part[part["N"].isin(mean.index[first : first + 3])]
        profile = fit_profile(
            part["C"].mean(), part["N"], part["loss"], part.index, draws=options.bootstrap, level=options.level,
            noise=noise, seed=seed,
        )  # fmt: skip
        profile.edge = {0: "small", len(mean) - 1: "large"}.get(at)
        found.append(profile)
    if len(found) < 2:
        raise ValueError(f"{name}: {len(found)} budget; a frontier needs 2")
    loss, draws = np.array([p.best for p in found]), np.stack([p.best_draws for p in found], 1)
    return Frontier(name, np.array([p.C for p in found]), loss, draws, found).with_floor(0.0, 0.0)


def _one_size(rows: pd.DataFrame, noise: tuple[float, float], draws: int, seed: int) -> Profile:
    (sigma, freedom), rng, loss = noise, np.random.default_rng(seed), rows["loss"].mean()
    spread = rng.standard_normal(draws) * sigma / len(rows) ** 0.5
    if np.isfinite(freedom):
        spread *= np.sqrt(freedom / rng.chisquare(freedom, draws))
    return Profile(
        rows["C"].mean(), rows["N"].to_numpy(), rows["loss"].to_numpy(), rows.index.to_numpy(), 0.0,
        coefficients=np.array([loss, 0.0, 0.0]), best=loss, best_draws=loss + spread, edge="few",
    )  # fmt: skip


def seed_noise(rows: pd.DataFrame) -> tuple[float, float]:
    """Standard deviation of the loss between seeds and its degrees of freedom, pooled over the sizes run with several.

    Sizes worse than the best of their budget by more than a tenth of a nat don't count: they barely train. Raises
    ValueError where no seed was changed.
    """
    squares = freedom = 0
    for _, part in rows.groupby(["arch", "budget"]):
        sizes = part.groupby("N")["loss"]
        near = sizes.transform("mean") < sizes.mean().min() + 0.1
        squares += float(((part["loss"] - sizes.transform("mean"))[near] ** 2).sum())
        freedom += int(near.sum()) - part.loc[near, "N"].nunique()
    if not freedom:
        raise ValueError("no size near the best was run with two seeds: give their spread, --seed-noise NATS")
    return (squares / freedom) ** 0.5, freedom


# ---------------------------------------------------------------------------------------------- command line


def _few(laws: list, needed: str) -> str:
    return "" if laws else f": no budget has {needed}"


def text(found: dict) -> str:
    lines = [f"{'architecture':<28} {'C':>9} {'loss':>7}  {'leverage':<22} published law there"]
    for row in found["rows"]:
        EL = with_interval({"value": row["EL"], "lo": row["EL_lo"], "hi": row["EL_hi"]})
        flags = ["beyond the dense runs"] * row["extrapolated"]
        if row["edge"]:
            flags.append(f"at least: {EDGES[row['edge']]}")
        note = "   " + "; ".join(flags) if flags else ""
        lines.append(
            f"{row['arch']:<28} {number(row['C']):>9} {row['loss']:>7.4f}  {EL:<22} {number(row['published']):>5}{note}"
        )
    lines.append(f"\nln EL = a ln(A + A_s), the coarsest experts{_few(found['activation'], 'three activation ratios')}")
    for law in found["activation"]:
        lines.append(f"  C {number(law['budget'])}: a {with_interval(law['a'])}, A_s {with_interval(law['A_s'])}")
    for step in found["steps"]:
        lines.append(
            f"  C {number(step['budget'])}: EL at A {step['A']:.3g} over that at {step['of']:.3g} "
            f"{with_interval(step['ratio'])}{'   one or both a lower bound' if step['bound'] else ''}"
        )
    lines.append(f"ln EL = a + b g (g + c), g = log2 G{_few(found['granularity'], 'three granularities')}")
    for law in found["granularity"]:
        lines.append(
            f"  C {number(law['budget'])}, A {law['A']:.3g}: curvature b {with_interval(law['b'])}, "
            + (f"best G {with_interval(law['G_opt'])}" if law["b"]["hi"] < 0 else "no best G is resolved")
        )
    for law in found["finest"]:
        gain = with_interval({key: np.exp(law["gain"][key]) for key in ("value", "lo", "hi")})
        lines.append(f"  C {number(law['budget'])}, A {law['A']:.3g}: EL of the finest over the coarsest {gain}")
    lines.append("ln EL = a ln C + c")
    for law in found["compute"]:
        without = f"   not resolved without {' or '.join(map(number, law['hangs_on']))} FLOP" if law["hangs_on"] else ""
        lines.append(f"  {law['arch']}: a {with_interval(law['a'])}{without}")
    lines.append("published claims (2507.17702; those runs took 3e18 to 3e20 FLOP)")
    lines += [f"  {what}: {answer}" for what, answer in found["claims"].items()]
    notes = [f"note: {note}" for note in found["notes"]]
    if not found["joint"]:
        return "\n".join([*lines, f"no joint law: {found['joint_refused']}", *notes])
    lines.append(
        f"joint law, residual {found['joint_rms']:.3f} in ln EL; published constants were fitted at 3e18-3e20 FLOP; "
        "alpha = a + d log10 C at the dearest budget"
    )
    for name, entry in found["joint"].items():
        lines.append(
            f"  {name:<6} {with_interval(entry):<30} published {number(entry['published'])}: "
            f"{verdict(entry, entry['published'])}"
        )
    held = found["holdout"]
    if held:
        lines.append(
            f"joint law without {number(held['budget'])} FLOP, against the {held['n']} leverages there: rms error "
            f"of ln EL {held['rms']:.3f}, {held['covered']:.0%} inside their intervals; of the published law "
            f"{held['published_rms']:.3f}"
        )
    lines.append("the fitted law turned round")
    for row in found["inverse"]:
        lines.append(
            f"  EL {row['EL']:g} at G {row['G']:g}, C {number(row['C'])}: A {with_interval(row['A'])} "
            f"({row['share']:.0%} of the draws have one)"
        )
    return "\n".join([*lines, *notes])


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.leverage_sweep",
        description="Efficiency leverage of the sparse architectures of an IsoFLOP sweep, with its laws.",
    )
    out.add_argument(
        "--store", required=True, nargs="+", metavar="PATH",
        help="run stores, or CSVs with arch, N, C, loss, budget, A (experts used over all), and where they vary G "
        "(2 d_model / d_expert) and S (shared experts over those used); a run that several of them have counts once",
    )  # fmt: skip
    out.add_argument("--base", default="dense", help="the dense architecture (default dense)")
    out.add_argument(
        "--points", choices=POINTS, default=POINTS[0], help="parabola through all sizes, or three at the best"
    )
    out.add_argument("--out", metavar="EL.JSON", help="write everything as JSON")
    out.add_argument("--save", metavar="ROWS.CSV", help="write the runs that were read, each once, and stop")
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    cli.check_out(args.out)
    cli.check_out(args.save, "--save")
    if args.bootstrap < 2:
        raise ValueError(f"--bootstrap {args.bootstrap}: the laws need draws, at least 2")
    if args.save and args.where:
        raise ValueError("--save keeps every run: leave out --where")
    data = args.store[0]
    if args.save or len(args.store) > 1:
        data = gather(args.store, n=args.n, c=args.c)
    if args.save:
        data.to_csv(args.save, index=False)
        print(f"{len(data)} runs in {args.save}")
        return
    required = ("N", "C", "loss", "budget", "A")
    options = cli.table_options(args)
    if isinstance(data, pd.DataFrame):  # `gather` has read --n and --c
        options |= {"n": None, "c": None}
    table = load_table(data, required=required, **options)
    options = cli.fit_options(args)
    found = report(sweep_leverages(table, args.base, args.points, options))
    print(table.summary())
    print(text(found))
    cli.write_json(args.out, found)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
