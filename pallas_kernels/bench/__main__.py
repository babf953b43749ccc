"""Time operators, forward and forward + backward, beside the limits of the device.

  python -m pallas_kernels.bench --op gla,softmax --shapes 1,512,4,64,64:1,2048,4,64,64 --out bench.json

The table of a CPU, chunked forms against token loops and quadratic attention (about 3 minutes on 2 cores):

  python -m pallas_kernels.bench --op simple_gla,gla,gated_deltanet,kda,rwkv7,softmax --implementations xla,reference \\
    --shapes 1,512,4,64,64:1,2048,4,64,64:1,8192,4,64,64 --seconds 0.3 --out analysis/results/kernels/cpu_xla.json

A shape is B,T,H,K,V. Short calls are queued back to back. Peaks are measured on the device itself before anything else
(a large matrix product, a copy), or given. The floor of a call is the longer of two times: ideal bytes (inputs and
outputs once; twice more for the backward pass) at the peak bandwidth, idealised FLOPs (three times the forward for
forward + backward) at the peak rate.
"""
import argparse
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.bench.cases import OPS, make_inputs
from pallas_kernels.bench.timing import seconds
from pallas_kernels.commands import Parser, command

IMPLEMENTATIONS = ("auto", *dispatch.IMPLEMENTATIONS)


def measured_peaks(dtype):
    """(FLOP/s of a square matrix product in `dtype`, bytes/s of a copy, read and written), large for the device."""
    n, values = (8192, 1 << 28) if jax.default_backend() == "gpu" else (2048, 32 << 20)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = seconds(jax.jit(lambda a: a @ a), a, limit=0.5)
    x = jnp.ones(values, jnp.float32)
    copy = seconds(jax.jit(lambda x: x + 1), x, limit=0.5)
    return 2 * n**3 / product, 2 * x.nbytes / copy


def measure(name, implementation, dtype, shape, peaks, limit):
    """One row of the table, or a row with the reason why the implementation cannot run."""
    operator, _, count = OPS[name]
    row = {"op": name, "implementation": implementation, "dtype": dtype, "shape": shape}
    inputs = make_inputs(name, jnp.dtype(dtype), shape)
    choice = None if implementation == "auto" else implementation

    def forward(inputs):
        return operator(**inputs, implementation=choice)[0]

    def value_and_gradients(inputs, cotangent):
        output, gradients = jax.vjp(forward, inputs)
        return output, gradients(cotangent)

    try:
        output = jax.eval_shape(forward, inputs)
        cotangent = jax.random.normal(jax.random.key(1), output.shape, output.dtype)
        both = jax.jit(value_and_gradients).lower(inputs, cotangent).compile()
        row["temporary_bytes"] = both.memory_analysis().temp_size_in_bytes
        times = {"forward": seconds(jax.jit(forward), inputs, limit=limit),
                 "forward_backward": seconds(both, inputs, cotangent, limit=limit)}
    except ValueError as error:
        return row | {"error": str(error)}
    B, T, H, K, V = shape
    data = sum(x.nbytes for x in inputs.values())
    result = output.size * output.dtype.itemsize
    ideal = count(T, H, K, V, None) * B * T
    work = {"forward": (ideal, data + result), "forward_backward": (3 * ideal, 3 * data + 2 * result)}
    if implementation in ("xla", "pallas_tpu", "reference"):
        row["forward_flops_executed"] = count(T, H, K, V, implementation) * B * T
    for part, spent in times.items():
        work_flops, moved = work[part]
        by_flops, by_bytes = work_flops / peaks[0], moved / peaks[1]
        row[part] = {"ms": 1e3 * spent, "flops": work_flops, "bytes": moved, "floor_ms": 1e3 * max(by_flops, by_bytes),
                     "share_of_peak_flops": by_flops / spent, "share_of_peak_bandwidth": by_bytes / spent,
                     "limit": "flops" if by_flops > by_bytes else "bandwidth"}
    return row


def line(row):
    name = f"{row['op']:15}{row['implementation']:11}{row['dtype']:9}{','.join(map(str, row['shape'])):20}"
    if "error" in row:
        return f"{name}{row['error']}"
    parts = []
    for part in ("forward", "forward_backward"):
        r = row[part]
        parts.append(f"{r['ms']:10.3f} ms (floor {r['floor_ms']:8.3f}, {100 * r['share_of_peak_flops']:5.1f}% FLOP/s, "
                     f"{100 * r['share_of_peak_bandwidth']:5.1f}% B/s)")
    return name + " ".join(parts)


def arguments(argv):
    parser = Parser(prog="python -m pallas_kernels.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="gla", help=f"comma-separated, of: {', '.join(OPS)}; or 'all'")
    parser.add_argument("--shapes", default="1,2048,4,64,64", help="B,T,H,K,V, several separated by ':'")
    parser.add_argument("--implementations", default="auto", help=f"comma-separated, of: {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each measurement")
    parser.add_argument("--peak-flops", type=float, help="FLOP/s; default: measured")
    parser.add_argument("--peak-bandwidth", type=float, help="bytes/s; default: measured")
    parser.add_argument("--out", help="JSON file for the table")
    args = parser.parse_args(argv)
    args.op = list(OPS) if args.op == "all" else args.op.split(",")
    args.implementations = args.implementations.split(",")
    for given, allowed, flag in ((args.op, OPS, "--op"), (args.implementations, IMPLEMENTATIONS, "--implementations")):
        for name in given:
            if name not in allowed:
                parser.error(f"{flag} {name}: allowed are {', '.join(allowed)}")
    try:
        args.shapes = [tuple(int(n) for n in shape.split(",")) for shape in args.shapes.split(":")]
    except ValueError:
        parser.error(f"--shapes {args.shapes}: whole numbers B,T,H,K,V, several separated by ':'")
    for shape in args.shapes:
        if len(shape) != 5 or min(shape) < 1:
            parser.error(f"--shapes {shape}: five positive numbers B,T,H,K,V")
    for flag, value in (("--seconds", args.seconds), ("--peak-flops", args.peak_flops),
                        ("--peak-bandwidth", args.peak_bandwidth)):
        if value is not None and not value > 0:
            parser.error(f"{flag} {value}: must be positive")
    return args


@command
def main(argv=None):
    args = arguments(argv)
    flops, bandwidth = (None, None) if args.peak_flops and args.peak_bandwidth else measured_peaks(args.dtype)
    peaks = args.peak_flops or flops, args.peak_bandwidth or bandwidth
    device = jax.devices()[0]
    print(f"{device.device_kind}: {peaks[0] / 1e9:.1f} GFLOP/s, {peaks[1] / 1e9:.1f} GB/s")
    rows = []
    for shape in args.shapes:
        for name in args.op:
            for implementation in args.implementations if name != "softmax" else ("auto",):
                rows.append(measure(name, implementation, args.dtype, shape, peaks, args.seconds))
                print(line(rows[-1]), flush=True)
    if args.out:
        table = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
                 "peak_flops": peaks[0], "peak_bandwidth": peaks[1], "rows": rows}
        with open(args.out, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
