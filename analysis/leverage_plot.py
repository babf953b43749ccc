"""Figures of an efficiency-leverage sweep (`analysis.leverage_sweep`): curves, surface, and the published law."""

import numpy as np

from analysis import plots
from analysis.laws import efficiency_leverage
from analysis.leverage_laws import PUBLISHED, Leverages, evaluate
from analysis.tables import number


def _published(A, G, C):
    return efficiency_leverage.predict(PUBLISHED, {"A": A, "G": G, "C": C}, np)


def _band(axis, x, EL, level, **style):
    """A line and the band of its draws; EL [1 + draws, points]."""
    axis.plot(x, EL[0], **style)
    lo, hi = np.quantile(EL[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    axis.fill_between(x, lo, hi, color=style["color"], alpha=0.15, linewidth=0)


def _ticks(axis, values, text):
    axis.set_xticks(values, [text.format(value) for value in values])
    axis.minorticks_off()


def _points(axis, rows, x, colour, label=None):
    """Measured leverages: open where the dense runs don't reach the loss, triangles where they are lower bounds."""
    bars = np.abs(rows[["EL_lo", "EL_hi"]].to_numpy(float).T - rows["EL"].to_numpy(float))
    axis.errorbar(rows[x], rows["EL"], bars, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2)
    fill = np.where(rows["extrapolated"], "white", colour)
    bound = rows["edge"].to_numpy() != ""
    for marker, chosen in (("o", ~bound), ("^", bound)):
        at = rows[chosen]
        axis.scatter(at[x], at["EL"], s=18, c=fill[chosen], edgecolors=colour, marker=marker, zorder=3)
    axis.plot([], [], "o", markersize=4, color=colour, label=label)


@plots.styled
def curves(found: Leverages, joint: dict):
    """Leverage over activation ratio, granularity and compute: runs, fitted law, published law at the same compute."""
    rows, level = found.rows, found.level
    figure, axes = plots.new_figure(3, width=4.2, height=3.6)
    over_A, over_G, over_C = axes[0]
    budgets = sorted(rows["budget"].unique())
    colours = dict(zip(budgets, plots.ARCH_COLOURS, strict=False))
    A, G = np.geomspace(rows["A"].min() * 0.8, 1.0, 60), np.geomspace(1.8, rows["G"].max() * 1.15, 60)
    fine = rows.loc[rows["G"] > 2, "A"].mode().iloc[0]
    for budget in budgets:
        style = {"color": colours[budget]}
        at = rows["budget"] == budget
        _points(over_A, rows[at & (rows["G"] == 2)], "A", colours[budget], f"{number(budget)} FLOP")
        _points(over_G, rows[at & (rows["A"] == fine)], "G", colours[budget])
        if budget in (budgets[0], budgets[-1]):
            _band(over_A, A, evaluate(joint, A, np.full_like(A, 2.0), np.full_like(A, budget)), level, **style)
            _band(over_G, G, evaluate(joint, np.full_like(G, fine), G, np.full_like(G, budget)), level, **style)
            over_A.plot(A, _published(A, 2.0, budget), linestyle="--", **style)
            over_G.plot(G, _published(fine, G, budget), linestyle="--", **style)
    C = np.geomspace(budgets[0], budgets[-1], 40)
    for i, (A_, part) in enumerate(rows[rows["G"] == 2].groupby("A")):
        style = {"color": plots.ARCH_COLOURS[i % len(plots.ARCH_COLOURS)]}
        _points(over_C, part, "C", style["color"], f"A = {A_:.1%}")
        _band(over_C, C, evaluate(joint, np.full_like(C, A_), np.full_like(C, 2.0), C), level, **style)
    over_A.set(xscale="log", xlabel="activation ratio A", ylabel="efficiency leverage", title="G = 2")
    over_G.set(xscale="log", xlabel="granularity G", title=f"A = {fine:.1%}")
    over_C.set(xscale="log", xlabel="training compute C (FLOP)", title="G = 2")
    _ticks(over_A, [0.03, 0.1, 0.3, 1.0], "{:.0%}")
    _ticks(over_G, sorted(rows["G"].unique()), "{:g}")
    for axis in axes[0]:
        axis.axhline(1.0, color="0.6", linewidth=0.8)
    over_A.plot([], [], color="0.3", linestyle="--", label="published, extrapolated")
    over_A.plot(A, _published(A, 2.0, 1e20), color="0.3", linestyle=":", label="published, 1e20 FLOP")
    over_A.legend()
    over_C.set_ylim(top=1.4 * rows["EL_hi"].max())  # room for the legend
    over_C.legend(ncols=2)
    return figure


@plots.styled
def surface(found: Leverages, joint: dict, G: float = 2.0):
    """The fitted leverage over A and C, the relative width of its interval, and the published law there."""
    rows = found.rows
    A = np.geomspace(rows["A"].min(), rows["A"].max(), 40)
    C = np.geomspace(rows["C"].min(), rows["C"].max(), 40)
    grid_C, grid_A = np.meshgrid(C, A, indexing="ij")
    EL = evaluate(joint, grid_A, np.full_like(grid_A, G), grid_C)
    lo, hi = np.quantile(EL[1:], [(1 - found.level) / 2, (1 + found.level) / 2], axis=0)
    published = _published(grid_A, G, grid_C)
    low, high = min(EL[0].min(), published.min()), max(EL[0].max(), published.max())
    figure, axes = plots.new_figure(3, width=4.2, height=3.6)
    for axis, z, title, limits in (
        (axes[0, 0], EL[0], f"fitted leverage, G = {G:g}", (low, high)),
        (axes[0, 1], (hi - lo) / EL[0], f"width of its {found.level:.0%} interval / leverage", (None, None)),
        (axes[0, 2], published, "published law, extrapolated to here", (low, high)),
    ):
        image = axis.pcolormesh(grid_A, grid_C, z, cmap="viridis", vmin=limits[0], vmax=limits[1], rasterized=True)
        lines = axis.contour(grid_A, grid_C, z, colors="white", linewidths=0.8)
        axis.clabel(lines, fmt="%.3g")
        axis.set(xscale="log", yscale="log", xlabel="activation ratio A", title=title)
        _ticks(axis, [A for A in (0.03, 0.1, 0.3, 0.6) if A >= 0.97 * rows["A"].min()], "{:.0%}")
        axis.grid(False)
        figure.colorbar(image, ax=axis)
    measured = rows[rows["G"] == G]
    axes[0, 0].plot(measured["A"], measured["C"], "k.", markersize=4)
    axes[0, 0].set_ylabel("training compute C (FLOP)")
    return figure
