"""Windows, document resets and the held-out split, against a plain loop over documents."""

import numpy as np
import pytest

from efficient_lm.data import open_data
from efficient_lm.data.packing import TokenWindows
from efficient_lm.data.store import open_store

T = 16


def epoch(cfg, split="train", seq_len=T):
    """All rows of a split in stream order, and the TokenWindows' documents."""
    store = open_store(cfg.path)
    part = store.split(split, cfg.validation_fraction)
    offsets = store.documents[part.start : part.stop + 1, 0]
    windows = TokenWindows(store.tokens, offsets, seq_len, cfg.pack)
    return windows.rows(np.arange(windows.n_rows)), store.tokens, offsets


def reference_rows(tokens, offsets, seq_len):
    """Token by token: which document each token is of decides everything."""
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    stream = tokens[offsets[0] : offsets[-1]]
    rows = {name: [] for name in ("segment_ids", "positions", "loss_mask", "targets")}
    for start in range(0, (len(stream) - 1) // seq_len * seq_len, seq_len):
        segments, positions, mask = [], [], []
        for t in range(start, start + seq_len):
            new_document = t > start and document[t] != document[t - 1]
            segments.append(1 if t == start else segments[-1] + new_document)
            positions.append(0 if t == start or new_document else positions[-1] + 1)
            mask.append(float(document[t + 1] == document[t]))
        rows["segment_ids"].append(segments)
        rows["positions"].append(positions)
        rows["loss_mask"].append(mask)
        rows["targets"].append(stream[start + 1 : start + seq_len + 1])
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.quick
@pytest.mark.parametrize("seq_len", [1, 5, 16, 64])
def test_document_resets_agree_with_a_token_by_token_loop(config, seq_len):
    rows, tokens, offsets = epoch(config(), seq_len=seq_len)
    expected = reference_rows(tokens, offsets, seq_len)
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)


def test_random_document_lengths_one_token_documents_included():
    rng = np.random.default_rng(3)
    for _ in range(20):
        offsets = np.concatenate([[0], np.cumsum(rng.choice([1, 1, 2, 3, 40], 30))])
        tokens = rng.integers(0, 256, offsets[-1]).astype(np.uint8)
        part = offsets[4:]
        rows = TokenWindows(tokens, part, 8, "documents")
        for name, values in reference_rows(tokens, part, 8).items():
            np.testing.assert_array_equal(rows.rows(np.arange(rows.n_rows))[name], values, err_msg=name)


def test_stream_packing_reads_on_over_document_borders(config):
    rows, tokens, offsets = epoch(config(pack="stream"))
    assert (rows["segment_ids"] == 1).all() and (rows["loss_mask"] == 1).all()
    assert (rows["positions"] == np.arange(T)).all()
    n = rows["targets"].size
    np.testing.assert_array_equal(rows["targets"].ravel(), tokens[offsets[0] + 1 : offsets[0] + 1 + n])


def test_bos_packing_leads_every_row_with_a_token_of_its_own(config):
    for split in ("train", "validation"):
        options = {"seq_len": T, "batch_size": 3, "seed": 1, "split": split}
        stream, bos = (open_data(config(pack=pack), **options) for pack in ("stream", "bos"))
        assert bos.vocab_size == stream.vocab_size + 1 and len(bos) == len(stream)
        plain, led = stream[0], bos[0]
        assert (led["inputs"][:, 0] == stream.vocab_size).all() and led["inputs"][:, 1:].max() < stream.vocab_size
        np.testing.assert_array_equal(led["targets"], plain["inputs"])
        np.testing.assert_array_equal(led["inputs"][:, 1:], led["targets"][:, :-1])
        for name in ("segment_ids", "positions", "loss_mask"):
            np.testing.assert_array_equal(led[name], plain[name])


def test_no_validation_document_is_in_training(config, documents):
    cfg = config(validation_fraction=0.3)
    store = open_store(cfg.path)
    held_out, train = (store.split(name, 0.3) for name in ("validation", "train"))

    def texts(part):
        bounds = store.documents[part.start : part.stop + 1, 0]
        return {store.tokens[a:b].tobytes() for a, b in zip(bounds[:-1], bounds[1:], strict=True)}

    assert texts(held_out) | texts(train) == set(documents)
    assert not texts(held_out) & texts(train)
    pairs = {text[:2] for text in texts(held_out)}
    source = open_data(cfg, seq_len=T, batch_size=1, seed=0, split="train")
    for k in range(source.spec["epoch_tokens"] // T):
        batch = source[k]
        row = np.append(batch["inputs"][0], batch["targets"][0, -1]).astype(np.uint8).tobytes()
        assert not any(pair in row for pair in pairs)


@pytest.mark.parametrize("small, large", [(0.1, 0.2), (0.2, 0.5)])
def test_held_out_documents_nest_and_have_the_wanted_size(config, small, large):
    store = open_store(config().path)
    a, b = (store.split("validation", fraction) for fraction in (small, large))
    assert 0 < a.stop < b.stop
    total, longest = store.documents[-1, 1], np.diff(store.documents[:, 1]).max()
    for part, fraction in ((a, small), (b, large)):
        size = store.documents[part.stop, 1]
        assert fraction * total <= size <= fraction * total + longest


def test_limited_validation_is_spread_and_the_same_for_every_seq_len():
    tokens = np.random.default_rng(0).integers(0, 60000, 100_000).astype(np.uint16)
    offsets = np.array([0, 30_000, 100_000])

    def targets(seq_len):
        windows = TokenWindows(tokens, offsets, seq_len, "stream", limit=8192)
        assert windows.n_rows * seq_len == 8192
        return windows.rows(np.arange(windows.n_rows))["targets"].ravel()

    for seq_len in (32, 256, 2048):
        np.testing.assert_array_equal(targets(seq_len), targets(128))
    quarter = tokens[1:].reshape(-1)[: 4 * 24_576].reshape(4, 24_576)
    for block, part in zip(targets(128).reshape(4, 2048), quarter, strict=True):
        np.testing.assert_array_equal(block, part[:2048])


def test_validation_tokens_above_the_split_use_all_of_it(config):
    cfg = config(validation_tokens=10**6)
    source = open_data(cfg, seq_len=T, batch_size=4, seed=0, split="validation")
    rows = sum(int((batch["segment_ids"][:, 0] > 0).sum()) for batch in source)
    assert rows == (source.spec["split_tokens"] - 1) // T
