"""`LM.cast`, once a step: no module uses such a matrix in a wider dtype; gradients are those of casting at each use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import from_dict
from efficient_lm.layers import Linear, wide
from efficient_lm.mixers import MIXERS, model_of
from efficient_lm.model import LM
from efficient_lm.train import make_loss

CASES = {name: (name, {}) for name in MIXERS} | {
    f"{name}-{label}": (name, settings) for name in MIXERS for label, settings in MIXERS[name].variants.items()
}
TOKENS = jax.ShapeDtypeStruct((1, 64), jnp.int32)


@pytest.mark.parametrize("name", CASES)
def test_cast_matrices_meet_inputs_of_the_compute_dtype(name, monkeypatch):
    """A product in float32, say of a gate, would lose its matrix's low bits."""
    met, weight = [], Linear.weight

    def recording(self, dtype):
        met.append((self.kernel[...].dtype, dtype))
        return weight(self, dtype)

    monkeypatch.setattr(Linear, "weight", recording)
    values = {"vocab_size": 16, "dtype": "bfloat16"} | model_of(*CASES[name], 64)
    lm = LM(from_dict({"model": values}).model)
    jax.eval_shape(lambda params, tokens: lm(lm.cast(params), tokens), lm.shapes(), TOKENS)
    assert met and all(kernel in (dtype, jnp.float32) for kernel, dtype in met)


@pytest.mark.quick
def test_gradients_are_the_same_bits():
    model = {"d_model": 16, "n_layers": 3, "vocab_size": 16, "dtype": "bfloat16", "prefix": ["attention/dense"]}
    cfg = from_dict({"model": model | {"pattern": ["attention/moe"]}})
    lm = LM(cfg.model)
    params = jax.jit(lm.init)(jax.random.key(0))
    used = lm.cast(params)
    assert used["pattern"]["0"]["ffn"]["experts"]["up"]["kernel"].dtype == jnp.bfloat16
    for part in (used["embed"]["table"], used["pattern"]["0"]["ffn"]["router"], used["final_norm"]["scale"]):
        assert part.dtype == jnp.float32
    tokens = np.random.default_rng(0).integers(0, 16, (2, 2, 8))
    batch = {"inputs": tokens[0], "targets": tokens[1], "loss_mask": np.ones((2, 8), np.float32)}
    grad = jax.jit(jax.grad(make_loss(lm, cfg, lambda x: x), has_aux=True))
    once, each = (grad(p, batch, 16.0)[0] for p in (used, params))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(wide, once), each)
