"""Command line of efficient_lm.train: arguments, help that lists every config field, exit codes."""

import argparse
import dataclasses
import sys
import traceback
import typing

from efficient_lm import config as configs
from efficient_lm import hardware
from efficient_lm.ffn import FFNS
from efficient_lm.mixers import MIXERS
from efficient_lm.schema import ConfigError
from pallas_kernels.commands import Parser, command

# 75 is EX_TEMPFAIL of sysexits.h: the same command, run again, goes on.
EXIT_CODES = {"done": 0, "failed": 1, "diverged": 3, "preempted": 75}


@command
def main(train, argv=None) -> int:
    """Parse `argv`, run `train(config, workdir)`, print one closing line, return the exit code."""
    overrides, rest = configs.split_args(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(rest)
    try:
        if args.distributed:
            hardware.join_hosts(args.distributed)
        hardware.require_devices()
        info = train(configs.load(args.config, overrides), args.workdir)
    except ConfigError:
        raise
    except Exception as error:
        traceback.print_exc()
        info = {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(closing_line(info, args.workdir), file=sys.stdout if info["status"] == "done" else sys.stderr)
    return EXIT_CODES[info["status"]]


def closing_line(info: dict, workdir) -> str:
    """How the run ended."""
    if info["status"] == "done":
        return (
            f"done: {workdir}: step {info['steps_done']}, validation loss {info['final_loss']:.4f} nats per token, "
            f"{info['final_bpb']:.4f} bits per byte, {info['wall_seconds']:.1f} s"
        )
    return f"{info['status']}: {workdir}: {info['reason']}"


def _parser():
    fields = "\n".join(field_lines(configs.Config) + registry_lines())
    parser = Parser(
        prog="python -m efficient_lm.train",
        description="Train one model. Run the same command again to resume a run that was stopped.",
        epilog=(
            "exit codes: 0 done (also when the run was already done), 1 failed, 2 bad config or arguments, "
            "3 diverged, 75 preempted by SIGTERM or SIGINT (run again to resume)\n\n"
            f"config fields, set with --config.FIELD=VALUE:\n{fields}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="for example configs/dense.py:tiny")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run directory: config, metrics, checkpoints")
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="ADDRESS:PORT,INDEX,COUNT",
        help="this is one of several processes (hosts) of the run, all with the same command and a workdir on a shared "
        "file system; under SLURM, Open MPI and on TPU pods the value is not needed",
    )
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", help="override one field, for example --config.model.d_model=256"
    )
    return parser


def field_lines(cls, prefix: str = "") -> list[str]:
    """One line per field of a config class: path, type, default, what it is."""
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            lines += ["", *field_lines(hints[field.name], f"{prefix}{field.name}.")]
            continue
        value = field.default_factory() if field.default is dataclasses.MISSING else field.default
        choices = field.metadata.get("choices")
        what = "|".join(map(str, choices)) if choices else getattr(hints[field.name], "__name__", "")
        lines.append(f"  {prefix + field.name:<26} {what} = {value!r}: {field.metadata.get('doc', '')}")
    return lines


def registry_lines() -> list[str]:
    """The settings of every registered mixer and ffn."""
    lines = []
    for section, registry in (("mixers", MIXERS), ("ffns", FFNS)):
        for name in sorted(registry):
            own = field_lines(registry[name].Config, f"model.{section}.{name}.")
            lines += ["", *(line for line in own if f".{name}.kind " not in line)]
    return lines
