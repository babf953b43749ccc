"""Stand-ins for the linear maps and activations of a block, which leave out inputs or find out which to leave out.

`install` puts them into a bound block; after the block has run, `seen` of each is what it did. x [B, T, n] throughout.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.ffn.activations import Activation
from efficient_lm.layers import Linear, wide

BISECTIONS = 22  # thresholds are exact to the largest score / 2^22
QUANTILES = np.linspace(0.0, 1.0, 257)
LARGEST = 0.99  # quantile of the scores at which one level for all layers ends


class Map:
    """A map of a block: `inner` with weights W [n, out], or an activation, whose own output is thinned out."""

    def __init__(self, inner, method, settings):
        self.inner, self.method, self.settings, self.seen = inner, method, settings, None

    def scores(self, x, rotation=None):
        """[B, T, n]; of inputs in another basis where `rotation` [n, n] holds its vectors as columns."""
        size = jnp.abs(wide(x))
        if self.method.weighted:
            weight = self.inner.weight(size.dtype)
            size *= jnp.linalg.norm(weight if rotation is None else rotation.T @ weight, axis=-1)
        return size


class Thinned(Map):
    """Leaves out inputs as `settings` {threshold or drop, factors, rotation} say; `seen` is the share kept, [B, T]."""

    def __call__(self, x):
        linear, rotation = isinstance(self.inner, Linear), self.settings.get("rotation")
        x = x if linear else self.inner(x)
        x = x if rotation is None else (wide(x) @ rotation).astype(x.dtype)
        scores = self.scores(x, rotation)
        drop, threshold = (self.settings.get(name) for name in ("drop", "threshold"))
        keep = scores > (threshold if drop is None else _token_thresholds(scores, drop))
        self.seen = jnp.mean(keep, axis=-1, dtype=jnp.float32)
        kept = jnp.where(keep, x, 0)
        if not linear:
            return kept
        y = self.inner(kept if rotation is None else (wide(kept) @ rotation.T).astype(x.dtype))
        if "factors" in self.settings:
            left, right = (factor.astype(x.dtype) for factor in self.settings["factors"])
            y += (jnp.where(keep, 0, x) @ left) @ right
        return y


def _token_thresholds(scores, drop):
    """[B, T, 1]: the smallest value above which the share 1 - drop of a token's scores lies, none at drop = 1."""
    ordered = jnp.sort(scores, axis=-1)
    count = jnp.round(drop * scores.shape[-1]).astype(jnp.int32)
    below = jnp.take_along_axis(ordered, jnp.broadcast_to(jnp.maximum(count - 1, 0), (*scores.shape[:-1], 1)), axis=-1)
    return jnp.where(count > 0, below, 0.0)


class Quantiles(Map):
    """Changes nothing; `seen` are quantiles of the scores: at QUANTILES (0 for the least one), then at LARGEST."""

    def __call__(self, x):
        y = self.inner(x)
        scores = self.scores(x if isinstance(self.inner, Linear) else y)
        self.seen = jnp.quantile(scores.reshape(-1), np.append(QUANTILES, LARGEST)).at[0].set(0.0)
        return y


class ErrorThreshold(Map):
    """Changes nothing; `seen` is the largest threshold whose error stays within `settings` (a CETT).

    CETT = mean over tokens of ||sum of x_i W_i left out|| / ||x W||, 2411.02335. As good as always it grows with the
    threshold, which is found by bisection between 0 and the largest score, not among candidates up to a quantile.
    """

    def __call__(self, x):
        scores, kernel = self.scores(x), self.inner.weight(x.dtype)
        size = jnp.linalg.norm(wide(x @ kernel), axis=-1)

        def error(threshold):
            left_out = jnp.where(scores > threshold, 0, x) @ kernel
            return jnp.mean(jnp.linalg.norm(wide(left_out), axis=-1) / jnp.maximum(size, 1e-30))

        def halve(_, between):
            low, high = between
            middle = 0.5 * (low + high)
            fits = error(middle) <= self.settings
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        self.seen = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros(()), jnp.max(scores)))[0]
        return self.inner(x)


class Factors(Map):
    """Changes nothing; `seen` are the factors of W of the method's rank."""

    def __call__(self, x):
        weight = self.inner.weight(jnp.float32)
        self.seen = factorised(weight, rank_of(weight.shape, self.method.rank))
        return self.inner(x)


class Rotation(Map):
    """Changes nothing; `seen` are the left singular vectors of W as columns [n, n]: rows of seen^T W are orthogonal."""

    def __call__(self, x):
        weight = self.inner.weight(jnp.float32)
        self.seen = jnp.linalg.eigh(weight @ weight.T)[1]
        return self.inner(x)


def rank_of(shape, share: float) -> int:
    """The rank that is a share of the smaller side of a matrix, at least 1 where the share isn't 0."""
    return max(1, round(share * min(shape))) if share else 0


def factorised(kernel, rank: int):
    """(left [n, rank], right [rank, out]) of the best approximation of W [n, out] of a rank."""
    u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def found(block, where: str) -> dict:
    """{path: map} of a block: the linear maps (and activations, where `where` asks for them) that it matches."""
    pattern, matched = re.compile(where), {}
    for path, module in nnx.iter_modules(block):
        name = "/".join(map(str, path))
        if isinstance(module, Linear | Activation) and pattern.search(name):
            matched[name] = module
    return matched


def install(block, path: str, stand_in) -> None:
    """Put `stand_in` at `path`, 'ffn/down', of a block."""
    *parents, last = path.split("/")
    for name in parents:
        block = getattr(block, name) if not name.isdigit() else block[int(name)]
    # Past nnx, which would ask what kind of node a stand-in is: the block is never split again.
    object.__setattr__(block, last, stand_in)
