"""The history files: append-only lines that mirror the catalogue's events, and what a rebuild reads.

A line follows each commit. A crash in between is made good here: events that are not yet marked as mirrored are written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from adapter_hub.errors import CorruptVersion
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import locked, make_folder, read_regular, storage_errors, sync_folder
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.events import Event
from adapter_hub.registry.layout import Layout

TAIL_BYTES = 1 << 16    # what a crash can have left unmarked is at the end


@dataclass(frozen=True, slots=True)
class History:
    """What one history.jsonl says."""

    events: tuple[Event, ...]        # in the order of the lines
    unreadable: tuple[int, ...]      # 1-based numbers of lines that are not events; a torn last line is none of them


def read_history(path: Path, name: str | None) -> History:
    """A missing file is an empty history. Raises CorruptVersion where a link stands there."""
    if not os.path.lexists(path):
        return History((), ())
    return parse_history(read_regular(path), name)


def parse_history(data: bytes, name: str | None) -> History:
    events, unreadable = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events.append(Event.from_line(line, name))
        except ValueError:
            if number < len(lines):    # what follows the last newline was cut off by a crash
                unreadable.append(number)
    return History(tuple(events), tuple(unreadable))


def mirror(catalog: Catalog, layout: Layout, name: str | None) -> None:
    """Write the lines that the history of `name` still lacks, durably. Raises RegistryError."""
    with storage_errors(layout.root), locked(layout.lock("history")):
        with catalog.reading() as connection:
            missing = _missing(connection, name)
        if not missing:
            return
        append(layout.history(name), missing)
        with catalog.writing(durable=False) as connection:    # if this is lost, the lines are found in the file
            records.mark_mirrored(connection, missing)


def mirror_within(connection: Connection, layout: Layout, name: str | None) -> None:
    """The same in a writing transaction of the caller, who holds the lock of the histories. Raises CorruptVersion, OSError."""
    missing = _missing(connection, name)
    if missing:
        append(layout.history(name), missing)
        records.mark_mirrored(connection, missing)


def _missing(connection: Connection, name: str | None) -> list[Event]:
    return records.select_events(connection, name=name, mirrored=False, calibrations=name is None)


def append(path: Path, events: Sequence[Event]) -> None:
    """Append the events that are not among the last lines. The caller holds the lock of the histories."""
    make_folder(path.parent)
    new = not os.path.lexists(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise CorruptVersion(f"{path} is a symbolic link.", hint="Replace it by the file that it names.") from error
        raise
    try:
        lines = [event.to_line() for event in events]
        tail = _mend(descriptor, max(TAIL_BYTES, 2 * sum(map(len, lines))))
        written = set(tail.splitlines(keepends=True))
        start = os.fstat(descriptor).st_size
        try:
            _write(descriptor, b"".join(line for line in lines if line not in written))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)
            raise
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def _mend(descriptor: int, tail_bytes: int) -> bytes:
    """Return the last lines, after making sure that the file ends with a whole one."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - tail_bytes)
    tail = os.pread(descriptor, size - start, start)
    if start and b"\n" not in tail:
        return _mend(descriptor, 2 * tail_bytes)
    head, newline, torn = tail.rpartition(b"\n")
    if not torn:
        return tail
    if parse_history(torn, None).events or parse_history(torn, "a").events:
        _write(descriptor, b"\n")    # a whole line: an editor took its newline away
        return tail + b"\n"
    os.ftruncate(descriptor, start + len(head) + len(newline))
    return head + newline


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
