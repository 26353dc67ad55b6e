"""Train one classifier adapter and write it as a plain PEFT folder. transformers' Trainer does the training.

The weights that are trained belong to a copy loaded from the base's folder; the FrozenBase itself is only asked where it lies
and how it tokenizes. Which rows may be used is `data`'s to say.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from adapter_hub.base_model import BUILDING, RANDOMNESS, BaseKind, FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.config import ALL_LINEAR, TrainConfig
from adapter_hub.training.data import check_task, split, task_seed
from adapter_hub.training.evaluate import classifier_metrics
from adapter_hub.training.frozen import HIDDEN, below, computed_once
from adapter_hub.training.probe import start_from_probe

EVAL_BATCH_ROWS = 64
# One text has one segment: GPT-2 would add an embedding for token_type_ids that no other input of it gets.
MODEL_INPUTS = ("input_ids", "attention_mask")

Features = dict[str, Any]    # a tokenizer's fields for one row, and "labels", its class number


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained adapter in a plain PEFT folder, and how good it is on rows that it was not trained on."""

    folder: Path
    labels: tuple[str, ...]              # in the order of the head's outputs
    # accuracy, macro_f1 and log_loss on `validation`; epoch, the one that was kept, and its choice_accuracy, on the rows that chose it
    metrics: Mapping[str, float]
    validation: tuple[Example, ...]      # of those given, or held out: they had no part in training, nor in choosing the epoch
    seconds: float


def train_classifier(
    base: FrozenBase,
    rows: Sequence[Example],
    *,
    task: str = "",
    validation: Sequence[Example] | None = None,
    config: TrainConfig | None = None,
    folder: Path,
) -> TrainResult:
    """Train a LoRA classifier on a copy of `base`; the epoch that is best on rows it was not trained on is written to `folder`.

    The same rows, config, task name, threads and package versions give the same bytes, whatever ran before: trainings of one process
    wait for each other. Half of the validation rows choose the epoch, the others measure it; without any, training rows are held out
    for both, of every label its share. Raises InvalidInput, with the position of the row where a row is at fault.
    """
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise InvalidInput(f"the training config is {type(config).__name__}, not a TrainConfig.", hint="Use TrainConfig.from_dict for a mapping.")
    started = time.perf_counter()
    if base.kind is BaseKind.SEQ2SEQ:
        raise InvalidInput(f"{base.id} is a sequence-to-sequence model; it takes no classifier.", hint="Use an encoder or a causal model.")
    labels = check_task(rows, validation)
    seed = task_seed(config.seed, task, labels)
    parts = split(rows, validation, config.validation_share, seed)
    with _own_randomness(seed), _quiet(not config.progress), tempfile.TemporaryDirectory(prefix="train-") as scratch:
        tokenizer, classifier = _tokenizer_copy(base), _classifier_copy(base, labels, config)
        features, choosing, measuring = (_features(tokenizer, base.max_tokens, labels, part) for part in parts)
        if config.probe:
            start_from_probe(classifier, _batches(tokenizer, features), np.array([row["labels"] for row in features]))
        with _building():
            model = get_peft_model(classifier, _lora_config(classifier, config))
        once = [*features, *choosing, *measuring]
        with computed_once(model, classifier, _batches(tokenizer, once)) as hidden:
            for row, states in zip(once, hidden or (), strict=False):
                row[HIDDEN] = states
            trainer = _trainer(model, tokenizer, features, choosing, config, seed, Path(scratch))
            trainer.train()
            metrics = _chosen(trainer) | _measured(trainer, measuring)
        _write(model, base.id, Path(folder))
    return TrainResult(Path(folder), labels, metrics, tuple(parts.validation), time.perf_counter() - started)


def _tokenizer_copy(base: FrozenBase) -> PreTrainedTokenizerBase:
    """Its own, since fast tokenizers remember how they last padded and other threads may be predicting; padded as the engine does."""
    tokenizer = base.copy_tokenizer()
    tokenizer.padding_side = "right"
    return tokenizer


def _classifier_copy(base: FrozenBase, labels: Sequence[str], config: TrainConfig) -> PreTrainedModel:
    """The base's weights once more, with a fresh head for these labels."""
    own = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    own.num_labels, own.id2label, own.label2id = len(labels), dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    if not config.base_dropout:
        for name, value in vars(own).items():
            if "drop" in name and isinstance(value, float):    # hidden_dropout_prob, attn_pdrop, dropout_rate, …
                setattr(own, name, 0.0)
    with _building():
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            base.path,
            config=own,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        ).to(base.device)
    # Causal models find the last token that is not padding by this number.
    model.config.pad_token_id = base.tokenizer.pad_token_id
    return model


def _lora_config(model: PreTrainedModel, config: TrainConfig) -> LoraConfig:
    targets = config.target_modules
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=below(model, config) if targets == ALL_LINEAR else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Features],
    choosing: Sequence[Features],
    config: TrainConfig,
    seed: int,
    scratch: Path,
) -> Trainer:
    steps_per_epoch = math.ceil(math.ceil(len(train) / config.batch_size) / config.accumulation)
    epochs = min(max(config.epochs, math.ceil(config.steps_min / steps_per_epoch)), max(config.epochs, config.epochs_max))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        per_device_eval_batch_size=EVAL_BATCH_ROWS,
        warmup_steps=math.floor(config.warmup_ratio * epochs * steps_per_epoch),
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        label_smoothing_factor=config.label_smoothing,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",    # short inputs are not padded to the longest of all
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=True,
        logging_strategy="epoch",
        disable_tqdm=not config.progress,
        report_to="none",
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        label_names=["labels"],
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=partial(_collate, DataCollatorWithPadding(tokenizer)),
        train_dataset=train,
        eval_dataset=choosing,
        compute_metrics=_measure,
    )
    if config.patience:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    if not config.progress:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _features(tokenizer: PreTrainedTokenizerBase, max_tokens: int, labels: Sequence[str], rows: Sequence[Example]) -> list[Features]:
    """Token ids and the class number of each row, not padded."""
    numbers = {label: number for number, label in enumerate(labels)}
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_tokens)
    return [{key: encoded[key][i] for key in MODEL_INPUTS} | {"labels": numbers[row.label or ""]} for i, row in enumerate(rows)]


def _collate(collate: DataCollatorWithPadding, rows: Sequence[Features]) -> dict[str, torch.Tensor]:
    batch = dict(collate([{key: value for key, value in row.items() if key != HIDDEN} for row in rows]))
    if HIDDEN in rows[0]:
        batch[HIDDEN] = torch.nn.utils.rnn.pad_sequence([row[HIDDEN] for row in rows], batch_first=True)
    return batch


def _batches(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Features]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in their order, padded batch by batch, without their class numbers."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), EVAL_BATCH_ROWS):
        batch = [{key: value for key, value in row.items() if key != "labels"} for row in rows[start : start + EVAL_BATCH_ROWS]]
        yield dict(collate(batch))


def _measure(predicted: EvalPrediction) -> dict[str, float]:
    metrics = classifier_metrics(np.asarray(predicted.predictions), np.asarray(predicted.label_ids))
    # Epochs are ranked by accuracy; the log loss decides between epochs that are equally accurate.
    return metrics | {"rank": metrics["accuracy"] - 1e-5 * min(metrics["log_loss"], 10.0)}


def _chosen(trainer: Trainer) -> dict[str, float]:
    """The epoch that was kept, and its accuracy on the rows that chose it: more than it will be, since it is the best of many."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_rank" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_rank"])
    return {"epoch": float(best["epoch"]), "choice_accuracy": float(best["eval_accuracy"])}


def _measured(trainer: Trainer, rows: Sequence[Features]) -> dict[str, float]:
    """How good the weights that were kept are on rows of their own."""
    found = trainer.evaluate(rows, metric_key_prefix="own")  # type: ignore[arg-type]
    return {name: float(found[f"own_{name}"]) for name in ("accuracy", "macro_f1", "log_loss")}


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
