"""Tokens to expert slots and back. A slot is a row of the experts' input; index maps go both ways, so that the
gradient of each gather is a gather too (no scatter: slow and, on GPUs, in no fixed order).

`slots` [N, k]: the slot of each choice, or S where it was dropped.  `sources` [S]: the choice t k + j that fills each
slot, or N k where none does.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.layers import wide


def sort_by_expert(experts, n_experts: int):
    """experts [N, k] -> slots [N, k], sources [N k], group_sizes [n_experts]: all choices, in the order of experts.

    The experts of a token must differ: then its place among an expert's rows is the number of earlier tokens with that
    expert, and a running count takes the place of a sort.
    """
    chosen = jnp.sum(jax.nn.one_hot(experts, n_experts, dtype=jnp.int32), axis=1)
    ends = jnp.cumsum(chosen, axis=0)
    sizes = ends[-1]
    slots = jnp.take_along_axis(ends - chosen + jnp.cumsum(sizes) - sizes, experts, axis=1)
    choices = jnp.arange(slots.size, dtype=slots.dtype)
    return slots, jnp.zeros_like(choices).at[slots.reshape(-1)].set(choices, unique_indices=True), sizes


def assign_capacity(experts, n_experts: int, rows: int, capacity: int):
    """experts [N, k] -> slots [N, k], sources [rows x n_experts x capacity].

    The N tokens are `rows` sequences one after another. In each sequence an expert takes its first `capacity` choices
    in the order of tokens, so that neither later tokens nor other sequences decide what is dropped.
    """
    n_tokens, k = experts.shape
    one_hot = jax.nn.one_hot(experts.reshape(rows, -1), n_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(one_hot, axis=1) - 1) * one_hot, axis=-1)
    expert = experts.reshape(rows, -1) + n_experts * jnp.arange(rows)[:, None]
    total = rows * n_experts * capacity
    slots = jnp.where(place < capacity, expert * capacity + place, total).reshape(-1)
    choices = jnp.arange(slots.size, dtype=slots.dtype)
    sources = jnp.full((total,), slots.size, slots.dtype).at[slots].set(choices, mode="drop", unique_indices=True)
    return slots.reshape(n_tokens, k), sources


def _rows(x, index):
    """x[index], zeros where index == len(x)."""
    return x.at[index].get(mode="fill", fill_value=0)


def _sums(y, slots):
    """y [S, d] -> [N, d]: sums over the choices of each token, added up in at least float32."""
    return jnp.sum(wide(_rows(y, slots)), axis=1).astype(y.dtype)


@jax.custom_vjp
def scatter_tokens(x, slots, sources):
    """x [N, d] -> [S, d]: the token of each slot, zeros in empty ones."""
    return _rows(x, sources // slots.shape[1])


def _scatter_tokens_forward(x, slots, sources):
    return scatter_tokens(x, slots, sources), (slots, sources)


def _scatter_tokens_backward(saved, g):
    return _sums(g, saved[0]), *map(_no_gradient, saved)


scatter_tokens.defvjp(_scatter_tokens_forward, _scatter_tokens_backward)


@jax.custom_vjp
def combine(y, slots, sources):
    """y [S, d] -> [N, d]: the sum of each token's slots, dropped choices counting as zeros; `scatter_tokens` back."""
    return _sums(y, slots)


def _combine_forward(y, slots, sources):
    return combine(y, slots, sources), (slots, sources)


def _combine_backward(saved, g):
    return scatter_tokens(g, *saved), *map(_no_gradient, saved)


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def scatter_choices(x, slots, sources):
    """x [N, k, ...] -> [S, ...]: what belongs to the choice in each slot, zeros in empty ones."""
    return _rows(x.reshape(-1, *x.shape[2:]), sources)


def _scatter_choices_forward(x, slots, sources):
    return scatter_choices(x, slots, sources), (slots, sources)


def _scatter_choices_backward(saved, g):
    return _rows(g, saved[0]), *map(_no_gradient, saved)


scatter_choices.defvjp(_scatter_choices_forward, _scatter_choices_backward)


def _no_gradient(index):
    return np.zeros(index.shape, jax.dtypes.float0)
