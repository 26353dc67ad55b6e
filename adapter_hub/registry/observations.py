"""The log of what was answered, and what people say of it. Knows rows and the database, nothing of models.

To log never waits and never fails: rows are queued, and one thread writes them in batches. What a crash, a full queue or a database
that cannot be written loses is some rows of the log, never an answer.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, tuple_

from adapter_hub.errors import HubError, InvalidInput, RegistryError
from adapter_hub.refs import AdapterRef
from adapter_hub.registry import schema
from adapter_hub.registry.catalog import Catalog

JSON = Any
log = logging.getLogger("adapter_hub")

QUEUE_ROWS_MAX = 20_000    # that wait to be written; what comes on top is dropped and counted
BATCH_ROWS = 1_000         # written together; the thread is woken for so many
WAIT_S = 1.0               # at most so long a row waits: what a crash may lose
PAGE_ROWS = 1_000          # read at once
IDS = 500                  # asked for at once: databases bound the parameters of a query
TEXT_CHARS_MAX = 10_000    # of a text that is kept; the rows are bounded, so is each of them
CHUNKS = 20                # of a full log one in so many of its rows goes at once: to look for the oldest each time would cost more

_TIME_DIGITS, _COUNT_DIGITS, _CHANCE_DIGITS = 11, 5, 8    # of an id, in hexadecimal


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody says that an answer should have been. The last word counts."""

    correct_label: str | None
    correct_adapter: str | None    # a name
    at: str                        # ISO 8601, UTC, of the database's clock: the order of these is that in which it was said

    def to_json(self) -> dict[str, JSON]:
        said = {"correct_label": self.correct_label, "correct_adapter": self.correct_adapter}
        return {key: value for key, value in said.items() if value is not None} | {"at": self.at}


@dataclass(frozen=True, slots=True)
class Observation:
    """One answer: who gave it and why, how long it took, and what was said of it later."""

    id: str
    adapter: AdapterRef | None        # the version that answered; None: the base model
    score: float | None               # the router's, of its best candidate; None: nothing was routed
    margin: float | None
    reason: str
    label: str | None                 # that was answered, of a classifier of one label
    latency_ms: float | None          # from the call to the answer: rows of one call share it. None: a stream, at the pace of its reader
    text: str | None = None           # that was routed, of a conversation its last message; its first TEXT_CHARS_MAX characters
    sha256: str | None = None         # of the whole text
    candidate: str | None = None      # name of the router's best candidate, also where it was turned away
    feedback: Feedback | None = None

    @property
    def at(self) -> str:
        """When it was answered, to the millisecond: ISO 8601, UTC."""
        return datetime.fromtimestamp(int(self.id[:_TIME_DIGITS], 16) / 1000, UTC).isoformat(timespec="milliseconds")

    def to_json(self) -> dict[str, JSON]:
        row: dict[str, JSON] = {"id": self.id, "at": self.at, "adapter": str(self.adapter) if self.adapter else None, "reason": self.reason}
        row |= {"score": self.score, "margin": self.margin, "label": self.label, "latency_ms": self.latency_ms}
        more = {"candidate": self.candidate, "text": self.text, "sha256": self.sha256, "feedback": self.feedback.to_json() if self.feedback else None}
        return row | {key: value for key, value in more.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Traffic:
    """How many answers of one day have this version and reason."""

    day: str                      # of UTC: 2026-03-01
    adapter: AdapterRef | None    # None: the base model
    reason: str
    answers: int
    score: float | None           # the mean of those that were routed


_count = itertools.count()


def new_ids(count: int) -> list[str]:
    """Ids that no other process makes, in their order: milliseconds, a count, and chance."""
    moment = f"{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}"
    chance = os.urandom(count * _CHANCE_DIGITS // 2).hex()    # the system's: a child of fork would repeat its parent's
    starts = range(0, len(chance), _CHANCE_DIGITS)
    return [f"{moment}{next(_count) & 0xFFFFF:0{_COUNT_DIGITS}x}{chance[start : start + _CHANCE_DIGITS]}" for start in starts]


def sampled(id: str, share: float) -> bool:
    """Whether this one belongs to the share, 0-1, that is logged: the id alone decides."""
    return int(id[-_CHANCE_DIGITS:], 16) < share * float(16**_CHANCE_DIGITS)


def first_id(moment: str | datetime) -> str:
    """The least id of a moment, ISO 8601; without a zone it is UTC's. Raises InvalidInput."""
    try:
        found = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        milliseconds = round((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)
    except (AttributeError, TypeError, ValueError, OverflowError, OSError) as error:
        raise InvalidInput(f"{moment!r} is not a moment.", hint="For example 2026-03-01 or 2026-03-01T12:00:00+01:00.") from error
    return f"{max(0, milliseconds):0{_TIME_DIGITS}x}"


class ObservationLog:
    """The log of one registry. Safe between threads; processes that share the database share the log, each holding to `rows_max` by itself.

    `what` is "decisions", "hash" or "text": what is written of a text.
    """

    def __init__(self, catalog: Catalog, *, what: str, rows_max: int) -> None:
        self._catalog, self._what, self._rows_max = catalog, what, rows_max
        self.dropped = 0    # rows that were not written
        self._count: int | None = None    # rows in the table; None: not known
        self._uncounted = 0               # rows written since they were counted: other processes write too
        self._queue: deque[Observation] = deque()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._make_locks()
        _LOGS.add(self)

    def _make_locks(self) -> None:
        self._writing = threading.Lock()    # held by who writes: who has waited for it finds written what was queued before
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)

    @property
    def writable(self) -> bool:
        return self._catalog.writable

    # ---- write ------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[Observation]) -> None:
        """Queue rows with their texts; what the policy does not keep of these is not written. Returns at once, and never raises."""
        rows = [_shortened(row) if len(row.text or "") > TEXT_CHARS_MAX else row for row in rows]
        with self._lock:
            room = 0 if self._closed else max(0, QUEUE_ROWS_MAX - len(self._queue))
            self._queue.extend(rows[:room])
            if self._queue and self._worker is None:
                self._start()
            elif len(self._queue) >= BATCH_ROWS:
                self._more.notify()
        if len(rows) > room:
            self._drop(len(rows) - room, "they came faster than they are written")

    def _start(self) -> None:
        self._worker = threading.Thread(target=self._work, name="adapter_hub observations", daemon=True)
        try:
            self._worker.start()
        except RuntimeError:    # the interpreter ends, or has no thread left: who flushes or closes writes them
            self._worker = None

    def _work(self) -> None:
        """Until nothing has come for a while: a log that nobody uses has no thread."""
        while True:
            with self._lock:
                self._more.wait_for(lambda: self._closed or len(self._queue) >= BATCH_ROWS, WAIT_S)
                if not self._queue:
                    self._worker = None
                    return
            self._write()

    def flush(self) -> None:
        """Returns when what was added is in the database. Raises RegistryError where it cannot be written; it is lost then, and counted."""
        if error := self._write():
            raise error if isinstance(error, HubError) else RegistryError(f"observations cannot be written: {error}.") from error

    def close(self) -> None:
        """Write what is queued, and say what was lost."""
        self._write()
        with self._lock:
            self._closed = True
            self._more.notify_all()
        if self.dropped:
            log.warning("%d observations were lost in all.", self.dropped)
        self._catalog.close()

    def _write(self) -> Exception | None:
        """Write what is queued; what cannot be is dropped. Returns why."""
        with self._writing:
            with self._lock:
                rows = list(self._queue)
                self._queue.clear()
            for start in range(0, len(rows), BATCH_ROWS):
                try:
                    self._store(rows[start : start + BATCH_ROWS])
                except Exception as error:    # whatever it is: to log must not harm what is logged
                    self._count = None
                    self._drop(len(rows) - start, str(error).strip().split("\n")[0].removesuffix("."))
                    return error
        return None

    def _drop(self, rows: int, why: str) -> None:
        said, self.dropped = self.dropped, self.dropped + rows
        if not said:
            log.warning("%d observations were lost: %s. Answers go on; further losses are counted and told at the end.", rows, why)

    def _store(self, rows: Sequence[Observation]) -> None:
        rows = rows[-self._rows_max :]
        # Not to the disk at once: a power failure may take the last batches, a crash of this process does not.
        with self._catalog.writing(durable=False) as connection:
            self._make_room(connection, len(rows))
            connection.execute(insert(schema.observations), [self._values(row) for row in rows])
        self._count = (self._count or 0) + len(rows)
        self._uncounted += len(rows)

    def _make_room(self, connection: Connection, rows: int) -> None:
        o, f = schema.observations.c, schema.feedback.c
        if self._count is None or self._uncounted * CHUNKS >= self._rows_max:
            self._count, self._uncounted = connection.scalar(select(func.count()).select_from(schema.observations)) or 0, 0
        over = self._count + rows - self._rows_max
        if over <= 0:
            return
        gone = min(max(over, self._rows_max // CHUNKS), self._count)
        last = connection.scalar(select(o.id).order_by(o.id).offset(gone - 1).limit(1))
        if last is not None:
            connection.execute(delete(schema.feedback).where(f.observation <= last))
            self._count -= connection.execute(delete(schema.observations).where(o.id <= last)).rowcount

    def _values(self, row: Observation) -> dict[str, JSON]:
        text = row.text or ""
        kept = {"text": _storable(text) if self._what == "text" else None}
        kept |= {"sha256": row.sha256 or _sha256(text) if self._what != "decisions" else None}
        version = {"name": row.adapter.name if row.adapter else None, "version": row.adapter.version if row.adapter else None}
        facts = {"id": row.id, "at": row.at, "reason": row.reason, "label": None if row.label is None else _storable(row.label)}
        version |= {"candidate": row.candidate}
        return facts | version | {"score": _finite(row.score), "margin": _finite(row.margin), "latency_ms": _finite(row.latency_ms)} | kept

    # ---- read, say, forget ------------------------------------------------------------------------------------------

    def find(self, id: str) -> Observation:
        """Raises InvalidInput for an id that is not in the log."""
        self.flush()
        with self._catalog.reading() as connection:
            row = connection.execute(_SELECTED.where(schema.observations.c.id == _storable(str(id)))).mappings().first()
        if row is None:
            hint = "It was not logged, has gone since, or another process has yet to write it: ask again in some seconds."
            raise InvalidInput(f"there is no observation {str(id)[:60]!r}.", hint=hint)
        return _observation(row)

    def find_all(self, ids: Sequence[str]) -> dict[str, Observation]:
        """Those of them that are in the log, by id."""
        self.flush()
        found: dict[str, Observation] = {}
        for start in range(0, len(ids), IDS):
            with self._catalog.reading() as connection:
                rows = connection.execute(_SELECTED.where(schema.observations.c.id.in_(ids[start : start + IDS]))).mappings()
                found |= {row["id"]: _observation(row) for row in rows}
        return found

    def read(
        self, *, since: str | None = None, before: str | None = None, name: str | None = None, version: int | None = None,
        rows_max: int | None = None, oldest_first: bool = False,
    ) -> Iterator[Observation]:    # fmt: skip
        """Newest first, or `oldest_first`; `since` and `before` are ids, or beginnings of ids.

        Read in pages: no transaction is open while a row is looked at, and memory holds a page.
        """
        self.flush()
        o = schema.observations.c
        query = _SELECTED.where(*_chosen(since, before, name, version)).order_by(o.id if oldest_first else o.id.desc())
        last, left = None, rows_max
        while left is None or left > 0:
            wanted = PAGE_ROWS if left is None else min(PAGE_ROWS, left)
            page = query.limit(wanted) if last is None else query.where(o.id > last if oldest_first else o.id < last).limit(wanted)
            with self._catalog.reading() as connection:
                rows = [_observation(row) for row in connection.execute(page).mappings()]
            yield from rows
            if len(rows) < wanted:
                return
            last, left = rows[-1].id, None if left is None else left - len(rows)

    def traffic(self) -> list[Traffic]:
        """What was answered, counted by day, version and reason, in that order."""
        self.flush()
        o, day = schema.observations.c, func.substr(schema.observations.c.at, 1, 10)
        query = select(day, o.name, o.version, o.reason, func.count(), func.avg(o.score)).group_by(day, o.name, o.version, o.reason)
        with self._catalog.reading() as connection:
            rows = connection.execute(query).all()
        found = [Traffic(at, AdapterRef(name, version) if name else None, reason, count, score) for at, name, version, reason, count, score in rows]
        return sorted(found, key=lambda one: (one.day, str(one.adapter or ""), one.reason))

    def corrected(self, after: tuple[str, str] = ("", "")) -> Iterator[Observation]:
        """Those of which something was said behind `after`, a moment and an id as in `Feedback.at` and `Observation.id`, in that order."""
        self.flush()
        f = schema.feedback.c
        query = _SELECTED.where(f.observation.is_not(None)).order_by(f.at, f.observation).limit(PAGE_ROWS)
        while True:
            with self._catalog.reading() as connection:
                page = query.where(tuple_(f.at, f.observation) > tuple_(*after))
                rows = [_observation(row) for row in connection.execute(page).mappings()]
            yield from rows
            if len(rows) < PAGE_ROWS or (last := rows[-1]).feedback is None:
                return
            after = (last.feedback.at, last.id)

    def say(self, seen: Observation, correct_label: str | None, correct_adapter: str | None) -> Observation:
        """Join feedback to an observation, in place of what was said before. Its moment is later than that of any other.

        Raises InvalidInput where the observation has gone.
        """
        correct_label = None if correct_label is None else _storable(correct_label)
        f = schema.feedback.c
        with self._catalog.writing() as connection:
            if connection.scalar(select(schema.observations.c.id).where(schema.observations.c.id == seen.id)) is None:
                raise InvalidInput(f"there is no observation {seen.id!r} any more.")
            moment = self._catalog.moment(connection)
            if last := connection.scalar(select(func.max(f.at))):    # who reads on behind that one must meet this, wherever a clock was set
                moment = max(moment, datetime.fromisoformat(last) + timedelta(milliseconds=1))
            said = Feedback(correct_label, correct_adapter, moment.isoformat(timespec="milliseconds"))
            connection.execute(delete(schema.feedback).where(f.observation == seen.id))
            connection.execute(insert(schema.feedback).values(observation=seen.id, **asdict(said)))
        return replace(seen, feedback=said)

    def forget(self, *, before: str | None = None, name: str | None = None, version: int | None = None) -> int:
        """Erase rows and what was said of them, also from the pages of a SQLite file; returns how many. Raises ReadOnlyRegistry, RegistryError."""
        self.flush()
        kept = select(schema.observations.c.id)
        with self._writing:
            with self._catalog.writing() as connection:
                gone = connection.execute(delete(schema.observations).where(*_chosen(None, before, name, version))).rowcount
                connection.execute(delete(schema.feedback).where(schema.feedback.c.observation.not_in(kept)))
            self._count = None
        self._catalog.forget_pages()
        return gone

    # ---- fork -------------------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        self._make_locks()
        self._queue, self._worker = deque(), None    # the parent's rows are the parent's to write


_SELECTED = select(schema.observations, *(column.label(f"said_{column.name}") for column in schema.feedback.c)).select_from(
    schema.observations.outerjoin(schema.feedback, schema.observations.c.id == schema.feedback.c.observation)
)


def _chosen(since: str | None, before: str | None, name: str | None, version: int | None) -> list[Any]:
    o = schema.observations.c
    asked = [since and o.id >= since, before and o.id < before, name and o.name == name, version and o.version == version]
    return [condition for condition in asked if condition is not None]


def _observation(row: RowMapping) -> Observation:
    values = {key: row[key] for key in ("id", "score", "margin", "reason", "label", "latency_ms", "text", "sha256", "candidate")}
    said = Feedback(row["said_correct_label"], row["said_correct_adapter"], row["said_at"]) if row["said_observation"] else None
    return Observation(adapter=AdapterRef(row["name"], row["version"]) if row["name"] else None, feedback=said, **values)


def _shortened(row: Observation) -> Observation:
    """With the end of its text cut off: what waits is bounded too."""
    return replace(row, text=(row.text or "")[:TEXT_CHARS_MAX], sha256=_sha256(row.text or ""))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _storable(text: str) -> str:
    """What every database can hold: PostgreSQL has no NUL."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


# ---- every log of this process: written when it ends, and not twice after a fork ------------------------------------

_LOGS: weakref.WeakSet[ObservationLog] = weakref.WeakSet()


def _write_all() -> None:
    for each in list(_LOGS):
        each._write()


def _in_child() -> None:
    for each in list(_LOGS):
        each.after_fork_in_child()


atexit.register(_write_all)
os.register_at_fork(after_in_child=_in_child)
