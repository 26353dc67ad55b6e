"""A training that is killed goes on where it was, and gives the bytes it would have given."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier

KILLS = 5
FILES = ("adapter_config.json", "adapter_model.safetensors")
WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers"), "animal": ("horse", "goat", "zebra", "yak")}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}", "that {}")
ROWS = [Example(frame.format(word), label) for frame in FRAMES for label, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=4, epochs=10, steps_min=0, batch_size=8, learning_rate=5e-3, layers_share=0.5, patience=8, token_dropout=0.1, align_steps=4)
PROGRAM = """
import torch
from adapter_hub.base_model import FrozenBase
from adapter_hub.training.train import train_classifier
torch.set_num_threads(threads)
train_classifier(FrozenBase.load(base), rows, task="t", config=config, folder=folder, checkpoint_folder=kept)
"""


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]


def test_after_five_kills_the_weights_are_those_of_an_uninterrupted_training(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    whole = train_classifier(base, ROWS, task="t", config=CONFIG, folder=tmp_path / "whole")
    kept, folder = tmp_path / "kept", tmp_path / "adapter"
    given = {"base": base.id, "rows": ROWS, "config": CONFIG, "folder": folder, "kept": kept, "threads": torch.get_num_threads()}
    killed_at = [0]
    for kill in range(KILLS):
        process = start(given)
        # Any moment will do: at once when a further epoch's folder appears, so that some are half written, or some time after.
        while latest(kept) <= killed_at[-1] and process.is_alive():
            time.sleep(0.002)
        time.sleep(0.013 * kill)
        assert process.is_alive(), process.exitcode
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed_at.append(latest(kept))
    assert not folder.exists()
    last = start(given)
    last.join()
    assert last.exitcode == 0
    assert digests(folder) == digests(whole.folder)
    assert list(kept.iterdir()) == []


def start(given: dict[str, Any]) -> BaseProcess:
    """A process of its own, forked from one that has imported what it takes and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapter_hub.training.train"])
    process = context.Process(target=exec, args=(PROGRAM, given))
    process.start()
    return process


def latest(folder: Path) -> int:
    return max((int(one.name.rpartition("-")[2]) for one in folder.glob("checkpoint-*")), default=0)


def test_a_file_is_no_folder_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    with pytest.raises(InvalidInput, match=r"checkpoint_folder='.*kept' is a file\. Name a folder"):
        train_classifier(base, [Example(f"{w} {i}", w) for w in "ab" for i in range(3)], folder=tmp_path / "out", checkpoint_folder=tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_folder_of_another_training_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "training.json").write_text('{"training": "another"}')
    with pytest.raises(InvalidInput, match="holds checkpoints of another training"):
        train_classifier(base, ROWS, config=CONFIG, folder=tmp_path / "adapter", checkpoint_folder=kept)
    assert (kept / "training.json").exists()
    (kept / "training.json").rename(kept / "notes.txt")
    with pytest.raises(InvalidInput, match="is not empty, and holds no checkpoints"):
        train_classifier(base, ROWS, config=CONFIG, folder=tmp_path / "adapter", checkpoint_folder=kept)
    assert not (tmp_path / "adapter").exists()
