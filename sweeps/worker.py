"""A worker process of the local launcher: takes cells from stdin, trains one after another, answers on stdout.

One process for many cells pays the imports once and keeps compiled functions warm. What a cell prints goes to `log.txt`
in its run directory. The worker runs only while its launcher lives.
"""

import ctypes
import importlib
import json
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager

from pallas_kernels.commands import BadInput, Parser, command
from sweeps.store import ENDED, Store

TRAINER = "efficient_lm.train:train"


@command
def main(argv=None) -> int:
    parser = Parser(prog="python -m sweeps.worker", description="Train the cells that sweeps.launch gives on stdin.")
    parser.add_argument("store", help="run store")
    parser.add_argument("trainer", help="module:function")
    parser.add_argument("cores", help="ids of the cores to run on, as in 0,1")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(,\d+)*", args.cores):
        raise BadInput(f"cores {args.cores!r}: must be numbers separated by commas")
    # Before JAX is imported, since XLA sizes its thread pool by the cores it sees.
    os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})
    end_with_parent(signal.SIGTERM)
    answers = os.dup(1)
    store = Store(args.store)
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        run_id = job["run_id"]
        store.run_dir(run_id).mkdir(parents=True, exist_ok=True)
        with _output_to(store.run_dir(run_id) / "log.txt"):
            status = run_cell(store, job, args.trainer)
        try:
            os.write(answers, json.dumps({"run_id": run_id, "status": status}).encode() + b"\n")
        except BrokenPipeError:  # the launcher died; the run has saved what it did
            return 0
        if status == "preempted":
            return 0
    return 0


def run_cell(store: Store, job: dict, trainer_name: str) -> str:
    """Trains one cell and returns its final status; whatever goes wrong ends up in its run.json.

    A cell that another process trains (a job of an earlier SLURM launch, say) is left alone: 'running'.
    """
    run_id = job["run_id"]
    if store.trainer_holds(run_id):
        return "running"
    store.claim(run_id)
    try:
        return _train(store, job, trainer_name)
    finally:
        store.release(run_id)
        _forget_compiled()


def _train(store: Store, job: dict, trainer_name: str) -> str:
    run_id = job["run_id"]
    before = store.run(run_id)
    try:
        from efficient_lm.config import from_dict

        module, _, function = trainer_name.partition(":")
        trainer = getattr(importlib.import_module(module), function)
        trainer(from_dict(job["config"]), str(store.run_dir(run_id)))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        run = store.run(run_id)
        # An earlier process's 'preempted' says nothing of this failure.
        if run.get("status") not in ENDED or run == before:
            store.end(run_id, "failed", _one_line(error), **job["fields"])
    status = store.run(run_id).get("status")
    if status not in ENDED:
        store.end(run_id, "failed", f"the trainer returned with status {status!r}", **job["fields"])
        return "failed"
    return status


def _one_line(error) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _forget_compiled():
    """Compiled functions of the last shape would pile up over a long sweep; the persistent cache has them still."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def end_with_parent(number) -> None:
    """On Linux, this signal when the launcher dies in whatever way; after SIGTERM the trainer saves its run."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(0)


@contextmanager
def _output_to(path):
    """Sends stdout and stderr, those of compiled libraries too, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for fd in (log, *saved):
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
