"""Training learns, is the same bytes each time, leaves the base alone, and writes what PEFT itself reads back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import load_peft, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import split, task_seed
from adapter_hub.training.train import TrainResult, train_classifier
from adapter_hub.training.warm import Start

WORDS = {
    "fruit": ("apple", "pear", "plum", "fig"),
    "tool": ("hammer", "saw", "drill", "pliers"),
    "animal": ("horse", "goat", "zebra", "yak"),
}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}", "that {}")
ROWS = [Example(frame.format(word), label) for frame in FRAMES for label, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=4, epochs=12, steps_min=0, batch_size=8, learning_rate=5e-3)
SHORT = replace(CONFIG, epochs=3)    # where it does not matter how well it is learned
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def trained(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_classifier(base, ROWS, task="things", config=CONFIG, folder=tmp_path_factory.mktemp("things"))


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]


def test_it_learns_a_task_that_can_be_learned(trained: TrainResult) -> None:
    assert trained.labels == ("animal", "fruit", "tool")
    assert trained.metrics["accuracy"] > 0.7    # a third by chance, and the words of the held-out rows were seen in other frames
    assert {row.label for row in trained.validation} == set(WORDS)


def test_peft_itself_reads_the_folder_and_measures_the_same(base: FrozenBase, trained: TrainResult) -> None:
    model = load_peft(base, trained.folder, "SEQ_CLS", outputs=3)
    encoded = base.tokenize([row.text for row in trained.validation])
    with torch.no_grad():
        logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    targets = torch.tensor([trained.labels.index(row.label or "") for row in trained.validation])
    assert trained.metrics["accuracy"] == (logits.argmax(dim=1) == targets).double().mean().item()
    assert trained.metrics["log_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-5)


def test_the_adapter_fits_the_base_and_acts_on_it(base: FrozenBase, trained: TrainResult) -> None:
    adapter = read_adapter(trained.folder, labels=trained.labels)
    check_fits(adapter, base)
    assert check_acts(adapter, base) > 0
    assert adapter.settings.base_model_name_or_path == base.id


def test_the_folder_holds_pefts_two_files_and_nothing_of_this_machine_but_the_bases_id(base: FrozenBase, trained: TrainResult) -> None:
    assert sorted(path.name for path in trained.folder.iterdir()) == sorted(FILES)
    config = json.loads((trained.folder / FILES[0]).read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == base.id


def test_training_leaves_the_base_untouched(base: FrozenBase, tmp_path: Path) -> None:
    before = base.compute_fingerprint()
    train_classifier(base, ROWS, config=SHORT, folder=tmp_path)
    assert base.compute_fingerprint() == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_same_task_gives_the_same_bytes_whatever_ran_before(base: FrozenBase, trained: TrainResult, tmp_path: Path) -> None:
    train_classifier(base, ROWS[:24], task="another", config=SHORT, folder=tmp_path / "another")
    torch.manual_seed(99)
    random.seed(99)
    again = train_classifier(base, ROWS, task="things", config=CONFIG, folder=tmp_path / "again")
    assert digests(again.folder) == digests(trained.folder)
    assert again.metrics == trained.metrics
    one, other = (train_classifier(base, ROWS[:24], task=task, config=SHORT, folder=tmp_path / task) for task in ("one", "other"))
    assert digests(one.folder) != digests(other.folder)


def test_another_process_gives_the_same_bytes(base: FrozenBase, trained: TrainResult, tmp_path: Path) -> None:
    """With another hash seed, too: PEFT keeps module names in sets."""
    program = f"""
import json, sys, torch
from pathlib import Path
from adapter_hub.base_model import FrozenBase
from adapter_hub.examples import Example
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_classifier
torch.set_num_threads({torch.get_num_threads()})
rows = [Example(text, label) for text, label in json.loads(sys.stdin.read())]
config = TrainConfig.from_dict(json.loads(sys.argv[3]))
train_classifier(FrozenBase.load(sys.argv[1]), rows, task="things", config=config, folder=Path(sys.argv[2]))
"""
    settings = {name: getattr(CONFIG, name) for name in ("r", "epochs", "steps_min", "batch_size", "learning_rate")}
    run = subprocess.run(
        [sys.executable, "-c", program, base.id, str(tmp_path), json.dumps(settings)],
        input=json.dumps([(row.text, row.label) for row in ROWS]),
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert digests(tmp_path) == digests(trained.folder)
    assert run.stdout == ""


def test_training_leaves_the_callers_random_generators_as_they_were(base: FrozenBase, tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    train_classifier(base, ROWS[:24], config=SHORT, folder=tmp_path)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("shape", ["bert", "gpt2", "llama"])
def test_training_prints_nothing_and_warns_of_nothing_that_it_means(
    tmp_path: Path, shape: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    own = [replace(row, label=row.text.partition(" ")[2]) for row in ROWS[:24]]    # nearly as many labels as rows
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train_classifier(base, [replace(row, text=f"{row.text}!") for row in own], validation=own, config=SHORT, folder=tmp_path / "adapter")
    assert capfd.readouterr() == ("", "") and [str(one.message) for one in warned] == [] and caplog.text == ""


def test_beside_a_bar_it_is_not_said_that_the_head_is_fresh(
    base: FrozenBase, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Previously the bar brought transformers' report of weights that are missing."""
    train_classifier(base, ROWS[:24], config=replace(SHORT, progress=True), folder=tmp_path)
    out, err = capfd.readouterr()
    assert "100%" in err and caplog.text == ""
    assert out == "" and "eval_accuracy" in err    # previously the losses were on stdout


def test_rows_that_chose_the_epoch_do_not_measure_it(base: FrozenBase, tmp_path: Path) -> None:
    """At a rate that destroys the head within an epoch or two, an early epoch wins; what it is worth is told by other rows."""
    wild = TrainConfig(r=4, epochs=8, steps_min=0, batch_size=8, learning_rate=1.0, warmup_ratio=0.0, schedule="constant_with_warmup")
    parts = split(ROWS, None, wild.validation_share, task_seed(wild.seed, "things", ("animal", "fruit", "tool")))
    result = train_classifier(base, ROWS, task="things", config=wild, folder=tmp_path)
    assert result.metrics["epoch"] < 8 and result.validation == tuple(parts.validation)
    model = load_peft(base, tmp_path, "SEQ_CLS", outputs=3)
    for name, rows in (("choice_accuracy", parts.choice), ("accuracy", parts.validation)):
        encoded = base.tokenize([row.text for row in rows])
        with torch.no_grad():
            logits = model(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits
        answers = [result.labels[number] for number in logits.argmax(dim=1).tolist()]
        right = sum(answer == row.label for answer, row in zip(answers, rows, strict=True))
        assert result.metrics[name] == right / len(rows)


def test_given_validation_rows_leave_every_training_row_to_train_on(base: FrozenBase, tmp_path: Path) -> None:
    validation = [Example(f"{n} {word} fell", label) for n in ("one", "the") for word, label in (("apple", "fruit"), ("hammer", "tool"))]
    result = train_classifier(base, ROWS, validation=validation, config=SHORT, folder=tmp_path)
    assert len(result.validation) == 2 and all(row in validation for row in result.validation)


def test_trainings_at_once_give_the_bytes_of_one_at_a_time(base: FrozenBase, tmp_path: Path) -> None:
    """Previously each moved the random state under the other, and so its weights."""
    alone = {task: digests(train_classifier(base, ROWS[:24], task=task, config=SHORT, folder=tmp_path / task).folder) for task in "ab"}
    engine, stop = Engine(FrozenBase.load(tiny_model(tmp_path / "llama", "llama")), lambda ref: pytest.fail(f"{ref} was loaded")), threading.Event()

    def sample() -> None:
        while not stop.is_set():
            engine.predict([Request("once", None)], generation={"do_sample": True, "max_new_tokens": 4})

    def train(task: str) -> list[str]:
        return digests(train_classifier(base, ROWS[:24], task=task, config=SHORT, folder=tmp_path / f"{task}2").folder)

    with ThreadPoolExecutor(3) as pool:
        sampling = pool.submit(sample)
        together = dict(zip("ab", pool.map(train, "ab"), strict=True))
        stop.set()
        sampling.result()
    assert together == alone


def test_a_config_that_is_no_train_config_is_refused(base: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"the training config is list, not a TrainConfig\. Give one, a mapping of its settings, or .* fast, bal"):
        train_classifier(base, ROWS, config=["fast"], folder=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": ("query", "value")}], ids=lambda form: next(iter(form))
)
def test_each_adapter_form_trains_into_one_that_fits(base: FrozenBase, tmp_path: Path, form: dict[str, object]) -> None:
    config = TrainConfig.from_dict({"r": 4, "epochs": 1, "steps_min": 0} | form)
    result = train_classifier(base, ROWS, config=config, folder=tmp_path)
    adapter = read_adapter(tmp_path, labels=result.labels)
    check_fits(adapter, base)
    assert (adapter.settings.use_rslora, adapter.settings.use_dora) == (config.use_rslora, config.use_dora)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_causal_base_learns_to_classify_by_its_last_token(tmp_path: Path, shape: str) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    result = train_classifier(base, ROWS, config=replace(CONFIG, epochs=16), folder=tmp_path / "adapter")
    assert result.metrics["accuracy"] > 0.6    # a third by chance
    check_fits(read_adapter(result.folder, labels=result.labels), base)


@pytest.mark.skipif("ADAPTER_HUB_TEST_LM" not in os.environ, reason="ADAPTER_HUB_TEST_LM names no folder with a small language model")
def test_a_causal_classifier_reads_the_last_token_also_where_padding_is_not_token_0(tmp_path: Path) -> None:
    """Previously short rows were classified at a position that pads them, in training alone."""
    base = FrozenBase.load(os.environ["ADAPTER_HUB_TEST_LM"])
    rows = [Example(row.text if i % 2 else f"{row.text}, and what else was told of it that day", row.label) for i, row in enumerate(ROWS)]
    result = train_classifier(base, rows, config=SHORT, folder=tmp_path)
    ref = AdapterRef("things", 1)
    engine = Engine(base, lambda _: read_adapter(tmp_path, labels=result.labels))
    answers = engine.predict([Request(row.text, ref) for row in result.validation])
    right = [one.label == row.label for one, row in zip(answers, result.validation, strict=True)]
    assert base.tokenizer.pad_token_id != 0 and np.mean(right) == pytest.approx(result.metrics["accuracy"])
    losses = [-np.log(one.scores[row.label or ""]) for one, row in zip(answers, result.validation, strict=True)]
    assert np.mean(losses) == pytest.approx(result.metrics["log_loss"], abs=1e-4)


def test_an_epoch_of_one_step_trains(base: FrozenBase, tmp_path: Path) -> None:
    """Previously the first step of the warm-up, with the rate 0, was all of the first epoch, and an adapter of zeros might be the best."""
    train_classifier(base, ROWS[:16], config=replace(CONFIG, epochs=1, batch_size=64, warmup_ratio=0.9), folder=tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_modules_that_are_not_there_are_named_beside_those_that_are(base: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"target_modules=\('nosuch',\) cannot be adapted.*dense, key, query, value"):
        train_classifier(base, ROWS, config=replace(SHORT, target_modules=("nosuch",)), folder=tmp_path)


def test_a_sequence_to_sequence_base_is_refused(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "t5", "t5"))
    with pytest.raises(InvalidInput, match="sequence-to-sequence"):
        train_classifier(base, ROWS, config=CONFIG, folder=tmp_path / "adapter")


def test_bad_rows_write_nothing(base: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="training row 3 has a text that is empty"):
        train_classifier(base, [*ROWS[:2], Example(" ", "fruit")], config=CONFIG, folder=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


SKY = [Example(frame.format("sky"), "air") for frame in FRAMES]
STILL = replace(CONFIG, learning_rate=1e-12, epochs=1)    # the weights stay where they begin


@pytest.mark.parametrize("shape", ["bert", "llama"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_warm_start_begins_with_the_old_weights_and_the_heads_rows_of_the_old_labels(tmp_path: Path, shape: str, dora: bool) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    short = replace(CONFIG, epochs=2, use_dora=dora)
    old = train_classifier(base, ROWS[:24], config=short, folder=tmp_path / "old")
    start, still = Start(old.folder, old.labels), replace(STILL, use_dora=dora)
    new = train_classifier(base, [*ROWS[:24], *SKY], config=still, folder=tmp_path / "new", start=start)
    assert new.labels == ("air", *old.labels)
    before, after = (load_file(result.folder / FILES[1]) for result in (old, new))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        kept = after[key] if after[key].shape == tensor.shape else after[key][1:]
        assert torch.allclose(kept, tensor, atol=1e-6), key
    assert sum(after[key].shape != tensor.shape for key, tensor in before.items()) == (2 if shape == "bert" else 1)    # the output layer's


def test_what_is_learned_on_with_fewer_layers_keeps_all_that_it_adapts(base: FrozenBase, trained: TrainResult, tmp_path: Path) -> None:
    """Previously `fast`, which adapts half of the layers, refused what the defaults had made: "lora_A.weight of (4, 32) has no place here"."""
    config = replace(STILL, layers_share=0.5)
    result = train_classifier(base, ROWS, config=config, folder=tmp_path, start=Start(trained.folder, trained.labels))
    before, after = (load_file(one.folder / FILES[1]) for one in (trained, result))
    assert before.keys() == after.keys() and all(torch.allclose(after[key], tensor, atol=1e-6) for key, tensor in before.items())


def test_a_start_that_does_not_fit_is_refused_with_the_reason(base: FrozenBase, trained: TrainResult, tmp_path: Path) -> None:
    start = Start(trained.folder, trained.labels)
    with pytest.raises(InvalidInput, match=r"lora_A\.weight of \(4, 32\) is \(2, 32\) here"):
        train_classifier(base, ROWS, config=replace(CONFIG, r=2), folder=tmp_path, start=start)
    with pytest.raises(InvalidInput, match="has no place here"):
        train_classifier(base, ROWS, config=replace(CONFIG, target_modules=("query",)), folder=tmp_path, start=start)
    with pytest.raises(InvalidInput, match="the label 'animal' is not among those to learn"):
        train_classifier(base, [row for row in ROWS if row.label != "animal"], config=CONFIG, folder=tmp_path, start=start)
