"""Train one model: python -m efficient_lm.train --config configs/dense.py:tiny --workdir runs/x [--config.a.b=c ...]

The state is a plain dict {params, opt_state, ema, step}; one jitted function advances it by `steps_per_call` steps,
sharded over a mesh. Batch k is a pure function of (seed, k), so a run that was killed and resumed takes the same
steps as one that was not.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_lm import checkpoint, hardware, metrics, sharding
from efficient_lm.config import Config, run_id
from efficient_lm.counting import count_flops, count_params, decode_state_bytes
from efficient_lm.data import open_data
from efficient_lm.layers import wide
from efficient_lm.model import LM
from efficient_lm.optim import make_optimizer, make_schedule, warmup_steps
from efficient_lm.probes.run import Prober, due, next_step
from efficient_lm.recorder import Diverged, Recorder, describe
from efficient_lm.schema import ConfigError
from efficient_lm.upcycle import upcycled

EVAL_TOKENS = 4096  # tokens per evaluation batch, where a training batch isn't larger


# ---------------------------------------------------------------------- what is compiled


def make_init(lm: LM, cfg: Config, optimizer):
    """init(key) -> the state {params, opt_state, ema, step} before the first step."""

    def init(key):
        params = lm.init(key)
        ema = jax.tree.map(jnp.copy, params) if cfg.train.ema else {}
        return {"params": params, "opt_state": optimizer.init(params), "ema": ema, "step": jnp.zeros((), jnp.int32)}

    return init


def make_loss(lm: LM, cfg: Config, constrain):
    """loss(params, batch [B, T], weight): this batch's share of the objective, (what to log, what the model observed).

    `weight` is the sum of loss_mask over the whole step, so that adding up micro-batches gives the mean over all
    tokens of the step, however they are divided. What was observed (LM.statistics, LM.next_state) adds up as it is.
    """
    z_loss = cfg.train.z_loss

    def loss(params, batch, weight):
        mask = batch["loss_mask"]
        logits, aux = lm(params, batch["inputs"], batch.get("segment_ids"), batch.get("positions"), constrain)
        observed = aux.pop("observed", {})
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather: its gradient is no scatter, which is slow on every backend.
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        target_logit = jnp.sum(jnp.where(vocabulary == batch["targets"][..., None], logits, 0.0), axis=-1)
        nll = jnp.sum((log_z - target_logit) * mask) / weight
        logged = {"loss": nll} | {k: v * (jnp.sum(mask) / weight) for k, v in aux.items()}
        total = nll + sum(v for k, v in logged.items() if k.endswith("_loss"))
        if z_loss:
            logged["z_loss"] = jnp.sum(jnp.square(log_z) * mask) / weight
            total += z_loss * logged["z_loss"]
        return total, (logged, observed)

    return loss


def make_train_step(lm: LM, cfg: Config, optimizer, constrain=lambda x: x):
    """step(state, batch, lr, progress) -> state, metrics; batch arrays are [grad_accum, B / grad_accum, T].

    lr and progress, the share of the run's steps that are done with this one, are scalars.
    """
    grad = jax.jit(jax.grad(make_loss(lm, cfg, constrain), has_aux=True))

    def step(state, batch, lr, progress=0.0):
        params = state["params"]
        used = lm.cast(params)  # here and not in every micro-batch: its gradients need no cast back then either
        weight = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        micro_batch = jax.tree.map(lambda x: x[0], batch)
        if cfg.train.grad_accum == 1:
            grads, (logged, observed) = grad(used, micro_batch, weight)
            grads = jax.tree.map(wide, grads)
        else:
            shapes = jax.eval_shape(grad, used, micro_batch, weight)
            sums = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (params, shapes[1]))

            def add(sums, micro_batch):
                return jax.tree.map(jnp.add, sums, grad(used, micro_batch, weight)), None

            (grads, (logged, observed)), _ = jax.lax.scan(add, sums, batch)
        logged |= lm.statistics(observed) | {"grad_norm": optax.global_norm(grads), "lr": lr}
        updates, opt_state = optimizer.update(grads, state["opt_state"], params, learning_rate=lr)
        params = lm.next_state(optax.apply_updates(params, updates), observed, progress)
        ema = _average(state["ema"], params, state["step"], cfg.train.ema) if cfg.train.ema else {}
        return {"params": params, "opt_state": opt_state, "ema": ema, "step": state["step"] + 1}, logged

    return step


def _average(ema, params, step, decay):
    # The decay rises to its value over the first steps, else a short run would average in its initial parameters.
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)


def repeat(step, calls: int):
    """run(state, batches, scalars, n): n <= calls steps; batches, scalars and metrics have a leading axis `calls`.

    The trip count is dynamic: the same program, hence the same bits, serves a call that is cut short.
    """
    step = jax.jit(step)

    def at(i, *trees):
        return jax.tree.map(lambda x: x[i], trees)

    def run(state, batches, scalars, n):
        batch, first = at(0, batches, scalars)
        shapes = jax.eval_shape(step, state, batch, **first)[1]
        logged = jax.tree.map(lambda a: jnp.zeros((calls, *a.shape), a.dtype), shapes)

        def body(i, carry):
            state, logged = carry
            batch, now = at(i, batches, scalars)
            state, one = step(state, batch, **now)
            return state, jax.tree.map(lambda all, x: all.at[i].set(x), logged, one)

        return jax.lax.fori_loop(0, n, body, (state, logged))

    def run_one(state, batches, scalars, n):
        batch, now = at(0, batches, scalars)
        return step(state, batch, **now)

    return run if calls > 1 else run_one


def make_eval_step(lm: LM, constrain):
    """evaluate(params, batch [B, T]) -> [3, B], sums over each row: nll in nats, right answers, tokens counted."""

    def evaluate(params, batch):
        logits, _ = lm(params, batch["inputs"], batch.get("segment_ids"), batch.get("positions"), constrain)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        right = jnp.argmax(logits, axis=-1) == batch["targets"]
        return jnp.stack([jnp.sum(x * batch["loss_mask"], axis=-1) for x in (nll, right, jnp.ones_like(nll))])

    return evaluate


# ---------------------------------------------------------------------- one run


def train(cfg: Config, workdir, *, devices=None, should_stop=lambda step: False) -> dict:
    """Train `cfg` in `workdir`, or finish what an earlier process began there. Returns the content of run.json.

    `should_stop(step)` is asked between compiled calls; True saves and ends with status 'preempted', as SIGTERM and
    SIGINT do. Raises ConfigError when cfg or workdir can't be used; any other exception leaves status 'failed'.
    """
    run = metrics.RunDir(workdir, cfg, writer=jax.process_index() == 0)
    try:
        if run.info.get("status") in ("done", "diverged"):
            print(f"{workdir} holds this run, already {run.info['status']}")
            return run.info
        with stop_signals() as signalled:
            return _train(cfg, run, devices, lambda step: sharding.any_host(signalled() or should_stop(step)))
    except BaseException as error:
        if run.info.get("status") == "running":
            run.update(status="failed", reason=f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])
        raise
    finally:
        run.release()


def _train(cfg: Config, run: metrics.RunDir, devices, should_stop) -> dict:
    began, opts, steps = time.perf_counter(), cfg.train, cfg.train.steps
    hardware.enable_compile_cache()

    # What is trained, on what, with what.
    lm = LM(cfg.model)
    schedule = make_schedule(cfg.optim, steps)
    optimizer = make_optimizer(lm, cfg.optim)
    micro_rows = opts.batch_size // opts.grad_accum
    mesh = sharding.make_mesh(cfg.mesh, micro_rows, devices)
    constrain = sharding.residual_constraint(mesh)
    data = open_split(cfg, "train", opts.batch_size)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    validation = open_split(cfg, "validation", -(-max(micro_rows, EVAL_TOKENS // opts.seq_len) // shards) * shards)
    validated = validation.spec.get("epoch_tokens", cfg.data.validation_tokens)

    # The state: of this run's last checkpoint, or of a trunk's, or fresh.
    init, key = jax.jit(make_init(lm, cfg, optimizer)), jax.random.key(cfg.seed)  # jit: traced once for all uses
    like = sharding.place(jax.eval_shape(init, key), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    state = checkpoint.first_state(cfg.train, run.path / "ckpt", like)
    if state is None:
        state = jax.jit(init, out_shardings=shardings, compiler_options=hardware.compile_quickly(mesh))(key)
        if opts.upcycle_from:
            state["params"] = upcycled(opts.upcycle_from, lm, state["params"])
            state["ema"] = jax.tree.map(jnp.copy, state["params"]) if opts.ema else {}
    start = int(state["step"])
    run.require_same_data(data.spec, start)

    # The compiled functions.
    whole = sharding.replicated(mesh)
    train_step = sharding.split_kernels(make_train_step(lm, cfg, optimizer, constrain), mesh)
    train_call = jax.jit(repeat(train_step, opts.steps_per_call), donate_argnums=0, out_shardings=(shardings, whole))
    eval_step = jax.jit(sharding.split_kernels(make_eval_step(lm, constrain), mesh), out_shardings=whole)

    def load_call(call):
        """Batches [steps_per_call, grad_accum, rows, T] on the devices, and the other arguments of a call's steps."""
        first, n = call
        ks = [min(k, first + n - 1) for k in range(first, first + opts.steps_per_call)]
        batches = [fields_used(cfg, data[k]) for k in ks]
        shape = (opts.steps_per_call, opts.grad_accum, -1, opts.seq_len)
        batch = {name: np.stack([b[name] for b in batches]).reshape(shape) for name in batches[0]}
        scalars = {"lr": [schedule(k) for k in ks], "progress": [(k + 1) / steps for k in ks]}
        scalars = sharding.to_devices({name: np.asarray(s, np.float32) for name, s in scalars.items()}, whole)
        return call, sharding.to_devices(batch, sharding.batch_sharding(mesh, leading=2)), scalars

    def evaluate():
        """Validation loss in nats per token and accuracy, every token of the split with the same weight."""
        params = state["ema"] if opts.ema else state["params"]
        batches = prefetch(
            lambda k: sharding.to_devices(fields_used(cfg, validation[k]), sharding.batch_sharding(mesh)),
            range(len(validation)),
        )
        sums = np.sum([jax.device_get(s) for s in [eval_step(params, b) for b in batches]], (0, 2), np.float64)
        loss, accuracy = (float(s / sums[2]) for s in sums[:2])
        bpb = loss / math.log(2) / validation.bytes_per_token
        return {"loss": loss, "bpb": bpb, "accuracy": accuracy, "split": "validation"}

    if cfg.probes.names:
        batch = open_split(cfg, "validation", -(-cfg.probes.rows // shards) * shards)[0]
        counted = batch["segment_ids"] != 0
        probe = Prober(lm, cfg.probes.names, mesh, fields_used(cfg, batch) | {"counted": counted})

    params, flops_per_token = count_params(cfg), count_flops(cfg)
    peak = hardware.peak_flops(mesh.devices.flat[0].device_kind, cfg.model.dtype)
    peak = peak and peak * mesh.size
    if run.writer:
        describe(cfg, mesh, data.spec, validated, params, flops_per_token, start)
    run.begin(
        **{"run_id": run_id(cfg), "name": cfg.name, "status": "running", "reason": None, "sweep": cfg.sweep},
        **{"seed": cfg.seed, "steps_total": steps, "params": params, "flops_per_token": flops_per_token},
        **{"final_loss": None, "final_bpb": None, "final_accuracy": None},
        **{"state_bytes": decode_state_bytes(cfg, opts.seq_len)},
        **{"hardware": hardware.describe(mesh), "peak_flops": peak, "mesh": run.meshes(sharding.describe(mesh), start)},
        **{"versions": metrics.versions(), "code_hash": run.code_hashes(start)},
        **{"data": data.spec, "validation_tokens": validated},
    )
    recorder = Recorder(
        run,
        cfg,
        began=began,
        start=start,
        warmup=warmup_steps(cfg.optim, steps),
        flops_per_token=flops_per_token,
        peak_flops=peak,
    )

    # The loop.
    try:
        if cfg.probes.names and start == 0:
            recorder.write("probe", 0, probe(state["params"]))
        for (first, n), batch, scalars in prefetch(load_call, plan_calls(start, cfg)):
            state, logged = train_call(state, batch, scalars, n)
            step = first + n
            recorder.add(step, n, logged)
            stopping = step < steps and should_stop(step)
            at_eval, at_checkpoint = (
                step < steps and every and step % every == 0 for every in (opts.eval_every, opts.checkpoint_every)
            )
            at_probe = cfg.probes.names and (step == steps or due(step, cfg.probes.every))
            if not (stopping or at_eval or at_checkpoint or at_probe):
                continue
            recorder.drain()
            if at_probe:
                recorder.write("probe", step, probe(state["params"]))
            if at_eval:
                recorder.write("eval", step, evaluate())
            if stopping or at_checkpoint:
                checkpoint.save(run.path / "ckpt", step, state, keep=opts.keep_checkpoints)
                recorder.update()
            if stopping:
                return recorder.update(status="preempted", reason=f"stopped at step {step}; resumes from there")
            recorder.resume()
        recorder.drain()
        final = evaluate()
        recorder.write("eval", steps, final)
        if not math.isfinite(final["loss"]):  # of the last update, which no training loss has seen
            raise Diverged(f"validation loss is {final['loss']} at step {steps}")
        if start < steps or opts.init_from:
            checkpoint.save(run.path / "ckpt", steps, state, keep=opts.keep_checkpoints)
        return recorder.update(status="done", **{f"final_{name}": final[name] for name in ("loss", "bpb", "accuracy")})
    except Diverged as error:
        return recorder.update(status="diverged", reason=str(error))
    finally:
        recorder.close()


# ---------------------------------------------------------------------- parts of a run


def open_split(cfg: Config, split: str, batch_size: int):
    """Batches of one split. Raises ConfigError."""
    source = open_data(
        cfg.data,
        seq_len=cfg.train.seq_len,
        batch_size=batch_size,
        seed=cfg.seed,
        split=split,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )
    if source.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {cfg.model.vocab_size}: must be at least {source.vocab_size}, the vocabulary "
            f"of data source {cfg.data.source!r}"
        )
    return source


def fields_used(cfg: Config, batch: dict) -> dict:
    """`batch` without segment ids and positions where rows are not reset: the model can take faster paths then."""
    dropped = () if cfg.data.pack == "documents" else ("segment_ids", "positions")
    return {name: array for name, array in batch.items() if name not in dropped}


def plan_calls(start: int, cfg: Config):
    """(first step, number of steps) of each compiled call; none crosses an evaluation, a checkpoint or a probe."""
    step, opts = start, cfg.train
    while step < opts.steps:
        stops = [step + opts.steps_per_call, opts.steps]
        stops += [next_step(step, cfg.probes.every)] if cfg.probes.names else []
        stops += [(step // every + 1) * every for every in (opts.eval_every, opts.checkpoint_every) if every]
        yield step, min(stops) - step
        step = min(stops)


def prefetch(load, items, depth: int = 2):
    """load(item) for each item, in order, computed ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(load, item))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGTERM and SIGINT only set a flag, which the yielded function returns; a second SIGINT interrupts."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def handle(number, frame):
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from efficient_lm import cli

    sys.exit(cli.main(train))
