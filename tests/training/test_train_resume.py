"""A run that was stopped in whatever way goes on to the same bits as one that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from efficient_lm import checkpoint
from efficient_lm.data import store as stores
from efficient_lm.data.tokenization import ByteTokenizer
from efficient_lm.metrics import read_rows
from efficient_lm.schema import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def losses(workdir):
    """(kind, step) -> loss; later lines win."""
    return {(row["kind"], row["step"]): row["loss"] for row in read_rows(workdir / "metrics.jsonl")}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.quick),
        {"train.steps_per_call": 4},
        {"train.grad_accum": 2, "train.ema": 0.9},
    ],
    ids=["plain", "several steps per call", "accumulation and EMA"],
)
def test_stopped_and_resumed_equals_uninterrupted(small, train_one, tmp_path, changes):
    cfg = small(**{"train.checkpoint_every": 5, "train.eval_every": 6, **changes})
    whole = train_one(cfg, tmp_path / "whole")
    stopped = train_one(cfg, tmp_path / "cut", should_stop=lambda step: step >= 7)
    assert stopped["status"] == "preempted" and 7 <= stopped["steps_done"] < 12
    resumed = train_one(cfg, tmp_path / "cut")
    assert resumed["status"] == "done" and resumed["final_loss"] == whole["final_loss"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert resumed["tokens"] == whole["tokens"] == 12 * 4 * 16


def test_stop_between_boundaries_of_a_call_changes_nothing(small, train_one, tmp_path):
    # Calls of 4 that are cut by evaluations every 5 steps run the same program as uncut ones.
    cut = small(**{"train.steps_per_call": 4, "train.eval_every": 5})
    uncut = small(**{"train.steps_per_call": 4})
    train_one(cut, tmp_path / "cut")
    train_one(uncut, tmp_path / "uncut")
    a, b = losses(tmp_path / "cut"), losses(tmp_path / "uncut")
    assert {k: a[k] for k in b} == b


def test_kill_9_leaves_a_run_that_loads_and_resumes_to_the_same_bits(small, train_one, tmp_path):
    cfg = small(**{"train.checkpoint_every": 4})
    train_one(cfg, tmp_path / "whole")
    victim = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import tests.conftest, jax
from tests.training.conftest import small_config
from efficient_lm.train import train
cfg = small_config(**{{"train.checkpoint_every": 4}})
kill = lambda step: step == 10 and os.kill(os.getpid(), signal.SIGKILL)
train(cfg, {str(tmp_path / "cut")!r}, devices=jax.devices()[:1], should_stop=kill)
"""
    process = subprocess.run([sys.executable, "-c", victim], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "running"
    assert checkpoint.steps(tmp_path / "cut" / "ckpt") == [8]
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as rows:
        rows.write('{"kind": "train", "st')  # torn by the kill
    assert train_one(cfg, tmp_path / "cut")["status"] == "done"
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_command_line_saves_on_sigterm_resumes_and_knows_when_it_is_done(tmp_path):
    config = tmp_path / "slow.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "from tests.training.conftest import SMALL\n"
        "def get_config():\n"
        "    return ConfigDict(SMALL)\n"
    )
    command = [sys.executable, "-m", "efficient_lm.train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    command += ["--config.train.steps=1200", "--config.train.log_every=100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (rows.exists() and rows.read_text()) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("preempted: ")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "preempted" and checkpoint.steps(tmp_path / "run" / "ckpt") == [info["steps_done"]]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resumes at step {info['steps_done']}" in again.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps_done"] == 1200


def test_resuming_on_other_tokens_is_refused(small, train_one, tmp_path, capsys):
    def prepare(text):
        documents = [f"{text} {i} ".encode() * 40 for i in range(40)]
        stores.write(tmp_path / "data", documents, ByteTokenizer(), name="mine", about={}, overwrite=True)

    prepared = {"data.source": "prepared", "data.path": str(tmp_path / "data"), "data.vocab_size": 64}
    cfg = small(**prepared, **{"model.vocab_size": 256, "data.validation_tokens": 100000})
    prepare("one")
    info = train_one(cfg, tmp_path / "run", should_stop=lambda step: step == 6)
    # Text has an end, of which the first lines speak.
    epochs, held_out = 12 * 4 * 16 / info["data"]["epoch_tokens"], info["validation_tokens"]
    assert f"({epochs:.3g} epochs); {held_out:,} to validate on, all there are\n" in capsys.readouterr().out
    assert 0 < held_out < 2000 and held_out % 16 == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    prepare("two")
    with pytest.raises(ConfigError, match=r"config\.data = '.*data': holds other tokens .* up to step 6"):
        train_one(cfg, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    prepare("one")
    assert train_one(cfg, tmp_path / "run")["status"] == "done"


def test_a_run_by_two_versions_of_the_sources_says_so(small, train_one, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("efficient_lm.metrics.code_hash", lambda plugins: "old")
    train_one(small(), tmp_path / "run", should_stop=lambda step: step == 6)
    monkeypatch.setattr("efficient_lm.metrics.code_hash", lambda plugins: "new")
    assert train_one(small(), tmp_path / "run")["code_hash"] == "old+new"
    assert "other sources trained this run up to step 6" in capsys.readouterr().out
    assert train_one(small(), tmp_path / "fresh")["code_hash"] == "new"


def test_a_run_that_is_done_is_left_alone(small, train_one, tmp_path, capsys):
    cfg = small()
    first = train_one(cfg, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train_one(cfg, tmp_path / "run") == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "already done" in capsys.readouterr().out


def test_a_branch_of_a_trunk_equals_the_single_run_that_decays_there(small, train_one, tmp_path):
    wsd = {"optim.schedule": "wsd", "optim.final_lr": 0.0, "train.checkpoint_every": 8, "train.keep_checkpoints": 0}
    # Both warm up for 2 steps; the single run decays over its last 4 of 12, where the trunk is still stable.
    single = small(**wsd, **{"optim.warmup": 2 / 12, "optim.decay": 4 / 12})
    trunk = small(**wsd, **{"train.steps": 20, "optim.warmup": 2 / 20, "optim.decay": 0.2})
    train_one(single, tmp_path / "single")
    train_one(trunk, tmp_path / "trunk")
    branch = small(
        **wsd,
        **{"optim.warmup": 2 / 12, "optim.decay": 4 / 12},
        **{"train.init_from": str(tmp_path / "trunk"), "train.init_step": 8},
    )
    info = train_one(branch, tmp_path / "branch")
    a, b = losses(tmp_path / "branch"), losses(tmp_path / "single")
    assert min(step for _, step in a) == 9 and a == {k: v for k, v in b.items() if k[1] > 8}
    assert info["tokens"] == 12 * 4 * 16
    saved = [checkpoint.steps(tmp_path / name / "ckpt")[-1] for name in ("branch", "single")]
    assert saved == [12, 12]


def test_branch_without_its_trunk_is_refused(small, train_one, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.train\.init_from = .*no such checkpoint"):
        train_one(small(**{"train.init_from": str(tmp_path / "nothing")}), tmp_path / "branch")
    train_one(small(), tmp_path / "trunk")
    with pytest.raises(ConfigError, match=r"config\.train\.steps = 12: must exceed the step of init_from, 12"):
        train_one(small(**{"train.init_from": str(tmp_path / "trunk")}), tmp_path / "branch")
    with pytest.raises(ConfigError, match=r"config\.train\.init_from = .*has 64 tokens a step, and this config 128"):
        changes = {"train.init_from": str(tmp_path / "trunk"), "train.batch_size": 8, "train.steps": 20}
        train_one(small(**changes), tmp_path / "branch")


def test_resume_on_another_mesh_gives_the_same_losses(small, train_one, tmp_path):
    cfg = small()
    train_one(cfg, tmp_path / "whole")
    train_one(cfg, tmp_path / "cut", should_stop=lambda step: step == 6)
    split = small(**{"mesh.fsdp": 2, "mesh.tensor": 2})
    info = train_one(split, tmp_path / "cut", devices=jax.devices()[:8])
    assert info["hardware"]["n_devices"] == 8
    a, b = losses(tmp_path / "cut"), losses(tmp_path / "whole")
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in b], list(b.values()), rtol=2e-5)
