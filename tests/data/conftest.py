import gzip
import json

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data.store import write
from efficient_lm.data.tokenization import ByteTokenizer


def make_documents(n=40, seed=0):
    """Documents that tell where each byte comes from: document i holds only the letter pair of i."""
    lengths = np.random.default_rng(seed).integers(1, 60, n)
    return [bytes([65 + i // 26, 97 + i % 26]) * int(length) for i, length in enumerate(lengths)]


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, documents):
    """A byte store of `documents`."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    write(path, documents, ByteTokenizer(), name="letters", about={"what": "test"})
    return path


@pytest.fixture
def config(prepared):
    """A DataConfig on `prepared`; keyword arguments replace fields."""

    def make(**fields):
        return DataConfig(**{"source": "prepared", "path": str(prepared), "validation_fraction": 0.2, **fields})

    return make


@pytest.fixture
def text_dir(tmp_path):
    """Small text files of each kind that prepare understands, and one binary file."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("first document\n")
    (root / "sub" / "b.md").write_text("second document, ünïcödé\n")
    (root / "c.txt.gz").write_bytes(gzip.compress(b"third document\n"))
    rows = [{"text": "fourth document"}, {"text": "fifth document", "id": 1}]
    (root / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (root / "e.bin").write_bytes(b"\x00\x01\x02")
    return root
