"""How to choose the inputs of a matrix that are left out, without training. All leave out exact zeros.

A matrix W reads x; input i adds x_i W_i (a row) to the output. A method scores the inputs, by |x_i| or by the size of
what they add, |x_i| ||W_i||_2, and keeps the scores above a threshold of the matrix, or the largest of each token. Its
dial u in [0, 1] goes from nothing (but zeros) left out to everything, or nearly. Of a mixture of experts only
the shared ones are touched.
"""

from dataclasses import dataclass

from efficient_lm.registry import Registry

METHODS = Registry("sparsity method")


@dataclass(frozen=True)
class Method:
    """One way to leave out inputs.

    where: regular expression on the path of a map in its block; only these are touched.
    weighted: score |x_i| ||W_i||_2 instead of |x_i|.
    dial: what u is: 'error', the relative output error (CETT) that the threshold of each layer makes; 'quantile', the
      share of inputs below the threshold of each matrix; 'block', that of the multiply-adds of each block, which
      greedy.py divides over its matrices; 'level', one threshold for all layers as a share of the largest 99 %
      quantile of a layer; 'token', the share of inputs left out of each token.
    rank: what is left out still passes through a factorisation of W of this rank, as a share of its smaller side.
    rotated: turn the inputs that ROTATED names into a basis in which the rows of one matrix are orthogonal.
    """

    about: str
    where: str = r"^ffn/(shared/)?down$"
    weighted: bool = False
    dial: str = "quantile"
    rank: float = 0.0
    rotated: bool = False


# Maps that read the same input, and the one among them whose rows WINA makes orthogonal.
ROTATED = {
    **dict.fromkeys(("mixer/q", "mixer/k", "mixer/v"), "mixer/k"),
    **dict.fromkeys(("ffn/gate", "ffn/up"), "ffn/gate"),
}
EVERY = r"^(?!.*(^|/)act$)"  # all but activations

METHODS["cett"] = Method("CETT of 2411.02335: the same relative output error in every FFN", weighted=True, dial="error")
METHODS["topk"] = Method("the largest hidden activations of each token (2210.06313)", dial="token")
METHODS["fatrelu"] = Method(
    "|activation| above one threshold for all layers: FATReLU (2402.13516) where the activation is ReLU",
    where=r"^ffn/(shared/)?act$",
    dial="level",
)
METHODS["teal"] = Method(
    "TEAL (2408.14690): |x_i| above a quantile of each matrix, shares allocated greedily in each block",
    EVERY,
    dial="block",
)
METHODS["magnitude"] = Method("TEAL without its allocation: the same quantile for every matrix", EVERY)
METHODS["wina"] = Method(
    "WINA (2505.19427): the largest |x_i| ||W_i|| of each token, without its rotations", EVERY, True, "token"
)
METHODS["wina_rotated"] = Method(
    "WINA with its rotations, taken as free: orthogonal rows of W_k and W_gate", EVERY, True, "token", rotated=True
)
METHODS["rsparse"] = Method(
    "R-Sparse (2504.19449): |x_i| ||W_i|| above a quantile, the rest through a low rank", EVERY, True, rank=0.05
)
