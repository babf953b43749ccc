"""Compute-optimal size from IsoFLOP profiles (approach 2), arXiv:2203.15556.

    N*(C) = A_N C^a_N,  D*(C) = A_D C^a_D

N* and D* are the minima of parabolas in log10 N (or log10 D), one per budget; see `analysis.isoflop` for the tests that
a minimum must pass and for the intervals.
"""

import numpy as np

from analysis.isoflop import fit_isoflop
from analysis.laws.base import Law, Parameter, Variable, register


def predict(p, x, xp=np):
    """N*(C)."""
    return p["A_N"] * xp.exp(p["a_N"] * xp.log(x["C"]))


register(
    Law(
        name="isoflop",
        title="Compute-optimal parameters and tokens from IsoFLOP minima (approach 2)",
        formula="N* = A_N*C^a_N; D* = A_D*C^a_D",
        source="arXiv:2203.15556",
        variables=(
            Variable(
                "C",
                "FLOP",
                "measured training compute of each run; budgets are groups of it, or a column 'budget'",
            ),
            Variable("N", "parameters", "trainable parameters, under the accounting that the table says"),
        ),
        target=Variable("loss", "nats/token", "final loss of each run"),
        parameters=(
            Parameter("A_N", (), "log", meaning="size of N*"),
            Parameter("a_N", (), meaning="exponent of N*"),
            Parameter("A_D", (), "log", meaning="size of D* (with a column D)"),
            Parameter("a_D", (), meaning="exponent of D* (with a column D)"),
        ),
        predict=predict,
        limits="at least 4 sizes per budget on both sides of the minimum, at least 2 budgets; a parabola is only "
        "local: off-centre grids bias the size of N*",
        fitter=fit_isoflop,
    )
)
