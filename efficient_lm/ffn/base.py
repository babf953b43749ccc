"""The FFN contract, the twin of mixers/base.py without time: y_t depends on x_t only."""

from dataclasses import dataclass

from flax import nnx

from efficient_lm.flops import Flops
from efficient_lm.registry import Registry
from efficient_lm.schema import setting

FFNS = Registry("ffn")


@dataclass(frozen=True)
class FFNConfig:
    """Settings common to all FFNs."""

    kind: str = setting("", "registered ffn; '' = the name of the section")


class FFN(nnx.Module):
    """Base class; `present` False means that the block has no FFN sub-layer at all."""

    Config = FFNConfig
    present = True

    def __init__(self, cfg, model, make):
        """Create parameters with `make` (layers.Maker)."""

    def __call__(self, x, ctx):
        """x [B, T, d] -> y [B, T, d], aux {name: scalar, or [n] where the name ends in _profile}."""
        raise NotImplementedError

    @staticmethod
    def next_state(cfg, params, observed, progress):
        """This part's parameters after a step, with new values for those of role 'state'.

        Only called when __call__ put "observed" into aux: a dict of arrays that add up over micro-batches. `progress`
        is the share of the run's steps that are done, this one included.
        """
        raise NotImplementedError

    @staticmethod
    def statistics(cfg, observed) -> dict:
        """What to log of "observed", added up over the whole step: {name: scalar, or [n] for a name in _profile}."""
        return {}

    @classmethod
    def check(cls, cfg, model, path: str) -> None:
        """Raise ConfigError where `cfg` can't be used in `model`."""

    @staticmethod
    def flops_per_token(cfg, model) -> Flops:
        """Forward FLOPs per token."""
        raise NotImplementedError

    @staticmethod
    def param_count(cfg, model) -> int:
        """Number of parameters of one layer."""
        raise NotImplementedError

    @classmethod
    def active_param_count(cls, cfg, model) -> int:
        """Parameters of one layer that a token uses."""
        return cls.param_count(cfg, model)


@FFNS.register("none")
class NoFFN(FFN):
    """For blocks that are a mixer alone (Mamba)."""

    present = False

    @staticmethod
    def flops_per_token(cfg, model):
        return Flops()

    @staticmethod
    def param_count(cfg, model):
        return 0
