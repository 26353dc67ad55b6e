"""What disks, people and permissions do to a registry: it is found, named, and nothing stored is lost by it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from adapter_hub.errors import CorruptVersion, NotRoutable, ReadOnlyRegistry, RegistryError, StorageFull
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.registry import Registry, Standing

NOBODY = 65534
NOT_ALLOWED = 77    # exit code of a child that may not do what the test needs


def in_child(act: Callable[[], None]) -> None:
    """Run `act` in a forked child, and fail with its traceback if it fails."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            os.write(write_end, traceback.format_exc().encode()[-4_000:])
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == NOT_ALLOWED:
        pytest.skip("this user may not mount")
    assert status == 0, text


# ---- bits and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "routing.safetensors", "README.md", "manifest.json"])
def test_a_flipped_bit_is_found_by_verify_and_when_the_version_is_opened(place, facts, files, file):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    registry.add("travel", facts, files("2"))
    registry.open_version("banking")
    path = place.folder / "adapters/banking/1" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = registry.verify()
    assert [problem.where for problem in report.problems] == ["banking@1"] and file in report.problems[0].fact
    with pytest.raises(CorruptVersion, match=file):
        registry.open_version("banking")
    if file != "manifest.json":
        with pytest.raises(CorruptVersion, match=f"{file} has sha256 .* its manifest says"):
            registry.read("banking", file)
    assert registry.open_version("travel") and registry.verify("travel").ok and not registry.verify("banking").ok


def test_a_manifest_that_was_rewritten_with_a_digest_of_its_own_is_found(place, facts, files):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    manifest = registry.manifest(ref)
    forged = dataclasses.replace(manifest, labels=("yes", "no")).sealed()
    (registry.folder(ref) / "manifest.json").write_bytes(forged.to_bytes())
    with pytest.raises(CorruptVersion, match="not the manifest that was registered"):
        registry.open_version(ref)
    assert not registry.verify().ok


def test_a_version_is_hashed_once_while_its_files_stay_the_same(place, facts, files):
    registry = place.create()
    ref = registry.add("banking", facts, files() | {"adapter_model.safetensors": bytes(1_000_000)})
    path = registry.open_version(ref) / "adapter_model.safetensors"
    before = bytes_read()
    registry.open_version(ref)
    assert bytes_read() - before < path.stat().st_size


def bytes_read() -> int:
    """What this process has read so far, from whatever file."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_file_that_was_changed_in_place_is_noticed_though_its_times_were_set_back(place, facts, files):
    registry = place.create()
    path = registry.open_version(registry.add("banking", facts, files())) / "adapter_model.safetensors"
    times = path.stat()
    path.write_bytes(b"x" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptVersion, match=r"adapter_model\.safetensors has sha256"):
        registry.open_version("banking@1")


def test_a_version_folder_that_is_a_link_is_refused(place, facts, files, tmp_path):
    registry = place.create()
    registry.add("banking", facts, files())
    folder = place.folder / "adapters/banking/1"
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    one_file, export = partial(registry.read, file="README.md"), partial(registry.export, folder=tmp_path / "out")
    for read in (registry.folder, registry.open_version, one_file, export):
        with pytest.raises(CorruptVersion, match="is a symbolic link"):
            read("banking@1")
    assert "is a symbolic link" in registry.verify().problems[0].fact
    with pytest.raises(CorruptVersion, match="is a symbolic link"):
        registry.purge("banking@1")
    assert len(list((tmp_path / "outside").iterdir())) == 5    # nothing was erased through the link


@pytest.mark.parametrize("linked", ["adapters/banking/1/adapter_model.safetensors", "adapters/banking", "adapters"])
def test_no_link_on_the_way_to_a_file_is_followed(place, facts, files, tmp_path, linked):
    registry = place.create()
    registry.add("banking", facts, files())
    shutil.move(place.folder / linked, tmp_path / "outside")
    (place.folder / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptVersion, match="is a symbolic link"):
        registry.open_version("banking")
    if linked != "adapters/banking/1/adapter_model.safetensors":
        with pytest.raises(CorruptVersion, match="is a symbolic link"):
            registry.add("banking", facts, files())
    assert not registry.verify().ok


def test_a_missing_file_a_missing_folder_and_a_foreign_file_are_reported(place, facts, files):
    registry = place.create()
    for name in ("file", "folder", "foreign", "fine"):
        registry.add(name, facts, files())
    (place.folder / "adapters/file/1/adapter_config.json").unlink()
    shutil.rmtree(place.folder / "adapters/folder/1")
    (place.folder / "adapters/foreign/1/adapter_model.bin").write_bytes(b"pickle")
    found = {problem.where: problem.fact for problem in registry.verify().problems}
    assert set(found) == {"file@1", "folder@1", "foreign@1"}
    assert "is missing" in found["file@1"] and "is missing" in found["folder@1"] and "adapter_model.bin is not a file" in found["foreign@1"]


def test_a_history_that_lost_or_gained_a_line_is_reported(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files())
    history = place.folder / "adapters/banking/history.jsonl"
    whole = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(whole[0])
    assert ["event 2 (moved, version 1) is missing" in problem.fact for problem in registry.verify().problems] == [True]
    history.write_bytes(b"".join(whole) + whole[1].replace(b'"version": 1', b'"version": 2'))
    assert ["is not in the catalogue" in problem.fact for problem in registry.verify().problems] == [True]


def test_a_damaged_calibration_is_found(place, facts, files):
    registry = place.create()
    registry.add_calibration(b"metric", [], "why")
    (place.folder / "calibrations/1.safetensors").write_bytes(b"metriC")
    with pytest.raises(CorruptVersion):
        registry.calibration(1)
    assert [problem.where for problem in registry.verify().problems] == ["calibration 1"]


def test_a_damaged_catalogue_says_that_it_can_be_deleted(sqlite_place, facts, files):
    sqlite_place.create().add("banking", facts, files())
    sqlite_place.close()
    (sqlite_place.folder / "catalog.sqlite").write_bytes(b"not a database" * 1_000)
    with pytest.raises(RegistryError, match=r"is damaged\. Delete it"):
        sqlite_place.open()
    sqlite_place.forget()
    assert sqlite_place.open().resolve("banking") == AdapterRef("banking", 1)


# ---- full disks -----------------------------------------------------------------------------------------------------


def everything(registry: Registry) -> tuple[object, ...]:
    return registry.versions(), registry.events(), registry.production(), registry.latest_calibration()


@pytest.mark.parametrize("limit_bytes", [0, 100, 2_500, 200_000])
def test_a_file_size_limit_is_a_full_disk_and_changes_nothing(place, facts, files, tree, limit_bytes):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    registry.add("banking", facts, files("2"))
    before, stored = everything(registry), tree(place.folder)

    def add_much() -> None:
        registry.names()    # a fork closes the connection to SQLite, and opening it takes 32 KiB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        for name in ("banking", "newcomer"):
            with pytest.raises(StorageFull, match="no space left"):
                registry.add(name, facts, files("x") | {"adapter_model.safetensors": b"w" * 1_000_000})
        with pytest.raises(StorageFull):
            registry.add_calibration(b"w" * 1_000_000, [], "too much")
        assert registry.read("banking", "README.md")

    in_child(add_much)
    assert everything(registry) == before and tree(place.folder) == stored and registry.verify().ok


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=False)


def leave_no_room(folder: Path) -> None:
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


def test_a_full_disk_changes_nothing_and_space_makes_it_work_again(small_disk, facts, files):
    """Whichever write fails first, of files, catalogue or history: what was stored stays, and staging is cleaned."""
    reserve, place = small_disk / "reserve", small_disk / "registry"
    reserve.write_bytes(bytes(2_000_000))
    registry = Registry.create(place, config=RegistryConfig(base_model="tiny", encoder="hash", max_tokens=64))
    refused, word = 0, 0
    while refused < 5:
        before, word = everything(registry), word + 1
        try:
            registry.add("banking", facts, files(str(word)) | {"exemplars.jsonl": b"x" * (word % 7) * 2_000})
        except StorageFull:
            refused += 1
            assert everything(registry) == before
            assert [path for path in (place / ".staging").iterdir() if path.suffix != ".lock"] == []
    assert registry.verify().problems == () and registry.verify().unregistered == ()
    registry.close()
    with Registry.open(place) as still_full:
        assert everything(still_full) == before and still_full.read("banking", "README.md")
    # The line of a committed act may still wait for room, and the catalogue alone knows of it then. With some it is written at the next open.
    os.truncate(reserve, 1_900_000)
    with Registry.open(place) as some_room:
        assert everything(some_room) == before
    for lost in ([], place.glob("catalog.sqlite*")):    # the catalogue cannot be written, then not be made anew
        for path in lost:
            path.unlink()
        leave_no_room(small_disk)
        with Registry.open(place) as still_full:
            assert everything(still_full) == before and still_full.read("banking", "README.md")
    (place / ".staging" / "left").mkdir()
    with Registry.open(place) as still_full:
        assert not still_full.writable and still_full.gc().removed == ("left",)
    (small_disk / "filler").unlink()
    reserve.unlink()
    with Registry.open(place) as registry:
        assert everything(registry) == before
        assert registry.add("banking", facts, files("more")) and registry.verify().problems == ()
        after = everything(registry)
    (place / "catalog.sqlite").unlink()
    with Registry.open(place) as registry:
        assert everything(registry) == after


# ---- read-only ------------------------------------------------------------------------------------------------------


def writes(registry: Registry, facts, files) -> list[Callable[[], object]]:
    return [
        lambda: registry.add("banking", facts, files("new")),
        lambda: registry.promote("banking@1"),
        lambda: registry.rollback("banking"),
        lambda: registry.retire("banking@1"),
        lambda: registry.purge("banking@1"),
        lambda: registry.set_alias("banking", "x", 1),
        lambda: registry.add_calibration(b"x", [], ""),
        registry.gc,
        registry.adopt,
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("catalogue", ["closed", "in use", "absent"])
def test_another_users_registry_can_be_read_and_not_written(sqlite_place, facts, files, tree, catalogue):
    owner = sqlite_place.create()
    owner.add("banking", facts, files("1"))
    owner.add("banking", facts, files("2"))
    owner.add_calibration(b"metric", [], "why")
    before = everything(owner)
    if catalogue == "absent":
        sqlite_place.forget()
    elif catalogue == "closed":
        sqlite_place.close()
    open_to_all(sqlite_place.folder)
    stored = tree(sqlite_place.folder)

    def read_as_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        registry = sqlite_place.open()
        assert everything(registry) == before
        assert registry.read("banking", "routing.safetensors") == files("2")["routing.safetensors"]
        assert registry.open_version("banking") and registry.verify().ok and registry.calibration(1) == b"metric"
        for write in writes(registry, facts, files):
            with pytest.raises(ReadOnlyRegistry):
                write()

    in_child(read_as_nobody)
    assert tree(sqlite_place.folder) == stored


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_reader_without_a_catalogue_follows_what_the_owner_writes(sqlite_place, facts, files):
    owner = sqlite_place.create()
    owner.add("banking", facts, files("1"))
    owner.close()
    sqlite_place.folder.joinpath("catalog.sqlite").unlink()
    open_to_all(sqlite_place.folder)
    to_child, to_parent = os.pipe(), os.pipe()

    def read_as_nobody() -> None:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        reader = sqlite_place.open()
        assert reader.last_event() == 2
        os.write(to_parent[1], b"read")
        os.read(to_child[0], 1)
        for read in (lambda: reader.resolve("banking"), lambda: reader.production()[0], lambda: reader.snapshot().production[0]):
            assert read() == AdapterRef("banking", 2)
        os.write(to_parent[1], b"read")
        os.read(to_child[0], 1)
        with pytest.raises(NotRoutable, match="banking@1 was purged"):    # the first thing it asks after the purge
            reader.open_version("banking@1")
        assert reader.verify().ok and reader.snapshot() == Standing(event=5, production=(AdapterRef("banking", 2),), calibration=None)

    child = os.fork()
    if child == 0:
        status = 1
        try:
            read_as_nobody()
            status = 0
        finally:
            os._exit(status)
    os.read(to_parent[0], 4)
    sqlite_place.open().add("banking", facts, files("2"))
    os.write(to_child[1], b"x")
    os.read(to_parent[0], 4)
    sqlite_place.open().purge("banking@1")
    os.write(to_child[1], b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_read_only_mount_can_be_read_and_not_written(place, facts, files):
    place.create().add("banking", facts, files("1"))
    before = everything(place.opened[0])
    place.close()

    def read_mounted() -> None:
        # A mount of this child alone: the same folder, writable for everybody else.
        libc = ctypes.CDLL(None, use_errno=True)
        folder, flags = os.fsencode(place.folder), 4096 | 32 | 1    # MS_BIND, MS_REMOUNT, MS_RDONLY
        if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 16384 | 1 << 18, None):    # CLONE_NEWNS; MS_REC, MS_PRIVATE
            os._exit(NOT_ALLOWED)
        if libc.mount(folder, folder, None, 4096, None) or libc.mount(folder, folder, None, flags, None):
            os._exit(NOT_ALLOWED)
        registry = place.open()
        assert everything(registry) == before and registry.open_version("banking") and registry.verify().ok
        for write in writes(registry, facts, files):
            with pytest.raises(ReadOnlyRegistry):
                write()

    in_child(read_mounted)


def open_to_all(folder: Path) -> None:
    """Readable for everybody, up to the root: pytest's own folders are not."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)


