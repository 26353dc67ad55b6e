"""Files that are written whole or not at all, hashed on write and on read, and never followed through a symbolic link.

Knows no catalogue: what a version is called and when it counts as registered is decided elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from adapter_hub.errors import CorruptVersion, RegistryError, storage_error

CHUNK_BYTES = 1 << 20
HELD = ".held"    # suffix of a lock file that says: its holder is at work on what it is named after
RESTORE = "Restore it from a copy (git, backup), or purge the version; see `adapter-hub verify`."


class Signature(NamedTuple):
    """What a file looked like when it was hashed. Whoever writes into a file can set its mtime back, but not its ctime."""

    path: str
    bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int


# ---- reading --------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, not followed through a link. Raises CorruptVersion, PermissionError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        raise
    except OSError as error:
        linked = error.errno in (errno.ELOOP, errno.EMLINK)
        reason = "is a symbolic link" if linked else "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise CorruptVersion(f"{path} {reason}.", hint=RESTORE) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptVersion(f"{path} is not a regular file.", hint=RESTORE)
    return descriptor


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises CorruptVersion where it is missing or a link."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def read_checked(path: Path, sha256: str) -> bytes:
    """The bytes of a file that has this digest. Raises CorruptVersion."""
    data = read_regular(path)
    _compare(path, sha256, hashlib.sha256(data).hexdigest())
    return data


def check_file(path: Path, sha256: str) -> Signature:
    """Hash a file against its digest. Raises CorruptVersion."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        seen = _signature(path, os.fstat(file.fileno()))
        _compare(path, sha256, hashlib.file_digest(file, "sha256").hexdigest())
    return seen


def _compare(path: Path, expected: str, found: str) -> None:
    if found != expected:
        raise CorruptVersion(f"{path} has sha256 {found[:12]}…, its manifest says {expected[:12]}….", hint=RESTORE)


def signature(path: Path) -> Signature:
    """What tells a file that was hashed before from one that was written since. Raises CorruptVersion."""
    try:
        found = path.lstat()
    except OSError as error:
        raise CorruptVersion(f"{path} is missing.", hint=RESTORE) from error
    if not stat.S_ISREG(found.st_mode):
        raise CorruptVersion(f"{path} is {'a symbolic link' if stat.S_ISLNK(found.st_mode) else 'not a regular file'}.", hint=RESTORE)
    return _signature(path, found)


def _signature(path: Path, found: os.stat_result) -> Signature:
    return Signature(str(path), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def check_folder(path: Path) -> None:
    """Raises CorruptVersion where `path` is missing, a link or no folder."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CorruptVersion(f"{path} is missing.", hint=RESTORE) from error
    if not stat.S_ISDIR(mode):
        raise CorruptVersion(f"{path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'not a folder'}.", hint=RESTORE)


# ---- writing --------------------------------------------------------------------------------------------------------


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each entry durable. Raises CorruptVersion where a link stands there."""
    if path.is_symlink():
        raise CorruptVersion(f"{path} is a symbolic link.", hint="Replace it by a folder: nothing is written outside the registry.")
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
    sync_folder(path.parent)


def write_file(path: Path, source: Path | bytes) -> str:
    """Write a new file, read it back, and return its sha256. Not yet durable: `sync_files` makes it so."""
    hasher = hashlib.sha256()
    with path.open("xb") as file:
        if isinstance(source, bytes):
            hasher.update(source)
            file.write(source)
        else:
            with source.open("rb") as original:
                while chunk := original.read(CHUNK_BYTES):
                    hasher.update(chunk)
                    file.write(chunk)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != hasher.digest():
            raise RegistryError(f"{path} reads back other bytes than were written.", hint="Check the disk; nothing stored was changed.")
    return hasher.hexdigest()


def sync_files(folder: Path) -> None:
    """Make the files of a folder, then the folder itself, durable."""
    for path in sorted(folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def write_atomic(path: Path, data: bytes, staging: Path, *, replace: bool = True) -> None:
    """Replace a file by `data`, or make a new one, durably: all of it or nothing. `staging` is on the same file system.

    Raises FileExistsError where there is one that must not be replaced.
    """
    temporary = staging / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def link_file(source: Path, sha256: str, target: Path) -> bool:
    """Hard-link a stored file to `target` if it still has its digest; False where it has not, or links do not work."""
    try:
        check_file(source, sha256)
        os.link(source, target, follow_symlinks=False)
        check_file(target, sha256)    # `source` may have been replaced in between
    except CorruptVersion:
        target.unlink(missing_ok=True)
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.ENOENT):
            return False
        raise
    return True


def hash_source(source: Path | bytes) -> str:
    """sha256 of what a caller wants stored. Raises OSError."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- locks and staging ----------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock between processes and threads. The system releases it when its holder dies.

    Raises BlockingIOError where another one holds it and `wait` is False.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    # Unlock before closing: a child that another thread forked meanwhile holds a copy of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file that nobody else takes: `gc` and `adopt` ask it whether what it stands for is work in progress.

    The system releases it when this process dies. It is a file opened for writing: NFS locks no folder, and nothing that is
    open for reading only.
    """
    with locked(path.parent / "staging.lock", shared=True):    # `gc` must not see it before it is locked
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _release(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds this lock file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)    # shared: two who ask at once do not take each other for the holder
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def staging_folder(staging: Path) -> Iterator[Path]:
    """A new folder to fill, held by `<folder>.held`; whatever is still there at the end is removed."""
    folder = staging / uuid.uuid4().hex
    with held(folder.with_suffix(HELD)):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def move_folder(source: Path, target: Path) -> bool:
    """Rename a folder into place, durably; False where something has that name already."""
    if os.path.lexists(target):
        return False
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    sync_folder(target.parent)
    return True


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError met while writing under `path` into the HubError that says what it means."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, error.filename or path) from error
