"""How surely a text is written: the mixed forward against PEFT's own loss, one adapter and one text at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.engine import plan
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.engine.plan import MERGE_TOKENS
from adapter_hub.errors import InvalidInput
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import load_peft, make_adapter, task_model, tiny_model
from tests.engine.reference import FORMS

PAIRS = [("hello there my friend", " fine"), ("a", " the quick brown fox jumps over the lazy dog"), ("what is the balance of my account", " 3")]
TEMPLATE = "Q: {text}\nA:"
SHAPES = ("gpt2", "llama", "t5")
OWN = {BaseKind.CAUSAL: "CAUSAL_LM", BaseKind.SEQ2SEQ: "SEQ_2_SEQ_LM"}


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp(request.param), request.param), device=device)


def loss_of(base: FrozenBase, folder: Path | None, prompt: str, target: str) -> float:
    """transformers' own, summed over the target and its end."""
    model = task_model(base, OWN[base.kind]) if folder is None else load_peft(base, folder, OWN[base.kind])
    model.to(base.device)
    read = base.tokenizer(prompt)["input_ids"]
    written = base.tokenizer(target, add_special_tokens=False)["input_ids"] + [base.tokenizer.eos_token_id]
    whole, labels = (read + written, [-100] * len(read) + written) if base.kind is BaseKind.CAUSAL else (read, written)
    tensors = {"input_ids": torch.tensor([whole]), "labels": torch.tensor([labels])}
    with torch.inference_mode():
        return float(model(**{key: tensor.to(base.device) for key, tensor in tensors.items()}).loss) * len(written)


@pytest.mark.parametrize("merge_tokens", [MERGE_TOKENS * 1000, 0], ids=["mixed", "merged"])
def test_the_likelihood_of_a_target_is_pefts_loss(
    base: FrozenBase, merge_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MERGE_TOKENS", merge_tokens)
    versions = {AdapterRef(form, 1): make_adapter(base, tmp_path / form, seed=i, **FORMS[form]) for i, form in enumerate(("lora", "dora"))}
    plain, framed = AdapterRef("lora", 1), AdapterRef("framed", 1)
    versions[framed] = versions[plain]

    def load(ref: AdapterRef) -> Adapter:
        return read_adapter(versions[ref], labels=None, prompt_template=TEMPLATE if ref == framed else None, generation={"num_beams": 2})

    engine = Engine(base, load)
    asked = [(ref, *pair) for pair in PAIRS for ref in (None, *versions)]
    found = engine.score([Request(prompt, ref) for ref, prompt, _ in asked], [target for _, _, target in asked])
    for (ref, prompt, target), one in zip(asked, found, strict=True):
        expected = loss_of(base, versions.get(ref) if ref else None, TEMPLATE.replace("{text}", prompt) if ref == framed else prompt, target)
        assert one.nats == pytest.approx(expected, rel=1e-4), (ref, prompt)
        assert one.tokens == len(base.tokenizer(target, add_special_tokens=False)["input_ids"]) + 1
    assert engine.score([], []) == []
    assert len({round(one.nats, 3) for one in found}) == len(found)    # each adapter says something else


def test_too_long_a_target_is_cut_as_in_training(base: FrozenBase) -> None:
    [one] = Engine(base, lambda ref: pytest.fail()).score([Request("a " * 300, None)], [" b" * 400])
    assert one.tokens == len(base.encode_answer(" b" * 400)) <= base.tokens_limit


def test_a_row_that_writes_nothing_is_named(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "gpt2", "gpt2"))
    folder = make_adapter(base, tmp_path / "moods", task_type="SEQ_CLS")
    engine = Engine(base, lambda ref: read_adapter(folder, labels=("a", "b")))
    with pytest.raises(InvalidInput, match="text 2 of 2, moods@1: this row gets labels"):
        engine.score([Request("a", None), Request("a", AdapterRef("moods", 1))], ["b", "b"])
    with pytest.raises(InvalidInput, match="text 1 of 1 is empty"):
        engine.score([Request(" ", None)], ["b"])
