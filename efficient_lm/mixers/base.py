"""The mixer contract: sequence mixing, one file per mixer.

A mixer file has a frozen config dataclass (subclass of `MixerConfig`) and a `Mixer` subclass registered with
`@MIXERS.register("name")` whose `Config` is that dataclass. Being registered buys the conformance suite
(tests/conformance/test_mixers.py): shapes and dtypes, no leak of the future, batch independence, chunked = step by
step, with and without prefill, document resets = separate sequences, gradients against float64, parameters and FLOPs
as declared, sharded = one device, and a short run whose loss falls.
"""

from dataclasses import dataclass

import jax
from flax import nnx

from efficient_lm.config import ModelConfig
from efficient_lm.flops import Flops
from efficient_lm.layers import Context
from efficient_lm.registry import Registry
from efficient_lm.schema import build, setting

MIXERS = Registry("mixer")


@dataclass(frozen=True)
class MixerConfig:
    """Settings common to all mixers."""

    kind: str = setting("", "registered mixer; '' = the name of the section")


class Mixer(nnx.Module):
    """Base class. `cfg` is the mixer's own config, `model` the ModelConfig (for d_model, norm_eps, ...)."""

    Config = MixerConfig
    kernel = ""  # the operator that it runs on, for the table of `python -m efficient_lm.mixers`
    at_340M = {}  # settings of the paper at 340M, which configs/mixers.py takes
    variants = {}  # {label: settings} that deserve the conformance suite beside the defaults
    giving = {}  # {key of ctx.carry: settings with which the mixer gives it to later layers}

    def __init__(self, cfg, model, make):
        """Create parameters with `make` (layers.Maker).

        `make.layer` is the 0-based layer, an array: initial values may depend on it, shapes may not.
        """

    def __call__(self, x, ctx):
        """x [B, T, d], ctx layers.Context -> y [B, T, d], aux {name: scalar}.

        Must not look at later tokens or, where ctx.segment_ids differ, at other documents. An aux entry whose
        name ends in `_loss` is added to the training loss; the others are logged, one that ends in `_profile` as an
        array [n] per layer. A mixer that shares something with later layers puts it into ctx.carry under the keys
        that `gives` names, also in `prefill` and `step`, where it may be a whole cache instead of this token's part.
        """
        raise NotImplementedError

    def init_state(self, batch: int, max_len: int):
        """Decoding state before the first token: a pytree of arrays with leading axis `batch`."""
        raise NotImplementedError

    def step(self, x, state, ctx):
        """One token: x [B, d], state -> y [B, d], state. ctx.positions is [B]; ctx.carry is of this token."""
        raise NotImplementedError

    def prefill(self, x, ctx, max_len: int):
        """The first n tokens at once: x [B, n, d] -> y [B, n, d], the state that n steps would reach.

        ctx as in training, with positions 0 .. n-1 and no segment_ids; `max_len` as in `init_state`. This default
        walks through `step`, with an empty carry.
        """

        def one(state, token):
            x, position = token
            y, state = self.step(x, state, Context(None, position))
            return state, y

        tokens = x.swapaxes(0, 1), ctx.positions.T
        state, y = jax.lax.scan(one, self.init_state(x.shape[0], max_len), tokens)
        return y.swapaxes(0, 1), state

    def attention_weights(self, x, ctx):
        """Weights [B, H, T, T] in float32 with which queries (next to last axis) read tokens, or None: for probes.

        Arguments as of the call. Only mixers that compute such weights have them, not recurrences that could.
        """
        return None

    @staticmethod
    def gives(cfg, model) -> dict[str, tuple[int, ...]]:
        """Keys of ctx.carry that the mixer sets, with the shape of each per token."""
        return {}

    @staticmethod
    def takes(cfg, model) -> dict[str, tuple[int, ...]]:
        """Keys of ctx.carry that an earlier layer must have set, with the shape of each per token."""
        return {}

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
        """Raise ConfigError where `cfg` can't be used in `model`; `path` leads the message."""

    @staticmethod
    def flops_per_token(cfg, model, seq_len: int) -> Flops:
        """Forward FLOPs per token at training length `seq_len`."""
        raise NotImplementedError

    @staticmethod
    def param_count(cfg, model) -> int:
        """Number of parameters of one layer."""
        raise NotImplementedError

    @staticmethod
    def state_bytes(cfg, model, seq_len: int) -> int:
        """Bytes of decoding state per sequence after `seq_len` tokens, in the dtypes that `init_state` uses."""
        raise NotImplementedError


def model_of(kind: str, settings=None, d_model: int = 64) -> dict:
    """`d_model`, `pattern` and `mixers` of a model with this mixer, after others that give what it takes."""
    settings = {**(settings or {}), "kind": kind}
    cfg = build(MIXERS[kind].Config, settings)
    givers = {}
    for key in MIXERS[kind].takes(cfg, ModelConfig(d_model=d_model)):
        name, mixer = next((name, mixer) for name, mixer in MIXERS.items() if key in mixer.giving)
        givers[f"{key}_giver"] = {"kind": name, **mixer.giving[key]}
    return {"d_model": d_model, "pattern": [*givers, kind], "mixers": {**givers, kind: settings}}
