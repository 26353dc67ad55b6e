"""TrainConfig refuses what no training could use, by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from adapter_hub.errors import InvalidInput
from adapter_hub.training.config import LORA, TrainConfig


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
    with pytest.raises(InvalidInput, match=r"target_modules='\[' is no regular expression: unterminated"):
        TrainConfig(target_modules="[")
    config = TrainConfig(target_modules=["query"], report_to=["tensorboard"])  # type: ignore[arg-type]
    assert config == TrainConfig(target_modules=("query",), report_to=("tensorboard",))


def test_a_mapping_is_as_good_as_a_config() -> None:
    assert TrainConfig.of({"preset": "fast", "r": 16}) == TrainConfig.preset("fast", r=16)


def test_more_of_pefts_settings_are_kept_as_json_would_have_them() -> None:
    given = {"rank_pattern": {"query": 2}, "layers_to_transform": (0, 1), "init_lora_weights": "gaussian"}
    config = TrainConfig(lora=given)
    given["rank_pattern"]["query"] = 3  # type: ignore[index]
    assert config.lora == {"rank_pattern": {"query": 2}, "layers_to_transform": (0, 1), "init_lora_weights": "gaussian"}
    assert json.loads(json.dumps(dataclasses.asdict(config)))["lora"] == {**config.lora, "layers_to_transform": [0, 1]}
    again = TrainConfig.from_dict({"lora": dict(config.lora or {})})
    assert config == again != TrainConfig() and hash(config) == hash(again)


def test_more_of_pefts_settings_stay_as_they_were_checked() -> None:
    """Previously `config.lora["r"] = 9` was accepted."""
    config = TrainConfig(lora={"rank_pattern": {"query": 2}, "layers_to_transform": [0, 1]})
    lora: Any = config.lora
    changes = [
        lambda: lora.__setitem__("r", 9), lambda: lora["rank_pattern"].update(query=0), lambda: lora["layers_to_transform"].append(2),
        lambda: lora.pop("rank_pattern"), lambda: lora["rank_pattern"].clear(), lambda: lora.setdefault("r", 9), lambda: lora.__ior__({"r": 9}),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises((TypeError, AttributeError)):
            change()
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config), TrainConfig(lora=lora)):
        assert same == config and repr(same) == repr(config)
        with pytest.raises(TypeError):
            same.lora["rank_pattern"]["query"] = 0
    assert TrainConfig(lora={"rank_pattern": None, "alpha_pattern": {}, "exclude_modules": []}) == TrainConfig()    # of which PEFT takes none


def test_a_config_without_them_is_known_by_what_it_was_before_they_were_there() -> None:
    assert repr(TrainConfig(lora={})) == repr(TrainConfig()) and repr(TrainConfig()).endswith("report_to=(), progress=False)")
    assert repr(TrainConfig(lora={"rank_pattern": {"a": 1}})).endswith("progress=False, lora={'rank_pattern': {'a': 1}})")


@pytest.mark.parametrize(
    ("lora", "fact"),
    [
        ([], "is not a mapping"),
        ({"rank_pattern": {"query"}}, "cannot be written to an adapter's config"),
        ({"r": 4}, "lora has 'r', which is a setting beside it. Use r="),
        ({"lora_alpha": 4}, "Use alpha="),
        ({"bias": "all"}, "lora has bias='all': this option is not supported."),
        ({"trainable_token_indices": [1]}, "lora has trainable_token_indices=[1]: it replaces vectors of the base's vocabulary"),
        ({"init_lora_weights": "olora"}, "lora has init_lora_weights='olora', not one of True, False, gaussian, orthogonal. For PiSSA use pissa"),
        ({"rank_pattern": {"query": 0}}, "lora: a value has the wrong form (0 is not a rank)"),
        ({"exclude_modules": "("}, "is not a regular expression"),
        ({"task_type": "SEQ_CLS"}, f"lora has 'task_type', which is nothing to be set here. There are: {', '.join(LORA)}."),
        ({"rank_patern": {}}, "lora has 'rank_patern', which is nothing to be set here."),
        ({"modules_to_save": ["embeddings"]}, "lora has 'modules_to_save': the head is always saved whole, and the base's own modules are frozen."),
        ({"alpha_pattern": {"query": "4"}}, "lora has alpha_pattern={'query': '4'}, which is not a mapping of names to numbers"),
        ({"alpha_pattern": {"query": float("nan")}}, "which is not a mapping of names to numbers"),
        ({"rank_pattern": ["query"]}, "lora has rank_pattern=['query'], which is not a mapping of names to ranks"),
        ({"exclude_modules": [3]}, "lora has exclude_modules=[3], which is not a regular expression, or a list of names"),
        ({"layers_pattern": {"layer": 1}}, "which is not a name, or a list of names"),
        ({"layers_to_transform": ["1"]}, "lora has layers_to_transform=['1'], which is not a layer's number from 0, or a list of them"),
        ({"layers_to_transform": True}, "which is not a layer's number"),
        ({"init_lora_weights": 1}, "lora has init_lora_weights=1, not one of True, False"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"query": 3}}, "which needs even ranks, and one is 3. Use 4."),
    ],
)
def test_what_no_adapter_could_be_registered_with_is_refused_by_name(lora: Any, fact: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        TrainConfig(lora=lora)
    assert fact in str(caught.value)


def test_an_orthogonal_beginning_needs_an_even_rank() -> None:
    with pytest.raises(InvalidInput, match="which needs even ranks, and one is 5"):
        TrainConfig(r=5, lora={"init_lora_weights": "orthogonal"})
    assert TrainConfig(r=5, lora={"init_lora_weights": "orthogonal", "rank_pattern": {".*": 4}}).r == 5    # which no module has


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "init_lora_weights"])
def test_pissa_has_one_rank_and_its_own_weights(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"pissa and lora's {name} do not go together"):
        TrainConfig(pissa=True, lora={name: "gaussian" if name == "init_lora_weights" else {"query": 4}})
