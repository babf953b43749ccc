"""Stores and public tables that several test files share."""

from pathlib import Path

import pytest

from analysis.load import load_table
from tests.analysis import synthetic_store

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A sweep of two architectures with broken runs beside 36 good ones."""
    path = tmp_path_factory.mktemp("store")
    assert synthetic_store.write_store(path) == 36
    return path


@pytest.fixture(scope="session")
def noisy_store(tmp_path_factory):
    """The same sweep with seed noise that hides which architecture is better."""
    path = tmp_path_factory.mktemp("noisy")
    synthetic_store.write_store(path, noise=0.03, seed=3)
    return path


def public_table(name: str) -> Path:
    """A public run table; the test is skipped where the folder with them is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


@pytest.fixture(scope="session")
def chinchilla_240():
    columns = {"N": "Model Size", "C": "Training FLOP", "D": "C/(6*N)"}
    return load_table(public_table("chinchilla_fig4_245.csv"), columns=columns, drop_highest=5)
