"""Loss and activation ratio of a checkpoint under a method, at given dials or at a given rise in perplexity.

Everything runs under a mesh: parameters placed by sharding.py's rules, batches split over data and fsdp.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_lm import config as configs
from efficient_lm import hardware, sharding, train
from efficient_lm.schema import to_dict
from efficient_lm.sparsity import greedy, maps
from efficient_lm.sparsity.methods import METHODS, ROTATED
from efficient_lm.sparsity.model import SparseLM

BISECTIONS = 12  # of the dial
TOKEN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Validation:
    """Batches of a run's validation data on the devices: `calibration` to set thresholds on, `batches` to score."""

    def __init__(self, cfg, tokens: int, calibration_tokens: int, devices=None):
        rows = max(1, calibration_tokens // cfg.train.seq_len)
        devices = jax.devices() if devices is None else devices
        fits = cfg.mesh.fsdp * cfg.mesh.tensor <= len(devices)  # else as many as there are, data-parallel
        self.mesh = sharding.make_mesh(cfg.mesh if fits else configs.MeshConfig(), rows, devices)
        data = train.open_split(cfg, "validation", rows)
        self.spec = data.spec
        count = min(len(data), max(1, round(tokens / (rows * cfg.train.seq_len))))
        batches = [train.fields_used(cfg, data[k]) for k in range(count)]
        self.real = [batch["loss_mask"] > 0 for batch in batches]
        self.batches = [sharding.to_devices(batch, sharding.batch_sharding(self.mesh)) for batch in batches]
        self.calibration = self.batches[0]


class Measured:
    """One checkpoint and one method.

    Args:
      cfg: the run's config; params: its parameters; validation: a `Validation`; method: name in METHODS.
    """

    def __init__(self, cfg, params, validation: Validation, method: str):
        self.method, self.validation = METHODS[method], validation
        self.functions = _compiled(json.dumps(to_dict(cfg.model)), method, validation.mesh)
        self.lm = self.functions.lm
        self.params = jax.tree.map(
            lambda a, like: jax.device_put(a, like.sharding), params, sharding.place(params, validation.mesh)
        )
        dial, everywhere = self.method.dial, self.lm.same(jnp.zeros(()))
        quantiles = dial in ("quantile", "level", "block")
        self.factors = self._look(maps.Factors, everywhere) if self.method.rank else None
        self.rotations = self._look(maps.Rotation, everywhere) if self.method.rotated else None
        self.quantiles = self._look(maps.Quantiles, everywhere) if quantiles else None
        self.shares = self._look(maps.Thinned, self.quantiles) if dial == "block" else None

    def _look(self, stand_in, settings):
        """What every map returns on the calibration batch."""
        return self.functions.looks[stand_in](self.params, settings, self.validation.calibration)

    def thresholds(self, dial: float) -> dict:
        """The settings at a dial."""
        if self.method.dial == "token":
            settings = self.lm.same({"drop": jnp.float32(dial)})
            return self._rotated(settings) if self.rotations else settings
        if self.method.dial == "error":
            found = self._look(maps.ErrorThreshold, self.lm.same(jnp.float32(dial)))
            return jax.tree.map(lambda threshold: {"threshold": threshold}, found)
        if self.method.dial == "level":
            largest = max(float(jnp.max(table[..., -1])) for table in jax.tree.leaves(self.quantiles))
            return self.lm.same({"threshold": jnp.float32(dial * largest)})

        # In a ReLU model there can be more zeros than the share that is asked for; the quantile is 0 then.
        def one(group, name, path):
            table, share = self.quantiles[group][name][path], dial
            if self.shares is not None:
                share = _between(self.shares[group][name][path], dial, greedy.STEPS)
            setting = {"threshold": _between(table, share, len(maps.QUANTILES) - 1)}
            return setting | ({"factors": self.factors[group][name][path]} if self.factors else {})

        return self.lm.settings(one)

    def _rotated(self, settings) -> dict:
        """The settings, with the rotation of each map that has one."""

        def one(group, name, path):
            found, like = self.rotations[group][name], ROTATED.get(path)
            return settings[group][name][path] | ({"rotation": found[like]} if like in found else {})

        return self.lm.settings(one)

    def at(self, dial: float) -> dict:
        """What the model scores at a dial: see `_score`."""
        return {"dial": float(dial), **self._score(self.thresholds(dial))}

    def at_rise(self, percent: float, zero: dict | None = None) -> dict:
        """`at` the largest dial at which the perplexity is at most `percent` % above that at dial 0 (`zero`)."""
        best = self.at(0.0) if zero is None else zero
        limit, low, high = best["loss"] + math.log1p(percent / 100), 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            here = self.at(middle)
            if here["loss"] <= limit:
                low, best = middle, here
            else:
                high = middle
        return best

    def _score(self, settings) -> dict:
        """loss (nats per token), active (share of inputs kept, mean over tokens and maps), per layer and over tokens,
        and skipped: the share of multiply-adds of these matrices that need not be done."""
        scored = [self.functions.score(self.params, settings, batch) for batch in self.validation.batches]
        sums, kept, tokens = zip(*jax.device_get(scored), strict=True)
        nll, count = np.sum(sums, axis=0, dtype=np.float64)
        kept = jax.tree.map(lambda *values: np.mean(values, axis=0), *kept)
        per_token = np.concatenate([share[real] for share, real in zip(tokens, self.validation.real, strict=True)])
        layers = self._by_layer(kept)
        return {
            "loss": float(nll / count),
            "active": float(per_token.mean()),
            "skipped": self._skipped(kept),
            "active_layers": [round(float(np.mean(values)), 6) for _, values in sorted(layers.items())],
            "active_tokens": [round(float(q), 6) for q in np.quantile(per_token, TOKEN_QUANTILES)],
        }

    def _by_layer(self, kept) -> dict[int, list]:
        layers = {}
        for group, blocks in kept.items():
            for name, paths in blocks.items():
                for share in paths.values():
                    for layer, value in zip(self.lm.layers(group, name), np.atleast_1d(share), strict=True):
                        layers.setdefault(layer, []).append(float(value))
        return layers

    def _skipped(self, kept) -> float | None:
        whole = skipped = 0.0
        for group, blocks in kept.items():
            for name, paths in blocks.items():
                for path, share in paths.items():
                    n, out = self.lm.shapes[group][name][path]
                    rank = maps.rank_of((n, out), self.method.rank)
                    whole += n * out * np.size(share)
                    skipped += np.sum(n * out * (1.0 - share) - rank * (n + out))
        return float(skipped / whole) if whole else None


class _Functions:
    """What is compiled for an architecture, a method and a mesh."""

    def __init__(self, model: str, method: str, mesh):
        hardware.enable_compile_cache()
        self.lm = SparseLM(configs.from_dict({"model": json.loads(model)}).model, METHODS[method])
        self.constrain = sharding.residual_constraint(mesh)
        whole = sharding.replicated(mesh)

        def compiled(function):
            return jax.jit(sharding.split_kernels(function, mesh), out_shardings=whole)

        self.score = compiled(self._score)
        self.looks = {
            kind: compiled(self._look(kind))
            for kind in (maps.Quantiles, maps.ErrorThreshold, maps.Factors, maps.Rotation, maps.Thinned)
        }

    def _score(self, params, settings, batch):
        """Sums of nll and of tokens [2], the mean share kept of each map, the share kept of each token [B, T]."""
        mask = batch["loss_mask"]
        logits, seen = self.lm.run(params, settings, batch, maps.Thinned, self.constrain)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        count = jnp.sum(mask)
        means = jax.tree.map(lambda kept: jnp.sum(kept * mask, axis=(-2, -1)) / count, seen)
        shares = [kept.reshape(-1, *mask.shape) for kept in jax.tree.leaves(seen)]
        return jnp.stack([jnp.sum(nll * mask), count]), means, jnp.mean(jnp.concatenate(shares), axis=0)

    def _look(self, stand_in):
        """On the way through the dense model, what each map returns; for Thinned, TEAL's shares of each block."""
        through = greedy.allocate if stand_in is maps.Thinned else None

        def look(params, settings, batch):
            return self.lm.run(params, settings, batch, stand_in, self.constrain, through)[1]

        return look


def _between(table, at, intervals: int):
    """Entries of a table [..., n] at a share `at` [...] of the first `intervals` intervals, between them linearly."""
    at = jnp.broadcast_to(jnp.asarray(at, jnp.float32) * intervals, table.shape[:-1])
    low = jnp.clip(at.astype(jnp.int32), 0, intervals - 1)
    left, right = (jnp.take_along_axis(table, i[..., None], axis=-1)[..., 0] for i in (low, low + 1))
    return left + (at - low) * (right - left)


@functools.lru_cache(maxsize=16)
def _compiled(model: str, method: str, mesh) -> _Functions:
    return _Functions(model, method, mesh)
