"""The registry: versions, aliases and their history as one object. Knows no tensor; bytes go in and come out.

What decides lies in the modules beside it (`registration`, `moves`, `verify`, `upkeep`); here a call becomes transactions.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, select

from adapter_hub.errors import (
    CorruptVersion,
    DataRemains,
    HubError,
    InvalidInput,
    ReadOnlyRegistry,
    RegistryError,
    RegistryExists,
    StorageFull,
)
from adapter_hub.refs import PRODUCTION, AdapterRef, check_alias, check_name
from adapter_hub.registry import moves, records, schema
from adapter_hub.registry.adopt import AdoptReport, Check, adopt
from adapter_hub.registry.artifacts import (
    Signature,
    check_file,
    locked,
    make_folder,
    read_checked,
    signature,
    storage_errors,
    sync_folder,
    write_atomic,
)
from adapter_hub.registry.catalog import Catalog
from adapter_hub.registry.config import RegistryConfig, read_config, with_encoder, write_config
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.history import mirror
from adapter_hub.registry.layout import CARD, HISTORY, IGNORED, MANIFEST, Layout
from adapter_hub.registry.manifest import Manifest, VersionFacts
from adapter_hub.registry.notes import Notes
from adapter_hub.registry.observations import ObservationLog
from adapter_hub.registry.rebuild import checked_folder, ensure_schema, in_memory, read_manifest
from adapter_hub.registry.records import VersionRow
from adapter_hub.registry.registration import add_calibration, add_version, now
from adapter_hub.registry.schema import VersionState
from adapter_hub.registry.upkeep import AGE_MAX_S, GcReport, collect_garbage
from adapter_hub.registry.verify import VerifyReport, check_same_manifest, verify

JSON = Any
log = logging.getLogger("adapter_hub")

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", CARD)
VERIFIED_MAX = 100_000    # versions whose hashing is remembered


@dataclass(frozen=True, slots=True)
class Standing:
    """What a router is built from, as it stood at one moment."""

    event: int                              # number of the newest event; 0 before the first
    production: tuple[AdapterRef, ...]      # by name
    calibration: int | None                 # number of the latest


class Registry:
    """Safe to share between threads, between processes, and with children after fork."""

    def __init__(self, layout: Layout, catalog: Catalog, config: RegistryConfig) -> None:
        self.layout = layout
        self.config = config
        self._catalog = catalog
        self._verified: dict[AdapterRef, tuple[Signature, ...]] = {}
        self._seen_files: object = None    # of a read-only folder: what the histories looked like when they were read
        self._refreshing = threading.Lock()

    # ---- create, open, close ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, *, config: RegistryConfig, database: str | None = None) -> Self:
        """Make a registry folder; `database` is a PostgreSQL URL for its catalogue. Raises RegistryExists, storage errors."""
        layout = Layout(Path(path).expanduser())
        if database is not None:
            with closing(Catalog.postgres(database)) as catalog:
                if catalog.schema_found():
                    raise RegistryExists(f"{catalog.shown} holds a catalogue already.", hint="Open it, or name an empty database or schema.")
        with storage_errors(layout.root):
            layout.root.mkdir(parents=True, exist_ok=True)
            try:
                write_config(layout.config, config)
            except FileExistsError as error:
                raise RegistryExists(f"{layout.root} is a registry already.", hint="Open it, or name another folder.") from error
            present = layout.ignore.read_text(encoding="utf-8").splitlines() if layout.ignore.exists() else []
            lines = [line for line in IGNORED if line not in present]
            with layout.ignore.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(f"{line}\n" for line in lines))
            make_folder(layout.adapters)
            sync_folder(layout.root)
        return cls.open(database or layout.root, artifacts=layout.root if database else None)

    @classmethod
    def open(cls, path: str | Path, *, artifacts: str | Path | None = None) -> Self:
        """Open a registry folder, or a PostgreSQL URL whose files lie under `artifacts`.

        A catalogue that is missing is rebuilt from the files. A folder that this process may not write is opened for
        reading. Raises RegistryNotFound, InvalidConfig, SchemaTooNew, InvalidInput, RegistryError.
        """
        if not isinstance(path, str | os.PathLike):
            raise InvalidInput(f"a registry is a folder or a database URL, not {type(path).__name__}.", hint='For example "registry".')
        url = str(path) if "://" in str(path) else None
        if url is not None and artifacts is None:
            raise InvalidInput("a database URL alone does not say where the files are.", hint="Give artifacts=FOLDER (`--artifacts`).")
        if url is None and artifacts is not None:
            raise InvalidInput("artifacts= goes with a database URL.", hint="Open the folder by its path alone.")
        layout = Layout(Path(artifacts if artifacts is not None else path).expanduser().absolute())
        config = read_config(layout.config)
        if url is None:
            return cls._open_folder(layout, config)
        return cls._started(layout, Catalog.postgres(url), config)

    @classmethod
    def _started(cls, layout: Layout, catalog: Catalog, config: RegistryConfig) -> Self:
        registry = cls(layout, catalog, config)
        try:
            registry._start()
        except BaseException:
            registry.close()
            raise
        return registry

    @classmethod
    def _open_folder(cls, layout: Layout, config: RegistryConfig) -> Self:
        try:
            return cls._started(layout, Catalog.sqlite(layout.catalog), config)
        except (ReadOnlyRegistry, StorageFull) as error:
            log.info("%s Opened for reading.", error)
        return cls._open_read_only(layout, config)

    @classmethod
    def _open_read_only(cls, layout: Layout, config: RegistryConfig) -> Self:
        """Through the catalogue where it can be read, else through one in memory."""
        if layout.catalog.exists():
            registry = cls(layout, Catalog.sqlite(layout.catalog, writable=False), config)
            try:
                if registry._catalog.schema_found():
                    return registry
            except ReadOnlyRegistry:
                log.info("%s cannot be read without writing beside it: rebuilt in memory", layout.catalog)
        seen = _look_at_files(layout)    # before they are read: what is written meanwhile is read again
        registry = cls(layout, in_memory(layout), config)
        registry._seen_files = seen
        return registry

    def _start(self) -> None:
        """Make or check the tables, then make good what a crash left undone. Raises ReadOnlyRegistry where it cannot."""
        shared = self._catalog.shared
        try:
            with storage_errors(self.layout.root):
                make_folder(self.layout.staging)
                self.layout.lock("purge").touch()         # while there is room: a full disk must not keep data from being erased
                with locked(self.layout.lock("open")):    # two processes must not make one catalogue at a time
                    if not shared and not self.layout.catalog.exists():
                        for left in ("-wal", "-shm"):     # of a catalogue that was deleted
                            self.layout.catalog.with_name(self.layout.catalog.name + left).unlink(missing_ok=True)
                    self._check_one_catalogue()
                    if ensure_schema(self._catalog, self.layout):
                        moves.erase_index(self.layout)    # tombstones may have come with the files
                    self._catalog.take_claim(self.layout.claim, self.layout.staging)
            self._reconcile()
        except (ReadOnlyRegistry, StorageFull):
            self._check_one_catalogue()
            if not shared or not self._catalog.schema_found():
                raise
            self._catalog.writable = False    # a server that may read the files of a shared catalogue, no more

    def _check_one_catalogue(self) -> None:
        """Raises RegistryError where another catalogue is the one of this folder."""
        if self._catalog.shared and self.layout.catalog.exists():
            hint = f"To move it, close what has it open, delete {self.layout.catalog} and open the database again: it is filled from the files."
            raise RegistryError(f"the catalogue of {self.layout.root} is in {self.layout.catalog.name}.", hint=hint)
        self._catalog.check_may_claim(self.layout.claim)

    def _reconcile(self) -> None:
        """Write missing history lines, erase what was purged."""
        with self._catalog.reading() as connection:
            behind = records.names_to_mirror(connection)
            query = select(schema.versions).where(schema.versions.c.state == VersionState.PURGING)
            purging = [records.manifest_of(row) for row in connection.execute(query).mappings()]
        repairs = [partial(self._erase, tombstone) for tombstone in purging]
        repairs += [partial(mirror, self._catalog, self.layout, name) for name in behind]
        for repair in repairs:
            try:
                repair()
            except ReadOnlyRegistry:
                raise
            except HubError as error:
                log.warning("left for the next time the registry is opened: %s", error)    # reading must go on

    def close(self) -> None:
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def observation_log(self) -> ObservationLog:
        """The log of what is answered, in the catalogue's database; who opens it closes it. It connects when it is first used."""
        return ObservationLog(self._catalog.beside(), what=self.config.observe, rows_max=self.config.observations_max)

    @property
    def notes(self) -> Notes:
        """What passes over the log remember, in the catalogue's database."""
        return Notes(self._catalog)

    # ---- add --------------------------------------------------------------------------------------------------------

    def add(
        self, name: str, facts: VersionFacts, files: Mapping[str, Path | bytes], *, promote: bool = True, reason: str = ""
    ) -> AdapterRef:
        """Store files and facts as the next version of `name`, wholly or not at all; returns its reference.

        Raises InvalidName, InvalidInput, StorageFull, ReadOnlyRegistry, RegistryError.
        """
        check_name(name)
        if not isinstance(facts, VersionFacts):
            raise InvalidInput(f"the facts are given as {type(facts).__name__}.", hint="Give VersionFacts.")
        self._check_writable()
        ref = add_version(self._catalog, self.layout, name, facts, files, promote=promote, reason=reason)
        self._mirror(name)
        return ref

    @property
    def writable(self) -> bool:
        return self._catalog.writable

    def _check_writable(self) -> None:
        if not self._catalog.writable:
            raise ReadOnlyRegistry(f"{self.layout.root} is open for reading only.", hint="Open a registry you own.")

    def _mirror(self, name: str | None) -> None:
        try:
            mirror(self._catalog, self.layout, name)
        except (HubError, OSError) as error:
            # The act is committed and stands: failing now would say that it is not. The next open writes the line.
            log.warning("the history of %s will be written later: %s", name or "the calibrations", error)

    # ---- the encoder ------------------------------------------------------------------------------------------------

    @contextmanager
    def changing_encoder(self) -> Iterator[None]:
        """Inside it no other process or thread changes the encoder. Raises ReadOnlyRegistry, storage errors."""
        self._check_writable()
        with ExitStack() as holding:
            with storage_errors(self.layout.staging):
                holding.enter_context(locked(self.layout.lock("encoder")))
            yield

    def config_with(self, encoder: str, fingerprint: str) -> str:
        """The text of hub.toml if it named this encoder. Raises InvalidConfig, RegistryNotFound."""
        read_config(self.layout.config)    # says what is wrong with it
        replace(self.config, encoder=encoder, encoder_fingerprint=fingerprint)    # refuses what it may not say
        return with_encoder(self.layout.config.read_bytes().decode("utf-8"), encoder, fingerprint)

    def name_encoder(self, encoder: str, fingerprint: str) -> None:
        """Let hub.toml name this encoder; its other lines stay as people wrote them. Raises as `config_with`, ReadOnlyRegistry, StorageFull."""
        self._check_writable()
        text = self.config_with(encoder, fingerprint)
        with storage_errors(self.layout.config):
            if text.encode() != self.layout.config.read_bytes():
                write_atomic(self.layout.config, text.encode(), self.layout.staging)
        self.config = replace(self.config, encoder=encoder, encoder_fingerprint=fingerprint)

    # ---- look -------------------------------------------------------------------------------------------------------

    def resolve(self, ref: str | AdapterRef) -> AdapterRef:
        """One immutable version. Raises AdapterNotFound; NotRoutable for a purged version, or a name without production."""
        parsed = AdapterRef.parse(ref)
        with self._reading() as connection:
            found = AdapterRef(parsed.name, records.version_of(connection, parsed))
            records.check_usable(connection, found, retired=True)
        return found

    def manifest(self, ref: str | AdapterRef) -> Manifest:
        """The facts of a version; of a purged one its tombstone. Raises AdapterNotFound, NotRoutable (no production)."""
        return self._manifest(ref, purged=True)

    def _manifest(self, ref: str | AdapterRef, *, purged: bool) -> Manifest:
        """Raises NotRoutable for a purged version unless that is fine: asked in two steps, it may be purged between them."""
        parsed = AdapterRef.parse(ref)
        with self._reading() as connection:
            found = AdapterRef(parsed.name, records.version_of(connection, parsed))
            if not purged:
                records.check_usable(connection, found, retired=True)
            row = records.row_of(connection, found.name, found.version or 0)
            if row is None:
                raise RegistryError(f"{parsed} names a version that is not registered.", hint="See `adapter-hub verify`.")
            return records.manifest_of(row)

    def names(self) -> list[str]:
        with self._reading() as connection:
            return records.names(connection)

    def versions(
        self, name: str | None = None, *, base: str | None = None, tag: str | None = None, task_type: str | None = None
    ) -> list[VersionRow]:
        """By name, then version. `base` is an id or a fingerprint. Raises AdapterNotFound for an unknown name."""
        with self._reading() as connection:
            if name is not None:
                records.check_name_known(connection, check_name(name))
            return records.list_rows(connection, name, base, tag, task_type)

    def production(self) -> list[AdapterRef]:
        """What is routed, by name."""
        with self._reading() as connection:
            return records.production(connection)

    def aliases(self, name: str) -> dict[str, int]:
        """alias -> version. Raises AdapterNotFound."""
        with self._reading() as connection:
            records.check_name_known(connection, check_name(name))
            return dict(sorted(records.aliases_of(connection, name).items()))

    def history(self, name: str) -> list[Event]:
        """What happened to a name, oldest first. Raises AdapterNotFound."""
        with self._reading() as connection:
            records.check_name_known(connection, check_name(name))
            return records.select_events(connection, name=name)

    def events(self, after: int = 0) -> list[Event]:
        """Everything that happened after event number `after`, in order; who follows these misses none."""
        with self._reading() as connection:
            return records.select_events(connection, after=after)

    def last_event(self) -> int:
        """Number of the newest event; 0 before the first."""
        with self._reading() as connection:
            return records.last_seq(connection)

    def snapshot(self) -> Standing:
        """Last event, what is in production and the latest calibration, all of one moment."""
        with self._reading() as connection:
            event, refs = records.last_seq(connection), records.production(connection)
            return Standing(event, tuple(refs), max(records.live_calibrations(connection), default=None))

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """One consistent view of what is committed now, also of a folder that another process writes."""
        self._refresh()
        with self._catalog.reading() as connection:
            yield connection

    def _refresh(self) -> None:
        """Read a read-only folder again where another process has written to it."""
        if self._seen_files is None:
            return
        with self._refreshing:
            found = _look_at_files(self.layout)
            if found != self._seen_files:
                self._catalog = in_memory(self.layout)
                self._seen_files = found

    # ---- read -------------------------------------------------------------------------------------------------------

    def folder(self, ref: str | AdapterRef) -> Path:
        """Where a version lies; nothing is hashed. Raises as `resolve`; CorruptVersion where it is missing or a link."""
        found = self.resolve(ref)
        return checked_folder(self.layout, found.name, found.version or 0)

    def read(self, ref: str | AdapterRef, file: str) -> bytes:
        """One file of a version, its sha256 checked. Raises CorruptVersion, InvalidInput where there is no such file."""
        manifest = self._manifest(ref, purged=False)
        if file not in manifest.files:
            raise InvalidInput(f"{manifest.ref} has no file {file!r}.", hint=f"It has {', '.join(manifest.files)}.")
        with self._reading_files(manifest.ref):
            return read_checked(checked_folder(self.layout, manifest.name, manifest.version) / file, manifest.files[file])

    def open_version(self, ref: str | AdapterRef) -> Path:
        """The folder of a version after every file was hashed; again only where a file has changed since.

        Raises as `resolve`; CorruptVersion.
        """
        manifest = self._manifest(ref, purged=False)
        with self._reading_files(manifest.ref):
            folder = checked_folder(self.layout, manifest.name, manifest.version)
            seen = tuple(signature(folder / file) for file in (MANIFEST, *manifest.files))
            if self._verified.get(manifest.ref) != seen:
                check_same_manifest(read_manifest(self.layout, manifest.name, manifest.version), manifest, self.layout)
                hashed = tuple(check_file(folder / file, sha256) for file, sha256 in manifest.files.items())
                if len(self._verified) >= VERIFIED_MAX:
                    self._verified.clear()
                self._verified[manifest.ref] = (seen[0], *hashed)
        return folder

    @contextmanager
    def _reading_files(self, ref: AdapterRef) -> Iterator[None]:
        try:
            yield
        except CorruptVersion:
            self.resolve(ref)    # purged meanwhile: say that instead
            raise
        except OSError as error:
            raise RegistryError(f"{error.filename} cannot be read: {error.strerror}.", hint="Ask its owner for read permission.") from error

    def export(self, ref: str | AdapterRef, folder: str | Path) -> Path:
        """Copy a version as a plain PEFT folder. Raises InvalidInput where `folder` holds something; as `open_version`."""
        manifest, target = self._manifest(ref, purged=False), Path(folder).expanduser()
        found = manifest.ref
        if not set(PEFT_FILES[:2]) <= set(manifest.files):
            raise RegistryError(f"{found} is not a PEFT adapter: it has {', '.join(manifest.files)}.")
        contents = {file: self.read(found, file) for file in PEFT_FILES if file in manifest.files}
        with storage_errors(target):
            if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
                raise InvalidInput(f"{target} exists and is not an empty folder.", hint="Name a new one.")
            target.mkdir(parents=True, exist_ok=True)
            try:
                for file, data in contents.items():
                    (target / file).write_bytes(data)
            except OSError:
                for file in contents:
                    (target / file).unlink(missing_ok=True)
                raise
        return target

    # ---- move -------------------------------------------------------------------------------------------------------

    def set_alias(self, name: str, alias: str, version: int, reason: str = "", *, expected: int | None = None) -> AdapterRef:
        """Let an alias name a version. Raises InvalidName, AdapterNotFound, NotRoutable (purged; retired for production).

        With `expected`, ProductionMoved where it names another version than that one now.
        """
        check_alias(alias)
        if isinstance(version, bool) or not isinstance(version, int):
            raise InvalidInput(f"{version!r} is not a version number.")
        moves.check_reason(reason)
        ref = AdapterRef(check_name(name), version)
        with self._catalog.writing() as connection:
            records.version_of(connection, ref)
            moves.check_unmoved(connection, name, alias, expected)
            moves.set_alias(connection, ref, alias, at=now(), reason=reason)
        self._mirror(name)
        return ref

    def promote(self, ref: str | AdapterRef, reason: str = "", *, expected: int | None = None) -> AdapterRef:
        """Let `production` name this version. Raises AdapterNotFound, NotRoutable (retired, purged), ProductionMoved as `set_alias`."""
        found = self._named(ref)
        return self.set_alias(found.name, PRODUCTION, found.version or 0, reason, expected=expected)

    def rollback(
        self, name: str, reason: str = "", *, check: Callable[[Manifest], None] | None = None, expected: int | None = None
    ) -> AdapterRef:
        """Move `production` back to the version it named before; twice goes two back. Retired and purged ones are passed over.

        `check` is given that version's manifest, and raises HubError where it may not go there. Raises AdapterNotFound, NotRoutable,
        ProductionMoved as `set_alias`.
        """
        moves.check_reason(reason)
        with self._catalog.writing() as connection:
            records.check_name_known(connection, check_name(name))
            moves.check_unmoved(connection, name, PRODUCTION, expected)
            version = moves.roll_back(connection, name, at=now(), reason=reason, check=check)
        self._mirror(name)
        return AdapterRef(name, version)

    def rollback_target(self, name: str) -> AdapterRef | None:
        """Where `rollback` would go to; None: nowhere. Raises AdapterNotFound."""
        with self._reading() as connection:
            records.check_name_known(connection, check_name(name))
            version = moves.rollback_target(connection, name)
        return None if version is None else AdapterRef(name, version)

    def remark(self, ref: AdapterRef, reason: str, detail: Mapping[str, JSON]) -> None:
        """Record what a maintenance pass found or did about a version. Raises AdapterNotFound, ReadOnlyRegistry, RegistryError."""
        moves.check_reason(reason)
        with self._catalog.writing() as connection:
            version = records.version_of(connection, ref)
            records.record(connection, EventKind.MAINTAINED, ref.name, version, at=now(), reason=reason, detail=dict(detail))
        self._mirror(ref.name)

    @contextmanager
    def maintaining(self) -> Iterator[None]:
        """Held by one process at a time. Raises RegistryError at once where another one holds it, ReadOnlyRegistry."""
        self._check_writable()
        path = self.layout.lock("maintenance")
        with ExitStack() as holding:
            with storage_errors(self.layout.staging):
                try:
                    holding.enter_context(locked(path, wait=False))
                except BlockingIOError as error:
                    raise RegistryError("another process maintains this registry.", hint=f"Let it end: it has locked {path}.") from error
            yield

    def withdraw(self, name: str, reason: str = "", *, expected: int | None = None) -> AdapterRef | None:
        """Take a name out of production: nothing routes to it until a version is promoted again. Returns the version that was in production.

        Unlike a retired version, that one may be promoted again. Raises AdapterNotFound, ReadOnlyRegistry, ProductionMoved as `set_alias`.
        """
        moves.check_reason(reason)
        with self._catalog.writing() as connection:
            records.check_name_known(connection, check_name(name))
            moves.check_unmoved(connection, name, PRODUCTION, expected)
            version = moves.withdraw(connection, check_name(name), at=now(), reason=reason)
        self._mirror(name)
        return None if version is None else AdapterRef(name, version)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Held by one at a time who reads notes, works, and writes what follows; others wait. Raises ReadOnlyRegistry, storage errors."""
        self._check_writable()
        with ExitStack() as holding:
            with storage_errors(self.layout.staging):
                holding.enter_context(locked(self.layout.lock("proposals")))
            yield

    def retire(self, ref: str | AdapterRef, reason: str = "") -> AdapterRef:
        """Keep a version and never route to it: `name@3` still reads it. Raises AdapterNotFound, NotRoutable (purged)."""
        moves.check_reason(reason)
        found = self._named(ref)
        with self._catalog.writing() as connection:
            moves.retire(connection, found, at=now(), reason=reason)
        self._mirror(found.name)
        return found

    def purge(self, ref: str | AdapterRef, reason: str = "", *, descendants: bool = False) -> list[AdapterRef]:
        """Erase a version's weights, routing state and exemplars, and `index/`; a tombstone and the history stay. Returns what was purged, it first.

        Versions that were made from it, or that have its weights or routing state, hold the same data: they are purged with it
        where `descendants` says so. The same again finishes what a crash interrupted.
        Raises AdapterNotFound, ReadOnlyRegistry, DataRemains where there are such versions and `descendants` is False.
        """
        moves.check_reason(reason)
        found, at = self._named(ref), now()
        with self._catalog.writing() as connection:
            holders = moves.holders_of(connection, self.layout, found)
            if holders and not descendants:
                raise DataRemains(found, holders)
            tombstones = [moves.purge(connection, each, at=at, reason=reason) for each in (found, *holders)]
        for tombstone in tombstones:
            self._verified.pop(tombstone.ref, None)
            self._erase(tombstone)
        for name in sorted({tombstone.name for tombstone in tombstones}):
            self._mirror(name)
        return [tombstone.ref for tombstone in tombstones]

    def _erase(self, tombstone: Manifest) -> None:
        with storage_errors(self.layout.staging), locked(self.layout.lock("purge")):    # two may purge one version at once
            moves.erase_files(self.layout, tombstone)
            moves.erase_index(self.layout)
            with self._catalog.writing() as connection:
                records.set_state(connection, tombstone.name, tombstone.version, VersionState.PURGED)

    @contextmanager
    def deriving(self) -> Iterator[frozenset[AdapterRef]]:
        """Inside it `index/` is there to be written to, and purges wait. Gives the versions whose data may not be written there any more.

        Raises ReadOnlyRegistry, CorruptVersion where a link stands in its place, and for an OSError inside what it means.
        """
        self._check_writable()
        with storage_errors(self.layout.index), locked(self.layout.lock("purge")):
            make_folder(self.layout.index)
            with self._reading() as connection:
                purged = records.purged(connection)
            yield purged

    def _named(self, ref: str | AdapterRef) -> AdapterRef:
        """The version that a reference names, in whatever state; for a caller who is about to change it."""
        self._check_writable()
        parsed = AdapterRef.parse(ref)
        with self._catalog.reading() as connection:
            return AdapterRef(parsed.name, records.version_of(connection, parsed))

    # ---- calibrations -----------------------------------------------------------------------------------------------

    def add_calibration(self, data: bytes, members: Sequence[AdapterRef], reason: str = "") -> int:
        """Store a calibration record; returns its number. Raises InvalidInput, StorageFull, ReadOnlyRegistry."""
        self._check_writable()
        number = add_calibration(self._catalog, self.layout, data, list(members), reason)
        self._mirror(None)
        return number

    def calibration(self, number: int) -> bytes:
        """A calibration record, its sha256 checked. Raises InvalidInput where there is none, CorruptVersion."""
        with self._reading() as connection:
            known = records.live_calibrations(connection)
        if number not in known:
            raise InvalidInput(f"there is no calibration {number!r}.", hint=f"Known: {', '.join(map(str, known)) or 'none'}.")
        with storage_errors(self.layout.calibrations):
            return read_checked(self.layout.calibration(number), known[number])

    def calibrated_on(self, number: int) -> list[AdapterRef]:
        """The versions that a calibration was fitted on, as its event says, without those that were purged."""
        with self._reading() as connection:
            events = records.select_events(connection, calibrations=True)
            members = {str(member) for event in events if event.version == number for member in event.detail.get("members", [])}
            rows = records.list_rows(connection)
        return [row.ref for row in rows if row.state is not VersionState.PURGED and str(row.ref) in members]

    def latest_calibration(self) -> int | None:
        with self._reading() as connection:
            return max(records.live_calibrations(connection), default=None)

    # ---- keep it sound ----------------------------------------------------------------------------------------------

    def verify(self, ref: str | AdapterRef | None = None) -> VerifyReport:
        """Hash everything, or one version, and compare catalogue, folders and histories. Never raises for damage."""
        found = None
        self._refresh()
        if ref is not None:
            parsed = AdapterRef.parse(ref)
            with self._reading() as connection:
                found = AdapterRef(parsed.name, records.version_of(connection, parsed))
        return verify(self._catalog, self.layout, found)

    def gc(self, age_max_s: float = AGE_MAX_S) -> GcReport:
        """Remove what interrupted registrations left behind, never a complete version. Raises ReadOnlyRegistry.

        It writes to no catalogue: a registry that a full disk keeps open for reading only can be cleaned.
        """
        return collect_garbage(self.layout, age_max_s)

    def adopt(self, check: Check | None = None) -> AdoptReport:
        """Take in whole version folders that came by git or copy, with the history lines that came along.

        `check` is given each folder and its manifest, and raises HubError where it cannot be used.
        Raises ReadOnlyRegistry. Conflicts and folders that are refused are reported, not raised.
        """
        self._check_writable()
        report = adopt(self._catalog, self.layout, self.config, check)
        self._reconcile()
        return report


def _look_at_files(layout: Layout) -> object:
    try:
        folders = [layout.calibrations, *(Path(entry.path) for entry in os.scandir(layout.adapters))]
    except FileNotFoundError:
        return ()
    return tuple(sorted(_seen(folder / HISTORY) for folder in folders))


def _seen(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), found.st_mtime_ns, found.st_size
