"""What can happen to a name or to the calibrations, as one fact each. Pure: what follows from a sequence of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

JSON = Any


class EventKind(StrEnum):
    ADDED = "added"                # a version was registered
    ADOPTED = "adopted"            # a version folder that came by git or copy was taken in
    MOVED = "moved"                # an alias now names this version
    ROLLED_BACK = "rolled_back"    # an alias names this version again
    REMOVED = "removed"            # an alias names nothing any more, because its version was retired or purged
    RETIRED = "retired"            # the version is kept, and never routed
    PURGED = "purged"              # the version's data were erased
    CALIBRATED = "calibrated"      # a calibration was stored; `version` is its number


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `seq` grows in the order in which events became visible."""

    seq: int
    at: str                         # ISO 8601, UTC
    kind: EventKind
    name: str | None                # None: a calibration
    version: int                    # for REMOVED, the version that the alias left
    alias: str | None = None
    previous: int | None = None     # the version that the alias left
    reason: str = ""
    detail: Mapping[str, JSON] = field(default_factory=dict)    # digest of a version or calibration, members of the latter

    def to_json(self) -> dict[str, JSON]:
        row: dict[str, JSON] = {"seq": self.seq, "at": self.at, "kind": str(self.kind), "name": self.name, "version": self.version}
        row |= {"alias": self.alias, "previous": self.previous, "reason": self.reason}
        return row | ({"detail": dict(self.detail)} if self.detail else {})

    def to_line(self) -> bytes:
        """One line of history.jsonl; the folder says the name."""
        row = {key: value for key, value in self.to_json().items() if key != "name" and value not in (None, "")}
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes, name: str | None) -> Event:
        """Raises ValueError where the line is not an event of this name."""
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        event = cls(
            seq=_whole(row.get("seq")),
            at=str(row.get("at", "")),
            kind=EventKind(str(row.get("kind"))),
            name=name,
            version=_whole(row.get("version")),
            alias=row.get("alias"),
            previous=None if row.get("previous") is None else _whole(row["previous"]),
            reason=str(row.get("reason", "")),
            detail=row.get("detail") or {},
        )
        if (event.kind is EventKind.CALIBRATED) is not (name is None) or not isinstance(event.detail, dict):
            raise ValueError(f"not an event of {name or 'the calibrations'}")
        if (event.alias is None) is (event.kind in _ALIAS_KINDS):
            raise ValueError("alias and kind do not agree")
        return event

    @property
    def content(self) -> str:
        """The event without its sequence number: equal for the same event in two clones of a registry."""
        row = self.to_json()
        del row["seq"]
        return json.dumps(row, sort_keys=True)


_ALIAS_KINDS = (EventKind.MOVED, EventKind.ROLLED_BACK, EventKind.REMOVED)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**53:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


@dataclass(slots=True)
class NameState:
    """What a history comes to: the versions that were registered, and what names them."""

    versions: dict[int, str | None] = field(default_factory=dict)       # version -> digest
    registered_at: dict[int, str] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)
    purged: dict[int, str] = field(default_factory=dict)                # version -> when
    aliases: dict[str, int] = field(default_factory=dict)


def replay(events: Iterable[Event]) -> NameState:
    """The state of one name after its events, in the order given."""
    state = NameState()
    for event in events:
        match event.kind:
            case EventKind.ADDED | EventKind.ADOPTED:
                digest = event.detail.get("digest")
                state.versions[event.version] = digest if isinstance(digest, str) else None
                state.registered_at[event.version] = event.at
            case EventKind.RETIRED:
                state.retired.add(event.version)
            case EventKind.PURGED:
                state.purged[event.version] = event.at
                state.aliases = {alias: version for alias, version in state.aliases.items() if version != event.version}
            case EventKind.MOVED | EventKind.ROLLED_BACK:
                state.aliases[event.alias or ""] = event.version
            case EventKind.REMOVED:
                state.aliases.pop(event.alias or "", None)
            case EventKind.CALIBRATED:
                pass
    return state


def alias_trail(events: Iterable[Event]) -> tuple[list[int], int | None]:
    """(versions that one alias named, oldest first, without those rolled back from; the version it names now).

    Retiring the version that an alias names takes it off the trail: going back from there leads to the one before.
    """
    trail: list[int] = []
    current: int | None = None
    for event in events:
        if event.kind is EventKind.MOVED:
            if not trail or trail[-1] != event.version:
                trail.append(event.version)
            current = event.version
        elif event.kind is EventKind.ROLLED_BACK:
            while trail and trail[-1] != event.version:
                trail.pop()
            current = event.version
        elif event.kind is EventKind.REMOVED:
            if trail:
                trail.pop()
            current = None
    return trail, current


def rollback_target(events: Iterable[Event]) -> int | None:
    """The version that an alias goes back to, or None where there is nothing before."""
    trail, current = alias_trail(events)
    if current is not None:
        trail = trail[:-1]
    return trail[-1] if trail else None
