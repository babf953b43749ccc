"""Residual topologies: how mixer and FFN meet the residual stream. x [B, T, d] throughout.

Every branch is multiplied by `branch_multiplier(model)`, which is 1 unless depth scaling is on.
"""

import jax
from flax import nnx

from efficient_lm.ffn import FFNS
from efficient_lm.layers import branch_multiplier
from efficient_lm.mixers import MIXERS
from efficient_lm.norms import NORMS
from efficient_lm.registry import Registry

RESIDUALS = Registry("residual topology")


class Block(nnx.Module):
    """A mixer and an FFN with their norms; subclasses say where the norms stand."""

    inner_norms = False
    extra_params = 0  # arrays' sizes beside mixer, FFN and norms

    def __init__(self, model, names: tuple[str, str], make):
        mixer, ffn = model.mixers[names[0]], model.ffns[names[1]]
        self.multiplier = branch_multiplier(model)
        self.mixer = MIXERS[mixer.kind](mixer, model, make)
        self.ffn = FFNS[ffn.kind](ffn, model, make) if FFNS[ffn.kind].present else None

        def norm():
            return NORMS[model.norm](make, model.d_model, model.norm_eps)

        self.mixer_norm = norm()
        self.ffn_norm = norm() if self.ffn is not None else None
        self.mixer_out_norm = norm() if self.inner_norms else None
        self.ffn_out_norm = norm() if self.inner_norms and self.ffn is not None else None

    def __call__(self, x, ctx):
        """x, ctx -> x, aux; aux["observed"] = {"mixer" or "ffn": what that part wants to see of a step}."""
        y, aux = self.mixer(self._normed(self.mixer_norm, x), ctx)
        x, more = self._ffn(self._add(x, y, self.mixer_out_norm), ctx)
        observed = {"mixer": aux.pop("observed", {}), "ffn": more.pop("observed", {})}
        observed = {part: seen for part, seen in observed.items() if seen}
        return x, aux | more | ({"observed": observed} if observed else {})

    def attention_weights(self, x, ctx):
        """[B, H, T, T] of the mixer on this input of the block, or None; `Mixer.attention_weights`."""
        return self.mixer.attention_weights(self._normed(self.mixer_norm, x), ctx)

    def prefill(self, x, ctx, max_len):
        """As the call, without aux: x [B, n, d] -> x, the mixer's state after n tokens."""
        y, state = self.mixer.prefill(self._normed(self.mixer_norm, x), ctx, max_len)
        return self._ffn(self._add(x, y, self.mixer_out_norm), ctx)[0], state

    def step(self, x, state, ctx):
        """One token: x [B, d], mixer state -> x, state."""
        y, state = self.mixer.step(self._normed(self.mixer_norm, x), state, ctx)
        x = self._add(x, y, self.mixer_out_norm)
        return self._ffn(x[:, None], None)[0][:, 0], state

    def _ffn(self, x, ctx):
        if self.ffn is None:
            return x, {}
        y, aux = self.ffn(self._normed(self.ffn_norm, x), ctx)
        return self._add(x, y, self.ffn_out_norm), aux

    def _normed(self, norm, x):
        """What a branch gets."""
        return norm(x)

    def _add(self, x, y, out_norm):
        if out_norm is not None:
            y = out_norm(y)
        return x + y if self.multiplier == 1 else x + self.multiplier * y


@RESIDUALS.register("pre")
class PreNorm(Block):
    """x + f(norm(x))."""


@RESIDUALS.register("sandwich")
class Sandwich(Block):
    """x + norm(f(norm(x))), the outer norm inside the branch (Peri-LN 2502.02732)."""

    inner_norms = True


@RESIDUALS.register("layernorm_scaling")
class LayerNormScaling(Block):
    """x + f(norm(x) / sqrt(layer)), layers from 1: the variance of the stream grows less with depth (2502.05795)."""

    extra_params = 1

    def __init__(self, model, names, make):
        super().__init__(model, names, make)
        self.norm_scale = make.state(jax.lax.rsqrt(1.0 + make.layer))  # differs between layers of one scan

    def _normed(self, norm, x):
        return norm(x) * jax.lax.stop_gradient(self.norm_scale[...]).astype(x.dtype)
