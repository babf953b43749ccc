"""What the commands of all packages share: bad input ends in one line on standard error and exit code 2.

It lives here because this package depends on no other one.

    @command
    def main(argv=None):
        args = Parser(prog="python -m package.module").parse_args(argv)
        raise BadInput(f"--rows {args.rows}: must be at least 1")
"""

import argparse
import functools
import sys

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


class BadInput(ValueError):
    """Arguments, files or values that can't be used: the message names the field, the value and what is allowed."""


class Parser(argparse.ArgumentParser):
    """Raises BadInput instead of printing its usage and leaving; options can't be abbreviated."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def command(main):
    """`main(...)` as a command: returns its exit code (0 for None), after a line where its input or files are bad."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (BadInput, OSError) as error:
            named = isinstance(error, OSError) and error.filename and error.strerror
            message = f"{error.filename}: {error.strerror}" if named else str(error)
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return run
