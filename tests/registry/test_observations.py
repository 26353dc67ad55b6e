"""The log of what was answered: what is written, how much is kept, and that to log neither waits nor fails, on each catalogue."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, tzinfo

import pytest

from adapter_hub.errors import InvalidInput, RegistryError
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.observations import QUEUE_ROWS_MAX, TEXT_CHARS_MAX, Observation, ObservationLog, first_id, new_ids, sampled
from adapter_hub.registry.registry import Registry

BANKING = AdapterRef("banking", 3)


def seen(count: int, adapter: AdapterRef | None = BANKING, text: str = "where is my card") -> list[Observation]:
    return [Observation(id, adapter, 0.5, 0.1, "accepted", "card_lost", 12.5, text) for id in new_ids(count)]


@pytest.fixture
def logs() -> Iterator[Callable[..., ObservationLog]]:
    """Makes logs of a registry, and closes them."""
    made: list[ObservationLog] = []

    def make(registry: Registry, what: str = "text", rows_max: int = 100_000) -> ObservationLog:
        made.append(ObservationLog(registry._catalog.beside(), what=what, rows_max=rows_max))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_ids_grow_in_the_order_they_are_made_and_tell_the_time() -> None:
    ids = [id for count in (3, 1, 500) for id in new_ids(count)]
    assert ids == sorted(set(ids)) and len({len(id) for id in ids}) == 1
    told = Observation(ids[0], None, None, None, "named", None, None).at
    assert first_id(told) <= ids[0] < first_id("2999-01-01") and told.endswith("+00:00")


def test_the_id_alone_decides_whether_an_answer_belongs_to_the_sample() -> None:
    ids = new_ids(20_000)
    chosen = [id for id in ids if sampled(id, 0.25)]
    assert chosen == [id for id in ids if sampled(id, 0.25)] and set(chosen) <= {id for id in ids if sampled(id, 0.5)}
    assert 0.2 < len(chosen) / len(ids) < 0.3
    assert all(sampled(id, 1.0) for id in ids) and not any(sampled(id, 0.0) for id in ids)


@pytest.mark.parametrize("moment", ["yesterday", "", 7, None])
def test_what_is_no_moment_is_named(moment: object) -> None:
    with pytest.raises(InvalidInput, match=r"is not a moment\. For example 2026-03-01"):
        first_id(moment)    # type: ignore[arg-type]


# ---- what is written ------------------------------------------------------------------------------------------------


def test_what_was_logged_is_read_newest_first_with_the_last_feedback(place, logs) -> None:
    registry = place.create()
    log, rows = logs(registry), seen(5)
    log.add(rows[:2])
    log.add([*rows[2:], *seen(1, None)])
    for label in ("card_stolen", "card_broken"):
        log.say(log.find(rows[1].id), label, "banking")
    found = list(log.read())
    assert [one.id for one in found[1:]] == [one.id for one in reversed(rows)] and found[0].adapter is None
    digest = hashlib.sha256(b"where is my card").hexdigest()
    assert found[1] == Observation(rows[4].id, BANKING, 0.5, 0.1, "accepted", "card_lost", 12.5, "where is my card", digest)
    said = found[4].feedback
    assert said is not None and (said.correct_label, said.correct_adapter) == ("card_broken", "banking") and found[3].feedback is None
    assert found[4].to_json()["feedback"] == {"correct_label": "card_broken", "correct_adapter": "banking", "at": said.at}
    assert list(logs(place.open()).read()) == found


def test_traffic_counts_what_a_slow_reader_counts(place, logs) -> None:
    log = logs(place.create())
    assert log.traffic() == []
    log.add([*seen(4), *seen(2, AdapterRef("banking", 1)), *(replace(row, reason="below_threshold", score=-0.25) for row in seen(3, None))])
    log.add([replace(row, score=None, reason="named") for row in seen(2)])
    rows = list(log.read())
    found = {(one.day, one.adapter, one.reason): (one.answers, one.score) for one in log.traffic()}
    assert set(found) == {(row.at[:10], row.adapter, row.reason) for row in rows}
    for (day, adapter, reason), (answers, score) in found.items():
        own = [row.score for row in rows if (row.at[:10], row.adapter, row.reason) == (day, adapter, reason)]
        assert answers == len(own) and score == (None if own[0] is None else pytest.approx(sum(own) / len(own)))
    assert [one.day for one in log.traffic()] == sorted(one.day for one in log.traffic())


def test_rows_are_chosen_by_time_and_by_who_answered(place, logs, monkeypatch) -> None:
    monkeypatch.setattr("adapter_hub.registry.observations.PAGE_ROWS", 3)    # several pages
    log = logs(place.create())
    rows = [*seen(4), *seen(2, AdapterRef("banking", 4)), *seen(3, AdapterRef("travel", 1)), *seen(2, None)]
    log.add(rows)
    ids = [one.id for one in reversed(rows)]
    assert [one.id for one in log.read()] == ids
    assert [one.id for one in log.read(rows_max=4)] == ids[:4] and [one.id for one in log.read(rows_max=3)] == ids[:3]
    assert [one.id for one in log.read(name="banking")] == ids[5:] and [one.id for one in log.read(name="banking", version=3)] == ids[7:]
    assert [one.id for one in log.read(since=ids[4])] == ids[:5] and [one.id for one in log.read(before=ids[4])] == ids[5:]
    assert list(log.read(since=first_id("2999-01-01"))) == []
    assert [one.id for one in log.read(oldest_first=True)] == ids[::-1]
    assert [one.id for one in log.read(oldest_first=True, since=ids[8], before=ids[1], rows_max=5)] == ids[8:3:-1]


def test_a_log_that_changes_while_it_is_read_from_the_oldest_on_is_read_on(place, logs, monkeypatch) -> None:
    """No transaction is open meanwhile, and only a page is held: what comes is read, and what has gone is not."""
    monkeypatch.setattr("adapter_hub.registry.observations.PAGE_ROWS", 3)
    registry = place.create()
    log, other, rows = logs(registry), logs(place.open()), seen(8)
    log.add(rows)
    reading = log.read(oldest_first=True)
    assert [next(reading).id for _ in range(2)] == [row.id for row in rows[:2]]
    other.forget(before=rows[5].id)
    more = seen(1)
    other.add(more)
    other.flush()
    assert [row.id for row in reading] == [row.id for row in (rows[2], *rows[5:], *more)]


@pytest.mark.parametrize(("what", "text", "hashed"), [("decisions", False, False), ("hash", False, True), ("text", True, True)])
def test_of_a_text_only_what_the_policy_says_reaches_the_database(place, logs, what: str, text: bool, hashed: bool) -> None:
    log = logs(place.create(), what)
    [row] = seen(1, text="a secret of mine")
    log.add([row])
    found = log.find(row.id)
    assert found.text == ("a secret of mine" if text else None)
    assert found.sha256 == (hashlib.sha256(b"a secret of mine").hexdigest() if hashed else None)
    if place.url is None:
        stored = b"".join(path.read_bytes() for path in place.folder.glob("catalog.sqlite*"))
        assert (b"a secret of mine" in stored) is text


def test_texts_that_a_database_cannot_hold_are_mended_and_long_ones_cut(place, logs) -> None:
    log = logs(place.create())
    rows = [*seen(1, text="nul \0 and \ud800"), *seen(1, text="x" * (TEXT_CHARS_MAX + 1))]
    infinite = Observation(new_ids(1)[0], None, float("-inf"), float("nan"), "below_threshold", None, None, "y")
    log.add([*rows, infinite])
    last, long, odd = log.read()
    assert (last.score, last.margin) == (None, None) and odd.text == "nul \ufffd and ?"
    assert long.text == "x" * TEXT_CHARS_MAX and long.sha256 == hashlib.sha256(b"x" * (TEXT_CHARS_MAX + 1)).hexdigest()
    assert log.dropped == 0


def test_an_id_that_is_not_there_is_told(place, logs) -> None:
    log = logs(place.create())
    for id in ("nobody", "", "\0", new_ids(1)[0]):
        with pytest.raises(InvalidInput, match="there is no observation"):
            log.find(id)


# ---- how much is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows_max", "batch"), [(100, 7), (100, 100), (3, 10), (1, 1)])
def test_never_more_rows_are_kept_than_allowed_and_the_oldest_go_with_their_feedback(place, logs, rows_max: int, batch: int) -> None:
    log, added = logs(place.create(), rows_max=rows_max), []
    for turn in range(40):
        rows = seen(batch)
        log.add(rows)
        added += [one.id for one in rows]
        log.say(log.find(rows[-1].id), f"label {turn}", None)
        found = [one.id for one in log.read()]
        assert found == added[::-1][: len(found)] and min(len(added), 0.9 * rows_max) <= len(found) <= rows_max
    log.forget()
    [again] = seen(1)    # nothing of what had gone is joined to what comes
    log.add([again])
    assert [(one.id, one.feedback) for one in log.read()] == [(again.id, None)]


def test_two_processes_that_share_a_log_keep_about_as_many_as_one(place, logs) -> None:
    place.create()
    first, second = logs(place.open(), rows_max=200), logs(place.open(), rows_max=200)
    for _ in range(30):
        for log in (first, second):
            log.add(seen(20))
            log.flush()
    assert 180 <= len(list(first.read())) <= 220


def test_what_is_forgotten_leaves_the_files(sqlite_place, logs) -> None:
    registry = sqlite_place.create()
    log = logs(registry)
    old, new, other = seen(1, text="the oldest secret"), seen(1, text="the newest text"), seen(1, AdapterRef("travel", 1), "a trip to Rome")
    log.add([*old, *new, *other])
    log.say(log.find(old[0].id), "card_lost", None)
    assert log.forget(before=new[0].id) == 1
    stored = b"".join(path.read_bytes() for path in sqlite_place.folder.glob("catalog.sqlite*"))
    assert b"oldest secret" not in stored and b"newest text" in stored
    assert log.forget(name="travel") == 1 and [one.id for one in log.read()] == [new[0].id]
    assert log.forget() == 1 and log.forget() == 0 and list(log.read()) == []
    stored = b"".join(path.read_bytes() for path in sqlite_place.folder.glob("catalog.sqlite*"))
    assert not [secret for secret in (b"oldest secret", b"newest text", b"trip to Rome") if secret in stored]


def test_forgetting_on_each_catalogue_takes_the_feedback_along(place, logs) -> None:
    log, rows = logs(place.create()), seen(3)
    log.add(rows)
    observation = log.find(rows[0].id)
    log.say(observation, "card_lost", None)
    assert log.forget(name="banking", version=4) == 0 and log.forget(name="banking", version=3) == 3
    with pytest.raises(InvalidInput, match="any more"):
        log.say(observation, "card_lost", None)
    log.add(rows[:1])
    assert log.find(rows[0].id).feedback is None


# ---- it neither waits nor fails -------------------------------------------------------------------------------------


def test_threads_lose_nothing_and_those_who_read_see_whole_rows(place, logs) -> None:
    log = logs(place.create())

    def add(_: int) -> list[str]:
        rows = [seen(7) for _ in range(20)]
        for each in rows:
            log.add(each)
        assert all(one.text == "where is my card" for one in log.read(rows_max=50))
        return [one.id for one in itertools.chain(*rows)]

    with ThreadPoolExecutor(6) as pool:
        ids = sorted(itertools.chain(*pool.map(add, range(6))))
    assert sorted(one.id for one in log.read()) == ids and len(ids) == 840 and log.dropped == 0


def test_what_is_queued_is_written_by_itself(place, logs) -> None:
    registry = place.create()
    log, other = logs(registry), logs(place.open())
    log.add(seen(2))
    worker = log._worker
    assert worker is not None
    worker.join(60)    # it writes, and ends when nothing comes
    assert not worker.is_alive() and len(list(other.read())) == 2


def test_while_another_process_writes_nobody_waits_to_log_or_to_read(sqlite_place, logs, facts, files) -> None:
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    log = logs(registry)
    other = sqlite3.connect(sqlite_place.folder / "catalog.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    rows = seen(1_500)
    log.add(rows)    # more than a batch: the thread is at it already
    assert registry.names() == ["banking"]    # or the log's thread would keep this waiting, for a minute
    other.execute("ROLLBACK")
    other.close()
    assert len(list(log.read())) == 1_500 and log.dropped == 0


def test_what_does_not_fit_into_the_queue_is_dropped_counted_and_told_once(place, logs, caplog) -> None:
    log = logs(place.create())
    with caplog.at_level(logging.WARNING):
        log.add(seen(QUEUE_ROWS_MAX + 10))
    assert log.dropped == 10 and [record.message for record in caplog.records] == [
        "10 observations were lost: they came faster than they are written. Answers go on; further losses are counted and told at the end."
    ]
    log.flush()
    caplog.clear()
    log.close()
    assert [record.message for record in caplog.records] == ["10 observations were lost in all."]
    log.add(seen(1))
    assert log.dropped == 11


@pytest.mark.parametrize("damage", ["table", "file", "removed"])
def test_a_database_that_cannot_be_written_is_told_once_and_fails_nobody_who_logs(sqlite_place, logs, caplog, damage: str) -> None:
    log = logs(sqlite_place.create())
    catalogue = sqlite_place.folder / "catalog.sqlite"
    if damage == "table":
        sqlite_place.run("DROP TABLE hub_observations")
    elif damage == "file":
        for path in sqlite_place.folder.glob("catalog.sqlite-*"):
            path.unlink()
        with catalogue.open("r+b") as file:
            file.write(b"\xff" * 4096)
    else:
        catalogue.unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            log.add(seen(3))
            with pytest.raises(RegistryError):
                log.flush()
    assert log.dropped == 6 and sum("3 observations were lost" in record.message for record in caplog.records) == 1
    assert catalogue.exists() is (damage != "removed")


def test_a_process_that_ends_without_closing_has_written_what_it_logged(sqlite_place, logs) -> None:
    registry = sqlite_place.create()
    code = f"""
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.observations import Observation, new_ids
log = Registry.open({str(sqlite_place.folder)!r}).observation_log()
log.add([Observation(id, None, None, None, "named", None, None) for id in new_ids(30)])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)    # it closes nothing
    assert len(list(logs(registry).read())) == 30


def test_a_child_of_fork_writes_its_own_rows_and_not_its_parents(place, logs) -> None:
    log = logs(place.create())
    mine, childs = seen(5), seen(4)
    log.add(mine)
    child = os.fork()
    if child == 0:
        try:
            log.add(childs)
            log.flush()
        finally:
            os._exit(int(log.dropped > 0))
    assert os.waitpid(child, 0)[1] == 0
    assert {one.id for one in log.read()} == {one.id for one in (*mine, *childs)} and log.dropped == 0


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_a_catalogue_without_these_tables_gets_them_when_it_is_opened(place, logs, facts, files) -> None:
    place.create().add("banking", facts, files())
    place.close()
    for statement in ("DROP TABLE hub_observations", "DROP TABLE hub_feedback", "UPDATE hub_schema SET version = 2"):
        place.run(statement)
    registry = place.open()
    log = logs(registry)
    log.add(seen(1))
    assert len(list(log.read())) == 1 and registry.names() == ["banking"] and registry.verify().ok


def test_a_log_of_the_schema_before_keeps_its_rows_and_learns_of_candidates(place, logs, facts, files) -> None:
    log = logs(place.create())
    log.add(seen(2))
    log.close()
    place.close()
    for statement in ("ALTER TABLE hub_observations DROP COLUMN candidate", "DROP INDEX ix_hub_feedback_at", "DROP TABLE hub_notes"):
        place.run(statement)
    place.run("UPDATE hub_schema SET version = 3")
    log = logs(place.open())
    log.add([replace(one, candidate="travel") for one in seen(1)])
    assert [one.candidate for one in log.read()] == ["travel", None, None]


def test_what_was_corrected_is_read_in_the_order_it_was_said_and_from_a_moment_on(place, logs) -> None:
    log = logs(place.create())
    rows = seen(5)
    log.add(rows)
    log.flush()
    for row in reversed(rows[:4]):
        log.say(row, "card_lost", None)
    said = list(log.corrected())
    assert {one.id for one in said} == {row.id for row in rows[:4]}
    order = [(one.feedback.at, one.id) for one in said]
    assert order == sorted(order) and list(log.corrected(order[1])) == said[2:] and not list(log.corrected(order[-1]))


class Slow(datetime):
    """A host's clock that is an hour late, and runs back."""

    seconds = 3_600.0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Slow:    # type: ignore[override]
        cls.seconds += 60
        return cls.fromtimestamp(time.time() - cls.seconds, tz)


def test_feedback_is_read_in_the_order_it_was_said_whatever_a_hosts_clock_says(place, logs, monkeypatch) -> None:
    """Previously what a host said whose clock was late lay behind what others had read already."""
    place.create()
    log, late = logs(place.open()), logs(place.open())
    rows = seen(40)[::-1]    # later ones of one millisecond have the lesser id
    log.add(rows)
    log.flush()
    cursor, order = ("", ""), []
    for number, row in enumerate(rows):
        with monkeypatch.context() as patch:
            if number % 2:
                patch.setattr("adapter_hub.registry.observations.datetime", Slow)
                patch.setattr("adapter_hub.registry.catalog.datetime", Slow)
            said = (late if number % 2 else log).say(row, "card_lost", None).feedback
        [found] = log.corrected(cursor)
        assert found.id == row.id and found.feedback == said
        cursor = (found.feedback.at, found.id)
        order.append(found.feedback.at)
    assert order == sorted(set(order)) and len({len(at) for at in order}) == 1 and order[0].endswith("+00:00")
    again = log.say(rows[0], "card_stolen", None)
    assert [one.id for one in log.corrected(cursor)] == [again.id]    # the last word is new
    if place.url is not None:
        assert abs(datetime.fromisoformat(order[-1]).timestamp() - time.time()) < 60    # not the late host's: the server is on this machine


def test_notes_are_kept_by_kind_and_key_and_are_seen_by_the_next_process(place) -> None:
    notes = place.create().notes
    notes.write("proposal", {"b": {"size": 2}, "a": [1, "ü"]})
    notes.write("drift", {"a": 1})
    notes.write("proposal", {"b": None, "c": {}})
    place.close()
    notes = place.open().notes
    assert list(notes.read("proposal").items()) == [("a", [1, "ü"]), ("c", {})] and notes.read("drift") == {"a": 1}
    notes.forget("drift")
    assert not notes.read("drift") and notes.read("proposal")
    notes.forget()
    assert not notes.read("proposal")


def test_a_registry_that_may_only_be_read_shows_its_log_and_takes_no_feedback(sqlite_place, logs) -> None:
    writer = logs(sqlite_place.create())
    [row] = seen(1)
    writer.add([row])
    writer.flush()
    with Registry._open_read_only(sqlite_place.open().layout, sqlite_place.open().config) as registry:
        log = logs(registry)
        assert not log.writable and [one.id for one in log.read()] == [row.id]
        with pytest.raises(RegistryError, match="not writable"):
            log.say(row, "card_lost", None)
        with pytest.raises(RegistryError, match="not writable"):
            log.forget()
