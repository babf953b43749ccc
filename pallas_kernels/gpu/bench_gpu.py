"""Checks and times the GPU kernels on the machine's GPU, beside XLA's chunked form and, if given, the peers' timings.

  python -m pallas_kernels.gpu.bench_gpu --out analysis/results/kernels/h100.json [--peers fla_bench.json]

Every row is one operator at one shape, forward and forward + backward (all gradients, gates included), bf16, fresh
random inputs. `ms`: calls with the L2 cache flushed before each, launches included (flush + call less flush alone).
`kernel_ms`: calls queued back to back, L2 warm, so that launches hide behind the kernels before them. `floor_ms`: the
larger of FLOPs over the measured matmul rate and compulsory bytes over the measured copy rate. Medians. `--peers` takes
the JSON of a benchmark run on the same GPU whose rows have op, shape, mode, ms and graph_ms.

Several processes compile and check at once, since compiling takes far longer than timing; once all are done, they take
turns on the GPU. `compile_s` is the time to trace and compile one function beside the others.

  python -m pallas_kernels.gpu.bench_gpu --table analysis/results/kernels/h100_gpu_kernels.json ...

prints the rows of such files as Markdown; a row of a later file takes the place of an earlier one.
"""
import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import reference
from pallas_kernels.gpu import delta_rule as gpu_delta
from pallas_kernels.gpu import dplr as gpu_dplr
from pallas_kernels.gpu import linear_attention as gpu_linear
from pallas_kernels.xla import delta_rule as xla_delta
from pallas_kernels.xla import dplr as xla_dplr
from pallas_kernels.xla import linear_attention as xla_linear

SHAPES = [(8, 2048, 16, 128), (4, 4096, 16, 128), (1, 16384, 16, 128), (8, 2048, 32, 64)]
CHUNK = 64
RWKV7 = 0.6066  # log decays of RWKV-7 are in (-e^-1/2, 0)


def linear_inputs(decay):
    def make(key, b, t, h, d):
        keys = jax.random.split(key, 4)
        q, k, v = (jax.random.normal(key, (b, t, h, d), jnp.bfloat16) for key in keys[:3])
        if decay == "none":
            return q, k, v
        if decay == "channel":
            return q, k, v, (jax.nn.log_sigmoid(jax.random.normal(keys[3], (b, t, h, d))) / 16).astype(jnp.bfloat16)
        gates = jax.random.normal(keys[3], {"head": (h,), "token": (b, t, h)}[decay])
        return q, k, v, -jnp.exp(gates - 3.0)
    return make


def delta_inputs(decay):
    def make(key, b, t, h, d):
        keys = jax.random.split(key, 2)
        q, k, v, *gates = linear_inputs(decay)(keys[0], b, t, h, d)
        q, k = (x * lax.rsqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)) for x in (q, k))
        beta = jax.nn.sigmoid(jax.random.normal(keys[1], (b, t, h)))
        return q.astype(v.dtype), k.astype(v.dtype), v, beta, *gates
    return make


def rwkv7_inputs(key, b, t, h, d):
    keys = jax.random.split(key, 3)
    _, kappa, _, rate, _ = delta_inputs("token")(keys[0], b, t, h, d)
    q, k, v = linear_inputs("none")(keys[1], b, t, h, d)
    gates = -RWKV7 * jax.nn.sigmoid(jax.random.normal(keys[2], (b, t, h, d)))
    return q, k, v, -kappa, (kappa * rate[..., None]).astype(v.dtype), gates.astype(v.dtype)


# name: (inputs, ours, XLA, reference, peer's name, floor's terms)
OPS = {f"linear_attention/{decay}": (linear_inputs(decay), gpu_linear.linear_attention, xla_linear.linear_attention,
                                     reference.linear_attention, peer, family)
       for decay, peer, family in (("token", "simple_gla", "linear"), ("head", "lightning", "linear"),
                                   ("none", None, "linear"), ("channel", "gla", "channel"))}
OPS |= {f"delta_rule/{decay}": (delta_inputs(decay), gpu_delta.delta_rule, xla_delta.delta_rule, reference.delta_rule,
                                peer, family)
        for decay, peer, family in (("token", "gated_delta_rule", "delta"), ("none", "delta_rule", "delta"),
                                    ("channel", "kda_safe", "kda"))}
OPS["dplr/rwkv7"] = (rwkv7_inputs, functools.partial(gpu_dplr.dplr, min_log_decay=-RWKV7), xla_dplr.dplr,
                     reference.dplr, "rwkv7", "dplr")


def flops_and_bytes(family, backward, b, t, h, d):
    """Model FLOPs of the chunked algorithm (chunk 64) and compulsory bytes, forward or forward + backward."""
    tokens, c = b * t * h, CHUNK
    linear = 4 * c * d + 4 * d * d, 10 * c * d + 10 * d * d
    delta = 10 * c * d + 6 * d * d + c * c, 28 * c * d + 16 * d * d + 4 * c * c
    forward, back, gates = {"linear": (*linear, 4), "channel": (*linear, 2 * d), "delta": (*delta, 8),
                            "kda": (*delta, 2 * d + 4), "dplr": (*delta, 6 * d)}[family]  # a, b of DPLR among the gates
    flops, size = forward, 8 * d + gates
    if backward:
        flops, size = forward + back, size + 14 * d + 2 * gates
    return tokens * flops, tokens * size


def time_queued(f, args, seconds=0.05):
    """(median ms of a call among calls queued back to back, calls that take about `seconds`)."""
    def queue(n):
        start = time.perf_counter()
        for _ in range(n):
            out = f(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n * 1e3

    queue(2)
    repeats = int(min(30, max(3, 1e3 * seconds / queue(2))))
    return statistics.median(queue(repeats) for _ in range(5)), repeats


def time_flushed(f, args, buffer, repeats):
    flush = jax.jit(lambda x: x + 1)

    def queue(with_call):
        start = time.perf_counter()
        for _ in range(repeats):
            last = flush(buffer), f(*args) if with_call else None
        jax.block_until_ready(last)
        return (time.perf_counter() - start) / repeats * 1e3

    queue(True), queue(False)
    return statistics.median(queue(True) - queue(False) for _ in range(9))  # in turns: a hiccup spoils one difference


def value_and_gradients(op, n, scale=0.1):
    def both(do, *args):
        o, vjp = jax.vjp(lambda *a: op(*a, scale=scale)[0], *args)
        return o, vjp(do)
    return both, (lambda *args: op(*args[:n], scale=scale)[0])


def check(name, d):
    """Relative error of o and each gradient against the float64 recurrence, at a size its history fits."""
    make, ours, _, ref, *_ = OPS[name]
    args = make(jax.random.key(7), 2, 2048, 2, d)
    do = jax.random.normal(jax.random.key(8), args[2].shape, jnp.bfloat16)
    got = jax.jit(value_and_gradients(ours, len(args))[0])(do, *args)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (do, *args)]
        want = jax.jit(value_and_gradients(ref, len(args))[0])(*wide)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def ceilings():
    """Measured bf16 matmul rate (FLOP/s) and copy rate (bytes/s, read and written)."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    matmul = 2 * 8192**3 / time_queued(jax.jit(lambda a: a @ a), (a,))[0] * 1e3
    x = jax.random.normal(jax.random.key(1), (2**29,), jnp.bfloat16)
    copy = 4 * 2**29 / time_queued(jax.jit(lambda x: x + 1), (x,))[0] * 1e3
    return matmul, copy


def compiled(name, shape, with_xla):
    """[(implementation, mode, executable, seconds to trace and compile)] of one operator at one shape."""
    make, ours, xla, *_ = OPS[name]
    args = jax.eval_shape(lambda: make(jax.random.key(0), *shape))
    made = []
    for implementation, op in (("pallas_gpu", ours), ("xla", xla))[: 1 + with_xla]:
        both, forward = value_and_gradients(op, len(args))
        for mode, f, inputs in (("fwd", forward, args), ("fwdbwd", both, (args[2], *args))):
            start = time.perf_counter()
            made.append((implementation, mode, jax.jit(f).lower(*inputs).compile(), time.perf_counter() - start))
    return made


def timed(name, shape, made, *, rates, buffer):
    make, *_, peer, family = OPS[name]
    args = jax.jit(make, static_argnums=(1, 2, 3, 4))(jax.random.key(0), *shape)
    do = jax.random.normal(jax.random.key(1), args[2].shape, jnp.bfloat16)
    for implementation, mode, f, compile_s in made:
        inputs = args if mode == "fwd" else (do, *args)
        flops, size = flops_and_bytes(family, mode == "fwdbwd", *shape)
        floor = max(flops / rates[0], size / rates[1]) * 1e3
        kernel_ms, repeats = time_queued(f, inputs)
        row = dict(op=name, implementation=implementation, shape=shape, mode=mode,
                   ms=time_flushed(f, inputs, buffer, repeats), kernel_ms=kernel_ms, floor_ms=floor,
                   of_floor=floor / kernel_ms, tflops=flops / kernel_ms / 1e9, gbs=size / kernel_ms / 1e6,
                   compile_s=compile_s, peer=peer)
        print(f"{name:24s} {implementation:10s} {str(shape):22s} {mode:6s} {row['ms']:8.3f} {kernel_ms:8.3f} ms "
              f"({100 * row['of_floor']:.0f}% of floor, compiled in {compile_s:.1f} s)", flush=True)
        yield row


def work(cases, rates, xla_shapes, all_compiled, turn, results):
    """One process: compiles and checks its (operator, shape, whether to check) cases, then times them."""
    made, checks = [], {}
    for name, shape, with_check in cases:
        try:
            made.append((name, shape, compiled(name, shape, shape in xla_shapes)))
            if with_check:
                checks[name] = check(name, shape[-1])
        except Exception as error:  # one failing kernel must not cost the other rows
            print(f"{name} {shape}: {type(error).__name__} {str(error)[:300]}", flush=True)
    all_compiled.wait()
    with turn:
        buffer = jnp.zeros(2**26, jnp.float32)
        for name, shape, executables in made:
            try:
                results.put((list(timed(name, shape, executables, rates=rates, buffer=buffer)), {}))
            except jax.errors.JaxRuntimeError as error:
                print(f"{name} {shape}: {str(error)[:300]}", flush=True)
    results.put(([], checks))
    results.put(None)


def rounded(x):
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def table(paths):
    """Markdown: a line per operator and shape, forward / forward + backward."""
    rows = {}
    for path in paths:
        with open(path) as f:
            for row in json.load(f)["rows"]:
                rows[row["op"], row["implementation"], tuple(row["shape"]), row["mode"]] = row
    lines = ["| operator | (B, T, H, D) | ms | TFLOP/s | GB/s | share of floor | XLA, ms |", "|---" * 7 + "|"]

    def pair(op, implementation, shape, key, digits, unit=1):
        values = [rows.get((op, implementation, shape, mode)) for mode in ("fwd", "fwdbwd")]
        return " / ".join(f"{unit * row[key]:.{digits}f}" for row in values if row)

    for op in OPS:
        for shape in SHAPES:
            if (op, "pallas_gpu", shape, "fwd") in rows:
                ours = [pair(op, "pallas_gpu", shape, *column) for column in
                        (("kernel_ms", 3), ("tflops", 0), ("gbs", 0), ("of_floor", 0, 100))]
                cells = [op, ", ".join(map(str, shape)), *ours[:3], ours[3] + " %",
                         pair(op, "xla", shape, "kernel_ms", 2)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--table", nargs="+", metavar="JSON", help="print these files' rows instead of timing")
    parser.add_argument("--ops", default=",".join(OPS), help="comma list")
    parser.add_argument("--shapes", default="0,1,2,3", help="comma list of indices into SHAPES")
    parser.add_argument("--peers", default="", help="JSON of a peer benchmark run on this GPU")
    parser.add_argument("--xla-shapes", default="0", help="indices of shapes at which XLA is timed too")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the float64 recurrence")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count()), help="processes that compile at once")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if not args.out:
        parser.error("--out is needed to time anything")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        parser.exit(2, "bench_gpu needs a GPU\n")
    rates = ceilings()
    doc = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, matmul_tflops=rates[0] / 1e12,
               copy_gbs=rates[1] / 1e9, rows=[], checks={}, peers=[])
    print(f"{doc['device']}: matmul {doc['matmul_tflops']:.0f} TFLOP/s, copy {doc['copy_gbs']:.0f} GB/s")
    if args.peers:
        with open(args.peers) as f:
            kept = ("op", "shape", "mode", "ms", "graph_ms")
            doc["peers"] = [{k: row[k] for k in kept if k in row} for row in json.load(f)["rows"] if "ms" in row]
    shapes = [SHAPES[int(i)] for i in args.shapes.split(",")]
    xla_shapes = [SHAPES[int(i)] for i in args.xla_shapes.split(",") if i]
    cases = [(name, shape, i == 0 and not args.no_check)
             for i, shape in enumerate(shapes) for name in args.ops.split(",")]
    jobs = min(args.jobs, len(cases))
    context = multiprocessing.get_context("spawn")
    all_compiled, turn, results = context.Barrier(jobs), context.Lock(), context.Queue()
    for job in range(jobs):
        context.Process(target=work, args=(cases[job::jobs], rates, xla_shapes, all_compiled, turn, results)).start()
    running = jobs
    while running:
        if (result := results.get()) is None:
            running -= 1
            continue
        rows, checks = result
        doc["rows"] += rows
        doc["checks"] |= checks
        with open(args.out, "w") as f:
            json.dump(rounded(doc), f, indent=1)
    for name, errors in sorted(doc["checks"].items()):
        print(f"{name} relative errors", " ".join(f"{e:.4f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
