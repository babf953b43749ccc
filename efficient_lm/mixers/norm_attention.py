"""NormAttention of TransNormer (2210.10340): linear attention with a norm over all heads instead of the denominator.

The denominator of linear attention makes gradients unbounded; RMSNorm of S_t^T phi(q_t) bounds them. For the later half
of the layers; the earlier half are 'diag_attention', as in configs/linear.py.
"""

from dataclasses import dataclass

from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.linear_attention import LinearAttention, LinearAttentionConfig, norm_setting
from efficient_lm.schema import setting


@dataclass(frozen=True)
class NormAttentionConfig(LinearAttentionConfig):
    normalise: bool = setting(False, "divide by the sum of the weights as well")
    norm: str = norm_setting("wide")


@MIXERS.register("norm_attention")
class NormAttention(LinearAttention):
    Config = NormAttentionConfig
    variants = {}
