"""Coordinate checks (2203.03466, appendix D): what a few Adam steps do to activations must not depend on size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm.config import from_dict
from efficient_lm.layers import Maker
from efficient_lm.mixers import MIXERS
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compile")

# Above the widths at which random parts, which fall as 1/width, still add to the change.
WIDTHS, STEPS = (256, 1024), 3
# The last hidden states have no such part: their change is flat from narrow models on.
NARROW = (64, 256)


class Probe(LM):
    """Keeps the normed hidden states of the last forward pass, [B, T, d_model]."""

    def _logits(self, params, x):
        self.hidden = self.parts["final_norm"].bind(params["final_norm"])(x)
        return super()._logits(params, x)


def growth(config, of="logits"):
    """RMS over tokens and channels of the change of the logits (or of 'hidden' states) after a few small steps."""
    lm = Probe(config.model)
    optimizer = make_optimizer(lm, config.optim)
    tokens = jax.random.randint(jax.random.key(2), (4, 17), 0, 32)

    def loss(params):
        logits, _ = lm(params, tokens[:, :-1])
        seen = logits if of == "logits" else lm.hidden
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), seen

    def step(carry, _):
        params, state = carry
        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params, learning_rate=config.optim.lr)
        return (optax.apply_updates(params, updates), state), seen

    @jax.jit
    def run(key):
        params = lm.init(key)
        _, seen = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS + 1)
        return jnp.sqrt(jnp.mean(jnp.square(seen[-1] - seen[0])))

    return float(np.mean([run(jax.random.key(seed)) for seed in range(2)]))


def config(**model):
    values = {"n_layers": 2, "vocab_size": 32, "dtype": "float32", "base_width": 32, "scan_unroll": 1, **model}
    values["ffns"] = {"dense": {"glu": False, "activation": "relu"}}
    optim = {"lr": 3e-4, "weight_decay": 0.0, "clip_norm": 0.0, "schedule": "constant", "warmup": 0.0}
    return from_dict({"model": values, "optim": optim})


def slope(sizes, values):
    """d log(value) / d log(size)."""
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


@pytest.mark.parametrize("mixer", ("attention", "gla"))
def test_width(mixer):
    """Under muP the change of the logits is flat in width."""
    changes = [growth(config(d_model=d, pattern=[mixer], parametrization="mup")) for d in WIDTHS]
    assert abs(slope(WIDTHS, changes)) < 0.15, changes


@pytest.mark.parametrize("mixer", ("gated_deltanet", "linear_attention"))
def test_width_of_hidden_states(mixer):
    """Under muP the change of the last hidden states is flat in width."""
    changes = [growth(config(d_model=d, pattern=[mixer], parametrization="mup"), "hidden") for d in NARROW]
    assert abs(slope(NARROW, changes)) < 0.15, changes


def test_width_without_mup():
    """The checks can fail: under the standard parametrisation the changes grow."""
    changes = [growth(config(d_model=d, parametrization="standard")) for d in WIDTHS]
    assert slope(WIDTHS, changes) > 0.5, changes
    changes = [growth(config(d_model=d, parametrization="standard"), "hidden") for d in NARROW]
    assert slope(NARROW, changes) > 0.5, changes


@pytest.mark.parametrize("kind", ("attention", "diag_attention", "deltanet", "gated_deltanet", "kda"))
def test_scales_of_scores(kind):
    """At the base width 1/sqrt(K); at m times that 1/m of it for q.k, the same for q.k of unit vectors."""
    base, wide = (scale_of(kind, config(d_model=d, pattern=[kind], parametrization="mup").model) for d in (32, 128))
    np.testing.assert_allclose(base, (6 if kind == "gated_deltanet" else 8) ** -0.5)
    np.testing.assert_allclose(wide, base / 4 if "attention" in kind else base)


def scale_of(kind, model):
    return nnx.eval_shape(lambda: MIXERS[kind](model.mixers[kind], model, Maker(jax.random.key(0), model))).scale


def test_base_width_is_the_standard_parametrisation():
    assert growth(config(d_model=32, parametrization="mup")) == growth(config(d_model=32))


def test_depth():
    """With branches x 1/L (CompleteP, 2505.01618) the change of the logits is flat in depth; without, it grows."""
    depths = (4, 64)
    scaled = [growth(config(d_model=32, n_layers=n, base_depth=1)) for n in depths]
    plain = [growth(config(d_model=32, n_layers=n)) for n in depths]
    assert abs(slope(depths, scaled)) < 0.15, (scaled, plain)
    assert slope(depths, plain) > 0.3, (scaled, plain)
