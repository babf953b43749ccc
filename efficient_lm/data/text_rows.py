"""Rows of a source that is text: from a store on disk, or from a corpus tokenised once into the cache."""

import os
import pathlib
import re

from efficient_lm.data import store as stores
from efficient_lm.data.base import Rows
from efficient_lm.data.corpus import train_corpus_bpe
from efficient_lm.data.packing import TokenWindows
from efficient_lm.data.tokenization import bpe_size, load_tokenizer
from efficient_lm.schema import ConfigError


def store_rows(store: stores.Store, cfg, *, seq_len: int, split: str) -> Rows:
    """Rows of one split of `store`, cut as `cfg.pack` says."""
    part = store.split(split, cfg.validation_fraction)
    offsets = store.documents[part.start : part.stop + 1]
    limit = cfg.validation_tokens if split == "validation" else None
    vocab_size = store.spec["tokenizer"]["vocab_size"]
    windows = TokenWindows(store.tokens, offsets[:, 0], seq_len, cfg.pack, limit, bos=vocab_size)
    n_tokens, n_bytes = (int(x) for x in offsets[-1] - offsets[0])
    spec = {
        **{k: store.spec[k] for k in ("name", "about", "tokenizer", "n_documents", "n_tokens", "n_bytes", "sha256")},
        "vocab_size": vocab_size + (cfg.pack == "bos"),
        "tokenizer_hash": store.spec["tokenizer"]["hash"],
        "bytes_per_token": n_bytes / n_tokens,
        "split": split,
        "validation_fraction": cfg.validation_fraction,
        "split_documents": part.stop - part.start,
        "split_tokens": n_tokens,
        "epoch_tokens": windows.n_rows * seq_len,
        "pack": cfg.pack,
    }
    return Rows(
        rows=windows.rows,
        n_rows=windows.n_rows,
        spec=spec,
        vocab_size=spec["vocab_size"],
        bytes_per_token=spec["bytes_per_token"],
        tokenizer=store.tokenizer(),
    )


def cached_store(cfg, key: str, corpus) -> stores.Store:
    """The store of `corpus` under `cfg.tokenizer` in the cache, made on first use.

    Processes that make it at the same time each write their own directory; the first rename wins and all read it.
    """
    directory = cache_dir(cfg.cache_dir)
    size = bpe_size(cfg.tokenizer)
    tokenizer = None if size else load_tokenizer(cfg.tokenizer)
    label = cfg.tokenizer.replace(":", "-") if size else tokenizer.hash
    path = directory / re.sub(r"[^\w.-]", "_", f"{key}-{label}-v{stores.FORMAT}")
    if not path.exists():
        tokenizer = tokenizer or train_corpus_bpe(corpus, size)
        try:
            stores.write(path, corpus.documents(), tokenizer, name=corpus.name, about=corpus.about)
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(f"config.data.cache_dir = {str(directory)!r}: can't write there ({error})") from None
    return stores.open_store(path)


def cache_dir(given: str = "") -> pathlib.Path:
    """`given`, else the user's cache directory for this package."""
    if given:
        return pathlib.Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "efficient_lm"
