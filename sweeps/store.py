"""The run store of a sweep: `runs/NAME/RUN_ID/{config.json, run.json, metrics.jsonl, ...}` and `runs/NAME/sweep.json`.

Trainers own run.json. A sweep adds to a run directory `worker.json` (which process has the run) and `log.txt`. Every
JSON file is replaced atomically, so that a kill at any moment leaves a store that can be read.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from efficient_lm.metrics import utc_now, write_json
from efficient_lm.schema import ConfigError

# A run on another host whose files have not changed for this long counts as dead.
STALE_AFTER_SECONDS = 900

STATES = ("missing", "running", "stale", "done", "diverged", "failed", "preempted")
ENDED = ("done", "diverged", "failed", "preempted")


def read_json(path) -> dict:
    """The object in a JSON file. Raises ValueError when it holds something else."""
    value = json.loads(Path(path).read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold an object")
    return value


class Store:
    """A directory of runs."""

    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"store = {str(path)!r}: is a file; a store is a directory such as runs/NAME")

    def run_dir(self, run_id: str) -> Path:
        return self.path / run_id

    def run(self, run_id: str) -> dict:
        """run.json of a run; {} where there is none (or where it can't be read)."""
        try:
            return read_json(self.run_dir(run_id) / "run.json")
        except (FileNotFoundError, ValueError):
            return {}

    def state(self, run_id: str) -> str:
        """One of STATES. `stale` is a run that says `running` but whose process is gone."""
        run, alive = self.run(run_id), self._process_alive(run_id)
        status = run.get("status")
        if alive or (alive is None and status == "running" and self._being_trained(run_id, run)):
            return "running"
        if status in ENDED:
            return status
        folder = self.run_dir(run_id)
        return "stale" if folder.is_dir() and any(folder.iterdir()) else "missing"

    def _process_alive(self, run_id) -> bool | None:
        """Whether the process in worker.json lives; None when that can't be told from here."""
        try:
            worker = read_json(self.run_dir(run_id) / "worker.json")
        except (FileNotFoundError, ValueError):
            return None
        if worker.get("host") != socket.gethostname():
            return None
        started = process_start(worker.get("pid", -1))
        return started is not None and started == worker.get("process_start")

    def _being_trained(self, run_id, run) -> bool:
        """For runs without a worker here: the trainer holds its lock, or lives on another host and still writes."""
        if self.trainer_holds(run_id):
            return True
        if (run.get("hardware") or {}).get("host") == socket.gethostname():
            return False
        files = (self.run_dir(run_id) / name for name in ("run.json", "metrics.jsonl"))
        changed = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
        return time.time() - changed < STALE_AFTER_SECONDS

    def trainer_holds(self, run_id: str) -> bool:
        """Whether a trainer, however it was started, holds the lock that it keeps on its run directory."""
        try:
            with open(self.run_dir(run_id) / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def claim(self, run_id: str) -> None:
        """Records that this process trains the run."""
        worker = {"pid": os.getpid(), "process_start": process_start(os.getpid()), "host": socket.gethostname()}
        write_json(self.run_dir(run_id) / "worker.json", {**worker, "time": utc_now()})

    def release(self, run_id: str) -> None:
        (self.run_dir(run_id) / "worker.json").unlink(missing_ok=True)

    def end(self, run_id: str, status: str, reason: str, **fields) -> None:
        """Sets the status of a run whose trainer could not do it itself; keeps all else in run.json."""
        run = self.run(run_id) or {"run_id": run_id, **fields}
        write_json(self.run_dir(run_id) / "run.json", {**run, "status": status, "reason": reason, "updated": utc_now()})

    def last_metrics(self, run_id: str, kind: str = "train") -> dict:
        """The newest row of a kind in metrics.jsonl, read from its end; {} when there is none."""
        path = self.run_dir(run_id) / "metrics.jsonl"
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 8192))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill, or cut by the seek
                continue
            if isinstance(row, dict) and row.get("kind") == kind:
                return row
        return {}

    # ------------------------------------------------------------------ the sweep as a whole

    def sweep(self) -> dict:
        """sweep.json; {} where there is none. Raises ConfigError where it can't be read."""
        try:
            return read_json(self.path / "sweep.json")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(
                f"store = {str(self.path)!r}: sweep.json can't be read ({error}); delete it and launch again"
            ) from None

    def write_sweep(self, name: str, config: str, cells: list[dict]) -> None:
        """Records the planned cells. Cells of an earlier plan stay listed only where they have been run."""
        planned = {cell["run_id"] for cell in cells}
        earlier = [c for c in self.sweep().get("cells", []) if c["run_id"] not in planned]
        kept = [cell for cell in earlier if self.state(cell["run_id"]) != "missing"]
        write_json(self.path / "sweep.json", {"name": name, "config": config, "time": utc_now(), "cells": cells + kept})

    @contextmanager
    def locked(self):
        """Held by a launcher, so that two of them never train the same cell. Raises ConfigError when taken."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "launcher.lock", "a+")
        except OSError as error:
            raise ConfigError(f"store = {str(self.path)!r}: can't be written ({error.strerror.lower()})") from None
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"store = {str(self.path)!r}: another launcher is working on it") from None
            yield


def process_start(pid: int) -> float | None:
    """When a process began (clock ticks since boot), which tells it from a later one with the same id; None if gone.

    Where there is no /proc, 0.0 for a living process.
    """
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else float(fields[19])
