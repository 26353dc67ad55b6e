"""The catalogue from files alone: histories are replayed, manifests say what each version is.

Only what a history says was registered comes back; a complete folder that no history names is left to `adopt`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Connection, insert

from adapter_hub.errors import CorruptVersion, HubError, InvalidName, RegistryError
from adapter_hub.refs import check_name
from adapter_hub.registry import records, schema
from adapter_hub.registry.artifacts import check_file, check_folder, read_regular
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.events import Event, NameState, replay, without_phantoms
from adapter_hub.registry.history import read_history
from adapter_hub.registry.layout import MANIFEST, NUMBER_MAX, Layout, as_number
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.schema import VersionState

log = logging.getLogger("adapter_hub")


def ensure_schema(catalog: Catalog, layout: Layout) -> bool:
    """Make the tables and fill them from the files, in one transaction; False where they were there. Raises SchemaTooNew."""
    if catalog.schema_found():
        return False
    with catalog.writing() as connection:
        if not catalog.make_schema(connection):
            return False
        fill(connection, layout)
    return True


def in_memory(layout: Layout) -> Catalog:
    """A catalogue of this process alone, for a registry folder that may only be read."""
    catalog = Catalog.memory(shown=str(layout.root))
    catalog.writable = True
    with catalog.writing() as connection:
        catalog.make_schema(connection)
        fill(connection, layout)
    catalog.writable = False
    return catalog


def fill(connection: Connection, layout: Layout) -> None:
    """Fill empty tables from the files."""
    calibrated = _events_of(layout, None)
    histories: dict[str, Sequence[Event]] = {name: _events_of(layout, name) for name in name_folders(layout)}
    rows, manifests = [], []
    for name, events in histories.items():
        state = replay(events)
        histories[name], phantoms = without_phantoms(events)
        if phantoms:
            said = ", ".join(sorted({f"{name}@{event.version}" for event in phantoms}))
            log.warning("%s speaks of %s, which it never registers: skipped", layout.history(name), said)
        rebuilt = [rebuild_version(layout, name, version, state) for version in sorted(state.versions)]
        rows += [values for values, _ in rebuilt]
        manifests += [manifest for _, manifest in rebuilt if manifest is not None]
        for alias, version in state.aliases.items():
            records.write_alias(connection, name, alias, version)
    if rows:
        connection.execute(insert(schema.versions), rows)
    records.insert_parts(connection, manifests)
    for number, sha256 in settle_calibrations(layout, calibrated).items():
        records.store_calibration(connection, number, sha256)
    records.insert_events(connection, in_one_sequence([calibrated, *histories.values()]), mirrored=True)


def _events_of(layout: Layout, name: str | None) -> tuple[Event, ...]:
    path = layout.history(name)
    try:
        history = read_history(path, name)
    except CorruptVersion as error:
        log.warning("%s", error)
        return ()
    if history.unreadable:
        log.warning("%s: lines %s cannot be read and were skipped", path, ", ".join(map(str, history.unreadable)))
    return history.events


def settle_calibrations(layout: Layout, events: Iterable[Event]) -> dict[int, str]:
    """number -> sha256 after these events. Where two clones gave out one number, the file says whose record it is."""
    said: dict[int, list[str]] = {}
    for event in events:
        said.setdefault(event.version, []).append(event.detail["digest"])
    return {number: _settle(layout.calibration(number), list(dict.fromkeys(digests)), number) for number, digests in said.items()}


def _settle(path: Path, digests: Sequence[str], number: int) -> str:
    if len(digests) == 1:
        return digests[0]
    kept = next((digest for digest in digests if _has_digest(path, digest)), digests[-1])
    log.warning("two clones made calibration %d: kept is %s…, as in %s; the other is not known any more", number, kept[:12], path)
    return kept


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        check_file(path, sha256)
    except (CorruptVersion, OSError):
        return False
    return True


def in_one_sequence(histories: Sequence[Sequence[Event]]) -> list[Event]:
    """All events with the numbers they had; where two clones gave out the same ones, later lines get the next free."""
    keyed = []
    for history in histories:
        highest = 0
        for position, event in enumerate(history):
            highest = max(highest, event.seq)    # never before its predecessor in the file
            keyed.append((highest, event.at, event.name or "", position, event))
    ordered: list[Event] = []
    for *_, event in sorted(keyed, key=lambda item: item[:4]):
        ordered.append(replace(event, seq=max(event.seq, ordered[-1].seq + 1 if ordered else 1)))
    return ordered


def rebuild_version(layout: Layout, name: str, version: int, state: NameState) -> tuple[dict[str, object], Manifest | None]:
    """The row of one version: from its manifest where that is whole, else what the history alone says."""
    digest, purged = state.versions[version], state.purged.get(version)
    try:
        manifest: Manifest | None = read_manifest(layout, name, version)
    except HubError as error:
        log.warning("%s", error)
        manifest = None
    if purged is not None:
        return _purged_row(layout, name, version, state, manifest), None
    status = VersionState.RETIRED if version in state.retired else VersionState.LIVE
    if manifest is None or manifest.purged_at or (digest is not None and manifest.digest != digest):
        return records.lost_values(name, version, status, digest, state.registered_at[version]), None
    return records.row_values(manifest, status), manifest


def _purged_row(layout: Layout, name: str, version: int, state: NameState, manifest: Manifest | None) -> dict[str, object]:
    purged_at = state.purged[version]
    if manifest is None:
        digest, created_at = state.versions[version] or "", state.registered_at[version]
        manifest = Manifest.lost(name, version, digest=digest, created_at=created_at, purged_at=purged_at)
    elif manifest.purged_at is None:
        manifest = manifest.tombstone(purged_at)
    # PURGING: opening the registry erases what may still lie in the folder.
    status = VersionState.PURGED if is_tombstone(layout, manifest) else VersionState.PURGING
    return records.row_values(manifest, status)


def is_tombstone(layout: Layout, manifest: Manifest) -> bool:
    """Whether the folder of a purged version holds its tombstone and nothing else."""
    folder = layout.version(manifest.name, manifest.version)
    try:
        return os.listdir(folder) == [MANIFEST] and read_regular(folder / MANIFEST) == manifest.to_bytes()
    except (OSError, CorruptVersion):
        return False


def read_manifest(layout: Layout, name: str, version: int) -> Manifest:
    """The manifest in a version folder, checked against its own digest and its place. Raises CorruptVersion, SchemaTooNew."""
    folder = checked_folder(layout, name, version)
    try:
        manifest = Manifest.from_bytes(read_regular(folder / MANIFEST), source=folder / MANIFEST)
    except OSError as error:
        raise RegistryError(f"{folder / MANIFEST} cannot be read: {error.strerror}.", hint="Ask its owner for read permission.") from error
    if (manifest.name, manifest.version) != (name, version):
        raise CorruptVersion(f"{folder} holds {manifest.ref}: it was copied or renamed.", hint="Register it under this name instead.")
    return manifest


def checked_folder(layout: Layout, name: str, version: int) -> Path:
    """The folder of a version, no link on the way to it. Raises CorruptVersion."""
    folder = layout.version(name, version)
    for path in (layout.adapters, folder.parent, folder):
        check_folder(path)
    return folder


def name_folders(layout: Layout) -> list[str]:
    """Names that have a folder; links and files are not among them."""
    return sorted(entry.name for entry in _entries(layout.adapters) if _is_name(entry.name) and entry.is_dir(follow_symlinks=False))


def version_folders(layout: Layout, name: str) -> list[int]:
    """Numbers that something in the folder of this name has, links included."""
    numbers = (as_number(entry.name) for entry in _entries(layout.name(name)))
    return sorted(number for number in numbers if number is not None)


def highest_number(folder: Path, suffix: str = "") -> int:
    """The highest number that names something in a folder; 0 for none. Quick, because every `add` asks."""
    try:
        entries = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    stems = [entry.removesuffix(suffix) for entry in entries] if suffix else entries
    return max((number for number in map(int, filter(str.isdecimal, stems)) if number <= NUMBER_MAX), default=0)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidName:
        return False
    return True


