"""efficient_lm.evals: scores of a trained run, tasks with its options, refusals in one line."""

import dataclasses
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

from efficient_lm import evals, metrics
from efficient_lm.config import from_dict
from efficient_lm.data.batches import load_sources
from efficient_lm.data.tasks import TASKS
from efficient_lm.evals import __main__ as command
from efficient_lm.evals.evaluate import TaskSpec, evaluate_run
from efficient_lm.generate import load_run
from efficient_lm.schema import ConfigError
from efficient_lm.train import open_split, train

pytestmark = pytest.mark.usefixtures("quick_compile")

BASE = {
    "model": {"d_model": 16, "n_layers": 1, "vocab_size": 32, "dtype": "float32", "pattern": ("deltanet",)},
    "train": {"steps": 30, "batch_size": 8, "seq_len": 24, "steps_per_call": 10},
    "optim": {"lr": 0.02},
    "log": {"progress": False},
}
TASK = {"source": "word_problem", "task": {"group": "z3"}, "validation_tokens": 480, "pack": "stream"}
TEXT = {"source": "zipf_markov", "vocab_size": 20, "validation_tokens": 480}


def trained(data, path):
    train(from_dict({**BASE, "data": data}), path, devices=jax.devices()[:1])
    return path


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    return trained(TASK, tmp_path_factory.mktemp("task") / "run")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """Not trained on a task: what a run on text is to evals."""
    return trained(TEXT, tmp_path_factory.mktemp("text") / "run")


@pytest.mark.quick
def test_validation_scores_are_those_of_the_run(task_run):
    result = evaluate_run(task_run)
    info = metrics.read_json(task_run / "run.json")
    assert result["run_id"] == info["run_id"] and result["step"] == 30 and result["tasks"] == []
    scores = result["validation"]
    assert scores["loss"] == pytest.approx(info["final_loss"], rel=1e-5)
    assert scores["accuracy"] == pytest.approx(info["final_accuracy"])
    assert scores["perplexity"] == pytest.approx(math.exp(info["final_loss"]), rel=1e-5)
    assert scores["bpb"] == pytest.approx(info["final_bpb"], rel=1e-5)
    assert scores["rows"] == 20 and scores["answers"] == 480


def test_other_text_than_that_of_training_is_not_scored(task_run, tmp_path):
    shutil.copytree(task_run, tmp_path / "run")
    info = metrics.read_json(task_run / "run.json")
    metrics.write_json(tmp_path / "run" / "run.json", info | {"data": {"sha256": {"tokens.bin": "another"}}})
    with pytest.raises(ConfigError, match="'word_problem' holds other tokens now .* --no-validation"):
        evaluate_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", validation=False)["tasks"] == []


def test_scores_are_those_of_the_logits(task_run):
    """Accuracy, its error and the share of faultless rows against plain numpy, at a length that was not trained."""
    (row,) = evaluate_run(task_run, [TaskSpec("word_problem")], lengths=(7,), rows=50, validation=False)["tasks"]
    assert (row["options"], row["length"], row["rows"]) == ({"group": "z3", "swaps": False, "start": False}, 7, 50)
    cfg, lm, params = load_run(task_run)
    changed = {**BASE, "data": {**TASK, "validation_tokens": 350}, "train": {**BASE["train"], "seq_len": 7}}
    batch = open_split(from_dict(changed), "validation", 50)[0]
    logits = np.asarray(lm(params, batch["inputs"])[0], np.float64)
    right = logits.argmax(-1) == batch["targets"]
    by_row = right.mean(1)
    assert row["accuracy"] == pytest.approx(right.mean())
    assert row["stderr"] == pytest.approx(by_row.std() / math.sqrt(50))
    assert row["exact"] == pytest.approx((by_row == 1).mean())
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    assert row["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert row["chance_accuracy"] == pytest.approx(1 / 3)


def test_the_last_batch_is_not_counted_twice(task_run):
    one, many = (
        evaluate_run(task_run, [TaskSpec("word_problem")], lengths=(4,), rows=n, validation=False)["tasks"][0]
        for n in (5, 4100)
    )
    assert one["rows"] == 5 and many["rows"] == 4100 and many["answers"] == 4 * 4100


def test_options_come_from_the_run_and_can_be_changed(task_run):
    load_sources()
    specs = [TaskSpec.parse("word_problem:group=z2"), TaskSpec.parse("mqar:pairs=2:power=1")]
    first, second = evaluate_run(task_run, specs, rows=4, vocab_size=16, validation=False)["tasks"]
    assert first["options"]["group"] == "z2" and first["vocab_size"] == 2
    assert (
        second["options"] == {"pairs": 2, "min_pairs": 0, "power": 1}
        and second["vocab_size"] == 16
        and second["length"] == 24
    )


def test_runs_on_text_are_asked_with_tokens_that_they_know(text_run, monkeypatch):
    seen = []
    keep = evals.evaluate.Translated.__getitem__
    monkeypatch.setattr(
        evals.evaluate.Translated, "__getitem__", lambda self, k: seen.append(keep(self, k)) or seen[-1]
    )
    rows = evaluate_run(text_run, [TaskSpec("copy"), TaskSpec("induction")], rows=8, validation=False)["tasks"]
    assert [row["vocab_size"] for row in rows] == [20, 20] and len(seen) == 2
    assert max(batch["inputs"].max() for batch in seen) < 20
    # Commonest tokens first: in this source the smaller of two tokens is the commoner.
    data = open_split(load_run(text_run)[0], "validation", 20)[0]["inputs"]
    counts = np.bincount(data.ravel(), minlength=20)
    assert counts[evals.evaluate._alphabet(load_run(text_run)[0])].tolist() == sorted(counts, reverse=True)


def test_command_writes_evals_json_and_prints_a_table(task_run, capsys):
    argv = [
        "--run",
        str(task_run),
        "--tasks",
        "word_problem,word_problem:group=z2",
        "--lengths",
        "6, 12",
        "--rows",
        "9",
    ]
    assert command.main(argv) == 0
    result = json.loads((task_run / "evals.json").read_text())
    done = [(t["options"]["group"], t["length"]) for t in result["tasks"]]
    assert done == [("z3", 6), ("z3", 12), ("z2", 6), ("z2", 12)]
    lines = capsys.readouterr().out.splitlines()
    assert "perplexity" in lines[1] and lines[2].split()[:3] == ["task", "length", "accuracy"]
    assert lines[3].startswith("word_problem:group=z3:swaps=False") and len(lines) == 7
    assert command.main(["--store", str(task_run.parent), "--rows", "9"]) == 0
    assert str(task_run) in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    "run, arguments, message",
    [
        ("task", ["--tasks", "mqr"], "--tasks = 'mqr': no such task; did you mean 'mqar'"),
        ("task", ["--tasks", "mqar:pairs"], "--tasks 'mqar:pairs': must be NAME or NAME:OPTION=VALUE"),
        ("task", ["--tasks", "mqar:pear=1"], "--tasks mqar at length 24: config.data.task.pear = 1: no such field"),
        (
            "task",
            ["--tasks", "mqar", "--lengths", "8"],
            "at length 8: config.train.seq_len = 8: mqar with 8",
        ),
        ("task", ["--tasks", "word_problem:group=s5"], "needs 120 tokens, but this run has a vocabulary of 32"),
        ("task", ["--lengths", "0"], "--lengths 0: must be a whole number, at least 1"),
        ("task", ["--step", "7"], "checkpoint 7 in .*: no such checkpoint; there are: 30"),
        ("text", ["--tasks", "word_problem"], "trained on 'zipf_markov', so it can't know what is asked"),
        ("text", ["--tasks", "copy", "--vocab-size", "21"], "needs 21 tokens, but this run has seen 20"),
        ("none", [], "is no run directory"),
        ("both", [], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message, request, tmp_path, capsys):
    path = str(request.getfixturevalue(f"{run}_run") if run in ("task", "text") else tmp_path / "none")
    extra = ["--store", path] if run == "both" else []
    assert command.main(["--run", path, *extra, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_help_lists_every_task_with_its_options(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name, task in TASKS.items():
        assert f"\n{name}: " in text
        assert all(f"\n  {field.name} " in text for field in dataclasses.fields(task))
