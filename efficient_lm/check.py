"""Checks of a config that need the registries or more than one field; part of `config.from_dict`."""

import dataclasses
import re

from efficient_lm import blocks, ffn, mixers, norms
from efficient_lm.config import ModelConfig
from efficient_lm.data import tasks
from efficient_lm.data.batches import load_sources
from efficient_lm.layers import layer_specs
from efficient_lm.optim import OPTIMIZERS, SCHEDULES
from efficient_lm.probes import PROBES
from efficient_lm.schema import ConfigError, build, nearest


def require_sections(values: dict) -> None:
    """Raises ConfigError for a setting of a mixer or ffn that stands beside their sections, as in model.n_heads = 4."""
    model = values.get("model")
    if not hasattr(model, "items"):
        return
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in [name for name in model if name not in own]:
        homes = [
            f"{section}.{kind}"
            for section, registry in (("mixers", mixers.MIXERS), ("ffns", ffn.FFNS))
            for kind in registry
            if any(name == field.name for field in dataclasses.fields(registry[kind].Config))
        ]
        if homes:
            used = {"dense", *re.findall(r"\w+", str(model.get("pattern", "attention")))}
            home = next((home for home in homes if home.partition(".")[2] in used), homes[0])
            raise ConfigError(
                f"config.model.{name} = {model[name]!r}: is a setting of single mixers or ffns; did you mean "
                f"'config.model.{home}.{name}'?"
            )


def resolve(config):
    """`config` with typed settings of the blocks and the task in use, instead of dicts. Raises ConfigError."""
    model = config.model
    if not model.pattern:
        raise ConfigError("config.model.pattern = (): must name at least one block, for example ('attention',)")
    norms.NORMS.find(model.norm, "config.model.norm")
    blocks.RESIDUALS.find(model.residual, "config.model.residual")
    load_sources().find(config.data.source, "config.data.source")
    OPTIMIZERS.find(config.optim.name, "config.optim.name")
    SCHEDULES.find(config.optim.schedule, "config.optim.schedule")
    for name in config.probes.names:
        PROBES.find(name, "config.probes.names")
    used = layer_specs(model)
    if len(model.prefix) > model.n_layers:
        raise ConfigError(f"config.model.prefix = {model.prefix}: has more blocks than n_layers = {model.n_layers}")
    model = dataclasses.replace(
        model,
        mixers=_sections(model.mixers, [mixer for mixer, _ in used], mixers.MIXERS, "config.model.mixers"),
        ffns=_sections(model.ffns, [name for _, name in used], ffn.FFNS, "config.model.ffns"),
    )
    for name, settings in model.mixers.items():
        mixers.MIXERS[settings.kind].check(settings, model, f"config.model.mixers.{name}")
    _check_carry(model)
    for name, settings in model.ffns.items():
        ffn.FFNS[settings.kind].check(settings, model, f"config.model.ffns.{name}")
    _check_train(config)
    _check_start(config)
    _check_experts(config.mesh, model)
    _check_data(config.data)
    options = tasks.resolve(config.data)
    if options:
        options.check(config.train.seq_len, config.data.vocab_size)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, task=options))


def _check_carry(model):
    """What a layer takes from earlier ones must be given by one of them, always in the same shape."""
    given = {}
    for layer, (name, _) in enumerate(layer_specs(model)):
        settings = model.mixers[name]
        mixer, where = mixers.MIXERS[settings.kind], f"config.model.mixers.{name} (layer {layer})"
        takes = mixer.takes(settings, model)
        for key, shape in (takes | mixer.gives(settings, model)).items():
            if key in takes and key not in given:
                able = {name: m.giving[key] for name, m in mixers.MIXERS.items() if key in m.giving}
                raise ConfigError(f"{where}: takes {key!r}, which no earlier layer gives; these can: {able}")
            if given.setdefault(key, shape) != shape:
                raise ConfigError(f"{where}: {key!r} has shape {shape} per token, in an earlier layer {given[key]}")


def _sections(given, used, registry, path):
    """Typed settings for each name used; a name without a section is the registered entry with defaults.

    Sections of names that are not used go, since a sweep's cells share theirs; but not those that nothing could use.
    """
    for name, values in given.items():
        if name not in used and name not in registry and not (hasattr(values, "get") and values.get("kind")):
            raise ConfigError(
                f"{path}.{name} = {values!r}: no block of the model has such a {registry.what}; "
                f"{nearest(name, dict.fromkeys([*used, *registry]))}"
            )
    typed = {}
    for name in dict.fromkeys(used):
        values = given.get(name, {})
        if dataclasses.is_dataclass(values):
            typed[name] = values
            continue
        kind = values.get("kind", name) if hasattr(values, "get") else name
        if kind not in registry:
            where = f"{path}.{name}.kind" if kind != name else "config.model.pattern"
            raise ConfigError(f"{where} = {kind!r}: no such {registry.what}; {nearest(kind, [*registry, *given])}")
        typed[name] = build(registry[kind].Config, {**values, "kind": kind}, f"{path}.{name}")
    return typed


def _check_train(config):
    train, mesh = config.train, config.mesh
    if train.batch_size % train.grad_accum:
        raise ConfigError(
            f"config.train.grad_accum = {train.grad_accum}: must divide train.batch_size = {train.batch_size}"
        )
    rows = train.batch_size // train.grad_accum
    if rows % mesh.fsdp:
        raise ConfigError(f"config.mesh.fsdp = {mesh.fsdp}: must divide batch_size / grad_accum = {rows}")
    for name in ("beta1", "beta2"):
        if getattr(config.optim, name) == 1.0:
            raise ConfigError(f"config.optim.{name} = 1.0: must be below 1")
    if config.optim.warmup + config.optim.decay > 1 and config.optim.schedule in ("wsd", "linear"):
        raise ConfigError(
            f"config.optim.decay = {config.optim.decay}: warmup + decay must be at most 1 (warmup = "
            f"{config.optim.warmup})"
        )


def _check_start(config):
    """Of what a run starts from, one thing can be meant."""
    train = config.train
    if train.init_from and train.upcycle_from:
        raise ConfigError(f"config.train.upcycle_from = {train.upcycle_from!r}: must be '' with init_from")
    if train.init_step and not train.init_from:
        raise ConfigError(f"config.train.init_step = {train.init_step}: must be 0 without init_from")


def _check_experts(mesh, model):
    for name, settings in model.ffns.items():
        if getattr(settings, "parallel", "data") == "expert" and settings.n_experts % mesh.fsdp:
            raise ConfigError(
                f"config.model.ffns.{name}.n_experts = {settings.n_experts}: must be a multiple of config.mesh.fsdp = "
                f"{mesh.fsdp} with parallel = 'expert'"
            )


def _check_data(data):
    if data.path and data.source != "prepared":
        raise ConfigError(
            f"config.data.path = {data.path!r}: is read by source 'prepared' only; set config.data.source to it, or "
            f"path to '' for source {data.source!r}"
        )
