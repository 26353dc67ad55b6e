"""The logs of a training are where a user finds them, one run a training, and logging changes no weight."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TRACKERS, TrainConfig
from adapter_hub.training.trackers import log_folder
from adapter_hub.training.train import train_classifier

WORDS = (("fruit", "fig"), ("tool", "saw"), ("fruit", "plum"))
ROWS = [Example(f"{frame} {word}", label) for frame in ("a", "the", "my", "no") for label, word in WORDS]
CONFIG = TrainConfig(r=2, epochs=3, steps_min=0, batch_size=8)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, and nothing set."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(base: FrozenBase, folder: Path, *report_to: str, kept: Path | None = None) -> bytes:
    train_classifier(base, ROWS, task="words", config=replace(CONFIG, report_to=report_to), folder=folder, checkpoint_folder=kept)
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    base: FrozenBase, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)    # as Python marks what cannot be imported
    with pytest.raises(InvalidInput, match=rf"report_to='{name}' needs the package {name}, .*`pip install {name}`"):
        train(base, elsewhere / "adapter", name)
    assert not (elsewhere / "adapter").exists()


def test_a_tracker_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidInput, match="is not a list of some of tensorboard, wandb, mlflow"):
        TrainConfig(report_to=("tensorbord",))


def test_each_training_has_a_folder_for_tensorboard_and_a_resumed_one_keeps_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_folder("a/b c", 5.0) == log_folder("a/b c", 5.0) != log_folder("a/b c", 5.001)
    assert log_folder("a/b c", 5.0).parent == Path("runs") and log_folder("a/b c", 5.0).name.startswith("a_b_c-19")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "~/logs")
    assert log_folder("", 5.0).parent == Path.home() / "logs"


def test_tensorboard_shows_every_epoch_after_the_training_is_over(base: FrozenBase, elsewhere: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(base, elsewhere / "one", "tensorboard") == train(base, elsewhere / "two", "tensorboard", kept=elsewhere / "kept")
    assert (elsewhere / "one" / WEIGHTS).read_bytes() == train(base, elsewhere / "plain")
    folders = sorted((elsewhere / "runs").iterdir())
    assert len(folders) == 2 and list((elsewhere / "kept").iterdir()) == []
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        assert folder.name.startswith("words-") and len(events.Scalars("eval/accuracy")) == len(events.Scalars("train/loss")) == CONFIG.epochs


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(
    base: FrozenBase, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    (elsewhere / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(elsewhere / "file"))
    with pytest.raises(InvalidInput, match=r"logs cannot be written to .*Set TENSORBOARD_LOGGING_DIR"):
        train(base, elsewhere / "adapter", "tensorboard")


def test_mlflow_gets_one_run_a_training_named_after_its_task(base: FrozenBase, elsewhere: Path) -> None:
    pytest.importorskip("mlflow", reason="the package mlflow is not installed")
    mlflow = importlib.import_module("mlflow")
    assert train(base, elsewhere / "one", "mlflow") == train(base, elsewhere / "two", "mlflow") == train(base, elsewhere / "plain")
    runs = mlflow.search_runs(output_format="list")
    assert [(run.info.run_name, run.info.status) for run in runs] == [("words", "FINISHED")] * 2
    assert all("eval_accuracy" in run.data.metrics for run in runs) and mlflow.active_run() is None


def test_weights_and_biases_gets_one_run_a_training(base: FrozenBase, elsewhere: Path) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    wandb = importlib.import_module("wandb")
    assert train(base, elsewhere / "one", "wandb") == train(base, elsewhere / "two", "wandb") == train(base, elsewhere / "plain")
    assert len(list((elsewhere / "wandb").glob("offline-run-*"))) == 2 and wandb.run is None
    with wandb.init(project="own") as own:    # a run of the caller's
        train(base, elsewhere / "three", "wandb")
        assert wandb.run is own
