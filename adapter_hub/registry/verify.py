"""Hash everything that is stored and compare catalogue, folders and histories. Damage is reported, never raised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping

from adapter_hub.errors import CorruptVersion, HubError
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import check_file, is_held
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.events import Event
from adapter_hub.registry.history import read_history
from adapter_hub.registry.layout import MANIFEST, Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.rebuild import name_folders, read_manifest, version_folders
from adapter_hub.registry.schema import VersionState

JSON = Any
_PURGED = (VersionState.PURGING, VersionState.PURGED)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    fact: str

    def to_json(self) -> dict[str, JSON]:
        return {"where": self.where, "fact": self.fact}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at, and what is wrong with it."""

    versions: int                       # counts of what was checked
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    unregistered: tuple[str, ...]       # folders that no reader sees: `adopt` takes them in

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, JSON]:
        row: dict[str, JSON] = {"ok": self.ok, "versions": self.versions, "files": self.files, "bytes": self.bytes}
        row["problems"] = [problem.to_json() for problem in self.problems]
        return row | {"unregistered": list(self.unregistered)}


class _Tally:
    def __init__(self) -> None:
        self.files = self.bytes = 0

    def hash(self, path: Path, sha256: str) -> None:
        self.bytes += check_file(path, sha256).bytes
        self.files += 1


def verify(catalog: Catalog, layout: Layout, ref: AdapterRef | None = None) -> VerifyReport:
    """Check everything, or the one version of a resolved `ref`."""
    tally, problems = _Tally(), []
    with catalog.reading() as connection:
        rows = records.known_rows(connection, ref)
        aliases = records.all_aliases(connection)
        calibrations = {} if ref is not None else records.live_calibrations(connection)
        events = [] if ref is not None else records.select_events(connection, mirrored=True)
    for row in rows:
        problems += _settled(catalog, row, lambda current: _check_version(layout, current, tally))
    for number, sha256 in calibrations.items():
        problems += _reported(f"calibration {number}", lambda n=number, s=sha256: tally.hash(layout.calibration(n), s))    # type: ignore[misc]
    unregistered: list[str] = []
    if ref is None:
        problems += _check_aliases(rows, aliases)
        problems += _check_histories(catalog, layout, events)
        problems += _reported(str(layout.adapters), lambda: unregistered.extend(find_unregistered(catalog, layout)))
    return VerifyReport(len(rows), tally.files, tally.bytes, tuple(problems), tuple(unregistered))


def _settled(catalog: Catalog, row: RowMapping, check: Callable[[RowMapping], list[Problem]]) -> list[Problem]:
    """The problems of a version that does not change meanwhile: what looked damaged may just have been purged."""
    problems = check(row)
    if problems:
        with catalog.reading() as connection:
            current = records.row_of(connection, row["name"], row["version"])
        if current is not None and current["state"] != row["state"]:
            return check(current)
    return problems


def _reported(where: str, check: Callable[[], None]) -> list[Problem]:
    try:
        check()
    except HubError as error:
        return [Problem(where, error.fact)]
    except OSError as error:
        return [Problem(where, f"{error.filename or ''} cannot be read: {error.strerror}.")]
    return []


def _check_version(layout: Layout, row: RowMapping, tally: _Tally) -> list[Problem]:
    where = f"{row['name']}@{row['version']}"
    if row["state"] == VersionState.PURGING:
        return []    # its files are just being erased
    problems = _reported(where, lambda: _check_manifest(layout, row))
    if problems:
        return problems
    manifest = records.manifest_of(row)
    folder = layout.version(manifest.name, manifest.version)
    for file, sha256 in manifest.files.items():
        problems += _reported(where, lambda f=file, s=sha256: tally.hash(folder / f, s))    # type: ignore[misc]
    return problems + _reported(where, lambda: _check_nothing_else(folder, {MANIFEST, *manifest.files}))


def _check_nothing_else(folder: Path, known: set[str]) -> None:
    extra = sorted(set(os.listdir(folder)) - known)
    if extra:
        hint = "Remove it, if nobody needs it: programs that read PEFT folders may take it for the adapter's."
        raise CorruptVersion(f"{', '.join(str(folder / name) for name in extra)} is not a file of this version.", hint=hint)


def _check_manifest(layout: Layout, row: RowMapping) -> None:
    stored = records.manifest_of(row)
    check_same_manifest(read_manifest(layout, stored.name, stored.version), stored, layout)


def check_same_manifest(found: Manifest, stored: Manifest, layout: Layout) -> None:
    """Raises CorruptVersion where the folder's manifest is not the one that was registered."""
    if found != stored:
        path = layout.version(stored.name, stored.version) / MANIFEST
        raise CorruptVersion(f"{path} is not the manifest that was registered.", hint="Restore it from a copy.")


def _check_aliases(rows: Iterable[RowMapping], aliases: dict[tuple[str, str], int]) -> list[Problem]:
    states = {(row["name"], row["version"]): row["state"] for row in rows}
    problems = []
    for (name, alias), version in sorted(aliases.items()):
        state = states.get((name, version))
        if state is None or state in _PURGED or (alias == PRODUCTION and state != VersionState.LIVE):
            problems.append(Problem(f"{name}@{alias}", f"it names version {version}, which is {state or 'not registered'}."))
    return problems


def _check_histories(catalog: Catalog, layout: Layout, events: list[Event]) -> list[Problem]:
    """Each history must hold what was mirrored into it, and nothing that the catalogue does not know."""
    by_name: dict[str | None, list[Event]] = {name: [] for name in (None, *name_folders(layout))}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    problems = []
    for name, mirrored in by_name.items():
        path = layout.history(name)
        try:
            history = read_history(path, name)
        except (HubError, OSError) as error:
            problems.append(Problem(str(path), f"cannot be read: {error}"))
            continue
        problems += [Problem(f"{path}:{number}", "this line is not an event.") for number in history.unreadable]
        written = Counter(event.content for event in history.events)
        lost = Counter(event.content for event in mirrored) - written
        missing = [event for event in mirrored if event.content in lost]
        with catalog.reading() as connection:
            foreign = foreign_events(connection, name, history.events)
        problems += [Problem(str(path), f"{_said(event)} is missing.") for event in missing]
        problems += [Problem(str(path), f"{_said(event)} is not in the catalogue; see `adapter-hub adopt`.") for event in foreign]
    return problems


def _said(event: Event) -> str:
    return f"event {event.seq} ({event.kind}, version {event.version})"


def foreign_events(connection: Connection, name: str | None, lines: Iterable[Event]) -> list[Event]:
    """Events of a history that the catalogue does not know: they came by git or copy."""
    known = Counter(event.content for event in records.select_events(connection, name=name, calibrations=name is None))
    found = []
    for event in lines:
        if known[event.content]:
            known[event.content] -= 1
        else:
            found.append(event)
    return found


def find_unregistered(catalog: Catalog, layout: Layout) -> Iterator[str]:
    """Version folders without a row, as `name@version`; not those that a living process is just registering."""
    for name in name_folders(layout):
        numbers = version_folders(layout, name)
        with catalog.reading() as connection:
            known = {row.ref.version for row in records.list_rows(connection, name)}
        for number in numbers:
            if number in known or is_held(layout.held(name, number)):
                continue
            with catalog.reading() as connection:    # it may have been committed since the listing
                registered = records.state_of(connection, name, number) is not None
            if not registered and os.path.lexists(layout.version(name, number)):
                yield f"{name}@{number}"

