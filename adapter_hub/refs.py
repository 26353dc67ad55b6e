"""How a version is named: `name` (its production alias), `name@3`, `name@alias`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapter_hub.errors import InvalidName

PRODUCTION = "production"
NAME_CHARS_MAX = 96

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
# Windows opens a device instead of a file for these, whatever the extension.
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))})


def check_name(name: object) -> str:
    """Return `name` if it is safe as a folder on every file system; raises InvalidName with the reason."""
    if not isinstance(name, str):
        raise InvalidName(name, f"it is {type(name).__name__}, not text")
    if not name:
        raise InvalidName(name, "it is empty")
    if len(name) > NAME_CHARS_MAX:
        raise InvalidName(name, f"it has {len(name)} characters")
    if not _NAME.fullmatch(name):
        wrong = next((c for c in name if not re.fullmatch(r"[a-z0-9._-]", c, re.ASCII)), name[0])
        raise InvalidName(name, f"{wrong!r} (U+{ord(wrong):04X}) is not allowed there")
    if name.split(".")[0] in _DEVICES:
        raise InvalidName(name, "it is a reserved device name")
    if name.endswith("."):
        raise InvalidName(name, "it ends with a dot")
    return name


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """One version of an adapter, or an alias that resolves to one. `str(ref)` of a resolved one is `name@3`."""

    name: str
    version: int | None = None    # 1, 2, …; None until resolved
    alias: str | None = None      # set when the ref names an alias; None on a resolved ref

    @classmethod
    def parse(cls, text: str | AdapterRef) -> AdapterRef:
        """`name`, `name@3` or `name@alias`. Raises InvalidName."""
        if isinstance(text, AdapterRef):
            return text
        if not isinstance(text, str):
            raise InvalidName(text, f"it is {type(text).__name__}, not text")
        name, at, tail = text.partition("@")
        check_name(name)
        if not at:
            return cls(name, alias=PRODUCTION)
        if _VERSION.fullmatch(tail):
            return cls(name, version=int(tail))
        return cls(name, alias=check_alias(tail))

    def __str__(self) -> str:
        return f"{self.name}@{self.alias if self.version is None else self.version}"


def check_alias(alias: str) -> str:
    """An alias is a name that cannot be read as a version number. Raises InvalidName."""
    check_name(alias)
    if alias.isdigit():
        raise InvalidName(alias, "an alias cannot be a number, that is a version")
    return alias
