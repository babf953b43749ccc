"""Run stores, CSV and parquet files, wandb exports and data frames -> one checked table of runs.

A row that a fit does not use is never dropped in silence: it moves to `Table.excluded` with the reason.
Column names are those of the laws: `N` parameters, `D` training tokens, `C` training FLOPs, `loss` nats per token.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import wandb_export

N_ACCOUNTING = {"nonemb_head": "N_nonemb_head", "nonemb": "N_nonemb", "total": "N_total"}
C_ACCOUNTING = {
    "model_causal": "C_model_causal",
    "model_full": "C_model_full",
    "6nd": "C_6nd",
    "hardware": "C_hardware",
}
DEFAULT_N, DEFAULT_C = "nonemb_head", "model_causal"
N_MEANING = {
    "nonemb_head": "all parameters except the input embedding",
    "nonemb": "parameters without embedding and head",
    "total": "all parameters",
}
C_MEANING = {
    "model_causal": "exact model FLOPs with causal attention",
    "model_full": "exact model FLOPs, attention counted in full",
    "hardware": "FLOPs that the hardware executes",
    "6nd": "6 N D of active parameters",
}
STATUSES = {"done", "running", "preempted", "diverged", "failed", "planned", "unreadable"}


class DataError(ValueError):
    """A table that cannot be used; the message is one line that names the column and the row."""


@dataclass
class Table:
    """Runs to fit (`rows`) and runs left out (`excluded`, with a column `reason`), with every filter applied.

    `counts`: what the columns N and C count, by the names of N_MEANING and C_MEANING; empty where only the table's
    maker knows.
    """

    rows: pd.DataFrame
    excluded: pd.DataFrame
    source: str
    filters: list[str] = field(default_factory=list)
    counts: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """How many rows are used, and how many were left out for which reason."""
        lost = (
            f", {len(self.excluded)} left out: {count_reasons(self.excluded['reason'])}" if len(self.excluded) else ""
        )
        return f"{len(self.rows)} rows of {self.source}{lost}"

    def conventions(self) -> str:
        """What the columns N and C count, in words; '' where that is not known."""
        words = {"N": N_MEANING, "C": C_MEANING}
        return "; ".join(f"{name}: {words[name][self.counts[name]]}" for name in words if name in self.counts)

    def exclude(self, mask, reason) -> None:
        """Moves the rows under the boolean `mask` [rows] to `excluded`; `reason` is text or a function of the row."""
        out = self.rows[mask].copy()
        out["reason"] = [reason(row) if callable(reason) else reason for _, row in out.iterrows()]
        if len(out):
            self.excluded = pd.concat([self.excluded, out]) if len(self.excluded) else out
        self.rows = self.rows[~mask]

    def take(self, mask: pd.Series) -> "Table":
        """The same table restricted to the rows under `mask` [rows] (no exclusion is recorded)."""
        return replace(self, rows=self.rows[mask], filters=list(self.filters))

    def groups(self, column: str) -> dict[str, "Table"]:
        """One table per value of `column`, in order of first appearance; excluded rows go with their value.

        Raises DataError where a row that is used has no value there.
        """
        if column not in self.rows:
            return {"all": self}
        empty = self.rows[column].isna()
        if empty.any():
            advice = f"leave such rows out, e.g. --where '{column} == {column}'"
            raise DataError(f"column {column!r}, row {empty.idxmax()}: empty ({empty.sum()} such rows); {advice}")
        values = pd.concat([self.rows, self.excluded])[column].dropna().drop_duplicates()
        out = {}
        for value in values:
            excluded = self.excluded
            if column in excluded:
                excluded = excluded[excluded[column] == value]
            rows = self.rows[self.rows[column] == value]
            out[str(value)] = replace(self, rows=rows, excluded=excluded, filters=list(self.filters))
        return out


# ---------------------------------------------------------------------------------------------- reading


def load_runs(store, *, n: str | None = None, c: str | None = None) -> pd.DataFrame:
    """Every run of a store `runs/NAME/*/run.json` as one row, whatever its status, in the order of the sweep's plan.

    Columns: run_id, name, status, reason, N, D, C, loss, bpb, seed, wall_seconds, `N_*` and `C_*` under the other
    accountings, `data` and `tokens_hash` (what was trained on, to notice losses that cannot be compared; of runs that
    did not record it the hash is empty) and one per sweep axis.
    Planned cells that were never started (from `sweep.json`) have the status `planned`.

    Args:
      n: which parameters `N` counts: nonemb_head (all but the input embedding; the default), nonemb, total.
      c: which FLOPs `C` counts: model_causal (default), model_full, hardware, 6nd.
    """
    store, n, c = Path(store), n or DEFAULT_N, c or DEFAULT_C
    if n not in N_ACCOUNTING or c not in C_ACCOUNTING:
        raise DataError(f"n={n!r}, c={c!r}: allowed are n in {sorted(N_ACCOUNTING)}, c in {sorted(C_ACCOUNTING)}")
    if not store.is_dir():
        raise DataError(f"store {store} is not a directory")
    rows = [_run_row(path) for path in sorted(store.iterdir()) if path.is_dir()]
    planned = _planned_rows(store)
    order = {row["run_id"]: i for i, row in enumerate(planned)}
    rows = sorted((row for row in rows if row), key=lambda row: order.get(row["run_id"], len(order)))
    known = {row["run_id"] for row in rows}
    rows += [row for row in planned if row["run_id"] not in known]
    if not rows:
        raise DataError(f"store {store} holds no run (no */run.json)")
    frame = pd.DataFrame(rows)
    for column in [*N_ACCOUNTING.values(), *C_ACCOUNTING.values(), "D", "loss", "bpb"]:
        frame[column] = pd.to_numeric(frame.get(column), errors="coerce")
    frame["N"], frame["C"] = frame[N_ACCOUNTING[n]], frame[C_ACCOUNTING[c]]
    first = ["run_id", "name", "status", "reason", "N", "D", "C", "loss", "bpb", "seed", "wall_seconds"]
    return frame.reindex(columns=[*first, *(k for k in frame if k not in first)])


def read_record(path: Path) -> dict:
    """The object in a JSON file of a run. Raises DataError where it holds something else, and OSError."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def read_lines(path: Path, needed=()) -> list[dict]:
    """The objects of a file, one a line. Raises DataError naming a line that lacks one of `needed`, and OSError."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        missing = [name for name in needed if name not in row] if isinstance(row, dict) else ["key: not an object"]
        if missing:
            raise DataError(f"{path}, line {number}: has no {', '.join(missing)}")
        rows.append(row)
    return rows


def made_by(directory: Path) -> dict:
    """Where and by which sources a run was trained: device, code_hash, mean_step_seconds; None where unknown."""
    try:
        run = read_record(directory / "run.json")
    except (OSError, DataError):  # never started, or killed before the first write
        run = {}
    device = (run.get("hardware") or {}).get("device_kind")
    return {"device": device} | {name: run.get(name) for name in ("code_hash", "mean_step_seconds")}


def _run_row(path: Path) -> dict | None:
    try:
        run = read_record(path / "run.json")
    except FileNotFoundError:
        if not (path / "config.json").exists():
            return None
        return {
            "run_id": path.name,
            "status": "unreadable",
            "reason": "no run.json (killed before the first write)",
        }
    except DataError as err:
        return {"run_id": path.name, "status": "unreadable", "reason": str(err).removeprefix(f"{path}/")}
    params, flops, data = (run.get(key) or {} for key in ("params", "flops", "data"))
    tokenizer = data.get("tokenizer")
    parts = [data.get("name"), tokenizer.get("name") if isinstance(tokenizer, dict) else tokenizer]
    spec = [str(part) for part in (*parts, data.get("tokenizer_hash"), data.get("vocab_size")) if part]
    row = {
        "run_id": run.get("run_id", path.name),
        "name": run.get("name"),
        "status": run.get("status", "unreadable"),
        "reason": run.get("reason"),
        "steps_done": run.get("steps_done"),
        "steps_total": run.get("steps_total"),
        "N_total": params.get("total"),
        "N_nonemb": params.get("non_embedding"),
        "N_active": params.get("active"),
        "D": run.get("tokens"),
        "loss": run.get("final_loss"),
        "bpb": run.get("final_bpb"),
        "seed": run.get("seed"),
        "wall_seconds": run.get("wall_seconds"),
        "data": " ".join(spec),
        "tokens_hash": (data.get("sha256") or {}).get("tokens.bin", "")[:12] or None,
    }
    if params.get("non_embedding") is not None:
        row["N_nonemb_head"] = params["non_embedding"] + (params.get("head") or 0)
    row |= {"C_" + key.replace("6n", "6nd"): value for key, value in flops.items()}
    return row | {key: value for key, value in (run.get("sweep") or {}).items() if key not in row}


def _planned_rows(store: Path) -> list[dict]:
    try:
        cells = read_record(store / "sweep.json").get("cells", [])
    except FileNotFoundError:
        return []
    rows = []
    for cell in cells:
        axes = {key: value for key, value in (cell.get("axes") or {}).items() if np.isscalar(value)}
        rows.append(
            {
                "name": axes.get("arch"),
                **axes,
                "run_id": cell.get("run_id"),
                "status": "planned",
                "D": cell.get("tokens"),
            }
        )
    return rows


def load_curves(store, kind: str = "train") -> pd.DataFrame:
    """Learning curves of a run directory, of all runs of a store, or of a wandb history (CSV), with a column `run_id`.

    A run that was killed and resumed repeats some (kind, step): the last occurrence counts. A line that is not
    complete JSON (torn by a kill) is ignored.
    """
    store = Path(store)
    if store.is_file():
        try:
            return wandb_export.history(_read_file(store), kind)
        except ValueError as err:
            raise DataError(f"{store}: {err}") from None
    runs = [store] if (store / "metrics.jsonl").exists() else sorted(p for p in store.iterdir() if p.is_dir())
    rows = []
    for run in runs:
        last = {}
        path = run / "metrics.jsonl"
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("kind") == kind and "step" in row:
                last[row["step"]] = {"run_id": run.name, **row}
        rows += [last[step] for step in sorted(last)]
    return pd.DataFrame(rows, columns=None if rows else ["run_id", "kind", "step", "tokens", "flops", "loss"])


def read(data, *, n: str | None = None, c: str | None = None) -> tuple[pd.DataFrame, str]:
    """Reads a run store (directory), CSV (also .gz), parquet or data frame; returns the frame and what to call it.

    CSV, parquet and frames may be exports of wandb (`wandb_export`). `n` and `c` as in `load_runs`: only a store has
    several counts, so DataError for any other table.
    """
    for flag, value in (("--n", n), ("--c", c)):
        if value and (isinstance(data, pd.DataFrame) or Path(data).is_file()):
            raise DataError(f"{flag} {value}: only a run store has several counts; name the column with --columns")
    if isinstance(data, pd.DataFrame):
        frame, source = data.copy() if data.index.is_unique else data.reset_index(drop=True), "data frame"
    elif Path(data).is_dir():
        return load_runs(data, n=n, c=c), str(data)
    else:
        frame, source = _read_file(Path(data)), str(data)
    if wandb_export.is_runs(frame):
        try:
            frame = wandb_export.runs(frame)
        except ValueError as err:
            raise DataError(f"{source}: {err}") from None
    return frame, source


def _read_file(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise DataError(f"data {str(path)!r} does not exist: give a CSV or parquet file, or a run store (directory)")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except ImportError:
        raise DataError(f"cannot read {path}: parquet files need the package pyarrow") from None
    except Exception as err:  # every reader has its own error classes; the user needs one line
        raise DataError(f"cannot read {path}: {str(err).splitlines()[0]}") from err
    if frame.empty:
        raise DataError(f"{path} has no rows")
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
    return frame


# ------------------------------------------------------------------------------------- renaming, filters


def rename(frame: pd.DataFrame, columns) -> pd.DataFrame:
    """Adds columns from `{"N": "params", "D": "C/(6*N)"}` or "N=params,D=C/(6*N)": an existing name or an expression.

    Entries are applied in order, so that a later expression can use an earlier name.
    """
    if isinstance(columns, str):
        pairs = [item.partition("=") for item in re.split(r",(?=\s*\w+\s*=[^=])", columns)]
        if not all(eq and name.strip() and value.strip() for name, eq, value in pairs):
            raise DataError(f"columns {columns!r}: expected NAME=COLUMN or NAME=EXPRESSION, separated by commas")
        columns = {name.strip(): value.strip() for name, _, value in pairs}
    frame = frame.copy()
    for name, value in (columns or {}).items():
        if value in frame:
            frame[name] = frame[value]
            continue
        try:
            frame[name] = _evaluate(frame, value)
        except Exception as err:
            raise DataError(
                f"column {name}={value!r}: neither a column nor an expression over the columns {_names(frame)} ({err})"
            ) from err
    return frame


def _evaluate(frame: pd.DataFrame, expression: str):
    """`frame.eval` with whole numbers as floats: as int64, 6*N*D of real runs wraps round at 2^63 without a word."""
    return frame.astype(dict.fromkeys(frame.select_dtypes("integer"), float)).eval(expression)


def load_table(
    data, *, required=("N", "D", "loss"), may_be_zero=(), columns=None, where: str | None = None, x_range=None,
    drop_highest: int = 0, duplicates: str = "error", n: str | None = None, c: str | None = None,
) -> Table:  # fmt: skip
    """Reads, renames, filters and checks a table of runs.

    Args:
      data: run store (directory), CSV, parquet or data frame.
      required: columns that must hold positive finite numbers in every row that is kept.
      may_be_zero: those of them where 0 is allowed too.
      columns: see `rename`.
      where: pandas query that a row must satisfy to be used, e.g. "loss < 4 and arch == 'gla'".
      x_range: {"C": (lo, hi), ...}: rows outside (inclusive) are left out.
      drop_highest: leave out this many rows of highest loss (an explicit outlier filter).
      duplicates: what to do with a row equal to an earlier one (same run_id, or all columns): error, drop or keep.

    Raises:
      DataError: one line naming the column, the row and what is allowed.
    """
    original, source = read(data, n=n, c=c)
    frame = rename(original, columns)
    store = not isinstance(data, pd.DataFrame) and Path(data).is_dir()
    kinds = {"N": n or DEFAULT_N, "C": c or DEFAULT_C}
    counts = {name: kind for name, kind in kinds.items() if store and frame[name].equals(original[name])}
    whole = [name for name in ("N", "D", "C") if name in frame and pd.api.types.is_integer_dtype(frame[name])]
    frame = frame.astype(dict.fromkeys(whole, float))  # as integers their products wrap round
    table = Table(frame, frame.iloc[:0].assign(reason=[]), source, counts=counts)
    if columns:
        table.filters.append(f"columns {columns}")
    if "status" in frame:
        _exclude_unusable_runs(table)
    if where:
        try:
            keep = _evaluate(table.rows, where).astype(bool)
        except Exception as err:
            raise DataError(f"where {where!r} is not a query over the columns {_names(frame)} ({err})") from err
        table.exclude(~keep, f"filtered: not ({where})")
        table.filters.append(f"where {where}")
    missing = [name for name in required if name not in frame]
    if missing:
        raise DataError(f"column {missing[0]!r} is missing in {source}; it has {_names(frame)}; name it with --columns")
    for name in required:
        table.rows = table.rows.assign(**{name: _positive_numbers(table.rows[name], name, name in may_be_zero)})
    _check_duplicates(table, duplicates)
    _check_units(table)
    for name, (lo, hi) in (x_range or {}).items():
        if name not in frame:
            raise DataError(f"x-range: column {name!r} is missing in {source}; it has {_names(frame)}")
        table.exclude(~table.rows[name].between(lo, hi), f"outside {name} range {lo:g} to {hi:g}")
        table.filters.append(f"x-range {name}={lo:g}:{hi:g}")
    if drop_highest:
        worst = table.rows["loss"].nlargest(drop_highest).index
        table.exclude(table.rows.index.isin(worst), f"one of the {drop_highest} highest losses")
        table.filters.append(f"drop-highest {drop_highest}")
    if table.rows.empty:
        raise DataError(
            f"no row of {source} is left to fit: {count_reasons(table.excluded['reason']) or 'it is empty'}"
        )
    return table


def check_comparable(table: Table) -> None:
    """Raises DataError where the runs used different data or tokenizers: their nats per token cannot be compared.

    `tokens_hash` tells data of one name apart; a row without it goes with any.
    """
    for column in ("data", "tokens_hash"):
        if column in table.rows and table.rows[column].nunique() > 1:
            kinds = ", ".join(repr(kind) for kind in table.rows[column].dropna().unique()[:3])
            choose = f'choose one with --where "{column} == ..."'
            raise DataError(f"column {column!r} is mixed ({kinds}): losses are not comparable; {choose}")


def _exclude_unusable_runs(table: Table) -> None:
    """Keeps the runs whose `status` is done, or what wandb calls that; a status of another vocabulary is not used."""
    status = table.rows["status"].replace(wandb_export.STATES)
    unknown = sorted(set(status.dropna()) - STATUSES, key=str)
    if unknown:
        allowed = ", ".join(sorted(STATUSES | set(wandb_export.STATES)))
        table.filters.append(f"column status not used: {unknown[0]!r} is none of {allowed}")
        return
    table.rows = table.rows.assign(status=status)

    def reason(row) -> str:
        note = f": {row['reason']}" if isinstance(row.get("reason"), str) and row["reason"] else ""
        if row["status"] in ("running", "preempted") and pd.notna(row.get("steps_done")):
            note = f" at step {row['steps_done']:.0f} of {row['steps_total']:.0f}{note}"
        names = {
            "running": "unfinished (running",
            "preempted": "unfinished (preempted",
            "planned": "planned, not run",
        }
        text = names.get(row["status"], str(row["status"]))
        return text + note + (")" if "(" in text else "")

    table.exclude(table.rows["status"] != "done", reason)
    if "loss" in table.rows:
        table.exclude(table.rows["loss"].isna(), "done, but final_loss is missing")


def _check_units(table: Table) -> None:
    """Raises DataError where C/(N D) says that N, D and C are not raw counts, in all rows or in one.

    It is near 6 for a dense transformer; small models with a large head have more, mixtures of experts with N = all
    parameters less.
    """
    if not {"N", "D", "C"} <= set(table.rows):
        return
    N, D, C = (pd.to_numeric(table.rows[name], errors="coerce") for name in ("N", "D", "C"))
    ratio = (C / (N * D)).replace([np.inf, 0.0], np.nan).dropna()
    if ratio.empty:
        return
    usual = ratio.median()
    advice = "all three must be raw counts (parameters, tokens, FLOP)"
    if not 0.02 <= usual <= 5000:
        raise DataError(f"columns 'N', 'D', 'C': C/(N*D) is {usual:.3g}, not near 6: {advice}")
    off = np.abs(np.log(ratio / usual)) > np.log(100)
    if off.any():
        row = off.idxmax()
        raise DataError(
            f"columns 'N', 'D', 'C', row {row}: C/(N*D) is {ratio[row]:.3g} where it is {usual:.3g} in other rows "
            f"({off.sum()} such rows), so units are mixed: {advice}"
        )


def _positive_numbers(column: pd.Series, name: str, zero: bool) -> pd.Series:
    if column.dtype == bool:
        raise DataError(f"column {name!r} holds true and false, not numbers")
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    bad = ~(np.isfinite(numbers) & ((numbers >= 0) if zero else (numbers > 0)))
    if bad.any():
        row = bad.idxmax()
        value = column[row]
        what = "empty" if pd.isna(value) else repr(value) if isinstance(value, str) else f"{value}"
        raise DataError(
            f"column {name!r}, row {row}: {what} is not a positive finite number ({bad.sum()} such rows); "
            f"leave such rows out, e.g. --where '0 < {name} < 1e30'"
        )
    return numbers


def _check_duplicates(table: Table, duplicates: str) -> None:
    if duplicates not in ("error", "drop", "keep"):
        raise DataError(f"duplicates {duplicates!r}: allowed are error, drop, keep")
    # a CSV that was written with its index has a column 'Unnamed: 0' that makes every row unique
    counted = [name for name in table.rows if not str(name).startswith("Unnamed: ")]
    keys = table.rows[["run_id"]] if "run_id" in table.rows else table.rows[counted].astype(str)
    repeated = keys.duplicated()
    if not repeated.any() or duplicates == "keep":
        return
    if duplicates == "drop":
        table.exclude(repeated, "duplicate of an earlier row")
        table.filters.append("duplicates drop")
        return
    row = repeated.idxmax()
    first = (keys == keys.loc[row]).all(axis=1).idxmax()
    column = f"column 'run_id', row {row}" if "run_id" in keys else f"row {row} (all columns)"
    raise DataError(f"{column}: duplicate of row {first} ({repeated.sum()} such rows); use --duplicates drop or keep")


def _names(frame: pd.DataFrame) -> str:
    names = [str(name) for name in frame.columns]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def count_reasons(reasons, most: int = 4) -> str:
    """'2 x diverged; 1 x failed' from the reasons of rows; the rarer ones are counted together."""
    counts = pd.Series(list(reasons), dtype=object).value_counts()
    parts = [f"{count} x {reason}" for reason, count in counts[:most].items()]
    return "; ".join([*parts, *([f"{counts[most:].sum()} x other reasons"] if len(counts) > most else [])])
