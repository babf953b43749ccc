"""Loads of the experts of a mixture over training, and how far they specialise in documents, from the run's metrics.

python -m analysis.experts --run runs/moe --out loads.svg
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from analysis import cli, plots
from analysis.load import DataError, load_curves
from pallas_kernels.commands import Parser

SHOWN = 4  # layers, spread over the depth


def loads(run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps [R], loads [R, layers, experts] relative to even ones, information [R]) of a run directory.

    Information: nats that a document tells about the experts of its tokens, mean over layers. Raises DataError.
    """
    curves = load_curves(run)
    if "router_load_profile" not in curves:
        raise DataError(f"--run {run}: has no column 'router_load_profile' in metrics.jsonl, so no mixture of experts")
    rows = curves.dropna(subset=["router_load_profile"])
    information = rows.get("router_document_information", np.full(len(rows), np.nan))
    profile = np.array(rows["router_load_profile"].tolist(), float)
    return rows["step"].to_numpy(), profile, np.asarray(information, float)


@plots.styled
def figure(steps, load, information):
    """Largest and smallest load of each layer, specialisation, and the loads of all experts in some layers.

    Layers are those with experts, counted from 1.
    """
    layers = np.unique(np.linspace(0, load.shape[1] - 1, SHOWN).round().astype(int))
    result, axes = plots.new_figure(2 + len(layers), width=3.2, height=3.0)
    axis, special, *maps = axes[0]
    for i, layer in enumerate(layers):
        colour = plots.ARCH_COLOURS[i]
        axis.plot(steps, load[:, layer].max(-1), color=colour, label=f"expert layer {layer + 1}")
        axis.plot(steps, load[:, layer].min(-1), color=colour, linestyle=":")
    axis.axhline(1.0, color="0.6", linewidth=0.8)
    axis.set(xlabel="step", ylabel="load / mean load", title="largest and smallest (dotted)", ylim=(0, None))
    axis.legend()
    special.plot(steps, information, color=plots.ARCH_COLOURS[0])
    special.axhline(0.0, color="0.6", linewidth=0.8)
    special.set(xlabel="step", ylabel="nats", title="what a document tells about experts")
    for axis, layer in zip(maps, layers, strict=True):
        image = axis.imshow(
            load[:, layer].T, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis", vmin=0,
            vmax=max(2.0, float(np.quantile(load, 0.99))), extent=(steps[0], steps[-1], -0.5, load.shape[2] - 0.5),
        )  # fmt: skip
        axis.set(title=f"expert layer {layer + 1}", xlabel="step", ylabel="expert")
        axis.grid(False)
    result.colorbar(image, ax=maps, label="load / mean load")
    return result


def parser() -> Parser:
    out = Parser(prog="python -m analysis.experts", description=__doc__.partition("\n")[0])
    out.add_argument("--run", required=True, help="run directory of efficient_lm.train")
    out.add_argument("--out", required=True, help="file to write: .svg, .pdf or .png")
    return out


def main(args: argparse.Namespace) -> None:
    if not (Path(args.run) / "metrics.jsonl").is_file():
        raise DataError(f"--run {args.run}: is no run directory (it has no metrics.jsonl)")
    figure(*loads(args.run)).savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
