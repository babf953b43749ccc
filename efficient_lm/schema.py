"""Frozen dataclasses from nested dicts, once, with one-line errors.

A config class is a frozen dataclass whose fields are declared with `setting(default, "doc", ...)`. `build` turns
a nested dict into such a class and refuses, in one line that names field, value and what is allowed: unknown
fields (with the nearest valid name), wrong types, values outside `choices` or below `low`.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from pallas_kernels.commands import BadInput


class ConfigError(BadInput):
    """A config that can't be used. The message is one line: field, value, what is allowed."""


def setting(default, doc, *, choices=None, low=None, high=None, volatile=False):
    """A dataclass field with documentation and limits.

    `volatile` fields say how or where a run executes, not what it computes: they don't enter `run_id`.
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "volatile": volatile}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls, doc, *, volatile=False):
    """A nested config section."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc, "volatile": volatile})


def nearest(name: str, allowed) -> str:
    """`; did you mean 'x'?` when something is near, then the allowed names."""
    allowed = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def build(cls, values, path: str = "config"):
    """An instance of config dataclass `cls` from a (possibly partial) nested mapping. Raises ConfigError."""
    if dataclasses.is_dataclass(values) and isinstance(values, cls):
        return values
    if not hasattr(values, "items"):
        raise ConfigError(f"{path} = {values!r}: must be a section with fields {_names(cls)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{path}.{name} = {_short(value)}: no such field; {nearest(name, fields)}")
        kwargs[name] = _convert(value, hints[name], fields[name], f"{path}.{name}")
    return cls(**kwargs)


def to_dict(config) -> dict:
    """Nested plain dict (JSON types; tuples become lists) of a config dataclass, every field included."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def without_volatile(config) -> dict:
    """`to_dict` without the fields that don't change what is computed."""
    if dataclasses.is_dataclass(config):
        return {
            f.name: without_volatile(getattr(config, f.name))
            for f in dataclasses.fields(config)
            if not f.metadata.get("volatile")
        }
    if isinstance(config, dict):
        return {k: without_volatile(v) for k, v in config.items()}
    return to_dict(config)


def _names(cls) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _convert(value, hint, field, path):
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not types.NoneType)
    value = _typed(value, hint, path)
    meta = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if meta.get("choices") is not None and item not in meta["choices"]:
            raise ConfigError(f"{path} = {_short(item)}: {nearest(item, meta['choices'])}")
        if meta.get("low") is not None and item < meta["low"]:
            raise ConfigError(f"{path} = {_short(item)}: must be at least {meta['low']}")
        if meta.get("high") is not None and item > meta["high"]:
            raise ConfigError(f"{path} = {_short(item)}: must be at most {meta['high']}")
    return value


def _typed(value, hint, path) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin is Any:
        return value
    if origin is dict:
        if hasattr(value, "items"):
            return dict(value)
        raise ConfigError(f"{path} = {_short(value)}: must be a section (a dict)")
    if origin is tuple:
        item = (typing.get_args(hint) or (Any,))[0]
        if isinstance(value, str):
            value = [v.strip() for v in value.split(",") if v.strip()]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {_short(value)}: must be a list of {item.__name__}")
        return tuple(_typed(v, item, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is bool:
        if isinstance(value, bool):
            return value
    elif origin is int:
        if isinstance(value, bool):
            pass
        elif isinstance(value, int):
            return value
        elif isinstance(value, float) and value.is_integer():
            return int(value)
    elif origin is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{path} = {value}: must be finite")
            return float(value)
    elif isinstance(value, origin):
        return value
    raise ConfigError(f"{path} = {_short(value)}: must be {origin.__name__}, got {type(value).__name__}")
