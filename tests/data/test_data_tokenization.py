"""Round trips, stable hashes, end-of-document tokens."""

import json
import sys

import numpy as np
import pytest

from efficient_lm.data import load_tokenizer, open_data
from efficient_lm.data.corpus import Corpus, train_corpus_bpe
from efficient_lm.data.store import open_store, write
from efficient_lm.schema import ConfigError

TEXTS = ["plain words", "ünïcödé — ∑ 漢字 🙂", "  spaces\n\tand\r\nlines  ", "", "the the then there"]


@pytest.fixture(scope="module")
def corpus():
    documents = [f"{text} number {i} of the documents".encode() for i in range(60) for text in TEXTS]
    return Corpus("words", lambda: documents, {})


@pytest.fixture(scope="module")
def bpe(corpus):
    pytest.importorskip("tokenizers")
    return train_corpus_bpe(corpus, 300)


@pytest.mark.quick
def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))


def test_bpe_round_trip(bpe):
    assert bpe.vocab_size == 300
    for text in [*TEXTS, "letters never seen: ßæ \x00"]:
        assert bpe.decode(bpe.encode(text)) == text


def test_bpe_training_is_repeatable_and_the_file_gives_the_same_tokenizer(bpe, corpus, tmp_path):
    again = train_corpus_bpe(corpus, 300)
    assert again.hash == bpe.hash
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(bpe.to_json()), indent=4))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.hash == bpe.hash and loaded.vocab_size == bpe.vocab_size and loaded.eos_id == bpe.eos_id
    assert np.array_equal(loaded.encode(TEXTS[1]), bpe.encode(TEXTS[1]))


def test_each_subword_document_ends_with_the_end_token(bpe):
    for text, ids in zip(TEXTS, bpe.encode_documents([t.encode() for t in TEXTS]), strict=True):
        assert ids[-1] == bpe.eos_id and (ids[:-1] != bpe.eos_id).all()
        assert bpe.decode(ids) == text


def test_prepared_subword_data(bpe, corpus, tmp_path, config):
    path = tmp_path / "store"
    write(path, corpus.documents(), bpe, name="words", about={})
    store = open_store(path, verify=True)
    assert store.tokens.dtype == np.uint16
    cfg = config(path=str(path), tokenizer="bpe:300")
    source = open_data(cfg, seq_len=8, batch_size=2, seed=0, split="validation")
    assert source.vocab_size == 300 and source.tokenizer.hash == bpe.hash
    part = store.split("validation", cfg.validation_fraction)
    tokens, size = store.documents[part.stop]
    assert source.bytes_per_token == size / tokens > 1.2
    text = store.tokenizer().decode(store.tokens[: store.documents[1, 0]])
    assert text.encode() in corpus.documents()
    by_file = config(path=str(path), tokenizer=str(path / "tokenizer.json"))
    assert open_data(by_file, seq_len=8, batch_size=2, seed=0, split="train").vocab_size == 300
    with pytest.raises(ConfigError, match="config.data.tokenizer = 'bytes': .* was prepared with 'bpe:300'"):
        open_data(config(path=str(path)), seq_len=8, batch_size=2, seed=0, split="train")


def test_a_tokenizer_file_that_changed_after_preparing_is_refused(bpe, corpus, tmp_path, config):
    file = tmp_path / "tokenizer.json"
    file.write_text(bpe.to_json())
    write(tmp_path / "store", corpus.documents(), load_tokenizer(str(file)), name="words", about={})
    cfg = config(path=str(tmp_path / "store"), tokenizer=str(file))
    assert open_data(cfg, seq_len=8, batch_size=2, seed=0, split="train").tokenizer.hash == bpe.hash
    file.write_text(train_corpus_bpe(corpus, 290).to_json())
    with pytest.raises(ConfigError, match=f"was prepared with .*hash {bpe.hash}"):
        open_data(cfg, seq_len=8, batch_size=2, seed=0, split="train")


def test_bad_tokenizers_are_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for spec, words in [("bpe:12", "at least 257"), ("gpt99", "existing tokenizer.json"), (str(tmp_path), "not a tok")]:
        with pytest.raises(ConfigError, match=words) as error:
            load_tokenizer(spec)
        assert "\n" not in str(error.value)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs the package 'tokenizers'"):
        load_tokenizer(str(tmp_path))
