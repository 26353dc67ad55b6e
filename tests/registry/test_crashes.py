"""Processes and threads that write at once, processes that die while they write, processes that are forked."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_hub.refs import AdapterRef
from adapter_hub.registry import records
from adapter_hub.registry.artifacts import held, is_held, staging_folder
from adapter_hub.registry.registration import _calibration_committed, _was_committed
from adapter_hub.registry.schema import VersionState

ROOT = Path(__file__).parents[2]
SERVER = os.environ.get("ADAPTER_HUB_TEST_POSTGRES", "")
soak = [pytest.mark.soak, pytest.mark.skipif("ADAPTER_HUB_SOAK" not in os.environ, reason="only under `make soak`")]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "postgresql" and not SERVER:
        pytest.skip("ADAPTER_HUB_TEST_POSTGRES names no PostgreSQL server")
    return ["--database", SERVER] if request.param == "postgresql" else []


def run(script: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", f"tests.soak.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)    # shown by pytest -s, and where something fails
    return result


@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=soak)])
def test_a_killed_registration_is_there_wholly_or_not_at_all(database, kills):
    result = run("registry_kill", "--kills", str(kills), *database)
    assert result["faults"] == [] and result["registrations_killed"] == kills


@pytest.mark.parametrize(("processes", "each"), [(4, 10), pytest.param(8, 50, marks=soak)])
def test_processes_that_register_under_one_name_get_each_number_once(database, processes, each):
    assert run("registry_race", "--processes", str(processes), "--each", str(each), *database)["faults"] == []


def test_threads_share_one_registry(place, facts, files):
    registry = place.create()
    with ThreadPoolExecutor(4) as pool:
        refs = list(pool.map(lambda word: registry.add("banking", facts, files(str(word % 5))), range(20)))
        read = list(pool.map(lambda ref: registry.read(ref, "routing.safetensors"), refs))
    assert sorted(ref.version for ref in refs) == list(range(1, 21))
    assert read == [files(str(word % 5))["routing.safetensors"] for word in range(20)]
    assert registry.verify().ok


def test_processes_that_open_at_once_rebuild_one_catalogue(place, facts, files):
    registry = place.create()
    for word in range(5):
        registry.add("banking", facts, files(str(word)))
    place.forget()
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if place.open().resolve("banking").version == 5 else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    registry = place.open()
    assert len(registry.events()) == 10 and registry.verify().ok


def test_parent_and_child_both_go_on_after_a_fork(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files("before"))
    stop = threading.Event()

    def write_all_the_time() -> None:
        while not stop.is_set():
            registry.add("travel", facts, files("thread"))

    writer = threading.Thread(target=write_all_the_time)
    writer.start()
    children = []
    for number in range(4):
        time.sleep(0.03)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                registry.add("banking", facts, files(str(number)))
                status = 0 if registry.verify(AdapterRef("banking", 1)).ok else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    stop.set()
    writer.join()
    assert [row.ref.version for row in registry.versions("banking")] == [1, 2, 3, 4, 5]
    assert registry.verify().problems == ()


def test_who_follows_the_events_misses_none(place, facts, files):
    registry, follower = place.create(), place.open()
    seen: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while not done.is_set() or seen[-1] < registry.last_event():
            seen.extend(event.seq for event in follower.events(after=seen[-1] if seen else 0))

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda word: registry.add(f"name{word % 4}", facts, files(str(word))), range(16)))
    done.set()
    reader.join()
    assert seen == list(range(1, 33))


def test_a_snapshot_is_of_one_moment(place, facts, files):
    """Event, production and calibration belong together, however fast another writes."""
    registry, reader = place.create(), place.open()
    ref = registry.add("banking", facts, files())
    done = threading.Event()

    def write() -> None:
        for word in range(8):
            registry.add("banking", facts, files(str(word)))
            registry.add_calibration(b"metric", [ref], "why")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(reader.snapshot())
    writer.join()
    events = registry.events()
    for standing in seen:
        past = events[: standing.event]
        version = next(event.version for event in reversed(past) if event.alias == "production")
        number = max((event.version for event in past if event.name is None), default=None)
        assert (standing.production, standing.calibration) == ((AdapterRef("banking", version),), number)


def test_whether_a_broken_commit_took_effect_is_known_only_when_the_server_is_done_with_it(place, facts, files):
    registry, server = place.create(), place.open()
    ref = registry.add("banking", facts, files())
    manifest = dataclasses.replace(registry.manifest(ref), version=2).sealed()
    at_work = threading.Event()

    def commit_slowly() -> None:
        with server._catalog.writing() as connection:
            records.store(connection, manifest, VersionState.LIVE)
            records.store_calibration(connection, records.reserve_calibration(connection, 0), "0" * 64)
            at_work.set()
            time.sleep(0.3)

    slow = threading.Thread(target=commit_slowly)
    slow.start()
    at_work.wait()
    assert _was_committed(registry._catalog, manifest) is True and _calibration_committed(registry._catalog, 1) is True
    slow.join()


def test_gc_leaves_the_work_of_living_processes_alone(sqlite_place, facts, files):
    registry = sqlite_place.create()
    staging = sqlite_place.folder / ".staging"
    with staging_folder(staging) as living:
        (living / "half").write_bytes(b"x")
        (staging / "dead").mkdir()
        (staging / "dead.held").touch()
        (staging / "dead/half").write_bytes(b"x" * 100)
        report = registry.gc()
        assert (report.removed, report.bytes >= 100, report.in_progress) == (("dead",), True, 1)
        assert (living / "half").exists()
        assert registry.gc(age_max_s=0).removed == (living.name,)    # older than the limit, whoever holds it
    registry.add("banking", facts, files())
    assert registry.gc().removed == () and registry.verify().ok
    assert {path.suffix for path in staging.iterdir()} == {".lock"}


def test_what_a_living_process_registers_is_hidden_from_all_who_ask_and_from_nobody_afterwards(sqlite_place, facts, files):
    sqlite_place.create().add("banking", facts, files())
    holder = sqlite_place.folder / ".staging/banking@2.held"
    with held(holder):
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: is_held(holder), range(200)))
    holder.touch()    # as a crash leaves it
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: is_held(holder), range(2_000)))


def test_a_registry_works_where_locks_are_as_strict_as_on_nfs(place, facts, files, monkeypatch):
    """NFS refuses an exclusive lock on what is not open for writing, so on any folder, and a shared one on what is not open for reading."""
    flock = fcntl.flock

    def strict(descriptor: int, operation: int) -> None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        refused = {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}.get(operation & ~fcntl.LOCK_NB)
        if mode == refused:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    registry = place.create()
    registry.add("banking", facts, files())
    registry.add_calibration(b"metric", [], "why")
    assert registry.verify().ok and registry.adopt().adopted == () and registry.gc().removed == ()
