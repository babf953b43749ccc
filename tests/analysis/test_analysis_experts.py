"""Expert loads of a run directory as a figure."""

import json

import numpy as np
import pytest

from analysis import cli, experts


@pytest.fixture
def run(tmp_path):
    rows = [
        {"kind": "train", "step": s, "loss": 1.0, "router_load_profile": [[1.0, 1.0], [s, 2.0 - s]]} for s in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_loads_by_step_layer_and_expert(run):
    steps, loads, information = experts.loads(run)
    assert np.isnan(information).all()  # a run of before it was logged
    np.testing.assert_array_equal(steps, [0, 1])
    np.testing.assert_array_equal(loads, [[[1, 1], [0, 2]], [[1, 1], [1, 1]]])


def test_the_figure_is_written_and_dense_runs_are_refused(run, tmp_path, capsys):
    assert cli.run(experts.main, experts.parser(), ["--run", str(run), "--out", str(tmp_path / "loads.svg")]) == 0
    assert "layer 1" in (tmp_path / "loads.svg").read_text()
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    assert cli.run(experts.main, experts.parser(), ["--run", str(run), "--out", str(tmp_path / "no.svg")]) == 2
    assert "router_load_profile" in capsys.readouterr().err and not (tmp_path / "no.svg").exists()
    assert cli.run(experts.main, experts.parser(), ["--run", str(tmp_path / "absent"), "--out", "x.svg"]) == 2
