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


@jax.custom_vjp
def scatter_tokens(x, slots, sources):
    """x [N, d] -> [S, d]: the token of each slot, zeros in empty ones."""
    return _rows(x, sources // slots.shape[1])


def _scatter_forward(x, slots, sources):
    return scatter_tokens(x, slots, sources), (slots, sources)


def _scatter_backward(saved, g):
    slots, sources = saved
    return jnp.sum(_rows(g, slots), axis=1), _no_gradient(slots), _no_gradient(sources)


scatter_tokens.defvjp(_scatter_forward, _scatter_backward)


@jax.custom_vjp
def gather_choices(y, slots, sources):
    """y [S, d] -> [N, k, d]: the output of each choice, zeros for dropped ones."""
    return _rows(y, slots)


def _gather_forward(y, slots, sources):
    return gather_choices(y, slots, sources), (slots, sources)


def _gather_backward(saved, g):
    slots, sources = saved
    return _rows(g.reshape(-1, g.shape[-1]), sources), _no_gradient(slots), _no_gradient(sources)


gather_choices.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def combine(outputs, weights, slots, sources):
    """Outputs of the slots [S, d], weights [N, k] -> [N, d] in at least float32: the sum of each token's choices.

    Dropped choices count as zeros. No einsum: a GPU would make it a product of N tiny matrices.
    """
    return jnp.sum(weights[:, :, None] * wide(_rows(outputs, slots)), axis=1)


def _combine_forward(outputs, weights, slots, sources):
    return combine(outputs, weights, slots, sources), (outputs, weights, slots, sources)


def _combine_backward(saved, dy):
    outputs, weights, slots, sources = saved
    # Rows of dy are fetched for each slot, so that nothing [N, k, d] is written.
    rows = wide(_rows(dy.astype(outputs.dtype), sources // slots.shape[1]))
    d_outputs = (_rows(weights.reshape(-1), sources)[:, None] * rows).astype(outputs.dtype)
    d_weights = jnp.sum(dy[:, None, :] * wide(_rows(outputs, slots)), axis=-1)
    return d_outputs, d_weights.astype(weights.dtype), _no_gradient(slots), _no_gradient(sources)


combine.defvjp(_combine_forward, _combine_backward)


def _no_gradient(index):
    return np.zeros(index.shape, jax.dtypes.float0)
