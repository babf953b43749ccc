"""Sparse upcycling (2212.05055): a mixture of experts that starts from a dense run, every expert a copy of its FFN.

With n_shared = 0, normalised weights and experts as wide as the dense FFN, the new model computes what the dense one
did. `config.train.upcycle_from` names the dense run. Layer i starts from layer i, wherever the two patterns put it:

    python -m efficient_lm.train --config configs/dense.py:tiny --workdir runs/dense
    python -m efficient_lm.train --config configs/moe.py:tiny --workdir runs/moe --config.model.ffns.moe.n_shared=0 \\
        --config.model.ffns.moe.d_expert=168 --config.train.upcycle_from=runs/dense
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from efficient_lm import checkpoint, metrics
from efficient_lm.config import from_dict
from efficient_lm.model import GROUPS, LM
from efficient_lm.schema import ConfigError
from efficient_lm.sharding import path_of

# What only the mixture has, and the count of steps of ffn/prosparse.py.
NEW = ("router", "bias", "load", "temperature", "l1_step")


def upcycled(run: str, lm: LM, fresh):
    """`fresh` parameters of `lm` with everything that the dense run has. Raises ConfigError."""
    where = f"config.train.upcycle_from = {run!r}"
    found = checkpoint.steps(Path(run) / "ckpt")
    if not found:
        raise ConfigError(f"{where}: has no checkpoint")
    config = metrics.read_json(Path(run) / "config.json")
    if config is None:
        raise ConfigError(f"{where}: its config.json can't be read")
    stored = checkpoint.restore(Path(run) / "ckpt", found[-1])
    dense = _by_layer(LM(from_dict(config).model), stored.get("ema") or stored["params"])

    def one(path, leaf):
        name = path_of(path)
        if name.rpartition("/")[2] in NEW:
            return leaf
        values = [_expanded(dense, key, leaf, where) for key in _keys(lm, name)]
        value = jnp.stack(values) if name.startswith("pattern/") else values[0]
        if value.shape != leaf.shape:
            width = "; d_expert must be the d_ff of the dense run" if "/experts/" in name else ""
            raise ConfigError(f"{where}: {name} is {value.shape} there, which can't become {leaf.shape}{width}")
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, fresh)


def _expanded(dense, name: str, leaf, where: str):
    """The dense array `name`, copied for each expert where `leaf` has experts before its last two axes."""
    experts = "/experts/" in name
    name = name.replace("/experts/", "/")
    if name not in dense:
        raise ConfigError(f"{where}: the dense run has no {name}; a mixture from it has n_shared = 0")
    value = jnp.asarray(dense[name])
    return jnp.broadcast_to(value, (leaf.shape[-3], *value.shape)) if experts and value.ndim == 2 else value


def _by_layer(lm: LM, params) -> dict:
    """Arrays by key, without the axis over repeats."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_of(path)
        for repeat, key in enumerate(_keys(lm, name)):
            arrays[key] = leaf[repeat] if name.startswith("pattern/") else leaf
    return arrays


def _keys(lm: LM, name: str) -> list[str]:
    """'i/...' for each layer i whose parameter `name` is; `name` itself where it is in no layer."""
    group, _, rest = name.partition("/")
    block, _, part = rest.partition("/")
    return [f"{layer}/{part}" for layer in lm.layers(group, block)] if group in GROUPS else [name]
