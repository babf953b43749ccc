"""Recall and state tracking: what is read, what is left out, intervals, and the files written."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from analysis import cli, recall

CONFIG = {
    "model": {"pattern": ["deltanet"]},
    "data": {"source": "mqar", "task": {"pairs": 4, "power": 0.01}},
    "train": {"seq_len": 64},
    "optim": {"lr": 0.003},
}
TASK = "mqar pairs=4 power=0.01 vocab=32"


def write_run(store, arch, seed, state_bytes, accuracy, *, status="done", evals=None, config=CONFIG, lr=0.003):
    directory = store / (f"{arch}{seed}{state_bytes}" + (f"-{lr}" if lr != 0.003 else ""))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config | {"optim": {"lr": lr}}))
    asked = {**config["data"]["task"], "min_pairs": 0}
    data = {"name": config["data"]["source"], "asked": asked, "vocab_size": 32, "chance_accuracy": 0.25}
    run = {
        **{"run_id": directory.name, "status": status, "reason": "loss is nan at step 3", "sweep": {"arch": arch}},
        **{"seed": seed, "state_bytes": state_bytes, "params": {"total": 1000}, "steps_total": 10},
        **{"hardware": {"device_kind": "cpu"}, "data": data, "final_accuracy": accuracy},
    }
    (directory / "run.json").write_text(json.dumps(run))
    if evals is not None:
        (directory / "evals.json").write_text(json.dumps({"tasks": evals}))


def score(length, accuracy, task="mqar", **options):
    options = options or CONFIG["data"]["task"]
    facts = {"task": task, "options": options, "length": length, "vocab_size": 32}
    return {**facts, "accuracy": accuracy, "chance_accuracy": 0.25}


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    for arch, base in (("attention", 0.9), ("gla", 0.3)):
        for seed in range(3):
            for size in (1024, 4096):
                accuracy = base + 0.04 * seed
                evals = [score(64, accuracy + 0.001), score(128, accuracy / 2)] if size == 1024 else None
                write_run(path, arch, seed, size, accuracy, evals=evals)
    return path


def test_rows_are_runs_and_what_evals_added(store):
    rows, excluded = recall.load([store])
    assert len(rows) == 12 + 6 and len(excluded) == 0 and tuple(rows) == recall.COLUMNS
    assert set(rows["task"]) == {TASK} == set(rows["trained_task"]) and set(rows["chance"]) == {0.25}
    one = rows[rows["run_id"] == "gla21024"].set_index("length")["accuracy"]
    assert one.to_dict() == {64: pytest.approx(0.381), 128: pytest.approx(0.19)}  # evals replace the run's own score


def test_runs_left_out_are_named_with_the_reason(store):
    write_run(store, "mamba2", 0, 1024, None, status="diverged")
    text = {**CONFIG, "data": {"source": "sotu", "task": {}}}
    write_run(store, "dense", 0, 1024, 0.5, config=text)
    rows, excluded = recall.load([store])
    assert len(rows) == 18
    assert excluded.set_index("arch")["reason"].to_dict() == {
        "dense": "not trained on a task",
        "mamba2": "diverged: loss is nan at step 3",
    }


def test_intervals_are_t_intervals_over_seeds_within_zero_and_one(store):
    rows, _ = recall.load([store])
    found = recall.summary(rows, ["arch", "state_bytes", "length"], 0.9).set_index(["arch", "state_bytes", "length"])
    values = np.array([0.3, 0.34, 0.38])
    lo, hi = stats.t.interval(0.9, 2, values.mean(), stats.sem(values))
    row = found.loc[("gla", 4096, 64)]
    assert (row["accuracy"], row["lo"], row["hi"]) == pytest.approx((values.mean(), lo, hi)) and row["seeds"] == 3
    assert found.loc[("attention", 4096, 64)]["hi"] == 1.0
    single = recall.summary(rows[rows["seed"] == 0], ["arch"])
    assert (single["lo"] <= single["accuracy"]).all()


def test_the_best_learning_rate_is_kept_by_its_mean_on_the_task_of_training(tmp_path):
    """For each architecture and state; one lucky seed or a score on another task does not decide."""
    other = {"pairs": 2, "power": 0.01}
    for seed in range(2):
        for lr, accuracies, elsewhere in ((0.001, (0.5, 0.52), 0.1), (0.01, (0.2, 0.8), 0.9)):
            evals = [score(64, elsewhere, **other)]
            write_run(tmp_path, "gla", seed, 1024, accuracies[seed], lr=lr, evals=evals)
            write_run(tmp_path, "gla", seed, 4096, 1 - lr, lr=lr)
    rows, _ = recall.load([tmp_path])
    best = recall.best_rates(rows)
    assert len(rows) == 12 and set(best["rates"]) == {2}
    found = best.groupby("state_bytes")["lr"].unique().map(list).to_dict()
    assert found == {1024: [0.001], 4096: [0.001]}
    assert (best["accuracy"] == 0.1).sum() == 2 and not (best["accuracy"] == 0.9).any()
    for seed in (2, 3):
        write_run(tmp_path, "gla", seed, 4096, 0.99, lr=0.01)  # as good as the other rate, with more seeds
    more = recall.best_rates(recall.load([tmp_path])[0])
    assert set(more[more["state_bytes"] == 4096]["lr"]) == {0.01}
    (axis,) = [ax for ax in recall.against_state(rows).axes if ax.get_title() == TASK]
    assert "best of 2 learning rates" in axis.figure.get_supxlabel()


def test_gaps_compare_at_the_nearest_state(store):
    write_run(store, "mamba2", 0, 1400, 0.5)
    write_run(store, "mamba2", 1, 1400, 0.5)
    rows, _ = recall.load([store])
    found = recall.gaps(rows[rows["length"] == 64], "gla").set_index(["arch", "state_bytes"])
    assert set(found.index) == {("attention", 1024), ("attention", 4096), ("mamba2", 1400)}
    assert found.loc[("mamba2", 1400), "base_state_bytes"] == 1024
    row, sem = found.loc[("attention", 4096)], 0.04 / np.sqrt(3)
    half = stats.t.ppf(0.975, 4) * np.sqrt(2) * sem  # equal variances: Welch's degrees of freedom are 4
    assert (row["gap"], row["lo"], row["hi"]) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert found.loc[("mamba2", 1400), "lo"] < 0.5 - 0.341 < found.loc[("mamba2", 1400), "hi"]
    with pytest.raises(recall.DataError, match="no such architecture; there are attention, gla, mamba2"):
        recall.gaps(rows, "transformer")


@pytest.mark.quick
def test_figures_show_every_seed_and_the_mean_of_seeds(store):
    rows, _ = recall.load([store])
    figure = recall.against_state(rows)
    (ax,) = figure.axes
    assert ax.get_title() == TASK and ax.get_xscale() == "log"
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    for value in (0.3, 0.34, 0.38, 0.90, 0.94, 0.98):
        assert np.isclose(drawn, value, atol=0.0011).any()
    figure = recall.against_length(rows)
    assert [line.get_label() for line in figure.axes[0].lines][:2] == ["chance", "trained length"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"chance", "trained length", "attention, 1 KiB", "attention, 4 KiB", "gla, 1 KiB", "gla, 4 KiB"}
    assert recall.against_length(rows[rows["length"] == 64]) is None
    assert recall.against_state(rows[rows["state_bytes"] == 1024]) is None


def test_the_page_is_self_contained_and_rows_redraw_it(store, tmp_path):
    def run(*arguments):
        return cli.run(recall.main, recall.parser(), [str(a) for a in arguments])

    page, saved = tmp_path / "a.html", tmp_path / "rows.jsonl"
    assert run("--store", store, "--out", page, "--save", saved, "--svg", tmp_path / "plot_") == 0
    html = page.read_text()
    assert html.count("data:image/svg+xml;base64,") == 2 and not re.search(r'(src|href)="(?!data:)', html)
    assert "[0.241, 0.439]" in html
    assert all((tmp_path / f"plot_{name}.svg").read_bytes().startswith(b"<?xml") for name in ("state", "length"))
    again = tmp_path / "b.html"
    assert run("--store", saved, "--out", again) == 0
    numbers = [re.findall(r"<td.*", path.read_text()) for path in (page, again)]
    assert numbers[0] == numbers[1] and len(saved.read_text().splitlines()) == 18


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--store", "nowhere", "--out", "a.html"], "--store nowhere: no such store or file"),
        (["--store", "empty", "--out", "a.html"], "--store empty: no finished run that was trained on a task"),
        (["--store", "bad.jsonl", "--out", "a.html"], "bad.jsonl, line 2: has no run_id, task"),
        (["--store", "empty"], "nothing to write: give --out, --svg or --save"),
        (["--store", "empty", "--out", "a.html", "--level", "1.5"], "--level 1.5: must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    row = dict.fromkeys(recall.COLUMNS, 1)
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"arch": 1}\n')
    assert cli.run(recall.main, recall.parser(), arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
