"""What comes before the first step: rows become a task and its parts, the base a copy with an adapter in it, texts features."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapter_hub.adapters.checks import check_fits, check_rows, head_fault, head_modules, row_faults, run_fault
from adapter_hub.adapters.config import TaskType
from adapter_hub.adapters.patterns import matches_end
from adapter_hub.adapters.source import AdapterFiles
from adapter_hub.adapters.weights import adapted_modules, adapter_of
from adapter_hub.base_model import BaseKind, FrozenBase, building
from adapter_hub.errors import InvalidInput, WrongBase
from adapter_hub.examples import Example
from adapter_hub.precision import Precision
from adapter_hub.training.alignment import align, hint_of
from adapter_hub.training.config import ALL_LINEAR, TrainConfig, module_pattern
from adapter_hub.training.data import Parts, split, task_seed
from adapter_hub.training.frozen import HIDDEN, below, computed_once
from adapter_hub.training.loop import batches
from adapter_hub.training.loss import varied
from adapter_hub.training.probe import output_layer, output_name, start_from_probe
from adapter_hub.training.tasks import IGNORED, Features, Number, Task, check_template, task_of
from adapter_hub.training.warm import Start, start_from

FACTOR = re.compile(r"\.lora_[AB]\.")    # in a tensor's name


def prepared(
    base: FrozenBase,
    rows: Sequence[Example],
    validation: Sequence[Example] | None,
    config: TrainConfig,
    task: str,
    task_type: str,
    problem_type: str | None,
    prompt_template: str | None,
) -> tuple[Task, int, Parts]:
    """What is to be learned, its seed, and which rows do what. Raises InvalidInput."""
    kind = task_of(task_type, problem_type)
    check_base(base, kind)
    check_template(prompt_template)
    job = kind.of(rows, validation, prompt_template)
    if config.r_drop and kind is not Task:
        raise InvalidInput(f"r_drop={config.r_drop} is for one label among several.", hint="Leave it 0.")
    if config.class_weights and kind is not Task:
        raise InvalidInput("class_weights=True is for one label among several.", hint="Leave it False.")
    seed = task_seed(config.seed, task, job.labels)
    parts = split(rows, validation, config.validation_share, seed, job.strata(rows))
    parts = parts if validation is not None or kind is Task else _all_trained(job, parts)
    return job.fitted(parts.train), seed, parts


def _all_trained(job: Task, parts: Parts) -> Parts:
    """Rows of labels that no training row is left of are trained on, as long as others choose and measure."""
    known = {label for row in parts.train for label in job.named(row)}
    own = [row for part in (parts.choice, parts.validation) for row in part if not known.issuperset(job.named(row))]
    choice, validation = ([row for row in part if known.issuperset(job.named(row))] for part in (parts.choice, parts.validation))
    if not own or not choice or not validation or parts.choice is parts.train:
        return parts
    return Parts([*parts.train, *own], choice, validation)


def check_base(base: FrozenBase, kind: type[Task]) -> None:
    writes = {BaseKind.CAUSAL: TaskType.CAUSAL_LM, BaseKind.SEQ2SEQ: TaskType.SEQ_2_SEQ_LM}
    headed = kind.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
    if base.kind is BaseKind.SEQ2SEQ and headed:
        raise InvalidInput(f"{base.id} is a sequence-to-sequence model; it takes no classifier.", hint="Use an encoder or a causal model.")
    if not headed and writes.get(base.kind) is not kind.task_type:
        raise InvalidInput(f"{base.id} is {base.kind}; it takes no {kind.task_type} adapter.", hint="Use another base, or task type.")


@contextmanager
def set_up(
    base: FrozenBase, job: Task, config: TrainConfig, parts: Parts, start: Start | None = None
) -> Iterator[tuple[PeftModel, list[list[Features]]]]:
    """The model to train, its adapter fresh or `start`'s, and the features of each part; what frozen layers make of them is computed."""
    if config.align_steps and job.task_type is not TaskType.SEQ_CLS:
        raise InvalidInput(f"align_steps={config.align_steps} is for heads that read a text as one.", hint="Leave it 0.")
    whole = _model_copy(base, job, config)
    if start is not None and (lower := below(whole, config)) and any(re.fullmatch(lower, module) for module in adapted_modules(start.folder)):
        config = replace(config, layers_share=1.0)    # which is for speed: what is learned on keeps all that it knows
    if job.outputs:
        _check_head(whole, base, job)
    features = [job.features(base, part) if part else [] for part in parts]
    _check_targets(features[0])
    output = output_name(whole)
    probed = config.probe and type(job) is Task and (start is None or start.labels != job.labels)
    headless = start is not None and not start.labels
    aligned = start is None and config.align_steps > 0
    if probed and not headless and not aligned:
        _probe(whole, features[0])
    meant = hint_of(whole, features[0]) if aligned else None
    if config.probe and isinstance(job, Number) and (start is None or headless):
        _start_from_mean(whole, features[0])
    names, lower = [name for name, _ in whole.named_modules()], below(whole, config)
    endings = sorted({name.rpartition(".")[2] for name, module in whole.named_modules() if isinstance(module, nn.Linear | Conv1D)})
    try:
        with building():
            model: PeftModel = get_peft_model(whole, _lora_config(whole, base, job, config))
    except (ValueError, TypeError) as error:    # PEFT's, of modules that are not there, or of a kind that it does not adapt
        with_lora = f" with lora={config.lora!r}" if config.lora else ""
        fact = f"target_modules={config.target_modules!r}{with_lora} cannot be adapted in {base.id}: {str(error).splitlines()[0]}"
        named = f"Its linear layers are named {', '.join(endings)}"
        hint = f"{named}: name those that can." if config.target_modules == ALL_LINEAR else f"{named}; {ALL_LINEAR!r} takes all that can."
        if isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR:
            hint = f"A text is a regular expression of the whole name, a list has endings. {hint}"
        raise InvalidInput(fact, hint=hint) from error
    adapted = set(cast(LoraModel, model.base_model).targeted_module_names)
    _check_named(config, adapted, names)
    settings = cast(LoraConfig, model.peft_config["default"])
    if settings.exclude_modules not in (None, lower):    # for more than speed: what is learned on from it adapts these, and no more
        settings.target_modules, settings.exclude_modules = sorted(adapted), None
    if config.pissa:
        _check_pissa(model, config, start)
    _check_served(model, base, job)
    if start is not None:
        start_from(model, start, job.outputs, output)
    if isinstance(job, Number) and start is not None and not headless:
        rescale(model, 1 / job.scale)
    if probed and headless:    # on what it will be fed: those weights are in the model now
        _probe(whole, features[0])
    once = sorted((row for part in features for row in part), key=_tokens)
    with computed_once(model, whole, batches(once, whole.config.pad_token_id)) as hidden:
        for row, states in zip(once, hidden or (), strict=False):
            row[HIDDEN] = states
        if meant is not None:
            align(model, features[0], meant, config)
            if probed:
                _probe(whole, features[0], model)
        # First of all hooks: what was computed once is varied with the rest.
        model.register_forward_pre_hook(
            lambda module, args, inputs: (args, varied(inputs, config) if module.training else inputs), with_kwargs=True, prepend=True
        )
        yield model, features


def _check_head(whole: PreTrainedModel, base: FrozenBase, job: Task) -> None:
    """Raises WrongBase where the engine could not run this head, or numbers could not be rescaled in it."""
    unscaled = "its head has no single linear layer that gives the number" if isinstance(job, Number) and output_layer(whole) is None else ""
    if reason := head_fault(whole, base) or run_fault(whole, base, Precision.FLOAT32) or unscaled:
        raise WrongBase(f"no classifier can be learned on {base.id!r}: {reason}.", hint="Use another base.")


def _check_named(config: TrainConfig, adapted: Collection[str], modules: Sequence[str]) -> None:
    """Raises InvalidInput for what `lora` names and is not there, which PEFT passes over."""
    lora = config.lora or {}
    excluded, layers = (lora.get(name, ()) for name in ("exclude_modules", "layers_to_transform"))
    endings = sorted({name.rpartition(".")[2] for name in adapted})
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(option, ()):
            if not any(matches_end(pattern, name) for name in adapted):
                raise InvalidInput(f"lora's {option} has {pattern!r}, and no adapted module has that name.", hint=f"There are: {', '.join(endings)}.")
    for one in [excluded] if isinstance(excluded, str) else [[ending] for ending in excluded]:
        if not any(re.fullmatch(module_pattern(one), name) for name in modules):
            there = sorted({name.rpartition(".")[2] for name in modules} - {""})
            shown = one if isinstance(one, str) else one[0]
            raise InvalidInput(f"lora's exclude_modules has {shown!r}, and no module has that name.", hint=f"There are: {', '.join(there)}.")
    for number in (layers,) if isinstance(layers, int) else layers:
        if not any(str(number) in name.split(".") for name in adapted):
            numbers = sorted({int(part) for name in modules for part in name.split(".") if part.isdigit()})
            fact = f"lora's layers_to_transform has {number}, and no adapted module is in that layer"
            raise InvalidInput(f"{fact}.", hint=f"Layers are {', '.join(map(str, numbers))}.")


def _check_served(model: PeftModel, base: FrozenBase, job: Task) -> None:
    """Raises what registering the adapter would, of its config and of where its tensors have their places."""
    config = model.peft_config["default"].to_dict() | {"init_lora_weights": True}    # whatever they begin with, a plain LoRA is written
    weights = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    files = AdapterFiles(json.dumps(config, default=list).encode(), save(weights), "the adapter to train")
    adapter = adapter_of(files, labels=job.labels or None, problem_type=job.problem_type)
    check_fits(adapter, base)
    check_rows(adapter, base)


def _check_pissa(model: PeftModel, config: TrainConfig, start: Start | None) -> None:
    if start is not None:
        raise InvalidInput("pissa begins with the base's singular vectors, and an adapter to start from with its own.", hint="Choose one of them.")
    least = min(min(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items() if FACTOR.search(key))
    if least < config.r:
        raise InvalidInput(f"pissa with r={config.r}: the narrowest module that is adapted has {least} singular vectors.", hint=f"Use r={least}.")


def _probe(whole: PreTrainedModel, features: Sequence[Features], outer: nn.Module | None = None) -> None:
    rows = sorted(features, key=_tokens)
    start_from_probe(whole, batches(rows, whole.config.pad_token_id), np.array([row["labels"] for row in rows]), outer)


def _start_from_mean(whole: PreTrainedModel, features: Sequence[Features]) -> None:
    """A regression begins with the mean of its targets, not at 0: the adapter's steps go into what differs. Heads without a bias stay."""
    layer = output_layer(whole)
    if layer is not None and layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(float(np.mean([row["labels"] for row in features])))


def rescale(model: PeftModel, factor: float) -> None:
    """Have the output layer of a regression give `factor` times its numbers."""
    layer = output_layer(cast(PreTrainedModel, model.get_base_model()))
    assert layer is not None    # `_check_head` asks for it
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)


def _tokens(row: Features) -> int:
    """Rows of like length stand together: little is padded."""
    return len(row["input_ids"])


def _check_targets(rows: Sequence[Features]) -> None:
    """Raises InvalidInput where no token of any row has a target: there is nothing to learn."""
    if all(isinstance(row["labels"], list) and set(row["labels"]) == {IGNORED} for row in rows):
        raise InvalidInput("no token of the training rows has a target.", hint="Shorten the prompts, or the prompt template.")


def _model_copy(base: FrozenBase, job: Task, config: TrainConfig) -> PreTrainedModel:
    """The base's weights once more, with a fresh head where the task has one."""
    own = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    if job.problem_type is not None or job.labels:
        names = dict(enumerate(job.outputs))
        own.num_labels, own.id2label, own.label2id = len(names), names, {label: number for number, label in names.items()}
        own.problem_type = None if job.problem_type is None else str(job.problem_type)
    if not config.base_dropout:
        for name, value in vars(own).items():
            if "drop" in name and isinstance(value, float):    # hidden_dropout_prob, attn_pdrop, dropout_rate, …
                setattr(own, name, 0.0)
    try:
        with building():
            model: PreTrainedModel = job.auto.from_pretrained(
                base.path, config=own, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).to(base.device)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise WrongBase(f"transformers has no {job.auto.__name__} for {own.model_type!r}.", hint="Use another base, or task type.") from error
    # Causal models find the last token that is not padding by this number.
    model.config.pad_token_id = base.tokenizer.pad_token_id
    model.config.use_cache = False
    return model


def _lora_config(model: PreTrainedModel, base: FrozenBase, job: Task, config: TrainConfig) -> LoraConfig:
    targets, more = config.target_modules, json.loads(json.dumps(config.lora or {}))    # PEFT is given lists
    excluded = [module_pattern(more.pop("exclude_modules", None))]
    if targets == ALL_LINEAR:
        excluded += [below(model, config) or "", module_pattern(_not_by_row(model, base))]
    return LoraConfig(
        task_type=str(job.task_type),
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules="|".join(filter(None, excluded)) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=(job.outputs and head_modules(model, base)) or None,
        **({"init_lora_weights": "pissa" if config.pissa else True} | more),
    )


def _not_by_row(model: PreTrainedModel, base: FrozenBase) -> list[str]:
    """Linear modules of the transformer that cannot be adapted for each row of a batch by itself."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and base.canonical(name) in base.modules]
    faults = row_faults(base, names)
    if names and len(faults) == len(names):
        name, reason = next(iter(faults.items()))
        raise WrongBase(f"no linear layer of {base.id!r} can be adapted; of {name}: {reason}.", hint="Use another base.")
    return list(faults)
