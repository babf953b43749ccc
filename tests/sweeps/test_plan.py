import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from efficient_lm.counting import count_flops
from efficient_lm.metrics import write_json
from efficient_lm.schema import ConfigError
from sweeps import plan as planning
from sweeps.isoflop import IsoFlop, Ladder
from sweeps.plan import make_plan, plan_within
from sweeps.rules import LR_RULES, constant, inverse_width
from sweeps.tables import wall_seconds
from sweeps.timing import Calibration, Point, parse_budget, settings_of

SHAPES = [{"model.n_layers": n, "model.d_model": d} for n, d in [(1, 16), (2, 16), (2, 24), (2, 32), (3, 48), (4, 64)]]
BASE = """
    from ml_collections import ConfigDict
    def get_config():
        return ConfigDict({"model": {"dtype": "float32"}, "train": {"seq_len": 64, "batch_size": 2}})
"""


@pytest.fixture
def sweep_file(tmp_path):
    def write(body):
        path = tmp_path / "sweep.py"
        path.write_text(textwrap.dedent(BASE) + textwrap.dedent(body))
        return str(path)

    return write


def isoflop(**changes):
    settings = {
        "archs": {"attention": {"model.pattern": ("attention",)}, "gla": {"model.pattern": ("gla",)}},
        "shapes": SHAPES,
        "budgets": (1e9, 4e9),
        "lr": inverse_width(0.6),
        "batch": constant(128),
        "tokens_per_parameter": (0.01, 1e4),
    }
    return IsoFlop(**{**settings, **changes})


@pytest.mark.quick
@pytest.mark.parametrize("convention", ["model_causal", "model_full", "hardware", "6n"])
def test_realised_flops_are_within_half_a_step_of_the_budget(sweep_file, convention):
    cells, _, _ = isoflop(convention=convention).cells(sweep_file(""))
    assert {c.axes["arch"] for c in cells} == {"attention", "gla"}
    for cell in cells:
        config = planning.PlannedCell.of(cell, planning.configs.read_config_file(cell.base).to_dict()).config
        per_step = count_flops(config)[convention] * config.train.batch_size * config.train.seq_len
        assert abs(per_step * config.train.steps - cell.axes["budget"]) <= per_step / 2


def test_cells_have_the_rules_learning_rate_and_batch(sweep_file):
    cells, _, _ = isoflop().cells(sweep_file(""))
    for cell in cells:
        assert cell.overrides["optim.lr"] == pytest.approx(0.6 / cell.overrides["model.d_model"], rel=1e-3)
        assert cell.overrides["train.batch_size"] == 2


def test_batch_is_a_multiple_of_gradient_accumulation(sweep_file):
    cells, _, _ = isoflop(batch=constant(5 * 64), extra={"train.grad_accum": 2}).cells(sweep_file(""))
    assert {c.overrides["train.batch_size"] for c in cells} == {4}


def test_shapes_are_chosen_by_tokens_per_parameter(sweep_file):
    cells, dropped, _ = isoflop(tokens_per_parameter=(3.0, 30.0), budgets=(1e10,)).cells(sweep_file(""))
    plan = [planning.PlannedCell.of(c, planning.configs.read_config_file(c.base).to_dict()) for c in cells]
    assert 0 < len(plan) < 2 * len(SHAPES) and not dropped
    assert all(2.9 < c.tokens / c.params["active"] < 31 for c in plan)
    few, _, warnings = isoflop(points=3, budgets=(1e10,)).cells(sweep_file(""))
    assert len(few) == 6 and any("parabola" in w for w in warnings)


def test_too_few_steps_are_left_out_with_the_reason(sweep_file):
    cells, dropped, _ = isoflop(min_steps=100).cells(sweep_file(""))
    assert all(c.overrides["train.steps"] >= 100 for c in cells)
    assert any("min_steps = 100" in note for note in dropped)


def test_rule_outside_its_range_is_one_warning_a_variable(sweep_file):
    _, _, warnings = isoflop(lr=LR_RULES["step_law"]).cells(sweep_file(""))
    assert [w.split(" outside")[0] for w in warnings if "step_law" in w] == [
        "step_law (2503.04715): N",
        "step_law (2503.04715): D",
    ]


def test_seeds_per_budget(sweep_file):
    cells, _, _ = isoflop(seeds={1e9: 2}).cells(sweep_file(""))
    by_budget = {b: {c.overrides["seed"] for c in cells if c.axes["budget"] == b} for b in (1e9, 4e9)}
    assert by_budget == {1e9: {0, 1}, 4e9: {0}}


@pytest.mark.quick
def test_the_plan_and_its_run_ids_do_not_change(sweep_file):
    body = """
    from sweeps.combine import axis, product
    def get_sweep():
        return product(axis("model.d_model", [16, 32]), axis("optim.lr", [0.1, 0.2]))
    """
    first, again = make_plan(sweep_file(body)), make_plan(sweep_file(body))
    assert [c.run_id for c in first.cells] == [c.run_id for c in again.cells]
    assert len({c.run_id for c in first.cells}) == 4
    assert first.cells[1].config.sweep == {"d_model": 16, "lr": 0.2}
    # How a run executes does not change which run it is; what it computes does.
    volatile = make_plan(sweep_file(body), {"train.log_every": 3})
    assert [c.run_id for c in volatile.cells] == [c.run_id for c in first.cells]
    longer = make_plan(sweep_file(body), {"train.steps": 3})
    assert not {c.run_id for c in longer.cells} & {c.run_id for c in first.cells}


@pytest.mark.parametrize(
    "body, message",
    [
        ("def get_sweep(): return []", "has no cells"),
        ("def get_sweep(): return [{'model.d_modle': 16}]", r"config.model.d_modle = 16: no such field; did you mean"),
        ("def get_sweep(): return [{'optim.lr': 0.1}] * 2", "cells 0 and 1 are the same run"),
        ("def get_sweep(): return [{'model.d_model': 18}]", "n_heads = 4: must divide d_model = 18"),
        ("def get_sweep(): return 3", "expected a list of cells"),
        ("x = 3", r"has no get_sweep\(\)"),
        ("def get_sweep(:", "line"),
    ],
)
def test_bad_sweep_files_give_one_line(sweep_file, body, message, capsys):
    path = sweep_file(body)
    assert planning.main(["--config", path]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    with pytest.raises(ConfigError, match=message):
        make_plan(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budgets": ()}, "sweep.budgets is empty"),
        ({"budgets": (-1.0,)}, "must be a positive number"),
        ({"shapes": {2e9: SHAPES}}, "no list for budget 1e"),
        ({"convention": "causal"}, "did you mean 'model_causal'"),
        ({"archs": {}}, "sweep.archs is empty"),
    ],
)
def test_bad_isoflop_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        isoflop(**changes)


# ------------------------------------------------------------------------------------------ budgets and time


@pytest.mark.parametrize(
    "text, kind, amount",
    [
        ("2 gpu-hours", "device_seconds", 7200),
        ("90 cpu minutes", "device_seconds", 5400),
        ("1.5h", "wall_seconds", 5400),
        ("30 min", "wall_seconds", 1800),
        ("1e12 FLOPs", "flops", 1e12),
    ],
)
def test_budget_texts(text, kind, amount):
    budget = parse_budget(text)
    assert (budget.kind, budget.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "hours", "2", "2 bananas", "0 hours", "-2 hours", "1e12 gpu-flops", "inf h"])
def test_bad_budget_texts(text):
    with pytest.raises(ConfigError, match="budget = "):
        parse_budget(text)


LADDER_FILE = """
    from sweeps.isoflop import IsoFlop, Ladder
    from sweeps.rules import constant, inverse_width
    def get_sweep():
        return IsoFlop(
            archs={"gla": {"model.pattern": ("gla",)}}, budgets=Ladder(top=1e11, count=3, ratio=4.0),
            shapes=[{"model.n_layers": n, "model.d_model": d} for n, d in ((1, 16), (2, 16), (2, 24), (2, 32))],
            lr=inverse_width(0.6), batch=constant(128), tokens_per_parameter=(0.1, 1e4))
"""


def test_budget_moves_the_ladder_and_is_kept_to(sweep_file):
    path, rate = sweep_file(LADDER_FILE), Calibration(tokens_per_second=1e4)
    small = plan_within(path, {}, parse_budget("20 s"), rate, workers=2)
    large = plan_within(path, {}, parse_budget("1 hour"), rate, workers=2)
    for plan, limit in ((small, 20), (large, 3600)):
        assert limit / 2 < plan.total_seconds() / 2 <= limit  # it fits, and the next half power of two would not
        assert "compute budgets set to" in plan.dropped[-1]
    assert max(c.flops for c in large.cells) > 50 * max(c.flops for c in small.cells)
    with pytest.raises(ConfigError, match="too small for a single cell"):
        plan_within(path, {}, parse_budget("1e3 flops"), rate, workers=1)
    asked = make_plan(path)
    spent = parse_budget(f"{1.1 * sum(c.flops for c in asked.cells):.6e} flops")
    same = plan_within(path, {}, spent, rate, workers=1)
    assert [c.run_id for c in same.cells] == [c.run_id for c in asked.cells]
    assert same.dropped == asked.dropped  # the budget changed nothing
    all_of_it = plan_within(path, {}, parse_budget("1e40 flops"), rate, workers=1)
    assert all_of_it.cells and max(c.flops for c in all_of_it.cells) > max(c.flops for c in large.cells)


def test_budget_drops_the_dearest_group_of_fixed_budgets(sweep_file):
    body = LADDER_FILE.replace("Ladder(top=1e11, count=3, ratio=4.0)", "(1e9, 4e9, 1.6e10)")
    plan = plan_within(sweep_file(body), {}, parse_budget("3e10 flops"), Calibration(), workers=1)
    assert {c.axes["budget"] for c in plan.cells} == {1e9, 4e9}
    assert any("1.6e+10" in note for note in plan.dropped)
    with pytest.raises(ConfigError, match="needs predicted times"):
        plan_within(sweep_file(body), {}, parse_budget("1 hour"), Calibration(), workers=1)


WHERE = """
    from sweeps.combine import axis, product
    def get_sweep():
        return product(axis("model.d_model", (16, 32), label="width"), axis("seed", (0, 1, 2)))
"""


def test_where_keeps_the_runs_it_selects_and_says_what_it_left_out(sweep_file):
    path = sweep_file(WHERE)
    whole, part = make_plan(path), make_plan(path)
    planning.choose(part, "seed == 2 and width < 32 or d_model == 32 and seed == 0")
    assert [c.run_id for c in part.cells] == [whole.cells[i].run_id for i in (2, 3)]
    assert len(part.dropped) == 1 and part.dropped[0].startswith("4 of 6 cells")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--where", "seed == 9"], "where = 'seed == 9': no cell of"),
        (["--where", "size == 1"], "where = 'size == 1': not a query over run_id, arch, seed"),
        (["--where", "seed +"], "where = 'seed +': not a query"),
        (["--where", "seed == 1", "--budget", "1e18 flops"], "can't be combined with --budget"),
    ],
)
def test_bad_where(sweep_file, arguments, message, capsys):
    assert planning.main(["--config", sweep_file(WHERE), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_prediction_interpolates_measured_steps(sweep_file):
    plan = make_plan(sweep_file(LADDER_FILE))
    cell = plan.cells[0]
    step = cell.flops / cell.steps
    key = ("gla", settings_of(cell.config), "cpu")
    points = [Point(*key, step / 2, 128, 1e-3, 1.0), Point(*key, step * 2, 128, 4e-3, 3.0)]
    assert Calibration(points).predict(cell) == pytest.approx(cell.steps * 2e-3 + 2.0)
    assert Calibration(points[:1]).predict(cell) == pytest.approx(cell.steps * 2e-3 + 1.0)  # same FLOPs per second
    assert Calibration(points[1:]).predict(cell) == pytest.approx(cell.steps * 4e-3 + 3.0)  # no faster than measured
    assert Calibration([Point("other", *key[1:], step, 128, 1.0, 0.0)]).predict(cell) is None


def test_prediction_takes_points_of_the_same_settings_and_of_one_kind_of_device(sweep_file):
    path = sweep_file(LADDER_FILE)
    cell = make_plan(path).cells[0]
    step, settings = cell.flops / cell.steps, settings_of(cell.config)
    points = [
        Point("gla", settings, device, step, 128, seconds, 0.0)
        for device, seconds in (("cpu", 1.0), ("NVIDIA H100", 1e-3), ("TPU v4", 1e-2))
    ]
    for device, expected in (("cpu", 1.0), ("NVIDIA H100", 1e-3), ("NVIDIA A100", 1e-2)):  # of none here: the last
        calibration = Calibration(points, device=device)
        assert calibration.predict(cell) == pytest.approx(cell.steps * expected)
        assert calibration.devices([cell]) == [device if device != "NVIDIA A100" else "TPU v4"]
    for changes in ({"model.dtype": "bfloat16"}, {"train.seq_len": 32}, {"model.mixers.gla.implementation": "xla"}):
        other = make_plan(path, changes).cells[0]
        assert other.arch == cell.arch and Calibration(points).predict(other) is None
    assert len({settings_of(c.config) for c in make_plan(path).cells}) == 1  # shapes share their points


def test_points_of_the_older_format_are_left_out_with_a_note(tmp_path, capsys):
    path = tmp_path / "calibration.json"
    old = {"arch": "gla", "device": "cpu", "flops_per_step": 1e6, "tokens_per_step": 128}
    write_json(path, {"points": [old | {"seconds_per_step": 1.0, "overhead": 0.0}]})
    assert Calibration.read(path).points == []
    note = capsys.readouterr().err
    assert note.startswith(f"note: calibration = {str(path)!r}: 1 points of an older format") and note.count("\n") == 1


def test_calibration_measures_through_the_trainer_and_survives_a_file(sweep_file, tmp_path):
    plan, asked = make_plan(sweep_file(LADDER_FILE)), []

    def trainer(config, workdir):
        asked.append(config)
        write_json(Path(workdir) / "run.json", {"mean_step_seconds": 0.01, "steps_done": 8, "wall_seconds": 2.08})

    calibration = Calibration()
    calibration.measure(plan.cells, trainer=trainer, log=lambda text: None)
    assert len(asked) == 3 and {c.train.steps for c in asked} == {8}
    calibration.write(tmp_path / "calibration.json")
    read = Calibration.read(tmp_path / "calibration.json")
    assert read.predict(plan.cells[0]) == pytest.approx(plan.cells[0].steps * 0.01 + 2.0)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a calibration file"):
        Calibration.read(tmp_path / "calibration.json")
    assert Calibration.read(tmp_path / "missing.json").points == []


def test_wall_time_of_two_workers(sweep_file):
    cells = make_plan(sweep_file(LADDER_FILE)).cells[:3]
    times = [4.0, 3.0, 2.0]
    cells = [planning.dataclasses.replace(c, predicted_seconds=t) for c, t in zip(cells, times, strict=True)]
    assert wall_seconds(cells, 2) == 5.0 and wall_seconds(cells, 1) == 9.0


def test_ladder_rounds_to_three_digits():
    assert Ladder(top=1e12, count=3, ratio=3.0).budgets() == (1.11e11, 3.33e11, 1e12)


def test_plan_prints_every_cell_and_totals(sweep_file, capsys, tmp_path):
    path = sweep_file(LADDER_FILE)
    assert planning.main(["--config", path, "--tokens-per-second", "1e4", "--store", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = make_plan(path).cells
    assert all(any(c.run_id in line and "missing" in line for line in lines) for c in cells)
    assert lines[-1].startswith(f"{len(cells)} cells") and "0 done" in lines[-1]
    assert not (tmp_path / "none").exists()


def test_columns_of_a_mixture_are_named_after_the_active_parameters(sweep_file, capsys):
    path = sweep_file("def get_sweep(): return [{'model.pattern': ('attention/moe',)}]")
    (cell,) = make_plan(path).cells
    assert cell.params["active"] < cell.params["total"] / 1.5
    assert planning.main(["--config", path]) == 0
    header, line = [text.split("  ") for text in capsys.readouterr().out.splitlines()[:2]]
    shown = dict(zip(filter(None, header), filter(None, line), strict=True))
    shown = {key.strip(): value.strip() for key, value in shown.items()}
    assert shown["active"] == f"{cell.params['active']:,}"
    assert shown["tok/active"] == f"{cell.tokens / cell.params['active']:.1f}"
    assert not {"params", "tok/param"} & shown.keys()


@pytest.mark.parametrize(
    "body, where",
    [
        (LADDER_FILE.replace("(2, 24)", "(2, 22)"), r"\(in cell gla C=6.25e\+09 model.n_layers=2 model.d_model=22\)"),
        ("def get_sweep(): return [{'model.d_model': d} for d in (16, 18)]", r"\(in cell d_model=18\)"),
    ],
)
def test_errors_of_a_shape_name_the_cell(sweep_file, body, where):
    with pytest.raises(ConfigError, match=where):
        make_plan(sweep_file(body))


def test_overrides_that_no_cell_uses_are_one_warning_each(sweep_file, capsys):
    path = sweep_file("def get_sweep(): return [{'model.pattern': (m,)} for m in ('attention', 'gla')]")
    words = [f"--config.model.mixers.{name}.n_heads=2" for name in ("attention", "gla", "mamba2")]
    note = "warning: config.model.mixers.{0}.n_heads = 2: has no effect, no layer uses '{0}'"

    def warnings(*arguments):
        assert planning.main(["--config", path, *words, *arguments]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    unused = note.format("mamba2")
    assert warnings() == [unused] == warnings("--budget", "1e18 flops")
    assert warnings("--where", "arch == 'gla'") == [note.format("attention"), unused]


def test_overrides_of_what_cells_set_are_named(sweep_file):
    path = sweep_file("def get_sweep(): return [{'model.d_model': d, 'train.steps': 9} for d in (16, 32)]")
    plan = make_plan(path, {"train.steps": "5"})
    assert plan.warnings == ["config.train.steps = 5: replaces what 2 of 2 cells set"]
    assert [cell.steps for cell in plan.cells] == [5, 5]
    assert not make_plan(path, {"train.steps": "9"}).warnings
    with pytest.raises(ConfigError, match=r"are the same run .*d_model = 32: replaces what 1 of 2 cells"):
        make_plan(path, {"model.d_model": "32"})


RECORDED = """
    def get_sweep():
        import json, os, pathlib
        seen = {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}
        seen |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE")}
        pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(seen))
        return [{"model.pattern": ("gla",), "model.d_model": 16, "model.n_layers": 1, "model.vocab_size": 64,
                 "data.source": "zipf_markov", "data.validation_tokens": 512}]
"""
LAUNCHER = """
import os, sys
from jax._src import xla_bridge
from sweeps import plan
assert plan.main(sys.argv[1:]) == 0
print("launcher", os.getpid(), sorted(os.sched_getaffinity(0)), xla_bridge.backends_are_initialized())
"""


def test_calibration_leaves_no_jax_in_the_launcher(sweep_file, tmp_path):
    """What JAX took of a GPU would stay with it; and JAX's threads keep to the cores that they began with."""
    path, measured = sweep_file(RECORDED), tmp_path / "calibration.json"
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-c", LAUNCHER, "--config", path, "--calibrate", "--calibration", str(measured)]
    command += ["--workers", str(len(cores)), "--config.train.seq_len=16"]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    seen, (_, pid, *rest) = json.loads((tmp_path / "seen.json").read_text()), done.stdout.splitlines()[-1].split(" ")
    assert " ".join(rest) == f"{cores} False" and seen["pid"] != int(pid)
    assert seen["cores"] == cores[:1]
    (point,) = Calibration.read(measured).points
    assert point.arch == "gla" and point.device == "cpu" and point.seconds_per_step > 0


def test_beside_gpus_a_process_of_its_own_plans_on_one_of_them(sweep_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = sweep_file(RECORDED)
    assert planning.main(["--config", path]) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["pid"] != os.getpid() and "1 cells" in capfd.readouterr().out
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["XLA_PYTHON_CLIENT_PREALLOCATE"]) == ("3", "false")
    assert planning.main(["--config", path, "--config.model.d_modl=3"]) == 2
    error = capfd.readouterr().err
    assert "did you mean 'd_model'" in error and error.count("\n") == 1


def test_an_interrupt_ends_calibration(sweep_file):
    """The trainer takes the signal for itself and returns."""

    def trainer(config, workdir):
        asked.append(config)
        write_json(Path(workdir) / "run.json", {"status": "preempted", "mean_step_seconds": 0.01, "steps_done": 3})

    calibration, asked = Calibration(), []
    with pytest.raises(KeyboardInterrupt):
        calibration.measure(make_plan(sweep_file(LADDER_FILE)).cells, trainer=trainer, log=lambda text: None)
    assert len(asked) == 1 and not calibration.points
