"""Runs with probes as a table, fits of their curves, and the figures; the sweep that makes them."""

import json

import numpy as np
import pytest

from analysis import cli, massive_activations
from analysis.laws import get_law
from analysis.laws.massive_activations import from_paper
from analysis.load import DataError
from configs.sweeps.massive_activations import get_config, get_sweep
from efficient_lm.config import load, set_path
from efficient_lm.schema import ConfigError

STEPS = sorted({0, *(2**i for i in range(10)), *range(100, 3001, 100)})
COLUMNS = (
    "residual_max", "residual_median", "residual_ratio", "residual_massive", "residual_position", "residual_channel",
    "residual_at_first", "sink_mass", "sink_top", "sink_heads", "attention_entropy", "attention_entropy_low",
    "residual_variance", "layer_similarity", "residual_kurtosis",
)  # fmt: skip
EARLY = from_paper({"A": 60.0, "lambda": 0.3, "gamma": 2e-3, "t0": 1.2, "K": 8.0})
LATE = from_paper({"A": 20.0, "lambda": 1e-4, "gamma": 2e-3, "t0": 1.5, "K": 6.0})


def write_run(store, name, intervention, seed, scale):
    """Two layers: the first peaks, the second rises; sink columns are missing in the second."""
    folder = store / name
    folder.mkdir(parents=True)
    config = {"optim": {"lr": 1e-3}, "train": {"batch_size": 8, "seq_len": 128}, "model": {
        "n_layers": 2, "d_model": 48, "prefix": [], "pattern": ["attention", "gla/dense"],
        "mixers": {"attention": {"n_heads": 3}, "gla": {}}, "ffns": {"dense": {"d_ff": 0, "expansion": 0.0}},
    }}  # fmt: skip
    run = {
        "run_id": name, "name": "", "seed": seed, "status": "done", "steps_total": 3000, "final_loss": 1.5,
        "params": {"non_embedding": 1000}, "hardware": {"device_kind": "cpu"}, "data": {"name": "sotu"},
        "sweep": {"size": "middle", "intervention": intervention},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run))
    law, rng = get_law("massive_activations"), np.random.default_rng(seed)
    curves = np.stack([law.evaluate(p, t=np.array(STEPS, float)) for p in (EARLY, LATE)], 1)
    curves = scale * curves * (1 + 0.02 * rng.standard_normal(curves.shape))
    with open(folder / "metrics.jsonl", "w") as file:
        for step, ratio in zip(STEPS, curves.tolist(), strict=True):
            row = {"kind": "probe", "step": step, "tokens": 1024 * step, "flops": 1.0}
            row |= {column: [0.25, 0.5] for column in COLUMNS} | {"residual_ratio": ratio, "sink_mass": [0.1, None]}
            file.write(json.dumps(row) + "\n" + json.dumps({"kind": "train", "step": step, "loss": 2.0}) + "\n")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("massive")
    for i, (name, scale) in enumerate((("baseline", 1.0), ("baseline", 1.1), ("qk_norm", 0.5))):
        write_run(path, f"run{i}", name, i % 2, scale)
    return path


def test_a_store_and_its_saved_lines_are_the_same_table(store, tmp_path):
    probed = massive_activations.load([store])
    assert len(probed.runs) == 3 and len(probed.rows) == 3 * 2 * len(STEPS)
    first = probed.runs.iloc[0]
    assert (first["d_ff"], first["n_heads"], first["tokens_per_step"]) == (128, 3, 1024)
    massive_activations.save([store], tmp_path / "runs.jsonl")
    again = massive_activations.load([tmp_path / "runs.jsonl"])
    assert again.rows.equals(probed.rows) and again.runs.equals(probed.runs)
    massive_activations.save([tmp_path / "runs.jsonl", store], tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_text() == (tmp_path / "runs.jsonl").read_text()
    assert probed.rows["sink_mass"].isna().mean() == 0.5
    summary = massive_activations.summary(probed).set_index("intervention")
    assert summary.loc["baseline", "seeds"] == 2 and summary.loc["baseline", "sink"] == pytest.approx(0.1)
    cut = probed.rows[(probed.rows["run_id"] != "run0") | (probed.rows["step"] < 2950)]
    cut = massive_activations.summary(massive_activations.Probed(probed.runs, cut)).set_index("intervention")["step"]
    assert cut["baseline"] == 2900 and cut["qk_norm"] == 3000 and cut.index[0] == "baseline"
    early = massive_activations.until(probed, 512)
    assert early.rows["step"].max() == 512 and len(early.runs) == 3
    with pytest.raises(DataError, match="step 4000: no run reached it; the longest has 3000"):
        massive_activations.until(probed, 4000)
    assert summary.loc["baseline", "ratio_hi"] > summary.loc["baseline", "ratio_lo"] > summary.loc["qk_norm", "ratio"]


def test_runs_are_selected_by_a_query(store):
    probed = massive_activations.load([store])
    some = massive_activations.select(probed, "intervention == 'baseline' and seed == 1")
    assert len(some.runs) == 1 and set(some.rows["run_id"]) == set(some.runs["run_id"])
    for query, message in (("seed == 7", "where 'seed == 7': no run"), ("sead > 0", "is not a query over run_id")):
        with pytest.raises(DataError, match=message):
            massive_activations.select(probed, query)


def test_the_command_fits_and_draws(store, tmp_path, capsys):
    arguments = [
        "--store",
        str(store),
        "--fits",
        str(tmp_path / "fits.jsonl"),
        "--svg",
        f"{tmp_path}/",
        "--draws",
        "50",
    ]
    arguments += ["--where", "intervention == 'baseline'"]
    assert cli.run(massive_activations.main, massive_activations.parser(), arguments) == 0
    assert "of 4 curves" in capsys.readouterr().out
    fits = massive_activations.read_fits(tmp_path / "fits.jsonl")
    assert fits[fits["layer"] == 0]["peak"].eq("seen").all() and not fits[fits["layer"] == 1]["peak"].eq("seen").any()
    figure = massive_activations.emergence_figure(massive_activations.load([store]), fits)
    assert sum(line.get_linestyle() == "--" for line in figure.axes[0].lines) == 2
    for name in ("emergence", "interventions"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


@pytest.mark.quick
def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"run_id": "a"}\n')
    with pytest.raises(DataError, match="x.jsonl, line 1: has no size"):
        massive_activations.load([tmp_path / "x.jsonl"])
    assert cli.run(massive_activations.main, massive_activations.parser(), ["--store", str(tmp_path)]) == 2
    assert "no run with rows of kind 'probe'" in capsys.readouterr().err
    unread = ["--store", str(tmp_path), "--where", "seed == 0"]
    assert cli.run(massive_activations.main, massive_activations.parser(), unread) == 2
    assert "--where 'seed == 0': chooses the runs to fit, give --fits" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(("preset", "baselines", "others"), [("cpu", 3, 12), ("gpu", 3, 1), ("interventions", 1, 12)])
def test_sweep(preset, baselines, others):
    cells = get_sweep(preset)
    assert len(cells) == 2 * (baselines + others) and {cell.axes["seed"] for cell in cells} == {0, 1}
    assert sum(cell.axes["intervention"] == "baseline" for cell in cells) == 2 * baselines
    assert {cell.axes["size"] for cell in cells if cell.axes["intervention"] != "baseline"} == {"middle"}
    for cell in cells:
        values = get_config(preset).to_dict()
        for key, value in cell.overrides.items():
            set_path(values, key, value)
        attention, train = values["model"]["mixers"]["attention"], values["train"]
        assert attention.get("weights_length", train["seq_len"]) == train["seq_len"]
        assert (values["data"]["pack"] == "stream") == (cell.axes["intervention"] == "no_bos")
    assert load("configs/interventions.py:clipped_softmax").probes.every == 100


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ConfigError, match="massive_activations.py:tpu: no such preset; .*allowed: cpu, gpu, interv"):
        get_sweep("tpu")
