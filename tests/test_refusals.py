"""Every broken adapter is refused by its own error, and the registry is byte for byte as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_hub.errors import CorruptAdapter, DoesNotFit, HubError, InvalidName, LabelsRequired, NoEffect, NonFinite, UnsupportedOption, WrongBase
from adapter_hub.hub import Hub
from adapter_hub.testing import make_adapter, tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("refusals")
    hub = Hub.create(root / "registry", base_model=tiny_model(root / "bert"), encoder="hash")
    hub.register("kept", make_adapter(hub.base, root / "kept"), ["one", "two"], labels=["a", "b"])
    return hub


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / WEIGHTS)

    return rewrite


def first(found: dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in sorted(found) if part in key)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def header_bit_flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[3] ^= 0x40
    (folder / WEIGHTS).write_bytes(data)


def a_pickle_by_another_name(folder: Path) -> None:
    torch.save({"x": torch.zeros(1)}, folder / WEIGHTS)


CASES: dict[str, tuple[Callable[[Path], Any], type[HubError], str]] = {
    "pickled weights": (pickled, CorruptAdapter, "only pickled weights, and pickle is never read"),
    "a pickle named safetensors": (a_pickle_by_another_name, CorruptAdapter, "not a whole safetensors file"),
    "cut short": (cut_short, CorruptAdapter, "not a whole safetensors file"),
    "a flipped bit in the header": (header_bit_flipped, CorruptAdapter, "not a whole safetensors file"),
    "no config": (lambda f: (f / CONFIG).unlink(), CorruptAdapter, "there is no adapter_config.json"),
    "a config that is not JSON": (lambda f: (f / CONFIG).write_text("{"), CorruptAdapter, "is not JSON"),
    "NaN": (tensors(lambda t: t[first(t, "lora_A")].fill_(float("nan"))), NonFinite, "holds NaN or infinity"),
    "infinity in the head": (tensors(lambda t: t[first(t, "classifier.weight")].fill_(float("inf"))), NonFinite, "holds NaN or infinity"),
    "whole numbers": (tensors(lambda t: t.update({(k := first(t, "lora_A")): t[k].int()})), DoesNotFit, "not floating point"),
    "a wrong shape": (tensors(lambda t: t.update({(k := first(t, "lora_A")): t[k][:, :-1]})), DoesNotFit, "has shape (4, 31)"),
    "a rank that the config denies": (config(r=8), DoesNotFit, "has shape (4, 32), the config says rank 8"),
    "a rank that no memory holds": (config(r=10**12), DoesNotFit, "has shape (4, 32), the config says rank 1000000000000"),
    "a target beside others that the base lacks": (
        lambda f: config(target_modules=[*json.loads((f / CONFIG).read_text())["target_modules"], "valve"])(f),
        DoesNotFit,
        "target_modules names 'valve', and the base has no such module (closest: 'value')",
    ),
    "weights of the base beside its own": (
        tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(4, 4)})),
        DoesNotFit,
        "save_embedding_layers=False",
    ),
    "a tensor missing": (tensors(lambda t: t.pop(first(t, "lora_B"))), DoesNotFit, "lacks lora_B"),
    "a module missing": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layer.0.attention.self.query" in k]),
        DoesNotFit,
        "and the weights lack it",
    ),
    "a target that the base lacks": (
        tensors(lambda t: t.update({k.replace("layer.1", "layer.7"): t.pop(k) for k in list(t) if "layer.1" in k})),
        DoesNotFit,
        "has no place in the base",
    ),
    "a target that PEFT cannot find": (config(target_modules=["no_such_layer"]), DoesNotFit, ""),
    "no effect": (tensors(lambda t: [t[k].zero_() for k in t if "lora_B" in k]), NoEffect, "leaves the base's output unchanged"),
    "a trained bias": (config(bias="all"), UnsupportedOption, "bias='all'"),
    "a bias of its own": (config(lora_bias=True), UnsupportedOption, "lora_bias=True"),
    "another method": (config(peft_type="IA3"), UnsupportedOption, "peft_type='IA3'"),
    "an altered base": (config(init_lora_weights="pissa"), UnsupportedOption, "it alters the base's weights"),
    "replicated layers": (config(layer_replication=[[0, 2]]), UnsupportedOption, "layer_replication"),
    "trained tokens": (config(trainable_token_indices=[1, 2]), UnsupportedOption, "trainable_token_indices"),
    "an option of the future": (config(use_wobble=3), UnsupportedOption, "use_wobble=3"),
    "an unknown task": (config(task_type="QUESTION_ANS"), UnsupportedOption, "task_type='QUESTION_ANS'"),
    "another base's adapter": (config(base_model_name_or_path="bert-base-cased"), WrongBase, "was made for 'bert-base-cased'"),
    "no base named": (config(base_model_name_or_path=None), WrongBase, "does not name its base model"),
    "a task that this base cannot do": (config(task_type="CAUSAL_LM"), LabelsRequired, "has no head"),
}


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"use_qalora": True}, "Train without it."),
        ({"peft_type": "IA3"}, "Train a LoRA, or make one of it with peft.convert_to_lora."),
        (
            {"init_lora_weights": "pissa"},
            "Save it with save_pretrained(folder, path_initial_model_for_weight_conversion=…): that makes a plain LoRA of it.",
        ),
        ({"task_type": "QUESTION_ANS"}, "Name one that it was trained for."),
        ({"use_dora": True, "target_modules": ["word_embeddings"]}, "Train without use_dora, or leave embeddings out of target_modules."),
        ({"modules_to_save": ["query"], "target_modules": ["value"]}, "Adapt that module instead (target_modules), and train again."),
    ],
)
def test_the_next_step_fits_the_option_that_is_refused(hub: Hub, tmp_path: Path, option: dict[str, Any], hint: str) -> None:
    """Previously each was told to convert the adapter to a plain LoRA."""
    made = option if "target_modules" in option else {}
    folder = make_adapter(hub.base, tmp_path / "adapter", **made)
    config(**({} if made else option))(folder)
    with pytest.raises(UnsupportedOption) as caught:
        hub.register("broken", folder, ["three"], labels=["a", "b"])
    assert caught.value.hint == hint


@pytest.mark.parametrize("case", CASES)
def test_a_broken_adapter_is_refused_and_nothing_is_stored(hub: Hub, tmp_path: Path, case: str) -> None:
    spoil, error, message = CASES[case]
    before = contents(hub)
    folder = make_adapter(hub.base, tmp_path / "adapter", seed=3)
    spoil(folder)
    with pytest.raises(error) as caught:
        hub.register("broken", folder, ["three"], labels=["a", "b"])
    assert type(caught.value) is error and message in str(caught.value)
    assert caught.value.hint
    assert contents(hub) == before and hub.verify().ok and [row.to_json()["name"] for row in hub.list()] == ["kept"]


@pytest.mark.parametrize("name", ["../x", "a/b/c", "con", "", "x" * 300, "bаnking", "/etc/passwd", "..", "x\x00y"])
def test_a_name_cannot_leave_the_registry(hub: Hub, tmp_path: Path, name: str) -> None:
    before = contents(hub)
    folder = make_adapter(hub.base, tmp_path / "adapter", seed=3)
    with pytest.raises(InvalidName):
        hub.register(name, folder, labels=["a", "b"])
    for verb in (hub.history, hub.show, hub.rollback):
        with pytest.raises(InvalidName):
            verb(name)
    assert contents(hub) == before


@pytest.mark.parametrize("examples", [[""], ["fine", "  "], [{"label": "x"}], [3], "one text", [None]])
def test_examples_that_cannot_be_used_are_refused(hub: Hub, tmp_path: Path, examples: Any) -> None:
    before = contents(hub)
    with pytest.raises(HubError):
        hub.register("broken", make_adapter(hub.base, tmp_path / "adapter", seed=3), examples, labels=["a", "b"])
    assert contents(hub) == before


def contents(hub: Hub) -> dict[str, str]:
    root = hub.registry.folder("kept").parents[2]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((root / "adapters").rglob("*")) if p.is_file()}
