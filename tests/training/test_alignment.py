"""Before the labels: what the head reads learns to say what all tokens say, and nothing but the adapter moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.testing import tiny_model
from adapter_hub.training import frozen
from adapter_hub.training.alignment import _map, align, hint_of
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.data import Parts
from adapter_hub.training.loop import batches
from adapter_hub.training.probe import inputs_of, output_layer
from adapter_hub.training.scope import own_randomness
from adapter_hub.training.setup import set_up
from adapter_hub.training.tasks import Features, Task
from adapter_hub.training.train import train_adapter, train_classifier
from adapter_hub.training.trials import find_learning_rate

WORDS = ("apple", "pear", "plum", "hammer", "saw", "drill")
TEXTS = [(f"{before} {word} {after}", word) for before in ("a", "my", "the") for word in WORDS for after in ("", "now", "here")]
ROWS = [Example(text, "fruit" if word in WORDS[:3] else "tool") for text, word in TEXTS]
CONFIG = TrainConfig(r=4, epochs=1, steps_min=0, batch_size=8, learning_rate=5e-3, dropout=0.0, base_dropout=False)


@pytest.fixture(scope="module", params=["bert", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("model") / "base", request.param))


def whole_of(model: PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model())


def apart(model: PeftModel, features: list[Features], hint: torch.Tensor) -> float:
    """Mean cosine distance of the best linear map of what the head reads from the mean of all tokens."""
    whole = whole_of(model)
    layer = output_layer(whole)
    assert layer is not None
    read: NDArray[np.float64] = inputs_of(layer, model, batches(features, whole.config.pad_token_id))
    weight, bias = _map(torch.from_numpy(read), hint)
    return float(1 - torch.nn.functional.cosine_similarity(torch.from_numpy(read).float() @ weight + bias, hint).mean())


def test_the_heads_input_says_more_of_the_text_and_the_adapter_alone_has_moved(base: FrozenBase) -> None:
    with own_randomness(0), set_up(base, Task.of(ROWS, None, None), CONFIG, Parts(ROWS, (), ())) as (model, (features, _, _)):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        hint = hint_of(whole_of(model), features)    # of an adapter that adds nothing yet
        distance = apart(model, features, hint)
        align(model, features, hint, replace(CONFIG, align_steps=60))
        assert apart(model, features, hint) < 0.7 * distance
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved and all(".lora_" in name for name in moved)
        assert not any(parameter.grad is not None for parameter in model.parameters())


def test_what_is_meant_is_the_frozen_bases_mean_over_the_tokens(base: FrozenBase) -> None:
    with own_randomness(0), set_up(base, Task.of(ROWS, None, None), CONFIG, Parts(ROWS, (), ())) as (model, (features, _, _)):
        found = hint_of(whole_of(model), features)
    means = []
    for ids in base.encode([row.text for row in ROWS]):
        with torch.no_grad():
            hidden = base.body(input_ids=torch.tensor([ids.ids["input_ids"]]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0][0]
        means.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0))
    expected = torch.stack(means)
    torch.testing.assert_close(found, expected - expected.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_an_aligned_training_gives_the_same_bytes_again_and_others_than_without(base: FrozenBase, tmp_path: Path) -> None:
    def weights(name: str, steps: int) -> bytes:
        train_classifier(base, ROWS, config=replace(CONFIG, align_steps=steps), folder=tmp_path / name)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert weights("once", 5) == weights("again", 5) != weights("without", 0)


def test_what_frozen_layers_make_of_the_rows_is_computed_once_for_it_too(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = replace(CONFIG, align_steps=20, layers_share=0.5), []
    for most in (frozen.BYTES_MAX, 0):    # 0: layer by layer in every step
        monkeypatch.setattr(frozen, "BYTES_MAX", most)
        with own_randomness(0), set_up(base, Task.of(ROWS, None, None), config, Parts(ROWS, (), ())) as (model, (features, _, _)):
            assert (frozen.HIDDEN in features[0]) is (most > 0)
            found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad})
    once, anew = found
    assert any(".lora_" in name for name in once) and once.keys() == anew.keys()
    for name, weights in once.items():
        torch.testing.assert_close(weights, anew[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_varies_the_rows_of_later_steps_leaves_the_alignment_as_it_is(base: FrozenBase, share: float) -> None:
    """Previously R-Drop's second pass met one hint a row: "The size of tensor a (16) must match the size of tensor b (8)"."""
    found = []
    for more in ({}, {"r_drop": 1.0, "token_dropout": 0.3}):
        config = replace(CONFIG, align_steps=5, layers_share=share, **more)
        with own_randomness(0), set_up(base, Task.of(ROWS, None, None), config, Parts(ROWS, (), ())) as (model, (features, _, _)):
            found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".lora_" in name})
            batch = next(batches(features, whole_of(model).config.pad_token_id))
            assert len(model.train()(**batch).logits) == len(batch["input_ids"]) * (2 if more else 1)
    assert all(torch.equal(weights, found[1][name]) for name, weights in found[0].items())


def test_alignment_is_refused_where_it_does_not_fit(base: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="pissa and align_steps=5 do not go together"):
        TrainConfig(pissa=True, align_steps=5)
    for wrong in (-1, 2.5, True):
        with pytest.raises(InvalidInput, match=r"align_steps=.* is not a whole number of at least 0"):
            TrainConfig(align_steps=wrong)  # type: ignore[arg-type]
    spans = [Example(text, extra={"spans": [{"start": 0, "end": 1, "label": "first"}]}) for text, _ in TEXTS]
    with pytest.raises(InvalidInput, match="align_steps=5 is for heads that read a text as one"):
        train_adapter(base, spans, task_type="TOKEN_CLS", config=TrainConfig(align_steps=5), folder=tmp_path)
    with pytest.raises(InvalidInput, match="align_steps=5 is for heads that read a text as one"):
        find_learning_rate(base, spans, task_type="TOKEN_CLS", config=TrainConfig(align_steps=5))
    assert repr(TrainConfig(align_steps=0)) == repr(TrainConfig()) != repr(TrainConfig(align_steps=5))
