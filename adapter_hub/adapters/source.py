"""Where an adapter comes from: a PEFT folder, a hub repository id, or a PeftModel in memory. All end as a PEFT folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_hub.errors import CorruptAdapter, InvalidInput

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")


@contextmanager
def adapter_folder(source: str | Path | PeftModel) -> Iterator[Path]:
    """Yield a folder that holds PEFT's two files; it may be temporary and is gone afterwards.

    An existing folder wins over a hub id of the same spelling. Only the two files are ever fetched from a hub:
    pickled weights and code stay where they are. Raises CorruptAdapter, InvalidInput.
    """
    if isinstance(source, str | Path):
        yield _existing(Path(source)) if Path(source).expanduser().exists() else _from_hub(str(source))
        return
    if not hasattr(source, "save_pretrained") or not hasattr(source, "peft_config"):
        raise InvalidInput(
            f"the source of an adapter cannot be {type(source).__name__}.",
            hint="Give a PEFT folder, a hub id 'org/name@revision', or a PeftModel.",
        )
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        name = source.active_adapter
        source.save_pretrained(folder, safe_serialization=True, selected_adapters=[name])
        # PEFT writes any adapter but "default" into a folder of its own.
        yield Path(folder) if name == "default" else Path(folder) / name


def _existing(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise CorruptAdapter(folder, "it is a file; a PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == ADAPTER_WEIGHTS and (folder / "adapter_model.bin").exists()
            raise CorruptAdapter(folder, f"there is no {file}" + (", only pickled weights, and pickle is never read" if pickled else ""))
    return folder


def _from_hub(source: str) -> Path:
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise InvalidInput(f"there is no folder {source!r}, and it is no hub id.", hint="Give a PEFT folder or 'org/name@revision'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(match["id"], revision=match["revision"], allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InvalidInput(
            f"there is no folder {source!r}, and the model hub did not give that repository ({type(error).__name__}).",
            hint="Check the spelling, the revision and the network.",
        ) from error
    return _existing(Path(folder))
