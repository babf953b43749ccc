"""Tables exported from Weights & Biases, made to look like the other tables of runs.

Three kinds of export are recognised:
  runs      columns `config.*` and `summary.*` (or whole dictionaries `config` and `summary`, as the export snippet of
            its documentation writes them), with `name`, `id`, `state`
  runs      the table of the web page: columns `Name`, `State`, `ID`, ..., and keys without a prefix
  history   one row per logged step: `run_id` (or `id`, `name`), `_step`, and keys such as `train/loss`

Prefixes are dropped where the short name stays unique, and states become those of a run store, so that runs which did
not finish are listed as excluded and not fitted. Which key is N, D, C and loss is said with --columns.
"""

import ast
import json

import pandas as pd

STATES = {
    "finished": "done", "running": "running", "pending": "running", "preempting": "preempted", "preempted": "preempted",
    "crashed": "failed", "failed": "failed", "killed": "failed",
}  # fmt: skip
NAMES = {"ID": "run_id", "id": "run_id", "Name": "name", "State": "state", "Runtime": "wall_seconds",
         "summary._runtime": "wall_seconds"}  # fmt: skip
PREFIXES = ("summary.", "config.")


def is_runs(frame: pd.DataFrame) -> bool:
    """Whether a table has the columns of an export of runs."""
    names = set(map(str, frame.columns))
    prefixed = any(name.startswith(PREFIXES) for name in names)
    return prefixed or {"config", "summary"} <= names or {"Name", "State"} <= names


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs table with short column names and a column `status`; raises ValueError naming column and row."""
    frame = frame.rename(columns={old: new for old, new in NAMES.items() if old in frame and new not in frame})
    for kind in ("summary", "config"):
        if kind in frame:
            cells = [_dictionary(cell, kind, row) for row, cell in frame[kind].items()]
            flat = pd.json_normalize(cells).add_prefix(f"{kind}.").set_index(frame.index)
            frame = pd.concat([frame.drop(columns=kind), flat], axis=1)
    short = {name: name.split(".", 1)[1] for name in map(str, frame.columns) if name.startswith(PREFIXES)}
    taken = [name for name in map(str, frame.columns) if name not in short] + list(short.values())
    frame = frame.rename(columns={old: new for old, new in short.items() if taken.count(new) == 1})
    if "state" in frame:
        unknown = frame["state"].dropna()[~frame["state"].dropna().isin(STATES)]
        if len(unknown):
            raise ValueError(
                f"column 'state', row {unknown.index[0]}: {unknown.iloc[0]!r} is not a state of a run; "
                f"allowed are {', '.join(STATES)}"
            )
        status = frame["state"].map(STATES).fillna("unreadable")
        # what the trainer itself said is more exact (diverged), but a run that was killed said nothing
        frame["status"] = frame["status"].fillna(status) if "status" in frame else status
    return frame


def _dictionary(cell, column: str, row) -> dict:
    if isinstance(cell, dict):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, TypeError):
            continue
        if isinstance(value, dict):
            return value
    raise ValueError(f"column {column!r}, row {row}: {str(cell)[:40]!r} is not a dictionary")


def history(frame: pd.DataFrame, kind: str = "train") -> pd.DataFrame:
    """Learning curves (run_id, step, tokens, flops, loss) from a history export; the last of a repeated step counts."""
    names = {"id": "run_id", "name": "run_id", "_step": "step"}
    names |= {f"{kind}/{key}": key for key in ("tokens", "flops", "loss")}
    frame = frame.rename(columns={old: new for old, new in names.items() if old in frame and new not in frame})
    for name in ("run_id", "step", "tokens", "flops", "loss"):
        if name not in frame:
            shown = ", ".join(map(str, list(frame.columns)[:12]))
            raise ValueError(f"column {name!r} (or {kind}/{name}) of the learning curves is missing; there are {shown}")
    frame = frame.dropna(subset=["loss", "flops", "tokens"]).drop_duplicates(["run_id", "step"], keep="last")
    return frame.sort_values(["run_id", "step"], kind="stable").reset_index(drop=True)
