"""What a sweep would run and what it would cost: `python -m sweeps.plan --config configs/sweeps/isoflop.py`."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import jax

from efficient_lm import config as configs
from efficient_lm import hardware
from efficient_lm.counting import count_flops, count_params
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command
from sweeps.combine import Cell, as_cells
from sweeps.isoflop import IsoFlop, Ladder, resolve
from sweeps.local import gpus, split_cores
from sweeps.store import Store
from sweeps.tables import table, totals
from sweeps.timing import Budget, Calibration, parse_budget
from sweeps.worker import end_with_parent

COLUMNS = ("run_id", "arch", "seed", "d_model", "n_layers", "steps", "tokens", "flops")  # of every cell, for --where


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its resolved config and what it costs. FLOPs are training FLOPs (model_causal)."""

    run_id: str
    config: configs.Config
    axes: dict
    base: str
    overrides: dict
    params: dict
    flops_per_token: float
    predicted_seconds: float | None = None

    @classmethod
    def of(cls, cell: Cell, values: dict) -> "PlannedCell":
        """Resolves a cell on the nested dict `values` of its base config. Raises ConfigError."""
        axes = {f"sweep.{key}": value for key, value in cell.axes.items()}
        config = resolve(values, {**cell.overrides, **axes}, cell.describe())
        if not config.name:
            config = dataclasses.replace(config, name=str(cell.axes.get("arch", "")))
        flops = count_flops(config)["model_causal"]
        params = count_params(config)
        return cls(configs.run_id(config), config, cell.axes, cell.base, cell.overrides, params, flops)

    @property
    def arch(self) -> str:
        return str(self.axes.get("arch", "+".join(self.config.model.pattern)))

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def d_model(self) -> int:
        return self.config.model.d_model

    @property
    def n_layers(self) -> int:
        return self.config.model.n_layers

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def batch_tokens(self) -> int:
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def label(self) -> str:
        axes = {key: value for key, value in self.axes.items() if key != "arch"}
        text = " ".join(f"{key}={_short(value)}" for key, value in axes.items())
        seed = f" seed={self.config.seed}" if self.config.seed and "seed" not in axes else ""
        return f"{self.arch} {text}{seed}".strip()

    def as_json(self) -> dict:
        """What sweep.json keeps of a cell."""
        return {
            "run_id": self.run_id,
            "axes": self.axes,
            "base": self.base,
            "overrides": {**self.overrides, **{f"sweep.{key}": value for key, value in self.axes.items()}},
            "params": self.params,
            "flops": self.flops,
            "tokens": self.tokens,
            "steps": self.steps,
            "predicted_seconds": self.predicted_seconds,
        }


@dataclass
class Plan:
    """Cells in the order of the sweep file, what was left out and why, warnings, and where times were measured."""

    name: str
    config: str
    cells: list[PlannedCell]
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured_on: list[str] = field(default_factory=list)

    def predict(self, calibration: Calibration) -> None:
        self.measured_on = calibration.devices(self.cells)
        self.cells = [dataclasses.replace(c, predicted_seconds=calibration.predict(c)) for c in self.cells]

    def total_seconds(self) -> float | None:
        """Device seconds of all cells; None when one is unknown."""
        seconds = [cell.predicted_seconds for cell in self.cells]
        return None if None in seconds else sum(seconds)


def make_plan(spec: str, overrides=()) -> Plan:
    """Plan of the sweep file 'configs/sweeps/x.py[:arg]' with config overrides for every cell. Raises ConfigError."""
    return _plan_of(configs.read_config_file(spec, "get_sweep"), spec, dict(overrides))


def plan_within(spec: str, overrides, budget: Budget, calibration: Calibration, workers: int) -> Plan:
    """The largest plan that costs at most `budget`: moves a ladder of compute budgets, or drops the dearest cells."""
    sweep, overrides = configs.read_config_file(spec, "get_sweep"), dict(overrides)
    if not isinstance(sweep, IsoFlop) or not isinstance(sweep.budgets, Ladder):
        plan = _plan_of(sweep, spec, overrides)
        plan.predict(calibration)
        return _drop_dearest(plan, budget, workers)

    def within(exponent):
        plan = _plan_of(sweep.with_top(sweep.budgets.top * 2 ** (exponent / 2)), spec, overrides)
        plan.predict(calibration)
        cost = sum(budget.cost(c.predicted_seconds, c.flops, workers) for c in plan.cells)
        return plan if cost <= budget.amount else None

    # Tops in half powers of two around the file's own: the cost grows with the top, apart from rounding.
    best, exponent = within(0), 0
    if best:
        with contextlib.suppress(ConfigError):  # no shape is in range at so large a budget
            while exponent < 200 and (larger := within(exponent + 1)):
                best, exponent = larger, exponent + 1
    else:
        while exponent > -200 and best is None:
            exponent -= 1
            try:
                best = within(exponent)
            except ConfigError:  # no cell is left at so small a budget
                break
    if best is None:
        raise ConfigError(f"budget = {budget.text!r}: too small for a single cell of {spec}")
    if exponent:
        budgets = sorted({cell.axes["budget"] for cell in best.cells})
        best.dropped.append(
            f"compute budgets set to {', '.join(f'{b:.3g}' for b in budgets)} FLOPs to fit {budget.text!r} "
            f"(the sweep file has {', '.join(f'{b:.3g}' for b in sweep.all_budgets())})"
        )
    return best


def choose(plan: Plan, where: str) -> None:
    """Keeps the cells that satisfy a pandas query over COLUMNS and their axes. Raises ConfigError."""
    import pandas as pd  # slow to import

    cells = pd.DataFrame([{name: getattr(cell, name) for name in COLUMNS} | cell.axes for cell in plan.cells])
    try:
        wanted = cells.eval(where).astype(bool)
    except Exception as error:  # pandas raises many kinds
        raise ConfigError(f"where = {where!r}: not a query over {', '.join(cells)} ({error})") from None
    if not wanted.any():
        raise ConfigError(f"where = {where!r}: no cell of {plan.config} satisfies it")
    if not wanted.all():
        plan.dropped.append(f"{(~wanted).sum()} of {len(cells)} cells: not {where}")
    plan.cells = [cell for cell, keep in zip(plan.cells, wanted, strict=True) if keep]


def _drop_dearest(plan: Plan, budget: Budget, workers: int) -> Plan:
    """Keeps whole compute budgets, cheapest first (single cells where there is no such axis), while they fit."""
    groups = {}
    for cell in plan.cells:
        groups.setdefault(cell.axes.get("budget", cell.run_id), []).append(cell)
    kept, spent = set(), 0.0
    for key, cells in sorted(groups.items(), key=lambda item: sum(c.flops for c in item[1])):
        cost = sum(budget.cost(c.predicted_seconds, c.flops, workers) for c in cells)
        if spent + cost > budget.amount:
            what = f"budget {key:g}" if "budget" in cells[0].axes else cells[0].label
            plan.dropped.append(f"{what}: {len(cells)} cells do not fit {budget.text!r}")
            continue
        kept.update(c.run_id for c in cells)
        spent += cost
    plan.cells = [cell for cell in plan.cells if cell.run_id in kept]
    if not plan.cells:
        raise ConfigError(f"budget = {budget.text!r}: too small for a single cell of {plan.config}")
    return plan


def _plan_of(sweep, spec: str, overrides: dict) -> Plan:
    # Overrides from a command line are text, and must mean the same here and in the commands that `launch` prints.
    overrides = {k: configs.parse_literal(v) if isinstance(v, str) else v for k, v in overrides.items()}
    path = spec.partition(":")[0]
    plan, replaced = Plan(os.path.splitext(os.path.basename(path))[0], spec, []), []
    if isinstance(sweep, IsoFlop):
        sweep = dataclasses.replace(sweep, extra={**sweep.extra, **overrides})
        cells, plan.dropped, plan.warnings = sweep.cells(spec)
    else:
        cells = as_cells(sweep)
        for key, value in overrides.items():
            count = sum(cell.overrides.get(key, value) != value for cell in cells)
            replaced += [f"config.{key} = {value}: replaces what {count} of {len(cells)} cells set"] if count else []
        cells = [dataclasses.replace(cell, overrides={**cell.overrides, **overrides}) for cell in cells]
        plan.warnings += replaced
    if not cells:
        raise ConfigError(f"sweep = {spec!r}: has no cells" + "".join(f"; {note}" for note in plan.dropped[:3]))
    bases, seen = {}, {}
    for index, cell in enumerate(cells):
        cell = dataclasses.replace(cell, base=cell.base or spec)
        if cell.base not in bases:
            bases[cell.base] = configs.read_config_file(cell.base).to_dict()
        planned = PlannedCell.of(cell, bases[cell.base])
        if planned.run_id in seen:
            raise ConfigError(
                f"sweep = {spec!r}: cells {seen[planned.run_id]} and {index} are the same run ({cell.describe()}); "
                + "; ".join(["give them different fields or seeds", *replaced])
            )
        seen[planned.run_id] = index
        plan.cells.append(planned)
    return plan


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ command line


def add_plan_arguments(parser: Parser) -> None:
    """Options that `plan` and `launch` share."""
    parser.add_argument("--config", required=True, help="sweep file with get_sweep(), as path.py or path.py:argument")
    parser.add_argument("--where", metavar="QUERY", help="""only these cells, e.g. "seed == 2 and arch != 'relu'" """)
    parser.add_argument("--budget", help="'2 gpu-hours', '20 minutes', '1e18 flops': the largest plan that fits")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per accelerator, else per core)")
    parser.add_argument("--calibrate", action="store_true", help="time a few steps of each architecture first")
    parser.add_argument("--calibration", default="runs/calibration.json", help="where measured steps are kept")
    parser.add_argument("--tokens-per-second", type=float, help="predict time from this throughput instead")


def plan_from_arguments(args, overrides, store: Store | None) -> Plan:
    """The plan that the command line asks for, with predicted times where something was measured."""
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: must be at least 1")
    if args.tokens_per_second is not None and not args.tokens_per_second > 0:
        raise ConfigError(f"--tokens-per-second {args.tokens_per_second}: must be positive")
    if args.where and args.budget:
        raise ConfigError(f"--where {args.where!r}: can't be combined with --budget, which chooses the cells itself")
    workers, own_gpus = default_workers(args.workers), gpus()
    if not (args.calibrate or own_gpus):
        return _planned(args, overrides, store, workers)
    # Counting FLOPs starts JAX (which operator serves depends on the device). What it takes of a GPU and the cores that
    # its threads keep end with this process, before the workers start.
    share = split_cores(workers)[0], own_gpus[:1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_planner, share) as planner:
        return planner.submit(_planned, args, overrides, store, workers).result()


def _start_planner(cores: list[int], own_gpus: list[str]) -> None:
    """Gives this process the cores and the GPU of one worker; its JAX leaves the GPU's memory to other processes."""
    end_with_parent(signal.SIGKILL)
    os.sched_setaffinity(0, cores)
    if own_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _planned(args, overrides, store: Store | None, workers: int) -> Plan:
    budget = parse_budget(args.budget) if args.budget else None
    calibration = Calibration.read(args.calibration)
    hardware.require_devices()
    calibration.device = jax.devices()[0].device_kind
    plan = make_plan(args.config, overrides)
    if args.where:
        choose(plan, args.where)
    if args.calibrate:
        calibration.measure(plan.cells)
        calibration.write(args.calibration)
    if store:
        calibration.add_runs(store, plan.cells)
    calibration.tokens_per_second = args.tokens_per_second
    if budget:
        plan = plan_within(args.config, overrides, budget, calibration, workers)
    else:
        plan.predict(calibration)
    plan.warnings += configs.without_effect([cell.config for cell in plan.cells], overrides)
    return plan


def default_workers(asked: int | None) -> int:
    """`asked`, or one worker per GPU, or one per core that this process may use."""
    return asked or len(gpus()) or len(os.sched_getaffinity(0))


def print_notes(plan: Plan, file=None) -> None:
    for note in plan.dropped:
        print(f"left out: {note}", file=file)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=file)


@command
def main(argv=None) -> int:
    parser = Parser(
        prog="python -m sweeps.plan",
        description="Print the cells of a sweep and what they cost; run nothing (but --calibrate times a few steps).",
        epilog="Config fields of every cell can be overridden: --config.train.seq_len=256",
    )
    add_plan_arguments(parser)
    parser.add_argument("--store", help="run store whose states to show, e.g. runs/NAME")
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)
    store = Store(args.store) if args.store else None
    plan = plan_from_arguments(args, overrides, store)
    print(table(plan, store))
    print_notes(plan)
    print(totals(plan, default_workers(args.workers), store))
    return 0


if __name__ == "__main__":
    sys.exit(main())
