"""Where an adapter comes from: a PEFT folder, a hub repository id, or a PeftModel in memory. All end as PEFT's two files."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_hub.adapters.config import HEADED, TaskType
from adapter_hub.errors import CorruptAdapter, InvalidInput

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """PEFT's two files as they were read, once: what is checked is what is stored."""

    config: bytes
    weights: bytes
    origin: str                       # where they were read, for people
    repository: str | None = None     # of a hub id
    revision: str | None = None       # the commit that the hub gave
    labels: tuple[str, ...] | None = None    # of a model in memory whose config names its outputs
    problem_type: str | None = None          # of a model in memory whose config says it


def fetch_adapter(source: str | Path | PeftModel) -> AdapterFiles:
    """PEFT's two files of a folder, a hub repository or a model in memory.

    An existing folder wins over a hub id of the same spelling. Only the two files are ever fetched from a hub:
    pickled weights and code stay where they are. Raises CorruptAdapter, InvalidInput.
    """
    if isinstance(source, str | Path):
        path = os.path.expanduser(source)
        return read_files(path) if os.path.exists(path) else _from_hub(str(source))
    if not hasattr(source, "save_pretrained") or not hasattr(source, "peft_config"):
        raise InvalidInput(
            f"the source of an adapter cannot be {type(source).__name__}.",
            hint="Give a PEFT folder, a hub id 'org/name@revision', or a PeftModel.",
        )
    labels, problem_type = _labels_of(source)
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        name = source.active_adapter
        source.save_pretrained(folder, safe_serialization=True, selected_adapters=[name])
        # PEFT writes any adapter but "default" into a folder of its own.
        return replace(read_files(Path(folder) if name == "default" else Path(folder) / name), labels=labels, problem_type=problem_type)


def _labels_of(model: PeftModel) -> tuple[tuple[str, ...] | None, str | None]:
    """The names that a model gives its outputs, None for those that transformers makes up, and its problem type where it says one."""
    task_type = model.peft_config[model.active_adapter].task_type
    if task_type not in HEADED:
        return None, None
    config: Any = getattr(model, "config", None)
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names[number]) for number in sorted(names))
    made_up = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    return None if made_up else labels, getattr(config, "problem_type", None) if task_type == TaskType.SEQ_CLS else None


def read_files(folder: str | Path) -> AdapterFiles:
    """Raises CorruptAdapter where one of the two is missing or cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CorruptAdapter(folder, "it is no folder; a PEFT adapter is one with adapter_config.json and adapter_model.safetensors")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == ADAPTER_WEIGHTS and (folder / "adapter_model.bin").exists()
            raise CorruptAdapter(folder, f"there is no {file}" + (", only pickled weights, and pickle is never read" if pickled else ""))
    try:
        return AdapterFiles((folder / ADAPTER_CONFIG).read_bytes(), (folder / ADAPTER_WEIGHTS).read_bytes(), str(folder))
    except OSError as error:
        raise CorruptAdapter(folder, f"it cannot be read ({error.strerror})") from error


def _from_hub(source: str) -> AdapterFiles:
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise InvalidInput(f"there is no folder {source[:200]!r}, and it is no hub id.", hint="Give a PEFT folder or 'org/name@revision'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(match["id"], revision=match["revision"], allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InvalidInput(
            f"there is no folder {source[:200]!r}, and the model hub did not give that repository ({type(error).__name__}).",
            hint="Check the spelling, the revision and the network.",
        ) from error
    # The hub client keeps a snapshot in a folder named by its commit.
    return replace(read_files(folder), origin=source, repository=match["id"], revision=Path(folder).name)
