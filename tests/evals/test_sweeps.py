"""The sweeps of recall and state tracking: what they compare is comparable."""

import collections
from pathlib import Path

import pytest

from efficient_lm.counting import decode_state_bytes
from efficient_lm.schema import ConfigError
from sweeps.plan import make_plan

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "sweeps"


def cells(spec):
    return make_plan(str(CONFIGS / spec)).cells


@pytest.mark.quick
@pytest.mark.parametrize("name, cpu, gpu", [("recall.py", 36, 84), ("state_tracking.py", 12, 42)])
def test_the_cells_for_cpu_are_among_those_for_a_gpu(name, cpu, gpu):
    small, large = ({cell.run_id for cell in cells(f"{name}:{preset}")} for preset in ("cpu", "gpu"))
    assert (len(small), len(large)) == (cpu, gpu) and small < large
    with pytest.raises(ConfigError, match=f"{name}:tpu: no such preset; .*allowed: cpu, gpu"):
        make_plan(str(CONFIGS / f"{name}:tpu"))


@pytest.mark.parametrize("preset, shapes", [("gpu", 4), ("heads", 3)])
def test_recurrent_mixers_of_one_shape_have_similar_states(preset, shapes):
    states = collections.defaultdict(dict)
    for cell in cells(f"recall.py:{preset}"):
        shape = cell.axes["d_model"], cell.axes["heads"]
        states[shape][cell.arch] = decode_state_bytes(cell.config, cell.config.train.seq_len)
    assert len(states) == shapes
    # In GLA the state is 4 d^2 / heads bytes and the convolution before it; a mixer's own convolutions add to that.
    for (width, _), of in states.items():
        of.pop("attention", None)
        assert all(0 <= size - of["gla"] <= 4 * 3 * 3 * width for size in of.values()), of


def test_the_two_deltanets_differ_in_their_eigenvalues_only():
    plain, negative = (
        [c for c in cells("state_tracking.py:gpu") if c.arch == f"deltanet [0, {top}]"] for top in (1, 2)
    )
    assert len(plain) == len(negative) == 6
    for a, b in zip(plain, negative, strict=True):
        assert a.params == b.params and a.steps == b.steps and a.config.data == b.config.data
        settings = [cell.config.model.mixers["deltanet"] for cell in (a, b)]
        assert [s.allow_neg_eigval for s in settings] == [False, True]
