"""What the SLURM launcher runs inside a job, without SLURM."""

import json
import signal
import sys
import textwrap
import time

import pytest

from sweeps.slurm import CellJob
from sweeps.store import Store

submitit = pytest.importorskip("submitit")

TRAINER = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "run.json").write_text(json.dumps({"status": "preempted", "steps_done": 5}))
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
time.sleep(60 if sys.argv[2] == "wait" else 0)
(folder / "run.json").write_text(json.dumps({"status": "done"}))
"""


def job(tmp_path, how):
    code = TRAINER if how != "fail" else "print('config.x = 3: no'); raise SystemExit(2)"
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "store" / "abc"), how]
    return CellJob(command, str(tmp_path / "store"), "abc", {"steps_done": 0})


def test_a_job_returns_the_status_of_its_run(tmp_path):
    assert job(tmp_path, "go")() == "done"


def test_a_trainer_that_refuses_leaves_a_failed_run_with_its_last_line(tmp_path):
    Store(tmp_path / "store").end("abc", "preempted", "stopped")  # by an earlier job
    assert job(tmp_path, "fail")() == "failed"
    run = Store(tmp_path / "store").run("abc")
    assert run["reason"] == "trainer exited with code 2: config.x = 3: no"


def test_a_preempted_job_saves_at_once_and_asks_for_itself_again(tmp_path):
    """`checkpoint` runs in a signal handler that interrupts the wait for the trainer, as submitit calls it."""
    own, seen = job(tmp_path, "wait"), {}

    def preempt(number, frame):
        while not (tmp_path / "store" / "abc" / "ready").exists():
            time.sleep(0.02)
        own.process.send_signal(signal.SIGUSR2)  # SLURM sends it to every process of the job
        started = time.monotonic()
        seen["again"] = own.checkpoint()
        seen["seconds"] = time.monotonic() - started

    before = signal.signal(signal.SIGALRM, preempt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert own() == "preempted"
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen["seconds"] < 10
    again = seen["again"].function
    assert (again.command, again.run_id) == (own.command, "abc") and again.process is None
    assert json.loads((tmp_path / "store" / "abc" / "run.json").read_text())["steps_done"] == 5
