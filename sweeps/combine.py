"""Sweeps as lists of cells: overrides of config fields plus the labels (axes) that tables and fits group by.

    product(choices("arch", {"attention": {...}, "gla": {...}}), axis("model.d_model", [32, 64], label="d"))

Every combinator takes and returns lists of cells, so that they nest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from efficient_lm.schema import ConfigError


@dataclass(frozen=True)
class Cell:
    """One run: `overrides` {'model.d_model': 64} of config file `base` ('file.py:variant'), `axes` {'arch': 'gla'}.

    `base` '' means the sweep file itself, which then has a `get_config` beside `get_sweep`, for the same argument.
    """

    overrides: dict = field(default_factory=dict)
    axes: dict = field(default_factory=dict)
    base: str = ""

    def __or__(self, other: "Cell") -> "Cell":
        """Both cells' settings; a field set to two values, or two bases, is an error."""
        if self.base and other.base and self.base != other.base:
            raise ConfigError(f"sweep: a cell has two base configs, {self.base!r} and {other.base!r}")
        return Cell(
            _merge(self.overrides, other.overrides, "field"),
            _merge(self.axes, other.axes, "axis"),
            self.base or other.base,
        )

    def describe(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in (self.axes or self.overrides).items()) or "(base config)"


def axis(field_name: str, values: Iterable, label: str | None = None) -> list[Cell]:
    """One cell per value of a config field; the axis is called `label` (default: the last part of the name)."""
    label = label or field_name.rsplit(".", 1)[-1]
    return [Cell({field_name: value}, {label: _scalar(value)}) for value in values]


def choices(label: str, named: Mapping[str, Mapping | Cell]) -> list[Cell]:
    """One cell per named set of overrides, e.g. architectures: {"gla": {"model.pattern": ("gla",)}, ...}.

    A Cell in the place of overrides brings axes of its own.
    """
    cells = {name: item if isinstance(item, Cell) else Cell(dict(item)) for name, item in named.items()}
    return [cell | Cell({}, {label: name}) for name, cell in cells.items()]


def product(*groups: Iterable[Cell]) -> list[Cell]:
    """Every combination of one cell from each group, the last group varying fastest."""
    cells = [Cell()]
    for group in groups:
        group = as_cells(group)
        cells = [left | right for left in cells for right in group]
    return cells


def zip_cells(*groups: Iterable[Cell]) -> list[Cell]:
    """First cells combined, second cells combined, ...; the groups must be equally long."""
    groups = [as_cells(group) for group in groups]
    lengths = [len(group) for group in groups]
    if len(set(lengths)) > 1:
        raise ConfigError(f"sweep: zip_cells needs groups of equal length, got {lengths}")
    return [product(*([cell] for cell in row))[0] for row in zip(*groups, strict=True)]


def chain(*groups: Iterable[Cell]) -> list[Cell]:
    """All cells of all groups, one group after the other."""
    return [cell for group in groups for cell in as_cells(group)]


def based_on(base: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cells as variations of config file `base` ('file.py:variant')."""
    return product([Cell(base=base)], cells)


def as_cells(values: Iterable) -> list[Cell]:
    """A list of cells from what a sweep file gives: cells, or plain override dicts, whose fields become the axes."""
    if isinstance(values, Cell | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"sweep: expected a list of cells or override dicts, got {type(values).__name__}")
    cells = []
    for index, value in enumerate(values):
        if isinstance(value, Mapping):
            value = Cell(dict(value), {key.rsplit(".", 1)[-1]: _scalar(item) for key, item in value.items()})
        if not isinstance(value, Cell):
            raise ConfigError(f"sweep: cell {index} is {value!r}: must be a Cell or a dict of overrides")
        cells.append(value)
    return cells


def _merge(left, right, what):
    for key in left.keys() & right.keys():
        if left[key] != right[key]:
            raise ConfigError(f"sweep: {what} {key!r} is set to {left[key]!r} and to {right[key]!r} in one cell")
    return {**left, **right}


def _scalar(value):
    if isinstance(value, list | tuple):
        return "+".join(str(item) for item in value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
