"""A training that is killed goes on where it was, and gives the bytes it would have given."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
CONFIG = TrainConfig(r=4, epochs=10, steps_min=0, batch_size=8, learning_rate=5e-3, layers_share=0.5, patience=8, token_dropout=0.1)
PROGRAM = """
import sys
from pathlib import Path
import torch
from adapter_hub.base_model import FrozenBase
from tests.training.test_resume import CONFIG, ROWS
from adapter_hub.training.train import train_classifier
torch.set_num_threads(int(sys.argv[4]))
train_classifier(FrozenBase.load(sys.argv[1]), ROWS, task="t", config=CONFIG, folder=Path(sys.argv[2]), checkpoint_folder=Path(sys.argv[3]))
"""


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]


def test_after_five_kills_the_weights_are_those_of_an_uninterrupted_training(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    whole = train_classifier(base, ROWS, task="t", config=CONFIG, folder=tmp_path / "whole")
    kept, folder = tmp_path / "kept", tmp_path / "adapter"
    command = [sys.executable, "-c", PROGRAM, base.id, str(folder), str(kept), str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    killed_at = []
    for kill in range(KILLS):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = killed_at[-1] if killed_at else 0
        # Any moment will do: at once when a further epoch's folder appears, so that some are half written, or some time after.
        while latest(kept) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.013 * kill)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(latest(kept))
    assert not folder.exists()
    subprocess.run(command, env=environment, check=True)
    assert digests(folder) == digests(whole.folder)
    assert list(kept.iterdir()) == []


def latest(folder: Path) -> int:
    return max((int(one.name.rpartition("-")[2]) for one in folder.glob("checkpoint-*")), default=0)


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
