"""Times every family with a GPU kernel on the machine's GPU, beside XLA and the device's own limits, in one run.

  python -m pallas_kernels.gpu.bench_gpu --out analysis/results/kernels/h100.json
  python -m pallas_kernels.gpu.bench_table --write docs/kernels_gpu.md README.md   # tables from that file

A row is one family at one shape, forward or forward + backward (all gradients, gates included), bf16, fresh random
inputs with gates as a model makes them (`bench_cases`). Processes compile side by side, call each kernel once and hold
what they compiled; once all are done, or --compile-seconds have passed, they run one task at a time on the quiet
machine, a process after the other, so that its memory is free for the next. What matters most is compiled first: every
family at (8, 2048, 16, 128), then at T = 16384, the other shapes, each family's errors against the float64 recurrence,
and XLA. The file is written after every task.

`kernel_ms`: calls queued back to back, so that launches hide behind the kernels before them. `ms`: the L2 cache flushed
before each call, launch included (flush + call less flush alone). Medians. `floor_ms`: the larger of model FLOPs over
the matmul rate and compulsory bytes over the copy rate, both measured before the first row. `first_step_s`: tracing,
compiling and the first call, beside the compilers of other rows.
"""

import argparse
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.timing import seconds
from pallas_kernels.bench.turns import compile_all, run_all
from pallas_kernels.commands import Parser, command
from pallas_kernels.gpu.bench_cases import FAMILIES, SHAPES, chosen, forward, forward_backward, make_inputs, work

L2_FLUSH = 2**26  # float32 numbers: several times the cache
SECONDS = 0.15  # of timing, per convention
CHECKED = {"grouped matmul": (1024, 4, 256, 256), "diagonal scan": (2, 1024, 2, 128)}  # shapes whose history fits
CHECK_SHAPE = (1, 2048, 2, 128)  # long enough for T in pieces
ERRORS = "errors"  # a task that times nothing
# XLA does not tune its products, whose timings other tasks would disturb; untuned ones in Triton are slow.
XLA_FLAGS = " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def tasks(families, shapes):
    """[(family, shape, implementation or ERRORS)], the most important first."""
    own = {name: [s for s in FAMILIES[name].shapes if s in shapes or s not in SHAPES] for name in families}
    rank = max(map(len, own.values()))
    ours = [
        [(name, own[name][i], FAMILIES[name].implementation) for name in families if i < len(own[name])]
        for i in range(rank)
    ]
    xla = [(name, own[name][0], "xla") for name in families if own[name]]
    checks = [(name, CHECKED.get(name, CHECK_SHAPE), ERRORS) for name in families]
    return [*sum(ours, []), *checks, *xla]


@jax.jit
def flush(buffer):
    return buffer + 1


def flushed_ms(f, arguments, buffer, repeats):
    """Milliseconds of a call whose inputs are not in the L2 cache, launch included."""

    def queue(with_call):
        start = time.perf_counter()
        for _ in range(repeats):
            last = flush(buffer), f(*arguments) if with_call else None
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / repeats * 1e3

    queue(True), queue(False)
    return statistics.median(queue(True) - queue(False) for _ in range(7))  # in turns: a hiccup spoils one difference


def ceilings():
    """Measured bf16 matmul rate (FLOP/s) and copy rate (bytes/s, read and written)."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2**29,), jnp.bfloat16)
    return 2 * 8192**3 / seconds(jax.jit(lambda a: a @ a), a, limit=0.1), 4 * 2**29 / seconds(
        jax.jit(lambda x: x + 1), x, limit=0.1
    )


def fresh():
    return jax.random.key(time.time_ns() % 2**32)


def timer(name, shape, implementation):
    """Compiles; a function of the device's rates that times and gives the rows, one per mode."""
    family = FAMILIES[name]
    arrays = jax.eval_shape(lambda: make_inputs(family, shape, jax.random.key(0)))
    run = forward(family, implementation)
    out = jax.eval_shape(run, arrays)
    inputs = jax.jit(lambda key: make_inputs(family, shape, key)).lower(jax.random.key(0)).compile()
    made, first_step, todo = {}, {}, work(family, shape, arrays, out)
    for mode, f, arguments in (
        ("fwd", run, (arrays,)),
        ("fwdbwd", forward_backward(family, implementation), (out, arrays)),
    ):
        start = time.perf_counter()
        made[mode] = jax.jit(f).lower(*arguments).compile()
        first_step[mode] = time.perf_counter() - start

    def call():
        """{mode: arguments} of fresh inputs, and the seconds of a call with each."""
        given, spent = {"fwd": (inputs(fresh()),)}, {}
        for mode, f in made.items():
            start = time.perf_counter()
            result = jax.block_until_ready(f(*given[mode]))
            spent[mode] = time.perf_counter() - start
            given.setdefault("fwdbwd", (result, *given["fwd"]))
        return given, spent

    def first_call():
        for mode, spent in call()[1].items():
            first_step[mode] += spent

    if implementation != "xla":  # which needs so much memory that it waits for its turn
        first_call()

    def timed(rates):
        if implementation == "xla":
            first_call()
        buffer, rows = jnp.zeros(L2_FLUSH, jnp.float32), []
        given, _ = call()
        for mode, f in made.items():
            arguments = given[mode]
            spent = seconds(f, *arguments, limit=SECONDS)
            flops, size = todo[mode]
            floor = max(flops / rates[0], size / rates[1])
            rows.append(
                dict(
                    family=name,
                    implementation=implementation,
                    shape=shape,
                    mode=mode,
                    kernel_ms=spent * 1e3,
                    ms=flushed_ms(f, arguments, buffer, int(min(20, max(3, SECONDS / 8 / spent)))),
                    floor_ms=floor * 1e3,
                    of_floor=floor / spent,
                    tflops=flops / spent / 1e12,
                    gbs=size / spent / 1e9,
                    first_step_s=first_step[mode],
                )
            )
        return rows

    return timed


def checker(name, shape, _):
    """Compiles; a function that gives one row, relative errors in norm of "o" and "d" + argument, against float64."""
    family = FAMILIES[name]
    arrays = jax.eval_shape(lambda: make_inputs(family, shape, jax.random.key(0)))
    do = jax.eval_shape(forward(family, "reference"), arrays)

    def draw(key):
        noise, key = jax.random.split(key)
        return jax.random.normal(noise, do.shape, do.dtype), make_inputs(family, shape, key)

    inputs = jax.jit(draw).lower(jax.random.key(0)).compile()
    ours = jax.jit(forward_backward(family, family.implementation)).lower(do, arrays).compile()

    def wide(make):
        """`make` for all arrays but integers."""
        return lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else make(x)

    with jax.enable_x64(True):
        doubles = jax.tree.map(wide(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64)), (do, arrays))
        exact = jax.jit(forward_backward(family, "reference")).lower(*doubles).compile()

    def checked(rates):
        given = inputs(fresh())
        got = ours(*given)
        with jax.enable_x64(True):
            want = exact(*jax.tree.map(wide(lambda x: np.asarray(x, np.float64)), given))
        pairs = {"o": (got[0], want[0])} | {f"d{name}": (got[1][name], want[1][name]) for name in got[1]}
        pairs = {name: [np.asarray(x, np.float64) for x in pair] for name, pair in pairs.items()}
        errors = {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in pairs.items()}
        return [dict(family=name, shape=shape, errors=errors)]

    return checked


def prepared(task):
    return (checker if task[2] == ERRORS else timer)(*task)


def rounded(x):
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def line(row):
    head = f"{row['family']:26s} {str(row['shape']):24s} "
    if "failed" in row:
        return head + f"{row['implementation']} FAILED {row['failed']}"
    if "errors" in row:
        return head + "errors " + " ".join(f"{name} {e:.4f}" for name, e in row["errors"].items())
    return head + (
        f"{row['implementation']:10s} {row['mode']:6s} {row['kernel_ms']:8.3f} ms "
        f"({row['ms']:.3f} flushed), {100 * row['of_floor']:.0f} % of floor, first step {row['first_step_s']:.1f} s"
    )


@command
def main(argv=None):
    parser = Parser(
        prog="python -m pallas_kernels.gpu.bench_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma list of: %(default)s")
    parser.add_argument("--shapes", default="0,1,2,3", help=f"comma list of indices into {SHAPES}")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() - 3), help="processes that compile")
    parser.add_argument("--compile-seconds", type=float, default=150, help="begin to compile nothing after so long")
    args = parser.parse_args(argv)
    families = chosen(parser, args.families, FAMILIES)
    if not set(args.shapes.split(",")) <= set(map(str, range(len(SHAPES)))):
        parser.error(f"--shapes {args.shapes}: allowed are indices from 0 to {len(SHAPES) - 1}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the GPU's memory
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + XLA_FLAGS
    if jax.default_backend() != "gpu":
        parser.error(f"a GPU is needed, the default backend is {jax.default_backend()}")
    start = time.perf_counter()
    doc = dict(
        device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d", time.gmtime()), jax=jax.__version__, rows=[]
    )

    def add(task, rows, error):
        if error:
            name, shape, implementation = task
            rows = [dict(family=name, shape=shape, implementation=implementation, failed=error)]
        for row in rows:
            print(line(row), flush=True)
        doc["rows"] += rows
        doc["seconds"] = time.perf_counter() - start
        with open(args.out, "w") as f:
            json.dump(rounded(doc), f, indent=1)

    todo = tasks(families, [SHAPES[int(i)] for i in args.shapes.split(",")])
    holders, errors = compile_all(todo, prepared, min(args.jobs, len(todo)), args.compile_seconds)
    doc["compile_s"] = time.perf_counter() - start
    print(f"compiled {len(holders)} of {len(todo)} tasks in {doc['compile_s']:.0f} s", flush=True)
    rates = ceilings()
    doc |= dict(matmul_tflops=rates[0] / 1e12, copy_gbs=rates[1] / 1e9)
    print(f"{doc['device']}: matmul {doc['matmul_tflops']:.0f} TFLOP/s, copy {doc['copy_gbs']:.0f} GB/s", flush=True)
    for task, error in errors.items():
        add(task, [], error)
    for task, rows, error in run_all(todo, holders, rates):
        add(task, rows, error)


if __name__ == "__main__":
    sys.exit(main())
