import json
import os
import socket
import subprocess
import sys
import time

import pytest

from efficient_lm.metrics import write_json
from efficient_lm.schema import ConfigError
from sweeps import status
from sweeps.store import STALE_AFTER_SECONDS, Store, process_start


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def put(store, run_id, status, **fields):
    write_json(store.run_dir(run_id) / "run.json", {"run_id": run_id, "status": status, **fields})


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.quick
def test_states(store):
    assert store.state("never") == "missing"
    for state in ("done", "diverged", "failed", "preempted"):
        put(store, state, state)
        assert store.state(state) == state
    put(store, "mine", "running")
    store.claim("mine")
    assert store.state("mine") == "running"
    store.release("mine")
    # Killed before the trainer wrote anything, and while it ran.
    (store.run_dir("torn")).mkdir()
    (store.run_dir("torn") / "log.txt").write_text("x")
    assert store.state("torn") == "stale"
    put(store, "killed", "running")
    worker = {"pid": dead_pid(), "process_start": 1.0, "host": socket.gethostname()}
    write_json(store.run_dir("killed") / "worker.json", worker)
    assert store.state("killed") == "stale"


def test_another_process_with_the_same_pid_is_not_the_worker(store):
    put(store, "run", "running")
    store.claim("run")
    worker = json.loads((store.run_dir("run") / "worker.json").read_text())
    write_json(store.run_dir("run") / "worker.json", {**worker, "process_start": worker["process_start"] - 1})
    assert store.state("run") == "stale"


def test_a_run_elsewhere_is_stale_when_its_files_stop_changing(store):
    put(store, "far", "running", hardware={"host": "another-machine"})
    assert store.state("far") == "running"
    old = time.time() - STALE_AFTER_SECONDS - 5
    os.utime(store.run_dir("far") / "run.json", (old, old))
    assert store.state("far") == "stale"


def test_a_run_started_by_hand_is_running_while_its_trainer_holds_the_lock(store):
    put(store, "hand", "running", hardware={"host": socket.gethostname()})
    assert store.state("hand") == "stale"
    lock = store.run_dir("hand") / ".lock"
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code, str(lock)], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert store.state("hand") == "running"
    process.kill()
    process.wait()
    process.stdout.close()
    assert store.state("hand") == "stale"


def test_unreadable_files_do_not_break_the_store(store, capsys):
    put(store, "good", "done", final_loss=1.5, steps_total=10, steps_done=10)
    put(store, "bad", "running")
    (store.run_dir("bad") / "run.json").write_text('{"status": "run')
    (store.run_dir("bad") / "metrics.jsonl").write_text('{"kind": "train", "step": 4, "loss": 2.5}\n{"kind": "tr')
    assert store.state("bad") == "stale"
    assert store.last_metrics("bad")["step"] == 4
    assert status.main(["--store", str(store.path)]) == 0
    assert "1.5000" in capsys.readouterr().out


def test_last_metrics_of_a_long_file(store):
    folder = store.run_dir("long")
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "step": i, "text": "x" * 50} for i in range(1000)] + [{"kind": "eval", "step": 1000}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert store.last_metrics("long")["step"] == 999
    assert store.last_metrics("long", "eval")["step"] == 1000
    assert store.last_metrics("none") == {}


def test_a_new_plan_keeps_cells_that_were_run_and_drops_others(store):
    put(store, "a", "done")
    store.write_sweep("s", "s.py", [{"run_id": "a"}, {"run_id": "b"}])
    store.write_sweep("s", "s.py", [{"run_id": "c"}])
    assert [cell["run_id"] for cell in store.sweep()["cells"]] == ["c", "a"]


def test_only_one_launcher_at_a_time(store):
    with store.locked():
        with pytest.raises(ConfigError, match="another launcher"):
            with Store(store.path).locked():
                pass
    with store.locked():
        pass


def test_store_that_is_a_file_or_has_a_broken_sweep(tmp_path, store, capsys):
    (tmp_path / "file").write_text("")
    assert status.main(["--store", str(tmp_path / "file")]) == 2
    assert status.main(["--store", str(tmp_path / "none")]) == 2
    store.path.mkdir()
    assert status.main(["--store", str(store.path)]) == 2
    (store.path / "sweep.json").write_text("[1]")
    assert status.main(["--store", str(store.path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("error: store = ") for line in lines)


def test_process_start_of_gone_and_living_processes():
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None
    assert process_start(dead_pid()) is None
