"""ReBased (2402.10644): Based with a learned quadratic kernel, (q.k)^2 / 16, of layer-normed queries and keys.

The norm has a learned scale and shift per channel, so that any quadratic function with that symmetry can be learned,
and weights may be 0, which those of Based can't.
"""

from dataclasses import dataclass

from efficient_lm.mixers.base import MIXERS
from efficient_lm.mixers.based import Based, BasedConfig
from efficient_lm.mixers.linear_attention import feature_map_setting


@dataclass(frozen=True)
class ReBasedConfig(BasedConfig):
    feature_map: str = feature_map_setting("rebased")


@MIXERS.register("rebased")
class ReBased(Based):
    Config = ReBasedConfig
