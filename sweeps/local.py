"""Runs the cells of a sweep on this machine, in worker processes pinned to cores (or to GPUs)."""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from tqdm import tqdm

from efficient_lm.schema import to_dict
from sweeps.store import ENDED, Store
from sweeps.worker import TRAINER

# How long workers get to save a checkpoint after a request to stop.
GRACE_SECONDS = 120
POLL_SECONDS = 0.5


@dataclass
class Outcome:
    """How the cells of one launch ended: {run_id: status}; `stopped` when a signal ended the launch early."""

    status: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class Worker:
    """One worker process and the cell it has."""

    def __init__(self, index: int, store: Store, trainer: str, cores: list[int], env: dict):
        self.cell = None
        command = [sys.executable, "-m", "sweeps.worker", str(store.path), trainer, ",".join(map(str, cores))]
        # A session of its own, so that Ctrl-C reaches the launcher alone, which then asks its workers to save.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )

    def give(self, cell) -> None:
        job = {"run_id": cell.run_id, "config": to_dict(cell.config), "fields": run_fields(cell)}
        self.cell = cell
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it died between two cells; the end of its output says so

    def death(self) -> str:
        """Why the process ended, in words."""
        code = self.process.wait()
        if code >= 0:
            return f"worker exited with code {code}"
        name = signal.Signals(-code).name
        return f"worker was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Launcher:
    """Gives cells to workers until none is left or a signal asks to stop."""

    def __init__(self, store: Store, workers: int, *, trainer: str = TRAINER, progress: bool = True):
        self.store, self.trainer, self.progress = store, trainer, progress
        self.cores, self.gpus = split_cores(workers), gpus()
        self.workers: dict[int, Worker] = {}
        self.outcome = Outcome()
        self.signals = 0

    def run(self, cells) -> Outcome:
        """Trains `cells` (planned cells), started in this order; cells that fail do not stop the others."""
        waiting = cells[::-1]
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = Progress(cells, self.store, self.progress)
        try:
            with selectors.DefaultSelector() as selector:
                for index in range(min(len(self.cores), len(waiting))):
                    self._start(index, waiting.pop(), selector)
                while self.workers:
                    self._handle_stop()
                    for key, _ in selector.select(POLL_SECONDS):
                        self._answer(key.data, selector, waiting)
                    bar.update(self.outcome.status, [w.cell for w in self.workers.values() if w.cell])
        finally:
            for worker in self.workers.values():
                worker.process.kill()
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.outcome

    def _start(self, index, cell, selector):
        worker = Worker(index, self.store, self.trainer, self.cores[index], self._environment(index))
        self.workers[index] = worker
        selector.register(worker.process.stdout, selectors.EVENT_READ, index)
        worker.give(cell)

    def _environment(self, index):
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[index % len(self.gpus)]
            sharing = -(-len(self.cores) // len(self.gpus))
            if sharing > 1:
                env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
        return env

    def _answer(self, index, selector, waiting):
        """A worker finished a cell, or died with one."""
        worker = self.workers[index]
        line = worker.process.stdout.readline()
        if line:
            answer = json.loads(line)
            self.outcome.status[answer["run_id"]] = answer["status"]
            worker.cell = None
            if waiting and not self.signals and answer["status"] != "preempted":
                worker.give(waiting.pop())
            else:
                worker.process.stdin.close()
            return
        selector.unregister(worker.process.stdout)
        reason = worker.death()
        del self.workers[index]
        if worker.cell is not None:
            self._lost(worker.cell, reason)
        if waiting and not self.signals:
            self._start(index, waiting.pop(), selector)

    def _lost(self, cell, reason):
        """The worker died with this cell: resumable if we asked for it, else failed."""
        status = self.store.run(cell.run_id).get("status")
        if status not in ENDED:
            status = "preempted" if self.signals else "failed"
            log = self.store.run_dir(cell.run_id) / "log.txt"
            self.store.end(cell.run_id, status, reason + f"; see {log.name}", **run_fields(cell))
        self.store.release(cell.run_id)
        self.outcome.status[cell.run_id] = status

    # ------------------------------------------------------------------ stopping

    def _on_signal(self, number, frame):
        self.signals += 1

    def _handle_stop(self):
        """After a signal: ask the workers to save; after a second one, or when they take too long, kill them."""
        if not self.signals:
            return
        if not self.outcome.stopped:
            self.outcome.stopped = True
            self.stop_asked = time.monotonic()
            if self.progress:
                tqdm.write("stopping: runs save and can be resumed (a second signal kills them)", file=sys.stderr)
            for worker in self.workers.values():
                worker.process.terminate()
        elif self.signals > 1 or time.monotonic() - self.stop_asked > GRACE_SECONDS:
            for worker in self.workers.values():
                worker.process.kill()


class Progress:
    """A bar over predicted seconds (or FLOPs where no time is known), moved on by what running cells log."""

    def __init__(self, cells, store: Store, enabled: bool):
        self.store = store
        timed = all(cell.predicted_seconds for cell in cells)
        self.weight = {cell.run_id: cell.predicted_seconds if timed else cell.flops for cell in cells}
        self.total = sum(self.weight.values()) or 1.0
        self.done = 0.0
        self.next_look = 0.0
        self.bar = tqdm(
            total=100.0,
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
            file=sys.stderr,
        )

    def update(self, status: dict, running: list) -> None:
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + 2.0
        done = sum(self.weight[run_id] for run_id in status)
        for cell in running:
            done += self.weight[cell.run_id] * self.store.last_metrics(cell.run_id).get("step", 0) / cell.steps
        self.bar.set_description_str(f"{len(status)}/{len(self.weight)} cells", refresh=False)
        self.bar.update(max(0.0, 100.0 * (done - self.done) / self.total))
        self.done = max(done, self.done)

    def close(self) -> None:
        self.bar.close()


def run_fields(cell) -> dict:
    """What run.json of a cell says that died before its trainer wrote one."""
    return {
        "name": cell.config.name,
        "sweep": dict(cell.axes),
        "seed": cell.config.seed,
        "steps_done": 0,
        "steps_total": cell.steps,
        "tokens": 0,
        "params": cell.params,
    }


def split_cores(workers: int) -> list[list[int]]:
    """The cores of this process dealt out to `workers` workers; with more workers than cores, one core each in turn."""
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [[cores[i % len(cores)]] for i in range(workers)]
    return [cores[i::workers] for i in range(workers)]


def gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES entries; [] where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    if "cpu" in os.environ.get("JAX_PLATFORMS", "") or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listing = subprocess.run(query, capture_output=True, text=True)
    return listing.stdout.split() if listing.returncode == 0 else []
