"""Sampling from a model and from a run directory."""

import jax
import numpy as np
import pytest

from efficient_lm import generate, metrics
from efficient_lm.config import from_dict
from efficient_lm.model import LM
from efficient_lm.train import train

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = {"d_model": 16, "n_layers": 2, "vocab_size": 256, "dtype": "float32", "pattern": ["gla", "attention"]}


@pytest.fixture(scope="module")
def lm():
    lm = LM(from_dict({"model": MODEL}).model)
    return lm, lm.init(jax.random.key(0))


def test_greedy_continuation_is_the_argmax_of_the_parallel_form(lm):
    model, params = lm
    prompt = np.array([[5, 9, 200], [7, 7, 1]])
    out = generate.sample(model, params, prompt, 6, temperature=0)
    assert out.shape == (2, 9)
    np.testing.assert_array_equal(out[:, :3], prompt)
    logits, _ = jax.jit(model)(params, out)
    np.testing.assert_array_equal(out[:, 3:], np.argmax(logits, -1)[:, 2:-1])


def test_prompts_of_different_lengths_are_continued_as_if_alone(lm):
    model, params = lm
    prompts = np.array([[5, 9, 200, 31], [7, 0, 0, 0], [8, 1, 6, 0]])
    lengths = [4, 1, 3]
    together = generate.sample(model, params, prompts, 6, lengths=lengths, temperature=0)
    for row, prompt, n in zip(together, prompts, lengths, strict=True):
        alone = generate.sample(model, params, prompt[None, :n], 10 - n, temperature=0)
        np.testing.assert_array_equal(row, alone[0])
    with pytest.raises(ValueError, match="lengths = .*must be between 1 and"):
        generate.sample(model, params, prompts, 6, lengths=[4, 5, 3])


def test_draws_depend_on_the_seed_and_top_1_is_greedy(lm):
    model, params = lm
    prompt = np.array([[5, 9, 200]])
    greedy = generate.sample(model, params, prompt, 8, temperature=0)
    one, other = (generate.sample(model, params, prompt, 8, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(one, generate.sample(model, params, prompt, 8, seed=1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(greedy, generate.sample(model, params, prompt, 8, temperature=2.0, top_k=1))


def test_a_prompt_begins_as_the_rows_of_training_did(tmp_path, capsys, monkeypatch):
    values = {"model": {**MODEL, "vocab_size": 257}, "data": {"validation_tokens": 2048, "pack": "bos"}}
    values |= {"train": {"steps": 1, "batch_size": 2, "seq_len": 16}, "log": {"progress": False}}
    train(from_dict(values), tmp_path / "run", devices=jax.devices()[:1])
    seen = []
    sample = generate.sample
    monkeypatch.setattr(generate, "sample", lambda *args, **kw: seen.append(sample(*args, **kw)) or seen[0])
    capsys.readouterr()
    assert generate.main(["--run", str(tmp_path / "run"), "--prompt", "The ", "--tokens", "3"]) == 0
    assert seen[0].shape == (1, 1 + 4 + 3) and seen[0][0, :5].tolist() == [256, *b"The "]
    assert capsys.readouterr().out.startswith("The ")


def test_command_line(tmp_path, capsys):
    values = {"model": MODEL, "train": {"steps": 2, "batch_size": 2, "seq_len": 16}, "log": {"progress": False}}
    values["data"] = {"validation_tokens": 2048}
    train(from_dict(values), tmp_path / "run", devices=jax.devices()[:1])
    capsys.readouterr()
    assert generate.main(["--run", str(tmp_path / "run"), "--prompt", "The ", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert generate.main(["--run", str(tmp_path / "run"), "--prompt", "The ", "--prompt", "A", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    for bad, message in (
        (["--run", str(tmp_path), "--prompt", "x"], "no run directory"),
        (["--run", str(tmp_path / "run"), "--prompt", ""], "--prompt"),
        (["--run", str(tmp_path / "run"), "--prompt", "x", "--step", "7"], "there are: 2"),
        (["--run", str(tmp_path / "run"), "--prompt", "x", "--tokens", "0"], "--tokens 0"),
        (["--run", str(tmp_path / "run"), "--prompt", "x", "--top-k", "999"], "--top-k 999"),
    ):
        assert generate.main(bad) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    # As when the directory of the data was made again, with another tokenizer.
    info = metrics.read_json(tmp_path / "run" / "run.json")
    info["data"]["tokenizer_hash"] = "other"
    metrics.write_json(tmp_path / "run" / "run.json", info)
    assert generate.main(["--run", str(tmp_path / "run"), "--prompt", "x"]) == 2
    assert "'bytes' is another tokenizer now than that of the run" in capsys.readouterr().err
