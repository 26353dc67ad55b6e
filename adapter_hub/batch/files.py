"""The files of one job, and how its answered rows become CSV or Parquet at the end.

While a job runs its rows are JSON lines, whatever the output's format: a file of lines can be cut back to the last whole chunk,
and the columns of a table are only known when the last row is.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_hub.errors import InvalidInput, storage_error
from adapter_hub.examples import format_of
from adapter_hub.registry.artifacts import sync_folder

JSON = Any
PARQUET_ROWS = 4096    # of a row group, or fewer where they are long
PARQUET_BYTES = 32 << 20
EXACT_IN_FLOAT = 2**53


@dataclass(frozen=True, slots=True)
class JobFiles:
    """Where a job that writes `output` keeps its work."""

    output: Path

    @property
    def partial(self) -> Path:
        return self._beside(".partial")

    @property
    def errors(self) -> Path:
        return self._beside(".errors.jsonl")

    @property
    def errors_partial(self) -> Path:
        return self._beside(".errors.partial")

    @property
    def progress(self) -> Path:
        return self._beside(".progress.json")

    @property
    def finished(self) -> Path:
        return self._beside(".finished")

    @property
    def written(self) -> tuple[Path, ...]:
        """Every file that a job writes or removes, but for its lock."""
        return self.output, self.partial, self.errors, self.errors_partial, self.progress, self.finished

    @property
    def in_place(self) -> bool:
        """Whether a job's output stands under its own name and only the progress is left to remove."""
        return self.progress.exists() and self.output.exists() and not self.partial.exists()

    def _beside(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the job's lock, a file that is gone afterwards. Raises InvalidInput while another process runs this job.

        A kill may leave the file, also beside a whole output: it holds nobody up, and the next run of the job removes it.
        """
        path = self._beside(".lock")
        while True:
            try:
                handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            except OSError as error:
                raise storage_error(error, path) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise InvalidInput(f"another process is writing {str(self.output)!r}.", hint="Wait for it, or choose another output.") from None
            # The one before may have removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    break
            os.close(handle)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)


def line_of(row: dict[str, JSON]) -> bytes:
    """One JSON line. What JSON does not know (dates, NaN) becomes text or null."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError):
        return (json.dumps(_plain(row), ensure_ascii=False) + "\n").encode("utf-8", "replace")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def finish(files: JobFiles) -> None:
    """The lines in `partial` become OUTPUT in the format of its suffix, in one step. Running it again does no harm."""
    if files.in_place:
        files.progress.unlink()
        return
    suffix = format_of(files.output)
    if suffix in (".jsonl", ".ndjson"):
        made = files.partial
    else:
        made = files.finished
        if suffix == ".parquet":
            _write_parquet(files.partial, made)
        else:
            _write_csv(files.partial, made, "\t" if suffix == ".tsv" else ",")
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    if files.errors_partial.exists():
        if files.errors_partial.stat().st_size:
            files.errors_partial.replace(files.errors)
        else:
            files.errors_partial.unlink()
            files.errors.unlink(missing_ok=True)    # of an earlier run of this output
    made.replace(files.output)
    sync_folder(files.output.parent)    # else a power failure may keep the removals below and lose the renames
    files.partial.unlink(missing_ok=True)
    files.progress.unlink(missing_ok=True)


def _rows(path: Path) -> Iterator[dict[str, JSON]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _columns(path: Path) -> dict[str, set[str]]:
    """Every column in the order of first appearance, with the kinds of value that it holds; `text` alone where there is no row."""
    found: dict[str, set[str]] = {}
    for row in _rows(path):
        for key, value in row.items():
            found.setdefault(key, set()).add(_kind(value))
    return found or {"text": {"text"}}


def _kind(value: JSON) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= EXACT_IN_FLOAT else "long" if -(2**63) <= value < 2**63 else "json"
    return {float: "float", str: "text"}.get(type(value), "json")


def _write_csv(source: Path, target: Path, delimiter: str) -> None:
    columns = list(_columns(source))
    with target.open("w", encoding="utf-8", newline="") as file:
        plain = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        # Before Python 3.13 the writer leaves a lone carriage return bare, and no reader takes the line back.
        quoting = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)

        def write(values: list[str]) -> None:
            (quoting if any("\r" in value for value in values) else plain).writerow(values)

        write(columns)
        for row in _rows(source):
            write(["" if (value := row.get(name)) is None else value if isinstance(value, str) else _text(value) for name in columns])


def _write_parquet(source: Path, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    kinds = {name: _common(found) for name, found in _columns(source).items()}
    schema = pa.schema([(name, types[kind]) for name, kind in kinds.items()])
    text = {name for name, found in kinds.items() if found == "text"}
    with pq.ParquetWriter(target, schema) as writer:
        held: list[dict[str, JSON]] = []
        length = 0
        for row in _rows(source):
            held.append({k: _text(v) if k in text and v is not None and not isinstance(v, str) else v for k, v in row.items()})
            length += sum(len(value) for value in held[-1].values() if isinstance(value, str))
            if len(held) == PARQUET_ROWS or length > PARQUET_BYTES:
                writer.write_table(pa.Table.from_pylist(held, schema))
                held, length = [], 0
        if held:
            writer.write_table(pa.Table.from_pylist(held, schema))


def _common(kinds: set[str]) -> str:
    """One type for a column; text where its values have nothing else in common."""
    kinds = kinds - {"null"}
    if kinds and kinds <= {"int", "long"}:
        return "int"
    if kinds and kinds <= {"int", "float"}:
        return "float"
    return next(iter(kinds)) if len(kinds) == 1 and kinds != {"json"} else "text"


def _text(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: JSON) -> JSON:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str | int | float | bool | type(None)):
        return str(value)
    return value
