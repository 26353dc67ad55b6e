"""Registering a version as one atomic act: reserve the number, stage, hash, fsync, rename, commit.

A crash before the commit leaves a number that is never used, and at most a folder that no reader sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection

from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, RegistryError
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import (
    hash_source,
    held,
    link_file,
    make_folder,
    move_folder,
    staging_folder,
    storage_errors,
    sync_files,
    write_file,
)
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.events import EventKind
from adapter_hub.registry.layout import CARD, MANIFEST, Layout, check_file_name
from adapter_hub.registry.manifest import Manifest, VersionFacts, model_card
from adapter_hub.registry.moves import check_reason, move_alias
from adapter_hub.registry.rebuild import checked_folder, highest_number
from adapter_hub.registry.schema import VersionState


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


# ---- a version ------------------------------------------------------------------------------------------------------


def add_version(
    catalog: Catalog,
    layout: Layout,
    name: str,
    facts: VersionFacts,
    files: Mapping[str, Path | bytes],
    *,
    promote: bool,
    reason: str,
) -> AdapterRef:
    """The next version of `name`, committed. Raises InvalidInput, StorageFull, ReadOnlyRegistry; nothing is stored then."""
    sources = check_sources(files)
    check_reason(reason)
    with storage_errors(layout.root), staging_folder(layout.staging) as folder, ExitStack() as holding:
        hashes = _stage(catalog, layout, name, sources, folder)
        own_card = CARD in hashes
        while True:
            version = _reserve(catalog, layout, name)
            holding.enter_context(held(layout.held(name, version)))
            manifest = _describe(name, version, facts, hashes, folder, own_card=own_card)
            sync_files(folder)
            try:
                make_folder(layout.adapters)
                make_folder(layout.name(name))
                if move_folder(folder, layout.version(name, version)):
                    break
            except FileNotFoundError:
                if not folder.is_dir():
                    raise RegistryError(f"{folder} vanished while it was written.", hint="Register again.") from None
        _commit(catalog, layout, manifest, folder, promote=promote, reason=reason)
    return manifest.ref


def check_sources(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """File names and contents that a version can hold. Raises InvalidInput."""
    sources: dict[str, Path | bytes] = {}
    for file, source in files.items():
        check_file_name(file)
        if not isinstance(source, Path | bytes):
            raise InvalidInput(f"{file} is given as {type(source).__name__}.", hint="Give bytes or a Path.")
        sources[file] = source
    if len({file.lower() for file in sources}) != len(sources):
        raise InvalidInput("two files have the same name on a file system that ignores case.")
    if not sources:
        raise InvalidInput("a version needs at least one file.")
    return sources


def _stage(catalog: Catalog, layout: Layout, name: str, sources: Mapping[str, Path | bytes], folder: Path) -> dict[str, str]:
    """Put the files into the staging folder, linked where this name has the same bytes already. Returns their sha256."""
    hashes = {file: _hash(source) for file, source in sources.items()}
    with catalog.reading() as connection:
        stored = {sha256: records.same_content(connection, name, sha256) for sha256 in hashes.values()}
    for file, source in sources.items():
        if any(_link(layout, name, version, known, hashes[file], folder / file) for version, known in stored[hashes[file]]):
            continue
        if write_file(folder / file, source) != hashes[file]:
            raise RegistryError(f"the source of {file} changed while it was copied.", hint="Register again when nobody writes it.")
    return hashes


def _link(layout: Layout, name: str, version: int, file: str, sha256: str, target: Path) -> bool:
    try:
        return link_file(checked_folder(layout, name, version) / file, sha256, target)
    except CorruptVersion:
        return False    # for `verify` to report; the bytes are written anew


def _hash(source: Path | bytes) -> str:
    try:
        return hash_source(source)
    except OSError as error:
        raise InvalidInput(f"{error.filename} cannot be read: {error.strerror}.") from error


def _reserve(catalog: Catalog, layout: Layout, name: str) -> int:
    taken = highest_number(layout.name(name))
    with catalog.writing(durable=False) as connection:
        return records.reserve(connection, name, taken)


def _describe(name: str, version: int, facts: VersionFacts, hashes: Mapping[str, str], folder: Path, *, own_card: bool) -> Manifest:
    """Write model card and manifest, the manifest last."""
    known = {item.name: getattr(facts, item.name) for item in fields(VersionFacts)}
    manifest = Manifest(name=name, version=version, created_at=now(), files=dict(sorted(hashes.items())), **known)
    if not own_card:
        (folder / CARD).unlink(missing_ok=True)
        card = write_file(folder / CARD, model_card(manifest).encode())
        manifest = replace(manifest, files=dict(sorted({**hashes, CARD: card}.items())))
    manifest = manifest.sealed()
    (folder / MANIFEST).unlink(missing_ok=True)
    write_file(folder / MANIFEST, manifest.to_bytes())
    return manifest


def _commit(catalog: Catalog, layout: Layout, manifest: Manifest, folder: Path, *, promote: bool, reason: str) -> None:
    try:
        with catalog.writing() as connection:
            _insert(connection, manifest, promote=promote, reason=reason)
    except BaseException as error:
        committed = _was_committed(catalog, manifest)
        if committed is False:
            _take_back(layout, manifest, folder)
        if not committed or not isinstance(error, HubError):
            raise


def _insert(connection: Connection, manifest: Manifest, *, promote: bool, reason: str) -> None:
    at = now()
    records.store(connection, manifest, VersionState.LIVE)
    detail = {"digest": manifest.digest}
    records.record(connection, EventKind.ADDED, manifest.name, manifest.version, at=at, reason=reason, detail=detail)
    if promote:
        move_alias(connection, manifest.name, PRODUCTION, manifest.version, at=at, reason=reason)


def _was_committed(catalog: Catalog, manifest: Manifest) -> bool | None:
    """Whether a commit that failed, e.g. because the connection broke, took effect all the same.

    None where that cannot be found out: the folder then stays, and `adopt` can take it in if it is not registered.
    It is asked in the writers' turn: a server may still be at work on a commit whose connection is gone.
    """
    try:
        with catalog.writing(durable=False) as connection:
            return records.state_of(connection, manifest.name, manifest.version) is not None
    except HubError:
        return None


def _take_back(layout: Layout, manifest: Manifest, folder: Path) -> None:
    """Move a folder that was not committed out of sight again; the staging is removed by its owner."""
    with suppress(OSError):
        layout.version(manifest.name, manifest.version).rename(folder)
        layout.name(manifest.name).rmdir()    # where it was made for this version


# ---- a calibration --------------------------------------------------------------------------------------------------


def add_calibration(catalog: Catalog, layout: Layout, data: bytes, members: list[AdapterRef], reason: str) -> int:
    """The number of a new calibration record, committed.

    Raises InvalidInput, StorageFull, ReadOnlyRegistry, NotRoutable where a member was purged meanwhile.
    """
    check_reason(reason)
    if not isinstance(data, bytes) or not data:
        raise InvalidInput("a calibration is not empty bytes.")
    with storage_errors(layout.root), staging_folder(layout.staging) as folder:
        sha256 = write_file(folder / "calibration", data)
        sync_files(folder)
        make_folder(layout.calibrations)
        number = 0
        while not number or not move_folder(folder / "calibration", layout.calibration(number)):
            taken = highest_number(layout.calibrations, ".safetensors")
            with catalog.writing(durable=False) as connection:
                number = records.reserve_calibration(connection, taken)
        try:
            with catalog.writing() as connection:
                for ref in members:    # the router that goes with a stored calibration is saved, and holds its members' vectors
                    records.check_usable(connection, ref, retired=True)
                records.store_calibration(connection, number, sha256)
                detail = {"digest": sha256, "members": [str(ref) for ref in members]}
                records.record(connection, EventKind.CALIBRATED, None, number, at=now(), reason=reason, detail=detail)
        except BaseException as error:
            committed = _calibration_committed(catalog, number)
            if committed is False:
                layout.calibration(number).unlink(missing_ok=True)
            if not committed or not isinstance(error, HubError):
                raise
    return number


def _calibration_committed(catalog: Catalog, number: int) -> bool | None:
    try:
        with catalog.writing(durable=False) as connection:
            return number in records.live_calibrations(connection)
    except HubError:
        return None
