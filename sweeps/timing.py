"""Predicted time of runs, from measured steps; and budgets given as text ('2 gpu-hours', '20 minutes', '1e18 flops').

A calibration file holds measured points (architecture, its settings, device, FLOPs per step, seconds per step). A
prediction interpolates log seconds over log FLOPs between the points of the same architecture with the same settings,
of one kind of device: that of this process if any was measured there, else the one measured last.
"""

import hashlib
import json
import math
import re
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from efficient_lm import config as configs
from efficient_lm.metrics import write_json
from efficient_lm.schema import ConfigError, to_dict
from sweeps.store import read_json

_SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Budget:
    """What a sweep may cost in all: `device_seconds` (summed over workers), `wall_seconds`, or `flops`."""

    kind: str
    amount: float
    text: str

    def cost(self, seconds: float | None, flops: float, workers: int) -> float:
        """What a cell counts against the budget; time on `workers` workers is shared evenly."""
        if self.kind == "flops":
            return flops
        if seconds is None:
            raise ConfigError(
                f"budget = {self.text!r}: needs predicted times; add --calibrate (times steps) or --tokens-per-second"
            )
        return seconds if self.kind == "device_seconds" else seconds / workers


def parse_budget(text: str) -> Budget:
    """'2 gpu-hours', '90 cpu-minutes' (device time), '20 minutes' (wall clock), '1e18 flops'. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*(?:(gpu|tpu|cpu|core|device)[- ])?([a-z]+)\s*", text.lower())
    allowed = "allowed: a number and a unit, as in '2 gpu-hours', '30 minutes', '1e18 flops'"
    try:
        amount = float(match[1])
    except (TypeError, ValueError):
        raise ConfigError(f"budget = {text!r}: {allowed}") from None
    unit = match[3]
    if not 0 < amount < math.inf:
        raise ConfigError(f"budget = {text!r}: must be positive; {allowed}")
    if unit in ("flop", "flops") and not match[2]:
        return Budget("flops", amount, text)
    seconds = _SECONDS.get(unit) or _SECONDS.get(unit.removesuffix("s"))
    if seconds is None:
        raise ConfigError(f"budget = {text!r}: unknown unit {unit!r}; {allowed}")
    return Budget("device_seconds" if match[2] else "wall_seconds", amount * seconds, text)


@dataclass(frozen=True)
class Point:
    """A measured step: `overhead` are the seconds of a run outside its steps (start, compile, evaluation)."""

    arch: str
    settings: str
    device: str
    flops_per_step: float
    tokens_per_step: int
    seconds_per_step: float
    overhead: float


def settings_of(config: configs.Config) -> str:
    """8 hex digits of what decides the time of a step beside its FLOPs.

    Of the model all but its numbers: shapes of one sweep differ in them (layers, width, heads), and FLOPs count most.
    """
    train = config.train
    rest = [config.data.pack, config.optim.name, train.seq_len, train.steps_per_call]
    text = json.dumps([_without_numbers(to_dict(config.model)), *rest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without_numbers(value):
    if isinstance(value, dict):
        return {key: _without_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_numbers(item) for item in value]
    return value if isinstance(value, str | bool) else None


class Calibration:
    """Measured points, or one throughput in tokens per second for everything. `device` is the kind planned for."""

    def __init__(self, points=(), tokens_per_second: float | None = None, device: str = ""):
        self.points = list(points)
        self.tokens_per_second = tokens_per_second
        self.device = device

    @classmethod
    def read(cls, path) -> "Calibration":
        """The points of a calibration file; none where the file does not exist. Raises ConfigError.

        Points of the older format, which does not tell settings, are left out with a note on standard error.
        """
        if not Path(path).exists():
            return cls()
        try:
            found = read_json(path)["points"]
            points = [Point(**point) for point in found if "settings" in point]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"calibration = {str(path)!r}: not a calibration file ({error})") from None
        if len(points) < len(found):
            old = f"{len(found) - len(points)} points of an older format are not used; measure again with --calibrate"
            print(f"note: calibration = {str(path)!r}: {old}", file=sys.stderr)
        return cls(points)

    def write(self, path) -> None:
        write_json(path, {"points": [asdict(point) for point in self.points]})

    def add_runs(self, store, cells) -> None:
        """Adds what finished runs of the store measured themselves."""
        for cell in cells:
            run = store.run(cell.run_id)
            if run.get("status") == "done":
                self._add(cell, run)

    def _add(self, cell, run):
        step, wall = run.get("mean_step_seconds"), run.get("wall_seconds")
        if not step:
            return
        overhead = max(0.0, (wall or 0.0) - step * run["steps_done"])
        device = (run.get("hardware") or {}).get("device_kind", "")
        self.points.append(Point(*_key(cell), device, cell.flops / cell.steps, cell.batch_tokens, step, overhead))

    def devices(self, cells) -> list[str]:
        """Where the steps were measured that the cells' times come from; [] for a given throughput."""
        if self.tokens_per_second:
            return []
        return sorted({point.device for cell in cells for point in self._points(cell)})

    def _points(self, cell) -> list[Point]:
        key = _key(cell)
        same = [p for p in self.points if (p.arch, p.settings) == key]
        here = [p for p in same if p.device == self.device]
        return here or [p for p in same if p.device == same[-1].device]

    def predict(self, cell) -> float | None:
        """Seconds that a planned cell takes on one worker; None where nothing was measured."""
        if self.tokens_per_second:
            return cell.tokens / self.tokens_per_second
        points = self._points(cell)
        if not points:
            return None
        step = _interpolate(points, cell.flops / cell.steps)
        return cell.steps * step + statistics.median(p.overhead for p in points)

    def measure(self, cells, per_arch: int = 3, trainer=None, log=print) -> None:
        """Times the real compiled step: short runs of the cheapest, middle and dearest step of each architecture."""
        if trainer is None:
            from efficient_lm.train import train as trainer
        groups = {}
        for cell in cells:
            groups.setdefault(_key(cell), []).append(cell)
        for group in groups.values():
            own = sorted(group, key=lambda c: c.flops / c.steps)
            picks = sorted({round(i * (len(own) - 1) / max(1, per_arch - 1)) for i in range(per_arch)})
            for cell in (own[i] for i in picks):
                log(f"timing {cell.label}")
                self._time_one(cell, trainer)

    def _time_one(self, cell, trainer):
        call = cell.config.train.steps_per_call
        short = configs.replace(
            cell.config,
            **{"train.steps": max(8, 4 * call), "log.progress": False, "log.wandb": "off", "train.checkpoint_every": 0},
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer(short, folder)
            run = json.loads((Path(folder) / "run.json").read_text())
        if run.get("status") == "preempted":  # the trainer takes signals for itself
            raise KeyboardInterrupt
        self._add(cell, run)


def _key(cell) -> tuple[str, str]:
    return cell.arch, settings_of(cell.config)


def _interpolate(points, flops: float) -> float:
    """Seconds per step at `flops` per step, linear in logarithms between measured points.

    Above them the FLOP rate of the largest holds; below them the seconds of the smallest, since small steps cost
    dispatch rather than FLOPs.
    """
    measured = {}
    for point in points:
        measured.setdefault(point.flops_per_step, []).append(point.seconds_per_step)
    x = sorted(measured)
    seconds = [statistics.median(measured[value]) for value in x]
    if flops > x[-1]:
        return seconds[-1] * flops / x[-1]
    return math.exp(np.interp(math.log(flops), np.log(x), np.log(seconds)))
