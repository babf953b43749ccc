"""Size and length of a model that is trained once and then used, Sardana et al., arXiv:2401.00448.

    python -m analysis.inference --data runs/NAME --where "arch == 'gla'" --tokens 1e12,1e13
    python -m analysis.inference --constants besiroglu --loss 2.2 --tokens 0,1e12

At a wanted loss, the parametric law (`chinchilla`) leaves one freedom: a smaller model trained for longer. It costs
k_t N D to train and k_i N per token to use (k_t = 6, k_i = 2 unless measured), so the more tokens the model will
produce or read, the smaller it should be. With r = A N^-alpha / (loss - E) the cost is least where

    (alpha/beta) r/(1 - r) k_t D = k_t D + k_i D_inf,

whose two sides cross once for r between beta/(alpha + beta), the compute-optimal model, and 1.
"""

import argparse
import sys

import numpy as np

from analysis import cli
from analysis.fit import fit_law
from analysis.laws import get_law
from analysis.load import load_table
from analysis.result import interval
from analysis.tables import count_interval, number, with_interval
from pallas_kernels.commands import Parser


def optimum(p, loss, inference_tokens, flops_factor: float = 6.0, inference_factor: float = 2.0) -> dict:
    """The cheapest (N, D) at a loss, over training and use.

    Args:
      p: parameters of the law `chinchilla`, scalars or draws [draws].
      loss: wanted loss in nats/token, above E; NaN comes back where it isn't.
      inference_tokens: tokens processed after training.
      flops_factor, inference_factor: FLOPs per parameter and token in training, and in use.

    Returns:
      N, D, training FLOPs `C`, `total` FLOPs of training and use, and `saving`: the total of the compute-optimal model
      of the same loss over this total (1: nothing gained).
    """
    reducible = np.asarray(loss, float) - p["E"]
    reducible = np.where(reducible > 0, reducible, np.nan)

    def model(rest):
        """N and D where the share `rest` = 1 - r of the reducible loss is due to the data."""
        N = (p["A"] / (reducible * (1 - rest))) ** (1 / p["alpha"])
        return N, (p["B"] / (reducible * rest)) ** (1 / p["beta"])

    # bisection on ln(1 - r): more use means a smaller share for the data term
    dense = np.log(p["alpha"] / (p["alpha"] + p["beta"])) + 0 * reducible
    lo, hi = dense - 60.0, dense
    for _ in range(80):
        middle = (lo + hi) / 2
        rest = np.exp(middle)
        _, D = model(rest)
        train = flops_factor * D
        smaller = p["alpha"] / p["beta"] * (1 - rest) / rest * train < train + inference_factor * inference_tokens
        lo, hi = np.where(smaller, lo, middle), np.where(smaller, middle, hi)
    N, D = model(np.exp((lo + hi) / 2))
    N_0, D_0 = model(np.exp(dense))
    total = flops_factor * N * D + inference_factor * N * inference_tokens
    plain = flops_factor * N_0 * D_0 + inference_factor * N_0 * inference_tokens
    return {"N": N, "D": D, "C": flops_factor * N * D, "total": total, "saving": plain / total}


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.inference",
        description="Cheapest model of a given loss, counting training and use (parametric loss law).",
    )
    source = out.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="PATH", help="CSV, parquet, wandb export or run store to fit the law to")
    source.add_argument("--constants", metavar="NAME", help="published constants of the law chinchilla instead")
    out.add_argument("--tokens", required=True, metavar="D,...", help="tokens processed after training")
    goal = out.add_mutually_exclusive_group()
    goal.add_argument("--loss", type=float, help="wanted loss in nats per token (default: see --compute)")
    goal.add_argument(
        "--compute", type=float, metavar="C",
        help="loss of the compute-optimal model of C training FLOP (default: the dearest run; 1e21 with --constants)",
    )  # fmt: skip
    cli.add_table_arguments(out)
    cli.add_fit_arguments(out, seed_noise=False)
    return out


def main(args: argparse.Namespace) -> None:
    cli.check_fit_arguments(args)
    law, draws, runs = get_law("chinchilla"), None, None
    tokens = cli.parse_numbers(args.tokens, "--tokens", zero=True)
    for flag, value in (("--loss", args.loss), ("--compute", args.compute)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value:g}: must be positive")
    if args.constants is not None:
        if args.constants not in law.constants:
            raise ValueError(f"--constants {args.constants!r}: choose one of {', '.join(law.constants)}")
        values, top = law.constants[args.constants].values, 1e21
    else:
        table = load_table(args.data, required=law.columns, **cli.table_options(args))
        fit = fit_law(law, table, cli.fit_options(args, holdout=False))
        if fit.refused:
            raise ValueError(f"{args.data}: the law cannot be fitted: {fit.refused}")
        values, draws = fit.values, {name: fit.draws[name] for name in fit.values} if fit.draws else None
        runs = table.rows
        print(table.summary())
        top = 6 * float((runs["N"] * runs["D"]).max())
    loss = args.loss or float(law.optimum(values, args.compute or top)["loss"])
    if not loss > values["E"]:
        raise ValueError(f"--loss {loss:g}: must lie above the irreducible loss E = {values['E']:.4g}")
    print(f"loss {loss:.4f} nats/token; FLOPs 6 N D to train, 2 N per token of use")
    print(f"{'tokens of use':>14} {'N':>28} {'D':>28} {'D/N':>8}  saving over the compute-optimal model")
    for later in tokens:
        best = optimum(values, loss, later)
        drawn = optimum(draws, loss, later) if draws else {}
        shown = {name: interval(value, drawn.get(name), args.level) for name, value in best.items()}
        print(
            f"{number(later):>14} {count_interval(shown['N']):>28} {count_interval(shown['D']):>28} "
            f"{number(best['D'] / best['N']):>8}  {with_interval(shown['saving'])}{_outside(best, runs)}"
        )


def _outside(best: dict, runs) -> str:
    """Which of N, D and D/N of the model lies beyond those of the runs [rows], None where these are not known."""
    if runs is None:
        return ""
    seen = {"N": runs["N"], "D": runs["D"], "D/N": runs["D"] / runs["N"]}
    here = best | {"D/N": best["D"] / best["N"]}
    beyond = [name for name, values in seen.items() if not values.min() <= here[name] <= values.max()]
    return f"   extrapolated: {', '.join(beyond)} beyond the runs" if beyond else ""


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
