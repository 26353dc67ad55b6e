"""Where a training keeps its epochs until it is done, so that one that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.tasks import Task
from adapter_hub.training.warm import Start

_IDENTITY = "training.json"             # in a folder of checkpoints: which training they are of
_STATE = "trainer_state.json"           # the last file of a checkpoint that the Trainer writes


@contextmanager
def checkpoints(
    folder: Path | None,
    base: FrozenBase,
    job: Task,
    config: TrainConfig,
    seed: int,
    rows: Sequence[Example],
    validation: Sequence[Example] | None,
    start: Start | None,
) -> Iterator[Path]:
    """Where checkpoints are kept: in `folder`, which is emptied when all is done, or in one that is gone afterwards whatever happens.

    Raises InvalidInput where `folder` is another training's.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="train-") as scratch:
            yield Path(scratch)
        return
    told = [[row.text, row.label, dict(row.extra)] for row in rows], [[row.text, row.label, dict(row.extra)] for row in validation or ()]
    begun = None if start is None else [start.labels, hashlib.sha256((start.folder / "adapter_model.safetensors").read_bytes()).hexdigest()]
    facts = [base.fingerprint, str(job.task_type), str(job), repr(config), seed, told, begun]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    folder = Path(folder)
    if not folder.is_dir() and folder.exists():
        raise InvalidInput(f"checkpoint_folder={str(folder)!r} is a file.", hint="Name a folder (`--checkpoints DIR`), which need not be there yet.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _IDENTITY
    if path.exists() and _read(path).get("training") != identity:
        raise InvalidInput(f"{str(folder)!r} holds checkpoints of another training.", hint="Name another folder, or remove it.")
    if not path.exists():
        if any(folder.iterdir()):
            raise InvalidInput(f"{str(folder)!r} is not empty, and holds no checkpoints.", hint="Name another folder.")
        part = folder.with_name(f"{folder.name}.part")    # a killed process leaves no half of it
        part.write_text(json.dumps({"training": identity}) + "\n")
        part.replace(path)
    try:
        yield folder
    except Exception:
        if not any(folder.glob("checkpoint-*")):    # refused before its first epoch: the folder is free for what is mended
            path.unlink()
        raise
    for one in folder.glob("checkpoint-*"):
        shutil.rmtree(one)
    path.unlink()


def begun(folder: Path) -> float:
    """When this training began, in seconds since 1970: in whichever process that was."""
    path = folder / _IDENTITY
    return path.stat().st_mtime if path.exists() else time.time()


def _read(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_checkpoint(folder: Path) -> str | None:
    """The latest that was written to its end; what a killed process left of others is removed."""
    whole = []
    for one in folder.glob("checkpoint-*"):
        if _read(one / _STATE):
            whole.append(one)
        else:
            shutil.rmtree(one)
    return str(max(whole, key=lambda one: int(one.name.rpartition("-")[2]))) if whole else None
