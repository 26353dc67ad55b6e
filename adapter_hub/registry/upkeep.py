"""What keeps a registry folder tidy: unfinished work of dead processes goes, folders that came by git or copy are taken in."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from adapter_hub.errors import HubError
from adapter_hub.refs import AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import HELD, check_file, is_held, locked, storage_errors
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.events import Event, EventKind, NameState, replay
from adapter_hub.registry.history import read_history
from adapter_hub.registry.layout import Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.moves import bury
from adapter_hub.registry.rebuild import name_folders, read_manifest, version_folders
from adapter_hub.registry.records import VersionRow
from adapter_hub.registry.registration import now
from adapter_hub.registry.schema import VersionState
from adapter_hub.registry.verify import Problem, foreign_events

JSON = Any
AGE_MAX_S = 7 * 24 * 3600.0        # older staging is abandoned even where a process seems to hold it
TEMPORARY_AGE_MAX_S = 3600.0       # a temporary file lives for milliseconds


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` removed."""

    removed: tuple[str, ...]    # entries of the staging folder
    bytes: int
    in_progress: int            # entries of living processes, left alone

    def to_json(self) -> dict[str, JSON]:
        return {"removed": list(self.removed), "bytes": self.bytes, "in_progress": self.in_progress}


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


# ---- gc -------------------------------------------------------------------------------------------------------------


def collect_garbage(layout: Layout, age_max_s: float) -> GcReport:
    """Remove staging that no living process holds, or that is older than `age_max_s`. Never a version folder."""
    removed, freed, in_progress = [], 0, 0
    with storage_errors(layout.staging), locked(layout.lock("staging")):
        for entry in sorted(os.scandir(layout.staging), key=lambda entry: entry.name):
            path = Path(entry.path)
            if path.suffix == HELD and not is_held(path):
                path.unlink(missing_ok=True)
            if path.suffix in (".lock", HELD):
                continue
            try:
                age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue    # its owner has just finished
            folder = entry.is_dir(follow_symlinks=False)
            if age_s < age_max_s and (is_held(path.with_suffix(HELD)) if folder else age_s < TEMPORARY_AGE_MAX_S):
                in_progress += 1
                continue
            freed += _bytes(path)
            if folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(entry.name)
    return GcReport(tuple(removed), freed, in_progress)


def _bytes(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    stats = [file.lstat() for file in files if os.path.lexists(file)]
    return sum(found.st_size for found in stats if found.st_nlink == 1)    # what is linked elsewhere frees nothing


# ---- adopt ----------------------------------------------------------------------------------------------------------


def adopt(catalog: Catalog, layout: Layout, config: RegistryConfig) -> AdoptReport:
    """Take in whole version folders without a row, and the history lines that came with them.

    A folder whose history came along gets the aliases that the history gives it; a bare folder gets none: `promote` it.
    """
    adopted: list[AdapterRef] = []
    conflicts: list[Problem] = []
    refused: list[Problem] = []
    events = 0
    for name in name_folders(layout):
        found = _look(catalog, layout, config, name)
        conflicts += found.conflicts
        refused += found.refused
        if found.conflicts:
            continue    # which of two folders is meant is for people to say
        problem = _unusable_history(found)
        if problem is not None:
            refused.append(problem)
            continue
        adopted += _take_in(catalog, found)
        events += len(found.foreign)
    return AdoptReport(tuple(adopted), events, tuple(conflicts), tuple(refused))


@dataclass(frozen=True, slots=True)
class _Found:
    """What the folder of one name holds that the catalogue does not know."""

    name: str
    known: frozenset[int]               # versions that the catalogue has
    whole: dict[int, Manifest]          # folders that can be taken in
    lines: tuple[Event, ...]            # the history file as a whole
    foreign: tuple[Event, ...]          # those of its lines that the catalogue does not know
    conflicts: tuple[Problem, ...]
    refused: tuple[Problem, ...]


def _look(catalog: Catalog, layout: Layout, config: RegistryConfig, name: str) -> _Found:
    whole: dict[int, Manifest] = {}
    conflicts, refused = [], []
    lines: tuple[Event, ...] = ()
    try:
        lines = read_history(layout.history(name), name).events
    except HubError as error:
        refused.append(Problem(str(layout.history(name)), error.fact))
    foreign = tuple(foreign_events(catalog, name, lines))
    with catalog.reading() as connection:
        known = {row.ref.version or 0: row for row in records.list_rows(connection, name)}
    for number in version_folders(layout, name):
        where, row = f"{name}@{number}", known.get(number)
        if row is None and is_held(layout.held(name, number)):
            continue    # a living process is just registering it
        try:
            manifest = read_manifest(layout, name, number)
            if row is None:
                _check_whole(layout, manifest, config, {event.version for event in foreign})
                whole[number] = manifest
        except (HubError, OSError) as error:
            if row is None:    # what is wrong with a registered version is for `verify` to say
                refused.append(Problem(where, error.fact if isinstance(error, HubError) else str(error)))
            continue
        if row is not None and (fact := _conflict(manifest, row)):
            conflicts.append(Problem(where, fact))
    for event in foreign:
        row, digest = known.get(event.version), event.detail.get("digest")
        if row is not None and digest and digest != row.digest:
            fact = f"the history that came has digest {str(digest)[:19]}…, the registered version {row.digest[:19]}…."
            conflicts.append(Problem(f"{name}@{event.version}", fact))
    return _Found(name, frozenset(known), whole, lines, foreign, tuple(conflicts), tuple(refused))


def _conflict(manifest: Manifest, row: VersionRow) -> str:
    if manifest.digest != row.digest:
        return f"the folder has digest {manifest.digest[:19]}…, the registered version {row.digest[:19]}…."
    if row.state is VersionState.PURGED and manifest.purged_at is None:
        return "it was purged here, and its manifest is back in the folder."
    return ""


def _check_whole(layout: Layout, manifest: Manifest, config: RegistryConfig, in_history: set[int]) -> None:
    """Raises HubError where the folder is not a whole version made for this registry's base."""
    if manifest.purged_at is not None and manifest.version not in in_history:
        raise HubError("it is a tombstone without a history.")
    if manifest.purged_at is None and config.base_fingerprint not in ("", manifest.base_fingerprint):
        raise HubError(f"it was made for another base model ({manifest.base_model}).")
    for file, sha256 in manifest.files.items():
        check_file(layout.version(manifest.name, manifest.version) / file, sha256)


def _unusable_history(found: _Found) -> Problem | None:
    """Lines of another clone can be taken in only with the folders that they speak of."""
    state = replay(found.lines)
    lost = [version for version in state.versions if version not in found.known | found.whole.keys() | state.purged.keys()]
    if found.foreign and lost:
        return Problem(found.name, f"its history came with version {lost[0]}, which has no whole folder here.")
    return None


def _take_in(catalog: Catalog, found: _Found) -> list[AdapterRef]:
    """Everything of one name in one transaction."""
    if not found.whole and not found.foreign:
        return []
    state = replay(found.lines)
    with catalog.writing() as connection:
        for manifest in found.whole.values():
            records.store(connection, manifest, VersionState.PURGED if manifest.purged_at else VersionState.LIVE)
        if found.foreign:
            _hold_to_history(connection, found.name, state)
            last = records.last_seq(connection)
            numbered = [replace(event, seq=last + position) for position, event in enumerate(found.foreign, 1)]
            records.insert_events(connection, numbered, mirrored=True)
        for version, manifest in sorted(found.whole.items()):
            if version not in state.versions:
                detail = {"digest": manifest.digest}
                records.record(connection, EventKind.ADOPTED, found.name, version, at=now(), detail=detail)
    return [manifest.ref for _, manifest in sorted(found.whole.items())]


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
