"""The experiment config: frozen dataclasses, loaded once from an `ml_collections` file plus overrides.

A config file has `get_config(arg=None) -> ConfigDict` with only the fields that differ from the defaults below;
`file.py:tiny` passes `arg="tiny"`. `load("configs/dense.py:tiny", {"model.d_model": 128})` gives a checked `Config`.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import operator
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from efficient_lm.schema import ConfigError, build, section, setting, to_dict, without_volatile

# Leads the hash of every run: raise it when the meaning of a config changes without its fields changing.
RUN_ID_VERSION = 1

# field: (another field, its values with which nothing reads the first)
UNREAD = {
    "optim.decay": ("optim.schedule", ("cosine", "constant")),
    "optim.final_lr": ("optim.schedule", ("constant",)),
    "model.base_width": ("model.parametrization", ("standard", "sigma")),
    "model.depth_alpha": ("model.base_depth", (0,)),
    "data.vocab_size": ("data.source", ("sotu", "stdlib", "prepared")),
    "probes.every": ("probes.names", ((),)),
    "probes.rows": ("probes.names", ((),)),
    "log.project": ("log.wandb", ("off",)),
}


@dataclass(frozen=True)
class ModelConfig:
    """Decoder-only LM: `prefix` layers, then `pattern` repeated up to `n_layers` (a cut repeat is the tail)."""

    d_model: int = setting(64, "width of the residual stream", low=1)
    n_layers: int = setting(2, "number of blocks, prefix included", low=1)
    vocab_size: int = setting(256, "rows of the embedding table", low=2)
    pattern: tuple[str, ...] = setting(
        ("attention",), "blocks that repeat, each 'mixer' or 'mixer/ffn', names from `mixers` and `ffns`"
    )
    prefix: tuple[str, ...] = setting((), "blocks before the repeated pattern")
    mixers: dict[str, Any] = setting({}, "settings of each mixer name used; 'kind' names the registered mixer")
    ffns: dict[str, Any] = setting({}, "settings of each ffn name used; 'kind' names the registered ffn")
    plugins: tuple[str, ...] = setting((), "modules to import first, so that they register mixers, ffns, ...")
    norm: str = setting("rmsnorm", "registered norm: rmsnorm, layernorm, ...")
    norm_eps: float = setting(1e-6, "added to the mean square", low=0.0)
    residual: str = setting("pre", "registered block topology: pre, sandwich, ...")
    tie_embeddings: bool = setting(False, "share the embedding table with the output head")
    logit_cap: float = setting(0.0, "soft cap c tanh(logits / c); 0 = none", low=0.0)
    init_std: float = setting(0.0, "std of hidden matrices; 0 = 1/sqrt(fan_in)", low=0.0)
    parametrization: str = setting(
        "standard",
        "mup: init and learning rate scale with width; sigma: linear maps (not tables, experts) are gain / sigma(W) W",
        choices=("standard", "mup", "sigma"),
    )
    base_width: int = setting(64, "muP: width at which learning rate and init are those of 'standard'", low=1)
    base_depth: int = setting(0, "depth scaling: depth at which branches have multiplier 1; 0 = off", low=0)
    depth_alpha: float = setting(
        1.0, "depth scaling: residual branches x (n_layers/base_depth)^-alpha", low=0.0, high=1.0
    )
    dtype: str = setting("bfloat16", "compute dtype; parameters stay float32", choices=("bfloat16", "float32"))
    remat: str = setting(
        "none", "what to recompute in the backward pass", choices=("none", "dots", "full"), volatile=True
    )
    scan_unroll: int = setting(
        0, "repeats unrolled in the layer scan; 0 = all on CPU, 1 elsewhere", low=0, volatile=True
    )


@dataclass(frozen=True)
class DataConfig:
    """Which tokens."""

    source: str = setting("sotu", "registered data source: sotu, prepared, zipf_markov, copy, mqar, ...")
    task: dict[str, Any] = setting({}, "options of a source that is a synthetic task")
    path: str = setting("", "directory written by efficient_lm.data.prepare (source 'prepared')")
    tokenizer: str = setting("bytes", "'bytes', or a tokenizer file that the prepared data must match")
    pack: str = setting(
        "documents",
        "'documents' resets state at document starts, 'stream' does not, 'bos' neither: each row begins with one token",
        choices=("documents", "stream", "bos"),
    )
    validation_fraction: float = setting(0.05, "share of documents held out", low=0.0, high=0.5)
    validation_tokens: int = setting(131072, "validation tokens per evaluation, the same for every run", low=1)
    vocab_size: int = setting(64, "vocabulary of synthetic sources", low=2)
    cache_dir: str = setting("", "where tokenised corpora are cached; '' = user cache", volatile=True)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = setting("adamw", "registered optimizer")
    lr: float = setting(1e-3, "peak learning rate", low=0.0)
    beta1: float = setting(0.9, "decay of the first moment", low=0.0, high=1.0)
    beta2: float = setting(0.95, "decay of the second moment", low=0.0, high=1.0)
    eps: float = setting(1e-8, "added to the root of the second moment", low=0.0)
    weight_decay: float = setting(0.1, "decoupled weight decay, multiplied by the learning rate", low=0.0)
    decay_embeddings: bool = setting(False, "apply weight decay to embedding tables")
    clip_norm: float = setting(1.0, "clip the global gradient norm to this; 0 = no clipping", low=0.0)
    schedule: str = setting("cosine", "registered schedule: cosine, wsd, linear, constant")
    warmup: float = setting(0.01, "share of steps with rising learning rate", low=0.0, high=1.0)
    decay: float = setting(0.2, "wsd, linear: share of steps with falling learning rate at the end", low=0.0, high=1.0)
    final_lr: float = setting(0.1, "learning rate at the end, as a share of the peak", low=0.0, high=1.0)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = setting(1000, "optimizer steps", low=1)
    batch_size: int = setting(8, "sequences per step, over all devices and accumulation steps", low=1)
    seq_len: int = setting(128, "tokens per sequence", low=1)
    grad_accum: int = setting(1, "micro-batches per optimizer step", low=1)
    z_loss: float = setting(0.0, "coefficient of mean(logsumexp(logits)^2)", low=0.0)
    ema: float = setting(0.0, "decay of the parameter average that is evaluated; 0 = none", low=0.0, high=1.0)
    init_from: str = setting("", "run directory whose last checkpoint starts this run (WSD branch from a trunk)")
    init_step: int = setting(0, "which checkpoint of init_from; 0 = the last", low=0)
    upcycle_from: str = setting("", "dense run directory whose parameters a mixture of experts starts from")
    steps_per_call: int = setting(1, "optimizer steps per compiled call", low=1, volatile=True)
    log_every: int = setting(10, "steps between lines in metrics.jsonl", low=1, volatile=True)
    eval_every: int = setting(0, "steps between evaluations; 0 = only at the end", low=0, volatile=True)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0 = only at the end", low=0, volatile=True)
    keep_checkpoints: int = setting(1, "checkpoints kept; 0 = all", low=0, volatile=True)


@dataclass(frozen=True)
class ProbeConfig:
    """Measurements of the model's inside during training, on the first rows of the validation split."""

    names: tuple[str, ...] = setting((), "registered probes, rows of kind 'probe' in metrics.jsonl: massive, sink, ...")
    every: int = setting(1000, "steps between probes, beside those at 0, 1, 2, 4, ..., 512 and the last step", low=1)
    rows: int = setting(8, "sequences that are looked at", low=1)


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; `data` takes what `fsdp` and `tensor` leave."""

    fsdp: int = setting(1, "devices over which parameters and batch are sharded", low=1)
    tensor: int = setting(1, "devices over which matrices are split", low=1)


@dataclass(frozen=True)
class LogConfig:
    """Mirrors of metrics.jsonl."""

    wandb: str = setting("off", "mirror metrics to wandb", choices=("off", "offline", "online"))
    project: str = setting("efficient_lm", "wandb project")
    progress: bool = setting(True, "progress bar on stderr")


@dataclass(frozen=True)
class Config:
    """One training run."""

    name: str = setting("", "label for people", volatile=True)
    seed: int = setting(0, "seed of parameters and data order", low=0)
    model: ModelConfig = section(ModelConfig, "architecture")
    data: DataConfig = section(DataConfig, "tokens")
    optim: OptimConfig = section(OptimConfig, "optimizer and schedule")
    train: TrainConfig = section(TrainConfig, "loop")
    probes: ProbeConfig = section(ProbeConfig, "measurements during training", volatile=True)
    mesh: MeshConfig = section(MeshConfig, "devices", volatile=True)
    log: LogConfig = section(LogConfig, "mirrors", volatile=True)
    sweep: dict[str, Any] = setting({}, "axes of the sweep that made this run, kept in run.json", volatile=True)


def from_dict(values) -> Config:
    """A checked Config from a nested mapping (a ConfigDict, a dict, config.json). Raises ConfigError."""
    from efficient_lm import check  # reads the registries, and imports users of this module

    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    check.require_sections(values)
    config = build(Config, values)
    sys.path.insert(0, os.getcwd())
    try:
        for plugin in config.model.plugins:
            try:
                importlib.import_module(plugin)
            except ImportError as error:
                raise ConfigError(f"config.model.plugins = {plugin!r}: cannot be imported ({error})") from None
    finally:
        sys.path.remove(os.getcwd())
    return check.resolve(config)


def load(spec: str, overrides=()) -> Config:
    """Config from 'path.py[:arg]' and overrides, a mapping or pairs {'model.d_model': 128}. Raises ConfigError.

    Settings `without_effect` are named on standard error.
    """
    values = read_config_file(spec).to_dict()
    for key, value in dict(overrides).items():
        set_path(values, key, value)
    config = from_dict(values)
    for line in without_effect([config], dict(overrides)):
        print(f"note: {line}", file=sys.stderr)
    return config


def without_effect(found: list[Config], overrides: dict) -> list[str]:
    """A line for each setting that does nothing in any of the configs `found`.

    Overrides for a mixer or ffn that no layer uses, and of fields that another one switches off; experts to be split
    over the devices of a mesh axis with one.
    """
    lines = []
    for key, value in overrides.items():
        if key in UNREAD:
            other, off = UNREAD[key]
            settings = [operator.attrgetter(other)(config) for config in found]
            if all(setting in off for setting in settings):
                lines.append(f"config.{key} = {value}: has no effect with config.{other} = {settings[0]!r}")
        if key.startswith(("model.mixers.", "model.ffns.")):
            section, name = key.split(".")[1:3]
            if not any(name in getattr(config.model, section) for config in found):
                lines.append(f"config.{key} = {value}: has no effect, no layer uses {name!r}")
    split = {}  # ffn -> devices in each config
    for config in found:
        for name, ffn in config.model.ffns.items():
            if getattr(ffn, "parallel", "data") == "expert":
                split.setdefault(name, set()).add(config.mesh.fsdp)
    for name, devices in split.items():
        if devices == {1}:
            lines.append(f"config.model.ffns.{name}.parallel = 'expert': has no effect with config.mesh.fsdp = 1")
    return lines


def read_config_file(spec: str, function: str = "get_config"):
    """Call `function(arg)` of the Python file in 'path.py[:arg]'. Raises ConfigError when there is none."""
    path, _, arg = spec.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"config = {path!r}: no such file")
    if not path.endswith(".py"):
        raise ConfigError(f"config = {path!r}: must be a Python file, as in configs/dense.py:tiny")
    module_spec = importlib.util.spec_from_file_location(f"config_{abs(hash(os.path.abspath(path)))}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"config = {path!r}: {error.msg} in line {error.lineno}") from None
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"line {line.lineno}" if line.filename == path else f"{line.filename}, line {line.lineno}"
        raise ConfigError(f"config = {path!r}: {type(error).__name__}: {error} ({where})") from None
    get = getattr(module, function, None)
    if get is None:
        raise ConfigError(f"config = {path!r}: has no {function}()")
    if not inspect.signature(get).parameters:
        if arg:
            raise ConfigError(f"config = {spec!r}: {function}() of this file takes no argument")
        return get()
    return get(arg) if arg else get()


def set_path(values: dict, key: str, value) -> None:
    """`values['a']['b'] = value` for key 'a.b'; strings are read as Python literals where they are."""
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"config.{key} = {value!r}: {parent!r} is not a section")
    values[last] = parse_literal(value) if isinstance(value, str) else value


def parse_literal(text: str):
    """'1e-3' -> 0.001, 'true' -> True, '(1, 2)' -> (1, 2), anything else the string itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_args(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate `--config.a.b=c` overrides from the other command-line arguments."""
    overrides, rest = {}, []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise ConfigError(f"{argument}: needs a value, as in {argument}=VALUE")
        overrides[key] = value
    return overrides, rest


def run_id(config: Config) -> str:
    """12 hex digits that depend on everything that changes the result of the run and on nothing else."""
    text = json.dumps([RUN_ID_VERSION, without_volatile(config)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def replace(config: Config, **changes) -> Config:
    """Copy with changes given by dotted path: `replace(cfg, **{"train.steps": 10})`."""
    values = to_dict(config)
    for key, value in changes.items():
        set_path(values, key, value)
    return from_dict(values)


def as_text(config: Config) -> str:
    """The resolved config, one sorted 'path = value' a line: what golden files hold."""
    lines = []

    def walk(path, value):
        if isinstance(value, dict) and value:
            for key in sorted(value):
                walk(f"{path}.{key}" if path else key, value[key])
        else:
            lines.append(f"{path} = {value!r}")

    walk("", to_dict(config))
    return "\n".join(lines) + "\n"
