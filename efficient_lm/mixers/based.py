"""Based's global layer (2402.18668): linear attention whose weights are e^s to second order, 1 + s + s^2 / 2.

s = q.k / sqrt(16) of queries and keys with 16 channels per head, o normalised by the sum of the weights, output matrix,
no norm. The paper alternates it with window attention of 64 tokens and gated short convolutions; the layout with
windows alone is a pattern, as in configs/linear.py.
"""

from dataclasses import dataclass

from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.linear_attention import (
    LinearAttention,
    LinearAttentionConfig,
    feature_map_setting,
    norm_setting,
)
from efficient_lm.schema import setting


@dataclass(frozen=True)
class BasedConfig(LinearAttentionConfig):
    feature_map: str = feature_map_setting("taylor")
    key_width: int = setting(16, "channels per head of queries and keys; 0 = d_model / n_heads", low=0)
    norm: str = norm_setting("none")


@MIXERS.register("based")
class Based(LinearAttention):
    Config = BasedConfig
    at_340M = {"n_heads": 16}
    variants = {}
