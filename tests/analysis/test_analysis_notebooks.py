"""Every notebook runs from top to bottom without data of its own, holds no outputs, and says what is made up."""

import json
from pathlib import Path

import pytest

import analysis
from tests.analysis.conftest import public_table

FOLDER = Path(analysis.__file__).parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> dict:
    """Runs the code cells in one namespace, as a kernel would."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs(path, monkeypatch, capsys):
    for name in ("CHINCHILLA_CSV", "SWEEP", "SWEEP_AXIS"):
        monkeypatch.delenv(name, raising=False)
    execute(path)
    text = path.read_text() + capsys.readouterr().out
    assert "SYNTHETIC" in text or "SIMULATED" in text


def test_notebooks_are_stored_without_outputs():
    wanted = {"chinchilla", "efficiency_leverage", "sparsing_law", "massive_activations", "hybrid_ratios",
              "recall_frontier", "your_own_sweep"}  # fmt: skip
    assert wanted <= {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name


def test_notebooks_take_data(store, monkeypatch, capsys):
    monkeypatch.setenv("SWEEP", str(store))
    found = execute(FOLDER / "your_own_sweep.ipynb")
    assert len(found["table"].rows) == 36 and "verdict: gla needs" in capsys.readouterr().out
    monkeypatch.setenv("CHINCHILLA_CSV", str(public_table("chinchilla_fig4_245.csv")))
    found = execute(FOLDER / "chinchilla.ipynb")
    assert found["fit"].objective == pytest.approx(0.00101827402, rel=1e-4)
