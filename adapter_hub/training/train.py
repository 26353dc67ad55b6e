"""Train one adapter and write it as a plain PEFT folder. transformers' Trainer does the training.

The weights that are trained belong to a copy loaded from the base's folder; the FrozenBase itself is only asked where it lies
and how it tokenizes. Which rows may be used is `data`'s to say, what they mean `tasks`'. Rows -> `setup` -> `loop` -> folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.base_model import FrozenBase
from adapter_hub.examples import Example
from adapter_hub.training.checkpoints import begun, checkpoints, last_checkpoint
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.loop import trainer_of
from adapter_hub.training.report import DataReport, report_of
from adapter_hub.training.scope import own_randomness, quiet
from adapter_hub.training.setup import FACTOR, prepared, rescale, set_up
from adapter_hub.training.tasks import Features, Number, Task
from adapter_hub.training.trackers import check_trackers, tracked
from adapter_hub.training.warm import Start


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
    config: TrainConfig | Mapping[str, Any] | str | None = None,
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
    config: TrainConfig | Mapping[str, Any] | str | None = None,
    folder: Path,
    checkpoint_folder: Path | None = None,
    start: Start | None = None,
) -> TrainResult:
    """Train a LoRA adapter on a copy of `base`; the epoch that is best on rows it was not trained on is written to `folder`.

    `config` may be a mapping of its settings, or a preset's name. What a row's target is, `tasks` says for each task and problem type;
    `prompt_template` holds {text}.
    The same rows, config, task name, threads and package versions give the same bytes, whatever ran before: trainings of one process
    wait for each other. Half of the validation rows choose the epoch, the others measure it; without any, training rows are held out
    for both, of every label its share. It begins with the weights of `start` where one is given: its labels must be among those of the rows.
    With `checkpoint_folder` each epoch is kept there until all are done: called again after it was killed, the training goes
    on, and gives the bytes that it would have given. Raises InvalidInput, with the position of the row where a row is at fault, and where
    that folder is another training's; and before anything is trained what registering the adapter would, of its config, head and modules.
    """
    config = TrainConfig.of(config)
    check_trackers(config.report_to)
    started = time.perf_counter()
    job, seed, parts = prepared(base, rows, validation, config, task, task_type, problem_type, prompt_template)
    report = report_of(rows, validation or (), job.shown, classes=type(job) is Task, named=job.named, train=parts.train)
    report = replace(report, choosing=0 if parts.choice is parts.train else len(parts.choice), measuring=len(parts.validation))
    report = replace(report, cut=job.cut(base, [*rows, *(validation or ())]), weighed=config.class_weights)
    with (
        own_randomness(seed),
        quiet(config.progress),
        checkpoints(checkpoint_folder, base, job, config, seed, rows, validation, start) as kept,
        set_up(base, job, config, parts, start) as (model, (features, choosing, measuring)),
    ):
        taken_out = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items() if FACTOR.search(key)} if config.pissa else {}
        trainer = trainer_of(model, job, features, choosing, config, seed, kept, run_name=task or "adapter")
        with tracked(trainer, config.report_to, task, begun(kept)):
            trainer.train(resume_from_checkpoint=last_checkpoint(kept))
            metrics = _chosen(trainer) | _measured(trainer, job, measuring)
        if isinstance(job, Number):
            rescale(model, job.scale)
        _write(model, base.id, Path(folder), taken_out)
    seconds = time.perf_counter() - started
    return TrainResult(
        Path(folder), job.labels, metrics, tuple(parts.validation), seconds, report, job.task_type, job.problem_type, prompt_template
    )


def _chosen(trainer: Trainer) -> dict[str, float]:
    """The epoch that was kept, and its accuracy on the rows that chose it: more than it will be, since it is the best of many."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_rank" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_rank"])
    return {"epoch": float(best["epoch"])} | ({"choice_accuracy": float(best["eval_accuracy"])} if "eval_accuracy" in best else {})


def _measured(trainer: Trainer, job: Task, rows: Sequence[Features]) -> dict[str, float]:
    """How good the weights that were kept are on rows of their own."""
    found = trainer.predict(rows, metric_key_prefix="own").metrics or {}  # type: ignore[arg-type]
    return {name: float(found[f"own_{name}"]) for name in job.measures}


def _write(model: PeftModel, base_id: str, folder: Path, taken_out: Mapping[str, torch.Tensor]) -> None:
    """PEFT's two files, the same bytes each time: sets are sorted, and the base is named by its id, not by a local path.

    What PiSSA has `taken_out` of the base's weights, B₀ A₀ (Meng et al. 2024), is subtracted: B A − B₀ A₀ = [B −B₀] [A; A₀], for the base as it is.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)    # a form to fill in, not facts
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_id
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(set(config[key]))
    if taken_out:
        config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
        weights = load_file(folder / "adapter_model.safetensors")
        for key, factor in taken_out.items():
            narrow = ".lora_A." in key
            weights[key] = torch.cat([weights[key], (factor if narrow else -factor).cpu()], dim=0 if narrow else 1)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
