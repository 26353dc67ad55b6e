"""Layers below the first adapted one are computed once, and nothing shows it but the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, MPNetConfig, MPNetModel

from adapter_hub.adapters.checks import check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.examples import Example
from adapter_hub.testing import load_peft, task_model, tiny_model
from adapter_hub.training import frozen
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.frozen import HIDDEN, below, computed_once, layers_of
from adapter_hub.training.train import train_classifier

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers"), "animal": ("horse", "goat", "zebra", "yak")}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}", "that {}")
ROWS = [Example(frame.format(word), label) for frame in FRAMES for label, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=4, epochs=6, steps_min=0, batch_size=8, learning_rate=5e-3)
TEXTS = ["a fig", "the quick brown fox jumps over the lazy dog", "no", "one saw and one drill"]


@pytest.mark.parametrize("shape", ["bert", "gpt2", "llama"])
def test_from_the_kept_states_the_model_answers_as_from_the_text(tmp_path: Path, shape: str) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape))
    model = task_model(base, "SEQ_CLS", 3)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules="all-linear", exclude_modules=below(model, TrainConfig(layers_share=0.5)), init_lora_weights=False
    )
    peft = get_peft_model(model, config)
    peft.train(False)
    inputs = {key: base.tokenize(TEXTS)[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = peft(**inputs).logits
        with computed_once(peft, model, [inputs]) as hidden:
            assert hidden is not None and [len(row) for row in hidden] == inputs["attention_mask"].sum(dim=1).tolist()
            padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
            model.get_input_embeddings().weight.data.neg_()    # what is below is not asked any more
            torch.testing.assert_close(peft(**inputs, **{HIDDEN: padded}).logits, expected, atol=1e-5, rtol=0)
            model.get_input_embeddings().weight.data.neg_()
        torch.testing.assert_close(peft(**inputs).logits, expected, atol=0, rtol=0)


def test_where_all_layers_are_adapted_nothing_is_kept(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    model = task_model(base, "SEQ_CLS", 3)
    assert below(model, TrainConfig()) is None
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    with computed_once(peft, model, [dict(base.tokenize(TEXTS))]) as hidden:
        assert hidden is None


def test_an_adapted_embedding_is_not_below_anything(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    model = task_model(base, "SEQ_CLS", 3)
    targets = ["word_embeddings", "layer.1.attention.self.query"]
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=targets))
    with computed_once(peft, model, [dict(base.tokenize(TEXTS))]) as hidden:
        assert hidden is None


def test_layers_that_hand_on_more_than_hidden_states_are_computed_in_full(tmp_path: Path) -> None:
    """MPNet's return a tuple. The preset that adapts the upper half trains there all the same."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "bert"))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "mpnet")
    tokenizer.save_pretrained(tmp_path / "mpnet")
    base = FrozenBase.load(tmp_path / "mpnet")
    model = task_model(base, "SEQ_CLS", 3)
    exclude = below(model, TrainConfig(layers_share=0.5))
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=exclude))
    inputs = {key: base.tokenize(TEXTS)[key] for key in ("input_ids", "attention_mask")}
    with computed_once(peft, model, [inputs]) as hidden:
        assert exclude is not None and hidden is None
    train_classifier(base, ROWS, task="things", config=replace(CONFIG, epochs=1, layers_share=0.5), folder=tmp_path / "adapter")


def test_two_stacks_are_not_taken_for_one(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "t5", "t5"))
    assert layers_of(base.model) is None


def test_only_the_upper_layers_get_an_adapter_which_fits_the_whole_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    config = replace(CONFIG, layers_share=0.5)
    result = train_classifier(base, ROWS, config=config, folder=tmp_path / "adapter")
    adapter = read_adapter(result.folder, labels=result.labels)
    check_fits(adapter, base)
    assert {name.split("layer.")[1][0] for name in adapter.deltas if "layer." in name} == {"1"}
    model = load_peft(base, result.folder, "SEQ_CLS", outputs=3)
    encoded = base.tokenize([row.text for row in result.validation])
    with torch.no_grad():
        logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    answers = [result.labels[number] for number in logits.argmax(dim=1).tolist()]
    assert result.metrics["accuracy"] == sum(a == row.label for a, row in zip(answers, result.validation, strict=True)) / len(answers)
    # Too large to be kept: the same task, computed anew in each epoch.
    monkeypatch.setattr(frozen, "BYTES_MAX", 1)
    anew = train_classifier(base, ROWS, config=config, folder=tmp_path / "anew")
    assert anew.metrics["accuracy"] == pytest.approx(result.metrics["accuracy"], abs=0.15)
