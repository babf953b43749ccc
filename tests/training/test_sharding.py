"""Rules on parameter paths and the choice of a mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from efficient_lm import sharding
from efficient_lm.config import MeshConfig
from efficient_lm.schema import ConfigError


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), 8, jax.devices()[:8])


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/embed/table", (16, 8), P("tensor", "fsdp")),
        ("params/prefix/0/ffn/up/kernel", (8, 16), P("fsdp", "tensor")),
        ("params/pattern/0/ffn/down/kernel", (3, 16, 8), P(None, "tensor", "fsdp")),
        ("opt_state/1/1/mu/pattern/0/mixer/o/kernel", (4, 16, 8), P(None, "tensor", "fsdp")),
        ("params/pattern/0/ffn/experts", (4, 6, 16, 8), P(None, None, "fsdp", "tensor")),
        ("params/pattern/0/mixer_norm/scale", (4, 8), P()),
        ("params/final_norm/scale", (8,), P()),
        ("opt_state/1/1/count", (), P()),
        ("params/embed/table", (15, 8), P(None, "fsdp")),
        ("params/tail/0/mixer/q/kernel", (7, 5), P(None, None)),
    ],
)
def test_rules(mesh, path, shape, spec):
    assert sharding.spec_for(path, shape, mesh) == spec


def test_takes_the_largest_number_of_devices_that_divides_the_rows(capsys):
    assert sharding.make_mesh(MeshConfig(), 8, jax.devices()[:8]).size == 8
    assert capsys.readouterr().out == ""
    assert sharding.make_mesh(MeshConfig(), 6, jax.devices()[:8]).size == 6
    assert "using 6 of 8 devices" in capsys.readouterr().out
    assert dict(sharding.make_mesh(MeshConfig(tensor=4), 1, jax.devices()[:8]).shape) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 4,
    }


def test_impossible_meshes_are_refused():
    with pytest.raises(ConfigError, match="fsdp x config.mesh.tensor = 16: must be at most the number of devices, 8"):
        sharding.make_mesh(MeshConfig(fsdp=4, tensor=4), 8, jax.devices()[:8])
    with pytest.raises(ConfigError, match="config.mesh.fsdp = 4: must divide"):
        sharding.make_mesh(MeshConfig(fsdp=4), 6, jax.devices()[:8])
