"""python -m efficient_lm.mixers: every registered mixer, measured on a real instance with default settings."""

import argparse
import sys

import jax

from efficient_lm.config import from_dict
from efficient_lm.layers import Maker
from efficient_lm.mixers import MIXERS
from efficient_lm.model import Part
from efficient_lm.schema import ConfigError

COLUMNS = ("mixer", "parameters", "/ d^2", "state bytes", "MFLOPs/token", "executed", "operator")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m efficient_lm.mixers",
        description="Parameters of one layer, decoding state per sequence after T tokens, forward FLOPs per token at "
        "training length T (model FLOPs, and matrix products that the XLA implementation executes).",
    )
    parser.add_argument("--d-model", type=int, default=1024, help="width of the residual stream (default 1024)")
    parser.add_argument("--seq-len", type=int, default=2048, help="T (default 2048)")
    args = parser.parse_args(argv)
    try:
        rows = table(args.d_model, args.seq_len)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"one layer, d_model {args.d_model}, T {args.seq_len}, default settings")
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    for name, *numbers, kernel in [COLUMNS, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False))
        print("  ".join([name.ljust(widths[0]), *cells, kernel]))
    return 0


def table(d_model: int, seq_len: int) -> list[tuple[str, ...]]:
    """Rows of COLUMNS as text, by name. Raises ConfigError."""
    rows = []
    for kind in sorted(MIXERS):
        config = from_dict({"model": {"d_model": d_model, "pattern": [kind]}, "train": {"seq_len": seq_len}})
        model, cls = config.model, MIXERS[kind]
        cfg = model.mixers[kind]
        params, state_bytes = measure(cls, cfg, model, seq_len)
        flops = cls.flops_per_token(cfg, model, seq_len)
        numbers = f"{params:,}", f"{params / d_model**2:.2f}", f"{state_bytes:,}"
        rows.append((kind, *numbers, f"{flops.causal / 1e6:.2f}", f"{flops.hardware / 1e6:.2f}", cls.kernel))
    return rows


def measure(cls, cfg, model, seq_len: int) -> tuple[int, int]:
    """(parameters of one layer, bytes of decoding state of one sequence) of an instance, without allocating it."""
    part = Part(lambda key, layer=0: cls(cfg, model, Maker(key, model, layer)), 0)
    params = jax.eval_shape(lambda: part.init(jax.random.key(0), 0))
    state = jax.eval_shape(lambda p: part.bind(p).init_state(1, seq_len), params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return size, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    sys.exit(main())
