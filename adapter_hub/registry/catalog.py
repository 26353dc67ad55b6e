"""The database behind the catalogue: connections, transactions, and what its errors mean. Knows no adapter.

SQLite (WAL, immediate transactions, busy timeout) or PostgreSQL. All writers of a registry take turns, on both.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import threading
import urllib.parse
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, func, insert, inspect, make_url, select, update
from sqlalchemy.pool import QueuePool, StaticPool

from adapter_hub.errors import CorruptVersion, InvalidInput, ReadOnlyRegistry, RegistryError, SchemaTooNew, StorageFull
from adapter_hub.registry import schema
from adapter_hub.registry.artifacts import read_regular, write_atomic

BUSY_TIMEOUT_S = 60
UNCHANGED = "Nothing stored was changed."
IN_THE_FOLDER = "catalog.sqlite"
# One lock for all writers of a database schema. With it event numbers become visible in their order.
_POSTGRES_TURN = (
    f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s'; SELECT pg_advisory_xact_lock(hashtextextended('adapter_hub ' || current_schema(), 0))"
)


class Catalog:
    """One database. Safe to share between threads, and usable in a child process after fork."""

    def __init__(self, engine: Engine, *, file: Path | None = None, shown: str, writable: bool = True) -> None:
        self.shown = shown                  # for people: no password in it
        self.writable = writable
        self._engine = engine
        self._file = file                   # of SQLite, where it is on disk
        self._identity: tuple[int, int] | None = None
        self._is_sqlite = engine.dialect.name == "sqlite"
        self.shared = not self._is_sqlite   # a server's, not a file of the registry folder
        self.claim: Path | None = None      # `.catalogue` of the folder, once it names this catalogue
        self._id = ""
        # SQLite: one transaction at a time in this process, so that `fork` can wait until no connection is open.
        self._gate = threading.RLock()
        with _fork_turn:
            _OPEN.add(self)

    # ---- open -------------------------------------------------------------------------------------------------------

    @classmethod
    def sqlite(cls, path: Path, *, writable: bool = True) -> Self:
        quoted = urllib.parse.quote(str(path.absolute()))
        database = f"file:{quoted}?mode={'rwc' if writable else 'ro'}"
        engine = create_engine(
            URL.create("sqlite", database=database, query={"uri": "true"}),
            connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
            poolclass=QueuePool,
            pool_size=1,
        )
        catalog = cls(engine, file=path, shown=str(path), writable=writable)
        _use_explicit_transactions(engine)
        event.listen(engine, "connect", catalog._connected)
        return catalog

    @classmethod
    def memory(cls, shown: str) -> Self:
        """A catalogue of this process alone: what a registry that cannot be written is read through."""
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        _use_explicit_transactions(engine)
        return cls(engine, shown=shown, writable=False)

    @classmethod
    def postgres(cls, url: str) -> Self:
        """Raises InvalidInput where the URL is none, or not PostgreSQL's."""
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgres", "postgresql"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            if parsed.get_backend_name() != "postgresql":
                raise InvalidInput(f"a catalogue cannot be kept in {parsed.drivername}.", hint="Use a folder, or a postgresql:// URL.")
            engine = create_engine(parsed, isolation_level="READ COMMITTED", pool_pre_ping=True)
        except exc.ArgumentError as error:
            raise InvalidInput("the database URL is not one.", hint="Write postgresql://user@host:5432/database.") from error
        except ImportError as error:
            raise InvalidInput(f"{error.name or 'psycopg'} is not installed.", hint="Install adapter-hub[postgres].") from error
        return cls(engine, shown=f"database {parsed.database!r} on {parsed.host or 'localhost'}")

    def beside(self) -> Self:
        """The same database by a connection of its own: one who waits there for another process's write keeps nobody waiting who reads here.

        A server has connections for everybody, and one of memory has no other: those are themselves.
        """
        if self._file is None:
            return self
        other = type(self).sqlite(self._file, writable=self.writable)
        other.claim, other._id, other._identity = self.claim, self.id, self._identity
        return other

    def forget_pages(self) -> None:
        """Let what was deleted leave SQLite's log beside the database as well, as far as nobody reads it. Raises RegistryError."""
        if self._file is not None:
            with self._turn(), self._meaning(), self._engine.connect() as connection:
                connection.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _connected(self, connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")    # what `purge` erases leaves the database file as well
        if self.writable:
            connection.execute("PRAGMA journal_mode = WAL")
        if self._file is not None:
            self._identity = _identity(self._file)

    def close(self) -> None:
        with self._gate:
            self._engine.dispose()

    # ---- transactions -----------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view. Raises RegistryError."""
        with self._turn(), self._meaning(), self._engine.connect() as connection:
            if not self._is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """All or nothing, and one writer at a time. Raises StorageFull, ReadOnlyRegistry, RegistryError.

        With `durable=False` a power failure may undo it: for what can be found out again.
        """
        if not self.writable:
            raise ReadOnlyRegistry(f"{self.shown} is not writable by this process.", hint="Open a registry you own.")
        with self._turn(), self._meaning(), self._engine.connect() as connection:
            if self._is_sqlite:
                connection = connection.execution_options(hub_immediate=True, hub_durable=durable)
            with connection.begin():
                if not self._is_sqlite:
                    connection.exec_driver_sql(_POSTGRES_TURN + ("" if durable else "; SET LOCAL synchronous_commit = off"))
                if self.claim is not None:
                    self._check_claim(self.claim)
                yield connection

    def moment(self, connection: Connection) -> datetime:
        """Now, by the one clock of all who write here: a server's own; SQLite's is this machine's."""
        return datetime.now(UTC) if self._is_sqlite else connection.execute(select(func.clock_timestamp())).scalar_one().astimezone(UTC)

    def _turn(self) -> AbstractContextManager[Any]:
        return self._gate if self._is_sqlite else nullcontext()

    @contextmanager
    def _meaning(self) -> Iterator[None]:
        if self._identity is not None and self._file is not None and _identity(self._file) != self._identity:
            # What this process writes from now on would be lost with the removed file.
            hint = "Open the registry again: it is rebuilt from the version folders."
            raise RegistryError(f"{self._file} was removed or replaced while it was open.", hint=hint)
        try:
            yield
        except exc.DBAPIError as error:
            raise self._explain(error) from error

    def _explain(self, error: exc.DBAPIError) -> RegistryError:
        original = error.orig
        if isinstance(original, sqlite3.Error):
            return self._explain_sqlite(original)
        state = getattr(original, "sqlstate", None) or ""
        if state in ("53100", "53400"):
            return StorageFull(f"{self.shown} is full.", hint=f"Free space on the server. {UNCHANGED}")
        if state in ("25006", "42501"):
            return ReadOnlyRegistry(f"{self.shown} is not writable by this user.", hint="Ask its owner for the right to write.")
        if error.connection_invalidated or state[:2] in ("", "08", "57"):
            return RegistryError(f"{self.shown} cannot be reached: {_first_line(original)}.", hint="Check the server and the URL.")
        return RegistryError(f"{self.shown} refused: {_first_line(original)}.", hint=UNCHANGED)

    def _explain_sqlite(self, error: sqlite3.Error) -> RegistryError:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL" or (name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE") and self._no_space()):
            return StorageFull(f"no space left to write {self.shown}.", hint=f"Free space, or run `adapter-hub gc`. {UNCHANGED}")
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
            return ReadOnlyRegistry(f"{self.shown} is not writable by this process.", hint="Open a registry you own.")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return RegistryError(f"{self.shown} was busy for {BUSY_TIMEOUT_S} s.", hint=f"Try again. {UNCHANGED}")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return RegistryError(f"{self.shown} is damaged.", hint="Delete it: it is rebuilt from the version folders at the next open.")
        return RegistryError(f"{self.shown}: {error}.", hint=UNCHANGED)

    def _no_space(self) -> bool:
        """Whether a failed write is one for want of space: SQLite calls a quota and a file size limit an I/O error."""
        if self._file is None:
            return False
        space = os.statvfs(self._file.parent)
        return space.f_bavail * space.f_frsize < 1 << 20 or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY

    # ---- schema -----------------------------------------------------------------------------------------------------

    def schema_found(self) -> bool:
        """Whether the tables are there, as this adapter_hub makes them. Raises SchemaTooNew."""
        with self.reading() as connection:
            return self._schema_version(connection) == schema.SCHEMA_VERSION

    def make_schema(self, connection: Connection) -> bool:
        """Make the tables, or bring them up to date; False where they were there before. Raises SchemaTooNew."""
        found = self._schema_version(connection)
        table = schema.schema_version
        if found is None:
            schema.metadata.create_all(connection)
            connection.execute(insert(table).values(version=schema.SCHEMA_VERSION, catalogue=uuid.uuid4().hex))
        elif found < schema.SCHEMA_VERSION:
            if found == 1:
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN catalogue TEXT")
                connection.execute(update(table).values(catalogue=uuid.uuid4().hex))
            if found == 3:
                connection.exec_driver_sql(f"ALTER TABLE {schema.observations.name} ADD COLUMN candidate TEXT")
                connection.exec_driver_sql(f"CREATE INDEX ix_{schema.feedback.name}_at ON {schema.feedback.name} (at)")
            schema.metadata.create_all(connection)    # those that are missing
            connection.execute(update(table).values(version=schema.SCHEMA_VERSION))
        return found is None

    def _schema_version(self, connection: Connection) -> int | None:
        if not inspect(connection).has_table(schema.schema_version.name):
            return None
        found = connection.execute(select(schema.schema_version.c.version)).scalar()
        if found is not None and found > schema.SCHEMA_VERSION:
            known = f"this adapter_hub knows up to {schema.SCHEMA_VERSION}"
            raise SchemaTooNew(f"{self.shown} has schema {found}; {known}.", hint="Upgrade adapter_hub.")
        return found

    # ---- one folder, one catalogue ----------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The id of this catalogue; empty before its tables are made."""
        if not self._id:
            with self.reading() as connection:
                if (self._schema_version(connection) or 0) >= 2:    # one of before has it already: it is brought up to date later
                    self._id = connection.execute(select(schema.schema_version.c.catalogue)).scalar() or ""
        return self._id

    def check_may_claim(self, claim: Path) -> None:
        """Raises RegistryError where `.catalogue` names another one. The folder's own file may be lost, and is made again."""
        if not os.path.lexists(claim):
            return
        id, place = _read_claim(claim)
        if place != IN_THE_FOLDER and not (self.shared and id == self.id):
            hint = f"Open its URL with artifacts={str(claim.parent)!r}; to leave that database, delete {claim}."
            raise RegistryError(f"the catalogue of {claim.parent} is in {place}.", hint=hint)

    def take_claim(self, claim: Path, staging: Path) -> None:
        """Let `.catalogue` name this catalogue: who has another one of this folder open writes to that no more."""
        place = self.shown if self.shared else IN_THE_FOLDER
        if not os.path.lexists(claim) or _read_claim(claim) != (self.id, place):
            write_atomic(claim, f"{self.id}\n{place}\n".encode(), staging)
        self.claim = claim

    def _check_claim(self, claim: Path) -> None:
        if not os.path.lexists(claim) or _read_claim(claim)[0] != self._id:
            raise RegistryError(f"{self.shown} is not the catalogue of {claim.parent} any more.", hint=f"Open the registry again. {UNCHANGED}")

    # ---- fork -------------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        # A SQLite connection must not exist on both sides of a fork: its file locks would be believed and not held.
        self._gate.acquire()
        if self._file is not None:
            self._engine.dispose()

    def after_fork_in_parent(self) -> None:
        self._gate.release()

    def after_fork_in_child(self) -> None:
        self._gate = threading.RLock()
        if not self._is_sqlite:
            self._engine.dispose(close=False)    # the parent goes on using these sockets


def _use_explicit_transactions(engine: Engine) -> None:
    """Take BEGIN away from the sqlite3 module, which would begin late, without the write lock, and not for tables."""

    @event.listens_for(engine, "connect")
    def no_implicit_begin(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("hub_immediate"):
            connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if options['hub_durable'] else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("hub_immediate") else "BEGIN")


def _read_claim(claim: Path) -> tuple[str, str]:
    """(id, place) that a `.catalogue` names. Raises RegistryError where it is no file, e.g. a link."""
    try:
        id, _, place = read_regular(claim).decode("utf-8", "replace").partition("\n")
    except CorruptVersion as error:
        raise RegistryError(error.fact, hint=f"Delete {claim}: it is written again.") from error
    return id, place.strip() or id


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


# ---- fork: every open catalogue of this process ---------------------------------------------------------------------

_OPEN: weakref.WeakSet[Catalog] = weakref.WeakSet()
_forking: list[Catalog] = []
_fork_turn = threading.Lock()


def _before() -> None:
    _fork_turn.acquire()
    _forking[:] = sorted(_OPEN, key=id)
    for catalog in _forking:
        catalog.before_fork()


def _in_parent() -> None:
    for catalog in _forking:
        catalog.after_fork_in_parent()
    _forking.clear()
    _fork_turn.release()


def _in_child() -> None:
    global _fork_turn
    _fork_turn = threading.Lock()
    for catalog in _forking:
        catalog.after_fork_in_child()
    _forking.clear()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
