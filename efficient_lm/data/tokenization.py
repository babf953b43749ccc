"""Tokenizers: bytes, byte-level BPE trained on the corpus, or any Hugging Face `tokenizer.json`.

How documents are kept apart: with segment ids (resets), which needs no token. Bytes therefore have no separator:
all 256 values stay text, and every target is a byte of text, so that nats per token / ln 2 is bits per byte. BPE
vocabularies have an end-of-document token; it is appended to every document, is trained on, and its cost counts into
bits per byte although it stands for no byte. (Nothing is trained on across a document end in either case.)
"""

import hashlib
import json
import pathlib
import re

import numpy as np

from efficient_lm.schema import ConfigError

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255; no special tokens."""

    name = "bytes"
    vocab_size = 256
    eos_id = None
    hash = hashlib.sha256(b"bytes: token = byte value, no special tokens").hexdigest()[:16]

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint8 [n]."""
        return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)

    def encode_documents(self, documents: list[bytes]) -> list[np.ndarray]:
        return [self.encode(document) for document in documents]

    def decode(self, ids) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self):
        return None


class SubwordTokenizer:
    """A Hugging Face `tokenizers` tokenizer given as the text of its `tokenizer.json`."""

    def __init__(self, text: str, name: str):
        tokenizers = import_tokenizers(name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"tokenizer = {name!r}: not a tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = text
        self.name = name
        self.hash = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()[:16]
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        ids = [self._tokenizer.token_to_id(end) for end in _KNOWN_ENDS]
        self.eos_id = next((i for i in ids if i is not None), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        """int64 [n], without the end-of-document token."""
        text = text if isinstance(text, str) else text.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_documents(self, documents: list[bytes]) -> list[np.ndarray]:
        """Tokens of each document, each ended by the end-of-document token if the vocabulary has one."""
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        end = [] if self.eos_id is None else [self.eos_id]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids + end, np.int64) for encoding in encodings]

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        return self._text


def import_tokenizers(wanted: str):
    """The optional `tokenizers` package, or one clear line."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"tokenizer = {wanted!r}: needs the package 'tokenizers' (pip install 'efficient-lm[hf]'); "
            "'bytes' needs nothing"
        ) from None
    return tokenizers


def bpe_size(spec: str) -> int | None:
    """N of 'bpe:N', or None for other tokenizers."""
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if match and int(match[1]) < 257:
        raise ConfigError(f"tokenizer = {spec!r}: N must be at least 257 (256 bytes and {END_OF_TEXT})")
    return int(match[1]) if match else None


def load_tokenizer(spec: str):
    """The tokenizer 'bytes' or the one in a `tokenizer.json` (a file, or a directory that has one)."""
    if spec == "bytes":
        return ByteTokenizer()
    if bpe_size(spec):
        raise ConfigError(f"tokenizer = {spec!r}: is trained on a corpus; give the tokenizer.json made by it")
    path = pathlib.Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"tokenizer = {spec!r}: must be 'bytes', 'bpe:N' or an existing tokenizer.json")
    return SubwordTokenizer(path.read_text(), spec)


def train_bpe(texts, vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE over an iterable of str: `vocab_size` tokens, the 256 bytes and END_OF_TEXT among them."""
    tokenizers = import_tokenizers(f"bpe:{vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer(tokenizer.to_str(), f"bpe:{vocab_size}")
