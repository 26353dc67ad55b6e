"""Rows of the catalogue as nouns, and nouns as rows. Each function runs inside a transaction of its caller."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, or_, select, update

from adapter_hub.errors import AdapterNotFound, CorruptVersion, NotRoutable
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry import schema
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.manifest import Manifest
from adapter_hub.registry.schema import VersionState

JSON = Any
_LISTED = [column for column in schema.versions.c if column.name != "manifest"]
SEQS_MAX = 1_000    # in one statement: databases bound the number of parameters
_GONE = (VersionState.PURGING, VersionState.PURGED)


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One line of a listing."""

    ref: AdapterRef
    state: VersionState                 # LIVE, RETIRED or PURGED
    aliases: tuple[str, ...]
    task_type: str | None
    labels: tuple[str, ...] | None
    tags: tuple[str, ...]
    created_at: str
    description: str
    digest: str
    base_model: str
    base_fingerprint: str

    def to_json(self) -> dict[str, JSON]:
        return {
            "ref": str(self.ref),
            "name": self.ref.name,
            "version": self.ref.version,
            "aliases": list(self.aliases),
            "state": str(self.state),
            "task_type": self.task_type,
            "labels": None if self.labels is None else list(self.labels),
            "tags": list(self.tags),
            "created_at": self.created_at,
            "description": self.description,
            "digest": self.digest,
            "base_model": self.base_model,
            "base_fingerprint": self.base_fingerprint,
        }


# ---- versions: look -------------------------------------------------------------------------------------------------


def names(connection: Connection) -> list[str]:
    v = schema.versions.c
    return sorted(connection.scalars(select(v.name).where(v.state != VersionState.RESERVED).distinct()))


def state_of(connection: Connection, name: str, version: int) -> VersionState | None:
    """None where the number was never registered."""
    found = row_of(connection, name, version)
    return None if found is None else VersionState(found["state"])


def row_of(connection: Connection, name: str, version: int) -> RowMapping | None:
    v = schema.versions.c
    query = select(schema.versions).where(v.name == name, v.version == version, v.state != VersionState.RESERVED)
    return connection.execute(query).mappings().first()


def known_rows(connection: Connection, ref: AdapterRef | None = None) -> list[RowMapping]:
    """Every row that was registered, or the one of `ref`."""
    query = select(schema.versions).where(schema.versions.c.state != VersionState.RESERVED)
    if ref is not None:
        query = query.where(schema.versions.c.name == ref.name, schema.versions.c.version == ref.version)
    return sorted(connection.execute(query).mappings(), key=lambda row: (row["name"], row["version"]))


def rows_of(connection: Connection, name: str) -> dict[int, RowMapping]:
    """version -> row, of every version of a name that was registered."""
    v = schema.versions.c
    query = select(schema.versions).where(v.name == name, v.state != VersionState.RESERVED).order_by(v.version)
    return {row["version"]: row for row in connection.execute(query).mappings()}


def version_of(connection: Connection, ref: AdapterRef) -> int:
    """The version that a reference names, in whatever state it is. Raises AdapterNotFound, NotRoutable (no production)."""
    if ref.version is not None:
        if state_of(connection, ref.name, ref.version) is None:
            raise _unknown(connection, ref)
        return ref.version
    found = aliases_of(connection, ref.name).get(ref.alias or PRODUCTION)
    if found is not None:
        return found
    if ref.alias != PRODUCTION or not _versions_of(connection, ref.name):
        raise _unknown(connection, ref)
    usable = _versions_of(connection, ref.name, VersionState.LIVE)
    hint = "Each of its versions is retired or purged."
    if usable:
        hint = f"`adapter-hub history {ref.name}` says why; to have one all the same: `adapter-hub promote {ref.name}@{usable[-1]}`."
    raise NotRoutable(f"no version of '{ref.name}' is in production.", hint=hint)


def _unknown(connection: Connection, ref: AdapterRef) -> AdapterNotFound:
    known = [f"{ref.name}@{version}" for version in _versions_of(connection, ref.name)]
    if not known:    # then the name is what was misspelt, whatever stands after the @
        return AdapterNotFound(ref.name, known=names(connection))
    return AdapterNotFound(ref, known=[*known, *(f"{ref.name}@{alias}" for alias in aliases_of(connection, ref.name))])


def _versions_of(connection: Connection, name: str, *states: VersionState) -> list[int]:
    v = schema.versions.c
    wanted = v.state.in_(states) if states else v.state != VersionState.RESERVED
    return list(connection.scalars(select(v.version).where(v.name == name, wanted).order_by(v.version)))


def check_name_known(connection: Connection, name: str) -> None:
    """Raises AdapterNotFound."""
    v = schema.versions.c
    query = select(v.version).where(v.name == name, v.state != VersionState.RESERVED).limit(1)
    if connection.execute(query).first() is None:
        raise AdapterNotFound(name, known=names(connection))


def check_usable(connection: Connection, ref: AdapterRef, *, retired: bool) -> None:
    """Raises NotRoutable where the version was purged; also where it was retired, unless `retired` is fine."""
    state = state_of(connection, ref.name, ref.version or 0)
    if state in _GONE:
        raise NotRoutable(f"{ref} was purged: its data were erased.", hint=f"See `adapter-hub history {ref.name}`.")
    if state is VersionState.RETIRED and not retired:
        raise NotRoutable(f"{ref} is retired.", hint=f"Promote another version of '{ref.name}', or register it again.")


def purged(connection: Connection) -> frozenset[AdapterRef]:
    v = schema.versions.c
    return frozenset(AdapterRef(row.name, row.version) for row in connection.execute(select(v.name, v.version).where(v.state.in_(_GONE))))


def manifest_of(row: RowMapping) -> Manifest:
    """Raises CorruptVersion where the catalogue has none, because the folder was lost before a rebuild."""
    if row["manifest"] is None:
        raise CorruptVersion(f"the folder of {row['name']}@{row['version']} is lost.", hint="Restore it from a copy (git, backup).")
    return Manifest.from_json(json.loads(row["manifest"]), source=f"{row['name']}@{row['version']}")


def list_rows(
    connection: Connection, name: str | None = None, base: str | None = None, tag: str | None = None, task_type: str | None = None
) -> list[VersionRow]:
    v = schema.versions.c
    query = select(*_LISTED).where(v.state != VersionState.RESERVED)
    if name is not None:
        query = query.where(v.name == name)
    if base is not None:
        query = query.where(or_(v.base_model == base, v.base_fingerprint == base))
    if task_type is not None:
        query = query.where(v.task_type == task_type)
    if tag is not None:
        t = schema.tags.c
        query = query.where(select(t.tag).where(t.name == v.name, t.version == v.version, t.tag == tag).exists())
    named: dict[tuple[str, int], list[str]] = {}
    a = schema.aliases.c
    for row in connection.execute(select(a.name, a.version, a.alias).where(a.name == name if name is not None else a.name.is_not(None))):
        named.setdefault((row.name, row.version), []).append(row.alias)
    rows = [_listed(row, named.get((row["name"], row["version"]), [])) for row in connection.execute(query).mappings()]
    return sorted(rows, key=lambda row: (row.ref.name, row.ref.version or 0))


def _listed(row: RowMapping, aliases: Iterable[str]) -> VersionRow:
    state = VersionState(row["state"])
    labels = row["labels"]
    return VersionRow(
        ref=AdapterRef(row["name"], row["version"]),
        state=VersionState.PURGED if state in _GONE else state,
        aliases=tuple(sorted(aliases)),
        task_type=row["task_type"],
        labels=None if labels is None else tuple(json.loads(labels)),
        tags=tuple(json.loads(row["tags"] or "[]")),
        created_at=row["created_at"] or "",
        description=row["description"] or "",
        digest=row["digest"] or "",
        base_model=row["base_model"] or "",
        base_fingerprint=row["base_fingerprint"] or "",
    )


# ---- versions: change -----------------------------------------------------------------------------------------------


def reserve(connection: Connection, name: str, taken: int) -> int:
    """Take the next number above every one that the catalogue knows, and above `taken`."""
    v = schema.versions.c
    highest = connection.scalar(select(func.max(v.version)).where(v.name == name)) or 0
    version = max(highest, taken) + 1
    connection.execute(insert(schema.versions).values(name=name, version=version, state=VersionState.RESERVED))
    return version


def row_values(manifest: Manifest, state: VersionState) -> dict[str, JSON]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "state": str(state),
        "digest": manifest.digest,
        "base_model": manifest.base_model,
        "base_fingerprint": manifest.base_fingerprint,
        "task_type": manifest.task_type,
        "labels": None if manifest.labels is None else json.dumps(manifest.labels, ensure_ascii=False),
        "tags": json.dumps(manifest.tags, ensure_ascii=False),
        "description": manifest.description,
        "created_at": manifest.created_at,
        "manifest": json.dumps(manifest.to_json(), ensure_ascii=False),
    }


def lost_values(name: str, version: int, state: VersionState, digest: str | None, created_at: str) -> dict[str, JSON]:
    """A row for a version that a history names and whose manifest is gone: its number stays taken."""
    empty = dict.fromkeys(("base_model", "base_fingerprint", "task_type", "labels", "description", "manifest"))
    return {"name": name, "version": version, "state": str(state), "digest": digest, "tags": "[]", "created_at": created_at} | empty


def store(connection: Connection, manifest: Manifest, state: VersionState) -> None:
    """Make the row of a version what its manifest says, reserved before or not."""
    erase(connection, manifest.name, manifest.version)
    connection.execute(delete(schema.versions).where(*_is(manifest.name, manifest.version)))
    connection.execute(insert(schema.versions).values(row_values(manifest, state)))
    insert_parts(connection, [manifest])


def insert_parts(connection: Connection, manifests: Iterable[Manifest]) -> None:
    """The rows that tags and file contents are searched by."""
    tags, files = [], []
    for manifest in manifests:
        where = {"name": manifest.name, "version": manifest.version}
        tags += [where | {"tag": tag} for tag in manifest.tags]
        files += [where | {"file": file, "sha256": sha256} for file, sha256 in manifest.files.items()]
    if tags:
        connection.execute(insert(schema.tags), tags)
    if files:
        connection.execute(insert(schema.files), files)


def erase(connection: Connection, name: str, version: int) -> None:
    for table in (schema.tags, schema.files):
        connection.execute(delete(table).where(table.c.name == name, table.c.version == version))


def set_state(connection: Connection, name: str, version: int, state: VersionState) -> None:
    connection.execute(update(schema.versions).where(*_is(name, version)).values(state=state))


def _is(name: str, version: int) -> tuple[Any, Any]:
    return schema.versions.c.name == name, schema.versions.c.version == version


def same_content(connection: Connection, name: str, sha256: str) -> list[tuple[int, str]]:
    """(version, file) of stored files of this name with this content, newest first."""
    f = schema.files.c
    query = select(f.version, f.file).where(f.name == name, f.sha256 == sha256).order_by(f.version.desc()).limit(4)
    return [(row.version, row.file) for row in connection.execute(query)]


# ---- aliases --------------------------------------------------------------------------------------------------------


def aliases_of(connection: Connection, name: str) -> dict[str, int]:
    a = schema.aliases.c
    return {row.alias: row.version for row in connection.execute(select(a.alias, a.version).where(a.name == name))}


def all_aliases(connection: Connection) -> dict[tuple[str, str], int]:
    a = schema.aliases.c
    return {(row.name, row.alias): row.version for row in connection.execute(select(a.name, a.alias, a.version))}


def production(connection: Connection) -> list[AdapterRef]:
    a = schema.aliases.c
    found = connection.execute(select(a.name, a.version).where(a.alias == PRODUCTION))
    return sorted((AdapterRef(row.name, row.version) for row in found), key=lambda ref: ref.name)


def write_alias(connection: Connection, name: str, alias: str, version: int | None) -> None:
    """Let an alias name a version, or nothing."""
    a = schema.aliases.c
    connection.execute(delete(schema.aliases).where(a.name == name, a.alias == alias))
    if version is not None:
        connection.execute(insert(schema.aliases).values(name=name, alias=alias, version=version))


# ---- events ---------------------------------------------------------------------------------------------------------


def last_seq(connection: Connection) -> int:
    return connection.scalar(select(func.max(schema.events.c.seq))) or 0


def record(
    connection: Connection,
    kind: EventKind,
    name: str | None,
    version: int,
    *,
    at: str,
    alias: str | None = None,
    previous: int | None = None,
    reason: str = "",
    detail: dict[str, JSON] | None = None,
) -> Event:
    """Append an event: it gets the next number, in a writing transaction of the caller."""
    event = Event(last_seq(connection) + 1, at, kind, name, version, alias, previous, reason, detail or {})
    insert_events(connection, [event], mirrored=False)
    return event


def insert_events(connection: Connection, events: Sequence[Event], *, mirrored: bool) -> None:
    rows = [event.to_json() | {"detail": json.dumps(dict(event.detail)), "mirrored": int(mirrored)} for event in events]
    if rows:
        connection.execute(insert(schema.events), rows)


def select_events(
    connection: Connection,
    *,
    after: int = 0,
    name: str | None = None,
    alias: str | None = None,
    mirrored: bool | None = None,
    calibrations: bool = False,
) -> list[Event]:
    """Events in their order; of one name, or of the calibrations alone, where asked for."""
    e = schema.events.c
    query = select(schema.events).where(e.seq > after).order_by(e.seq)
    if calibrations or name is not None:
        query = query.where(e.name.is_(None) if calibrations else e.name == name)
    if alias is not None:
        query = query.where(e.alias == alias)
    if mirrored is not None:
        query = query.where(e.mirrored == int(mirrored))
    return [_event(row) for row in connection.execute(query).mappings()]


def _event(row: RowMapping) -> Event:
    values = dict(row)
    del values["mirrored"]
    return Event(**values | {"kind": EventKind(row["kind"]), "detail": json.loads(row["detail"])})


def names_to_mirror(connection: Connection) -> list[str | None]:
    e = schema.events.c
    return list(connection.scalars(select(e.name).where(e.mirrored == 0).distinct()))


def mark_mirrored(connection: Connection, events: Sequence[Event]) -> None:
    for start in range(0, len(events), SEQS_MAX):
        seqs = [event.seq for event in events[start : start + SEQS_MAX]]
        connection.execute(update(schema.events).where(schema.events.c.seq.in_(seqs)).values(mirrored=1))


# ---- calibrations ---------------------------------------------------------------------------------------------------


def reserve_calibration(connection: Connection, taken: int) -> int:
    highest = connection.scalar(select(func.max(schema.calibrations.c.number))) or 0
    number = max(highest, taken) + 1
    connection.execute(insert(schema.calibrations).values(number=number, state=VersionState.RESERVED))
    return number


def store_calibration(connection: Connection, number: int, sha256: str) -> None:
    """Make the row of a calibration this, whatever it was before."""
    connection.execute(delete(schema.calibrations).where(schema.calibrations.c.number == number))
    connection.execute(insert(schema.calibrations).values(number=number, state=VersionState.LIVE, sha256=sha256))


def live_calibrations(connection: Connection) -> dict[int, str]:
    """number -> sha256, in the order of the numbers."""
    c = schema.calibrations.c
    query = select(c.number, c.sha256).where(c.state == VersionState.LIVE).order_by(c.number)
    return {row.number: row.sha256 for row in connection.execute(query)}
