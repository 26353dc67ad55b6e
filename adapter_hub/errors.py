"""Every error this package raises on purpose. Each names the thing and the fact; `.hint` is the next step.

The edges map them: the CLI to exit code 2, a server to a status. Nothing here imports anything but the standard library.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


def counted(count: int, one: str, many: str = "") -> str:
    """"1 row", "2 rows": how messages count. `many` is `one` with an s where it is not given."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


class HubError(Exception):
    """Root of the tree. `str(error)` is the fact, then the hint."""

    def __init__(self, fact: str, *, hint: str = "") -> None:
        super().__init__(f"{fact} {hint}".strip())
        self.fact = fact
        self.hint = hint


# ---- names and lookups ------------------------------------------------------------------------------------------


class InvalidName(HubError):
    """A name that could leave the registry, or that some file system cannot hold."""

    def __init__(self, name: object, reason: str) -> None:
        shown = name if not isinstance(name, str) or len(name) <= 40 else name[:37] + "..."
        super().__init__(
            f"{shown!r} is not an adapter name: {reason}.",
            hint="Names are 1-96 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit.",
        )


class AdapterNotFound(HubError):
    """Nothing is registered under this reference. Never answered by the base model instead."""

    def __init__(self, ref: object, known: Iterable[str] = ()) -> None:
        closest = difflib.get_close_matches(str(ref), sorted(known), n=3, cutoff=0.5)
        names = f"Closest: {', '.join(map(repr, closest))}. " if closest else ""
        super().__init__(f"adapter '{ref}' is not registered.", hint=names + "See `adapter-hub list`.")
        self.closest = closest


class NotRoutable(HubError):
    """The version exists but may not answer: it is retired, purged, or has no production alias."""


# ---- adapters ---------------------------------------------------------------------------------------------------


class AdapterRejected(HubError):
    """The adapter was refused before anything was stored."""


class CorruptAdapter(AdapterRejected):
    """A file of the adapter cannot be read, is not safetensors, or does not match its recorded digest."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}.", hint="Export or copy the adapter again from where it was trained.")
        self.path = path


class UnsupportedOption(AdapterRejected):
    """`adapter_config.json` sets a PEFT option that this package does not execute."""

    def __init__(self, key: str, value: object, reason: str = "this option is not supported", *, hint: str = "Train without it.") -> None:
        super().__init__(f"adapter_config.json has {key}={value!r}: {reason}.", hint=hint)
        self.key = key


class WrongBase(AdapterRejected):
    """The adapter was made for another base model than the one this registry serves."""


class DoesNotFit(AdapterRejected):
    """A tensor has no target in the base, a target has no tensor, or a shape, rank or dtype differs."""


class NonFinite(AdapterRejected):
    """A tensor of the adapter holds NaN or infinity."""


class NoEffect(AdapterRejected):
    """On the probe batch the adapter leaves the base model's output unchanged: it was never trained."""


class LabelsRequired(AdapterRejected):
    """The adapter has a head and nobody named its outputs, or the count of names differs."""


# ---- the registry -----------------------------------------------------------------------------------------------


class RegistryError(HubError):
    """The registry as a whole cannot do what was asked. What is stored is unchanged."""


class RegistryNotFound(RegistryError):
    """There is no hub.toml at this path."""


class ProductionMoved(RegistryError):
    """Somebody has put another version into production meanwhile."""


class RegistryExists(RegistryError):
    """`create` was asked to write over a registry."""


class SchemaTooNew(RegistryError):
    """The catalogue was written by a newer adapter_hub."""


class ReadOnlyRegistry(RegistryError):
    """A write was asked of a registry that this process may only read."""


class StorageFull(RegistryError):
    """The disk, quota or file-size limit is exhausted."""


class CorruptVersion(RegistryError):
    """A stored file is missing or no longer has the digest in its manifest."""


class CorruptIndex(HubError):
    """A saved router, head or search index is missing, damaged or another's. Nothing is lost: it follows from the versions."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}.", hint="It is derived: delete it, and it is built again.")
        self.path = path


class DataRemains(RegistryError):
    """A purge was refused, because other versions hold the data that it would erase."""

    def __init__(self, ref: object, holders: Iterable[object]) -> None:
        self.holders = tuple(holders)
        shown = ", ".join(map(str, self.holders))
        super().__init__(
            f"what {ref} learned is also in {shown}: made from it, or with the same weights or routing state.",
            hint=f"Purge {'it' if len(self.holders) == 1 else 'them'} as well: descendants=True (`--descendants`).",
        )


class InvalidConfig(RegistryError):
    """hub.toml is not readable as TOML or holds a value out of range."""


# ---- models -----------------------------------------------------------------------------------------------------


class ModelNotFound(HubError):
    """No weights for this model id or folder: neither the folder, the hub cache nor a package has them."""


class ModelChanged(HubError):
    """The base model or encoder is not the one that the registry's contents were made with."""


# ---- input ------------------------------------------------------------------------------------------------------


class InvalidInput(HubError, ValueError):
    """An argument or a row is not usable: wrong type, empty text, out of range."""


class UnreadableFile(InvalidInput):
    """A whole input file cannot be read as the format its name says."""


class OutOfMemory(HubError):
    """One row alone needs more memory than the machine has; more rows are run in smaller batches."""


class QueueFull(HubError):
    """As many requests wait as the queue holds, and none of them was answered in time."""


def storage_error(error: OSError, path: Path | str) -> RegistryError:
    """The HubError for an OSError met while writing `path`: full disk, read-only, or what the system said."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"no space left to write {path}.", hint="Free space, or run `adapter-hub gc`; nothing stored was changed.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ReadOnlyRegistry(f"{path} is not writable by this process.", hint="Ask for write permission; nothing stored was changed.")
    return RegistryError(f"writing {path} failed: {error.strerror or error}.", hint="Nothing stored was changed.")
