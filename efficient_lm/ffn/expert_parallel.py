"""Experts on several devices: `jax.shard_map` over the batch, tokens dispatched by each device for itself.

'data': every device runs all experts on its own tokens; their weights are gathered like those of any layer.
'expert': the experts are split over the last batch axis; tokens go to the device of their expert and back, two
all-to-alls of top_k rows a token in each direction. Shapes are static, so a device sends every other at most
`exchange_factor` times the mean number of rows; choices beyond that are dropped, and counted.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from efficient_lm.ffn import dispatch
from pallas_kernels import partition


def shards(rows: int):
    """(mesh, batch axes) when `rows` sequences are traced for a mesh that divides them, else None."""
    found = partition.current_axes()
    if found is None:
        return None
    size = math.prod(found.mesh.shape[axis] for axis in found.batch)
    return found if size > 1 and rows % size == 0 else None


def run(found, cfg, function, bank, x, experts, weights, rows):
    """function(bank, x, experts, weights, rows, exchange) on each device's rows.

    bank: a module whose arrays with three axes are the experts [E, ...]; x [N, d], experts and weights [N, k].
    `exchange` is an Exchange where the experts are split, else None. Returns what function does, arrays [N, ...].
    """
    axis, tokens = found.batch[-1], PartitionSpec(found.batch)
    devices = found.mesh.shape[axis]
    split = cfg.parallel == "expert" and devices > 1 and cfg.n_experts % devices == 0
    exchange = Exchange(axis, devices, cfg) if split else None
    graph, state = nnx.split(bank)
    specs = jax.tree.map(lambda leaf: PartitionSpec(axis) if split and leaf.ndim == 3 else PartitionSpec(), state)
    local = rows // math.prod(found.mesh.shape[name] for name in found.batch)
    return jax.shard_map(
        lambda state, x, experts, weights: function(nnx.merge(graph, state), x, experts, weights, local, exchange),
        mesh=found.mesh,
        in_specs=(specs, tokens, tokens, tokens),
        out_specs=tokens,
        check_vma=False,  # Pallas calls don't say over which axes their results vary
    )(state, x, experts, weights)


class Exchange:
    """Sends rows to the devices of their experts and the outputs back."""

    def __init__(self, axis: str, devices: int, cfg):
        self.axis, self.devices = axis, devices
        self.local = cfg.n_experts // devices
        self.factor, self.k = cfg.exchange_factor, cfg.top_k

    def __call__(self, apply, x, experts, weights):
        """apply(rows [M, d], weights [M], sizes [E / P]) on the device of each expert.

        x [N, d], experts and weights [N, k] -> outputs [S, d] of the slots that x was sent in, slots, sources (see
        dispatch).
        """
        n, k = experts.shape
        capacity = min(n * k, math.ceil(self.factor * n * k / self.devices))
        slots, sources = dispatch.assign_capacity(experts // self.local, self.devices, 1, capacity)
        # Rows that nobody fills belong to expert `local`, which does not exist.
        wanted = jnp.where(sources < n * k, (experts % self.local).reshape(-1)[sources % (n * k)], self.local)
        rows = self._swap(dispatch.scatter_tokens(x, slots, sources))
        scale = self._swap(dispatch.scatter_choices(weights, slots, sources))
        expert = self._swap(wanted[:, None])
        order, origin, sizes = dispatch.sort_by_expert(expert, self.local + 1)
        scale = dispatch.scatter_choices(scale[:, None], order, origin)
        y = apply(dispatch.scatter_tokens(rows, order, origin), scale, sizes[:-1])
        return self._swap(dispatch.combine(y, order, origin)), slots, sources

    def _swap(self, x):
        """[P * capacity, ...], block p for device p -> block p from device p."""
        blocks = x.reshape(self.devices, -1, *x.shape[1:])
        return jax.lax.all_to_all(blocks, self.axis, 0, 0).reshape(x.shape)
