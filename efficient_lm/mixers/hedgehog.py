"""Hedgehog (2402.04347): normalised linear attention with learned feature maps that can be as spiky as softmax.

phi(x) = [softmax(W x), softmax(-W x)] over the channels of a head, the bounded form of the authors' later work
(2410.10254), or [exp(W x + b), exp(-W x - b)] as in the paper ('hedgehog_exp', which overflows above |W x| = 88). W
starts as the identity. Output matrix, no norm. Trained from scratch here: the paper's step of matching the attention
weights of a softmax teacher is left out.
"""

from dataclasses import dataclass

from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    feature_map_setting,
    norm_setting,
)


@dataclass(frozen=True)
class HedgehogConfig(LinearAttentionConfig):
    feature_map: str = feature_map_setting("hedgehog")
    norm: str = norm_setting("none")


@MIXERS.register("hedgehog")
class Hedgehog(LinearAttention):
    Config = HedgehogConfig
    variants = {"exp": {"feature_map": "hedgehog_exp", "n_heads": 2}}
