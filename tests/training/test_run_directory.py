"""What a run leaves behind: complete, loadable, honest about how it ended."""

import json
import math
import sys

import pytest

from efficient_lm import checkpoint, metrics, train
from efficient_lm.config import run_id
from efficient_lm.recorder import Stopwatch
from efficient_lm.schema import ConfigError, to_dict

pytestmark = pytest.mark.usefixtures("quick_compile")

RUN_KEYS = """run_id name status reason sweep seed steps_done steps_total tokens params flops_per_token flops final_loss
final_bpb final_accuracy state_bytes hardware mesh versions code_hash
data validation_tokens started updated wall_seconds mean_step_seconds peak_flops""".split()


@pytest.mark.quick
def test_a_finished_run_has_everything(small, train_one, tmp_path):
    cfg = small(**{"train.eval_every": 5, "train.log_every": 4, "sweep": {"arch": "dense", "budget": 1e9}})
    info = train_one(cfg, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == info
    assert set(RUN_KEYS) <= info.keys()
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(cfg)
    assert (info["run_id"], info["status"], info["name"]) == (run_id(cfg), "done", "test")
    assert info["sweep"] == {"arch": "dense", "budget": 1e9}
    assert info["tokens"] == 12 * 4 * 16 and info["steps_done"] == info["steps_total"] == 12
    assert info["validation_tokens"] == 256 and info["peak_flops"] is None and info["mean_step_seconds"] > 0
    for name, per_token in info["flops_per_token"].items():
        assert info["flops"][name] == per_token * info["tokens"]
    rows = metrics.read_rows(tmp_path / "run" / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [1, 4, 8, 12]
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "mfu", "seconds", "tokens", "flops"} <= trained[-1].keys()
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluated] == [5, 10, 12]
    assert evaluated[-1]["loss"] == info["final_loss"] and evaluated[-1]["split"] == "validation"
    assert evaluated[-1]["accuracy"] == info["final_accuracy"] and 0 < info["final_accuracy"] < 1
    assert info["final_bpb"] == pytest.approx(info["final_loss"] / math.log(2))
    assert info["final_loss"] < evaluated[0]["loss"] < math.log(32) + 0.5


def test_evaluation_uses_the_ema(small, train_one, tmp_path):
    last, averaged = small(), small(**{"train.ema": 0.99})
    plain, ema = train_one(last, tmp_path / "plain"), train_one(averaged, tmp_path / "ema")
    rows = [metrics.read_rows(tmp_path / name / "metrics.jsonl")[11] for name in ("plain", "ema")]
    assert rows[0]["loss"] == rows[1]["loss"]  # training is the same
    assert plain["final_loss"] != ema["final_loss"]


def test_another_config_is_refused_by_its_first_field(small, train_one, tmp_path):
    train_one(small(), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(ConfigError, match=r"config\.optim\.lr = 0\.01, not 0\.5$"):
        train_one(small(**{"optim.lr": 0.5, "train.steps": 99}), tmp_path / "run")
    assert {p: p.read_bytes() for p in before} == before
    # Fields that say how a run executes may differ.
    assert train_one(small(**{"train.log_every": 7, "mesh.fsdp": 2}), tmp_path / "run")["status"] == "done"


def test_without_its_config_a_run_is_known_by_its_id(small, train_one, tmp_path):
    train_one(small(), tmp_path / "run", should_stop=lambda step: step == 6)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match=rf"holds run {run_id(small())} without config\.json, not "):
        train_one(small(**{"optim.lr": 0.5}), tmp_path / "run")
    assert train_one(small(), tmp_path / "run")["status"] == "done"


def test_a_run_on_two_meshes_says_so_where_it_changes_what_is_dropped(small, tmp_path, capsys):
    one, two = "data 1 x fsdp 2 x tensor 1", "data 1 x fsdp 4 x tensor 1"
    for parallel in ("expert", "data"):
        cfg = small(**{"model.pattern": ["attention/moe"], "model.ffns.moe": {"parallel": parallel}, "mesh.fsdp": 2})
        run = metrics.RunDir(tmp_path / parallel, cfg)
        run.begin(mesh=run.meshes(one, 0))
        assert run.meshes(two, 0) == two and run.meshes(one, 5) == one and not capsys.readouterr().out
        assert run.meshes(two, 5) == f"{one}+{two}"
        named = f"note: another mesh trained this run up to step 5: {one}+{two}; " in capsys.readouterr().out
        assert named == (parallel == "expert")
        run.release()


def test_one_process_at_a_time(small, train_one, tmp_path):
    holder = metrics.RunDir(tmp_path / "run", small())
    with pytest.raises(ConfigError, match="another process is training here"):
        train_one(small(), tmp_path / "run")
    holder.release()
    assert train_one(small(), tmp_path / "run")["status"] == "done"


def test_workdir_that_can_not_be_one(small, train_one, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workdir = .*file exists"):
        train_one(small(), tmp_path / "file")


def test_a_config_that_cannot_be_read_is_not_overwritten(small, train_one, tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match="its config.json can't be read; delete it to go on"):
        train_one(small(), tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model": '


def test_divergence_stops_the_run_and_keeps_its_rows(small, train_one, tmp_path):
    cfg = small(**{"optim.lr": 1e30, "optim.warmup": 0.0, "optim.clip_norm": 0.0, "train.checkpoint_every": 1})
    info = train_one(cfg, tmp_path / "run")
    assert info["status"] == "diverged" and "at step" in info["reason"] and info["final_loss"] is None
    rows = metrics.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert math.isfinite(rows[0]["loss"]) and rows[-1]["nonfinite"]
    assert rows[-1]["step"] == info["steps_done"] < 12
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    # No checkpoint was written after the bad step.
    assert max(checkpoint.steps(tmp_path / "run" / "ckpt")) < info["steps_done"]
    assert train_one(cfg, tmp_path / "run") == info


@pytest.mark.parametrize("waits", [False, True])
def test_step_time_does_not_depend_on_how_calls_are_dispatched(waits, monkeypatch):
    """Pauses after every two calls of 10 steps, 0.1 s a step. Where dispatch waits, a call ends before it is read."""
    clock = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    watch = Stopwatch()
    for pause in range(4):
        clock += 1.0 if waits else 0.0
        clock += 1.0 + (30.0 if pause == 0 else 0.0)  # compiling
        watch.done(10)
        clock += 0.0 if waits else 1.0
        watch.done(10)
        clock += 7.0
        watch.restart()
    assert watch.median() == pytest.approx(0.1)


def test_a_last_update_that_breaks_the_model_is_divergence(small, train_one, tmp_path):
    info = train_one(small(**{"train.steps": 1, "optim.lr": 1e30, "optim.warmup": 0.0}), tmp_path / "run")
    assert info["status"] == "diverged" and "validation loss is nan at step 1" in info["reason"]
    assert info["final_loss"] is None and not checkpoint.steps(tmp_path / "run" / "ckpt")


def test_loss_that_climbs_and_stays_up_is_divergence(small, train_one, tmp_path):
    cfg = small(**{"optim.lr": 30.0, "optim.schedule": "constant", "train.steps": 60, "train.log_every": 20})
    info = train_one(cfg, tmp_path / "run")
    assert info["status"] == "diverged" and "mean loss of steps" in info["reason"]
    assert 12 < info["steps_done"] < 60


def test_an_exception_leaves_status_failed_and_the_next_try_goes_on(small, train_one, tmp_path, monkeypatch):
    cfg = small(**{"train.checkpoint_every": 4})

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            train_one(cfg, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "failed" and info["reason"] == "OSError: no space left on device"
    assert train_one(cfg, tmp_path / "run")["status"] == "done"


def test_vocabulary_of_the_data_must_fit(small, train_one, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 16: must be at least 32"):
        train_one(small(**{"model.vocab_size": 16}), tmp_path / "run")


def test_wandb_offline_mirrors_rows(small, train_one, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    info = train_one(small(**{"log.wandb": "offline", "train.eval_every": 6}), tmp_path / "run")
    assert info["status"] == "done"
    logged = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logged) == 1 and b"train/grad_norm" in logged[0].read_bytes()


def test_missing_wandb_is_one_clear_line(small, train_one, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="config.log.wandb = 'offline': wandb is not installed"):
        train_one(small(**{"log.wandb": "offline"}), tmp_path / "run")


def test_rows_that_are_not_numbers_become_null(small, tmp_path):
    run = metrics.RunDir(tmp_path, small())
    run.begin(status="running")
    run.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf})
    run.release()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "nonfinite": True}
    ]
