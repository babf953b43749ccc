"""Source 'prepared': a directory written by `python -m efficient_lm.data.prepare`, given by `config.data.path`."""

from efficient_lm.data.base import SOURCES
from efficient_lm.data.store import open_store
from efficient_lm.data.text_rows import store_rows
from efficient_lm.data.tokenization import load_tokenizer
from efficient_lm.schema import ConfigError


@SOURCES.register("prepared")
def open_rows(cfg, *, seq_len, seed, split):
    if not cfg.path:
        raise ConfigError("config.data.path = '': must be a directory made by python -m efficient_lm.data.prepare")
    store = open_store(cfg.path)
    _check_tokenizer(cfg.tokenizer, store)
    return store_rows(store, cfg, seq_len=seq_len, split=split)


def _check_tokenizer(given: str, store):
    """`given` is 'bytes' or 'bpe:N' as in the store's spec, or a tokenizer file with the same content."""
    made = store.spec["tokenizer"]
    is_name = given == "bytes" or given.startswith("bpe:")
    if given == made["name"] if is_name else load_tokenizer(given).hash == made["hash"]:
        return
    own = made["name"] if made["name"] == "bytes" else str(store.path / "tokenizer.json")
    raise ConfigError(
        f"config.data.tokenizer = {given!r}: {store.path} was prepared with {made['name']!r} (hash {made['hash']}); "
        f"set it to {own!r}"
    )
