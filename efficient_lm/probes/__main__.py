"""What probes cost: python -m efficient_lm.probes --config configs/dense.py:small [--config.probes.rows=8 ...]

Times the training step and the probe pass of a config on random tokens, on the devices of this machine, and prints the
share of training time that probes take at the config's interval and over the first 512 steps.
"""

import statistics
import sys
import time

import jax
import numpy as np

from efficient_lm import config as configs
from efficient_lm import hardware, sharding
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer
from efficient_lm.probes import PROBES
from efficient_lm.probes.run import LAST_POWER, Prober, due
from efficient_lm.schema import ConfigError
from efficient_lm.train import fields_used, make_init, make_train_step
from pallas_kernels.commands import Parser, command


def measure(cfg, repeats: int = 10) -> dict:
    """Medians in seconds of `repeats` training steps and probe passes, without compiling."""
    hardware.enable_compile_cache()
    lm, opts = LM(cfg.model), cfg.train
    optimizer = make_optimizer(lm, cfg.optim)
    mesh = sharding.make_mesh(cfg.mesh, opts.batch_size // opts.grad_accum)
    init = make_init(lm, cfg, optimizer)
    like = sharding.place(jax.eval_shape(init, jax.random.key(0)), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = sharding.split_kernels(make_train_step(lm, cfg, optimizer, sharding.residual_constraint(mesh)), mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    batch = fields_used(cfg, random_tokens(cfg, opts.batch_size))
    micro = {name: a.reshape(opts.grad_accum, -1, opts.seq_len) for name, a in batch.items()}
    micro = sharding.to_devices(micro, sharding.batch_sharding(mesh, leading=1))
    seen = random_tokens(cfg, -(-cfg.probes.rows // mesh.size) * mesh.size)
    counted = seen["segment_ids"] != 0
    prober = Prober(lm, cfg.probes.names or tuple(PROBES), mesh, fields_used(cfg, seen) | {"counted": counted})
    times = {"step": [], "probe": []}
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, logged = step(state, micro, np.float32(1e-4))
        jax.block_until_ready((state, logged))
        middle = time.perf_counter()
        prober(state["params"])
        times["step"].append(middle - began)
        times["probe"].append(time.perf_counter() - middle)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def random_tokens(cfg, rows: int) -> dict:
    """A batch [rows, seq_len] as the data would give it, one document a row."""
    shape = (rows, cfg.train.seq_len)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    fields = {"inputs": tokens, "targets": tokens, "loss_mask": np.ones(shape, np.float32)}
    return fields | {"segment_ids": np.ones(shape, np.int32), "positions": positions}


@command
def main(argv=None) -> int:
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="python -m efficient_lm.probes", description=" ".join(__doc__.split("\n\n")[1].split()))
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (default 10)")
    args = parser.parse_args(rest)
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: must be at least 1")
    hardware.require_devices()
    cfg = configs.load(args.config, overrides)
    seconds, every = measure(cfg, args.repeats), cfg.probes.every
    early = sum(due(step, every) for step in range(LAST_POWER + 1)) * seconds["probe"] / LAST_POWER
    print(
        f"{jax.devices()[0].device_kind}: step {seconds['step'] * 1e3:.2f} ms, probes {seconds['probe'] * 1e3:.2f} ms "
        f"({cfg.probes.rows} rows); every {every} steps {seconds['probe'] / every / seconds['step']:.2%} of training "
        f"time, {early / seconds['step']:.2%} over the first {LAST_POWER}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
