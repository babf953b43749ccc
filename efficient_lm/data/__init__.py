"""Token data: `open_data` gives batches by number from any registered source.

    source = open_data(config.data, seq_len=256, batch_size=32, seed=0, split="train")
    batch = source[k]          # dict of numpy arrays, a pure function of (seed, k)

Sources live one to a file in `efficient_lm.data.sources`; text is turned into tokens on disk by
`python -m efficient_lm.data.prepare`. Importing this package loads neither JAX nor grain.
"""

from efficient_lm.data.base import SOURCES, Rows
from efficient_lm.data.batches import Batches, open_data
from efficient_lm.data.tokenization import load_tokenizer

__all__ = ["SOURCES", "Batches", "Rows", "load_tokenizer", "open_data"]
