"""Command lines whose bad arguments are reported like a bad config."""

import argparse

from efficient_lm.schema import ConfigError

BAD_INPUT = 2  # exit code of every command for it


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, one line, instead of printing its usage and leaving; options can't be abbreviated."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        raise ConfigError(f"{message} (see --help)")
