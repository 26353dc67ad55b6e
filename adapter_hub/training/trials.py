"""Trainings that are asked for a number and keep nothing: how good a config gets, what a start is worth, which rate to begin with."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapter_hub.adapters.config import TaskType
from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, as_examples
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import Parts, split, task_seed
from adapter_hub.training.evaluate import log_losses
from adapter_hub.training.loop import trainer_of
from adapter_hub.training.scope import own_randomness, quiet
from adapter_hub.training.setup import check_base, prepared, set_up
from adapter_hub.training.tasks import Task, task_of
from adapter_hub.training.warm import Start


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
    job, seed, parts = prepared(base, rows, validation, config, task, task_type, problem_type, prompt_template)
    with (
        own_randomness(seed),
        quiet(config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        set_up(base, job, config, parts._replace(validation=parts.choice[:1])) as (model, (features, choosing, _)),
    ):
        once = {"save_strategy": "no", "load_best_model_at_end": config.patience > 0, "logging_nan_inf_filter": False}
        if config.patience:    # what counts them wants to know the best, which only a kept checkpoint tells
            once["save_strategy"] = "epoch"
        trainer = trainer_of(model, job, features, choosing, config, seed, Path(scratch), **once)
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
    check_base(base, Task)
    job = Task.of(rows, asked, None)
    seed = task_seed(config.seed, task, job.labels)
    once: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_steps": steps}
    with (
        own_randomness(seed),
        quiet(config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        set_up(base, job, config, Parts(rows, (), asked), start) as (model, (features, _, judging)),
    ):
        trainer = trainer_of(model, job, features, judging, config, seed, Path(scratch), **once, warmup_steps=math.floor(config.warmup_ratio * steps))
        trainer.train()
        trainer.args.train_sampling_strategy = "random"    # by length, what is predicted is sorted too
        logits: Any = trainer.predict(judging).predictions    # type: ignore[arg-type]
    return log_losses(np.asarray(logits), np.array([row["labels"] for row in judging]))


@dataclass(frozen=True, slots=True)
class RateSweep:
    """Losses of one short training whose learning rate rises from step to step by the same factor."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]    # of each step's batch, smoothed
    suggested: float             # a third of the rate at which the loss is lowest, beyond which it rises again; at least the least tried


def find_learning_rate(
    base: FrozenBase,
    rows: Iterable[Mapping[str, Any] | Example],
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
    check_base(base, kind)
    rows = as_examples(rows)
    job = kind.of(rows, None, None)
    seed = task_seed(config.seed, task, job.labels)
    parts = split(rows, None, config.validation_share, seed, job.strata(rows))
    job = job.fitted(parts.train)
    once = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_nan_inf_filter": False}
    steps_of = {"max_steps": steps, "logging_strategy": "steps", "logging_steps": 1, "learning_rate": rate_min, "warmup_steps": 0}
    with (
        own_randomness(seed),
        quiet(config.progress),
        tempfile.TemporaryDirectory(prefix="train-") as scratch,
        set_up(base, job, config, parts) as (model, (features, choosing, _)),
    ):
        trainer = trainer_of(model, job, features, choosing, config, seed, Path(scratch), **once, **steps_of)
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
    return RateSweep(tuple(rates[:finite]), tuple(smooth), max(rates[int(np.argmin(smooth))] / 3, rates[0]))
