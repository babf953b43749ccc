"""Reads the metrics of compiled calls: rows for the run directory and its mirrors, timing, signs of divergence."""

import math
import sys
import time
from collections import deque

import jax

from efficient_lm import config as configs
from efficient_lm import sharding
from efficient_lm.metrics import RunDir
from efficient_lm.schema import ConfigError, to_dict

DIVERGED_WINDOW = 10  # steps whose mean loss is compared with the start
DIVERGED_FACTOR = 2.0
UPDATE_SECONDS = 5.0  # between rewrites of run.json


class Diverged(Exception):
    """Training can't go on; the message says why."""


class Recorder:
    """Takes the metrics of each call while the next one runs, so that the device never waits for the host.

    `add` hands over a call and reads the one before it; `drain` reads all that is left. Both raise Diverged when a
    loss or gradient norm is not finite, or when after warm-up the mean loss of 10 steps exceeds twice
    max(loss of the first step, ln vocab_size).
    """

    def __init__(self, run: RunDir, cfg, *, began, start, warmup, flops_per_token, peak_flops):
        self.run, self.cfg, self.warmup = run, cfg, warmup
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.tokens_per_step = cfg.train.batch_size * cfg.train.seq_len
        self.steps_done = start
        self.mirrors = Mirrors(run, cfg.train.steps, start)
        self.watch = Stopwatch()
        self.pending = deque()
        self.recent = deque(maxlen=DIVERGED_WINDOW)
        first = run.rows("train")[:1]
        self.ceiling = self._ceiling(first[0]["loss"]) if first else None
        self.began, self.updated = began, time.perf_counter()
        self.earlier_seconds = run.info.get("wall_seconds") or 0.0
        self.rate, self.rated_at = None, (0, 0.0)  # tokens/s, and the timed steps and seconds of the last row

    def _ceiling(self, first_loss):
        return DIVERGED_FACTOR * max(first_loss or 0.0, math.log(self.cfg.model.vocab_size))

    def add(self, step: int, n: int, logged: dict) -> None:
        """`logged` are device arrays, [calls] or scalars, of the n steps that end at `step`."""
        self.pending.append((step, n, logged))
        if len(self.pending) > 1:
            self._read(*self.pending.popleft())

    def resume(self) -> None:
        """After a pause for something that isn't training."""
        self.watch.restart()

    def drain(self) -> None:
        while self.pending:
            self._read(*self.pending.popleft())

    def _read(self, step, n, logged):
        several = self.cfg.train.steps_per_call > 1  # then there is a leading axis
        host = {name: (v if several else v[None]).tolist() for name, v in jax.device_get(logged).items()}
        self.watch.done(n)
        self.mirrors.advance(n)
        for i in range(n):
            self._one_step(step - n + i + 1, {name: values[i] for name, values in host.items()})
        if time.perf_counter() - self.updated > UPDATE_SECONDS:
            self.update()

    def _one_step(self, step, values):
        self.steps_done = step
        every = self.cfg.train.log_every
        loss, finite = values["loss"], math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if step == 1 or step % every == 0 or step == self.cfg.train.steps or not finite:
            self._row(step, values)
        if not finite:
            what = "loss" if not math.isfinite(loss) else "grad_norm"
            raise Diverged(f"{what} is {values[what]} at step {step}")
        self.ceiling = self.ceiling or self._ceiling(loss)
        self.recent.append(loss)
        mean = sum(self.recent) / len(self.recent)
        if step > self.warmup and len(self.recent) == DIVERGED_WINDOW and mean > self.ceiling:
            raise Diverged(
                f"mean loss of steps {step - DIVERGED_WINDOW + 1}-{step} is {mean:.4g}, above {self.ceiling:.4g}, "
                f"twice that of the first step"
            )

    def _row(self, step, values):
        steps, seconds = self.watch.steps - self.rated_at[0], self.watch.active - self.rated_at[1]
        if steps:  # else this row is of the same call as the last one
            self.rate, self.rated_at = steps * self.tokens_per_step / seconds, (self.watch.steps, self.watch.active)
        known = self.rate and self.peak_flops
        mfu = self.rate * self.flops_per_token["model_causal"] / self.peak_flops if known else None
        self.write("train", step, values | {"tokens_per_s": self.rate, "mfu": mfu, "seconds": self.seconds()})

    def write(self, kind: str, step: int, values: dict) -> None:
        """Append a row and show it."""
        tokens = step * self.tokens_per_step
        row = {"kind": kind, "step": step, "tokens": tokens, "flops": self.flops_per_token["model_causal"] * tokens}
        row |= values
        self.run.append(row)
        self.mirrors.show(row)

    def seconds(self) -> float:
        """Wall time of this run, earlier processes included."""
        return round(self.earlier_seconds + time.perf_counter() - self.began, 3)

    def update(self, **info) -> dict:
        """Rewrite run.json with the progress so far."""
        tokens = self.steps_done * self.tokens_per_step
        median = self.watch.median()
        self.run.update(
            steps_done=self.steps_done,
            tokens=tokens,
            flops={name: per_token * tokens for name, per_token in self.flops_per_token.items()},
            wall_seconds=self.seconds(),
            mean_step_seconds=self.run.info.get("mean_step_seconds") if median is None else median,
            **info,
        )
        self.updated = time.perf_counter()
        return self.run.info

    def close(self) -> None:
        self.mirrors.close(self.run.info)


class Stopwatch:
    """Time per step from the moments at which calls are known to be done; pauses and the first call don't count.

    Where dispatching a call waits for its end (loops on GPUs), the first call after a pause is read one call late and
    the last one before the next pause at once. So these two share their time.
    """

    def __init__(self):
        self.steps, self.active = 0, 0.0
        self._calls: list[tuple[int, float]] = []  # steps and seconds
        self._begin: int | None = None  # first of `_calls` since the last pause
        self._last = None

    def done(self, n: int) -> None:
        """A call of n steps is done."""
        now = time.perf_counter()
        if self._last is not None:
            self._calls.append((n, now - self._last))
            self.steps += n
            self.active += now - self._last
        self._last = now

    def restart(self) -> None:
        """After a pause (evaluation, checkpoint)."""
        if self._last is None:
            return
        if self._begin is not None and self._begin < len(self._calls):
            (first, a), (last, b) = self._calls[self._begin], self._calls[-1]
            mean = (a + b) / (first + last)
            self._calls[self._begin], self._calls[-1] = (first, first * mean), (last, last * mean)
        self._begin = len(self._calls)
        self._last = time.perf_counter()

    def median(self) -> float | None:
        """Seconds per step, or None when only the compiling call ran."""
        times = sorted(seconds / n for n, seconds in self._calls)
        return times[len(times) // 2] if times else None


class Mirrors:
    """The progress bar and wandb, fed with the rows that go to metrics.jsonl."""

    def __init__(self, run: RunDir, total: int, start: int):
        self.bar, self.wandb = None, None
        log = run.cfg.log
        if not run.writer:
            return
        if log.progress:
            from tqdm import tqdm

            interval = 0.5 if sys.stderr.isatty() else 20.0
            self.bar = tqdm(total=total, initial=start, unit="step", mininterval=interval, dynamic_ncols=True)
        if log.wandb != "off":
            self.wandb = _start_wandb(run)

    def advance(self, n: int) -> None:
        if self.bar is not None:
            self.bar.update(n)

    def show(self, row: dict) -> None:
        if self.wandb is not None:
            split = row["kind"]
            values = {f"{split}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
            self.wandb.log(values, step=row["step"])
        if self.bar is not None and row["kind"] == "train":
            mfu = f" mfu {row['mfu']:.1%}" if row["mfu"] is not None else ""
            rate = f" {row['tokens_per_s']:,.0f} tok/s" if row["tokens_per_s"] else ""
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}{rate}{mfu}", refresh=False)

    def close(self, info: dict) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.summary.update({k: info[k] for k in ("status", "final_loss", "final_bpb") if k in info})
            self.wandb.finish(exit_code=0 if info["status"] in ("done", "preempted") else 1)


def _start_wandb(run: RunDir):
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"config.log.wandb = {run.cfg.log.wandb!r}: wandb is not installed; install it or set it to 'off'"
        ) from None
    return wandb.init(
        mode=run.cfg.log.wandb,
        project=run.cfg.log.project,
        dir=str(run.path),
        id=configs.run_id(run.cfg),
        name=run.cfg.name or None,
        config=to_dict(run.cfg),
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
    )


def describe(cfg, mesh, spec: dict, validated: int, params: dict, flops: dict, start: int) -> None:
    """Print what is derived from the config; `spec` of the training data, `validated` tokens of an evaluation."""
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.train.seq_len
    trained = params["non_embedding"] + params["head"]
    epoch = spec.get("epoch_tokens")
    print(
        f"run         {configs.run_id(cfg)} {cfg.name}".rstrip()
        + (f", resumes at step {start}" if start else "")
        + "\n"
        f"parameters  {params['total']:,} = {params['non_embedding']:,} in blocks + {params['embedding']:,} embedding"
        + (" (tied)" if cfg.model.tie_embeddings else f" + {params['head']:,} head")
        + (f"; active {params['active']:,}" if params["active"] != trained else "")
        + f"\ntokens      {tokens:,} = {tokens / trained:.3g} per parameter, from {cfg.data.source}"
        + (f" ({tokens / epoch:.3g} epochs)" if epoch else "")
        + f"; {validated:,} to validate on"
        + (", all there are" if validated < cfg.data.validation_tokens else "")
        + f"\nFLOPs       {flops['model_causal']:.4g} per token (causal; 6N = {flops['6n']:.4g}), "
        f"{flops['model_causal'] * tokens:.4g} in all"
        f"\ndevices     {mesh.size} {mesh.devices.flat[0].device_kind} ({sharding.describe(mesh)}), "
        f"compute in {cfg.model.dtype}",
        flush=True,
    )
