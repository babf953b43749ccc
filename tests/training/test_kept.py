"""What norms keep for a backward pass: their input, and no float32 copies of it."""

import jax
import jax.numpy as jnp
import pytest

from efficient_lm.config import from_dict
from efficient_lm.layers import Maker
from efficient_lm.norms import NORMS

WIDTH = 64
MODEL = from_dict({"model": {"d_model": WIDTH}}).model


def kept(function):
    """Arrays as large as the input that the gradient of `function` at a bfloat16 input needs."""
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.bfloat16)
    pull = jax.eval_shape(lambda x: jax.vjp(function, x)[1], x)
    return [leaf.dtype for leaf in jax.tree.leaves(pull) if leaf.size >= 8 * WIDTH]


@pytest.mark.quick
@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_their_input_alone(name):
    norm = NORMS[name](Maker(jax.random.key(0), MODEL), WIDTH)
    assert kept(norm) == [jnp.bfloat16]
