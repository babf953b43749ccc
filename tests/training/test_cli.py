"""The command line: help that explains itself, one line and an exit code for everything that can go wrong."""

import pytest

from efficient_lm import cli
from efficient_lm.hardware import peak_flops

DENSE = "configs/dense.py:tiny"


def fake(status):
    return lambda cfg, workdir: {
        "status": status,
        "reason": "because",
        "steps_done": 3,
        "final_loss": 1.0,
        "final_bpb": 1.4,
        "wall_seconds": 2.0,
    }


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1), ("diverged", 3), ("preempted", 75)])
def test_exit_codes(status, code, capsys):
    assert cli.main(fake(status), ["--config", DENSE, "--workdir", "w"]) == code
    out, err = capsys.readouterr()
    line = out if status == "done" else err
    assert line.startswith(f"{status}: w: ") and line.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nothing.py"], "config = 'nothing.py': no such file"),
        (["--config", "configs/dense.py:tinny"], "did you mean 'tiny'"),
        (["--config", DENSE, "--config.model.d_modle=3"], "did you mean 'd_model'"),
        (["--config", DENSE, "--config.train.steps=many"], "config.train.steps = 'many': must be int"),
        (["--config", "README.md"], "config = 'README.md': must be a Python file"),
        (["--config", DENSE, "--config.optim.lr=1e999"], "config.optim.lr = inf: must be finite"),
        (["--config", DENSE, "--config.train.steps=0"], "config.train.steps = 0: must be at least 1"),
        (["--config", DENSE, "--config.model.pattern=atention"], "did you mean 'attention'"),
        (["--config", DENSE, "--steps=3"], "unrecognized arguments: --steps=3"),
        (["--config.model.d_model=3"], "arguments are required: --config"),
    ],
)
def test_bad_input_is_one_line_and_code_2(argv, message, capsys):
    assert cli.main(fake("done"), ["--workdir", "w", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'cuda'"), AssertionError()])
def test_absent_devices_are_one_line_and_code_2(error, capsys, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr("jax.devices", devices)
    assert cli.main(fake("done"), ["--config", DENSE, "--workdir", "w"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: JAX_PLATFORMS = 'cpu': JAX finds no such device here") and err.count("\n") == 1


def test_help_lists_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(fake("done"), ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "model.d_model" in text and "width of the residual stream" in text
    assert "model.mixers.attention.window" in text and "model.ffns.dense.glu" in text
    assert "optim.final_lr" in text and "exit codes" in text and "75" in text


def test_an_override_without_value_is_refused(capsys):
    assert cli.main(fake("done"), ["--config", DENSE, "--workdir", "w", "--config.model.d_model"]) == 2
    assert "needs a value" in capsys.readouterr().err


def test_an_unexpected_error_shows_where_and_ends_with_one_line(capsys):
    def broken(cfg, workdir):
        raise RuntimeError("out of memory\nlong story")

    assert cli.main(broken, ["--config", DENSE, "--workdir", "w"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "failed: w: RuntimeError: out of memory"


def test_overrides_reach_the_config():
    seen = {}

    def train(cfg, workdir):
        seen.update(cfg=cfg, workdir=workdir)
        return fake("done")(cfg, workdir)

    cli.main(train, ["--config", DENSE, "--workdir", "w", "--config.model.d_model=32", "--config.optim.lr=2e-3"])
    assert (seen["cfg"].model.d_model, seen["cfg"].optim.lr, seen["workdir"]) == (32, 0.002, "w")


def test_peak_is_known_or_absent_never_guessed():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5", "bfloat16") == 459e12
    for kind, dtype in (("cpu", "bfloat16"), ("NVIDIA L40", "bfloat16"), ("TPU v4 lite", "bfloat16")):
        assert peak_flops(kind, dtype) is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
