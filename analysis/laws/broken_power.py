"""Smoothly broken power laws, 'broken neural scaling laws', arXiv:2210.14891.

    y(x) = a + b x^-c_0 prod_i (1 + (x / d_i)^(1/f_i))^(-c_i f_i)

On a log-log plot of y - a the slope is -c_0, then -(c_0 + c_1) beyond d_1, and so on; f_i is the width of break i in
ln x. x may be any count: compute, tokens, parameters, steps; y anything that is positive, lower or higher is better.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register


def predict(p, x, xp=np):
    u = xp.log(x["x"])
    slope = -p["c_0"] * u
    for i in (1, 2):
        if f"d_{i}" in p:
            f = p[f"f_{i}"]
            slope = slope - p[f"c_{i}"] * f * xp.logaddexp(0.0, (u - xp.log(p[f"d_{i}"])) / f)
    return p["a"] + p["b"] * xp.exp(slope)


def _break(i: int) -> tuple[Parameter, ...]:
    return (
        Parameter(f"c_{i}", (-0.3, 0.6), "linear", -10.0, 10.0, f"change of the exponent at break {i}", True),
        Parameter(f"d_{i}", tuple(np.linspace(5, 55, 6)), "log", 1.0, 1e32, f"place of break {i}"),
        Parameter(f"f_{i}", (-2.0, 1.0), "log", 1e-3, 10.0, f"width of break {i} in ln x"),
    )


def _law(breaks: int, params: dict, tolerance: dict) -> Law:
    factors = "".join(f"*(1 + (x/d_{i})^(1/f_{i}))^(-c_{i}*f_{i})" for i in range(1, breaks + 1))
    return Law(
        name=f"broken_power{breaks}",
        title=f"Power law with {breaks} smooth break{'s' if breaks > 1 else ''}",
        formula=f"y = a + b*x^-c_0{factors}",
        source="arXiv:2210.14891",
        variables=(Variable("x", "count", "what grows: FLOP, tokens, parameters or steps, as raw counts", 1.0, 1e32),),
        target=Variable("y", "any", "loss, error or another positive quantity"),
        parameters=(
            Parameter("a", (-3.0, 1.0), "log", 1e-4, np.inf, "limit for large x"),
            Parameter("b", (0.0, 20.0), "log", 1e-12, 1e30, "size"),
            Parameter("c_0", (0.0, 0.5), "linear", -10.0, 10.0, "exponent before the first break", True),
            *(parameter for i in range(1, breaks + 1) for parameter in _break(i)),
        ),
        n_starts=256,
        predict=predict,
        limits="a break is determined only where the data cover both sides of it; no prediction of the next break",
        centre=(("b", "c_0", "x"),),
        synthetic=Synthetic(params=params, ranges={"x": (1e14, 1e22)}, tolerance=tolerance, noise=1e-3, n=100),
    )


ONE = dict(a=0.5, b=20.0, c_0=0.05, c_1=0.25, d_1=1e18, f_1=0.5)
register(_law(1, ONE, dict(a=0.05, c_0=0.1, c_1=0.15)))
TWO = dict(a=0.5, b=20.0, c_0=0.03, c_1=0.25, d_1=1e17, f_1=0.4, c_2=-0.2, d_2=1e20, f_2=0.4)
register(_law(2, TWO, dict(a=0.1, c_0=0.1, c_1=0.1, c_2=0.1)))
