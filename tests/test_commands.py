"""Every command: help under its own name; a bad option or value is one line that names it, and exit code 2."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest

from pallas_kernels.commands import BadInput, Parser, command

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("efficient_lm", "pallas_kernels", "sweeps", "analysis")
DENSE, ISOFLOP = ["--config", "configs/dense.py:tiny"], ["--config", "configs/sweeps/isoflop.py"]
NO_DATA, NO_STORE = ["--data", "no.csv"], ["--store", "no_store"]

# Command: (what it cannot do without, [arguments with a bad value, what the line must say]).
COMMANDS = {
    "analysis.accounting": (NO_STORE, ["--x-range", "C=2:1", "--x-range 'C=2:1': the lower end must be below"]),
    "analysis.activations": (NO_STORE, ["--level", "2", "--level 2.0: must be between 0 and 1"]),
    "analysis.bench": ([], ["--draws", "0", "--draws 0: must be positive"]),
    "analysis.compare": (
        [*NO_STORE, "--base", "a", "--variant", "b"],
        ["--seed-noise", "0", "--seed-noise 0.0: must be positive"],
    ),
    "analysis.envelope": (NO_STORE, ["--bootstrap", "-1", "--bootstrap -1: must be 0 or more"]),
    "analysis.experts": (["--run", "no_run", "--out", "x.svg"], ["no_run"]),
    "analysis.fit": ([*NO_DATA, "--law", "chinchilla"], ["--law", "chinchila", "law 'chinchila' is unknown"]),
    "analysis.hyperparameters": (NO_DATA, ["--level", "1.5", "--level 1.5: must lie between 0 and 1"]),
    "analysis.inference": (
        ["--constants", "besiroglu", "--tokens", "1e12"],
        ["--tokens", "many", "--tokens 'many': expected numbers separated by commas"],
    ),
    "analysis.laws": ([], ["laverage", "law 'laverage' is unknown"]),
    "analysis.leverage": (["--wanted", "7"], ["--at", "C=much", "--at 'C=much': expected NAME=NUMBER"]),
    "analysis.leverage_sweep": (NO_STORE, ["--points", "worst", "argument --points: invalid choice: 'worst'"]),
    "analysis.massive_activations": (NO_STORE, ["--level", "0", "--level 0.0: must be between 0 and 1"]),
    "analysis.model_selection": (NO_DATA, ["--drop-highest", "-1", "--drop-highest -1: must be 0 or more"]),
    "analysis.recall": (NO_STORE, ["--level", "7", "--level 7.0: must"]),
    "analysis.report": ([*NO_STORE, "--out", "x.html"], ["--out", "no_folder/x.html", "--out no_folder/x.html: its"]),
    "analysis.sensitivity": (NO_DATA, ["--law", "x", "law 'x' is unknown"]),
    "analysis.sparsity": (["--rows", "no.jsonl"], ["--at", "best", "argument --at: invalid choice: 'best'"]),
    "efficient_lm.data.prepare": (["no_text", "--out", "no_folder"], ["--tokenizer", "bpe:2", "tokenizer = 'bpe:2'"]),
    "efficient_lm.bench": (["--configs", "configs/dense.py:tiny"], ["--jobs", "0", "--jobs 0: must be at least 1"]),
    "efficient_lm.evals": (["--run", "no_run"], ["--lengths", "long", "--lengths long: must be a whole number"]),
    "efficient_lm.ffn.bench": (DENSE, ["--rows", "0", "--rows 0: must be at least 1"]),
    "efficient_lm.generate": (
        ["--run", "no_run", "--prompt", "x"],
        ["--top-k", "-1", "--top-k -1: must be at least 0"],
    ),
    "efficient_lm.mixers": ([], ["--d-model", "0", "d_model = 0: must be at least 1"]),
    "efficient_lm.probes": (DENSE, ["--config.model.d_model=x", "config.model.d_model = 'x': must be int"]),
    "efficient_lm.sparsity": (
        ["--run", "no_run", "--out", "x.jsonl"],
        ["--dials", "2", "--dials 2: must be a number in"],
    ),
    "efficient_lm.train": (
        [*DENSE, "--workdir", "x"],
        ["--distributed", "here", "--distributed = 'here': must be ADDR"],
    ),
    "pallas_kernels.bench": ([], ["--seconds", "0", "--seconds 0.0: must be positive"]),
    "pallas_kernels.gpu.bench_gpu": (["--out", "x.json"], ["--jobs", "0", "--jobs 0: must be at least 1"]),
    "pallas_kernels.gpu.bench_table": ([], ["--rows", "README.md", "README.md: not JSON"]),
    "pallas_kernels.gpu.run_once": ([], ["--families", "GLA", "--families GLA: allowed are scalar decay per token"]),
    "pallas_kernels.tune": ([], ["--shapes", "1,2", "--shapes (1, 2): three positive numbers B,T,D"]),
    "sweeps.demo": ([], ["--workers", "0", "--workers 0: must be at least 1"]),
    "sweeps.launch": ([*ISOFLOP, *NO_STORE], ["--budget", "soon", "budget = 'soon': allowed: a number and a unit"]),
    "sweeps.plan": (ISOFLOP, ["--workers", "-1", "--workers -1: must be at least 1"]),
    "sweeps.status": (NO_STORE, ["--store", "README.md", "store = 'README.md': is a file"]),
    "sweeps.worker": (["no_store", "x:y", "0"], ["no_store", "x:y", "first", "cores 'first': must be numbers"]),
}


def commands():
    """Modules that are run by `python -m`."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    paths = [path.relative_to(ROOT) for path in paths if 'if __name__ == "__main__":' in path.read_text()]
    return {".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in paths}


@pytest.fixture
def run(monkeypatch, capsys):
    """run(command, *arguments) -> (exit code, standard output, standard error), in this process."""
    monkeypatch.chdir(ROOT)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(name, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def assert_refused(result, *words):
    code, _, error = result
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_every_command_is_in_the_table():
    assert commands() == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_the_name_of_the_command(name, run):
    code, out, _ = run(name, "--help")
    assert code == 0 and out.startswith(f"usage: python -m {name} [-h]")


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_options_and_values_are_one_line(name, run, monkeypatch):
    needed, (*bad, message) = COMMANDS[name]
    parsers, parse = [], Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", lambda self, argv=None: parsers.append(self) or parse(self, argv))
    assert_refused(run(name, *needed, "--no-such-option", "3"), "--no-such-option", "--help")
    assert_refused(run(name, *(bad if name == "sweeps.worker" else [*needed, *bad])), message)
    for action in parsers[0]._actions:
        if action.option_strings and (action.choices or action.type in (int, float)):
            assert_refused(run(name, *needed, action.option_strings[0], "many"), action.option_strings[0], "'many'")


@pytest.mark.parametrize("name, argument", [("analysis.fit", "--seed"), ("analysis.compare", "--seed-noise")])
def test_not_even_nan_or_a_negative_number_slips_through(name, argument, run):
    assert_refused(run(name, *COMMANDS[name][0], argument, "-1" if argument == "--seed" else "nan"), f"{argument} ")


def test_files_that_are_no_json_or_absent_are_named(run, tmp_path):
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "run.json").write_text('{"run_id": "r1')
    for name in ("analysis.massive_activations", "analysis.recall"):
        assert_refused(run(name, "--store", str(tmp_path), "--save", str(tmp_path / "x")), "r1/run.json: not JSON")
    assert_refused(run("pallas_kernels.gpu.bench_table", "--rows", "no.json"), "error: no.json: No such file")


def test_an_interrupt_is_one_line_and_a_bug_is_not_hidden(capsys):
    @command
    def main(error):
        raise error

    assert main(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "interrupted\n"
    assert main(BadInput("x = 1:\nno")) == 2 and capsys.readouterr().err == "error: x = 1: no\n"
    with pytest.raises(ValueError, match="shapes"):
        main(ValueError("shapes differ"))
