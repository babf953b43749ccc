"""Trainers that launch tests inject: seconds become milliseconds, and they fail on request (by `config.name`)."""

import json
import os
import signal
import time
from pathlib import Path

from efficient_lm.config import run_id
from efficient_lm.metrics import write_json


def train(config, workdir):
    """Writes what a trainer writes. The field `name` says how the run ends."""
    folder = Path(workdir)
    with open(folder / "trained.txt", "a") as file:  # how often the cell was run, and where
        file.write(json.dumps({"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}) + "\n")
    info = {"run_id": run_id(config), "status": "running", "steps_done": 0, "steps_total": config.train.steps}
    info["sweep"] = config.sweep
    write_json(folder / "run.json", info)
    print("hello from the trainer")
    match config.name:
        case "raises":
            raise ValueError("the data are gone\nsecond line")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            os._exit(7)
        case "returns":
            return
        case "dies once" if len((folder / "trained.txt").read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "waits":
            _wait_for_stop(folder, info)
            return
        case "diverges":
            write_json(folder / "run.json", {**info, "status": "diverged", "reason": "loss is nan at step 3"})
            return
    write_json(folder / "run.json", {**info, "status": "done", "steps_done": config.train.steps, "final_loss": 2.0})


def _wait_for_stop(folder, info):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    (folder / "waiting").touch()
    deadline = time.monotonic() + 30
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    write_json(folder / "run.json", {**info, "status": "preempted", "reason": "stopped"})
