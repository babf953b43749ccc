import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from efficient_lm.metrics import write_json
from efficient_lm.schema import ConfigError, to_dict
from sweeps import launch, local, status, worker
from sweeps.plan import make_plan
from sweeps.store import Store

ROOT = Path(__file__).resolve().parents[2]
FAKE = "tests.sweeps.fake:train"


@pytest.fixture
def make_sweep(tmp_path, monkeypatch):
    """A plan with one cell for each name, which tells the fake trainer how to behave."""
    monkeypatch.chdir(ROOT)

    def make(*names):
        path = tmp_path / "sweep.py"
        path.write_text(
            textwrap.dedent("""
            from ml_collections import ConfigDict
            from sweeps.combine import Cell
            def get_config():
                return ConfigDict({"model": {"d_model": 16}})
            def get_sweep():
                return [Cell({"seed": i, "name": name}, {"number": i}) for i, name in enumerate(%r)]
            """)
            % (names,)
        )
        return make_plan(str(path))

    return make


def states(plan, store):
    return [store.state(cell.run_id) for cell in plan.cells]


def trained(store, cell):
    path = store.run_dir(cell.run_id) / "trained.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(plan, store, workers=2, **options):
    return launch.run_local(plan, store, workers, progress=False, trainer=FAKE, **options)


def test_missing_data_refuse_the_sweep_before_a_cell_fails(make_sweep, tmp_path):
    plan, store = make_sweep("ok", "ok"), Store(tmp_path / "store")
    config = plan.cells[1].config
    data = dataclasses.replace(config.data, source="prepared", path=str(tmp_path / "none"))
    plan.cells[1] = dataclasses.replace(plan.cells[1], config=dataclasses.replace(config, data=data))
    with pytest.raises(ConfigError, match="none': no spec.json; make it with"):
        run(plan, store)
    assert states(plan, store) == ["missing", "missing"] and not (store.path / "sweep.json").exists()


@pytest.mark.quick
def test_cells_run_once_in_pinned_worker_processes(make_sweep, tmp_path):
    plan, store = make_sweep(*["ok"] * 5), Store(tmp_path / "store")
    assert run(plan, store) == 0
    assert states(plan, store) == ["done"] * 5
    runs = [trained(store, cell) for cell in plan.cells]
    assert all(len(r) == 1 for r in runs)
    workers = {r[0]["pid"]: r[0]["cores"] for r in runs}
    assert len(workers) <= 2 and os.getpid() not in workers
    if len(os.sched_getaffinity(0)) >= 2:
        assert all(not set(a) & set(b) for p, a in workers.items() for q, b in workers.items() if p != q)
    assert "hello from the trainer" in (store.run_dir(plan.cells[0].run_id) / "log.txt").read_text()
    # Again: nothing left to do.
    assert run(plan, store) == 0
    assert all(len(trained(store, cell)) == 1 for cell in plan.cells)
    assert not list(store.path.glob("*/worker.json"))


def test_failing_cells_do_not_stop_the_others(make_sweep, tmp_path, capfd):
    names = ["raises", "dies", "exits", "returns", "diverges", "ok", "ok"]
    plan, store = make_sweep(*names), Store(tmp_path / "store")
    assert run(plan, store) == launch.EXIT_FAILED
    assert states(plan, store) == ["failed"] * 4 + ["diverged", "done", "done"]
    reasons = [store.run(cell.run_id)["reason"] for cell in plan.cells[:5]]
    assert reasons[0] == "ValueError: the data are gone"
    assert "SIGKILL" in reasons[1] and "code 7" in reasons[2] and "'running'" in reasons[3] and "nan" in reasons[4]
    assert "Traceback" in (store.run_dir(plan.cells[0].run_id) / "log.txt").read_text()
    out = capfd.readouterr().out
    assert "4 failed, 1 diverged, 2 done" in out and "the data are gone" in out and "Traceback" not in out
    # A second launch leaves them; --resume would try the failed ones again but never the diverged one.
    assert run(plan, store) == launch.EXIT_FAILED
    assert [len(trained(store, cell)) for cell in plan.cells] == [1] * 7
    assert launch.waiting_cells(plan.cells, store, again=True) == plan.cells[:4]


def test_a_killed_worker_is_replaced_and_its_cell_can_be_resumed(make_sweep, tmp_path):
    plan, store = make_sweep("dies once", "ok"), Store(tmp_path / "store")
    assert run(plan, store, workers=1) == launch.EXIT_FAILED
    assert states(plan, store) == ["failed", "done"]
    assert run(plan, store, workers=1, again=True) == 0
    assert states(plan, store) == ["done"] * 2
    assert len(trained(store, plan.cells[0])) == 2


def test_cells_of_different_sources_are_pointed_out(make_sweep, tmp_path, capsys):
    plan, store = make_sweep("ok", "ok", "ok"), Store(tmp_path / "store")
    for cell, code in zip(plan.cells, ("aaa", "bbb", "aaa"), strict=True):
        store.end(cell.run_id, "done", None, code_hash=code)
    assert run(plan, store) == 0
    assert "different versions of the sources (code_hash): 2 by aaa, 1 by bbb" in capsys.readouterr().out
    assert "versions" not in launch.summary(plan.cells[:1], store, 0, 0.0)


def test_cells_of_different_tokens_are_pointed_out(make_sweep, tmp_path):
    plan, store = make_sweep("ok", "ok", "ok"), Store(tmp_path / "store")
    for cell, text in zip(plan.cells, ("a", "b", None), strict=True):
        data = {"name": "mine", "sha256": {"tokens.bin": 64 * text}} if text else {"name": "mine"}
        store.end(cell.run_id, "done", None, code_hash="x", data=data)
    note = "note: cells were trained on different tokens of 'sotu' (tokens_hash): 1 by aaaaaaaaaaaa, 1 by bbbbbbbbbbbb"
    assert launch.summary(plan.cells, store, 0, 0.0).splitlines()[1:] == [note]
    assert "tokens" not in launch.summary(plan.cells[1:], store, 0, 0.0)


def test_diverged_cells_alone_have_their_own_exit_code(make_sweep, tmp_path):
    plan, store = make_sweep("diverges", "ok"), Store(tmp_path / "store")
    store.end(plan.cells[0].run_id, "diverged", "loss is nan")
    store.end(plan.cells[1].run_id, "done", "")
    assert run(plan, store) == launch.EXIT_DIVERGED


def test_stale_and_preempted_cells_run_again(make_sweep, tmp_path):
    plan, store = make_sweep("ok", "ok"), Store(tmp_path / "store")
    store.end(plan.cells[0].run_id, "preempted", "stopped")
    store.end(plan.cells[1].run_id, "running", "")
    gone = {"pid": 999999999, "process_start": None, "host": os.uname().nodename}
    write_json(store.run_dir(plan.cells[1].run_id) / "worker.json", gone)
    assert states(plan, store) == ["preempted", "stale"]
    goes_on = "the same command goes on with what is left"
    assert goes_on in launch.summary(plan.cells, store, 0, 0.0)
    assert run(plan, store, workers=1) == 0


def test_a_cell_that_runs_elsewhere_is_left_alone(make_sweep, tmp_path):
    plan, store = make_sweep("ok", "ok"), Store(tmp_path / "store")
    store.claim(plan.cells[0].run_id)
    assert states(plan, store) == ["running", "missing"]
    assert launch.waiting_cells(plan.cells, store, again=True) == plan.cells[1:]


def test_a_worker_leaves_a_cell_alone_that_another_trainer_holds(make_sweep, tmp_path):
    """A cell that waits in a SLURM queue can start between the plan and the turn of the cell here."""
    cell, store = make_sweep("ok").cells[0], Store(tmp_path / "store")
    store.end(cell.run_id, "running", None)
    with open(store.run_dir(cell.run_id) / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        job = {"run_id": cell.run_id, "config": {}, "fields": {}}
        assert worker.run_cell(store, job, FAKE) == "running"
    assert store.run(cell.run_id)["status"] == "running" and trained(store, cell) == []


def test_a_worker_whose_launcher_died_ends_quietly(make_sweep, tmp_path):
    cell, core = make_sweep("ok").cells[0], min(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "sweeps.worker", str(tmp_path / "store"), FAKE, str(core)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    process.stdout.close()  # nobody reads the answer
    job = {"run_id": cell.run_id, "config": to_dict(cell.config), "fields": {}}
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    assert Store(tmp_path / "store").state(cell.run_id) == "done"


def test_a_trainer_that_cannot_be_imported_fails_every_cell(make_sweep, tmp_path):
    plan, store = make_sweep("ok", "ok"), Store(tmp_path / "store")
    store.end(plan.cells[0].run_id, "preempted", "stopped at step 3")  # what an earlier process left is no excuse
    assert launch.run_local(plan, store, 1, progress=False, trainer="tests.no_such:train") == launch.EXIT_FAILED
    assert states(plan, store) == ["failed"] * 2
    assert "no_such" in store.run(plan.cells[0].run_id)["reason"]
    assert "no_such" in (store.run_dir(plan.cells[0].run_id) / "log.txt").read_text()


LAUNCH = """
import sys
from sweeps import launch
from sweeps.plan import make_plan
from sweeps.store import Store
sys.exit(launch.run_local(make_plan(sys.argv[1]), Store(sys.argv[2]), 1, progress=False, trainer=sys.argv[3]))
"""


def wait_for(path, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_launcher_leaves_a_store_that_resumes(make_sweep, tmp_path, number):
    plan, store = make_sweep("waits", "ok", "ok"), Store(tmp_path / "store")
    first = next(c for c in plan.cells if c.config.name == "waits")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, plan.config, str(store.path), FAKE], cwd=ROOT, stdout=subprocess.PIPE
    )
    wait_for(store.run_dir(first.run_id) / "waiting")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else launch.EXIT_STOPPED)
    deadline = time.monotonic() + 20
    # After SIGKILL the worker learns of its launcher's death from the kernel.
    while store.state(first.run_id) == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.state(first.run_id) == "preempted"
    assert json.loads((store.path / "sweep.json").read_text())["cells"]


def test_the_longest_cell_goes_first(make_sweep):
    cells = make_sweep("ok", "ok", "ok").cells
    seconds = (1.0, 3.0, 2.0)
    timed = [dataclasses.replace(c, predicted_seconds=s) for c, s in zip(cells, seconds, strict=True)]
    assert [c.predicted_seconds for c in launch.longest_first(timed)] == [3.0, 2.0, 1.0]
    longer = dataclasses.replace(cells[1], flops_per_token=1e12)
    assert launch.longest_first([cells[0], longer, timed[0]])[0] is longer


@pytest.mark.parametrize(("order", "expected"), [("dearest", [1, 2, 0]), ("listed", [0, 1, 2])])
def test_cells_start_in_the_order_asked_for(make_sweep, tmp_path, order, expected):
    plan, store = make_sweep("ok", "ok", "ok"), Store(tmp_path / "store")
    plan.cells = [dataclasses.replace(c, predicted_seconds=s) for c, s in zip(plan.cells, (1.0, 3.0, 2.0), strict=True)]
    assert run(plan, store, workers=1, order=order) == 0
    ended = [(store.run_dir(cell.run_id) / "run.json").stat().st_mtime_ns for cell in plan.cells]
    assert sorted(range(3), key=ended.__getitem__) == expected


def test_print_launcher_gives_commands_that_train_the_same_runs(make_sweep, tmp_path, capsys):
    import shlex

    from efficient_lm import config as configs

    plan = make_sweep("ok", "a name")
    plan = make_plan(plan.config, {"train.steps": "7", "optim.lr": "1e-2", "model.pattern": "gla,attention"})
    words = ["--config.train.steps=7", "--config.optim.lr=1e-2", "--config.model.pattern=gla,attention"]
    store = str(tmp_path / "store")
    assert launch.main(["--config", plan.config, "--store", store, "--launcher", "print", *words]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and not (tmp_path / "store").exists()
    for line, cell in zip(lines, plan.cells, strict=True):
        overrides, rest = configs.split_args(shlex.split(line)[3:])
        config = configs.load(rest[rest.index("--config") + 1], overrides)
        assert config == cell.config
        assert rest[rest.index("--workdir") + 1].endswith(cell.run_id)


def test_cores_are_dealt_out():
    cores = sorted(os.sched_getaffinity(0))
    assert local.split_cores(1) == [cores]
    assert sorted(sum(local.split_cores(len(cores)), [])) == cores
    assert all(len(own) == 1 for own in local.split_cores(len(cores) + 3))


def test_bad_arguments_give_one_line_and_leave_the_store(make_sweep, tmp_path, capsys):
    plan, store = make_sweep("ok"), tmp_path / "store"
    good = ["--config", plan.config, "--store", str(store)]
    for bad in (
        ["--config", "none.py", "--store", str(store)],
        [*good, "--workers", "0"],
        [*good, "--budget", "soon"],
        [*good, "--tokens-per-second", "-1"],
        [*good, "--config.train.stepps=3"],
        [*good, "--config.model.d_model=15"],
        [*good, "--order", "cheapest"],
        good[:2],
        ["--config", plan.config, "--store", "/proc/none/store"],
    ):
        assert launch.main(bad) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 9 and all(line.startswith("error: ") for line in lines)
    assert not store.exists()


def test_a_real_launch_trains_fits_nothing_and_reports_status(tmp_path, monkeypatch, capfd):
    """The whole path with the real trainer: a tiny two-cell sweep, then its states and its repetition."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "tiny.py"
    path.write_text(
        textwrap.dedent("""
        from ml_collections import ConfigDict
        from sweeps.combine import choices
        def get_config():
            return ConfigDict({
                "model": {"d_model": 16, "n_layers": 1, "dtype": "float32", "vocab_size": 64},
                "data": {"source": "zipf_markov", "validation_tokens": 512},
                "train": {"steps": 4, "batch_size": 2, "seq_len": 32}, "log": {"progress": False}})
        def get_sweep():
            return choices("arch", {"attention": {"model.pattern": ("attention",)}, "gla": {"model.pattern": ("gla",)}})
        """)
    )
    arguments = ["--config", str(path), "--store", str(tmp_path / "store"), "--workers", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert launch.main(arguments) == 0, (capfd.readouterr(), [p.read_text() for p in tmp_path.glob("store/*/log.txt")])
    store = Store(tmp_path / "store")
    runs = [store.run(cell["run_id"]) for cell in store.sweep()["cells"]]
    assert {r["sweep"]["arch"] for r in runs} == {"attention", "gla"}
    for cell, info in zip(store.sweep()["cells"], runs, strict=True):
        assert (info["status"], info["run_id"]) == ("done", cell["run_id"])
        assert info["flops"]["model_causal"] == pytest.approx(cell["flops"])
        assert (info["tokens"], info["params"]) == (cell["tokens"], cell["params"])
    capfd.readouterr()
    assert launch.main(arguments) == 0 and "0 run now" in capfd.readouterr().out
    assert status.main(["--store", str(store.path)]) == 0
    assert "2 cells: 2 done" in capfd.readouterr().out
