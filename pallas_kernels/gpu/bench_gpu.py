"""Times every family with a GPU kernel on the machine's GPU, beside XLA and the device's own limits, in one run.

  python -m pallas_kernels.gpu.bench_gpu --out analysis/results/kernels/h100.json
  python -m pallas_kernels.gpu.bench_table --write        # tables of docs/kernels_gpu.md and README from that file

A row is one family at one shape, forward or forward + backward (all gradients, gates included), bf16, fresh random
inputs with gates as a model makes them (`bench_cases`). The file is written after every row, so that a run cut short
keeps what it has; the rows that matter most come first: every family at (8, 2048, 16, 128), then at T = 16384, then
XLA, then the other shapes, and last each family's errors against the float64 recurrence.

`kernel_ms`: calls queued back to back, so that launches hide behind the kernels before them. `ms`: the L2 cache flushed
before each call, launch included (flush + call less flush alone). Medians. `floor_ms`: the larger of model FLOPs over
the matmul rate and compulsory bytes over the copy rate, both measured at the start. `first_step_s`: tracing, compiling
and the first call, beside the compilers of other rows.

Processes compile side by side, since that takes far longer than timing, and take turns on the GPU. XLA does not tune
itself, which would run kernels while others are timed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.timing import seconds
from pallas_kernels.gpu.bench_cases import FAMILIES, SHAPES, forward, forward_backward, make_inputs, work

L2_FLUSH = 2**26  # float32 numbers: several times the cache
SECONDS = 0.08  # of timing, per convention
CHECKED = {"grouped matmul": (1024, 4, 256, 256), "diagonal scan": (2, 1024, 2, 128)}  # shapes whose history fits
CHECK_SHAPE = (1, 2048, 2, 128)  # long enough for T in pieces
ERRORS = "errors"  # a task that times nothing


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
    return [*sum(ours[:2], []), *xla, *sum(ours[2:], []), *checks]


def flushed_ms(f, arguments, buffer, repeats):
    """Milliseconds of a call whose inputs are not in the L2 cache, launch included."""
    flush = jax.jit(lambda x: x + 1)

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


def compiled(family, shape, implementation):
    """(inputs, {mode: (executable, seconds)}, {mode: work}): nothing runs on the GPU."""
    arrays = jax.eval_shape(lambda: make_inputs(family, shape, jax.random.key(0)))
    run = forward(family, implementation)
    out = jax.eval_shape(run, arrays)
    made = {}
    for mode, f, arguments in (
        ("fwd", run, (arrays,)),
        ("fwdbwd", forward_backward(family, implementation), (out, arrays)),
    ):
        start = time.perf_counter()
        made[mode] = jax.jit(f).lower(*arguments).compile(), time.perf_counter() - start
    return (
        jax.jit(lambda key: make_inputs(family, shape, key)).lower(jax.random.key(0)).compile(),
        made,
        work(family, shape, arrays, out),
    )


def timed(name, shape, implementation, inputs, made, work, rates):
    """Rows, one per mode."""
    buffer = jnp.zeros(L2_FLUSH, jnp.float32)
    arrays = inputs(jax.random.key(time.time_ns() % 2**32))
    out = None
    for mode, (f, compile_s) in made.items():
        arguments = (arrays,) if out is None else (out, arrays)
        start = time.perf_counter()
        result = jax.block_until_ready(f(*arguments))
        first_step = compile_s + time.perf_counter() - start
        out = result if out is None else out
        spent = seconds(f, *arguments, limit=SECONDS)
        flops, size = work[mode]
        floor = max(flops / rates[0], size / rates[1])
        yield dict(
            family=name,
            implementation=implementation,
            shape=shape,
            mode=mode,
            kernel_ms=spent * 1e3,
            ms=flushed_ms(f, arguments, buffer, int(min(20, max(3, SECONDS / 4 / spent)))),
            floor_ms=floor * 1e3,
            of_floor=floor / spent,
            tflops=flops / spent / 1e12,
            gbs=size / spent / 1e9,
            first_step_s=first_step,
        )


def checker(family, shape):
    """Function that gives {"o" or "d" + argument: relative error in norm}, the reference in float64; compiles first."""
    arrays = jax.eval_shape(lambda: make_inputs(family, shape, jax.random.key(0)))
    do = jax.eval_shape(forward(family, "reference"), arrays)
    ours = jax.jit(forward_backward(family, family.implementation)).lower(do, arrays).compile()

    def run():
        arrays = make_inputs(family, shape, jax.random.key(7))
        cotangent = jax.random.normal(jax.random.key(8), do.shape, do.dtype)
        got = ours(cotangent, arrays)
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else jnp.asarray(np.asarray(x), jnp.float64),
                (cotangent, arrays),
            )
            want = jax.jit(forward_backward(family, "reference"))(*wide)
        pairs = {"o": (got[0], want[0])} | {f"d{name}": (got[1][name], want[1][name]) for name in got[1]}
        pairs = {name: [np.asarray(x, np.float64) for x in pair] for name, pair in pairs.items()}
        return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in pairs.items()}

    return run


def serve(queue, rates, turn, results):
    """One process: compiles a task, waits for its turn on the GPU, times it, and takes the next."""
    while (task := queue.get()) is not None:
        name, shape, implementation = task
        family, row = FAMILIES[name], dict(family=name, shape=shape, implementation=implementation)
        try:
            if implementation == ERRORS:
                run = checker(family, shape)
                with turn:
                    results.put((dict(family=name, shape=shape, errors=run()),))
                continue
            made = compiled(family, shape, implementation)
            with turn:
                results.put(tuple(timed(name, shape, implementation, *made, rates)))
        except Exception as error:  # one failing kernel must not cost the other rows
            results.put((row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"},))
    results.put(None)


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


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="pallas_kernels.gpu.bench_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma list of: %(default)s")
    parser.add_argument("--shapes", default="0,1,2,3", help=f"comma list of indices into {SHAPES}")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() - 3), help="processes that compile")
    args = parser.parse_args(argv)
    families = args.families.split(",")
    for name in families:
        if name not in FAMILIES:
            parser.error(f"--families {name}: allowed are {', '.join(FAMILIES)}")
    if not set(args.shapes.split(",")) <= set(map(str, range(len(SHAPES)))):
        parser.error(f"--shapes {args.shapes}: allowed are indices from 0 to {len(SHAPES) - 1}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the GPU's memory
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    if jax.default_backend() != "gpu":
        parser.error(f"a GPU is needed, the default backend is {jax.default_backend()}")
    start, rates = time.perf_counter(), ceilings()
    doc = dict(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        matmul_tflops=rates[0] / 1e12,
        copy_gbs=rates[1] / 1e9,
        rows=[],
    )
    print(f"{doc['device']}: matmul {doc['matmul_tflops']:.0f} TFLOP/s, copy {doc['copy_gbs']:.0f} GB/s", flush=True)
    todo = tasks(families, [SHAPES[int(i)] for i in args.shapes.split(",")])
    context = multiprocessing.get_context("spawn")
    queue, turn, results = context.Queue(), context.Lock(), context.Queue()
    running = min(args.jobs, len(todo))
    for task in todo + [None] * running:
        queue.put(task)
    for _ in range(running):
        context.Process(target=serve, args=(queue, rates, turn, results)).start()
    while running:
        if (rows := results.get()) is None:
            running -= 1
            continue
        for row in rows:
            print(line(row), flush=True)
        doc["rows"] += rows
        doc["seconds"] = time.perf_counter() - start
        with open(args.out, "w") as f:
            json.dump(rounded(doc), f, indent=1)


if __name__ == "__main__":
    main()
