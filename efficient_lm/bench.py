"""Training speed of models side by side on one device: whole steps, random tokens, one model at a time.

    python -m efficient_lm.bench --configs configs/mixers.py:attention-340M,configs/mixers.py:gla-340M --out bench.json

A step is what the config says (`train.batch_size` sequences in `train.grad_accum` micro-batches and one update);
overrides such as --config.train.grad_accum=4 hold for all models. Models compile side by side in --jobs processes and
are then timed in turns, a process after the other, so that each has the device's memory for itself. `tokens_per_s`
is the median of steps queued back to back, `mfu` counts model FLOPs (causal), `first_step_s` is tracing, compiling and
the first step, `peak_gib` the most memory that arrays took, parameters and optimizer included.

Models that wait for their turn keep what tuning took of the device's memory: where a large one fails for want of it,
--jobs 1 compiles one after the other in one process.
"""

import argparse
import json
import os
import sys
import time

import jax
import numpy as np

from efficient_lm import config as configs
from efficient_lm import hardware
from efficient_lm.counting import count_flops, count_params
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.schema import ConfigError
from efficient_lm.train import make_init, make_train_step
from pallas_kernels.bench.timing import seconds
from pallas_kernels.bench.turns import compile_all, run_all
from pallas_kernels.commands import Parser, command

LIMIT = 3.0  # seconds of timing a model
COLUMNS = "tokens_per_s", "mfu", "tflops", "ms", "peak_gib", "first_step_s", "active_params"


def training(cfg, rows: int):
    """Compiles training steps of train.grad_accum micro-batches of `rows` sequences; a function that times them.

    The function returns tokens per second, time, memory and model FLOP/s.
    """
    start = time.perf_counter()
    lm = LM(cfg.model)
    optimizer = make_optimizer(lm, cfg.optim)
    init = jax.jit(make_init(lm, cfg, optimizer)).lower(jax.random.key(0))
    shape = (cfg.train.grad_accum, rows, cfg.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = {"inputs": tokens, "targets": tokens, "loss_mask": np.ones(shape, np.float32)}
    step = jax.jit(make_train_step(lm, cfg, optimizer), donate_argnums=0).lower(init.out_info, batch, 1e-4).compile()
    init, compiling = init.compile(), time.perf_counter() - start

    def timed() -> dict:
        state, given = init(jax.random.key(0)), jax.device_put(batch)

        def call():
            nonlocal state
            state, logged = step(state, given, 1e-4)
            return logged

        start = time.perf_counter()
        jax.block_until_ready(call())
        first_step = compiling + time.perf_counter() - start
        spent = seconds(call, limit=LIMIT)
        rate, params, device = tokens.size / spent, count_params(cfg), jax.devices()[0]
        flops, peak = count_flops(cfg)["model_causal"] * rate, hardware.peak_flops(device.device_kind, cfg.model.dtype)
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")  # not known on CPUs
        return {
            **{"ms": 1e3 * spent, "tokens": tokens.size, "tokens_per_s": rate, "first_step_s": first_step},
            **{"tflops": flops / 1e12, "mfu": peak and flops / peak, "peak_gib": memory and memory / 2**30},
            **{"total_params": params["total"], "active_params": params["active"]},
        }

    return timed


def prepared(task):
    config, overrides = task
    hardware.enable_compile_cache()
    cfg = configs.load(config, dict(overrides))
    return training(cfg, cfg.train.batch_size // cfg.train.grad_accum)


def line(config, row) -> str:
    """One model's numbers, under COLUMNS."""
    if "failed" in row:
        return f"{config:44s} failed: {row['failed']}"
    shown = ("-" if row[name] is None else f"{row[name]:.4g}" for name in COLUMNS)
    return f"{config:44s}" + "".join(f"{value:>14s}" for value in shown)


def parser() -> Parser:
    out = Parser(
        prog="python -m efficient_lm.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--configs", required=True, help="configs separated by commas, e.g. configs/dense.py:340M")
    out.add_argument("--jobs", type=int, default=max(1, os.cpu_count() - 2), help="processes that compile")
    out.add_argument("--compile-seconds", type=float, default=300, help="begin to compile nothing after so long")
    out.add_argument("--out", help="JSON file for the table")
    return out


@command
def main(argv=None) -> int:
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(rest)
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    todo = [(config, tuple(overrides.items())) for config in dict.fromkeys(args.configs.split(","))]
    for config, _ in todo:  # bad ones end here, before anything compiles
        configs.load(config, overrides)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes share the device's memory
    hardware.require_devices()
    table = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "overrides": overrides, "rows": []}

    def add(task, row):
        print(line(task[0], row), flush=True)
        table["rows"].append({"config": task[0], **row})
        if args.out:
            with open(args.out, "w") as file:
                json.dump(table, file, indent=1)

    start = time.perf_counter()
    holders, errors = compile_all(todo, prepared, min(args.jobs, len(todo)), args.compile_seconds)
    print(f"compiled {len(holders)} of {len(todo)} models in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{table['device']:44s}" + "".join(f"{name:>14s}" for name in COLUMNS))
    for task, error in errors.items():
        add(task, {"failed": error})
    for task, row, error in run_all(todo, holders):
        add(task, {"failed": error} if error else row)
    missing = len(todo) - len(table["rows"])
    if missing:
        print(f"{missing} models did not compile within --compile-seconds {args.compile_seconds:g}")
    return 1 if missing or any("failed" in row for row in table["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
