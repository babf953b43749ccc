"""Name -> entry tables that configs refer to and generic tests run over."""

from efficient_lm.schema import ConfigError, nearest


class Registry(dict):
    """A dict of named entries with a decorator to add one and a helpful error for unknown names."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def register(self, name: str):
        """Class or function decorator: `@MIXERS.register("gla")`. Refuses a name that is taken."""

        def add(entry):
            if name in self and self[name].__qualname__ != entry.__qualname__:
                raise ConfigError(f"{self.what} {name!r}: already registered by {self[name].__module__}")
            self[name] = entry
            return entry

        return add

    def find(self, name: str, path: str):
        """The entry `name`; `path` is the config field that asked for it."""
        if name not in self:
            raise ConfigError(f"{path} = {name!r}: no such {self.what}; {nearest(name, self)}")
        return self[name]
