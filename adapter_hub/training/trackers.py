"""Where the course of a training is logged, and under which name. transformers' callbacks do the logging; no torch, no training here.

TensorBoard: one folder a training under `runs/` of the working directory, or under $TENSORBOARD_LOGGING_DIR. Weights & Biases: `wandb/`,
MLflow: `mlflow.db`, or wherever $WANDB_MODE, $WANDB_DIR, $WANDB_PROJECT, $MLFLOW_TRACKING_URI and $MLFLOW_EXPERIMENT_NAME say.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from adapter_hub.errors import InvalidInput

RUNS = "runs"    # TensorBoard's own word
_FOLDER = "TENSORBOARD_LOGGING_DIR"


def check_trackers(names: Sequence[str]) -> None:
    """Raises InvalidInput for the first whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InvalidInput(f"report_to={name!r} needs the package {name}, which is not installed.", hint=f"Run `pip install {name}`.")


def log_folder(task: str, begun: float) -> Path:
    """TensorBoard's folder for one training; `begun` in seconds since 1970. One that is resumed goes on in its own."""
    name = re.sub(r"[^\w.-]+", "_", task) or "adapter"
    return Path(os.environ.get(_FOLDER) or RUNS).expanduser() / f"{name}-{datetime.fromtimestamp(begun):%Y%m%d-%H%M%S-%f}"


@contextmanager
def tracked(trainer: Any, names: Sequence[str], task: str, begun: float) -> Iterator[None]:
    """One training is one run: it ends with the block, as failed where that fails. A run that the caller began is used, and left open.

    Raises InvalidInput where a tracker takes no logs.
    """
    with ExitStack() as stack:
        if "tensorboard" in names:
            folder = log_folder(task, begun)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidInput(f"TensorBoard's logs cannot be written to {str(folder)!r}: {error.strerror}.", hint=f"Set {_FOLDER}.") from error
            for callback in trainer.callback_handler.callbacks:
                if type(callback).__name__ == "TensorBoardCallback":
                    callback.logging_dir = str(folder)    # else it lies among the checkpoints, and is removed with them
        for name, run in (("wandb", _wandb_run), ("mlflow", _mlflow_run)):
            if name in names:
                stack.enter_context(run())
        yield


@contextmanager
def _wandb_run() -> Iterator[None]:
    """transformers never ends a run: without this, all trainings of a process would be one."""
    wandb: Any = importlib.import_module("wandb")
    given, failed = wandb.run is not None, True
    try:
        yield
        failed = False
    except wandb.errors.Error as error:
        fact = f"Weights & Biases takes no logs: {str(error).rstrip('.')}."
        raise InvalidInput(fact, hint="Run `wandb login`, or set WANDB_MODE=offline.") from error
    finally:
        if not given and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


@contextmanager
def _mlflow_run() -> Iterator[None]:
    """transformers ends a run that came to its end; the others here."""
    mlflow: Any = importlib.import_module("mlflow")
    given = mlflow.active_run() is not None
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        raise InvalidInput(f"MLflow takes no logs: {str(error).rstrip('.')}.", hint="See MLFLOW_TRACKING_URI.") from error
    finally:
        if not given and mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
