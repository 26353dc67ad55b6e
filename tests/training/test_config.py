"""TrainConfig refuses what no training could use, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adapter_hub.errors import InvalidInput
from adapter_hub.training.config import TrainConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 0),
        ("r", 8.0),
        ("r", True),
        ("alpha", 0),
        ("alpha", 16.5),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("epochs", 0),
        ("epochs", "10"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("batch_size", 0),
        ("warmup_ratio", 1),
        ("label_smoothing", 1.0),
        ("validation_share", 0.0),
        ("validation_share", 1.0),
        ("seed", -1),
        ("target_modules", ()),
        ("target_modules", ""),
        ("target_modules", ("query", 3)),
        ("use_dora", "yes"),
        ("progress", 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=setting):
        TrainConfig(**{setting: value})


def test_a_table_with_an_unknown_setting_names_it_and_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'lr' is not a training setting\..*learning_rate"):
        TrainConfig.from_dict({"lr": 1e-3})


def test_a_table_makes_the_config_that_its_settings_name() -> None:
    config = TrainConfig.from_dict({"r": 4, "target_modules": ["query", "value"], "seed": 7})
    assert config == TrainConfig(r=4, target_modules=("query", "value"), seed=7)


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().r = 0  # type: ignore[misc]


def test_a_list_is_as_good_as_a_tuple() -> None:
    config = TrainConfig(target_modules=["query"], report_to=["tensorboard"])  # type: ignore[arg-type]
    assert config == TrainConfig(target_modules=("query",), report_to=("tensorboard",))
