"""Leaving out inputs: thresholds against brute force, dials from nothing to everything, devices, the command."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import checkpoint, metrics
from efficient_lm.generate import load_run
from efficient_lm.layers import Linear, Maker
from efficient_lm.sparsity import METHODS, Measured, __main__, maps
from efficient_lm.sparsity.measure import Validation
from efficient_lm.train import train
from tests.training.conftest import small_config

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS, CALIBRATION = 256, 128
MODEL = {
    "model.n_layers": 3,
    "model.pattern": ["attention", "gla"],
    "model.mixers": {"attention": {"n_heads": 2}, "gla": {"n_heads": 2}},
    "model.ffns": {"dense": {"activation": "relu"}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with checkpoints at steps 4, 8 and 12."""
    path = tmp_path_factory.mktemp("store") / "run"
    cfg = small_config(**MODEL, **{"train.checkpoint_every": 4, "train.keep_checkpoints": 0})
    train(cfg, path, devices=jax.devices()[:1])
    return path


@functools.cache
def measured(run, method, devices=1):
    cfg, _, params = load_run(run)
    return Measured(cfg, params, Validation(cfg, TOKENS, CALIBRATION, jax.devices()[:devices]), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_dial_goes_from_the_dense_model_to_nothing(run, method):
    dense, points = measured(run, "cett").at(0.0), [measured(run, method).at(u) for u in (0.0, 0.4, 0.8)]
    assert points[0]["loss"] == pytest.approx(dense["loss"], abs=2e-6)
    active = [point["active"] for point in points]
    assert active[0] > active[-1] and active == sorted(active, reverse=True)
    assert len(points[0]["active_layers"]) == 3
    assert points[1]["active"] == pytest.approx(np.mean(points[1]["active_layers"]), abs=0.02)
    low, *_, high = points[1]["active_tokens"]
    assert low <= points[1]["active"] <= high


def test_thresholds_by_bisection_are_those_of_a_search():
    """The largest threshold, of all that could be told apart, whose CETT in float64 is within the target."""
    target = 0.3
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 40, 24)), rng.standard_normal((24, 8))
    x[x < 0] = 0
    stand_in = maps.ErrorThreshold(_linear(kernel), METHODS["cett"], jnp.float32(target))
    stand_in(jnp.asarray(x, jnp.float32))
    threshold = float(stand_in.seen)
    scores = np.abs(x) * np.linalg.norm(kernel, axis=1)

    def error(at):
        left_out = np.where(scores > at, 0, x) @ kernel
        return np.mean(np.linalg.norm(left_out, axis=-1) / np.linalg.norm(x @ kernel, axis=-1))

    candidates = np.unique(scores)
    best = max(at for at in candidates if error(at) <= target)
    above = candidates[candidates > best][0]
    assert best * (1 - 1e-5) <= threshold <= above * (1 + 1e-5)


def _linear(kernel):
    linear = Linear(Maker(jax.random.key(0), small_config().model), *kernel.shape)
    linear.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return linear


def test_the_largest_inputs_of_each_token_are_kept():
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((2, 5, 20)), rng.standard_normal((20, 6))
    for method in ("topk", "wina"):
        stand_in = maps.Thinned(_linear(kernel), METHODS[method], {"drop": jnp.float32(0.7)})
        y = stand_in(jnp.asarray(x, jnp.float32))
        scores = np.abs(x) * (np.linalg.norm(kernel, axis=1) if method == "wina" else 1.0)
        kept = np.where(scores >= np.sort(scores, -1)[..., -6:-5], x, 0.0)
        np.testing.assert_allclose(y, kept @ kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stand_in.seen, 0.3, rtol=1e-6)


def test_a_low_rank_for_the_rest_is_exact_at_full_rank():
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal((2, 5, 20)), rng.standard_normal((20, 6))
    factors = maps.factorised(jnp.asarray(kernel, jnp.float32), maps.rank_of(kernel.shape, 1.0))
    settings = {"threshold": jnp.float32(1.0), "factors": factors}
    stand_in = maps.Thinned(_linear(kernel), METHODS["rsparse"], settings)
    np.testing.assert_allclose(stand_in(jnp.asarray(x, jnp.float32)), x @ kernel, rtol=1e-4, atol=1e-5)
    assert 0.1 < float(jnp.mean(stand_in.seen)) < 0.9


def test_in_the_rotated_basis_no_other_choice_of_inputs_is_better():
    """Orthogonal rows make the smallest scores the least error, of all subsets of their number, for every token."""
    rng = np.random.default_rng(3)
    x, kernel = rng.standard_normal((1, 4, 6)), rng.standard_normal((6, 5)) @ rng.standard_normal((5, 9))
    look = maps.Rotation(_linear(kernel), METHODS["wina_rotated"], None)
    look(jnp.asarray(x, jnp.float32))
    rotation = np.asarray(look.seen, float)
    turned = rotation.T @ kernel
    off = turned @ turned.T - np.diag(np.sum(turned**2, axis=1))
    assert np.abs(off).max() < 1e-5 * np.sum(turned**2)
    settings = {"drop": jnp.float32(0.5), "rotation": look.seen}
    y = maps.Thinned(_linear(kernel), METHODS["wina_rotated"], settings)(jnp.asarray(x, jnp.float32))
    parts = (x @ rotation)[0, :, :, None] * turned
    least = np.full(4, np.inf)
    for kept in itertools.combinations(range(6), 3):
        error = np.linalg.norm(parts[:, list(kept)].sum(1) - x[0] @ kernel, axis=-1)
        least = np.minimum(least, error)
    np.testing.assert_allclose(np.linalg.norm(y[0] - x[0] @ kernel, axis=-1), least, rtol=1e-4, atol=1e-5)


def test_greedy_shares_beat_equal_ones_and_add_up_to_the_dial(run):
    teal = measured(run, "teal")
    sizes = {path: n * out for path, (n, out) in teal.lm.shapes["pattern"]["0"].items()}
    for dial in (0.2, 0.5, 0.8):
        shares = {p: greedy_share(teal.shares["pattern"]["0"][p], dial) for p in sizes}
        total = sum(sizes[p] * shares[p] for p in sizes) / sum(sizes.values())
        assert total == pytest.approx(dial, abs=0.02) and max(shares.values()) > min(shares.values()) + 0.05
    greedy, equal = (measured(run, method).at(0.6) for method in ("teal", "magnitude"))
    assert greedy["skipped"] > 0.58 and greedy["loss"] < equal["loss"]


def greedy_share(table, dial):
    return float(np.interp(dial, np.linspace(0, 1, table.shape[-1]), table[0]))


def test_the_rise_of_perplexity_is_met(run):
    found = measured(run, "cett")
    zero, at = found.at(0.0), found.at_rise(1.0)
    assert 0.5 * np.log(1.01) < at["loss"] - zero["loss"] <= np.log(1.01)
    assert found.at(at["dial"] + 0.02)["loss"] - zero["loss"] > np.log(1.01)
    assert at["active"] < zero["active"] < 1.0


@pytest.mark.parametrize("method", ["cett", "wina"])
def test_devices_do_not_change_what_is_measured(run, method):
    one, eight = (measured(run, method, devices).at(0.3) for devices in (1, 8))
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-5)
    np.testing.assert_allclose(eight["active_layers"], one["active_layers"], atol=2e-3)
    np.testing.assert_allclose(eight["active_tokens"], one["active_tokens"], atol=2e-2)


def test_the_command_writes_rows_of_all_checkpoints_and_goes_on(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = [
        "--store", str(run.parent), "--out", str(out), "--methods", "cett", "--curves", "topk", "--dials", "0.5",
        "--checkpoints", "all", "--tokens", str(TOKENS), "--calibration-tokens", str(CALIBRATION),
    ]  # fmt: skip
    assert __main__.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["method"], r["at"], r["step"]) for r in rows if r["at"] in ("rise", "held", "dial")] == [
        *((m, at, s) for s in checkpoint.steps(run / "ckpt") for m, at in (("cett", "rise"), ("topk", "dial"))),
        *(("cett", "held", s) for s in (4, 8, 12)),
    ]
    held = [r["dial"] for r in rows if r["at"] == "held"]
    assert held == pytest.approx([np.mean([r["dial"] for r in rows if r["at"] == "rise"])] * 3)
    assert all(r["D"] == r["step"] * 64 and r["activation"] == "relu" for r in rows)
    before = out.read_text()
    assert __main__.main(command) == 0 and out.read_text() == before


def test_nothing_is_measured_on_other_text_than_that_of_training(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    info = metrics.read_json(run / "run.json")
    metrics.write_json(tmp_path / "run" / "run.json", info | {"data": {"sha256": {"tokens.bin": "another"}}})
    assert __main__.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "'zipf_markov' holds other tokens now than the run was trained on" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--run", "nowhere"], "is no run directory"),
        (["--store", "nowhere"], "no such directory"),
        (["--run", "x", "--methods", "cet"], "did you mean 'cett'"),
        (["--run", "x", "--dials", "1.5"], "--dials 1.5: must be a number in 0..1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys):
    assert __main__.main([*arguments, "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
