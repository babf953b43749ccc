"""Source 'stdlib': Python source of the standard library; needs no package, but differs between Python versions."""

import hashlib
import sys
import sysconfig

from efficient_lm.data.base import SOURCES
from efficient_lm.data.corpus import stdlib_corpus
from efficient_lm.data.text_rows import cached_store, store_rows


@SOURCES.register("stdlib")
def open_rows(cfg, *, seq_len, seed, split):
    interpreter = f"{sys.version} {sysconfig.get_path('stdlib')}"
    key = f"stdlib-{hashlib.sha256(interpreter.encode()).hexdigest()[:8]}"
    return store_rows(cached_store(cfg, key, stdlib_corpus()), cfg, seq_len=seq_len, split=split)
