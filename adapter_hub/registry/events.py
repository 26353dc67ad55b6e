"""What can happen to a name or to the calibrations, as one fact each. Pure: what follows from a sequence of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapter_hub.errors import InvalidName
from adapter_hub.refs import PRODUCTION, check_alias
from adapter_hub.registry.layout import NUMBER_MAX

JSON = Any
SEQ_MAX = 2**53


class EventKind(StrEnum):
    ADDED = "added"                # a version was registered
    ADOPTED = "adopted"            # a version folder that came by git or copy was taken in
    MOVED = "moved"                # an alias now names this version
    ROLLED_BACK = "rolled_back"    # an alias names this version again
    REMOVED = "removed"            # an alias names nothing any more, because its version was retired or purged
    RETIRED = "retired"            # the version is kept, and never routed
    PURGED = "purged"              # the version's data were erased
    MAINTAINED = "maintained"      # a maintenance pass looked at the version, or did something about it; changes no state
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
    detail: Mapping[str, JSON] = field(default_factory=dict)    # digest of a version or calibration, members of the latter; figures of MAINTAINED

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
        try:
            row = json.loads(line, parse_constant=_no_number)
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        event = cls(
            seq=_whole(row.get("seq"), SEQ_MAX),
            at=_text(row.get("at", "")),
            kind=EventKind(_text(row.get("kind"))),
            name=name,
            version=_whole(row.get("version"), NUMBER_MAX),
            alias=None if row.get("alias") is None else _alias(row["alias"]),
            previous=None if row.get("previous") is None else _whole(row["previous"], NUMBER_MAX),
            reason=_text(row.get("reason", "")),
            detail=row.get("detail") or {},
        )
        if (event.kind is EventKind.CALIBRATED) is not (name is None) or not isinstance(event.detail, dict):
            raise ValueError(f"not an event of {name or 'the calibrations'}")
        if not _text(event.detail.get("digest", "")) and name is None:
            raise ValueError("a calibration without a digest")
        if not isinstance(event.detail.get("members", []), list):
            raise ValueError("members are not a list")
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


def _whole(value: object, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise ValueError(f"not a whole number from 1 to {highest}")
    return value


def _text(value: object) -> str:
    """Text that every database can hold. Raises ValueError (UnicodeEncodeError, for a lone surrogate, is one)."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("not a text")
    value.encode()
    return value


def _alias(value: object) -> str:
    try:
        return check_alias(_text(value))
    except InvalidName as error:
        raise ValueError(error.fact) from error


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


@dataclass(slots=True)
class NameState:
    """What a history comes to: the versions that were registered, and what names them."""

    versions: dict[int, str | None] = field(default_factory=dict)       # version -> digest
    registered_at: dict[int, str] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)
    purged: dict[int, str] = field(default_factory=dict)                # version -> when
    aliases: dict[str, int] = field(default_factory=dict)


def replay(events: Iterable[Event]) -> NameState:
    """The state of one name after its events, in the order given.

    What a damaged history says of a version that it never registers is passed over. Lines that were merged from two clones may
    let an alias name what the other clone retired or purged: it then names nothing.
    """
    state = NameState()
    for event in without_phantoms(events)[0]:
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
            case EventKind.MAINTAINED | EventKind.CALIBRATED:
                pass
    for alias, version in list(state.aliases.items()):
        if version in state.purged or (alias == PRODUCTION and version in state.retired):
            del state.aliases[alias]
    return state


def without_phantoms(events: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """(events of versions that are registered among them; the other events)."""
    events = list(events)
    registered = {event.version for event in events if event.kind in (EventKind.ADDED, EventKind.ADOPTED)}
    return [e for e in events if e.version in registered], [e for e in events if e.version not in registered]


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


def rollback_targets(events: Iterable[Event]) -> list[int]:
    """The versions that an alias named before, the one it goes back to first."""
    trail, current = alias_trail(events)
    return trail[::-1] if current is None else trail[-2::-1]
