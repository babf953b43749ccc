"""Figures of analysis.sparsity: curves over training, loss against sparsity, width/depth, layers and tokens."""

import numpy as np
import pandas as pd

from analysis import plots, sparsity
from analysis.load import DataError


def over_training(found: dict, fits: dict | None = None):
    """Active share against tokens, a panel for each activation, fits with bands where not refused."""
    names = list(dict.fromkeys(key[0] for key in found))
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(len(names))
        for ax, name in zip(axes[0], names, strict=True):
            mine = [key for key in found if key[0] == name]
            for i, key in enumerate(mine):
                rows, colour = found[key], plots.ARCH_COLOURS[i % 7]
                style = {"color": colour, "ms": 4, "alpha": 0.8, "label": sparsity.label(key, rows)}
                ax.plot(rows["D"], rows["A"], plots.MARKERS[i % 7], **style)
                curve = (fits or {}).get(key)
                if curve is None or curve.fit.objective is None:
                    continue
                at = np.geomspace(rows["D"].min(), rows["D"].max(), 100)
                middle, lo, hi = curve.predict(at)
                ax.plot(at, middle, color=colour, ls=":" if curve.refused else "-")
                if not curve.refused:
                    ax.fill_between(at, lo, hi, color=colour, alpha=0.18, lw=0)
            ax.set(xscale="log", xlabel="training tokens D", ylabel="share of active neurons", title=name)
            plots.few_labels(ax.xaxis)
            ax.legend()
    return figure


def against_loss(rows: pd.DataFrame):
    """Rise of the loss against the share left out for each method, a panel for each activation and shape."""
    mine = rows[rows["at"] == "dial"]
    shapes = {key: part for key, part in mine.groupby(sparsity.SHAPE)}
    if not shapes:
        raise DataError("--rows: no loss curves (give --curves to efficient_lm.sparsity)")
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(len(shapes), width=4.4, sharey=True)
        for ax, (key, part) in zip(axes[0], shapes.items(), strict=True):
            for i, (method, points) in enumerate(part.groupby("method", sort=False)):
                means = points.groupby("dial")[["active", "loss", "dense_loss"]].mean()
                rise = (means["loss"] - means["dense_loss"]).clip(lower=1e-5)
                ax.plot(1 - means["active"], rise, plots.MARKERS[i % 7] + "-", ms=4, label=method)
            ax.axhline(np.log(1.01), color="0.5", lw=1, ls="--", label="1 % perplexity")
            ax.set(yscale="log", xlabel="share left out", title=sparsity.label(key, part), ylim=(1e-4, None))
        axes[0, 0].set_ylabel("rise of validation loss (nats per token)")
        axes[0, 0].legend()
    return figure


def width_depth(rows: pd.DataFrame, activation: str = "relu", at: str = "rise"):
    """Active share and validation loss at the last checkpoint against width/depth, of one activation."""
    mine = sparsity.last(rows, at)
    mine = mine[mine["activation"] == activation].sort_values("ratio")
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(2)
        for ax, column, name in zip(
            axes[0], ("active", "loss"), ("share of active neurons", "loss (nats/token)"), strict=True
        ):
            ax.plot(mine["ratio"], mine[column], "o", ms=4, alpha=0.6, color=plots.ARCH_COLOURS[0])
            means = mine.groupby("ratio")[column].mean()
            ax.plot(means.index, means, "-", color=plots.ARCH_COLOURS[0])
            ax.set(xscale="log", xlabel="width / depth", ylabel=name)
    return figure


def by_layer(rows: pd.DataFrame, at: str = "rise"):
    """Active share of each layer at the last checkpoint, and its quantiles over tokens as bars at the right."""
    mine = sparsity.last(rows, at)
    shapes = {key: part for key, part in mine.groupby(sparsity.SHAPE)}
    colours = plots.ARCH_COLOURS if len(shapes) <= len(plots.ARCH_COLOURS) else plots.plt.get_cmap("tab20").colors
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(2)
        for i, (key, part) in enumerate(sorted(shapes.items(), key=lambda item: (item[0][0], item[1]["N"].iloc[0]))):
            colour, name = colours[i % len(colours)], sparsity.label(key, part)
            layers = np.mean(part["active_layers"].tolist(), axis=0)
            axes[0, 0].plot((np.arange(len(layers)) + 0.5) / len(layers), layers, "o-", ms=3, color=colour, label=name)
            low, lower, middle, upper, high = np.mean(part["active_tokens"].tolist(), axis=0)
            axes[0, 1].plot([low, high], [i, i], color=colour, lw=1)
            axes[0, 1].plot([lower, upper], [i, i], color=colour, lw=4)
            axes[0, 1].plot(middle, i, "k|")
        axes[0, 0].set(xlabel="depth", ylabel="share of active neurons", title="by layer")
        axes[0, 0].legend(fontsize=7)
        axes[0, 1].set(xlabel="share of active neurons", title="over tokens: 5, 25, 50, 75, 95 %", yticks=[])
    return figure
