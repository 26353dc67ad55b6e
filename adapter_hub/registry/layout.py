"""Every path of a registry folder, and nothing else. Names are checked before they become paths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapter_hub.errors import InvalidInput
from adapter_hub.refs import check_name

MANIFEST = "manifest.json"
CARD = "README.md"
HISTORY = "history.jsonl"
PEFT_CONFIG = "adapter_config.json"
EXEMPLARS_FILE = "exemplars.jsonl"      # texts that were given to the router; where the policy keeps them
EVALUATION_FILE = "evaluation.jsonl"
NEGATIVES_FILE = "negatives.jsonl"
GATE_FILE = "gate.json"                # why a version that was learned was promoted, held or rejected
DATA_FILES = ("adapter_model.safetensors", "routing.safetensors")    # what a version learned: its weights, its exemplars' vectors
IGNORED = ("catalog.sqlite", "catalog.sqlite-*", ".catalogue", "index/", ".staging/")    # derived, or of this machine

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_NUMBER = re.compile(r"[1-9][0-9]{0,7}", re.ASCII)
NUMBER_MAX = 99_999_999    # a folder with a higher number is not a version


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie under `root`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "hub.toml"

    @property
    def ignore(self) -> Path:
        return self.root / ".gitignore"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.sqlite"

    @property
    def claim(self) -> Path:
        """Says which catalogue is the one of this folder: its id, then where it is."""
        return self.root / ".catalogue"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def calibrations(self) -> Path:
        return self.root / "calibrations"

    @property
    def index(self) -> Path:
        """Derived, and made again when absent."""
        return self.root / "index"

    @property
    def staging(self) -> Path:
        return self.root / ".staging"

    def lock(self, purpose: str) -> Path:
        return self.staging / f"{purpose}.lock"

    def held(self, name: str, version: int) -> Path:
        """Locked by the process that is just registering this version."""
        return self.staging / f"{check_name(name)}@{int(version)}.held"

    def name(self, name: str) -> Path:
        return self.adapters / check_name(name)

    def version(self, name: str, version: int) -> Path:
        return self.name(name) / str(int(version))

    def history(self, name: str | None) -> Path:
        """The history of a name; of the calibrations for None."""
        return (self.calibrations if name is None else self.name(name)) / HISTORY

    def calibration(self, number: int) -> Path:
        return self.calibrations / f"{int(number)}.safetensors"


def check_file_name(name: object) -> str:
    """Return `name` if it may be a file of a version: a plain name, no folder. Raises InvalidInput."""
    if not isinstance(name, str) or not _FILE.fullmatch(name) or name == MANIFEST:
        raise InvalidInput(f"{name!r} cannot be a file of a version.", hint="Use a plain name of letters, digits, '.', '_' and '-'.")
    return name


def as_number(text: str) -> int | None:
    """The version that a folder name says, or None."""
    return int(text) if _NUMBER.fullmatch(text) else None
