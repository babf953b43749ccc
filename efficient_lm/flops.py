"""Floating-point operations, each count under a named convention (a multiply-add is 2).

  causal    model FLOPs: softmax scores only for visible keys, linear mixers in their ideal chunk form
  full      the same, with softmax scores for all T keys (Chinchilla's convention)
  hardware  matmul FLOPs that our implementation executes, recomputation excluded
All are forward, per token; training is 3 x forward. "6n" is 6 x (parameters without the input embedding).
"""

from dataclasses import dataclass

TRAIN_FACTOR = 3.0


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token under the three conventions."""

    causal: float = 0.0
    full: float = 0.0
    hardware: float = 0.0

    def __add__(self, other):
        return Flops(self.causal + other.causal, self.full + other.full, self.hardware + other.hardware)


def dense(weights: int) -> Flops:
    """A token through matrices with `weights` elements."""
    return Flops(2.0 * weights, 2.0 * weights, 2.0 * weights)
