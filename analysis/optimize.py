"""Batched L-BFGS in JAX, float64: thousands of small problems at once, each with its own line search and weights.

One evaluation of every lane per step: a lane whose trial point fails the weak Wolfe conditions brackets its step length
(Lewis and Overton, Math. Program. 141, 2013, which also suits the kinks of a Huber loss with a small threshold) while
its neighbours move on, so no lane waits for the line search of another. A fixed pool of lanes works through the queue
of problems: a lane that has finished takes the next problem, so one compiled size serves any number of them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FEW, LANES = 64, 512  # problems advanced together: for up to 96 problems, and for more
MEMORY = 6  # pairs (s, y) kept per lane
CHUNK = 16  # evaluations between two looks at which lanes have finished
ARMIJO, CURVATURE = 1e-4, 0.9
EXACT = 1e-22  # an objective below this is an exact fit: nothing but rounding is left to gain
RUNNING, CONVERGED, STUCK, EXHAUSTED = 0, 1, 2, 3
STATUS = np.array(["running", "converged", "line-search failed", "max-iter"])


@dataclass(frozen=True)
class Minima:
    """End points `z` [problems, P], objective `f` [problems], `status` [problems] (see STATUS)."""

    z: np.ndarray
    f: np.ndarray
    status: np.ndarray


def minimize(
    objective: Callable,
    z0,
    weights,
    data,
    *,
    ftol: float = 1e-11,
    max_evals: int = 600,
    lanes: int | None = None,
    progress: Callable | None = None,
) -> Minima:
    """Minimises `objective(z [P], weights [n], data) -> scalar` from every start z0 [problems, P].

    Args:
      objective: a hashable function (module level or cached), traced by JAX in float64.
      weights: [n] shared by all problems, or [problems, n] (bootstrap multiplicities).
      data: pytree of arrays that all problems share.
      ftol: converged after three accepted steps in a row with a relative decrease below this.
      max_evals: evaluations after which a problem counts as 'max-iter'.
      lanes: problems advanced together (each size is compiled once); None: FEW or LANES.
      progress: called with the number of problems finished since the last call.
    """
    import jax

    z0, weights = np.asarray(z0, float), np.asarray(weights, float)
    count = len(z0)
    lanes = lanes or (FEW if count <= 96 else LANES)
    weights = np.broadcast_to(weights, (count, weights.shape[-1]))
    out_z, out_f, status = z0.copy(), np.full(count, np.inf), np.full(count, RUNNING)
    lane = np.full(lanes, -1)  # problem that each lane works on, -1 = idle
    following = 0  # next problem in the queue
    with jax.enable_x64(True):
        start, advance = _compiled(objective)
        pool_z, pool_w, state = np.tile(z0[0], (lanes, 1)), np.tile(weights[0], (lanes, 1)), None
        while True:
            free = np.flatnonzero(lane < 0)[: count - following]
            if len(free):
                lane[free] = np.arange(following, following + len(free))
                following += len(free)
                pool_z[free], pool_w[free] = z0[lane[free]], weights[lane[free]]
                fresh = {key: np.asarray(value) for key, value in start(pool_z, pool_w, data).items()}
                if state is not None:
                    old = np.ones(lanes, bool)
                    old[free] = False
                    fresh = {k: np.where(old.reshape(-1, *[1] * (v.ndim - 1)), state[k], v) for k, v in fresh.items()}
                state = fresh
            state = {key: np.asarray(value) for key, value in advance(state, pool_w, data, ftol, max_evals).items()}
            done = np.flatnonzero((lane >= 0) & (state["status"] != RUNNING))
            for out, key in ((out_z, "z"), (out_f, "f"), (status, "status")):
                out[lane[done]] = state[key][done]
            lane[done] = -1
            if progress and len(done):
                progress(len(done))
            if following == count and not (lane >= 0).any():
                return Minima(out_z, out_f, STATUS[status])


@functools.lru_cache(maxsize=32)
def _compiled(objective: Callable):
    import jax
    import jax.numpy as jnp

    evaluate = jax.vmap(jax.value_and_grad(objective), (0, 0, None))

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
            "evals": jnp.ones(lanes, int),
            "status": jnp.where(jnp.isfinite(f), jnp.where(f <= EXACT, CONVERGED, RUNNING), STUCK),
        }  # fmt: skip

    def step(state, z, f, g, ftol, max_evals):
        """One lane: its trial point z was evaluated; accept it or move the bracket."""
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
        S, Y, rho = (
            push(state["s"], s),
            push(state["y"], y),
            push(state["rho"], 1 / jnp.where(useful, sy, 1.0)),
        )
        small = jnp.where(state["f"] - f <= ftol * jnp.abs(f), state["small"] + 1, 0)
        d = -_two_loop(g, S, Y, rho)
        downhill = g @ d < 0
        accepted = {
            "z": z, "f": f, "g": g, "d": jnp.where(downhill, d, -g), "t": 1.0, "lo": 0.0, "hi": jnp.inf,
            "s": S, "y": Y, "rho": rho, "halvings": 0, "small": small, "steepest": ~downhill,
            "status": jnp.where((small >= 3) | (f <= EXACT), CONVERGED, RUNNING),
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

        state = {key: choose(key) for key in accepted} | {"evals": state["evals"] + 1}
        exhausted = (state["status"] == RUNNING) & (state["evals"] >= max_evals)
        return {**state, "status": jnp.where(exhausted, EXHAUSTED, state["status"])}

    def advance(state, weights, data, ftol, max_evals):
        def body(_, state):
            z = state["z"] + state["t"][:, None] * state["d"]
            f, g = evaluate(z, weights, data)
            f = jnp.where(jnp.isfinite(f) & jnp.all(jnp.isfinite(g), axis=1), f, jnp.nan)
            return jax.vmap(step, (0, 0, 0, 0, None, None))(state, z, f, g, ftol, max_evals)

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
