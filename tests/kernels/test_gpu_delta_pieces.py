"""The delta rule with T in pieces: entering states by exact transitions, where heads are too few to fill a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import delta_inverse
from pallas_kernels.gpu import delta_rule as gpu
from tests.kernels.gpu_checks import as_written, on_gpu
from tests.kernels.test_gpu_delta_rule import errors, make


@pytest.mark.quick
@pytest.mark.parametrize("b, h, most", [(1, 1, 32), (1, 16, 8), (2, 16, 4), (3, 16, 1), (8, 16, 1)])
def test_pieces_fill_the_card_and_none_is_empty(b, h, most):
    for chunks in (1, 31, 32, 33, 100, 255, 256, 257, 1024):
        pieces = gpu.delta_pieces(jax.ShapeDtypeStruct((b, 64 * chunks, h, 128), jnp.bfloat16))
        per_piece = -(-chunks // pieces)
        assert 1 <= pieces <= most and (pieces - 1) * per_piece < chunks
        assert pieces == 1 or per_piece >= gpu.MIN_PIECE_CHUNKS


@as_written
def test_interpreted_pieces_match_the_reference_without_races(monkeypatch, capsys):
    for name, value in (("PROGRAMS", 3), ("PIECES", (2, 3)), ("MIN_PIECE_CHUNKS", 1)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(delta_inverse, "PROGRAMS", 2)  # so that a warpgroup takes several chunks in turn
    arrays, do, dstate = make(1, 192, 1, 64, initial=True)
    assert gpu.delta_pieces(arrays[2]) == 3
    got = errors(arrays, do, dstate, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert max(got) < 0.01 and "RACE" not in capsys.readouterr().out


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("d, decay", [(64, True), (128, True), (128, False)])
def test_gpu_pieces_match_the_reference(d, decay):
    arrays, do, dstate = make(1, 2200, 2, d, decay=decay, initial=True)
    assert gpu.delta_pieces(arrays[2]) == 4
    assert max(errors(arrays, do, dstate)) < 0.012
