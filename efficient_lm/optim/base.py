"""Optimizer = clip -> algorithm (one file each) -> per-parameter factor -> learning rate, as an optax chain.

How learning rate, weight decay and Adam's epsilon depend on a parameter's role and on the model's size
(muP 2203.03466; depth: CompleteP 2505.01618; m = width multiplier, l = n_layers / base_depth, a = depth_alpha):

    role        learning rate      weight decay       epsilon
    hidden      l^(a-1) / m        m                  l^-a / m
    fixed       l^(a-1)            1                  l^-a
    vector      l^(a-1)            0                  l^-a
    embedding   1                  0 or 1             1 / m
    output      1                  1                  1
    state       0                  0                  1
so that learning rate x weight decay of hidden matrices does not depend on the width. `decay_embeddings` says whether
embedding tables decay. All of it is 1 under the standard parametrisation without depth scaling.
"""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from efficient_lm.layers import width_multiplier
from efficient_lm.registry import Registry

OPTIMIZERS = Registry("optimizer")


@dataclass(frozen=True)
class Groups:
    """Trees like the parameters: `roles` (layers.ROLES) and the multipliers of the table above."""

    roles: Any
    lr: Any
    decay: Any
    eps: Any


def parameter_groups(lm, cfg) -> Groups:
    """The multipliers for an LM and an OptimConfig."""
    model, roles = lm.model, lm.roles()
    m = width_multiplier(model)
    depth = model.n_layers / model.base_depth if model.base_depth else 1.0
    branch = depth ** (model.depth_alpha - 1.0)
    lr = {"hidden": branch / m, "fixed": branch, "vector": branch, "embedding": 1.0, "output": 1.0, "state": 0.0}
    decay = {"hidden": m, "fixed": 1.0, "vector": 0.0, "embedding": float(cfg.decay_embeddings)}
    decay |= {"output": 1.0, "state": 0.0}
    eps = depth**-model.depth_alpha
    eps = {"hidden": eps / m, "fixed": eps, "vector": eps, "embedding": 1.0 / m, "output": 1.0, "state": 1.0}
    return Groups(roles, *(jax.tree.map(table.__getitem__, roles) for table in (lr, decay, eps)))


def make_optimizer(lm, cfg) -> optax.GradientTransformationExtraArgs:
    """The chain for an LM and an OptimConfig; its `update` takes a keyword `learning_rate`. Raises ConfigError."""
    groups = parameter_groups(lm, cfg)
    algorithm = OPTIMIZERS.find(cfg.name, "config.optim.name")
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        algorithm(cfg, groups),
        scale_by_tree(groups.lr),
        scale_by_learning_rate(),
    )


def scale_by_tree(factors) -> optax.GradientTransformation:
    """Multiply every update by its own number."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u if f == 1.0 else f * u, updates, factors))


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply by -learning_rate, an argument of the update: a constant would be part of the compiled program."""

    def update(updates, state, params=None, *, learning_rate, **_):
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def add_decay(weight_decay: float, factors) -> optax.GradientTransformation:
    """Decoupled weight decay (1711.05101): u + weight_decay * factor * p."""

    def update(updates, params):
        return jax.tree.map(
            lambda u, p, f: u + (weight_decay * f) * p if weight_decay * f else u, updates, params, factors
        )

    return optax.stateless(update)
