"""Batch k is a pure function of (seed, k); hosts, resume and batch size change nothing."""

import subprocess
import sys

import numpy as np
import pytest

from efficient_lm.config import DataConfig
from efficient_lm.data import SOURCES, open_data
from efficient_lm.data.base import ROW_DTYPES
from efficient_lm.data.batches import load_sources
from efficient_lm.schema import ConfigError

SYNTHETIC = ("zipf_markov", "copy")


def open_train(cfg, batch_size=4, seed=1, **kwargs):
    return open_data(cfg, seq_len=16, batch_size=batch_size, seed=seed, split="train", **kwargs)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in ROW_DTYPES)


@pytest.fixture(params=["prepared", *SYNTHETIC])
def cfg(request, config):
    return config(source=request.param)


@pytest.mark.quick
def test_batches_have_the_promised_shapes_and_types(cfg):
    source = open_train(cfg)
    batch = source[3]
    assert {name: array.dtype for name, array in batch.items()} == ROW_DTYPES
    assert all(array.shape == (4, 16) for array in batch.values())
    assert batch["inputs"].max() < source.vocab_size and batch["segment_ids"].min() >= 1
    assert source.spec["vocab_size"] == source.vocab_size


def test_targets_are_the_inputs_shifted_by_one(cfg):
    batch = open_train(cfg)[0]
    assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.quick
def test_batch_k_does_not_depend_on_what_was_read_before(cfg):
    in_order = open_train(cfg)
    batches = [in_order[k] for k in range(6)]
    resumed = open_train(cfg)
    assert same(resumed[5], batches[5]) and same(resumed[2], batches[2])
    assert not same(batches[2], batches[5])
    assert not same(open_train(cfg, seed=2)[2], batches[2])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_consecutive_parts_of_the_same_batch(cfg, hosts):
    whole = open_train(cfg)[7]
    parts = [open_train(cfg, host_index=h, host_count=hosts)[7] for h in range(hosts)]
    assert same(whole, {name: np.concatenate([p[name] for p in parts]) for name in ROW_DTYPES})


def test_batch_size_only_regroups_rows(cfg):
    small, large = open_train(cfg, batch_size=2), open_train(cfg, batch_size=6)
    rows = np.concatenate([small[k]["inputs"] for k in range(3)])
    assert np.array_equal(rows, large[0]["inputs"])


def test_each_epoch_visits_every_window_once_in_another_order(config):
    source = open_train(config(), batch_size=1)
    n = source.spec["epoch_tokens"] // 16
    rows = [tuple(source[k]["inputs"][0]) + tuple(source[k]["targets"][0]) for k in range(2 * n)]
    assert sorted(rows[:n]) == sorted(rows[n:])
    assert rows[:n] != rows[n:]


@pytest.mark.quick
def test_order_is_the_one_of_earlier_versions():
    """Golden: grain's shuffle decides the order of every run ever made; a change must not pass unnoticed."""
    import grain

    order = grain.MapDataset.range(1000).seed(7).shuffle().repeat(2**50)
    assert [int(order[i]) for i in range(5)] == [668, 84, 161, 284, 451]
    assert [int(order[1000 + i]) for i in range(5)] == [186, 373, 122, 990, 754]


def validation(cfg, batch_size, seed=0, **kwargs):
    return open_data(cfg, seq_len=16, batch_size=batch_size, seed=seed, split="validation", **kwargs)


def real_rows(source):
    batches = list(source)
    rows = {name: np.concatenate([b[name] for b in batches]) for name in ROW_DTYPES}
    real = rows["segment_ids"].max(axis=1) > 0
    assert not rows["loss_mask"][~real].any()
    return {name: array[real] for name, array in rows.items()}


def test_validation_is_the_same_for_every_batch_size_seed_and_host_count(cfg):
    cfg = type(cfg)(**{**cfg.__dict__, "validation_tokens": 112})
    reference = real_rows(validation(cfg, 1))
    assert len(reference["inputs"]) == 7
    for source in (validation(cfg, 3), validation(cfg, 16), validation(cfg, 4, seed=9)):
        assert same(reference, real_rows(source))
    hosts = [validation(cfg, 4, host_index=h, host_count=2) for h in range(2)]
    counted = sum(batch["loss_mask"].sum() for host in hosts for batch in host)
    assert counted == reference["loss_mask"].sum()


def test_validation_ends_and_training_does_not(cfg):
    source = validation(cfg, 3)
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(IndexError):
        source[-1]
    assert same(open_train(cfg)[10**9], open_train(cfg)[10**9])


def test_bad_settings_are_one_line(config):
    cases = [
        (lambda: open_train(config(source="sotoo")), "config.data.source = 'sotoo'"),
        (lambda: open_train(config(), batch_size=3, host_count=2), "batch_size = 3"),
        (lambda: open_train(config(), host_index=2, host_count=2), "host_index = 2"),
        (lambda: open_data(config(), seq_len=8, batch_size=1, seed=0, split="test"), "split = 'test'"),
        (lambda: open_data(config(), seq_len=10**6, batch_size=1, seed=0, split="train"), "seq_len = 1000000"),
        (lambda: open_train(config(path="")), "config.data.path = ''"),
        (lambda: validation(config(validation_fraction=0.0), 1), "config.data.validation_fraction = 0.0"),
        (lambda: open_train(config(source="zipf_markov", vocab_size=10**5)), "config.data.vocab_size = 100000"),
    ]
    for call, start in cases:
        with pytest.raises(ConfigError) as error:
            call()
        assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_adding_a_source_is_one_file(config, monkeypatch):
    def open_rows(cfg, *, seq_len, seed, split):
        return SOURCES["copy"](cfg, seq_len=seq_len, seed=seed, split=split)

    load_sources()
    monkeypatch.setitem(SOURCES, "mine", open_rows)
    assert same(open_train(config(source="mine"))[0], open_train(config(source="copy"))[0])


@pytest.mark.quick
def test_importing_data_loads_neither_jax_nor_grain():
    code = (
        "import sys, efficient_lm.data.batches as b; b.load_sources(); "
        "sys.exit(any(m in sys.modules for m in ('jax', 'grain', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_defaults_are_usable():
    assert DataConfig().source in load_sources()
