"""Start an adapter from another one's weights instead of from noise: A, B and magnitudes, and of the head the rows of the labels it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from adapter_hub.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Start:
    """What an adapter starts from: a plain PEFT folder, or its tensors alone."""

    folder: Path
    labels: tuple[str, ...]    # of its head's outputs, in their order (`Task.outputs`); none where there is no head: that one is fresh


def start_from(model: PeftModel, start: Start, labels: tuple[str, ...], output: str | None) -> None:
    """Give the model the weights of `start`; of its output layer, named `output`, the rows of the labels that both know.

    What the older one lacks stays as it was: labels that are new, modules that it does not adapt. Raises InvalidInput where something
    of the older one has no place here: another rank, a module that is not adapted, a label that is not learned.
    """
    missing = sorted(set(start.labels) - set(labels))
    if missing or (output is None and start.labels not in ((), labels)):
        fact = f"the label {missing[0]!r} is not among those to learn" if missing else "this head's outputs cannot be told apart"
        raise InvalidInput(f"the adapter to start from does not fit: {fact}.", hint='Start it anew: start="cold" (`--start cold`).')
    old, new = load_file(start.folder / "adapter_model.safetensors"), get_peft_model_state_dict(model, save_embedding_layers=False)
    places = [labels.index(label) for label in start.labels]
    taken: dict[str, Tensor] = {}
    for key, tensor in old.items():
        found = new.get(key)
        of_output = output is not None and key.rpartition(".")[0].endswith(f".{output}")
        if found is None or found.shape[int(of_output) :] != tensor.shape[int(of_output) :] or (of_output and len(tensor) != len(start.labels)):
            here = "has no place here" if found is None else f"is {tuple(found.shape)} here"
            raise InvalidInput(
                f"the adapter to start from does not fit: {key} of {tuple(tensor.shape)} {here}.",
                hint='Give its rank and modules in the config, or start anew: start="cold" (`--start cold`).',
            )
        if of_output:
            found = found.clone()
            found[places] = tensor.to(found)
        taken[key] = found if of_output else tensor
    with torch.no_grad():
        set_peft_model_state_dict(model, new | taken)
