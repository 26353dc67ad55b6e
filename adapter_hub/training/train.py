"""Train one classifier adapter and write it as a plain PEFT folder. transformers' Trainer does the training.

The weights that are trained belong to a copy loaded from the base's folder; the FrozenBase itself is only asked where it lies
and how it tokenizes. Which rows may be used is `data`'s to say.
"""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import check_task, hold_out, task_seed
from adapter_hub.training.evaluate import classifier_metrics
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
    metrics: Mapping[str, float]         # on `validation`: accuracy, macro_f1, log_loss; and epoch, the one that was kept
    validation: tuple[Example, ...]      # the rows measured on: those given, or those held out
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
    """Train a LoRA classifier on a copy of `base`; the epoch that is best on the validation rows is written to `folder`.

    The same rows, config, task name, threads and package versions give the same bytes, whatever ran before. Without validation
    rows some training rows are held out, of every label its share. Raises InvalidInput, with the position of the row where a row
    is at fault.
    """
    config = config or TrainConfig()
    started = time.perf_counter()
    if base.kind is BaseKind.SEQ2SEQ:
        raise InvalidInput(f"{base.id} is a sequence-to-sequence model; it takes no classifier.", hint="Use an encoder or a causal model.")
    labels = check_task(rows, validation)
    seed = task_seed(config.seed, task, labels)
    train, held_out = (list(rows), list(validation)) if validation is not None else hold_out(rows, config.validation_share, seed)
    with _own_randomness(seed), _quiet(not config.progress), tempfile.TemporaryDirectory(prefix="train-") as scratch:
        tokenizer, classifier = _tokenizer_copy(base), _classifier_copy(base, labels)
        features, held_out_features = (_features(tokenizer, base.max_tokens, labels, part) for part in (train, held_out))
        if config.probe:
            start_from_probe(classifier, _batches(tokenizer, features), np.array([row["labels"] for row in features]))
        model = get_peft_model(classifier, _lora_config(config))
        trainer = _trainer(model, tokenizer, features, held_out_features, config, seed, Path(scratch))
        trainer.train()
        metrics = _metrics(trainer)
        _write(model, base.id, Path(folder))
    return TrainResult(Path(folder), labels, metrics, tuple(held_out), time.perf_counter() - started)


def _tokenizer_copy(base: FrozenBase) -> PreTrainedTokenizerBase:
    """Its own, since fast tokenizers remember how they last padded and other threads may be predicting; padded as the engine does."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def _classifier_copy(base: FrozenBase, labels: Sequence[str]) -> PreTrainedModel:
    """The base's weights once more, with a fresh head for these labels."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base.path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    ).to(base.device)
    # Causal models find the last token that is not padding by this number.
    model.config.pad_token_id = base.tokenizer.pad_token_id
    return model


def _lora_config(config: TrainConfig) -> LoraConfig:
    targets = config.target_modules
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Features],
    held_out: Sequence[Features],
    config: TrainConfig,
    seed: int,
    scratch: Path,
) -> Trainer:
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    epochs = min(max(config.epochs, math.ceil(config.steps_min / steps_per_epoch)), max(config.epochs, config.epochs_max))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_ROWS,
        warmup_steps=math.floor(config.warmup_ratio * epochs * steps_per_epoch),
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
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=_measure,
    )
    if not config.progress:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _features(tokenizer: PreTrainedTokenizerBase, max_tokens: int, labels: Sequence[str], rows: Sequence[Example]) -> list[Features]:
    """Token ids and the class number of each row, not padded."""
    numbers = {label: number for number, label in enumerate(labels)}
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_tokens)
    return [{key: encoded[key][i] for key in MODEL_INPUTS} | {"labels": numbers[row.label or ""]} for i, row in enumerate(rows)]


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


def _metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics of the epoch that was kept."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_rank" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_rank"])
    kept = {name: float(best[f"eval_{name}"]) for name in ("accuracy", "macro_f1", "log_loss")}
    return kept | {"epoch": float(best["epoch"])}


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
    """Run with every generator seeded; the caller's are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No report of the fresh head's missing weights, no bars, no notices between transformers and PEFT: the library does not print."""
    if not quiet:
        yield
        return
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
