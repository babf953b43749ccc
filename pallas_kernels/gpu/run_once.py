"""Runs every family's GPU kernels once, forward and backward, at small odd shapes: for compute-sanitizer to watch.

  compute-sanitizer --tool memcheck python -m pallas_kernels.gpu.run_once

Inputs as in `bench_cases`: T that fills no chunk, both head sizes, one head whose T is cut in pieces, groups of unequal
sizes. Prints the sum of every output, and ends with exit code 1 where one is not finite.
"""

import argparse
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.commands import Parser, command
from pallas_kernels.gpu.bench_cases import FAMILIES, chosen, forward, forward_backward, make_inputs

OWN = {name: family for name, family in FAMILIES.items() if family.implementation == "pallas_gpu"}
SHAPES = ((1, 130, 2, 64), (1, 130, 2, 128), (1, 2100, 1, 64))  # B, T, H, D; the last one in pieces
GROUPED = ((1024, 5, 256, 384),)  # rows, groups, K, N


def shapes(family):
    return GROUPED if family.op == "grouped_matmul" else SHAPES


def program(family, implementation, shape):
    """Function of a key: output and gradients by name."""
    both = forward_backward(family, implementation)

    def run(key):
        first, second = jax.random.split(key)
        arrays = make_inputs(family, shape, first)
        like = jax.eval_shape(forward(family, implementation), arrays)
        o, grads = both(jax.random.normal(second, like.shape, like.dtype), arrays)
        return {"o": o} | grads

    return run


@command
def main(argv=None):
    parser = Parser(
        prog="python -m pallas_kernels.gpu.run_once",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", default=",".join(OWN), help="comma list of: %(default)s")
    args = parser.parse_args(argv)
    names = chosen(parser, args.families, OWN)
    if jax.default_backend() != "gpu":
        parser.error(f"a GPU is needed, the default backend is {jax.default_backend()}")
    finite = True
    for name in names:
        for shape in shapes(OWN[name]):
            run = jax.jit(program(OWN[name], "pallas_gpu", shape))
            sums = {key: float(jnp.sum(x, dtype=jnp.float32)) for key, x in run(jax.random.key(0)).items()}
            finite &= all(map(jnp.isfinite, sums.values()))
            print(f"{name:26s} {shape!s:22s}", " ".join(f"{key} {x:.4g}" for key, x in sums.items()), flush=True)
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
