"""transformers' Trainer, set up: batches, schedule, the epoch that is kept, and when to stop."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from adapter_hub.training.config import TrainConfig
from adapter_hub.training.frozen import HIDDEN
from adapter_hub.training.loss import class_weights, classifier_loss
from adapter_hub.training.tasks import IGNORED, MODEL_INPUTS, Features, Task

EVAL_BATCH_ROWS = 64


def epochs_of(config: TrainConfig, rows: int) -> int:
    """How often so many rows are trained on: more often than `epochs` where that is fewer steps than `steps_min`, up to `epochs_max`."""
    return max(config.epochs, min(math.ceil(config.steps_min / _steps(config, rows)), config.epochs_max))


def _steps(config: TrainConfig, rows: int) -> int:
    """Of the optimiser, in an epoch."""
    return math.ceil(math.ceil(rows / config.batch_size) / config.accumulation)


def trainer_of(
    model: PeftModel, job: Task, train: Sequence[Features], choosing: Sequence[Features], config: TrainConfig, seed: int, folder: Path, **more: Any
) -> Trainer:
    epochs, steps = epochs_of(config, len(train)), _steps(config, len(train))
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        per_device_eval_batch_size=EVAL_BATCH_ROWS,
        # A warm-up's first step has the rate 0: an epoch of one step would leave the adapter as it began.
        warmup_steps=math.floor(config.warmup_ratio * epochs * steps) if steps > 1 else 0,
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
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)
    return trainer


class _Bar(ProgressCallback):
    """Bars and losses on stderr, where transformers writes the losses to stdout: that belongs to whoever calls."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        bar: Any = self.training_bar    # of a type that transformers does not say
        if bar is not None:
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in (logs or {}).items() if key != "total_flos"}
            bar.write(str(shown), file=sys.stderr)


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


def batches(rows: Sequence[Features], pad: int, size: int = EVAL_BATCH_ROWS) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in their order, padded batch by batch, without their targets; what was computed of them once goes along."""
    for start in range(0, len(rows), size):
        yield _collate([{key: value for key, value in row.items() if key != "labels"} for row in rows[start : start + size]], pad)
