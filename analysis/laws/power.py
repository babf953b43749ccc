"""Loss against compute alone, with a floor: L(C) = E + k C^-gamma.

Without the floor (law `power0`) this is L(C) = k C^-gamma, the form that arXiv:2406.16690, 2507.17702 and 2510.26692
use to compare architectures.
"""

import numpy as np

from analysis.laws.base import PF_DAY, Constants, Law, Parameter, Synthetic, Variable, register

COMPUTE = Variable("C", "FLOP", "training compute, under the accounting that the table says")
LOSS = Variable("loss", "nats/token", "mean next-token cross-entropy of the best run at that compute")


def predict(p, x, xp=np):
    return p["E"] + p["k"] * xp.exp(-p["gamma"] * xp.log(x["C"]))


def predict0(p, x, xp=np):
    return p["k"] * xp.exp(-p["gamma"] * xp.log(x["C"]))


def compute_for(p, loss):
    """Compute (FLOP) at which either law reaches a loss (scalars or draws); NaN at or below the floor."""
    reducible = np.asarray(loss, float) - p.get("E", 0.0)
    with np.errstate(over="ignore"):
        return (p["k"] / np.where(reducible > 0, reducible, np.nan)) ** (1 / p["gamma"])


def equal_loss_compute(base, variant, C):
    """Compute (FLOP) that `base` needs for the loss of `variant` at C, both k and gamma of the law without a floor."""
    return compute_for(base, predict0(variant, {"C": np.asarray(C, float)}))


EXPONENT = Parameter("gamma", (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), "linear", 0.002, 3.0, "exponent of compute")
SIZE = Parameter("k", np.arange(0, 41, 4), "log", 1e-8, 1e30, "size of the reducible part")

register(
    Law(
        name="power",
        title="Loss against compute with a floor",
        formula="loss = E + k*C^-gamma",
        source="arXiv:2203.15556 (frontier of the parametric law)",
        variables=(COMPUTE,),
        target=LOSS,
        frontier=True,
        parameters=(
            Parameter("E", np.arange(-2, 1.01, 0.5), "log", 0.02, np.inf, "irreducible loss"),
            SIZE,
            EXPONENT,
        ),
        predict=predict,
        limits="points must lie on the compute-optimal frontier; the floor needs at least two decades of compute",
        centre=(("k", "gamma", "C"),),
        basis=lambda p, x: [np.ones_like(x["C"]), x["C"] ** -p["gamma"]],
        linear=("E", "k"),
        synthetic=Synthetic(
            params=dict(E=1.7, k=1100.0, gamma=0.16),
            ranges={"C": (1e17, 1e23)},
            tolerance=dict(E=0.01, gamma=0.05),
        ),
    )
)

register(
    Law(
        name="power0",
        title="Loss against compute without a floor",
        formula="loss = k*C^-gamma",
        source="arXiv:2406.16690, 2507.17702, 2510.26692",
        variables=(COMPUTE,),
        target=LOSS,
        frontier=True,
        parameters=(SIZE, EXPONENT),
        predict=predict0,
        limits="a local description: it has no irreducible loss, so it must not be extrapolated far",
        delta=None,
        centre=(("k", "gamma", "C"),),
        basis=lambda p, x: [x["C"] ** -p["gamma"]],
        linear=("k",),
        constants={
            # printed for PF-days; k is converted to FLOP by PF_DAY^gamma
            name: Constants(source, dict(k=k * PF_DAY**gamma, gamma=gamma), fitted_on, "printed for C in PF-days")
            for name, source, k, gamma, fitted_on in (
                ("shen_llama", "arXiv:2406.16690", 3.7087, 0.0798, "70M-7B, 300B tokens"),
                ("shen_tnl", "arXiv:2406.16690", 3.5391, 0.0768, "70M-7B, 300B tokens"),
                ("shen_hgrn2", "arXiv:2406.16690", 3.4788, 0.0753, "70M-7B, 300B tokens"),
                ("shen_cosformer2", "arXiv:2406.16690", 3.5877, 0.0756, "70M-7B, 300B tokens"),
                ("kimi_mla", "arXiv:2510.26692", 2.3092, 0.0536, "653M-1.7B active, 38.8B-128B tokens"),
                ("kimi_kda", "arXiv:2510.26692", 2.2879, 0.0527, "653M-1.7B active, 38.8B-128B tokens"),
                ("kaplan_cmin", "arXiv:2001.08361", 3.1e8**0.050, 0.050, "C_min: batches far below the critical one"),
            )
        },
        synthetic=Synthetic(
            params=dict(k=30.0, gamma=0.06), ranges={"C": (1e17, 1e23)}, tolerance=dict(k=0.05, gamma=0.02)
        ),
    )
)
