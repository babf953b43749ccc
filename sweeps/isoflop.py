"""IsoFLOP sweeps (approach 2 of 2203.15556): for each compute budget, models of several sizes trained to that budget.

Steps follow from exact FLOPs: steps = round(C / (training FLOPs per token x tokens per batch)), so that the realised
compute differs from the budget by at most half a step.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from efficient_lm import config as configs
from efficient_lm.counting import count_flops, count_params
from efficient_lm.schema import ConfigError, nearest
from sweeps import rules
from sweeps.combine import Cell, choices, product

CONVENTIONS = ("model_causal", "model_full", "hardware", "6n")


@dataclass(frozen=True)
class Ladder:
    """`count` compute budgets, each `ratio` times the one before, the dearest being `top` FLOPs."""

    top: float
    count: int = 5
    ratio: float = 3.0

    def budgets(self) -> tuple[float, ...]:
        """Rounded to three digits, so that a budget is a readable and stable label."""
        return tuple(float(f"{self.top / self.ratio**i:.2e}") for i in reversed(range(self.count)))


@dataclass(frozen=True)
class IsoFlop:
    """An IsoFLOP sweep, the product of architectures x budgets x shapes x seeds.

    archs: name -> overrides of config fields, or a Cell that has axes too. shapes: overrides that set a size, a list
    for all budgets or a dict {budget: list}; from a list, each budget takes the shapes with `tokens_per_parameter` in
    the range and, when there are more than `points`, those nearest to an even spacing in log parameters. Parameters are
    the active ones, which one token uses, without the input embedding: of a mixture of experts fewer than the N of
    the analysis package, which counts all experts. `lr` and `batch` (tokens) are rules of `sweeps.rules`; the batch is
    rounded to whole sequences. `seeds` is a number of seeds, or {budget: number}. `extra` are overrides for every cell.
    FLOPs are training FLOPs under `convention` (`efficient_lm.flops`).
    """

    archs: dict[str, dict | Cell]
    shapes: list[dict] | dict[float, list[dict]]
    budgets: tuple[float, ...] | Ladder
    lr: rules.Rule
    batch: rules.Rule
    points: int = 6
    tokens_per_parameter: tuple[float, float] = (5.0, 300.0)
    seeds: int | dict[float, int] = 1
    convention: str = "model_causal"
    min_steps: int = 20
    extra: dict = field(default_factory=dict)
    base: str = ""

    def __post_init__(self):
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"sweep.convention = {self.convention!r}: {nearest(self.convention, CONVENTIONS)}")
        for name in ("archs", "shapes"):
            if not getattr(self, name):
                raise ConfigError(f"sweep.{name} is empty: an IsoFLOP sweep needs at least one")
        if isinstance(self.budgets, Ladder) and isinstance(self.shapes, dict):
            raise ConfigError("sweep.shapes: must be a list when the budgets are a Ladder")
        for budget in self.all_budgets():
            if not (isinstance(budget, int | float) and 0 < budget < math.inf):
                raise ConfigError(f"sweep.budgets: {budget!r} must be a positive number of FLOPs")
            if isinstance(self.shapes, dict) and budget not in self.shapes:
                raise ConfigError(f"sweep.shapes has no list for budget {budget:g}; it has {sorted(self.shapes)}")

    def all_budgets(self) -> tuple[float, ...]:
        budgets = self.budgets.budgets() if isinstance(self.budgets, Ladder) else tuple(self.budgets)
        if not budgets:
            raise ConfigError("sweep.budgets is empty: an IsoFLOP sweep needs at least one")
        return budgets

    def with_top(self, top: float) -> "IsoFlop":
        """The same sweep with its ladder of budgets moved to end at `top` FLOPs."""
        return dataclasses.replace(self, budgets=dataclasses.replace(self.budgets, top=top))

    def cells(self, base: str) -> tuple[list[Cell], list[str], list[str]]:
        """(cells, notes on what was left out and why, warnings of the rules).

        `base` is the config file used where the sweep names none.
        """
        base = self.base or base
        values = configs.read_config_file(base).to_dict()
        cells, dropped, warnings = [], [], {}
        for arch in choices("arch", self.archs):
            for budget in self.all_budgets():
                found = self._at_budget(values, arch, float(budget), dropped, warnings)
                seeds = self.seeds.get(budget, 1) if isinstance(self.seeds, dict) else self.seeds
                for seed in range(seeds):
                    cells += product([Cell({"seed": seed}, {}, base)], found)
        return cells, dropped, list(warnings)

    def _at_budget(self, values, arch, budget, dropped, warnings):
        """Cells of one architecture at one budget: measured shapes, filtered, thinned, with steps, lr and batch."""
        shapes = self.shapes[budget] if isinstance(self.shapes, dict) else self.shapes
        label = f"{arch.axes['arch']} C={budget:g}"
        candidates = []
        for shape in shapes:
            cell = arch | Cell(self.extra) | Cell(shape, {"budget": budget})
            candidates.append(Candidate.size_up(values, cell, f"{label} {_short(shape)}", budget, self.convention))
        if not isinstance(self.shapes, dict):
            candidates = self._near_optimal(candidates)
            if not candidates:
                low, high = self.tokens_per_parameter
                dropped.append(f"{label}: no shape has {low:g}..{high:g} tokens per active parameter")
        cells = []
        for candidate in candidates:
            cell, steps = candidate.trained(self.lr, self.batch)
            if steps < self.min_steps:
                dropped.append(f"{label} {_short(candidate.shape)}: only {steps} steps (min_steps = {self.min_steps})")
                continue
            for rule in (self.lr, self.batch):
                warnings.update(dict.fromkeys(_summary(rule, candidate.size)))
            cells.append(cell)
        if 0 < len(cells) < 4:
            warnings[f"{label}: {len(cells)} sizes; a parabola with an interior minimum needs 4 or more"] = None
        return cells

    def _near_optimal(self, candidates):
        low, high = self.tokens_per_parameter
        inside = sorted((c for c in candidates if low <= c.tokens_per_parameter <= high), key=lambda c: c.parameters)
        if len(inside) <= self.points:
            return inside
        first, last = math.log(inside[0].parameters), math.log(inside[-1].parameters)
        chosen = {}
        for i in range(self.points):
            target = first + (last - first) * i / max(1, self.points - 1)
            rest = [c for c in inside if id(c) not in chosen]
            pick = min(rest, key=lambda c: abs(math.log(c.parameters) - target))
            chosen[id(pick)] = pick
        return sorted(chosen.values(), key=lambda c: c.parameters)


@dataclass(frozen=True)
class Candidate:
    """A shape at a budget. `parameters` counts what one token uses, without the input embedding."""

    cell: Cell
    shape: dict
    config: configs.Config
    budget: float
    flops_per_token: float
    parameters: int
    size: rules.RunSize

    @classmethod
    def size_up(cls, values: dict, cell: Cell, name: str, budget: float, convention: str) -> "Candidate":
        config = resolve(values, cell.overrides, name)
        params, per_token = count_params(config), count_flops(config)[convention]
        tokens = budget / per_token
        # The published laws count neither embedding nor logits in N and C.
        body = (per_token - 6 * params["head"]) * tokens
        size = rules.RunSize(params["non_embedding"], tokens, body, config.model.d_model)
        shape = {"n_layers": config.model.n_layers, "d_model": config.model.d_model}
        return cls(cell, shape, config, budget, per_token, params["active"], size)

    @property
    def tokens_per_parameter(self) -> float:
        return self.size.D / self.parameters

    def trained(self, lr: rules.Rule, batch: rules.Rule) -> tuple[Cell, int]:
        """The cell with batch size, learning rate and steps, and the number of steps."""
        sequences = max(1, round(batch(self.size) / self.config.train.seq_len))
        sequences = max(1, round(sequences / self.config.train.grad_accum)) * self.config.train.grad_accum
        steps = round(self.budget / (self.flops_per_token * sequences * self.config.train.seq_len))
        settings = {
            "optim.lr": float(f"{lr(self.size):.4g}"),
            "train.batch_size": sequences,
            "train.steps": max(1, steps),
        }
        return self.cell | Cell(settings, dict(self.shape)), steps


def resolve(values: dict, overrides: dict, cell: str) -> configs.Config:
    """Checked config from the nested dict of a config file and dotted overrides. Raises ConfigError, naming `cell`."""
    values = _copied(values)
    try:
        for key, value in overrides.items():
            configs.set_path(values, key, value)
        return configs.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in cell {cell})") from None


def _copied(value):
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _summary(rule, size):
    """Warnings without the number that differs from cell to cell, so that a sweep gets one line a rule."""
    return [text.split(" = ")[0] + text[text.index(" outside") :] for text in rule.warnings(size)]


def _short(shape):
    return " ".join(f"{key}={value}" for key, value in shape.items())
