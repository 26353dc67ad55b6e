"""What came into a registry folder by git or copy is taken in: version folders, calibrations, and their history lines.

What is slow, hashing and checking the folders, is done first and without a lock. What is decided, is decided and written in one
transaction for each name, under the lock of the histories: nothing can be committed between looking and writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping

from adapter_hub.errors import CorruptVersion, HubError
from adapter_hub.refs import AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import check_file, is_held, locked, storage_errors
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.events import Event, EventKind, NameState, replay, without_phantoms
from adapter_hub.registry.history import mirror_within, read_history
from adapter_hub.registry.layout import DATA_FILES, PEFT_CONFIG, Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.moves import bury
from adapter_hub.registry.rebuild import name_folders, read_manifest, settle_calibrations, version_folders
from adapter_hub.registry.registration import now
from adapter_hub.registry.schema import VersionState
from adapter_hub.registry.verify import Problem, foreign_events

JSON = Any
Check = Callable[[Path, Manifest], None]    # raises HubError where the folder is not a version that can be used


@dataclass(frozen=True, slots=True)
class AdoptReport:
    """What `adopt` took in, and what it could not."""

    adopted: tuple[AdapterRef, ...]
    events: int                         # history lines of another clone that were taken in
    conflicts: tuple[Problem, ...]      # two different folders claim one number
    refused: tuple[Problem, ...]        # not a whole version of this registry

    def to_json(self) -> dict[str, JSON]:
        row: dict[str, JSON] = {"adopted": [str(ref) for ref in self.adopted], "events": self.events}
        row["conflicts"] = [problem.to_json() for problem in self.conflicts]
        return row | {"refused": [problem.to_json() for problem in self.refused]}


@dataclass(slots=True)
class _Tally:
    adopted: list[AdapterRef] = field(default_factory=list)
    events: int = 0
    conflicts: list[Problem] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)


def adopt(catalog: Catalog, layout: Layout, config: RegistryConfig, check: Check | None = None) -> AdoptReport:
    """Take in whole version folders without a row, and the history lines that came with them.

    A folder whose history came along gets the aliases that the history gives it; a bare folder gets none: `promote` it.
    """
    tally = _Tally()
    for name in name_folders(layout):
        whole, doubtful = _look(catalog, layout, config, name, check, tally)
        with _deciding(catalog, layout, name, tally) as (connection, lines):
            if lines is not None:
                _take_in(connection, layout, name, lines, whole, doubtful, tally)
    with _deciding(catalog, layout, None, tally) as (connection, lines):
        if lines is not None:
            _take_in_calibrations(connection, layout, lines, tally)
    return AdoptReport(tuple(tally.adopted), tally.events, tuple(tally.conflicts), tuple(tally.refused))


@contextmanager
def _deciding(
    catalog: Catalog, layout: Layout, name: str | None, tally: _Tally
) -> Iterator[tuple[Connection, tuple[Event, ...] | None]]:
    """A writing transaction, and the history file with all in it that is committed; None where it cannot be read."""
    with storage_errors(layout.root), locked(layout.lock("history")), catalog.writing() as connection:
        lines = None
        try:
            mirror_within(connection, layout, name)
            lines = read_history(layout.history(name), name).events
        except CorruptVersion as error:
            tally.refused.append(Problem(str(layout.history(name)), error.fact))
        yield connection, lines


# ---- versions -------------------------------------------------------------------------------------------------------


def _look(
    catalog: Catalog, layout: Layout, config: RegistryConfig, name: str, check: Check | None, tally: _Tally
) -> tuple[dict[int, Manifest], list[int]]:
    """(folders without a row that can be taken in, numbers of registered ones that may be a conflict). What cannot is refused."""
    whole: dict[int, Manifest] = {}
    with catalog.reading() as connection:
        rows = records.rows_of(connection, name)
    for number in version_folders(layout, name):
        if number in rows or is_held(layout.held(name, number)):
            continue    # registered, or a living process is just registering it
        try:
            whole[number] = _whole(layout, config, name, number, check)
        except (HubError, OSError) as error:
            tally.refused.append(Problem(f"{name}@{number}", error.fact if isinstance(error, HubError) else str(error)))
    return whole, [number for number in rows if _conflict(layout, rows[number])]


def _whole(layout: Layout, config: RegistryConfig, name: str, number: int, check: Check | None) -> Manifest:
    """The manifest of a folder that is a whole version, made for this registry's base and encoder. Raises HubError."""
    manifest = read_manifest(layout, name, number)
    if manifest.purged_at is not None:
        return manifest
    if config.base_fingerprint not in ("", manifest.base_fingerprint):
        raise HubError(f"it was made for another base model ({manifest.base_model}).")
    if config.encoder_fingerprint not in ("", manifest.encoder_fingerprint):
        raise HubError("its routing state was made with another encoder.")
    missing = [file for file in (PEFT_CONFIG, *DATA_FILES) if file not in manifest.files]
    if missing:
        raise HubError(f"it has no {', '.join(missing)}.")
    folder = layout.version(name, number)
    for file, sha256 in manifest.files.items():
        check_file(folder / file, sha256)
    if check is not None:
        check(folder, manifest)
    return manifest


def _conflict(layout: Layout, row: RowMapping) -> str:
    """What in the folder contradicts the registered version; that it is damaged is for `verify` to say."""
    try:
        manifest = read_manifest(layout, row["name"], row["version"])
    except HubError:
        return ""
    if manifest.digest != row["digest"]:
        return f"the folder has digest {manifest.digest[:19]}…, the registered version {str(row['digest'])[:19]}…."
    if row["state"] == VersionState.PURGED and manifest.purged_at is None:
        return "it was purged here, and its manifest is back in the folder."
    return ""


def _take_in(
    connection: Connection, layout: Layout, name: str, lines: Sequence[Event], whole: Mapping[int, Manifest], doubtful: Iterable[int], tally: _Tally
) -> None:
    """Everything of one name, or, where something of it contradicts what is here, nothing."""
    rows = records.rows_of(connection, name)
    foreign = foreign_events(connection, name, lines)
    said = {event.version for event in lines}
    new = {number: manifest for number, manifest in whole.items() if number not in rows}
    for number in [number for number, manifest in new.items() if manifest.purged_at is not None and number not in said]:
        tally.refused.append(Problem(f"{name}@{number}", "it is a tombstone without a history."))
        del new[number]
    conflicts = [Problem(f"{name}@{number}", fact) for number in doubtful if (fact := _conflict(layout, rows[number]))]
    digests = {number: row["digest"] for number, row in rows.items()} | {number: manifest.digest for number, manifest in new.items()}
    for event in foreign:
        digest, known = str(event.detail.get("digest") or ""), digests.get(event.version)
        if digest and known is not None and digest != known:
            fact = f"the history that came has digest {digest[:19]}…, the version here {known[:19]}…."
            conflicts.append(Problem(f"{name}@{event.version}", fact))
    if conflicts:
        tally.conflicts += conflicts    # which of two folders is meant is for people to say
        return
    bare = sorted(new.keys() - {event.version for event in without_phantoms(lines)[0]})
    adopted = [Event(1, now(), EventKind.ADOPTED, name, number, detail={"digest": new[number].digest}) for number in bare]
    state, phantoms = replay([*lines, *adopted]), without_phantoms([*lines, *adopted])[1]
    lost = [version for version in state.versions if version not in rows.keys() | new.keys() | state.purged.keys()]
    if foreign and (lost or phantoms):
        version, what = (lost[0], "has no whole folder here") if lost else (phantoms[0].version, "it never registers")
        tally.refused.append(Problem(name, f"its history speaks of version {version}, which {what}."))
        return
    for manifest in new.values():
        records.store(connection, manifest, VersionState.PURGED if manifest.purged_at else VersionState.LIVE)
    if foreign:
        _hold_to_history(connection, name, state)
        _insert(connection, foreign)
    for event in adopted:
        records.record(connection, event.kind, name, event.version, at=event.at, detail=dict(event.detail))
    tally.adopted += [manifest.ref for _, manifest in sorted(new.items())]
    tally.events += len(foreign)


def _hold_to_history(connection: Connection, name: str, state: NameState) -> None:
    """Make rows and aliases what the history file, with the lines of both clones, comes to: a rebuild gives the same."""
    for version in state.versions:
        current = records.state_of(connection, name, version)
        if version in state.purged and current not in (VersionState.PURGING, VersionState.PURGED):
            bury(connection, AdapterRef(name, version), at=state.purged[version])
        elif version in state.retired and current is VersionState.LIVE:
            records.set_state(connection, name, version, VersionState.RETIRED)
    for alias in sorted(set(records.aliases_of(connection, name)) | set(state.aliases)):
        records.write_alias(connection, name, alias, state.aliases.get(alias))


def _insert(connection: Connection, foreign: Iterable[Event]) -> None:
    last = records.last_seq(connection)
    numbered = [replace(event, seq=last + position) for position, event in enumerate(foreign, 1)]
    records.insert_events(connection, numbered, mirrored=True)


# ---- calibrations ---------------------------------------------------------------------------------------------------


def _take_in_calibrations(connection: Connection, layout: Layout, lines: Sequence[Event], tally: _Tally) -> None:
    """The records that the history names, as a rebuild would take them; nothing where the file of one is not there."""
    foreign = foreign_events(connection, None, lines)
    wanted = settle_calibrations(layout, lines)
    refused = []
    numbers = sorted({event.version for event in foreign})
    for number in numbers:
        try:
            check_file(layout.calibration(number), wanted[number])
        except CorruptVersion as error:
            refused.append(Problem(f"calibration {number}", error.fact))
    tally.refused += refused
    if not refused:
        for number in numbers:
            records.store_calibration(connection, number, wanted[number])
        _insert(connection, foreign)
        tally.events += len(foreign)
