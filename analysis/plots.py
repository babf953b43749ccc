"""Figures: loss curves, IsoFLOP profiles, parametric fits, frontiers, gains. Each function returns a matplotlib Figure.

Compute is a colour scale (viridis without its palest end), architectures are colours of Okabe and Ito with a marker
each, so that both survive colour blindness and grey print. Figures belong to no window and no backend: a notebook shows
them, and `save` writes them for a paper.
"""

import functools
import io
import itertools
import re
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from analysis.frontier import TITLES, Frontier, common_range, ratios, share_floor
from analysis.isoflop import Profile, power_law

ARCH_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<P"
COMPUTE = LinearSegmentedColormap.from_list("compute", plt.get_cmap("viridis")(np.linspace(0.0, 0.85, 64)))
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 8.5, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "svg.hashsalt": "analysis", "lines.linewidth": 1.6,
}  # fmt: skip


def looks(names, first: int = 0) -> dict:
    """A colour and a marker for each name; names whose colours repeat get another marker. `first`: colours to skip."""
    colours, markers = ARCH_COLOURS[first:], MARKERS[first:]
    count = len(colours)
    return {name: (colours[i % count], markers[(i + i // count) % count]) for i, name in enumerate(names)}


def styled(draw):
    @functools.wraps(draw)
    def inner(*args, **kwargs):
        with plt.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


class Picture(Figure):
    """A figure that a notebook shows as the value of a cell, whatever its matplotlib backend."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def new_figure(columns=1, rows=1, width=5.2, height=4.0, **kwargs):
    """A figure and its axes [rows, columns], each panel `width` x `height` inches; kwargs as of `Figure.subplots`."""
    figure = Picture(figsize=(width * columns, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save(figures: dict, folder) -> list[Path]:
    """Writes each figure as NAME.svg and NAME.pdf, for a paper; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.{kind}" for name in figures for kind in ("svg", "pdf")]
    with plt.rc_context(STYLE):
        for path, figure in zip(paths, (f for f in figures.values() for _ in range(2)), strict=True):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"CreationDate": None})
    return paths


def _norm(values) -> LogNorm:
    lo, hi = float(np.min(values)), float(np.max(values))
    return LogNorm(lo, hi) if hi > lo * 1.01 else LogNorm(lo / 2, hi * 2)


def _plain_log(axis, maximum: int = 6) -> None:
    """A log axis over less than a decade or two, labelled with plain numbers."""
    lo, hi = sorted(axis.get_view_interval())
    if hi / lo > 30:
        return
    wide = hi / lo > 4
    digits = (1, 2, 3, 5, 7) if hi / lo < 12 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=digits) if wide else MaxNLocator(maximum, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(LogLocator(subs=[]))
    axis.set_minor_formatter(NullFormatter())


def few_labels(axis) -> None:
    """A log axis over one to two decades: minor labels at 2 and 5 only, so that they don't run into each other."""
    lo, hi = sorted(axis.get_view_interval())
    if hi / lo < 100:
        axis.set_minor_formatter(FuncFormatter(lambda value, _: _power(value) if f"{value:.0e}"[0] in "25" else ""))


def _power(value: float) -> str:
    digit, exponent = f"{value:.0e}".split("e")
    return f"${digit}\\times10^{{{int(exponent)}}}$"


def _budget(C: float) -> str:
    return f"{C:.2g}".replace("e+", "e")


def _colour_bar(figure, axes, norm, label="training compute C (FLOP)"):
    scale = plt.cm.ScalarMappable(norm, COMPUTE)
    figure.colorbar(scale, ax=axes, label=label, pad=0.02, aspect=30)


@styled
def loss_curves(curves, runs, *, group: str = "arch", excluded=None):
    """Training loss against training FLOPs, smoothed, one panel per architecture.

    Args:
      curves: from `load.load_curves`, columns run_id, flops, loss.
      runs: rows with run_id, C and `group`; coloured by C, with a dot at the final (validation) loss.
      excluded: rows left out, drawn as dashed grey lines.
    """
    names = list(dict.fromkeys(runs[group])) if group in runs else ["all runs"]
    figure, axes = new_figure(len(names), sharex=True, sharey=True)
    norm = _norm(runs["C"])
    lines = {key: part for key, part in curves.groupby("run_id")} if len(curves) else {}
    finals = [curve["loss"].iloc[-1] for curve in lines.values() if np.isfinite(curve["loss"].iloc[-1])]
    for ax, name in zip(axes[0], names, strict=True):
        mine = runs[runs[group] == name] if group in runs else runs
        lost = excluded if excluded is None or group not in excluded else excluded[excluded[group] == name]
        for run_id in [] if lost is None or "run_id" not in lost else lost["run_id"]:
            if run_id in lines:
                ax.plot(*_smooth(lines[run_id]), color="0.6", lw=0.9, ls="--", label="excluded")
        for run in mine.sort_values("C").itertuples():
            colour = COMPUTE(norm(run.C))
            if run.run_id in lines:
                ax.plot(*_smooth(lines[run.run_id]), color=colour, lw=1.1, alpha=0.9)
            ax.plot(run.C, run.loss, "o", color=colour, ms=4, mec="white", mew=0.5)
        ax.set(xscale="log", yscale="log", title=str(name), xlabel="training compute so far (FLOP)")
        ax.plot([], [], "o", color="0.4", ms=4, label="final validation loss")
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        ax.legend(unique.values(), unique.keys(), loc="lower left")
    if finals:
        low = min(min(finals), runs["loss"].min())
        axes[0, 0].set_xlim(runs["C"].min() / 50, runs["C"].max() * 1.5)
        axes[0, 0].set_ylim(low * 0.97, max(low * 2.2, runs["loss"].max() * 1.15))
    axes[0, 0].set_ylabel("training loss (nats/token), smoothed")
    _plain_log(axes[0, 0].yaxis)
    _colour_bar(figure, axes, norm)
    return figure


def _smooth(curve, per_decade: int = 10):
    """Means over bins of equal width in log compute: the loss of a single batch is too noisy to draw."""
    curve = curve[np.isfinite(curve["loss"].astype(float)) & (curve["flops"] > 0)]
    bins = np.floor(per_decade * np.log10(curve["flops"].to_numpy(float)))
    means = curve[["flops", "loss"]].astype(float).groupby(bins).mean()
    return means["flops"].to_numpy(), means["loss"].to_numpy()


@styled
def envelopes(fits: dict, curves, runs, *, group: str = "arch"):
    """Approach 1: learning curves with their lower envelope, and below it the size of the best run against compute.

    Args:
      fits: name -> Fit of `envelope.fit_envelope`, none of them refused.
      curves, runs: as for `loss_curves`.
    """
    figure, axes = new_figure(len(fits), 2, height=3.2, sharex=True, sharey="row")
    lines = {key: part for key, part in curves.groupby("run_id")}
    for (top, bottom), (name, fit) in zip(axes.T, fits.items(), strict=True):
        mine = runs[runs[group] == name] if group in runs else runs
        for run_id in mine["run_id"]:
            if run_id in lines:
                top.plot(*_smooth(lines[run_id]), color="0.75", lw=0.8)
        C, N, loss = (np.array([point[key] for point in fit.quality["envelope"]]) for key in ("C", "N", "loss"))
        top.plot(C, loss, ".", color=ARCH_COLOURS[1], ms=4, label="lower envelope, inner sizes")
        top.set(
            xscale="log",
            yscale="log",
            title=name,
            xlim=(C[0] / 3, C[-1] * 3),
            ylim=(loss.min() * 0.9, loss.max() * 1.3),
        )
        top.legend()
        bottom.plot(C, N, ".", color=ARCH_COLOURS[1], ms=4, label="size of the best run")
        law = fit.params["A_N"]["value"] * C ** fit.params["a_N"]["value"]
        bottom.plot(C, law, color=ARCH_COLOURS[0], label=f"N* ∝ $C^{{{fit.params['a_N']['value']:.2f}}}$")
        bottom.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)")
        bottom.legend()
    axes[0, 0].set_ylabel("training loss (nats/token)")
    axes[1, 0].set_ylabel("parameters N")
    _plain_log(axes[0, 0].yaxis)
    few_labels(axes[1, 0].xaxis)
    return figure


@styled
def isoflop(profiles: dict[str, list[Profile]], *, level: float = 0.95, xlabel="parameters N"):
    """IsoFLOP profiles, one panel per architecture: points, parabolas, minima with intervals; refused ones hollow."""
    figure, axes = new_figure(len(profiles), sharex=True, sharey=True, height=4.4)
    norm = _norm([p.C for found in profiles.values() for p in found])
    for ax, (name, found) in zip(axes[0], profiles.items(), strict=True):
        for p in found:
            colour = COMPUTE(norm(p.C))
            label = f"C = {_budget(p.C)}" + (f" ({p.refused.split(':')[0]})" if p.refused else "")
            ax.plot(p.x, p.loss, "o", color=colour, ms=4.5, mfc="white" if p.refused else colour, label=label)
            if p.coefficients is not None:
                ax.plot(*p.curve(), color=colour, lw=1.3, ls="--" if p.refused else "-")
            if p.refused is None:
                lo, hi = np.nanquantile(p.x_draws, [(1 - level) / 2, (1 + level) / 2])
                bar = [[max(p.x_opt - lo, 0)], [max(hi - p.x_opt, 0)]]
                ax.errorbar(p.x_opt, p.loss_opt, xerr=bar, fmt="*", color="black", ms=10, capsize=3, lw=1.2, zorder=5)
        good = [p for p in found if p.refused is None]
        if good:
            ax.plot([p.x_opt for p in good], [p.loss_opt for p in good], ":", color="black", lw=1, zorder=4)
            ax.plot([], [], "*", color="black", ms=9, label=f"minimum, {level:.0%} interval")
        ax.set(xscale="log", yscale="log", title=name, xlabel=xlabel)
        ax.legend(loc="upper right")
    sizes = np.concatenate([p.x for found in profiles.values() for p in found])
    losses = np.concatenate([p.loss for found in profiles.values() for p in found])
    room = (losses.max() / losses.min()) ** 0.30  # for the legend
    axes[0, 0].set_xlim(sizes.min() / 1.3, sizes.max() * 1.3)
    axes[0, 0].set_ylim(losses.min() / 1.01, losses.max() * room)
    axes[0, 0].set_ylabel("final loss (nats/token)")
    few_labels(axes[0, 0].xaxis)
    _plain_log(axes[0, 0].yaxis)
    return figure


@styled
def parametric(fit, law, frame, *, title: str = ""):
    """A fit of `loss(N, D)`: predicted against observed, and lines of equal loss in the (N, D) plane."""
    figure, axes = new_figure(2, height=4.3)
    x = {name: frame[name].to_numpy(float) for name in ("N", "D")}
    observed, predicted = frame["loss"].to_numpy(float), law.predict(fit.values, x, np)
    C = frame["C"].to_numpy(float) if "C" in frame else 6 * x["N"] * x["D"]
    norm = _norm(C)
    left, right = axes[0]
    span = np.array([min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]) * [0.985, 1.015]
    left.plot(span, span, color="0.5", lw=1)
    left.fill_between(span, span * 0.99, span * 1.01, color="0.5", alpha=0.15, lw=0, label="within 1 %")
    left.scatter(predicted, observed, c=C, cmap=COMPUTE, norm=norm, s=26, edgecolors="white", linewidths=0.5, zorder=3)
    left.set(
        xscale="log",
        yscale="log",
        xlim=span,
        ylim=span,
        xlabel="predicted loss (nats/token)",
        ylabel="observed loss (nats/token)",
        title=f"{title}: parametric fit" if title else "parametric fit",
    )
    left.text(0.03, 0.97, f"rms error {fit.quality['rmse_log']:.2%}", transform=left.transAxes, va="top")
    left.legend(loc="lower right")
    for axis in (left.xaxis, left.yaxis):
        _plain_log(axis, 5)
    N = np.geomspace(x["N"].min() / 1.5, x["N"].max() * 1.5, 120)
    D = np.geomspace(x["D"].min() / 1.5, x["D"].max() * 1.5, 120)
    grid = law.predict(fit.values, {"N": N[None, :], "D": D[:, None]}, np)
    levels = np.quantile(grid, np.linspace(0.02, 0.95, 11))
    lines = right.contour(N, D, grid, levels=np.unique(np.round(levels, 2)), colors="0.45", linewidths=0.9)
    right.clabel(lines, fmt="%.2f", fontsize=8)
    points = right.scatter(
        x["N"], x["D"], c=C, cmap=COMPUTE, norm=norm, s=26, edgecolors="white", linewidths=0.5, zorder=3
    )
    factor = fit.settings.get("flops_factor") or 6.0
    best = law.optimum(fit.values, np.geomspace(factor * N[0] * D[0], factor * N[-1] * D[-1], 200), factor)
    right.plot(best["N"], best["D"], color=ARCH_COLOURS[1], lw=2, label="compute-optimal")
    right.set(
        xscale="log", yscale="log", xlim=(N[0], N[-1]), ylim=(D[0], D[-1]), xlabel="parameters N", ylabel="tokens D",
        title="lines of equal predicted loss",
    )  # fmt: skip
    right.legend(loc="upper left", frameon=True, framealpha=0.9)
    for axis in (right.xaxis, right.yaxis):
        few_labels(axis)
    figure.colorbar(points, ax=right, label="training compute C (FLOP)", pad=0.02, aspect=30)
    return figure


@styled
def residuals(fit, law, frame, *, title: str = ""):
    """Observed over predicted loss, minus 1, against parameters, tokens and compute: structure means a missing term."""
    figure, axes = new_figure(3, width=4.2, height=3.4, sharey=True)
    x = {variable.name: frame[variable.name].to_numpy(float) for variable in law.variables}
    rest = 100 * (frame[law.target.name].to_numpy(float) / law.predict(fit.values, x, np) - 1)
    C = frame["C"].to_numpy(float) if "C" in frame else 6 * x["N"] * x["D"]
    norm = _norm(C)
    for ax, values, label in zip(
        axes[0], (x["N"], x["D"], C), ("parameters N", "tokens D", "training compute C (FLOP)"), strict=True
    ):
        ax.axhline(0, color="0.5", lw=1)
        ax.scatter(values, rest, c=C, cmap=COMPUTE, norm=norm, s=26, edgecolors="white", linewidths=0.5, zorder=3)
        ax.set(xscale="log", xlabel=label)
        few_labels(ax.xaxis)
    axes[0, 0].set(ylabel="observed - predicted loss (%)", title=f"{title}: residuals" if title else "residuals")
    _colour_bar(figure, axes, norm)
    return figure


@styled
def holdout(fits: dict):
    """Runs held out of the fit: observed over predicted, minus 1, and the predicted intervals, by predicted value.

    `fits`: name -> Fit whose hold-out was not refused.
    """
    figure, axes = new_figure(len(fits), width=4.6, height=3.6, sharey=True)
    for ax, (name, fit) in zip(axes[0], fits.items(), strict=True):
        held, level = fit.holdout, fit.settings["level"]
        at, observed, lo, hi = (
            np.array([point[key] for point in held["points"]]) for key in ("predicted", "observed", "lo", "hi")
        )
        observed, lo, hi = (100 * (values / at - 1) for values in (observed, lo, hi))
        inside = (observed >= lo) & (observed <= hi)
        ax.axhline(0, color="0.5", lw=1)
        ax.vlines(at, lo, hi, color=ARCH_COLOURS[0], alpha=0.45, lw=2, label=f"{level:.0%} interval")
        for which, colour, marker in ((inside, ARCH_COLOURS[0], "o"), (~inside, ARCH_COLOURS[1], "D")):
            label = f"{which.sum()} {'inside' if which is inside else 'outside'}"
            ax.plot(at[which], observed[which], marker, color=colour, ms=4.5, label=label)
        ax.margins(x=0.08, y=0.2)  # room for the legend
        title = f"{name}: fitted up to {held['column']} = {_budget(held['fitted_up_to'])}"
        target, unit = list(fit.data["units"].items())[-1]
        ax.set(xscale="log", xlabel=f"predicted {target} of the held-out runs ({unit})", title=title)
        _plain_log(ax.xaxis, 5)
        ax.legend()
    axes[0, 0].set_ylabel("observed - predicted (%)")
    return figure


@styled
def allocation(optima: dict, *, ylabel: str = "optimal parameters N*(C)"):
    """The best size against compute by several laws: name -> (C [points], N* [points], draws [draws, points] or None).

    Bands are the central 95 % of the draws.
    """
    figure, axes = new_figure(width=6.0)
    ax, styles = axes[0, 0], itertools.cycle(("-", "--", "-.", ":"))
    for (name, (C, value, draws)), colour, style in zip(optima.items(), itertools.cycle(ARCH_COLOURS), styles):
        ax.plot(C, value, style, color=colour, label=name)
        if draws is not None:
            ax.fill_between(C, *np.nanquantile(draws, [0.025, 0.975], axis=0), color=colour, alpha=0.18, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)", ylabel=ylabel)
    ax.legend()
    return figure


@styled
def curve(law, fits: dict, x: str, *, level: float = 0.95, scale: str = "log", title: str = ""):
    """Points, fitted curves and their bands against one variable of any law.

    Args:
      fits: name -> (Fit, frame of rows); the law's other variables are held at the median of the frame.
      x: the variable along the axis; `scale` of that axis: log or linear.
    """
    figure, axes = new_figure(width=6.0)
    ax, quantiles, seen = axes[0, 0], [(1 - level) / 2, (1 + level) / 2], []
    unit = next(v.unit for v in law.variables if v.name == x)
    for (name, (fit, frame)), (colour, marker) in zip(fits.items(), looks(fits).values(), strict=True):
        values = frame[x].to_numpy(float)
        low = values[values > 0].min() if scale == "log" else values.min()
        at = (np.geomspace if scale == "log" else np.linspace)(low, values.max(), 200)
        where = {v.name: np.full(200, frame[v.name].median()) for v in law.variables} | {x: at}
        ax.plot(values, frame[law.target.name], marker, color=colour, ms=4, alpha=0.8, label=name)
        ax.plot(at, law.predict(fit.values, where, np), color=colour)
        seen += [*frame[law.target.name], *law.predict(fit.values, where, np)]
        if fit.draws:
            draws = {key: fit.draws[key][:, None] if key in fit.draws else fit.values[key] for key in fit.values}
            with np.errstate(all="ignore"):
                band = np.nanquantile(law.predict(draws, where, np), quantiles, axis=0)
            ax.fill_between(at, *band, color=colour, alpha=0.18, lw=0)
    ax.set(xscale=scale, xlabel=f"{x} ({unit})", ylabel=f"{law.target.name} ({law.target.unit})", title=title)
    if seen:  # a wide band must not squeeze the points into a corner
        room = 0.35 * np.ptp(seen) or 1.0
        ax.set_ylim(np.nanmin(seen) - room, np.nanmax(seen) + room)
    ax.legend()
    return figure


@styled
def frontiers(found: dict[str, Frontier], *, level: float = 0.95):
    """L*(C) and N*(C) of each architecture with bands; a budget without an accepted minimum is hollow."""
    figure, axes = new_figure(2, height=4.2)
    left, right = axes[0]
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    for (name, f), (colour, marker) in zip(found.items(), looks(found).values(), strict=True):
        C = np.geomspace(f.C.min() / 1.3, f.C.max() * 1.3, 60)
        line, draws = f.law(C)
        left.plot(C, line, color=colour, lw=1.6)
        left.fill_between(C, *np.nanquantile(draws, quantiles, axis=0), color=colour, alpha=0.15, lw=0)
        bars = np.abs(np.nanquantile(f.loss_draws, quantiles, axis=0) - f.loss)
        left.errorbar(f.C, f.loss, yerr=bars, fmt=marker, color=colour, ms=5, capsize=2, lw=1, label=name)
        good = [p for p in f.profiles if p.refused is None]
        for p in good:
            lo, hi = np.nanquantile(p.x_draws, quantiles)
            bar = [[max(p.x_opt - lo, 0)], [max(hi - p.x_opt, 0)]]
            right.errorbar(p.C, p.x_opt, yerr=bar, fmt=marker, color=colour, ms=5, capsize=2, lw=1)
        label = name
        if len(good) >= 2:
            at = np.array([p.C for p in good])
            A, a = power_law(at, [p.x_opt for p in good])
            A_draws, a_draws = power_law(at, np.stack([p.x_draws for p in good], -1))
            band = np.log(A_draws)[:, None] + a_draws[:, None] * np.log(C)
            right.plot(C, A * C**a, color=colour)
            right.fill_between(C, *np.exp(np.nanquantile(band, quantiles, axis=0)), color=colour, alpha=0.15, lw=0)
            label = f"{name}: N* ∝ $C^{{{a:.2f}}}$"
        right.plot([], [], marker, color=colour, label=label)
        for p in f.profiles:
            if p.refused and p.coefficients is not None:
                best = p.x[np.argmin(p.loss)]
                right.plot(p.C, best, marker, color=colour, mfc="white", ms=6)
    if any(p.refused for f in found.values() for p in f.profiles):
        right.plot([], [], "o", color="0.4", mfc="white", label="best size run, minimum refused")
    left.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)", ylabel="lowest loss L*(C) (nats/token)")
    right.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)", ylabel="optimal parameters N*(C)")
    for ax in (left, right):
        ax.legend()
        few_labels(ax.xaxis)
    # a wide band must not squeeze the points into a corner
    sizes = np.concatenate([p.x for f in found.values() for p in f.profiles])
    right.set_ylim(sizes.min() / 1.5, sizes.max() * 1.5)
    losses = np.concatenate([f.loss for f in found.values()])
    left.set_ylim(
        losses.min() ** 1.15 / losses.max() ** 0.15 * 0.98, losses.max() ** 1.15 / losses.min() ** 0.15 * 1.02
    )
    _plain_log(left.yaxis)
    return figure


@styled
def gain(found: dict[str, Frontier], base: str, level: float = 0.95):
    """What `base` spends over what each other architecture spends at equal loss, against compute, with bands.

    One panel for compute and one for each other cost that the frontiers have; dashed beyond the losses that the base
    reaches. `found` holds frontiers; each pair gets its own shared floor, as in `frontier.compare`. Architectures that
    share no range of compute with the base are left out; ValueError where none is left.
    """
    variants, curves = [name for name in found if name != base], {}
    for name in variants:
        b, v = share_floor([found[base], found[name]])
        lo, hi = common_range(b, v)
        at = v.C[(v.C >= lo) & (v.C <= hi)]
        if not len(at):
            continue
        C = np.union1d(np.geomspace(lo, hi, 60), at)
        curves[name] = (C, np.isin(C, at), b.C, ratios(b, v, C))
    if not curves:
        raise ValueError(f"no architecture shares a range of compute with {base}: there is nothing to draw")
    look = looks(variants, first=1)
    costs = [cost for cost in TITLES if any(cost in curve[-1] for curve in curves.values())]
    columns = min(len(costs), 2)
    figure, axes = new_figure(columns, -(-len(costs) // columns), width=5.2 if columns > 1 else 6.2, height=3.6)
    for spare in axes.flat[len(costs) :]:
        spare.remove()
    for ax, cost in zip(axes.flat, costs, strict=False):
        ax.axhline(1, color=ARCH_COLOURS[0], lw=1.5, label=f"{base} (base)")
        top = [1.0]
        for name, (C, run, reach, all_ratios) in curves.items():
            if cost not in all_ratios:
                continue
            colour, marker = look[name]
            value, draws = all_ratios[cost]
            band = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
            need = all_ratios["compute"][0] * C
            inside = (need <= reach.max() * 1.03) & (need >= reach.min() * 0.97)
            ax.fill_between(C, *band, color=colour, alpha=0.18, lw=0)
            ax.plot(C, value, "--", color=colour, lw=1.3)
            ax.plot(np.where(inside, C, np.nan), value, color=colour)
            ax.plot(C[run], value[run], marker, color=colour, ms=5, label=name)
            top += [*value, *np.clip(band[0], value / 4, None), *np.clip(band[1], None, value * 4)]
        ax.plot([], [], "--", color="0.4", lw=1.3, label="beyond the base's runs")
        ax.set(xscale="log", yscale="log", xlabel="training compute C (FLOP)", ylabel="base / variant (×)")
        ax.set(ylim=(min(top) / 1.15, max(top) * 1.25), title=f"{TITLES[cost]} at equal loss")
        _plain_log(ax.yaxis)
        few_labels(ax.xaxis)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title=f"{level:.0%} bands"
    )
    return figure
