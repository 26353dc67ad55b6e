"""Heads run as upstream's own code runs them: encoders of other architectures than the tiny shapes, against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from tests.engine.reference import distance, references

TEXTS = ["hello there", "x", "a longer text of some words, and then some"]
LABELS = ("a", "b", "c")
SIZES = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
# what else the config needs, and what an adapter on it needs
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "roberta": ({}, {}),
    "electra": ({"embedding_size": 16}, {}),
    "albert": ({"embedding_size": 16}, {}),
    "mpnet": ({"pad_token_id": 1}, {}),
    "modernbert": (
        {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        {"modules_to_save": ["head", "classifier"], "target_modules": ["Wqkv", "Wo", "Wi"]},
    ),
}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_peft_on_every_architecture(architecture: str, task: str, tmp_path: Path) -> None:
    more, lora = ARCHITECTURES[architecture]
    folder = tiny_model(tmp_path / "base")
    AutoModel.from_config(AutoConfig.for_model(architecture, **{**SIZES, **more})).save_pretrained(folder)
    base = FrozenBase.load(folder)
    folders = {
        AdapterRef(f"a{i}", 1): make_adapter(base, tmp_path / str(i), task_type=task, outputs=3, seed=i, size=0.2, use_dora=bool(i), **lora)
        for i in range(2)
    }
    adapters = {ref: read_adapter(path, labels=LABELS) for ref, path in folders.items()}
    for adapter in adapters.values():
        check_fits(adapter, base)
        assert check_acts(adapter, base) > 0
    outputs = iter(Engine(base, adapters.__getitem__).predict([Request(text, ref) for ref in folders for text in TEXTS]))
    for path in folders.values():
        for text, expected in zip(TEXTS, references(base, path, task, TEXTS), strict=True):
            output = next(outputs)
            if task == "SEQ_CLS":
                assert distance(list(output.scores.values()), expected) <= 1e-5
                continue
            places = [t for t, (start, end) in enumerate(base.encode([text])[0].offsets) if end > start]
            assert output.tokens is not None
            assert distance([token.score for token in output.tokens], expected[places].max(axis=1)) <= 1e-5
