import functools
import subprocess
import textwrap

import pytest

from efficient_lm.config import read_config_file
from sweeps import demo, launch
from sweeps.plan import make_plan
from tests.sweeps.test_launch import FAKE, ROOT


def test_the_demo_grid_serves_three_budgets_of_two_architectures_with_enough_sizes(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = make_plan("configs/sweeps/demo.py")
    sizes = {}
    for cell in plan.cells:
        sizes.setdefault((cell.arch, cell.axes["budget"]), set()).add(cell.params["active"])
    assert len(sizes) == 6 and {arch for arch, _ in sizes} == {"attention", "gla"}
    assert all(len(found) >= 5 for found in sizes.values())
    assert not plan.dropped and not plan.warnings
    cheapest = min(budget for _, budget in sizes)
    assert {c.config.seed for c in plan.cells if c.axes["budget"] == cheapest} == {0, 1}


@pytest.mark.parametrize("variant", ["float32", "bf16", "step_law"])
def test_every_variant_of_the_general_sweep_plans(monkeypatch, variant):
    monkeypatch.chdir(ROOT)
    plan = make_plan(f"configs/sweeps/isoflop.py:{variant}")
    assert len({c.axes["budget"] for c in plan.cells}) == 5
    assert read_config_file(f"configs/sweeps/isoflop.py:{variant}").train.seq_len == 256


@pytest.fixture
def fake_parts(monkeypatch, tmp_path):
    """Fake trainer and report; returns the sweep file and the commands that would have made reports."""
    monkeypatch.chdir(ROOT)
    path, commands = tmp_path / "sweep.py", []
    path.write_text(
        textwrap.dedent("""
        from ml_collections import ConfigDict
        def get_config(name=""):
            return ConfigDict({"model": {"d_model": 16}})
        def get_sweep(name=""):
            return [{"name": name}]
        """)
    )

    def report(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(launch, "run_local", functools.partial(launch.run_local, trainer=FAKE, progress=False))
    monkeypatch.setattr(demo.subprocess, "run", report)
    return path, commands


def test_demo_trains_then_reports_and_repeats_only_the_report(fake_parts, tmp_path, capsys):
    path, commands = fake_parts
    arguments = ["--config", str(path), "--store", str(tmp_path / "store"), "--workers", "1"]
    assert demo.main(arguments) == 0
    assert "1 run now" in (out := capsys.readouterr().out) and "report: " in out and "training" in out
    assert demo.main(arguments) == 0
    assert "0 run now" in capsys.readouterr().out
    assert len(commands) == 2 and commands[0][2] == "analysis.report" and str(tmp_path / "store") in commands[0]


def test_demo_reports_what_it_has_when_a_cell_fails_and_says_so(fake_parts, tmp_path, capsys):
    path, commands = fake_parts
    assert demo.main(["--config", f"{path}:raises", "--store", str(tmp_path / "s"), "--workers", "1"]) == 1
    assert len(commands) == 1 and "the data are gone" in capsys.readouterr().out


def test_bad_arguments(capsys):
    assert demo.main(["--config", "none.py"]) == 2 and demo.main(["--workers", "0"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
