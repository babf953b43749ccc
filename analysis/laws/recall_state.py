"""Associative recall against the size of the recurrent state.

    accuracy = chance + (top - chance) / (1 + (k pairs^p / state)^h)

`state` counts the bytes that a model carries from token to token (for attention: keys and values of the context),
`pairs` the associations that it must hold. k pairs^p is the state that gives half of the way from chance to `top`:
p = 1 means a constant amount of state per pair. A description of measured frontiers such as those of
arXiv:2402.18668 (the trade-off of recall and state), whose paper gives no closed form.
"""

import numpy as np

from analysis.laws.base import Law, Parameter, Synthetic, Variable, register


def predict(p, x, xp=np):
    short = xp.log(p["k"]) + p["p"] * xp.log(x["pairs"]) - xp.log(x["state"])
    return p["chance"] + (p["top"] - p["chance"]) / (1 + xp.exp(p["h"] * short))


def state_for(p, accuracy, pairs):
    """State that gives an accuracy between chance and top; NaN outside."""
    with np.errstate(invalid="ignore", divide="ignore"):
        odds = (np.asarray(accuracy, float) - p["chance"]) / (p["top"] - np.asarray(accuracy, float))
        odds = np.where(odds > 0, odds, np.nan)
    return p["k"] * np.asarray(pairs, float) ** p["p"] * odds ** (1 / p["h"])


def _design(rng):
    state, pairs = np.meshgrid(np.geomspace(2**7, 2**17, 11), (8.0, 32.0, 128.0))
    return {"state": state.ravel(), "pairs": pairs.ravel()}


register(
    Law(
        name="recall_state",
        title="Accuracy of associative recall in the size of the state",
        formula="accuracy = chance + (top - chance)/(1 + (k*pairs^p/state)^h)",
        source="arXiv:2402.18668 (measured frontier; the closed form is ours)",
        variables=(
            Variable("state", "bytes", "bytes carried from token to token, all layers", 1.0, 1e15),
            Variable("pairs", "pairs", "associations to hold", 1.0, 1e9),
        ),
        target=Variable("accuracy", "share", "share of queries answered right", 0.0, 1.0),
        parameters=(
            Parameter("chance", (0.0, 0.1), "linear", -0.1, 0.9, "accuracy without state", True),
            Parameter("top", (0.8, 1.0), "linear", 0.05, 1.1, "accuracy with unlimited state"),
            Parameter("k", (0.0, 8.0), "log", 1e-3, 1e12, "state for half of the way, one pair"),
            Parameter("p", (0.5, 1.5), "linear", -1.0, 5.0, "exponent of the pairs"),
            Parameter("h", (0.5, 3.0), "linear", 0.05, 50.0, "steepness in ln state"),
        ),
        n_starts=64,
        predict=predict,
        limits="one task and family of models, trained to convergence; `pairs` must vary for p",
        residual="linear",
        delta=None,
        synthetic=Synthetic(
            params=dict(chance=0.02, top=0.99, k=40.0, p=1.0, h=1.3),
            design=_design,
            tolerance=dict(top=0.03, k=0.25, p=0.06, h=0.12),
            noise=0.01,
        ),
    )
)
