"""The run directory: config.json, run.json (atomic), metrics.jsonl (append-only), and their mirrors.

A kill at any moment leaves a directory that loads: json files are replaced whole, and a torn last line of
metrics.jsonl is ignored by readers and closed by the next writer.
"""

import datetime
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path

from efficient_lm import config as configs
from efficient_lm.schema import ConfigError, to_dict, without_volatile

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunDir:
    """The directory of one run, held by one process. Raises ConfigError when it can't be this run's."""

    def __init__(self, workdir, cfg, writer: bool = True):
        self.path, self.cfg, self.writer = Path(workdir), cfg, writer
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a") if writer else None
        except OSError as error:
            raise ConfigError(f"workdir = {str(workdir)!r}: {error.strerror.lower()}") from None
        if writer:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"workdir = {str(workdir)!r}: another process is training here") from None
            except OSError:
                pass  # some network file systems have no locks
        self._rows = None
        self.info = read_json(self.path / "run.json") or {}
        self._require_same_config()

    def _require_same_config(self):
        stored = read_json(self.path / "config.json")
        if stored is None:
            if (self.path / "config.json").exists():
                raise ConfigError(f"workdir = {str(self.path)!r}: its config.json can't be read; delete it to go on")
            there, here = self.info.get("run_id"), configs.run_id(self.cfg)
            if there not in (None, here):
                raise ConfigError(f"workdir = {str(self.path)!r}: holds run {there} without config.json, not {here}")
            return
        try:
            stored = without_volatile(configs.from_dict(stored))
        except ConfigError as error:
            raise ConfigError(f"workdir = {str(self.path)!r}: holds a config that can't be read: {error}") from None
        difference = first_difference(stored, without_volatile(self.cfg), "config")
        if difference:
            field, there, here = difference
            raise ConfigError(f"workdir = {str(self.path)!r}: holds a run with {field} = {there!r}, not {here!r}")

    def require_same_data(self, spec: dict, start: int) -> None:
        """Raises ConfigError where the steps before `start` were taken on other tokens than those of `spec`."""
        if start and other_tokens(self.info, spec):
            raise ConfigError(
                f"config.data = {self.cfg.data.path or self.cfg.data.source!r}: holds other tokens than this run was "
                f"trained on up to step {start}; bring those back, or begin anew in another workdir"
            )

    def code_hashes(self, start: int) -> str:
        """`code_hash` of this process, behind those of the processes that took the steps before `start`: 'old+new'."""
        hashes = self._so_far("code_hash", code_hash(self.cfg.model.plugins), start)
        if "+" in hashes and self.writer:
            print(f"note: other sources trained this run up to step {start}; its code_hash is {hashes}")
        return hashes

    def meshes(self, mesh: str, start: int) -> str:
        """`mesh` of this process, behind those of the steps before `start`: 'old+new'.

        Another mesh changes how sums round and, where experts are split over it, which of their rows are dropped.
        """
        meshes = self._so_far("mesh", mesh, start)
        split = any(getattr(ffn, "parallel", "data") == "expert" for ffn in self.cfg.model.ffns.values())
        if "+" in meshes and split and self.writer:
            print(
                f"note: another mesh trained this run up to step {start}: {meshes}; what parallel = 'expert' drops "
                "depends on it (router_dropped in metrics.jsonl)"
            )
        return meshes

    def _so_far(self, name: str, now: str, start: int) -> str:
        """`now` behind what run.json has under `name`, if the steps before `start` count: 'old+new'."""
        before = (self.info.get(name) or "").split("+") if start else []
        return "+".join(dict.fromkeys(value for value in (*before, now) if value))

    def begin(self, **info):
        """Write config.json and the first run.json of this process; keys of an earlier process stay."""
        self.info = {"started": utc_now(), **self.info, **info}
        if self.writer:
            write_json(self.path / "config.json", to_dict(self.cfg))
            rows = self.path / "metrics.jsonl"
            torn = rows.exists() and not rows.read_bytes().endswith(b"\n") and rows.stat().st_size
            self._rows = open(rows, "a")
            self._rows.write("\n" if torn else "")
        self.update()

    def update(self, **info):
        """Rewrite run.json with these keys changed."""
        self.info |= {"updated": utc_now(), **info}
        if self.writer:
            write_json(self.path / "run.json", _finite(self.info)[0])

    def append(self, row: dict):
        """One line of metrics.jsonl. NaN and infinities become null and set "nonfinite"."""
        if self.writer:
            row, nonfinite = _finite(row)
            self._rows.write(json.dumps(row | {"nonfinite": True} if nonfinite else row) + "\n")
            self._rows.flush()

    def rows(self, kind: str) -> list[dict]:
        return [row for row in read_rows(self.path / "metrics.jsonl") if row.get("kind") == kind]

    def release(self):
        """Let other processes have the directory."""
        for file in (self._rows, self._lock):
            if file is not None:
                file.close()


def other_tokens(info: dict, spec: dict) -> bool:
    """Whether the text of `spec` (of a data source) is not that which the run of `info` (its run.json) read."""
    before, now = (s.get("sha256") or {} for s in (info.get("data") or {}, spec))
    return bool(before) and before.get("tokens.bin") != now.get("tokens.bin")


def require_own_tokens(run, cfg, spec: dict, advice: str = "bring those back") -> None:
    """Raises ConfigError where the text of `spec` is not that which the run of `cfg` in directory `run` read."""
    if other_tokens(read_json(Path(run) / "run.json") or {}, spec):
        name = cfg.data.path or cfg.data.source
        raise ConfigError(f"--run {run}: {name!r} holds other tokens now than the run was trained on; {advice}")


def first_difference(there, here, path: str):
    """(path, value there, value here) of the first field that differs between nested dicts, or None."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else (path, there, here)
    for key in sorted(there.keys() | here.keys(), key=str):
        found = first_difference(there.get(key), here.get(key), f"{path}.{key}")
        if found:
            return found
    return None


def read_json(path):
    """The content, or None when the file is not there or not whole."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def write_json(path, content) -> None:
    """Atomic: readers see the old file or the new one, whoever else writes it. Makes the directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def read_rows(path) -> list[dict]:
    """Rows of a metrics.jsonl; lines that are not whole are left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _finite(value):
    """(value with NaN and infinities as None, whether there were any)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, True
    if isinstance(value, dict):
        pairs = {k: _finite(v) for k, v in value.items()}
        return {k: v for k, (v, _) in pairs.items()}, any(bad for _, bad in pairs.values())
    if isinstance(value, list):
        items = [_finite(item) for item in value]
        return [item for item, _ in items], any(bad for _, bad in items)
    return value, False


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def code_hash(plugins=()) -> str:
    """12 hex digits over the Python files of efficient_lm and pallas_kernels, and of imported modules `plugins`."""
    digest = hashlib.sha256()
    for name in ("efficient_lm", "pallas_kernels", *sorted(set(plugins))):
        module = Path(importlib.import_module(name).__file__).resolve()
        files = sorted(module.parent.rglob("*.py")) if module.name == "__init__.py" else [module]
        root = module.parent.parent if module.name == "__init__.py" else module.parent
        for path in files:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
