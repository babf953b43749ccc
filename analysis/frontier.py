"""The lowest loss against compute of each architecture, and the compute-equivalent gain of one over another.

A frontier takes, per budget, the lowest value of the IsoFLOP parabola within the sampled sizes: that loss is well
determined even where the best size is not. Its law is L(C) = E + k C^-gamma with k and gamma of each architecture, one
floor E for all of them: a law without a floor is too straight, and inverting it outside the sampled losses invents
trends. Every draw of the parabolas gives a draw of the law.
"""

import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.isoflop import Profile, power_law, profiles
from analysis.result import Options, interval

GAMMAS = np.geomspace(0.01, 1.5, 200)
FLOORS = np.linspace(0.0, 0.99, 100)  # shares of the lowest loss
# What a run costs besides compute: title, columns that it takes, and the value per run.
COSTS = {
    "tokens": ("training tokens", ("D",), lambda rows: rows["D"]),
    "wall": ("wall time of training", ("wall_seconds",), lambda rows: rows["wall_seconds"]),
    "inference": ("forward FLOPs per token", ("C", "D"), lambda rows: rows["C"] / (3 * rows["D"])),
}
TITLES = {"compute": "training compute"} | {name: title for name, (title, _, _) in COSTS.items()}


@dataclass
class Frontier:
    """Budgets C [k], their lowest loss [k] with draws [draws, k], and the law's floor, k, gamma with draws [draws]."""

    name: str
    C: np.ndarray
    loss: np.ndarray
    loss_draws: np.ndarray
    profiles: list[Profile]
    notes: list[str] = field(default_factory=list)
    floor: float = 0.0
    floor_draws: np.ndarray | float = 0.0
    k: float = np.nan
    gamma: float = np.nan
    k_draws: np.ndarray | None = None
    gamma_draws: np.ndarray | None = None
    costs: dict[str, tuple] = field(default_factory=dict)  # A, a and their draws [draws] of cost(C) = A C^a

    def cost(self, name: str, C, C_draws=None) -> tuple[np.ndarray, np.ndarray]:
        """What the best size at C spends of a cost of COSTS: [points] and draws [draws, points] (paired to C_draws)."""
        A, a, A_draws, a_draws = self.costs[name]
        C = np.asarray(C, float)
        return A * C**a, A_draws[:, None] * (C if C_draws is None else C_draws) ** a_draws[:, None]

    def law(self, C) -> tuple[np.ndarray, np.ndarray]:
        """L(C) [points] and its draws [draws, points]."""
        u = np.log(np.asarray(C, float))
        draws = self.k_draws[:, None] * np.exp(-self.gamma_draws[:, None] * u)
        return self.floor + self.k * np.exp(-self.gamma * u), _column(self.floor_draws) + draws

    def compute_for(self, loss, loss_draws) -> tuple[np.ndarray, np.ndarray]:
        """Compute at which the law reaches `loss` [points], with `loss_draws` [draws, points] paired to its draws."""

        def inverse(k, gamma, reducible):
            return np.exp(np.clip(np.log(k / np.maximum(reducible, 1e-9)) / gamma, -500, 500))

        draws = inverse(self.k_draws[:, None], self.gamma_draws[:, None], loss_draws - _column(self.floor_draws))
        return inverse(self.k, self.gamma, loss - self.floor), draws

    def with_floor(self, floor: float, floor_draws) -> "Frontier":
        """The same points with k and gamma fitted, by least squares in log space, above the given floor."""
        k, exponent = power_law(self.C, np.maximum(self.loss - floor, 1e-9))
        k_draws, exponent_draws = power_law(self.C, np.maximum(self.loss_draws - _column(floor_draws), 1e-9))
        return replace(
            self, floor=floor, floor_draws=floor_draws, k=float(k), gamma=-float(exponent), k_draws=k_draws,
            gamma_draws=-exponent_draws,
        )  # fmt: skip


def _column(draws):
    return draws[:, None] if np.ndim(draws) else draws


def frontier_points(frame, name: str, options: Options | None = None) -> Frontier:
    """The frontier of one architecture from its runs (columns N, C, loss, and `budget` where there is one), no floor.

    Raises ValueError where fewer than two budgets have a parabola.
    """
    options = options or Options()
    # Two architectures must not share their draws, whatever the seed: their noise is independent.
    options = replace(options, seed=options.seed + (zlib.crc32(name.encode()) << 32))
    found = profiles(frame, "N", options)
    usable = [p for p in found if p.coefficients is not None]
    notes = [f"{name}, C {p.C:.3g}: left out of the frontier, {p.refused}" for p in found if p.coefficients is None]
    notes += [
        f"{name}, C {p.C:.3g}: best size at an edge, so its loss is only an upper bound" for p in usable if p.edge
    ]
    if len(usable) < 2:
        raise ValueError(f"{name}: {len(usable)} budgets with at least 4 sizes; a frontier needs 2")
    C = np.array([p.C for p in usable])
    draws = np.maximum(np.stack([p.best_draws for p in usable], 1), 1e-9)
    costs, lacking = _costs(frame, usable)
    notes += [f"{name}: {text}" for text in lacking]
    out = Frontier(name, C, np.array([p.best for p in usable]), draws, found, notes, costs=costs)
    return out.with_floor(0.0, 0.0)


def _costs(frame, profiles: list[Profile]) -> tuple[dict[str, tuple], list[str]]:
    """Power laws in C of each cost that the frame has the columns for, at the best size within the sizes run.

    Within a budget the logarithm of the cost is taken as linear in ln N. Also returns why a cost was left out.
    """
    out, lacking = {}, []
    for name, (title, columns, compute) in COSTS.items():
        if not set(columns) <= set(frame):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            every = np.log(compute(frame).astype(float))
        bad = ~np.isfinite(every)
        if bad.any():
            label = frame.loc[bad.idxmax()].get("run_id", bad.idxmax())
            lacking.append(f"{title} not compared, {bad.sum()} runs lack it (first: {label})")
            continue
        values, draws = [], []
        for p in profiles:
            best = p.x[np.argmin(p.loss)]
            line = np.polynomial.Polynomial.fit(np.log(p.x), every.loc[p.rows].to_numpy(), 1)
            sizes = np.where(np.isnan(p.x_draws), best, p.x_draws).clip(p.x.min(), p.x.max())
            values.append(np.exp(line(np.log(p.x_opt if np.isfinite(p.x_opt) else best))))
            draws.append(np.exp(line(np.log(sizes))))
        C = [p.C for p in profiles]
        out[name] = (*power_law(C, values), *power_law(C, np.stack(draws, 1)))
    return out, lacking


def share_floor(frontiers: list[Frontier]) -> list[Frontier]:
    """Refits each frontier, k and gamma its own, above the floor E of all of them.

    E is that of least squares over all points, from a grid between 0 and the lowest loss, draw by draw. A gamma shared
    by all would bind E tighter, but where gains change with compute its E is wrong and so are the gains: intervals of
    nominal 90 % held a gain that grows from 1 to 2 in 37-47 % of simulated sweeps. Unchanged, without a floor, where
    there are no more budgets in all than parameters.
    """
    if sum(len(f.C) for f in frontiers) <= 2 * len(frontiers) + 1:
        return frontiers
    points = [np.concatenate([f.loss[None], f.loss_draws]) for f in frontiers]
    best, floor = np.full(len(points[0]), np.inf), np.zeros(len(points[0]))
    for E in FLOORS * min(y.min() for y in points):
        error = 0.0
        for frontier, y in zip(frontiers, points, strict=True):
            value, draws = frontier.with_floor(E, E).law(frontier.C)
            error += np.sum((y - np.concatenate([value[None], draws])) ** 2, 1)
        better = error < best
        best[better], floor[better] = error[better], E
    return [f.with_floor(float(floor[0]), floor[1:]) for f in frontiers]


def share_exponent(frontiers: list[Frontier]) -> dict | None:
    """L = E + k_i C^-gamma with E and gamma shared: `{"E", "gamma", "k"}`, the value first and then the draws.

    [1 + draws], k [1 + draws, frontiers]. Variable projection: for each gamma of a grid the rest is linear, for the
    points and for all draws at once. None where there are no more budgets in all than parameters.
    """
    which = np.concatenate([np.full(len(f.C), i) for i, f in enumerate(frontiers)])
    if len(which) < len(frontiers) + 3:
        return None
    C = np.concatenate([f.C for f in frontiers])
    centre = np.exp(np.mean(np.log(C)))
    value = np.concatenate([f.loss for f in frontiers])[None]
    y = np.concatenate([value, np.concatenate([f.loss_draws for f in frontiers], 1)])
    best = np.full(len(y), np.inf)
    found = {"E": np.zeros(len(y)), "gamma": np.full(len(y), np.nan), "k": np.full((len(y), len(frontiers)), np.nan)}
    one_hot = which[:, None] == np.arange(len(frontiers))
    for gamma in GAMMAS:
        terms = np.concatenate([np.ones((len(C), 1)), (C / centre)[:, None] ** -gamma * one_hot], 1)
        with_floor = y @ np.linalg.pinv(terms).T
        no_floor = np.pad(y @ np.linalg.pinv(terms[:, 1:]).T, ((0, 0), (1, 0)))
        now = np.where(with_floor[:, :1] >= 0, with_floor, no_floor)
        error = np.sum((y - now @ terms.T) ** 2, 1)
        better = (error < best) & (now[:, 1:] > 0).all(1)
        best[better] = error[better]
        found["E"][better], found["gamma"][better] = now[better, 0], gamma
        found["k"][better] = now[better, 1:] * centre**gamma
    return found if np.isfinite(best[0]) else None


def ratios(base: Frontier, variant: Frontier, C) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `base` spends for the loss that `variant` has at compute C [points], over what `variant` spends.

    Each architecture at its best size. Above 1 the variant is the more efficient.

    Returns:
      name -> (value [points], draws [draws, points]) for "compute", the compute-equivalent gain, and each of COSTS that
      both frontiers have.
    """
    C = np.asarray(C, float)
    need, need_draws = base.compute_for(*variant.law(C))
    out = {"compute": (need / C, need_draws / C)}
    for name in COSTS:
        if name in base.costs and name in variant.costs:
            (b, b_draws), (v, v_draws) = base.cost(name, need, need_draws), variant.cost(name, C)
            out[name] = (b / v, b_draws / v_draws)
    return out


def common_range(base: Frontier, variant: Frontier) -> tuple[float, float]:
    """Compute that both cover; measured compute of the same nominal budget differs a little."""
    return max(base.C.min(), variant.C.min()) * 0.97, min(base.C.max(), variant.C.max()) * 1.03


def resolved(entry: dict) -> bool:
    """Whether the interval of a ratio excludes 1 (by more than rounding)."""
    return bool(entry["lo"] > 1 + 1e-6 or entry["hi"] < 1 - 1e-6)


def compare(base: Frontier, variant: Frontier, level: float = 0.95) -> dict:
    """Compares two architectures: gain at each common budget with intervals, its trend, and a verdict.

    The floor is fitted to these two; `constant_gain` is the gain if gamma is shared too (None with few budgets). Points
    and `judged` also hold the `ratios` of the other costs. Only compute within the range that both cover is judged; a
    loss that the base does not reach there is marked as extrapolated.
    """
    lo, hi = common_range(base, variant)
    C = np.array([c for c in variant.C if lo <= c <= hi])
    notes = base.notes + variant.notes
    if not len(C):
        text = f"not resolved: {base.name} and {variant.name} share no range of compute"
        return {
            "base": base.name,
            "variant": variant.name,
            "verdict": text,
            "resolved": False,
            "points": [],
            "notes": notes,
        }
    shared = share_exponent([base, variant])
    base, variant = share_floor([base, variant])
    (value, draws), losses, points = ratios(base, variant, C)["compute"], (base.law(C), variant.law(C)), []
    for i, (c, entry) in enumerate(zip(C, _intervals(base, variant, C, level), strict=True)):
        base_loss, variant_loss = (interval(mean[i], drawn[:, i], level) for mean, drawn in losses)
        reached = base.C.min() * 0.97 <= value[i] * c <= base.C.max() * 1.03
        entry |= {"base_loss": base_loss, "variant_loss": variant_loss, "extrapolated": bool(not reached)}
        points.append(entry)
    # judge at the dearest compute where neither law leaves its runs: no further than the base's lowest loss
    reach = variant.compute_for(base.law(C[-1:])[0], base.law(C[-1:])[1])[0][0]
    judged = float(min(C[-1], max(reach, C[0])))
    out = {"base": base.name, "variant": variant.name, "points": points, "notes": notes}
    (out["judged"],) = _intervals(base, variant, [judged], level)
    if "wall" in out["judged"]:
        out["notes"] = [*notes, "wall times count where every run had the same hardware to itself, start included"]
    last = out["judged"]["gain"]
    span = np.log(C[-1] / C[0])
    if span > 0:
        growth = np.log(draws[:, -1]) - np.log(draws[:, 0])
        out["trend"] = interval(np.log(value[-1] / value[0]) / span, growth / span, level)
        out["crossover"] = _crossover(base, variant, C, out["trend"], level)
    out["floor"] = interval(base.floor, base.floor_draws, level) if np.ndim(base.floor_draws) else None
    out["constant_gain"] = None
    if shared:
        ratio = np.exp(np.clip(np.log(shared["k"][:, 0] / shared["k"][:, 1]) / shared["gamma"], -50, 50))
        out["constant_gain"] = interval(ratio[0], ratio[1:], level)
    out["resolved"] = resolved(last)
    return out | {"verdict": _verdict(out, last, judged, level)}


def _intervals(base: Frontier, variant: Frontier, C, level: float) -> list[dict]:
    """`{"C", "gain", and each other cost: interval of its ratio}` at each compute of C."""
    out = [{"C": float(c)} for c in C]
    for name, (value, draws) in ratios(base, variant, C).items():
        for i, entry in enumerate(out):
            entry["gain" if name == "compute" else name] = interval(value[i], draws[:, i], level)
    return out


def _crossover(base: Frontier, variant: Frontier, C, trend: dict, level: float) -> dict:
    """Compute at which both have the same loss, above a shared floor in closed form; the interval is over all draws.

    `resolved` where the trend is, and the interval stays within a factor ten of the compute that was run.
    """
    with np.errstate(divide="ignore", over="ignore"):
        at = np.exp(np.clip(np.log(base.k / variant.k) / (base.gamma - variant.gamma), -500, 500))
        slope = base.gamma_draws - variant.gamma_draws
        draws = np.exp(np.clip(np.log(base.k_draws / variant.k_draws) / slope, -500, 500))
    out = interval(at, draws, level)
    turns = trend["lo"] > 0 or trend["hi"] < 0
    return {**out, "resolved": bool(turns and out["lo"] > C[0] / 10 and out["hi"] < 10 * C[-1])}


def _verdict(out: dict, last: dict, C: float, level: float) -> str:
    where = f"at C = {C:.3g} FLOP (gain {last['value']:.2f}, {level:.0%} interval {last['lo']:.2f} to {last['hi']:.2f})"
    if not out["resolved"]:
        text = f"not resolved {where}: the interval includes 1"
    elif last["value"] > 1:
        share = f"{1 / last['value']:.2f} times the compute of {out['base']}"
        text = f"{out['variant']} needs {share} for the same loss {where}"
    else:
        text = (
            f"{out['variant']} needs {1 / last['value']:.2f} times the compute of {out['base']}, that is more, {where}"
        )
    trend = out.get("trend")
    if trend and trend["lo"] is not None and out["resolved"]:
        if trend["lo"] > 0 or trend["hi"] < 0:
            ahead, up = last["value"] > 1, trend["lo"] > 0
            text += f"; its {'advantage' if ahead else 'lag'} {'grows' if ahead == up else 'shrinks'} with compute"
        else:
            text += "; no trend with compute is resolved"
    crossing = out.get("crossover")
    if crossing and crossing["resolved"]:
        text += f"; they cross at C = {crossing['value']:.2g} [{crossing['lo']:.2g}, {crossing['hi']:.2g}]"
    return text
