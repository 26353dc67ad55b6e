"""What may happen to a version after it is registered: aliases move, it is retired, it is purged.

Each function runs inside a writing transaction of its caller and records the event. `erase_files` and `erase_index` follow a purge.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection

from adapter_hub.errors import CorruptVersion, InvalidInput, NotRoutable, ProductionMoved
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import check_folder, make_folder, open_regular, storage_errors, sync_folder, write_atomic
from adapter_hub.registry.events import EventKind, rollback_targets
from adapter_hub.registry.layout import DATA_FILES, MANIFEST, Layout
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.schema import VersionState

REASON_CHARS_MAX = 4_000
_KEPT = (VersionState.LIVE, VersionState.RETIRED)


def check_reason(reason: object) -> str:
    """Raises InvalidInput for what a history line should not hold."""
    if not isinstance(reason, str) or len(reason) > REASON_CHARS_MAX:
        raise InvalidInput(f"a reason is a text of at most {REASON_CHARS_MAX} characters.")
    try:
        reason.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"the reason is not UTF-8: {error}.") from error
    if "\0" in reason:
        raise InvalidInput("the reason holds a NUL character.")
    return reason


def move_alias(connection: Connection, name: str, alias: str, version: int, *, at: str, reason: str) -> None:
    """Let an alias name a version; no event where it does already."""
    previous = records.aliases_of(connection, name).get(alias)
    if previous == version:
        return
    records.write_alias(connection, name, alias, version)
    records.record(connection, EventKind.MOVED, name, version, at=at, alias=alias, previous=previous, reason=reason)


def check_unmoved(connection: Connection, name: str, alias: str, expected: int | None) -> None:
    """Raises ProductionMoved where the alias names another version than the one expected; None expects nothing."""
    found = records.aliases_of(connection, name).get(alias)
    if expected is not None and found != expected:
        now = f"version {found}" if found else "no version"
        raise ProductionMoved(f"{alias} of {name!r} was version {expected} and is {now}: somebody moved it meanwhile.", hint="Look at it again.")


def set_alias(connection: Connection, ref: AdapterRef, alias: str, *, at: str, reason: str) -> None:
    """Raises NotRoutable for a purged version, and for a retired one where the alias is `production`."""
    records.check_usable(connection, ref, retired=alias != PRODUCTION)
    move_alias(connection, ref.name, alias, ref.version or 0, at=at, reason=reason)


def roll_back(connection: Connection, name: str, *, at: str, reason: str, check: Callable[[Manifest], None] | None = None) -> int:
    """The version that `production` names again, past retired and purged ones. Raises NotRoutable where there is none, what `check` raises."""
    previous, target = records.aliases_of(connection, name).get(PRODUCTION), rollback_target(connection, name)
    if target is None:
        hint = f"Promote a version: `adapter-hub list {name}` shows them."
        raise NotRoutable(f"'{name}' has no earlier version in production that is neither retired nor purged to go back to.", hint=hint)
    row = records.row_of(connection, name, target)
    if check is not None and row is not None and row["manifest"] is not None:
        check(records.manifest_of(row))
    records.write_alias(connection, name, PRODUCTION, target)
    records.record(connection, EventKind.ROLLED_BACK, name, target, at=at, alias=PRODUCTION, previous=previous, reason=reason)
    return target


def rollback_target(connection: Connection, name: str) -> int | None:
    """The version that `production` would go back to."""
    targets = rollback_targets(records.select_events(connection, name=name, alias=PRODUCTION))
    previous = records.aliases_of(connection, name).get(PRODUCTION)
    live = (version for version in targets if records.state_of(connection, name, version) is VersionState.LIVE)
    return next((version for version in live if version != previous), None)


def withdraw(connection: Connection, name: str, *, at: str, reason: str) -> int | None:
    """Take `production` off a name, and keep its versions as they are. Returns the version it named; None where it named none."""
    records.check_name_known(connection, name)
    version = records.aliases_of(connection, name).get(PRODUCTION)
    if version is not None:
        _remove_alias(connection, name, PRODUCTION, version, at=at, reason=reason)
    return version


def retire(connection: Connection, ref: AdapterRef, *, at: str, reason: str) -> None:
    """Keep a version, and take `production` off it. Nothing happens to one that is retired already."""
    records.check_usable(connection, ref, retired=True)
    name, version = ref.name, ref.version or 0
    if records.state_of(connection, name, version) is VersionState.RETIRED:
        return
    records.set_state(connection, name, version, VersionState.RETIRED)
    records.record(connection, EventKind.RETIRED, name, version, at=at, reason=reason)
    if records.aliases_of(connection, name).get(PRODUCTION) == version:
        _remove_alias(connection, name, PRODUCTION, version, at=at, reason=reason)


def holders_of(connection: Connection, layout: Layout, ref: AdapterRef) -> list[AdapterRef]:
    """The other versions that hold what this one learned: made or started from it, or with the same weights or routing state; transitively.

    What it has from the versions that it was made from is not counted: they had it before, and so may others.
    """
    rows = [row for row in records.known_rows(connection) if row["state"] in _KEPT and row["manifest"] is not None]
    manifests = {str(manifest.ref): manifest for manifest in map(records.manifest_of, rows)}
    inherited: set[str] = set()
    made = [str(ref)]
    for version in made:    # grows
        origins = manifests[version].origins if version in manifests else ()
        made += [origin for origin in dict.fromkeys(origins) if origin not in made]
    for ancestor in set(made[1:]) & manifests.keys():
        inherited.update(manifests[ancestor].files.values())
    found = [str(ref)]
    for holder in found:    # grows
        contents = _data_of(layout, manifests[holder]) - inherited if holder in manifests else frozenset()
        for other, manifest in manifests.items():
            if other not in found and (holder in manifest.origins or not contents.isdisjoint(manifest.files.values())):
                found.append(other)
    return [manifests[holder].ref for holder in found[1:]]


def _data_of(layout: Layout, manifest: Manifest) -> frozenset[str]:
    """Digests of the files that hold what was learned; a safetensors file of a header alone holds nothing."""
    folder = layout.version(manifest.name, manifest.version)
    return frozenset(sha256 for file, sha256 in manifest.files.items() if file in DATA_FILES and not _is_empty(folder / file))


def _is_empty(path: Path) -> bool:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return os.fstat(file.fileno()).st_size == 8 + int.from_bytes(file.read(8), "little")
    except (OSError, CorruptVersion):
        return False


def purge(connection: Connection, ref: AdapterRef, *, at: str, reason: str) -> Manifest:
    """Turn a version into its tombstone for every reader; returns that. Its files are still to be erased."""
    name, version = ref.name, ref.version or 0
    row = records.row_of(connection, name, version)
    if row is not None and row["state"] in (VersionState.PURGING, VersionState.PURGED):
        return records.manifest_of(row)
    for alias, named in sorted(records.aliases_of(connection, name).items()):
        if named == version:
            _remove_alias(connection, name, alias, version, at=at, reason=reason)
    tombstone = bury(connection, ref, at=at)
    records.record(connection, EventKind.PURGED, name, version, at=at, reason=reason)
    return tombstone


def bury(connection: Connection, ref: AdapterRef, *, at: str) -> Manifest:
    """Put the tombstone of a version into its row, without an event."""
    name, version = ref.name, ref.version or 0
    row = records.row_of(connection, name, version)
    if row is None or row["manifest"] is None:
        digest, created_at = ("", at) if row is None else (row["digest"] or "", row["created_at"] or at)
        tombstone = Manifest.lost(name, version, digest=digest, created_at=created_at, purged_at=at)
    else:
        tombstone = records.manifest_of(row).tombstone(at)
    records.store(connection, tombstone, VersionState.PURGING)
    return tombstone


def _remove_alias(connection: Connection, name: str, alias: str, version: int, *, at: str, reason: str) -> None:
    records.write_alias(connection, name, alias, None)
    records.record(connection, EventKind.REMOVED, name, version, at=at, alias=alias, previous=version, reason=reason)


def erase_files(layout: Layout, tombstone: Manifest) -> None:
    """Leave nothing but the tombstone in a version folder. Can be repeated after a crash.

    Raises StorageFull, ReadOnlyRegistry, CorruptVersion where a link stands in its place.
    """
    folder = layout.version(tombstone.name, tombstone.version)
    with storage_errors(folder):
        make_folder(folder)
        check_folder(folder)
        # The data first: a full disk must not keep them from being erased.
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != MANIFEST:
                os.unlink(entry.path)
        sync_folder(folder)
        write_atomic(folder / MANIFEST, tombstone.to_bytes(), layout.staging)


def erase_index(layout: Layout) -> None:
    """What was derived holds vectors of many versions: all of it goes. Raises as `erase_files`."""
    if layout.index.is_dir():
        make_folder(layout.index)    # refuses a link
        with storage_errors(layout.index):
            shutil.rmtree(layout.index)
