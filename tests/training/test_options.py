"""Options of the loss and of what training sees, presets, and the search for a learning rate."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers.trainer_pt_utils import LabelSmoother

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.errors import DoesNotFit, InvalidInput, UnsupportedOption
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import PRESETS, TrainConfig
from adapter_hub.training.loss import class_weights, classifier_loss, varied
from adapter_hub.training.train import train_classifier
from adapter_hub.training.trials import _swept, find_learning_rate
from adapter_hub.training.warm import Start
from tests.engine.reference import distance, references

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers")}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}")
ROWS = [Example(frame.format(word), label) for frame in FRAMES for label, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=4, epochs=2, steps_min=0, batch_size=8, learning_rate=5e-3)
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model")))


def test_the_plain_loss_is_transformers_own() -> None:
    outputs = SimpleNamespace(logits=LOGITS)
    loss = classifier_loss(TrainConfig(label_smoothing=0.1), None)
    torch.testing.assert_close(loss(outputs, LABELS), LabelSmoother(epsilon=0.1)({"logits": LOGITS}, LABELS))
    torch.testing.assert_close(loss(outputs, LABELS, num_items_in_batch=12), loss(outputs, LABELS) / 2)


def test_r_drop_adds_what_two_passes_disagree_in() -> None:
    other = LOGITS.flip(0)
    config = TrainConfig(r_drop=2.0, label_smoothing=0.0)
    loss = classifier_loss(config, None)(SimpleNamespace(logits=torch.cat([LOGITS, other])), LABELS)
    p, q = LOGITS.softmax(1), other.softmax(1)
    apart = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)) / 2
    mean = (torch.nn.functional.cross_entropy(LOGITS, LABELS) + torch.nn.functional.cross_entropy(other, LABELS)) / 2
    torch.testing.assert_close(loss, mean + 2.0 / 2 * apart.mean())
    same = classifier_loss(config, None)(SimpleNamespace(logits=torch.cat([LOGITS, LOGITS])), LABELS)
    torch.testing.assert_close(same, torch.nn.functional.cross_entropy(LOGITS, LABELS))


def test_class_weights_are_scikit_learns() -> None:
    targets = np.array([0] * 9 + [1] * 2 + [2])
    np.testing.assert_allclose(class_weights(targets, 3).numpy(), compute_class_weight("balanced", classes=np.arange(3), y=targets), rtol=1e-6)
    weighed = classifier_loss(TrainConfig(label_smoothing=0.0), torch.tensor([3.0, 1.0, 1.0]))
    plain = torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(weighed(SimpleNamespace(logits=LOGITS), LABELS), (plain * torch.tensor([3.0, 1, 1, 1, 1, 3])).mean())


def test_token_dropout_hides_inner_tokens_only() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": mask}
    hidden = varied(inputs, TrainConfig(token_dropout=0.999))["attention_mask"]
    assert hidden.tolist() == [[1, 0, 0, 0, 1], [1, 0, 1, 0, 0]]
    assert varied(inputs, TrainConfig())["attention_mask"] is mask


@pytest.mark.parametrize(
    "option",
    [
        {"r_drop": 1.0}, {"token_dropout": 0.2}, {"noise": 5.0}, {"class_weights": True}, {"accumulation": 2}, {"precision": "bfloat16"},
        {"schedule": "cosine"}, {"base_dropout": False},
    ],
    ids=lambda option: next(iter(option)),
)
def test_each_option_changes_what_is_trained(base: FrozenBase, tmp_path: Path, option: dict[str, object]) -> None:
    rows = ROWS[:-6]    # not balanced, or class weights would do nothing
    found = []
    for name, config in (("plain", CONFIG), ("with", TrainConfig.from_dict({**vars_of(CONFIG), **option}))):
        result = train_classifier(base, rows, config=config, folder=tmp_path / name)
        assert math.isfinite(result.metrics["log_loss"])
        found.append(hashlib.sha256((result.folder / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert found[0] != found[1]


def vars_of(config: TrainConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("r", "epochs", "steps_min", "batch_size", "learning_rate")}


def test_pissa_begins_with_singular_vectors_and_is_written_for_the_base_as_it_is(base: FrozenBase, tmp_path: Path) -> None:
    plain = train_classifier(base, ROWS, config=CONFIG, folder=tmp_path / "plain")
    result = train_classifier(base, ROWS, config=replace(CONFIG, pissa=True), folder=tmp_path / "pissa")
    adapter, ref = read_adapter(result.folder, labels=result.labels), AdapterRef("pissa", 1)
    outputs = Engine(base, lambda _: adapter).predict([Request(row.text, ref) for row in result.validation])
    losses = [-math.log(output.scores[row.label or ""]) for output, row in zip(outputs, result.validation, strict=True)]
    assert np.mean(losses) == pytest.approx(result.metrics["log_loss"], abs=1e-5) != plain.metrics["log_loss"]
    written = json.loads((result.folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 32, True)
    again = train_classifier(base, ROWS, config=replace(CONFIG, pissa=True), folder=tmp_path / "again")
    assert (again.folder / "adapter_model.safetensors").read_bytes() == (result.folder / "adapter_model.safetensors").read_bytes()
    for other in ("use_dora", "use_rslora"):
        with pytest.raises(InvalidInput, match=f"pissa and {other} do not go together"):
            replace(CONFIG, pissa=True, **{other: True})
    with pytest.raises(InvalidInput, match="pissa begins with the base's singular vectors"):
        train_classifier(base, ROWS, config=replace(CONFIG, pissa=True), folder=tmp_path / "x", start=Start(plain.folder, plain.labels))


@pytest.mark.parametrize(
    ("lora", "more", "ranks"),
    [
        ({"rank_pattern": {"query": 2, "1.attention.self.value": 6}, "alpha_pattern": {"query": 5}}, {}, {(0, 2), (1, 2), (0, 4), (1, 6)}),
        ({"rank_pattern": {"query": 2}}, {"use_rslora": True, "use_dora": True}, {(0, 2), (1, 2), (0, 4), (1, 4)}),
        ({"layers_to_transform": [1]}, {}, {(1, 4)}),
        ({"layers_to_transform": 0, "layers_pattern": "layer"}, {}, {(0, 4)}),
        ({"exclude_modules": ["value", "dense"]}, {"target_modules": "all-linear"}, {(0, 4), (1, 4)}),
        ({"exclude_modules": r".*(value|dense)"}, {"target_modules": "all-linear", "layers_share": 0.5}, {(1, 4)}),
        ({"init_lora_weights": "gaussian"}, {}, {(0, 4), (1, 4)}),
        ({"init_lora_weights": "orthogonal"}, {}, {(0, 4), (1, 4)}),
        ({"init_lora_weights": False}, {"pissa": False}, {(0, 4), (1, 4)}),
    ],
)
def test_more_of_pefts_settings_are_trained_with_and_served_as_peft_does(
    base: FrozenBase, tmp_path: Path, lora: dict[str, object], more: dict[str, object], ranks: set[tuple[int, int]]
) -> None:
    config = replace(CONFIG, **{"target_modules": ("query", "value"), "lora": lora, **more})
    result = train_classifier(base, ROWS, config=config, folder=tmp_path)
    adapter, ref = read_adapter(result.folder, labels=result.labels), AdapterRef("a", 1)
    check_fits(adapter, base)
    assert check_acts(adapter, base) > 0
    assert {(int(name.split("layer.")[1][0]), delta.a.shape[0]) for name, delta in adapter.deltas.items()} == ranks
    assert all("value" not in name for name in adapter.deltas) or "exclude_modules" not in lora
    texts = ["a pear", "the quick brown fox jumps over the lazy dog"]
    outputs = Engine(base, lambda _: adapter).predict([Request(text, one) for text in texts for one in (ref, None)])[::2]
    for output, expected in zip(outputs, references(base, result.folder, "SEQ_CLS", texts, len(result.labels)), strict=True):
        assert distance([*output.scores.values()], expected) <= 1e-5


def test_what_is_excluded_is_not_among_the_target_modules_that_are_stored(base: FrozenBase, tmp_path: Path) -> None:
    """Or what is learned on from it would adapt it."""
    result = train_classifier(base, ROWS, config=replace(CONFIG, layers_share=0.5, lora={"exclude_modules": ["key", "dense"]}), folder=tmp_path)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")]
    assert config["exclude_modules"] is None


def test_how_the_weights_begin_decides_what_they_become(base: FrozenBase, tmp_path: Path) -> None:
    found = set()
    for init in (True, "gaussian", "orthogonal"):
        folder = train_classifier(base, ROWS, config=replace(CONFIG, lora={"init_lora_weights": init}), folder=tmp_path / str(init)).folder
        found.add(hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("config", "error", "fact"),
    [
        ({"target_modules": ("position_embeddings",)}, UnsupportedOption, "an input that all rows of a batch share"),
        ({"target_modules": ("word_embeddings",), "use_dora": True}, UnsupportedOption, "only linear modules are run as DoRA"),
        ({"target_modules": ("query", "nosuch")}, DoesNotFit, "target_modules names 'nosuch', and the base has no such module"),
        ({"lora": {"rank_pattern": {"nothere": 4}}}, InvalidInput, "rank_pattern has 'nothere', and no adapted .* There are: dense, key, query"),
        ({"lora": {"alpha_pattern": {"key": 4}}, "target_modules": ("query",)}, InvalidInput, "'key', and no adapted module .* There are: query"),
        ({"lora": {"exclude_modules": ["key", "nothere"]}}, InvalidInput, "lora's exclude_modules has 'nothere', and no module has that name"),
        ({"lora": {"exclude_modules": "bert.nothere"}}, InvalidInput, "lora's exclude_modules has 'bert.nothere', and no module has that name"),
        ({"lora": {"layers_to_transform": [1, 7]}, "target_modules": ("query",)}, InvalidInput, "has 7, and no .* Layers are 0, 1"),
        ({"lora": {"layers_pattern": "layer"}, "target_modules": ("query",)}, InvalidInput, "lora={'layers_pattern': 'layer'} cannot be adapted"),
        ({"lora": {"layers_to_transform": [1]}}, InvalidInput, "`layers_to_transform` cannot be used when `target_modules` is a str"),
        ({"lora": {"layers_to_transform": [7]}, "target_modules": ("query",)}, InvalidInput, "You specified 'layers_to_transform'"),
    ],
)
def test_what_could_not_be_served_is_refused_before_it_is_trained(
    base: FrozenBase, tmp_path: Path, config: dict[str, object], error: type[Exception], fact: str
) -> None:
    with pytest.raises(error, match=fact):
        train_classifier(base, ROWS, config=replace(CONFIG, **config), folder=tmp_path / "adapter", checkpoint_folder=tmp_path / "kept")
    assert not (tmp_path / "adapter").exists() and not [*(tmp_path / "kept").iterdir()]    # free for a config that is mended


def test_training_stops_when_epochs_get_no_better(base: FrozenBase, tmp_path: Path) -> None:
    wild = replace(CONFIG, epochs=30, learning_rate=1.0, warmup_ratio=0.0, patience=2, report_to=())
    result = train_classifier(base, ROWS, config=wild, folder=tmp_path / "adapter", checkpoint_folder=tmp_path / "kept")
    assert result.metrics["epoch"] < 28    # else patience had no part in it


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_config_and_may_be_named(base: FrozenBase, tmp_path: Path, name: str) -> None:
    assert TrainConfig.of(name) == TrainConfig.preset(name)
    assert TrainConfig.from_dict({"preset": name, "seed": 3}) == TrainConfig.preset(name, seed=3) == replace(TrainConfig.preset(name), seed=3)


def test_a_preset_trains_by_its_name(base: FrozenBase, tmp_path: Path) -> None:
    result = train_classifier(base, ROWS, config="fast", folder=tmp_path / "adapter")
    assert result.report.rows == len(ROWS)
    with pytest.raises(InvalidInput, match=r"'quick' is not a preset\. There are: fast, balanced, thorough"):
        train_classifier(base, ROWS, config="quick", folder=tmp_path / "other")


@pytest.mark.parametrize(
    "setting",
    [
        {"schedule": "steps"}, {"precision": "int8"}, {"patience": -1}, {"accumulation": 0}, {"layers_share": 0.0}, {"r_drop": -1.0},
        {"token_dropout": 1.0}, {"noise": 5.0, "layers_share": 0.5}, {"report_to": ("",)},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(setting))):
        TrainConfig.from_dict(setting)


def test_a_sweep_suggests_a_rate_below_the_one_at_which_the_loss_rises(base: FrozenBase) -> None:
    sweep = find_learning_rate(base, ROWS, config=CONFIG, steps=40, rate_max=3.0)
    assert sweep.rates[0] == pytest.approx(1e-5) and sweep.rates[-1] == pytest.approx(3.0)
    assert 1e-4 < sweep.suggested < 0.3
    given = [{"text": row.text, "label": row.label} for row in ROWS]    # as `learn` takes them
    assert sweep == find_learning_rate(base, given, config=CONFIG, steps=40, rate_max=3.0)
    with pytest.raises(InvalidInput, match="a sweep of 3 steps"):
        find_learning_rate(base, ROWS, steps=3)
    apart = [Example(f"{row.text} {number}", extra={"labels": [f"l{number}", f"l{number + 1}"]}) for number, row in enumerate(ROWS[:8])]
    sweep = find_learning_rate(base, apart, problem_type="multi_label_classification", config=CONFIG, steps=10)    # sets that all occur once
    assert len(sweep.rates) == 10


def test_a_loss_that_is_not_finite_ends_the_sweep() -> None:
    assert _swept([1.0, 2.0, 4.0, 8.0], [3.0, 1.0, math.nan, 0.0]).rates == (1.0, 2.0)
    with pytest.raises(InvalidInput, match="not finite at the rate 1"):
        _swept([1.0], [math.inf])
