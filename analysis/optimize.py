"""Batched L-BFGS in JAX, float64: thousands of small problems at once, each with its own line search and weights.

One evaluation of every lane per step: a lane whose trial point fails the weak Wolfe conditions brackets its step length
(Lewis and Overton, Math. Program. 141, 2013, which also suits the kinks of a Huber loss with a small threshold) while its
neighbours move on, so no lane waits for the line search of another. Between chunks of steps the finished lanes are set
aside and the rest are packed into a smaller batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MEMORY = 6  # pairs (s, y) kept per lane
CHUNK = 24  # evaluations between two looks at which lanes have finished
ARMIJO, CURVATURE = 1e-4, 0.9
RUNNING, CONVERGED, STUCK = 0, 1, 2


@dataclass(frozen=True)
class Minima:
    """End points `z` [lanes, P], objective `f` [lanes] and `status` [lanes]: 'converged', 'line-search failed', 'max-iter'."""

    z: np.ndarray
    f: np.ndarray
    status: np.ndarray


def minimize(
    objective: Callable, z0, weights, data, *, ftol: float = 1e-11, max_evals: int = 600, progress: Callable | None = None
) -> Minima:
    """Minimises `objective(z [P], weights [n], data) -> scalar` from every start z0 [lanes, P].

    Args:
      objective: a hashable function (module level or cached), traced by JAX in float64.
      weights: [n] shared by all lanes, or [lanes, n] (bootstrap multiplicities).
      data: pytree of arrays that all lanes share.
      ftol: a lane has converged after three accepted steps in a row with a relative decrease below this.
      max_evals: evaluations after which a lane counts as 'max-iter'.
      progress: called with the number of lanes finished in each chunk.
    """
    import jax

    z0, weights = np.asarray(z0, float), np.asarray(weights, float)
    lanes, shared = len(z0), weights.ndim == 1
    out_z, out_f = z0.copy(), np.full(lanes, np.inf)
    status = np.full(lanes, RUNNING)
    with jax.enable_x64(True):
        start, advance = _compiled(objective, shared)
        index = np.arange(lanes)
        state = start(z0, weights, data)
        for _ in range(-(-max_evals // CHUNK)):
            state = advance(state, weights if shared else weights[index], data, ftol)
            z, f, done = (np.asarray(state[key]) for key in ("z", "f", "status"))
            fresh = (done != RUNNING) & (status[index] == RUNNING)
            out_z[index], out_f[index], status[index] = z, f, done
            if progress:
                progress(len(set(index[fresh])))
            active = np.flatnonzero(done == RUNNING)
            if not len(active):
                break
            size = _bucket(len(active))
            if size < len(index):
                # pad with repeats of a running lane: both copies take the same steps
                keep = np.concatenate([active, np.full(size - len(active), active[0])])
                index, state = index[keep], {key: np.asarray(value)[keep] for key, value in state.items()}
    names = np.array(["max-iter", "converged", "line-search failed"])
    return Minima(out_z, out_f, names[status])


def _bucket(count: int) -> int:
    """The smallest batch size 32 * 8^k that holds `count` lanes: few sizes, so few compilations."""
    size = 32
    while size < count:
        size *= 8
    return size


@functools.lru_cache(maxsize=32)
def _compiled(objective: Callable, shared: bool):
    import jax
    import jax.numpy as jnp

    evaluate = jax.vmap(jax.value_and_grad(objective), (0, None if shared else 0, None))

    def start(z, weights, data):
        f, g = evaluate(z, weights, data)
        lanes, P = z.shape
        memory = jnp.zeros((lanes, MEMORY, P))
        return {
            "z": z, "f": f, "g": g,
            "d": -g / jnp.maximum(jnp.linalg.norm(g, axis=1, keepdims=True), 1e-300),  # first trial: a step of length t
            "t": jnp.ones(lanes), "lo": jnp.zeros(lanes), "hi": jnp.full(lanes, jnp.inf),
            "s": memory, "y": memory, "rho": jnp.zeros((lanes, MEMORY)),
            "halvings": jnp.zeros(lanes, int), "small": jnp.zeros(lanes, int), "steepest": jnp.ones(lanes, bool),
            "status": jnp.where(jnp.isfinite(f), RUNNING, STUCK),
        }  # fmt: skip

    def step(state, trial):
        """One lane: the trial point was evaluated as `trial = (z, f, g)`; accept it or move the bracket."""
        z, f, g = trial
        slope = state["g"] @ state["d"]
        armijo = f <= state["f"] + ARMIJO * state["t"] * slope  # False for NaN
        wolfe = g @ state["d"] >= CURVATURE * slope
        lo = jnp.where(armijo, state["t"], state["lo"])
        hi = jnp.where(armijo, state["hi"], state["t"])
        wider = jnp.where(jnp.isinf(hi), 2 * lo, (lo + hi) / 2)
        # A bracket that has shrunk to nothing around a descent point (a kink) is as good as a Wolfe point.
        accept = armijo & (wolfe | (state["halvings"] >= 30))
        fail = ~accept & (state["halvings"] >= 40)

        s, y = z - state["z"], g - state["g"]
        sy = s @ y
        useful = sy > 1e-14 * jnp.linalg.norm(s) * jnp.linalg.norm(y)
        push = lambda old, new: jnp.where(useful, jnp.concatenate([old[1:], new[None]]), old)  # noqa: E731
        S, Y, rho = push(state["s"], s), push(state["y"], y), push(state["rho"], 1 / jnp.where(useful, sy, 1.0))
        small = jnp.where(state["f"] - f <= ftol_of(state) * jnp.abs(f), state["small"] + 1, 0)
        d = -_two_loop(g, S, Y, rho)
        downhill = g @ d < 0
        accepted = {
            "z": z, "f": f, "g": g, "d": jnp.where(downhill, d, -g), "t": 1.0, "lo": 0.0, "hi": jnp.inf,
            "s": S, "y": Y, "rho": rho, "halvings": 0, "small": small, "steepest": ~downhill,
            "status": jnp.where((small >= 3) | ~jnp.any(g != 0), CONVERGED, RUNNING),
        }  # fmt: skip
        bracketed = {**state, "t": wider, "lo": lo, "hi": hi, "halvings": state["halvings"] + 1}
        norm = jnp.maximum(jnp.linalg.norm(state["g"]), 1e-300)
        restarted = {
            **state, "d": -state["g"] / norm, "t": 1e-3, "lo": 0.0, "hi": jnp.inf, "halvings": 0, "steepest": True,
            "s": jnp.zeros_like(S), "y": jnp.zeros_like(Y), "rho": jnp.zeros_like(rho),
            "status": jnp.where(state["steepest"], STUCK, RUNNING),
        }  # fmt: skip

        def choose(key):
            new = jnp.where(accept, accepted[key], jnp.where(fail, restarted[key], bracketed[key]))
            return jnp.where(state["status"] == RUNNING, new, state[key]).astype(state[key].dtype)

        return {key: choose(key) for key in state if key != "ftol"}

    def ftol_of(state):
        return state["ftol"]

    def advance(state, weights, data, ftol):
        def body(_, state):
            z = state["z"] + state["t"][:, None] * state["d"]
            f, g = evaluate(z, weights, data)
            f = jnp.where(jnp.isfinite(f) & jnp.all(jnp.isfinite(g), axis=1), f, jnp.nan)
            return jax.vmap(lambda s, trial: step({**s, "ftol": ftol}, trial))(state, (z, f, g))

        return jax.lax.fori_loop(0, CHUNK, body, state)

    return jax.jit(start), jax.jit(advance)


def _two_loop(g, S, Y, rho):
    """L-BFGS direction H g for one lane: g [P], S and Y [MEMORY, P] oldest first, rho [MEMORY] (0 = empty slot)."""
    import jax.numpy as jnp

    q, alphas = g, []
    for i in reversed(range(MEMORY)):
        alphas.append(rho[i] * (S[i] @ q))
        q = q - alphas[-1] * Y[i]
    last = Y[-1] @ Y[-1]
    q = q * jnp.where(rho[-1] > 0, 1 / jnp.where(rho[-1] > 0, rho[-1] * last, 1.0), 1.0)
    for i in range(MEMORY):
        q = q + S[i] * (alphas[MEMORY - 1 - i] - rho[i] * (Y[i] @ q))
    return q
