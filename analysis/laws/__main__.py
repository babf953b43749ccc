"""Lists the laws: formula, variables with units, published constants, source and limits.

python -m analysis.laws                     # every law, one paragraph each
python -m analysis.laws leverage clark      # these in full
"""

import argparse
import inspect
import sys

from analysis import cli
from analysis.laws import Law, all_laws, get_law
from pallas_kernels.commands import Parser


def describe(law: Law, full: bool = False) -> str:
    """A paragraph of text; `full` adds parameters, limits and the notes of the law's file."""
    lines = [f"{law.name}: {law.title}", f"  {law.formula}", f"  source: {law.source}"]
    for variable, kind in [*((v, "input") for v in law.variables), (law.target, "target")]:
        lines.append(f"  {kind:<7} {variable.name} [{variable.unit}] {variable.meaning}")
    for name, constants in law.constants.items():
        values = ", ".join(f"{key}={value:.7g}" for key, value in constants.values.items())
        note = "; ".join(text for text in (constants.source, constants.fitted_on, constants.note) if text)
        lines.append(f"  constants {name}: {values} ({note})")
    if full:
        for parameter in law.parameters:
            held = f"; held at {law.held[parameter.name]:g} unless freed" if parameter.name in law.held else ""
            lines.append(
                f"  parameter {parameter.name} in [{parameter.lo:g}, {parameter.hi:g}]: {parameter.meaning}{held}"
            )
        residual = "squares" if law.delta is None else f"Huber, delta {law.delta:g}"
        how = "in a way of its own" if law.fitter else f"on {law.residual} residuals ({residual})"
        lines += [f"  fitted {how}", f"  limits: {law.limits}"]
        notes = inspect.getmodule(law.predict).__doc__.rstrip().splitlines()  # says what derived quantities mean
        lines += ["", *(f"  {line}".rstrip() for line in notes)]
    return "\n".join(lines)


def parser() -> Parser:
    out = Parser(
        prog="python -m analysis.laws",
        description="Lists the laws that analysis.fit can fit: formula, variables with units, constants and source.",
    )
    out.add_argument("name", nargs="*", help="describe these in full (default: all, in short)")
    return out


def main(args: argparse.Namespace) -> None:
    laws = [get_law(name) for name in args.name] or [law for _, law in sorted(all_laws().items())]
    print("\n\n".join(describe(law, bool(args.name)) for law in laws))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
