"""Documents from text files: plain, gzip, JSON lines; files, directories and globs."""

import glob
import gzip
import json
import pathlib

from efficient_lm.schema import ConfigError


def find_files(inputs) -> list[pathlib.Path]:
    """Files behind paths, directories (recursive) and globs, sorted, each once. Hidden files are left out."""
    found = {}
    for given in inputs:
        path = pathlib.Path(given)
        if path.is_dir():
            files = [f for f in path.rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        elif path.exists():
            files = [path]
        else:
            files = [pathlib.Path(f) for f in glob.glob(given, recursive=True)]
            if not files:
                raise ConfigError(f"input = {given!r}: no such file or directory, and no file matches it")
        found.update((f, None) for f in sorted(files) if f.is_file())
    if not found:
        raise ConfigError(f"input = {' '.join(map(str, inputs))!r}: no files there")
    return list(found)


def read_documents(files, *, text_field: str = "text", separator: str = "", on_file=None, on_binary=None):
    """Yields the documents of `files` as bytes.

    `.jsonl` (or `.jsonl.gz`): a line is a document, its text in `text_field`. Other files: the whole file, or its
    parts between `separator`. `.gz` and `.dz` are unpacked. Files with a NUL byte near their start are binary and
    skipped; `on_binary(file)` hears of them, `on_file(file)` of every file once read.
    """
    for file in files:
        yield from _file_documents(pathlib.Path(file), text_field, separator.encode(), on_binary)
        if on_file:
            on_file(file)


def _file_documents(file, text_field, separator, on_binary):
    suffixes = file.suffixes
    packed = bool(suffixes) and suffixes[-1] in (".gz", ".dz")
    lines = (suffixes[-2:-1] if packed else suffixes[-1:]) in ([".jsonl"], [".ndjson"])
    try:
        with gzip.open(file, "rb") if packed else open(file, "rb") as handle:
            if lines:
                yield from _json_documents(handle, file, text_field)
                return
            data = handle.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"input = {str(file)!r}: damaged gzip file ({error})") from None
    except OSError as error:
        raise ConfigError(f"input = {str(file)!r}: {error.strerror or error}") from None
    if b"\0" in data[:8192]:
        if on_binary:
            on_binary(file)
        return
    for part in data.split(separator) if separator else (data,):
        if part.strip():
            yield part


def _json_documents(handle, file, text_field):
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        where = f"input = {str(file)!r}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise ConfigError(f"{where}: not JSON") from None
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(k for k, v in row.items() if isinstance(v, str)) if isinstance(row, dict) else "none"
            raise ConfigError(f"{where}: no text in field {text_field!r}; --text-field can be: {fields}")
        if text.strip():
            yield text.encode("utf-8", errors="replace")
