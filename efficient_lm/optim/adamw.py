"""AdamW: u = m / (sqrt(v) + eps) + weight_decay * p, with bias-corrected moments m and v in float32.

References: 1412.6980, decoupled decay 1711.05101.
"""

import jax
import optax

from efficient_lm.optim.base import OPTIMIZERS, add_decay, scale_by_tree


@OPTIMIZERS.register("adamw")
def adamw(cfg, groups) -> optax.GradientTransformation:
    """The update direction; weight decay is multiplied by the learning rate, as in PyTorch and optax."""
    # Adam does not see the scale of a gradient except through eps: g / f with eps is g with eps * f.
    return optax.chain(
        scale_by_tree(jax.tree.map(lambda f: 1.0 / f, groups.eps)),
        optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps),
        add_decay(cfg.weight_decay, groups.decay),
    )
