"""Tokenised text on disk: a directory that appears whole or not at all.

    tokens.bin       all documents one after another; uint8, uint16 or uint32 by vocabulary size
    documents.npy    int64 [documents + 1, 2]: token offset and byte offset where each document starts, then the totals
    tokenizer.json   for subword tokenizers
    spec.json        format version, tokenizer and its hash, counts, sha256 of the files, where the text came from

Documents are stored in the order of a hash of their text. That makes held-out data a prefix: validation is the
first documents that together hold `validation_fraction` of the bytes, training is the rest. So the split is by
document, can be chosen after preparing, nests (5 % is part of 10 %), is the same for every tokenizer, and needs no
second copy. Exact duplicates are dropped, else a held-out document could also be a training document.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np

from efficient_lm.data.tokenization import ByteTokenizer, SubwordTokenizer
from efficient_lm.schema import ConfigError

FORMAT = 1
_BATCH_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened store. tokens: memmap [n_tokens]; documents: int64 [n_documents + 1, 2] (see module docstring)."""

    path: pathlib.Path
    spec: dict
    tokens: np.ndarray
    documents: np.ndarray

    def tokenizer(self):
        if self.spec["tokenizer"]["name"] == "bytes":
            return ByteTokenizer()
        return SubwordTokenizer((self.path / "tokenizer.json").read_text(), self.spec["tokenizer"]["name"])

    def split(self, name: str, fraction: float) -> slice:
        """Documents of split "train" or "validation" when `fraction` of the bytes is held out."""
        n = len(self.documents) - 1
        held_out = int(np.searchsorted(self.documents[:, 1], fraction * self.documents[-1, 1]))
        if held_out >= n:
            raise ConfigError(
                f"config.data.validation_fraction = {fraction}: {self.path} has {n} document(s), too few to hold "
                "some out; prepare it with --separator to cut files into documents"
            )
        if name == "validation" and not held_out:
            raise ConfigError(f"config.data.validation_fraction = {fraction}: must be above 0 to have validation data")
        return slice(0, held_out) if name == "validation" else slice(held_out, n)


def token_dtype(vocab_size: int):
    """The smallest unsigned type that holds every token id."""
    return next(t for t in (np.uint8, np.uint16, np.uint32) if vocab_size <= np.iinfo(t).max + 1)


def write(path, documents, tokenizer, *, name: str, about: dict, overwrite: bool = False) -> dict:
    """Tokenise `documents` (iterable of bytes, one item a document) into directory `path`; returns the spec.

    Raises FileExistsError when `path` exists (with `overwrite`: when it isn't a store). Whatever goes wrong, `path`
    is left as it was.
    """
    path = pathlib.Path(path)
    if path.exists() and not (overwrite and (path / "spec.json").is_file()):
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        spec = _write_files(work, documents, tokenizer, name, about)
        work.chmod(0o755)  # mkdtemp makes it private
        if overwrite and path.exists():
            old = work.with_suffix(".old")
            os.rename(path, old)
            os.rename(work, path)
            shutil.rmtree(old)
        else:
            _rename_new(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return spec


def _rename_new(work, path):
    try:
        os.rename(work, path)
    except OSError:  # rename refuses a directory that another process filled meanwhile
        if path.exists():
            raise FileExistsError(path) from None
        raise


def _write_files(work, documents, tokenizer, name, about) -> dict:
    dtype = token_dtype(tokenizer.vocab_size)
    digests, sizes, duplicates = _write_as_read(work / "as_read.bin", documents, tokenizer, dtype)
    if not digests:
        raise ConfigError(f"{name}: no text found")
    order = np.argsort(np.array([int.from_bytes(d[:8], "big") for d in digests], np.uint64), kind="stable")
    offsets = np.zeros((len(sizes) + 1, 2), np.int64)
    np.cumsum(np.array(sizes, np.int64)[order], axis=0, out=offsets[1:])
    np.save(work / "documents.npy", offsets)
    _reorder(work / "as_read.bin", work / "tokens.bin", dtype, np.array(sizes, np.int64)[:, 0], order)
    (work / "as_read.bin").unlink()
    if tokenizer.to_json():
        (work / "tokenizer.json").write_text(tokenizer.to_json())
    spec = {
        "format": FORMAT,
        "name": name,
        "about": about,
        "tokenizer": {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": np.dtype(dtype).name,
        "n_documents": len(sizes),
        "n_duplicates_dropped": duplicates,
        "n_tokens": int(offsets[-1, 0]),
        "n_bytes": int(offsets[-1, 1]),
        "bytes_per_token": float(offsets[-1, 1] / offsets[-1, 0]),
        "sha256": {f.name: file_sha256(f) for f in sorted(work.iterdir())},
    }
    (work / "spec.json").write_text(json.dumps(spec, indent=1))
    return spec


def _write_as_read(file, documents, tokenizer, dtype):
    """Tokens of all new documents in reading order; returns digests, (tokens, bytes) per document, duplicates."""
    digests, sizes, duplicates = [], [], 0
    seen = set()
    with open(file, "wb") as out:
        for batch in _batches(documents):
            new = []
            for document in batch:
                digest = hashlib.blake2b(document, digest_size=16).digest()
                if digest in seen:
                    duplicates += 1
                elif document:
                    seen.add(digest)
                    digests.append(digest)
                    new.append(document)
            for document, tokens in zip(new, tokenizer.encode_documents(new), strict=True):
                sizes.append((len(tokens), len(document)))
                out.write(np.ascontiguousarray(tokens, dtype).data)
    return digests, sizes, duplicates


def _batches(documents):
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _reorder(source, target, dtype, lengths, order):
    starts = np.cumsum(lengths) - lengths
    tokens = np.memmap(source, dtype, mode="r").view(np.ndarray)
    with open(target, "wb", buffering=1 << 20) as out:
        for i in order:
            out.write(tokens[starts[i] : starts[i] + lengths[i]].data)


def file_sha256(file) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def open_store(path, *, verify: bool = False) -> Store:
    """Open a directory made by `write`. Sizes are always checked, sha256 of the files with `verify`.

    Raises ConfigError (one line) when it isn't a store, is of another format, or its files don't fit its spec.
    """
    path = pathlib.Path(path)
    where = f"config.data.path = {str(path)!r}"
    try:
        spec = json.loads((path / "spec.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{where}: no spec.json; make it with python -m efficient_lm.data.prepare") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{where}: spec.json is not JSON; prepare the data again") from None
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        found = spec.get("format") if isinstance(spec, dict) else None
        raise ConfigError(f"{where}: format {found!r}, this version reads {FORMAT}; prepare the data again")
    missing = [f for f in spec["sha256"] if not (path / f).is_file()]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; prepare the data again")
    dtype = np.dtype(spec["dtype"])
    if (path / "tokens.bin").stat().st_size != spec["n_tokens"] * dtype.itemsize:
        raise ConfigError(f"{where}: tokens.bin doesn't hold {spec['n_tokens']} tokens; prepare the data again")
    if verify:
        damaged = [f for f, sha in spec["sha256"].items() if file_sha256(path / f) != sha]
        if damaged:
            raise ConfigError(f"{where}: {damaged[0]} has another sha256 than spec.json; prepare the data again")
    tokens = np.memmap(path / "tokens.bin", dtype, mode="r").view(np.ndarray)
    documents = np.load(path / "documents.npy")
    if documents.shape != (spec["n_documents"] + 1, 2) or documents[-1, 0] != spec["n_tokens"]:
        raise ConfigError(f"{where}: documents.npy doesn't fit spec.json; prepare the data again")
    return Store(path, spec, tokens, documents)
