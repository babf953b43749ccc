"""Arguments and error handling that the commands of this package share."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from analysis.load import C_ACCOUNTING, N_ACCOUNTING
from analysis.result import Options, plain
from pallas_kernels.commands import BadInput, Parser, command


@command
def run(main: Callable[[argparse.Namespace], int | None], parser: Parser, argv=None) -> int:
    """The command that parses and runs `main(args)`; any ValueError that says what is wrong with data is bad input.

    `args.command` is the command line as it was given.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = f"{parser.prog} {shlex.join(argv)}"
    try:
        return main(args)
    except ValueError as error:
        raise BadInput(str(error)) from error


def add_table_arguments(parser: Parser, counts: bool = True) -> None:
    """Which rows and columns to use; with `counts` also what N and C of a run store count."""
    group = parser.add_argument_group("table")
    group.add_argument(
        "--columns",
        metavar="NAME=SOURCE,...",
        help="name the columns: an existing column or an expression, e.g. N=params,C=flops,D=C/(6*N),loss=final_loss; "
        "of a column status only the runs that are done (or finished) are used",
    )
    group.add_argument("--where", metavar="QUERY", help='pandas query that a row must satisfy, e.g. "loss < 4"')
    group.add_argument(
        "--x-range",
        nargs="+",
        metavar="[COLUMN=]LO:HI",
        help="use only rows with LO <= COLUMN <= HI (COLUMN is C unless named); '--x-range LO HI' also works",
    )
    group.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave out the K highest losses")
    group.add_argument(
        "--duplicates",
        choices=("error", "drop", "keep"),
        default="error",
        help="rows equal to an earlier row",
    )
    if counts:
        group.add_argument(
            "--n", choices=sorted(N_ACCOUNTING),
            help="parameters that N counts, of a run store (default nonemb_head: all but the input embedding)",
        )  # fmt: skip
        group.add_argument(
            "--c", choices=sorted(C_ACCOUNTING), help="FLOPs that C counts, of a run store (default model_causal)"
        )


def add_fit_arguments(parser: Parser, bootstrap: int = 1000, seed_noise: bool = True) -> None:
    """How to draw intervals; `seed_noise` where IsoFLOP minima are among what is fitted."""
    group = parser.add_argument_group("intervals")
    group.add_argument(
        "--bootstrap",
        type=int,
        default=bootstrap,
        metavar="DRAWS",
        help=f"0: no intervals (default {bootstrap})",
    )
    group.add_argument("--level", type=float, default=0.95, help="coverage of the intervals (default 0.95)")
    group.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    if seed_noise:
        group.add_argument(
            "--seed-noise", type=float, metavar="NATS", help="known loss spread between seeds, for IsoFLOP minima"
        )


def add_weighted_argument(parser: Parser) -> None:
    parser.add_argument(
        "--weighted", action="store_true", help="weight IsoFLOP minima by 1/sigma^2 (default: all count the same)"
    )


def check_fit_arguments(args) -> None:
    if args.bootstrap < 0:
        raise ValueError(f"--bootstrap {args.bootstrap}: must be 0 or more")
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level}: must lie between 0 and 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    noise = getattr(args, "seed_noise", None)
    if noise is not None and not noise > 0:
        raise ValueError(f"--seed-noise {noise}: must be positive")


def refuse_unread(law: str, unread: dict) -> None:
    """Raises ValueError for the first option, flag -> whether it was given, that a fit of `law` would not read."""
    for flag, given in unread.items():
        if given:
            raise ValueError(f"{flag}: the fit of law {law} does not use it")


def fit_options(args, **others) -> Options:
    """Options from parsed arguments of `add_fit_arguments`, with `others` set too."""
    noise = getattr(args, "seed_noise", None)
    return Options(bootstrap=args.bootstrap, level=args.level, seed=args.seed, seed_noise=noise, **others)


def check_out(path: str | None, flag: str = "--out") -> None:
    """Raises ValueError before any work is done where `path` cannot be written."""
    if path and not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{flag} {path}: its directory does not exist")


def write_json(path: str | None, value) -> None:
    """Writes plain JSON; does nothing without a path."""
    if path:
        with open(path, "w") as file:
            json.dump(plain(value), file, indent=1, allow_nan=False)
            file.write("\n")


def table_options(args) -> dict:
    """Keyword arguments for `load_table` from parsed arguments."""
    if args.drop_highest < 0:
        raise ValueError(f"--drop-highest {args.drop_highest}: must be 0 or more")
    return {
        "columns": args.columns, "where": args.where, "x_range": parse_ranges(args.x_range),
        "drop_highest": args.drop_highest, "duplicates": args.duplicates, "n": getattr(args, "n", None),
        "c": getattr(args, "c", None),
    }  # fmt: skip


def parse_ranges(items) -> dict[str, tuple[float, float]]:
    """['N=1e6:1e9', '1e18:1e21'] -> {'N': (1e6, 1e9), 'C': (1e18, 1e21)}; two bare numbers are one range of C."""
    items = list(items or [])
    if len(items) == 2 and not any(mark in item for item in items for mark in ":="):
        items = [":".join(items)]
    out = {}
    for item in (part for text in items for part in text.split(",")):
        name, eq, bounds = item.rpartition("=")
        try:
            lo, hi = (float(value) if value else default for value, default in zip(
                bounds.split(":"), (0.0, float("inf")), strict=True))  # fmt: skip
        except ValueError:
            raise ValueError(f"--x-range {item!r}: expected [COLUMN=]LO:HI, e.g. C=1e18:1e21") from None
        if not lo < hi:
            raise ValueError(f"--x-range {item!r}: the lower end must be below the upper end")
        out[name.strip() if eq else "C"] = (lo, hi)
    return out


def parse_assignments(text: str | None, flag: str, free: bool = False) -> dict[str, float | None]:
    """'alpha=0.34,E=1.8' -> {'alpha': 0.34, 'E': 1.8}; with `free` also 'A_m=free' -> {'A_m': None}."""
    out = {}
    for item in (text or "").split(",") if text else []:
        name, eq, value = item.partition("=")
        try:
            out[name.strip()] = None if free and value.strip() == "free" else float(value)
        except ValueError:
            raise ValueError(f"{flag} {item!r}: expected NAME=NUMBER") from None
    return out


def parse_numbers(text: str | None, flag: str, zero: bool = False) -> tuple[float, ...]:
    """'1e20,5.76e23' -> (1e20, 5.76e23), positive, or 0 too with `zero`."""
    try:
        values = tuple(float(item) for item in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"{flag} {text!r}: expected numbers separated by commas") from None
    if any(not (0 < value < float("inf") or zero and value == 0) for value in values):
        raise ValueError(f"{flag} {text!r}: must be {'0 or more' if zero else 'positive'}")
    return values
