"""Command line: python -m efficient_lm.sparsity --run runs/x --out rows.jsonl"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from efficient_lm import checkpoint, metrics
from efficient_lm.config import run_id
from efficient_lm.generate import load_run, run_config
from efficient_lm.schema import ConfigError
from efficient_lm.sparsity.measure import Measured, Validation
from efficient_lm.sparsity.methods import METHODS
from pallas_kernels.commands import Parser, command

LAST = 5  # checkpoints whose CETT is averaged (2411.02335)


@command
def main(argv=None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(argv)
    options = {
        "methods": _methods(args.methods, "--methods"),
        "curves": _methods(args.curves, "--curves"),
        "dials": [_number(text, "--dials", 0.0, 1.0) for text in _split(args.dials)],
        "percent": _number(args.percent, "--percent", 0.0, 1000.0),
        "tokens": int(_number(args.tokens, "--tokens", 1.0, 1e12)),
        "calibration_tokens": int(_number(args.calibration_tokens, "--calibration-tokens", 1.0, 1e9)),
    }
    runs = [(run, _steps(run, args.checkpoints)) for run in _runs(args)]
    done = {(row.get("run_id"), row.get("last_step")) for row in metrics.read_rows(args.out)}
    with open(args.out, "a") as file:
        for run, steps in runs:
            if ((metrics.read_json(Path(run) / "run.json") or {}).get("run_id"), steps[-1]) in done:
                continue
            # A run at a time, so that a command that was cut short and is given again goes on with the next one.
            rows = list(measure(run, steps, **options))
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            print(f"{run}: {len(rows)} rows", flush=True)
    return 0


def measure(run, steps, *, methods, curves, dials, percent: float, tokens: int, calibration_tokens: int, devices=None):
    """Yields what rows.jsonl holds of the checkpoints `steps` of a run: one row for each method and dial.

    `at` says how the dial was found: 'zero', nothing but exact zeros is left out; 'rise', the largest at which the
    perplexity is `percent` % above the dense one; 'held' (method cett), the mean of that over the last checkpoints,
    which makes a curve over training smooth; 'dial', one of `dials`. `D` is tokens seen, `N` parameters in blocks,
    `last_step` the last of `steps`.
    """
    validation, errors = None, []
    for step in steps:
        cfg, _, params = load_run(run, step)
        validation = validation or Validation(cfg, tokens, calibration_tokens, devices)
        metrics.require_own_tokens(run, cfg, validation.spec)
        facts = _facts(run, cfg, step, steps[-1])
        for name in dict.fromkeys([*methods, *curves]):
            measured = Measured(cfg, params, validation, name)
            zero = measured.at(0.0)
            base = {**facts, "method": name, "dense_loss": zero["loss"]}
            if name in methods:
                rise = measured.at_rise(percent, zero)
                if name == methods[0]:
                    yield {**base, "at": "zero", **zero}
                yield {**base, "at": "rise", "percent": percent, **rise}
                errors += [rise["dial"]] if name == "cett" else []
            if name in curves:
                yield from ({**base, "at": "dial", **measured.at(dial)} for dial in dials)
    if len(steps) > 1 and errors:
        held = float(np.mean(errors[-LAST:]))
        for step in steps:
            cfg, _, params = load_run(run, step)
            scores = Measured(cfg, params, validation, "cett").at(held)
            yield {**_facts(run, cfg, step, steps[-1]), "method": "cett", "at": "held", **scores}


def _facts(run, cfg, step: int, last_step: int) -> dict:
    info = metrics.read_json(Path(run) / "run.json") or {}
    return {
        **(info.get("sweep") or {}),
        **{"run_id": run_id(cfg), "seed": cfg.seed, "N": info.get("params", {}).get("non_embedding")},
        **{"activation": " ".join(dict.fromkeys(getattr(ffn, "activation", "") for ffn in cfg.model.ffns.values()))},
        **{"d_model": cfg.model.d_model, "n_layers": cfg.model.n_layers},
        **{"device": info.get("hardware", {}).get("device_kind"), "last_step": last_step},
        **{"step": step, "D": step * cfg.train.batch_size * cfg.train.seq_len},
    }


def _runs(args) -> list[str]:
    """The run directories asked for: one, or those of a store whose run is done and has a checkpoint."""
    if args.run is not None:
        return [args.run]
    if not Path(args.store).is_dir():
        raise ConfigError(f"--store {args.store}: no such directory")
    infos = {path.parent: metrics.read_json(path) or {} for path in Path(args.store).glob("*/run.json")}
    done = [run for run, info in infos.items() if info.get("status") == "done"]
    runs = [run for run in done if checkpoint.steps(run / "ckpt")]
    # Runs of one architecture side by side: they share what is compiled.
    runs.sort(key=lambda run: (json.dumps((metrics.read_json(run / "config.json") or {}).get("model")), run.name))
    if not runs:
        raise ConfigError(f"--store {args.store}: has no finished run with a checkpoint")
    index, slash, count = args.part.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--part {args.part}: must be I/N with 1 <= I <= N")
    return [str(run) for run in np.array_split(runs, int(count))[int(index) - 1]]


def _steps(run, wanted: str) -> list[int]:
    """The checkpoints of a run that are nearest to `wanted` steps spaced evenly in their logarithm, rising."""
    run_config(run)  # says so where there is no run
    steps = [step for step in checkpoint.steps(Path(run) / "ckpt") if step]
    if not steps:
        raise ConfigError(f"--run {run}: has no checkpoint after step 0")
    if wanted == "all":
        return steps
    count = int(_number(wanted, "--checkpoints", 1.0, 1e6))
    even = np.geomspace(steps[-1], steps[0], count)
    return sorted({min(steps, key=lambda step: abs(step - target)) for target in even})


def _methods(text: str, flag: str) -> list[str]:
    names = _split(text)
    for name in names:
        METHODS.find(name, flag)
    return names


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text, flag: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ConfigError(f"{flag} {text}: must be a number in {low:g}..{high:g}")
    return value


def _parser():
    methods = "\n".join(f"  {name:<10} {method.about}" for name, method in METHODS.items())
    parser = Parser(
        prog="python -m efficient_lm.sparsity",
        description="Measure how many inputs of the matrices of trained runs can be left out, and what that costs in "
        "validation loss. Rows of JSON are appended to --out; a run that is there to its last checkpoint is left out.",
        epilog=f"exit codes: 0 done, 2 bad arguments\n\nmethods:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="DIR", help="run directory of efficient_lm.train")
    what.add_argument("--store", metavar="DIR", help="run store: every finished run in it that has a checkpoint")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the store")
    parser.add_argument("--out", required=True, metavar="ROWS.JSONL", help="file to append to")
    parser.add_argument("--methods", default="cett,topk,fatrelu", metavar="NAME,...", help="default %(default)s")
    parser.add_argument("--percent", default="1", metavar="P", help="rise in perplexity that --methods may cost (1)")
    parser.add_argument("--curves", default="", metavar="NAME,...", help="methods whose loss is measured at --dials")
    parser.add_argument("--dials", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", metavar="U,...", help="from 0 to 1")
    parser.add_argument("--checkpoints", default="1", metavar="N", help="evenly in log steps; 1 = the last, or 'all'")
    parser.add_argument("--tokens", default="65536", metavar="N", help="validation tokens that losses are taken on")
    parser.add_argument("--calibration-tokens", default="8192", metavar="N", help="tokens that thresholds are set on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
