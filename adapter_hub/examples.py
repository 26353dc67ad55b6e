"""Rows of text: one `Example`, and reading and writing JSONL, CSV and Parquet as streams. Standard library only.

A row that cannot be used is a `BadRow` with its line and reason, never a silent gap: what to do about it is the caller's choice.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from adapter_hub.errors import InvalidInput, UnreadableFile

JSON = Any
LINE_BYTES_MAX = 64 << 20    # a longer line is a fault in the file, not a text
UNSEEN = ("Cc", "Cf")        # categories of characters that show nothing: control characters, joiners and marks of direction
TARGETS = ("labels", "spans", "messages")    # what a row may have as its target where one label does not say it
CHOSE = "chose_epoch"        # in evaluation.jsonl: the row chose the epoch that was kept; it serves thresholds and measures nothing
_INPUTS = {"text", "messages"}    # columns of which a table has one: who reads its rows says which of them will do
COLUMNS_SHOWN = 8            # in one message
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")

csv.field_size_limit(LINE_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Example:
    """One input, with its target in training and evaluation. Other fields travel along."""

    text: str
    label: str | None = None
    id: str | int | None = None
    extra: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    reason: str
    raw: str = ""    # its beginning, as it stands in the file


def to_example(row: str | Mapping[str, Any] | Example) -> Example:
    """A text, or an object with `text`, as an Example; of `messages` alone the last question is the text. Raises InvalidInput with the reason."""
    fields = {"text": row.text} if isinstance(row, Example) else {"text": row} if isinstance(row, str) else _with_text(row)
    reason = fault(fields)
    if reason:
        raise InvalidInput(f"a row {reason}.", hint='A row is a text, or {"text": …, "label": …}.')
    label = row.label if isinstance(row, Example) else fields.get("label")
    if found := label_fault(label):
        raise InvalidInput(f"a row {found[0]}.", hint=found[1])
    if isinstance(row, Example):
        return row
    known = ("text", "label", "id")
    return Example(
        text=fields["text"],
        label=None if label is None else str(label),
        id=fields.get("id"),
        extra={key: value for key, value in fields.items() if key not in known},
    )


def _with_text(row: Any) -> Any:
    """A row of `messages` without a text has the last that a user said."""
    if not isinstance(row, Mapping) or row.get("text") not in (None, "") or not isinstance(row.get("messages"), list):
        return row
    said = [one.get("content") for one in row["messages"] if isinstance(one, Mapping) and one.get("role") == "user"]
    return {**row, "text": said[-1]} if said else row


def as_examples(rows: Iterable[str | Mapping[str, Any] | Example]) -> list[Example]:
    """Every row as an Example, also of a `datasets.Dataset`. Raises InvalidInput with the position (from 1) of the first that will not do."""
    if isinstance(rows, Mapping) and rows and all(hasattr(split, "features") for split in rows.values()):
        raise InvalidInput(f"the rows are splits: {', '.join(map(str, rows))}.", hint="Give one of them.")
    if isinstance(rows, Mapping) and isinstance(rows.get("text", ""), Iterable) and not isinstance(rows.get("text", ""), str):
        columns = ", ".join(repr(str(name)[:40]) for name in [*rows][:COLUMNS_SHOWN])
        raise InvalidInput(f"the rows are a dict of columns: {columns}.", hint='Give a list of rows: [{"text": …, "label": …}, …].')
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise InvalidInput(f"the rows are {_kind(rows)}.", hint="Give a list of texts or objects, or a pandas.DataFrame.")
    found = []
    for position, row in enumerate(_with_class_names(_of_table(rows)), 1):
        try:
            found.append(to_example(row))
        except InvalidInput as error:
            raise InvalidInput(f"row {position}: {error.fact}", hint=error.hint) from None
    return found


def _of_table(rows: Iterable[Any]) -> Iterable[Any]:
    """The rows of a pandas.DataFrame, which iterates over the names of its columns; others as they are."""
    if not (hasattr(rows, "iloc") and hasattr(rows, "columns")):
        return rows
    names = [str(name) for name in rows.columns]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InvalidInput(f"the data frame has the column {twice[0]!r} twice.", hint="Rename one of them.")
    records: Any = rows.to_dict("records")    # type: ignore[attr-defined]
    # A cell without a value is None, NaN or NA there. What was read from Parquet holds arrays where rows have lists.
    return [{str(key): _plain(value) for key, value in record.items() if not _absent(value)} for record in records]


def _plain(value: Any) -> Any:
    listed: Any = getattr(value, "tolist", None)
    return listed() if listed is not None and isinstance(value, Iterable) else value


def _with_class_names(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a `datasets.Dataset` with the names of its classes, which it keeps beside them; other rows as they are."""
    features = getattr(rows, "features", None)
    columns = features.items() if isinstance(features, Mapping) else ()
    names = {column: feature.names for column, feature in columns if hasattr(feature, "int2str")}
    for row in rows:
        yield _named(row, names)


def _named(row: Any, names: Mapping[str, Sequence[str]]) -> Any:
    """The row with the names of its classes. Raises IndexError for a number that has none."""
    # -1 is a row without a label.
    known = {column: classes[row[column]] if row[column] is not None and row[column] >= 0 else None for column, classes in names.items()}
    return {**row, **known} if known else row


def fault(row: object) -> str | None:
    """Why this row cannot be answered, to be read after "the row"; None if it can."""
    if not isinstance(row, Mapping):
        return f"is {_kind(row)}, not an object with a text"
    if "text" not in row and row.get("messages") is not None:
        return "has `messages` that no user's question can be read from: a list of {role, content}, as a user and an assistant said them"
    if "text" not in row:
        return "has no 'text'" + (f", only {', '.join(map(repr, list(row)[:5]))}" if row else "")
    reason = text_fault(row["text"])
    return reason and f"has a 'text' that {reason}"


def label_fault(label: object) -> tuple[str, str] | None:
    """(why this is no label, what to do), the first to be read after "the row"; None for one label, or none."""
    if label is None or isinstance(label, str):
        return None
    if isinstance(label, Iterable):
        hint = 'Several labels are its list `labels`, learned with problem_type="multi_label_classification" (`--problem-type`).'
        return f"has a 'label' that is {_kind(label)}, not one label", hint
    return ("has a 'label' that is NaN: it has no label", "Write its label, or remove the row.") if _absent(label) else None


def _absent(value: object) -> bool:
    """Whether it is None, NaN or pandas.NA."""
    if isinstance(value, Iterable):
        return False
    try:
        return value is None or bool(value != value)    # NaN is not even equal to itself
    except (TypeError, ValueError):                     # pandas.NA says that it cannot tell
        return True


def check_targets(rows: Sequence[Example], what: str, fields: Sequence[str]) -> None:
    """Raises InvalidInput where no row has any of these fields, and names the others: the target may be in one of another name."""
    has = dict.fromkeys(str(key) for row in rows for key in row.extra)
    has |= dict.fromkeys(name for name in ("label", "id") if any(getattr(row, name) is not None for row in rows))
    if not rows or any(field in has for field in fields):
        return
    shown = ", ".join(repr(name[:40]) for name in [*has][:COLUMNS_SHOWN]) + (", …" if len(has) > COLUMNS_SHOWN else "")
    fact = f"no {what} row has a target in {' or '.join(f'`{field}`' for field in fields)}" + (f"; beside `text` they have {shown}" if has else "")
    of_others = next((f", or say by task_type or problem_type what `{name}` are to teach" for name in has if name in TARGETS), "")
    raise InvalidInput(f"{fact}.", hint=f"Name the column of targets {fields[0]!r}{of_others}.")


def text_fault(text: object) -> str | None:
    """Why this text cannot be read, to be said after its name or position; None if it can."""
    if not isinstance(text, str):
        return f"is {_kind(text)}, not a string"
    if not text.strip():
        return "is empty"
    if all(char.isspace() or unicodedata.category(char) in UNSEEN for char in text):
        return "has nothing but control characters"
    return None if _is_unicode(text) else "has half of a surrogate pair, which is not Unicode"


def _is_unicode(text: str) -> bool:
    """Whether it is free of lone surrogates, which no encoding writes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_examples(path: str | Path) -> list[Example]:
    """Every row of a file. Raises InvalidInput with file and line at the first that will not do, UnreadableFile."""
    found = []
    for line, row in read_rows(path):
        reason = row.reason if isinstance(row, BadRow) else fault(_with_text(row))
        hint = "Mend or remove the row."
        if not reason and isinstance(row, dict) and (unfit := label_fault(row.get("label"))):
            reason, hint = unfit
        if reason:
            raise InvalidInput(f"{path}, line {line}: the row {reason}.", hint=hint)
        found.append(to_example(row))  # type: ignore[arg-type]
    return found


def digest_of(rows: Sequence[Example]) -> str:
    """"sha256:…" of texts and targets in their order: which data it was, without keeping the data."""
    digest = hashlib.sha256()
    for row in rows:
        more = targets_of(row)
        digest.update(json.dumps([row.text, row.label, *([more] if more else [])], sort_keys=True, default=str).encode())
    return "sha256:" + digest.hexdigest()


def targets_of(row: Example) -> dict[str, JSON]:
    """Its lists among `TARGETS`."""
    return {key: row.extra[key] for key in TARGETS if isinstance(row.extra.get(key), list)}


# ---- what a version keeps of its rows ---------------------------------------------------------------------------------


def chose(row: Example) -> bool:
    return row.extra.get(CHOSE) is True


def measuring(held_out: Iterable[Example]) -> list[Example]:
    """The rows of an evaluation set that measure: the best of many epochs is flattered by those that chose it."""
    return [row for row in held_out if not chose(row)]


def measuring_digest(held_out: Iterable[Example]) -> str | None:
    """Of those that measure; None where none does."""
    found = measuring(held_out)
    return digest_of(found) if found else None


def jsonl_of(rows: Sequence[Example]) -> bytes:
    """Texts and targets; of the other fields only which rows chose an epoch."""
    lines = (
        {"text": row.text} | ({"label": row.label} if row.label is not None else {}) | targets_of(row) | ({CHOSE: True} if chose(row) else {})
        for row in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines).encode()


# ---- reading ------------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, JSON] | BadRow]]:
    """Stream (line number from 1, row) of JSONL, CSV, TSV or Parquet, by suffix; `.gz` is unpacked. Blank lines are passed over.

    A Parquet row's number is its position; a CSV row's is that of its first line. Raises UnreadableFile.
    """
    return iter(RowReader(path))


class RowReader:
    """`read_rows` that can say how far it is."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._suffix = format_of(self.path)
        if not self.path.is_file():
            raise UnreadableFile(f"there is no file {str(path)!r}.", hint="Check the path.")
        try:
            self.path.open("rb").close()
        except OSError as error:
            raise UnreadableFile(f"{str(path)!r} cannot be opened ({error.strerror}).", hint="Check its permissions.") from error
        self._size = self.path.stat().st_size
        self._file: IO[bytes] | None = None

    @property
    def share(self) -> float | None:
        """How much of the file has been read, 0-1; None where that is not known."""
        return None if self._file is None or self._file.closed or not self._size else self._file.tell() / self._size

    def __iter__(self) -> Iterator[tuple[int, dict[str, JSON] | BadRow]]:
        if self._suffix == ".parquet":
            yield from _parquet_rows(self.path)
            return
        try:
            with self.path.open("rb") as self._file:
                unpacked: Any = gzip.GzipFile(fileobj=self._file) if self.path.suffix.lower() == ".gz" else self._file
                delimiter = {".csv": ",", ".tsv": "\t"}.get(self._suffix)
                yield from _json_rows(unpacked) if delimiter is None else _csv_rows(self.path, unpacked, delimiter)
        except (OSError, EOFError, zlib.error) as error:
            raise UnreadableFile(f"{str(self.path)!r} cannot be read to its end ({error}).", hint="Copy the file again.") from error


def format_of(path: Path) -> str:
    """The suffix that says how the file is written. Raises UnreadableFile for one that is not known."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES:
        raise UnreadableFile(f"{str(path)!r} ends with none of {', '.join(SUFFIXES)}.", hint="Name the format by the file's suffix.")
    return suffix


def _json_rows(file: IO[bytes]) -> Iterator[tuple[int, dict[str, JSON] | BadRow]]:
    number = 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            start = line[:200]
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES_MAX)
            yield number, BadRow(f"is longer than {LINE_BYTES_MAX >> 20} MiB", start.decode("utf-8", "replace"))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: bytes) -> dict[str, JSON] | BadRow:
    raw = line[:200].decode("utf-8", "replace").rstrip()
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"), parse_constant=_no_constant, parse_float=_number, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start + 1})", raw)
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON ({error.msg}, column {error.colno})", raw)
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON ({error})", raw)
    return row if isinstance(row, dict) else BadRow(f"is {_kind(row)}, not an object with a text", raw)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _once(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    """An object whose names are all there once: which of two is meant, nobody can say."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:40]!r} is there twice")
    return found


def _number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is more than a number can hold")
    return number


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    number = 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise UnreadableFile(f"{str(path)!r}: line {number} is longer than {LINE_BYTES_MAX >> 20} MiB.", hint="Save it as UTF-8 CSV.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        # A byte that is not UTF-8 becomes a lone surrogate, which no proper file holds: the row is then found to be bad.
        yield line.decode("utf-8", "surrogateescape")


class _Lines:
    """Lines of a file, of which those since `mark` can be read again."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._taken: list[str] = []    # since the mark
        self._again: list[str] = []    # to be read before the file's next
        self.number = 0                # of the line read last, from 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.pop() if self._again else next(self._lines)
        self._taken.append(line)
        self.number += 1
        return line

    def mark(self) -> None:
        self._taken.clear()

    def after_first(self) -> str:
        """Go on with the second line after the mark; returns the first."""
        first, *others = self._taken
        self._again += reversed(others)
        self.number -= len(others)
        return first


def _csv_rows(path: Path, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, JSON] | BadRow]]:
    lines = _Lines(_decoded(path, file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next((values for values in reader if values), [])
    except csv.Error as error:
        raise UnreadableFile(f"{str(path)!r}: the header is not CSV ({error}).", hint="Save it as UTF-8 CSV.") from error
    if not header:
        return
    if not _is_unicode("".join(header)):
        raise UnreadableFile(f"{str(path)!r}: the first line is not UTF-8.", hint="Save it as UTF-8 CSV.")
    if not _INPUTS & set(header) or len(set(header)) != len(header):
        what = "has no column 'text'" if not _INPUTS & set(header) else "has a column name twice"
        shown = ", ".join(repr(name[:40]) for name in header[:COLUMNS_SHOWN])
        raise UnreadableFile(f"{str(path)!r} {what}; its first line is {shown}.", hint="The first line must name the columns, one of them 'text'.")
    suspect_to = 0    # the last line that a quote left open had swallowed
    while True:
        lines.mark()
        line = lines.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A stray quote at the start of a field takes in line after line: only the one that it stands in is given up.
            suspect_to = max(suspect_to, lines.number)
            open_quote = f", or a quote that it opens stays open to line {lines.number}" if lines.number > line else ""
            yield line, BadRow(f"is not CSV ({error}{open_quote})", lines.after_first()[:200].rstrip("\r\n"))
            continue
        if line <= suspect_to and any('"' in value for value in values):
            yield line, BadRow("is not CSV (a quote before it is not closed, or this one is not opened)", delimiter.join(values)[:200])
        elif values:
            yield line, _csv_row(header, values)


def _csv_row(header: Sequence[str], values: Sequence[str]) -> dict[str, JSON] | BadRow:
    raw = ",".join(values)[:200]
    if not _is_unicode("".join(values)):
        return BadRow("is not UTF-8", raw.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    if len(values) != len(header):
        return BadRow(f"has {len(values)} values for {len(header)} columns", raw)
    return dict(zip(header, values, strict=True))


def _parquet_file(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableFile(f"{str(path)!r} is not a Parquet file ({error}).", hint="Write it again.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, JSON] | BadRow]]:
    import pyarrow as pa

    file = _parquet_file(path)
    names = file.schema_arrow.names
    shown = ", ".join(map(repr, names[:COLUMNS_SHOWN]))
    if not _INPUTS & set(names):
        raise UnreadableFile(f"{str(path)!r} has no column 'text', only {shown}.", hint="Name the column of inputs 'text'.")
    if len(set(names)) != len(names):
        raise UnreadableFile(f"{str(path)!r} has a column name twice: {shown}.", hint="Rename one of them.")
    classes = _parquet_classes(file.schema_arrow)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for row in _parquet_batch(batch):
                number += 1
                yield number, _of_classes(row, classes)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableFile(f"{str(path)!r} cannot be read after row {number} ({error}).", hint="Write it again.") from error


def _parquet_classes(schema: Any) -> dict[str, list[str]]:
    """Of each column that `datasets` wrote as numbers of classes, their names: it keeps them in the file's metadata."""
    import pyarrow as pa

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = {column: feature["names"] for column, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {
        column: list(map(str, known)) for column, known in names.items()
        if column in schema.names and isinstance(known, list) and pa.types.is_integer(schema.field(column).type)
    }    # fmt: skip


def _of_classes(row: dict[str, JSON] | BadRow, classes: Mapping[str, Sequence[str]]) -> dict[str, JSON] | BadRow:
    if isinstance(row, BadRow) or not classes:
        return row
    try:
        found: dict[str, JSON] = _named(row, classes)
    except IndexError:
        column = next(column for column, names in classes.items() if (row[column] or 0) >= len(names))
        return BadRow(f"has the class {row[column]} in {column!r}, and the file names {len(classes[column])}")
    return found


def _parquet_batch(batch: Any) -> Iterator[dict[str, JSON] | BadRow]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        # One value that Python cannot hold (bytes that are not UTF-8, nanoseconds, the year 30000) fails its own row.
        for position in range(batch.num_rows):
            try:
                yield batch.slice(position, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield BadRow(f"is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error})")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
