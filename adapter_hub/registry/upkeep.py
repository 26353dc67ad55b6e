"""What keeps a registry folder tidy: unfinished work of dead processes goes."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_hub.registry.artifacts import HELD, is_held, locked, storage_errors
from adapter_hub.registry.layout import Layout

JSON = Any
AGE_MAX_S = 7 * 24 * 3600.0        # older staging is abandoned even where a process seems to hold it
TEMPORARY_AGE_MAX_S = 3600.0       # a temporary file lives for milliseconds


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` removed."""

    removed: tuple[str, ...]    # entries of the staging folder
    bytes: int
    in_progress: int            # entries of living processes, left alone

    def to_json(self) -> dict[str, JSON]:
        return {"removed": list(self.removed), "bytes": self.bytes, "in_progress": self.in_progress}


def collect_garbage(layout: Layout, age_max_s: float) -> GcReport:
    """Remove staging that no living process holds, or that is older than `age_max_s`. Never a version folder."""
    removed, freed, in_progress = [], 0, 0
    with storage_errors(layout.staging), locked(layout.lock("staging")):
        for entry in sorted(os.scandir(layout.staging), key=lambda entry: entry.name):
            path = Path(entry.path)
            if path.suffix == HELD and not is_held(path):
                path.unlink(missing_ok=True)
            if path.suffix in (".lock", HELD):
                continue
            try:
                age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue    # its owner has just finished
            folder = entry.is_dir(follow_symlinks=False)
            if age_s < age_max_s and (is_held(path.with_suffix(HELD)) if folder else age_s < TEMPORARY_AGE_MAX_S):
                in_progress += 1
                continue
            freed += _bytes(path)
            if folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(entry.name)
    return GcReport(tuple(removed), freed, in_progress)


def _bytes(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    stats = [file.lstat() for file in files if os.path.lexists(file)]
    return sum(found.st_size for found in stats if found.st_nlink == 1)    # what is linked elsewhere frees nothing
