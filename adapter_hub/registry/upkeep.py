"""What keeps a registry folder tidy: unfinished work of dead processes goes, folders that came by git or copy are taken in."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_hub.errors import HubError
from adapter_hub.refs import AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import check_file, is_held, locked, storage_errors
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.events import Event, EventKind, replay
from adapter_hub.registry.history import read_history
from adapter_hub.registry.layout import MANIFEST, Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.rebuild import in_one_sequence, name_folders, read_manifest, version_folders
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
            if entry.name.endswith(".lock"):
                continue
            path = Path(entry.path)
            try:
                age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue    # its owner has just finished
            folder = entry.is_dir(follow_symlinks=False)
            if age_s < age_max_s and (is_held(path) if folder else age_s < TEMPORARY_AGE_MAX_S):
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
        candidates = _Candidates(catalog, layout, config, name)
        conflicts += candidates.conflicts
        refused += candidates.refused
        events += _adopt_events(catalog, layout, candidates, refused)
        adopted += _adopt_folders(catalog, candidates)
    return AdoptReport(tuple(adopted), events, tuple(conflicts), tuple(refused))


class _Candidates:
    """The folders of one name that the catalogue does not have, sorted into whole ones, conflicts and refusals."""

    def __init__(self, catalog: Catalog, layout: Layout, config: RegistryConfig, name: str) -> None:
        self.name = name
        self.whole: dict[int, Manifest] = {}
        self.conflicts: list[Problem] = []
        self.refused: list[Problem] = []
        with catalog.reading() as connection:
            known = {row.ref.version: row for row in records.list_rows(connection, name)}
        for number in version_folders(layout, name):
            where, folder = f"{name}@{number}", layout.version(name, number)
            row = known.get(number)
            if row is not None and row.state is VersionState.PURGED and os.listdir(folder) == [MANIFEST]:
                continue
            if row is None and is_held(folder):
                continue    # a living process is just registering it
            try:
                manifest = read_manifest(layout, name, number)
                if row is not None:
                    self._compare(where, manifest, row)
                    continue
                _check_whole(folder, manifest, config)
            except HubError as error:
                if row is None:    # what is wrong with a registered version is for `verify` to say
                    self.refused.append(Problem(where, error.fact))
                continue
            self.whole[number] = manifest

    def _compare(self, where: str, manifest: Manifest, row: records.VersionRow) -> None:
        if row.state is VersionState.PURGED and manifest.purged_at is None:
            self.conflicts.append(Problem(where, "it was purged here, and its data are back in the folder."))
        elif manifest.digest != row.digest:
            fact = f"the folder has digest {manifest.digest[:19]}…, the registered version {row.digest[:19]}…."
            self.conflicts.append(Problem(where, fact))


def _check_whole(folder: Path, manifest: Manifest, config: RegistryConfig) -> None:
    """Raises HubError where the folder is not a whole version made for this registry's base."""
    if config.base_fingerprint and manifest.purged_at is None and manifest.base_fingerprint != config.base_fingerprint:
        raise HubError(f"it was made for another base model ({manifest.base_model}).")
    for file, sha256 in manifest.files.items():
        check_file(folder / file, sha256)


def _adopt_events(catalog: Catalog, layout: Layout, candidates: _Candidates, refused: list[Problem]) -> int:
    """Take in the lines of a history that came from another clone; what the file says as a whole then holds."""
    name = candidates.name
    path = layout.history(name)
    try:
        history = read_history(path, name)
    except HubError as error:
        refused.append(Problem(str(path), error.fact))
        return 0
    foreign = foreign_events(catalog, name, history.events)
    if not foreign:
        return 0
    if candidates.conflicts:
        return 0    # which of two folders the lines speak of is for people to say
    state = replay(history.events)
    with catalog.reading() as connection:
        known = {row.ref.version for row in records.list_rows(connection, name)}
    lost = [v for v in state.versions if v not in known and v not in candidates.whole and v not in state.purged]
    if lost:
        refused.append(Problem(str(path), f"it names version {lost[0]}, which has no whole folder here."))
        return 0
    _store_history(catalog, candidates, foreign, history.events)
    return len(foreign)


def _store_history(catalog: Catalog, candidates: _Candidates, foreign: Sequence[Event], lines: Sequence[Event]) -> None:
    name, state = candidates.name, replay(lines)
    with catalog.writing() as connection:
        for version, manifest in candidates.whole.items():
            if version in state.versions and records.state_of(connection, name, version) is None:
                records.store(connection, manifest, VersionState.LIVE)
        for version in state.versions:
            current = records.state_of(connection, name, version)
            if version in state.purged:
                row = records.row_of(connection, name, version)
                if current not in (VersionState.PURGING, VersionState.PURGED):
                    records.store(connection, _tombstone(row, name, version, state.purged[version]), VersionState.PURGING)
            elif version in state.retired:
                records.set_state(connection, name, version, VersionState.RETIRED)
        for alias in set(records.aliases_of(connection, name)) | set(state.aliases):
            records.write_alias(connection, name, alias, state.aliases.get(alias))
        last = records.last_seq(connection)
        numbered = in_one_sequence([foreign])
        shifted = [_renumbered(event, last + position) for position, event in enumerate(numbered, 1)]
        records.insert_events(connection, shifted, mirrored=True)


def _adopt_folders(catalog: Catalog, candidates: _Candidates) -> list[AdapterRef]:
    return []
