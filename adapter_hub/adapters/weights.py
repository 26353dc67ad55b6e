"""An adapter in tensors: the low-rank pair of each module it changes, and its head, read from PEFT's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from adapter_hub.adapters.config import HEADED, LoraSettings, ProblemType, TaskType, parse_config
from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles, read_files
from adapter_hub.errors import CorruptAdapter, DoesNotFit, InvalidInput, LabelsRequired, NonFinite, UnsupportedOption

# i inputs of a module, o its outputs, r rank
KEY_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)    # torch cannot test eight bits for NaN
ELSEWHERE = "Leave that module out of target_modules, and train again."
_DTYPES_SHOWN = "float32, bfloat16 or float16"


@dataclass(frozen=True, slots=True, eq=False)
class LoraDelta:
    """What is added to one module: `scaling · B A x`; with a magnitude, DoRA's column norms (Liu et al. 2024, eq. 5).

    For an embedding x is the token as a unit vector, i its vocabulary.
    """

    a: Tensor                  # (r, i)
    b: Tensor                  # (o, r)
    scaling: float
    magnitude: Tensor | None   # (o,), DoRA only
    embedding: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter. Modules are named as in the model it was trained on: `FrozenBase.canonical` finds them in any form of the base."""

    settings: LoraSettings
    deltas: Mapping[str, LoraDelta]                # module name -> pair
    head: Mapping[str, Tensor]                     # tensor name in the task's model -> tensor; empty without a head
    labels: tuple[str, ...] | None                 # names of the head's outputs
    problem_type: ProblemType | None = None        # SEQ_CLS: what they mean
    prompt_template: str | None = None             # with one {text}
    generation: Mapping[str, Any] = field(default_factory=dict)   # defaults for `generate`

    @property
    def task_type(self) -> TaskType | None:
        return self.settings.task_type

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under PEFT's key."""
        found = {KEY_PREFIX + name: tensor for name, tensor in self.head.items()}
        for module, delta in self.deltas.items():
            a, b = ("embedding_A", "embedding_B") if delta.embedding else ("A.weight", "B.weight")
            found |= {f"{KEY_PREFIX}{module}.lora_{a}": delta.a, f"{KEY_PREFIX}{module}.lora_{b}": delta.b}
            if delta.magnitude is not None:
                found[f"{KEY_PREFIX}{module}.lora_magnitude_vector"] = delta.magnitude
        return found


def read_adapter(folder: str | Path, **facts: Any) -> Adapter:
    """The adapter of a PEFT folder; `facts` and errors as of `adapter_of`."""
    return adapter_of(read_files(folder), **facts)


def adapter_of(
    files: AdapterFiles,
    *,
    labels: tuple[str, ...] | None = None,
    prompt_template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    problem_type: str | None = None,
) -> Adapter:
    """Parse PEFT's two files, which do not say the problem type: one output is a regression, several are one label among them.

    Raises CorruptAdapter, UnsupportedOption, NonFinite, DoesNotFit (half a pair), LabelsRequired, InvalidInput."""
    settings, tensors = settings_of(files), tensors_of(files)
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise DoesNotFit(f"tensor {key!r} is {tensor.dtype}, not floating point of 16 bits or more.", hint=f"Save it in {_DTYPES_SHOWN}.")
        if not torch.isfinite(tensor).all():
            raise NonFinite(f"tensor {key!r} holds NaN or infinity.", hint="Training diverged: lower the learning rate and train again.")
    deltas, head = _paired(settings, tensors)
    problem = _checked_problem(settings, head, problem_type)
    _check_labels(settings, head, labels, problem)
    return Adapter(settings, deltas, head, labels, problem, _checked_template(prompt_template), dict(generation or {}))


def adapted_modules(folder: Path) -> set[str]:
    """The modules that an adapter's pairs are of, by their names in full. Its weights are not read."""
    with safe_open(folder / ADAPTER_WEIGHTS, "np") as file:
        return {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for key in file.keys() if ".lora_" in key}


def settings_of(files: AdapterFiles) -> LoraSettings:
    """Raises CorruptAdapter, UnsupportedOption."""
    return parse_config(_json_of(files), files.origin)


def tensors_of(files: AdapterFiles) -> dict[str, Tensor]:
    """Raises CorruptAdapter."""
    try:
        return load(files.weights)
    except (SafetensorError, KeyError, ValueError) as error:    # a type or shape that torch does not know
        raise CorruptAdapter(files.origin, f"{ADAPTER_WEIGHTS} is not a whole safetensors file ({error})") from error


def outputs_of(head: Mapping[str, Tensor]) -> int:
    """How many outputs a head has: the rows of its last layer."""
    weights = sorted((name for name, tensor in head.items() if tensor.ndim == 2), key=_lastness)
    if not weights:
        raise DoesNotFit("the adapter's head has no weight matrix.", hint="Save it with modules_to_save naming the head, as PEFT does for SEQ_CLS.")
    return int(head[weights[-1]].shape[0])


def _lastness(name: str) -> int:
    """Heads of two layers call the last one by one of these names, in RoBERTa, Funnel, DistilBERT, Llama and XLNet."""
    layer = name.split(".")[-2] if "." in name else name
    return {"out_proj": 4, "linear_out": 4, "classifier": 3, "score": 2, "logits_proj": 1}.get(layer, 0)


def _json_of(files: AdapterFiles) -> Any:
    try:
        return json.loads(files.config)
    except (ValueError, RecursionError) as error:
        raise CorruptAdapter(files.origin, f"{ADAPTER_CONFIG} is not JSON ({error})") from error


def _paired(settings: LoraSettings, tensors: Mapping[str, Tensor]) -> tuple[dict[str, LoraDelta], dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(KEY_PREFIX):
            raise DoesNotFit(f"tensor {key!r} does not begin with {KEY_PREFIX!r}.", hint="Save the adapter with PEFT's save_pretrained.")
        name = key.removeprefix(KEY_PREFIX)
        if ".base_layer." in name:
            raise DoesNotFit(
                f"tensor {key!r} is the base's own: PEFT saves it too where the output layer or an embedding is adapted.",
                hint="Save it with save_pretrained(folder, save_embedding_layers=False).",
            )
        module, dot, part = name.rpartition(".lora_")
        if part.startswith("embedding_"):
            embeddings.add(module)
        part = part.removesuffix(".weight").removeprefix("embedding_")
        if not dot:
            head[name] = tensor
        elif part in ("A", "B", "magnitude_vector"):
            parts.setdefault(module, {})[part] = tensor
        else:
            raise UnsupportedOption("target_modules", module, f"tensor {key!r} is neither a linear module's nor an embedding's", hint=ELSEWHERE)
    deltas = {}
    for module, found in sorted(parts.items()):
        wanted = ("A", "B", "magnitude_vector") if settings.use_dora else ("A", "B")
        missing = [part for part in wanted if part not in found]
        if missing or len(found) > len(wanted):
            state = f"lacks lora_{missing[0]}" if missing else "has a magnitude vector, but use_dora is off"
            raise DoesNotFit(f"module {module!r} {state}.", hint="Save the adapter again: its tensors and its config disagree.")
        rank = settings.rank(module)
        if found["A"].shape[:1] != (rank,):    # before PEFT makes tensors of that size to compare with
            shape = tuple(found["A"].shape)
            raise DoesNotFit(f"lora_A of module {module!r} has shape {shape}, the config says rank {rank}.", hint="Save the adapter again.")
        deltas[module] = LoraDelta(found["A"], found["B"], settings.scaling(module), found.get("magnitude_vector"), module in embeddings)
    if not deltas:
        raise DoesNotFit("the adapter holds no LoRA tensors.", hint="Save it with PEFT's save_pretrained after training.")
    return deltas, head


def _checked_problem(settings: LoraSettings, head: Mapping[str, Tensor], problem_type: str | None) -> ProblemType | None:
    """What a SEQ_CLS head's outputs mean, as transformers has it; None for other tasks. Raises InvalidInput, DoesNotFit."""
    if settings.task_type is not TaskType.SEQ_CLS:
        if problem_type is not None:
            fact = f"problem_type={problem_type!r} was given, but an adapter of task type {settings.task_type} has none"
            raise InvalidInput(f"{fact}.", hint="Leave it out.")
        return None
    if problem_type is not None and problem_type not in list(ProblemType):
        raise InvalidInput(f"problem_type={problem_type!r} is not known.", hint=f"There are: {', '.join(ProblemType)}.")
    outputs = outputs_of(head) if head else 0
    found = ProblemType(problem_type or (ProblemType.REGRESSION if outputs == 1 else ProblemType.SINGLE))
    if found is ProblemType.REGRESSION and outputs > 1:
        raise DoesNotFit(f"a regression gives one number, and the adapter's head has {outputs} outputs.", hint="Train one adapter for each.")
    if found is ProblemType.SINGLE and outputs == 1:
        hint = "Leave problem_type out for a regression, or say multi_label_classification for one label's yes or no."
        raise DoesNotFit("one label among one is no choice: the adapter's head has one output.", hint=hint)
    return found


def _check_labels(
    settings: LoraSettings, head: Mapping[str, Tensor], labels: tuple[str, ...] | None, problem_type: ProblemType | None
) -> None:
    if settings.task_type not in HEADED:
        if labels:
            raise LabelsRequired(f"labels were given, but an adapter of task type {settings.task_type} has no head.", hint="Leave labels out.")
        return
    if not head:
        raise DoesNotFit(f"a {settings.task_type} adapter needs its head, and the file has none.", hint="Train with modules_to_save naming the head.")
    outputs = outputs_of(head)
    if problem_type is ProblemType.REGRESSION and labels is None:
        return
    if settings.task_type is TaskType.TOKEN_CLS and outputs == 1:
        raise UnsupportedOption("num_labels", 1, "a head of one output gives every token the same label", hint="Train a head of two labels or more.")
    if not labels:
        raise LabelsRequired(f"the adapter's head has {outputs} outputs without names.", hint="Pass labels=[…], one for each output, in order.")
    if len(labels) != outputs:
        raise LabelsRequired(f"{len(labels)} labels were given for a head of {outputs} outputs.", hint="Name each output once, in order.")
    if len(set(labels)) != len(labels) or not all(isinstance(label, str) and label for label in labels):
        raise LabelsRequired("labels must be distinct texts that are not empty.", hint="Name each output once, in order.")


def _checked_template(template: Any) -> str | None:
    if template is not None and not isinstance(template, str):
        raise InvalidInput(f"the prompt template is {type(template).__name__}, not text.", hint='For example "Question: {text}\\nAnswer:".')
    if template is not None and template.count("{text}") != 1:
        raise DoesNotFit(f"the prompt template {template!r} does not hold {{text}} exactly once.", hint='For example "Question: {text}\\nAnswer:".')
    return template
