"""Configs: files, overrides, one-line errors, run ids."""

import pytest

from efficient_lm.config import (
    ConfigError,
    as_text,
    from_dict,
    load,
    parse_literal,
    read_config_file,
    replace,
    run_id,
    split_args,
    to_dict,
)

pytestmark = pytest.mark.quick

BAD = {
    "unknown field": ({"model": {"d_modle": 64}}, ["config.model.d_modle", "64", "did you mean 'd_model'"]),
    "unknown section": ({"modle": {}}, ["config.modle", "did you mean 'model'"]),
    "wrong type": ({"model": {"d_model": "wide"}}, ["config.model.d_model", "'wide'", "int"]),
    "float for int": ({"train": {"steps": 1.5}}, ["config.train.steps", "1.5", "int"]),
    "bool for int": ({"train": {"steps": True}}, ["config.train.steps", "True", "int"]),
    "NaN": ({"optim": {"lr": float("nan")}}, ["config.optim.lr", "nan"]),
    "below": ({"train": {"batch_size": 0}}, ["config.train.batch_size", "0", "at least 1"]),
    "above": ({"optim": {"warmup": 1.5}}, ["config.optim.warmup", "1.5", "at most 1"]),
    "no decay": ({"optim": {"beta2": 1}}, ["config.optim.beta2", "1.0", "below 1"]),
    "choice": ({"model": {"dtype": "float8"}}, ["config.model.dtype", "'float8'", "bfloat16, float32"]),
    "section is no section": ({"model": 3}, ["config.model", "3", "section"]),
    "heads": (
        {"model": {"d_model": 64, "mixers": {"attention": {"n_heads": 5}}}},
        ["config.model.mixers.attention.n_heads", "5", "64", "1, 2, 4, 8"],
    ),
    "kv heads": (
        {"model": {"mixers": {"attention": {"n_heads": 4, "n_kv_heads": 3}}}},
        ["config.model.mixers.attention.n_kv_heads", "3", "1, 2, 4"],
    ),
    "head_dim": (
        {"model": {"d_model": 64, "mixers": {"attention": {"head_dim": 24}}}},
        ["config.model.mixers.attention.head_dim", "24", "64"],
    ),
    "gla heads": (
        {"model": {"pattern": ["gla"], "mixers": {"gla": {"n_heads": 3}}}},
        ["config.model.mixers.gla.n_heads", "3", "32"],
    ),
    "no such mixer": ({"model": {"pattern": ["atention"]}}, ["pattern", "'atention'", "did you mean 'attention'"]),
    "no such kind": (
        {"model": {"pattern": ["a"], "mixers": {"a": {"kind": "glaa"}}}},
        ["config.model.mixers.a.kind", "'glaa'", "'gla'"],
    ),
    "mixer field": (
        {"model": {"mixers": {"attention": {"windw": 8}}}},
        ["config.model.mixers.attention.windw", "did you mean 'window'"],
    ),
    "activation": (
        {"model": {"ffns": {"dense": {"activation": "swishy"}}}},
        ["config.model.ffns.dense.activation", "'swishy'", "silu"],
    ),
    "norm": ({"model": {"norm": "rms"}}, ["config.model.norm", "'rms'", "rmsnorm"]),
    "residual": ({"model": {"residual": "post"}}, ["config.model.residual", "'post'", "sandwich"]),
    "data source": ({"data": {"source": "sotuu"}}, ["config.data.source", "'sotuu'", "did you mean 'sotu'"]),
    "optimizer": ({"optim": {"name": "adam"}}, ["config.optim.name", "'adam'", "adamw"]),
    "schedule name": ({"optim": {"schedule": "cos"}}, ["config.optim.schedule", "'cos'", "cosine"]),
    "empty pattern": ({"model": {"pattern": []}}, ["config.model.pattern"]),
    "long prefix": ({"model": {"n_layers": 1, "prefix": ["attention"] * 2}}, ["config.model.prefix", "n_layers = 1"]),
    "plugin": ({"model": {"plugins": ["no_such_module"]}}, ["config.model.plugins", "no_such_module"]),
    "nobody's mixer": (
        {"model": {"mixers": {"atention": {"n_heads": 2}}}},
        ["config.model.mixers.atention", "did you mean 'attention'"],
    ),
    "nobody's ffn": ({"model": {"ffns": {"moa": {"n_experts": 4}}}}, ["config.model.ffns.moa", "did you mean 'moe'"]),
    "path without its source": ({"data": {"path": "mine"}}, ["config.data.path", "'mine'", "source 'prepared' only"]),
    "two starts": (
        {"train": {"init_from": "a", "upcycle_from": "b"}},
        ["config.train.upcycle_from", "'b'", "must be '' with init_from"],
    ),
    "step of no trunk": ({"train": {"init_step": 5}}, ["config.train.init_step = 5", "without init_from"]),
    "experts that don't split": (
        {
            "model": {"pattern": ["attention/moe"], "ffns": {"moe": {"n_experts": 6, "parallel": "expert"}}},
            "mesh": {"fsdp": 4},
        },
        ["config.model.ffns.moe.n_experts = 6", "config.mesh.fsdp = 4"],
    ),
    "accumulation": ({"train": {"batch_size": 4, "grad_accum": 3}}, ["config.train.grad_accum", "3", "4"]),
    "schedule": ({"optim": {"schedule": "wsd", "warmup": 0.6, "decay": 0.6}}, ["config.optim.decay", "0.6"]),
}


@pytest.mark.parametrize("values, fragments", BAD.values(), ids=BAD.keys())
def test_bad_values_give_one_line_that_names_field_value_and_what_is_allowed(values, fragments):
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_round_trip_and_defaults():
    config = from_dict(
        {"model": {"pattern": ["swa", "attention"], "mixers": {"swa": {"kind": "attention", "window": 4}}}}
    )
    assert from_dict(to_dict(config)) == config
    assert config.model.mixers["swa"].window == 4
    assert "model.mixers.swa.window = 4\n" in as_text(config)


def test_settings_of_unused_mixers_do_not_change_the_run():
    plain, extra = from_dict({}), from_dict({"model": {"mixers": {"gla": {"n_heads": 2}}}})
    assert run_id(plain) == run_id(extra)


def test_a_setting_of_a_mixer_beside_the_mixers_is_told_its_place():
    for spec, given, home in (
        ("configs/dense.py:tiny", "n_heads", "mixers.attention.n_heads"),
        ("configs/gla.py:tiny", "n_heads", "mixers.gla.n_heads"),
        ("configs/dense.py:tiny", "activation", "ffns.dense.activation"),
    ):
        with pytest.raises(ConfigError, match=f"config.model.{given} = 2: .*did you mean 'config.model.{home}'"):
            load(spec, {f"model.{given}": 2})


def test_overrides_without_effect_are_named(capsys):
    spec, settings = "configs/dense.py:tiny", {"model.mixers.gla.n_heads": "2", "model.mixers.attention.n_heads": "2"}
    assert run_id(load(spec, settings)) == run_id(load(spec, {"model.mixers.attention.n_heads": 2}))
    noted = capsys.readouterr().err.splitlines()
    assert noted == ["note: config.model.mixers.gla.n_heads = 2: has no effect, no layer uses 'gla'"]


def test_overrides_that_another_field_switches_off_are_named(capsys):
    off = {"optim.decay": 0.5, "model.base_width": 32, "probes.every": 9, "data.vocab_size": 99}
    load("configs/dense.py:tiny", off | {"optim.schedule": "cosine"})
    named = [line.partition(": has no effect with config.")[2] for line in capsys.readouterr().err.splitlines()]
    assert named == ["optim.schedule = 'cosine'", "model.parametrization = 'standard'", "probes.names = ()",
                     "data.source = 'sotu'"]  # fmt: skip
    on = {"optim.schedule": "wsd", "model.parametrization": "mup", "probes.names": "massive"}
    load("configs/dense.py:tiny", off | on | {"data.source": "zipf_markov"})
    assert not capsys.readouterr().err


def test_experts_split_over_one_device_are_named(capsys):
    expert = {"model.ffns.moe.parallel": "expert"}
    load("configs/moe.py:tiny", expert | {"mesh.fsdp": 2})
    assert not capsys.readouterr().err
    load("configs/moe.py:tiny", expert)
    note = "note: config.model.ffns.moe.parallel = 'expert': has no effect with config.mesh.fsdp = 1"
    assert capsys.readouterr().err.splitlines() == [note]


def test_run_id_depends_on_what_is_computed_only():
    config = from_dict({})
    for path, value in {
        "name": "x",
        "log.wandb": "offline",
        "train.log_every": 3,
        "mesh.fsdp": 2,
        "sweep": {"a": 1},
        "data.cache_dir": "elsewhere",
        "model.remat": "full",
    }.items():
        assert run_id(replace(config, **{path: value})) == run_id(config), path
    for path, value in {
        "seed": 1,
        "model.d_model": 128,
        "optim.lr": 2e-3,
        "train.steps": 11,
        "data.pack": "stream",
        "model.mixers.attention.window": 5,
        "model.ffns.dense.glu": False,
    }.items():
        assert run_id(replace(config, **{path: value})) != run_id(config), path
    assert run_id(replace(config, **{"optim.lr": 1})) == run_id(replace(config, **{"optim.lr": 1.0}))


def test_overrides_from_the_command_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg='small'):\n"
        "    return ConfigDict({'name': arg, 'model': {'d_model': 32}})\n"
    )
    overrides, rest = split_args(
        [
            "--workdir",
            "w",
            "--config.model.d_model=48",
            "--config.optim.lr",
            "1e-2",
            "--config.model.pattern=gla,attention",
        ]
    )
    assert rest == ["--workdir", "w"]
    config = load(f"{path}:tiny", overrides)
    assert (config.name, config.model.d_model, config.optim.lr) == ("tiny", 48, 0.01)
    assert config.model.pattern == ("gla", "attention")
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="has no get_sweep"):
        read_config_file(str(path), "get_sweep")
    with pytest.raises(ConfigError, match="needs a value"):
        split_args(["--config.seed"])
    with pytest.raises(ConfigError, match="config.model.d_modl"):
        load(str(path), {"model.d_modl": "3"})
    for broken, message in (("def get_config(:\n", "line 1"), ("\nx = y\n", "NameError.*line 2")):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=message):
            load(str(path))


def test_literals():
    assert [parse_literal(t) for t in ("1e-3", "true", "False", "(1, 2)", "None", "runs/x")] == [
        1e-3,
        True,
        False,
        (1, 2),
        None,
        "runs/x",
    ]
