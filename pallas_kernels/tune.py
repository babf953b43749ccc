"""Time the configurations of kernels on this machine's GPU and keep the fastest as data (`pallas_kernels.tuned`).

  python -m pallas_kernels.tune --op diagonal_scan --shapes 8,2048,2048:1,16384,2048 --dtype bfloat16

A shape is B,T,D. A candidate is timed once its results agree with the default configuration's. Times are of calls
queued back to back, so that launches hide behind the kernels before them; GB/s counts every array once. The other GPU
kernels have one fixed configuration per head size.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.bench.timing import seconds
from pallas_kernels.commands import Parser, command
from pallas_kernels.gpu import diagonal_scan
from pallas_kernels.gpu.tiles import not_hopper


def copy_rate():
    """Measured bytes/s of a 1 GiB copy, read and write counted."""
    x = jax.random.normal(jax.random.key(0), (2**29,), jnp.bfloat16)
    return 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x, limit=0.2)


def diagonal_scan_cases(shape, dtype):
    """(class of call, pass(*arrays, config=), arrays, candidates, default) for the forward and the backward pass."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, h, dh = (jax.random.normal(key, shape, dtype) for key in keys[:3])
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], shape) + 3).astype(dtype)
    state = jnp.zeros((shape[0], shape[2]))
    for direction, run, arrays, dtypes in (
        ("forward", diagonal_scan.forward_pass, (x, log_decay, state), ([dtype] * 2, [dtype])),
        ("backward", diagonal_scan.backward_pass, (log_decay, h, dh, state), ([dtype] * 3, [dtype] * 2)),
    ):
        default = diagonal_scan.default_config(shape, *dtypes)
        call = diagonal_scan.call_class(direction, shape, dtypes[0])
        yield call, run, arrays, [default, *diagonal_candidates(*dtypes)], default


def diagonal_candidates(inputs, outputs):
    """Configurations with the most stages that leave room for one program, or two, on a multiprocessor."""
    residents = (1, 1), (1, 2), (2, 1)  # programs of a multiprocessor, warpgroups of a program
    for channels, piece, vector, (programs, turns) in itertools.product((16, 32, 64, 128), (7, 15), (2, 4), residents):
        configs = [diagonal_scan.Config(channels, piece, n, vector, turns) for n in range(2, 13, turns)]
        limit = diagonal_scan.MEMORY // programs
        configs = [c for c in configs if diagonal_scan.shared_memory(c, inputs, outputs) <= limit]
        yield from [c for c in configs[-1:] if diagonal_scan.rows(c) <= diagonal_scan.MAX_ROWS]


CASES = {"diagonal_scan": diagonal_scan_cases}


def agree(got, want):
    """Whether all arrays agree to rounding; NaN never does."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32))  # noqa: E731
    return all(bool(norm(a.astype(jnp.float32) - b.astype(jnp.float32)) <= 0.004 * norm(b)) for a, b in pairs)


def compile_all(run, arrays, configs):
    """{configuration: compiled call}, compiled side by side: that is most of the time that tuning takes."""
    lowered = [jax.jit(functools.partial(run, config=config)).lower(*arrays) for config in configs]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(configs, pool.map(lambda call: call.compile(), lowered), strict=True))


def tune(op, shape, dtype, rate):
    """{class of call: fastest configuration} for one operator and shape; prints a line per candidate."""
    best = {}
    for call, run, arrays, candidates, default in CASES[op](shape, jnp.dtype(dtype)):
        compiled = compile_all(run, arrays, list(dict.fromkeys(candidates)))
        want = compiled[default](*arrays)
        size = sum(x.nbytes for x in (*arrays, *jax.tree.leaves(want)))
        times = {}
        for config, f in compiled.items():
            if not agree(f(*arrays), want):
                print(f"{op}: {call}: {config} disagrees with the default", file=sys.stderr)
                continue
            times[config] = spent = seconds(f, *arrays, limit=0.05)
            print(f"{op}: {call}: {config} {1e3 * spent:.4f} ms, {size / spent / 1e9:.0f} GB/s, "
                  f"{100 * size / spent / rate:.0f} % of a copy", flush=True)  # fmt: skip
        best[call] = min(times, key=times.get)._asdict()
    return best


def arguments(argv):
    parser = Parser(
        prog="python -m pallas_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", default="diagonal_scan", choices=list(CASES))
    parser.add_argument("--shapes", default="8,2048,2048:1,16384,2048", help="B,T,D, several separated by ':'")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=pathlib.Path, help="table to add to; default: the shipped one of this chip")
    args = parser.parse_args(argv)
    try:
        args.shapes = [tuple(int(n) for n in shape.split(",")) for shape in args.shapes.split(":")]
    except ValueError:
        parser.error(f"--shapes {args.shapes}: whole numbers B,T,D, several separated by ':'")
    for shape in args.shapes:
        if len(shape) != 3 or min(shape) < 1:
            parser.error(f"--shapes {shape}: three positive numbers B,T,D")
    if jax.default_backend() != "gpu" or not_hopper():
        parser.error(f"needs a Hopper GPU, found {jax.devices()[0].device_kind}")
    return args


@command
def main(argv=None):
    args = arguments(argv)
    path = args.out or tuned.FOLDER / f"{tuned.chip()}.json"
    rate = copy_rate()
    for shape in args.shapes:
        table = json.loads(path.read_text()) if path.exists() else {}
        known = table.get(args.op, {}) | tune(args.op, shape, args.dtype, rate)
        table[args.op] = dict(sorted(known.items()))
        path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
