"""Times the Chinchilla fit beside the usual procedure: scipy from one start after the other.

    python -m analysis.bench [--data points.csv --columns 'N=Model Size,C=Training FLOP,D=C/(6*N)' --drop-highest 5]

Both minimise the same sum of Huber losses on the same points (240 synthetic ones without --data): 4500 starts of the
published grid (arXiv:2404.10102), then bootstrap refits that begin at the optimum. scipy works through a random sample
of the starts and of the refits, and its times are scaled up to all of them. Times with compilation are those of a first
call.

Three rows of scipy, from the usual to the best that it can do. L-BFGS-B with its default tolerances stops early from
most starts: the objective is about 1e-3 and its gradient falls below the default 1e-5 long before the optimum, whatever
the gradient's quality. Half of the starts stop so, the others at a relative decrease of 2e-9. BFGS with exact gradients
down to 1e-9 reaches the optimum from as many starts as ours.
"""

import argparse
import sys
import time

import numpy as np

from analysis import cli
from analysis.laws import get_law
from analysis.load import load_table
from pallas_kernels.commands import Parser

# name of the row -> exact gradients?, method, options
SCIPY = {
    "L-BFGS-B, numeric gradient": (False, "L-BFGS-B", {}),
    "L-BFGS-B, exact gradient": (True, "L-BFGS-B", {}),
    "BFGS, exact gradient to 1e-9": (True, "BFGS", {"gtol": 1e-9}),
}


def ours(prob, draws: int) -> dict:
    """Search from the whole grid and bootstrap, compilation included and not; `z` is the optimum."""
    from analysis import search, uncertainty  # scipy and JAX are slow to import

    out = {}
    for attempt in ("with compilation", "again"):
        began = time.perf_counter()
        best = search.search(prob)
        middle = time.perf_counter()
        uncertainty.bootstrap(prob, best, draws)
        out[attempt] = {"grid_s": middle - began, "bootstrap_s": time.perf_counter() - middle}
    return {**out, "objective": best.objective, "share_at_best": best.share_at_best, "z": best.z}


def objective(prob, exact: bool):
    """In numpy, of z = (ln E, ln A, ln B, alpha, beta), uncentred, and weights [n]: value, or value and gradient."""
    log_N, log_D, log_loss = np.log(prob.x["N"]), np.log(prob.x["D"]), np.log(prob.y)

    def evaluate(z, weights):
        terms = np.stack([np.full(len(log_N), z[0]), z[1] - z[3] * log_N, z[2] - z[4] * log_D])
        total = np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])
        r = total - log_loss
        size = np.abs(r)
        value = np.sum(weights * np.where(size <= prob.delta, r * r / 2, prob.delta * (size - prob.delta / 2)))
        if not exact:
            return value
        slope = weights * np.clip(r, -prob.delta, prob.delta) * np.exp(terms - total)
        return value, np.array([*slope.sum(1), -slope[1] @ log_N, -slope[2] @ log_D])

    return evaluate


def usual(prob, best: dict, draws: int, sample: int, name: str, seed: int = 0) -> dict:
    """The same with a row of SCIPY on `sample` starts and refits; seconds scaled up to all."""
    import scipy.optimize

    exact, method, options = SCIPY[name]
    rng, evaluate = np.random.default_rng(seed), objective(prob, exact)

    def run(start, weights):
        kwargs = dict(args=(weights,), jac=exact, method=method, options=options)
        return scipy.optimize.minimize(evaluate, start, **kwargs).fun

    starts, ones = prob.law.starts(), np.ones(len(prob.y))
    chosen = starts[rng.choice(len(starts), min(sample, len(starts)), replace=False)]
    began = time.perf_counter()
    found = np.array([run(start, ones) for start in chosen])
    middle = time.perf_counter()
    z = np.array([prob.law.parameter(name).to_search(value) for name, value in prob.params(best["z"]).items()])
    for _ in range(min(sample, draws)):
        run(z, rng.multinomial(len(ones), ones / len(ones)).astype(float))
    end = time.perf_counter()
    return {
        "grid_s": (middle - began) * len(starts) / len(chosen),
        "bootstrap_s": (end - middle) * draws / min(sample, draws),
        "timed": len(chosen),
        "share_at_best": float(np.mean(found <= best["objective"] * 1.001)),
        "best_over_ours": float(found.min() / best["objective"]),
    }


def text_table(out: dict) -> str:
    rows = [("ours, first call", out["ours"]["with compilation"], out["ours"]["share_at_best"]),
            ("ours, again", out["ours"]["again"], out["ours"]["share_at_best"])]  # fmt: skip
    rows += [(f"scipy {name} ({out[name]['timed']} timed)", out[name], out[name]["share_at_best"]) for name in SCIPY]
    lines = [f"{out['n']} points, 4500 starts, {out['draws']} bootstrap refits"]
    lines.append(f"{'':<48} {'starts (s)':>11} {'refits (s)':>11} {'starts at optimum':>18}")
    for name, times, share in rows:
        lines.append(f"{name:<48} {times['grid_s']:>11.1f} {times['bootstrap_s']:>11.1f} {share:>18.0%}")
    return "\n".join(lines)


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.bench",
        description="Times the Chinchilla fit beside scipy's minimisers, start by start.",
    )
    out.add_argument(
        "--data", metavar="PATH",
        help="points with N, D, loss, e.g. those of Chinchilla's figure 4 by --columns "
        "'N=Model Size,C=Training FLOP,D=C/(6*N)' --drop-highest 5 (default: 240 synthetic ones)",
    )  # fmt: skip
    out.add_argument("--draws", type=int, default=4000, help="bootstrap refits (default 4000)")
    out.add_argument("--sample", type=int, default=45, help="starts and refits that scipy is timed on (default 45)")
    out.add_argument("--out", metavar="BENCH.JSON", help="write the numbers as JSON")
    cli.add_table_arguments(out)
    return out


def main(args: argparse.Namespace) -> None:
    from analysis.search import problem

    cli.check_out(args.out)
    for flag, value in (("--draws", args.draws), ("--sample", args.sample)):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be positive")
    law = get_law("chinchilla")
    if args.data:
        rows = load_table(args.data, required=law.columns, **cli.table_options(args)).rows
    else:
        rows = law.simulate(n=240, noise=5e-3)
    prob = problem(law, rows)
    found = ours(prob, args.draws)
    out = {"n": len(prob.y), "draws": args.draws, "ours": found}
    for name in SCIPY:
        out[name] = usual(prob, found, args.draws, args.sample, name)
    print(text_table(out))
    cli.write_json(args.out, out)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
