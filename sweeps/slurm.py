"""SLURM launcher: one job array with a cell per task, through submitit. Preempted jobs save, requeue and go on.

The trainer runs as a child process: on the signal before the time limit (or a preemption) submitit calls
`checkpoint()` inside a signal handler, where the child can be told to save and be waited for.
"""

import os
import shlex
import signal
import subprocess
import sys
import time

from efficient_lm.schema import ConfigError
from pallas_kernels.commands import BAD_INPUT
from sweeps.local import run_fields
from sweeps.store import ENDED, Store

SAVE_SECONDS = 60


class CellJob:
    """What a job of the array runs: `python -m efficient_lm.train` of one cell. Pickled by submitit."""

    def __init__(self, command: list[str], store: str, run_id: str, fields: dict):
        self.command, self.store, self.run_id, self.fields = command, store, run_id, fields
        self.process = None

    def __call__(self) -> str:
        """Trains, and returns the final status of the run."""
        store = Store(self.store)
        store.run_dir(self.run_id).mkdir(parents=True, exist_ok=True)
        with open(store.run_dir(self.run_id) / "log.txt", "a") as log:
            # SLURM signals every process of the job; the trainer must survive the one meant for submitit.
            ignoring = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh", *self.command]
            self.process = subprocess.Popen(ignoring, stdout=log, stderr=log)
            code = self.process.wait()
        status = store.run(self.run_id).get("status")
        if status not in ENDED or code == BAD_INPUT:  # which leaves run.json as an earlier process wrote it
            said = (store.run_dir(self.run_id) / "log.txt").read_text(errors="replace").strip().splitlines()
            reason = f"trainer exited with code {code}" + (f": {said[-1]}" if said else "")
            store.end(self.run_id, "failed", reason, **self.fields)
            return "failed"
        return status

    def checkpoint(self):
        """Called by submitit before the job is requeued: lets the trainer save."""
        import submitit

        if self.process is not None:
            deadline = time.monotonic() + SAVE_SECONDS
            if not _ended(self.process.pid):
                os.kill(self.process.pid, signal.SIGTERM)
            while not _ended(self.process.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(CellJob(self.command, self.store, self.run_id, self.fields))


def _ended(pid: int) -> bool:
    """Whether a child has ended. Not Popen.poll or .wait, which the interrupted `wait` has locked."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def launch(cells, store: Store, args) -> int:
    """Submits the cells as one array with at most `--workers` tasks at a time. Returns an exit code."""
    from sweeps import launch as launching

    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher = 'slurm': needs submitit; install the extra 'slurm'") from None
    if not cells:
        print("nothing to submit: no cell is waiting")
        return launching.exit_code(cells, store, stopped=False)
    executor = submitit.AutoExecutor(folder=store.path / "slurm", cluster="slurm")
    executor.update_parameters(
        name=store.path.name,
        timeout_min=args.time,
        cpus_per_task=args.cpus,
        mem_gb=args.mem,
        slurm_array_parallelism=args.workers or len(cells),
        # Sent this long before the time limit: the trainer needs it to save.
        slurm_signal_delay_s=SAVE_SECONDS + 30,
        **({"gpus_per_node": args.gpus} if args.gpus else {}),
        **({"slurm_partition": args.partition} if args.partition else {}),
    )
    jobs = [CellJob(_command(c, store), str(store.path), c.run_id, run_fields(c)) for c in cells]
    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        text = str(error).strip().splitlines()
        raise ConfigError(f"launcher = 'slurm': sbatch refused the jobs ({text[-1] if text else error})") from None
    array = submitted[0].job_id.partition("_")[0]
    print(f"submitted {len(submitted)} jobs as array {array}; logs in {executor.folder}")
    if not args.wait:
        print(f"follow them with: python -m sweeps.status --store {store.path} --watch")
        return 0
    for job in submitted:
        job.wait()
    print(launching.summary(cells, store, len(cells), 0.0))
    return launching.exit_code(cells, store, stopped=False)


def _command(cell, store: Store) -> list[str]:
    from sweeps.launch import command

    return [sys.executable, *shlex.split(command(cell, store))[1:]]
