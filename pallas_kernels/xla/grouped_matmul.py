"""Grouped matmul on tiles of rows that belong to one group: each group is padded to whole tiles.

The number of tiles has a static bound, M / tile + E, so nothing is dropped whatever the sizes, and a tile is half a
mean group, so that padding adds about a half. On CPU the tiles are taken one after the other; elsewhere they are one
batched product with the weights of each tile gathered. (`jax.lax.ragged_dot` is a dense product with masks on NVIDIA
and on CPU, where it took 3 to 40 times as long as the tiles.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.steps import accumulation_dtype
from pallas_kernels.xla import common
from pallas_kernels.xla.common import einsum


class Tiles(NamedTuple):
    group: jax.Array  # [n] group of each tile; tiles beyond the last one have the last group and no rows
    source: jax.Array  # [n * tile] row of lhs in each row of the tiles, M for padding
    place: jax.Array  # [M] row of the tiles where each row of lhs went, n * tile for rows of no group


def tile_size(rows, groups):
    """Rows per tile: about half of a mean group, a power of two."""
    low, high = (16, 128) if jax.default_backend() == "cpu" else (128, 512)
    size = low
    while 4 * size <= rows // groups and size < high:
        size *= 2
    return size


def make_tiles(group_sizes, rows, tile):
    """Tiles for `rows` rows of lhs."""
    groups = group_sizes.shape[0]
    n = -(-rows // tile) + groups
    ends, tiles = jnp.cumsum(group_sizes), -(-group_sizes // tile)
    tile_ends = jnp.cumsum(tiles)
    starts, tile_starts = ends - group_sizes, tile_ends - tiles

    group = _first_above(tile_ends, jnp.arange(n))
    offset = (jnp.arange(n) - tile_starts[group])[:, None] * tile + jnp.arange(tile)
    source = jnp.where(offset < group_sizes[group][:, None], starts[group][:, None] + offset, rows)

    row = jnp.arange(rows)
    group_of_row = _first_above(ends, row)
    place = tile_starts[group_of_row] * tile + row - starts[group_of_row]
    return Tiles(group, source.reshape(-1), jnp.where(row < ends[-1], place, n * tile))


def _first_above(ends, positions):
    """Index of the first of the ascending `ends` above each position; the last index where there is none."""
    return jnp.minimum(jnp.sum(ends <= positions[:, None], -1), len(ends) - 1)


def _rows(x, index):
    """x[index], zeros where index == len(x)."""
    return x.at[index].get(mode="fill", fill_value=0)


def grouped_matmul(lhs, rhs, group_sizes):
    """See `pallas_kernels.api.grouped_matmul`."""
    rhs = jnp.concatenate(rhs, axis=2)
    tiles = make_tiles(group_sizes, lhs.shape[0], tile_size(lhs.shape[0], rhs.shape[0]))
    return _product(lhs, rhs, tiles)


@jax.custom_vjp
def _product(lhs, rhs, tiles):
    mm, acc, out = common.matmul_dtype(rhs), accumulation_dtype(lhs, rhs), lhs.dtype
    x = _rows(lhs, tiles.source).reshape(len(tiles.group), -1, lhs.shape[1]).astype(mm)
    rhs = rhs.astype(mm)
    if jax.default_backend() == "cpu":
        y = jax.lax.map(lambda tile: einsum("ak,kn->an", tile[0], rhs[tile[1]]), (x, tiles.group))
    else:
        y = einsum("tak,tkn->tan", x, rhs[tiles.group], preferred_element_type=acc)
    return _rows(y.reshape(-1, rhs.shape[2]).astype(out), tiles.place)


def _forward(lhs, rhs, tiles):
    return _product(lhs, rhs, tiles), (lhs, rhs, tiles)


def _backward(residuals, dy):
    lhs, rhs, tiles = residuals
    mm, acc = common.matmul_dtype(rhs), accumulation_dtype(lhs, rhs)
    dlhs = _product(dy, rhs.swapaxes(1, 2), tiles).astype(lhs.dtype)
    x, dy = (_rows(a, tiles.source).reshape(len(tiles.group), -1, a.shape[1]).astype(mm) for a in (lhs, dy))
    outer = functools.partial(einsum, preferred_element_type=acc)
    if jax.default_backend() == "cpu":

        def add(drhs, tile):
            group, x, dy = tile
            return drhs.at[group].add(outer("ak,an->kn", x, dy)), None

        drhs, _ = jax.lax.scan(add, jnp.zeros(rhs.shape, acc), (tiles.group, x, dy))
    else:  # a product with zeros and ones: a scatter would add in no fixed order
        of_group = jax.nn.one_hot(tiles.group, rhs.shape[0], dtype=acc)
        drhs = einsum("tg,tkn->gkn", of_group, outer("tak,tan->tkn", x, dy))
    return dlhs, drhs.astype(rhs.dtype), None


_product.defvjp(_forward, _backward)
