"""Train one adapter and write it as a plain PEFT folder. transformers' Trainer does the training.

The weights that are trained belong to a copy loaded from the base's folder; the FrozenBase itself is only asked where it lies
and how it tokenizes. Which rows may be used is `data`'s to say, what they mean `tasks`'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.base_model import BUILDING, RANDOMNESS, BaseKind, FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.config import ALL_LINEAR, TrainConfig
from adapter_hub.training.data import Parts, split, task_seed
from adapter_hub.training.evaluate import log_losses
from adapter_hub.training.frozen import HIDDEN, below, computed_once
from adapter_hub.training.loss import class_weights, classifier_loss, varied
from adapter_hub.training.probe import output_layer, output_name, start_from_probe
from adapter_hub.training.report import DataReport, report_of
from adapter_hub.training.tasks import IGNORED, MODEL_INPUTS, Features, Number, Task, check_template, task_of
from adapter_hub.training.trackers import check_trackers, tracked
from adapter_hub.training.warm import Start, start_from

EVAL_BATCH_ROWS = 64
HEADS = r"(.*\.)?(classifier|score)"    # of token classification, which PEFT would take for linear layers of the transformer
_IDENTITY = "training.json"             # in a folder of checkpoints: which training they are of
_STATE = "trainer_state.json"           # the last file of a checkpoint that the Trainer writes


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained adapter in a plain PEFT folder, and how good it is on rows that it was not trained on."""

    folder: Path
    labels: tuple[str, ...]              # in the order of the head's outputs; none for numbers and text
    # the task's measures on `validation`; epoch, the one that was kept, and of a classifier its choice_accuracy, on the rows that chose it
    metrics: Mapping[str, float]
    validation: tuple[Example, ...]      # of those given, or held out: they had no part in training, nor in choosing the epoch
    seconds: float
    report: DataReport                   # what is to be known about the rows
    task_type: TaskType
    problem_type: ProblemType | None
    prompt_template: str | None


def train_classifier(
    base: FrozenBase,
    rows: Sequence[Example],
    *,
    task: str = "",
    validation: Sequence[Example] | None = None,
    config: TrainConfig | str | None = None,
    folder: Path,
    checkpoint_folder: Path | None = None,
    start: Start | None = None,
) -> TrainResult:
    """`train_adapter` of one label among several."""
    return train_adapter(base, rows, task=task, validation=validation, config=config, folder=folder, checkpoint_folder=checkpoint_folder, start=start)


def train_adapter(
    base: FrozenBase,
    rows: Sequence[Example],
    *,
    task_type: str = TaskType.SEQ_CLS,
    problem_type: str | None = None,
    prompt_template: str | None = None,
    task: str = "",
    validation: Sequence[Example] | None = None,
    config: TrainConfig | str | None = None,
    folder: Path,
    checkpoint_folder: Path | None = None,
    start: Start | None = None,
) -> TrainResult:
    """Train a LoRA adapter on a copy of `base`; the epoch that is best on rows it was not trained on is written to `folder`.

    `config` may be a preset's name. What a row's target is, `tasks` says for each task and problem type; `prompt_template` holds {text}.
    The same rows, config, task name, threads and package versions give the same bytes, whatever ran before: trainings of one process
    wait for each other. Half of the validation rows choose the epoch, the others measure it; without any, training rows are held out
    for both, of every label its share. It begins with the weights of `start` where one is given: its labels must be among those of the rows.
    With `checkpoint_folder` each epoch is kept there until all are done: called again after it was killed, the training goes
    on, and gives the bytes that it would have given. Raises InvalidInput, with the position of the row where a row is at fault, and where
    that folder is another training's.
    """
    config = TrainConfig.of(config)
    check_trackers(config.report_to)
    started = time.perf_counter()
    job, seed, parts = _prepared(base, rows, validation, config, task, task_type, problem_type, prompt_template)
    report = report_of(rows, validation or (), job.shown, classes=type(job) is Task)
    with (
        _own_randomness(seed),
        _quiet(not config.progress),
        _checkpoints(checkpoint_folder, base, job, config, seed, rows, validation, start) as kept,
        _set_up(base, job, config, parts, start) as (model, (features, choosing, measuring)),
    ):
        trainer = _trainer(model, job, features, choosing, config, seed, kept, run_name=task or "adapter")
        with tracked(trainer, config.report_to, task, _begun(kept)):
            trainer.train(resume_from_checkpoint=_last_checkpoint(kept))
            metrics = _chosen(trainer) | _measured(trainer, job, measuring)
        _write(model, base.id, Path(folder))
    seconds = time.perf_counter() - started
    return TrainResult(
        Path(folder), job.labels, metrics, tuple(parts.validation), seconds, report, job.task_type, job.problem_type, prompt_template
    )


def _prepared(
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
    _check_base(base, kind)
    check_template(prompt_template)
    job = kind.of(rows, validation, prompt_template)
    if config.r_drop and kind is not Task:
        raise InvalidInput(f"r_drop={config.r_drop} is for one label among several.", hint="Leave it 0.")
    seed = task_seed(config.seed, task, job.labels)
    return job, seed, split(rows, validation, config.validation_share, seed, job.stratum)


def rehearse(
    base: FrozenBase,
    rows: Sequence[Example],
    *,
    task_type: str = TaskType.SEQ_CLS,
    problem_type: str | None = None,
    prompt_template: str | None = None,
    task: str = "",
    validation: Sequence[Example] | None = None,
    config: TrainConfig | str | None = None,
    watch: Callable[[int, float], bool],
) -> float:
    """How good `train_adapter` of the same arguments gets on the rows that choose its epoch: `rank` in the best, NaN where a loss is none.

    `watch` is told each epoch (from 1) and its rank, and ends the training by False. The rows that measure are not asked, and nothing is
    kept. Raises InvalidInput as `train_adapter` does.
    """
    config = dataclasses.replace(TrainConfig.of(config), report_to=())
    job, seed, parts = _prepared(base, rows, validation, config, task, task_type, problem_type, prompt_template)
    with (
        _own_randomness(seed),
        _quiet(not config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        _set_up(base, job, config, parts._replace(validation=parts.choice[:1])) as (model, (features, choosing, _)),
    ):
        once = {"save_strategy": "no", "load_best_model_at_end": config.patience > 0, "logging_nan_inf_filter": False}
        if config.patience:    # what counts them wants to know the best, which only a kept checkpoint tells
            once["save_strategy"] = "epoch"
        trainer = _trainer(model, job, features, choosing, config, seed, Path(scratch), **once)
        trainer.add_callback(_Watch(watch))
        trainer.train()
    return max((float(entry["eval_rank"]) for entry in trainer.state.log_history if "eval_rank" in entry), default=math.nan)


class _Watch(TrainerCallback):
    def __init__(self, watch: Callable[[int, float], bool]) -> None:
        self._watch = watch

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        rank = float(more["metrics"]["eval_rank"])
        if not math.isfinite(rank) or not self._watch(round(state.epoch or 0), rank):
            control.should_training_stop = True


def losses_after(
    base: FrozenBase,
    rows: Sequence[Example],
    asked: Sequence[Example],
    *,
    steps: int,
    task: str = "",
    config: TrainConfig | str | None = None,
    start: Start | None = None,
) -> NDArray[np.float64]:
    """(n,): log loss, in nats, of each row of `asked` after a classifier's training of `steps` steps on `rows`. Nothing is kept.

    Seeds depend on config, task and labels alone: two starts meet the same batches. Raises InvalidInput as `train_adapter`.
    """
    config = dataclasses.replace(TrainConfig.of(config), patience=0, report_to=())
    _check_base(base, Task)
    job = Task.of(rows, asked, None)
    seed = task_seed(config.seed, task, job.labels)
    once: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": steps}
    with (
        _own_randomness(seed),
        _quiet(not config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        _set_up(base, job, config, Parts(rows, (), asked), start) as (model, (features, _, judging)),
    ):
        trainer = _trainer(model, job, features, judging, config, seed, Path(scratch), **once, warmup_steps=math.floor(config.warmup_ratio * steps))
        trainer.train()
        trainer.args.train_sampling_strategy = "random"    # by length, what is predicted is sorted too
        logits: Any = trainer.predict(judging).predictions    # type: ignore[arg-type]
    return log_losses(np.asarray(logits), np.array([row["labels"] for row in judging]))


@dataclass(frozen=True, slots=True)
class RateSweep:
    """Losses of one short training whose learning rate rises from step to step by the same factor."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]    # of each step's batch, smoothed
    suggested: float             # a third of the rate at which the loss is lowest: beyond that it rises again


def find_learning_rate(
    base: FrozenBase,
    rows: Sequence[Example],
    *,
    task_type: str = TaskType.SEQ_CLS,
    problem_type: str | None = None,
    task: str = "",
    config: TrainConfig | str | None = None,
    rate_min: float = 1e-5,
    rate_max: float = 1e-1,
    steps: int = 60,
) -> RateSweep:
    """A rate to begin with, by a range test (Smith 2017, "Cyclical learning rates", section 3.3). Nothing is kept. Raises InvalidInput."""
    if not 0 < rate_min < rate_max < math.inf or steps < 10:
        raise InvalidInput(f"a sweep of {steps} steps from {rate_min} to {rate_max} tells nothing.", hint="Give 10 steps or more, upwards.")
    config = dataclasses.replace(TrainConfig.of(config), patience=0, report_to=())
    kind = task_of(task_type, problem_type)
    _check_base(base, kind)
    job = kind.of(rows, None, None)
    seed = task_seed(config.seed, task, job.labels)
    parts = split(rows, None, config.validation_share, seed, job.stratum)
    once = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_nan_inf_filter": False}
    steps_of = {"max_steps": steps, "logging_strategy": "steps", "logging_steps": 1, "learning_rate": rate_min, "warmup_steps": 0}
    with (
        _own_randomness(seed),
        _quiet(not config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        _set_up(base, job, config, parts) as (model, (features, choosing, _)),
    ):
        trainer = _trainer(model, job, features, choosing, config, seed, Path(scratch), **once, **steps_of)
        factor = (rate_max / rate_min) ** (1 / (steps - 1))
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.create_optimizer(), lambda step: factor**step)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return _swept([rate_min * factor**step for step in range(len(losses))], losses)


def _swept(rates: Sequence[float], losses: Sequence[float]) -> RateSweep:
    """Smoothed over about five steps; a loss that is not finite ends the sweep."""
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smooth, mean = [], 0.0
    for i, loss in enumerate(losses[:finite], 1):
        mean = 0.8 * mean + 0.2 * loss
        smooth.append(mean / (1 - 0.8**i))
    if not smooth:
        raise InvalidInput(f"the loss is not finite at the rate {rates[0]:g}.", hint="Begin lower, and look at the rows.")
    return RateSweep(tuple(rates[:finite]), tuple(smooth), rates[int(np.argmin(smooth))] / 3)


@contextmanager
def _set_up(
    base: FrozenBase, job: Task, config: TrainConfig, parts: Parts, start: Start | None = None
) -> Iterator[tuple[PeftModel, list[list[Features]]]]:
    """The model to train, its adapter fresh or `start`'s, and the features of each part; what frozen layers make of them is computed."""
    whole = _model_copy(base, job, config)
    features = [job.features(base, part) if part else [] for part in parts]
    _check_targets(features[0])
    output = output_name(whole)
    probed = config.probe and type(job) is Task and (start is None or start.labels != job.labels)
    headless = start is not None and not start.labels
    if probed and not headless:
        _probe(whole, features[0])
    if config.probe and type(job) is Number and start is None:
        _start_from_mean(whole, features[0])
    try:
        with _building():
            model: PeftModel = get_peft_model(whole, _lora_config(whole, job, config))
    except ValueError as error:    # PEFT's, of modules that are not there, or of a kind that it does not adapt
        endings = sorted({name.rpartition(".")[2] for name, module in whole.named_modules() if isinstance(module, nn.Linear | Conv1D)})
        fact = f"target_modules={config.target_modules!r} cannot be adapted in {base.id}: {str(error).splitlines()[0]}"
        raise InvalidInput(fact, hint=f"Its linear layers are named {', '.join(endings)}; {ALL_LINEAR!r} takes all.") from error
    if start is not None:
        start_from(model, start, job.outputs, output)
    if probed and headless:    # on what it will be fed: those weights are in the model now
        _probe(whole, features[0])
    model.register_forward_pre_hook(lambda module, args, inputs: (args, varied(inputs, config) if module.training else inputs), with_kwargs=True)
    once = sorted((row for part in features for row in part), key=_tokens)
    with computed_once(model, whole, _batches(once, whole.config.pad_token_id)) as hidden:
        for row, states in zip(once, hidden or (), strict=False):
            row[HIDDEN] = states
        yield model, features


def _probe(whole: PreTrainedModel, features: Sequence[Features]) -> None:
    rows = sorted(features, key=_tokens)
    start_from_probe(whole, _batches(rows, whole.config.pad_token_id), np.array([row["labels"] for row in rows]))


def _start_from_mean(whole: PreTrainedModel, features: Sequence[Features]) -> None:
    """A regression begins with the mean of its targets, not at 0: the adapter's steps go into what differs. Heads without a bias stay."""
    layer = output_layer(whole)
    if layer is not None and layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(float(np.mean([row["labels"] for row in features])))


def _tokens(row: Features) -> int:
    """Rows of like length stand together: little is padded."""
    return len(row["input_ids"])


def _check_base(base: FrozenBase, kind: type[Task]) -> None:
    writes = {BaseKind.CAUSAL: TaskType.CAUSAL_LM, BaseKind.SEQ2SEQ: TaskType.SEQ_2_SEQ_LM}
    headed = kind.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
    if base.kind is BaseKind.SEQ2SEQ and headed:
        raise InvalidInput(f"{base.id} is a sequence-to-sequence model; it takes no classifier.", hint="Use an encoder or a causal model.")
    if not headed and writes.get(base.kind) is not kind.task_type:
        raise InvalidInput(f"{base.id} is {base.kind}; it takes no {kind.task_type} adapter.", hint="Use another base, or task type.")


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
    with _building():
        model: PreTrainedModel = job.auto.from_pretrained(
            base.path, config=own, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).to(base.device)
    # Causal models find the last token that is not padding by this number.
    model.config.pad_token_id = base.tokenizer.pad_token_id
    model.config.use_cache = False
    return model


def _lora_config(model: PreTrainedModel, job: Task, config: TrainConfig) -> LoraConfig:
    targets = config.target_modules
    excluded: list[str] = []
    if targets == ALL_LINEAR:
        lower = below(model, config)
        excluded = [*([lower] if lower else []), *([HEADS] if job.task_type is TaskType.TOKEN_CLS else [])]
    return LoraConfig(
        task_type=str(job.task_type),
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules="|".join(excluded) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _trainer(
    model: PeftModel, job: Task, train: Sequence[Features], choosing: Sequence[Features], config: TrainConfig, seed: int, folder: Path, **more: Any
) -> Trainer:
    steps_per_epoch = math.ceil(math.ceil(len(train) / config.batch_size) / config.accumulation)
    epochs = min(max(config.epochs, math.ceil(config.steps_min / steps_per_epoch)), max(config.epochs, config.epochs_max))
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        per_device_eval_batch_size=EVAL_BATCH_ROWS,
        # A warm-up's first step has the rate 0: an epoch of one step would leave the adapter as it began.
        warmup_steps=math.floor(config.warmup_ratio * epochs * steps_per_epoch) if steps_per_epoch > 1 else 0,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",    # short inputs are not padded to the longest of all
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="rank",
        greater_is_better=True,
        logging_strategy="epoch",
        disable_tqdm=not config.progress,
        report_to=list(config.report_to) or "none",
        use_cpu=model.device.type == "cpu",
        bf16=config.precision == "bfloat16" or (config.precision == "auto" and model.device.type == "cuda" and torch.cuda.is_bf16_supported()),
        dataloader_pin_memory=False,
        label_names=["labels"],
        remove_unused_columns=False,
        neftune_noise_alpha=config.noise or None,
    )
    loss = None
    if type(job) is Task:
        weights = class_weights([row["labels"] for row in train], len(job.labels)) if config.class_weights else None
        loss = classifier_loss(config, weights)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings | more),
        data_collator=partial(_collate, pad=model.config.pad_token_id),
        train_dataset=train,
        eval_dataset=choosing,
        compute_metrics=job.metrics,
        compute_loss_func=loss,
        preprocess_logits_for_metrics=job.reduced,
    )
    if config.patience:
        trainer.add_callback(_Patience(config.patience))
    if not config.progress:
        trainer.remove_callback(PrinterCallback)
    return trainer


class _Patience(EarlyStoppingCallback):
    """Ends a training that goes on from the checkpoint at which it had ended."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def _collate(rows: Sequence[Features], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right, as the engine does; what pads is masked, and is in no loss. A causal classifier finds a row's end by `pad`."""
    padding = {"input_ids": pad}
    batch = {key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=padding.get(key, 0)) for key in MODEL_INPUTS}
    if HIDDEN in rows[0]:
        batch[HIDDEN] = pad_sequence([row[HIDDEN] for row in rows], batch_first=True)
    if "labels" in rows[0]:
        targets = [torch.tensor(row["labels"]) for row in rows]
        batch["labels"] = pad_sequence(targets, batch_first=True, padding_value=IGNORED) if targets[0].ndim else torch.stack(targets)
    return batch


def _batches(rows: Sequence[Features], pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in their order, padded batch by batch, without their targets."""
    for start in range(0, len(rows), EVAL_BATCH_ROWS):
        yield _collate([{key: row[key] for key in MODEL_INPUTS} for row in rows[start : start + EVAL_BATCH_ROWS]], pad)


def _chosen(trainer: Trainer) -> dict[str, float]:
    """The epoch that was kept, and its accuracy on the rows that chose it: more than it will be, since it is the best of many."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_rank" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_rank"])
    return {"epoch": float(best["epoch"])} | ({"choice_accuracy": float(best["eval_accuracy"])} if "eval_accuracy" in best else {})


def _measured(trainer: Trainer, job: Task, rows: Sequence[Features]) -> dict[str, float]:
    """How good the weights that were kept are on rows of their own."""
    found = trainer.predict(rows, metric_key_prefix="own").metrics or {}  # type: ignore[arg-type]
    return {name: float(found[f"own_{name}"]) for name in job.measures}


@contextmanager
def _checkpoints(
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
    yield folder
    for one in folder.glob("checkpoint-*"):
        shutil.rmtree(one)
    path.unlink()


def _begun(folder: Path) -> float:
    """When this training began, in seconds since 1970: in whichever process that was."""
    path = folder / _IDENTITY
    return path.stat().st_mtime if path.exists() else time.time()


def _read(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_checkpoint(folder: Path) -> str | None:
    """The latest that was written to its end; what a killed process left of others is removed."""
    whole = []
    for one in folder.glob("checkpoint-*"):
        if _read(one / _STATE):
            whole.append(one)
        else:
            shutil.rmtree(one)
    return str(max(whole, key=lambda one: int(one.name.rpartition("-")[2]))) if whole else None


def _write(model: PeftModel, base_id: str, folder: Path) -> None:
    """PEFT's two files, the same bytes each time: sets are sorted, and the base is named by its id, not by a local path."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)    # a form to fill in, not facts
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_id
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(set(config[key]))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Run with every generator seeded, one thread at a time; the caller's are as before afterwards."""
    with RANDOMNESS, torch.random.fork_rng():
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _building() -> Iterator[None]:
    """One thread at a time: a model is built by patching torch, and Python's warning filters, too, are the process's."""
    with BUILDING, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)    # PEFT asks transformers by an old name
        yield


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No report of the fresh head's missing weights, no bars: the library does not print."""
    if not quiet:
        yield
        return
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
