"""A classifier can be learned on encoders of many families, whatever their heads are made of, or is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.errors import AdapterRejected, InvalidInput, WrongBase
from adapter_hub.examples import Example
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.train import train_adapter
from tests.engine.reference import distance, references

TEXTS = ["hello there", "x", "a longer text of some words, and then some"]
WORDS = {"fruit": ("apple", "pear", "plum"), "tool": ("hammer", "saw", "drill")}
PAIRS = [(f"{before} {word}", word, kind) for before in ("a", "the", "my", "her", "one", "no") for kind, words in WORDS.items() for word in words]
ROWS = {
    "SEQ_CLS": [Example(text, kind) for text, _, kind in PAIRS],
    "TOKEN_CLS": [Example(t, extra={"spans": [{"start": t.index(word), "end": len(t), "label": kind}]}) for t, word, kind in PAIRS],
}
CONFIG = TrainConfig(r=4, epochs=2, steps_min=0, batch_size=8, learning_rate=1e-2)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 260}
BERT = {**SIZES, "vocab_size": 384, "pad_token_id": 0}
ENDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
XLM = {"vocab_size": 384, "n_words": 384, "emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 260}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 32}
FUNNEL = {"vocab_size": 384, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "block_repeats": [1, 1]}
BASES: dict[str, dict[str, Any]] = {    # by the class whose weights are saved
    "DistilBertModel": {"vocab_size": 384, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 260},
    "ModernBertModel": {**BERT, **ENDS},
    "DebertaV2Model": DEBERTA,
    "ElectraModel": {**BERT, "embedding_size": 16},
    "XLMModel": XLM,
    "EuroBertModel": {**BERT, **ENDS, "num_key_value_heads": 1, "mask_token_id": 3},
    "BertForMaskedLM": BERT,    # without a pooler, as the next three
    "ErnieForMaskedLM": BERT,
    "RemBertForMaskedLM": {**BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    "MobileBertForMaskedLM": {**BERT, "embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "ConvBertModel": {**BERT, "embedding_size": 32},
    "FNetModel": BERT,
    "XLNetModel": {"vocab_size": 384, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "FunnelModel": FUNNEL,
    "FunnelBaseModel": FUNNEL,
    "LongformerModel": {**BERT, "attention_window": 4},
    "AlbertForMaskedLM": {**BERT, "embedding_size": 16},
    "OPTForCausalLM": {
        "vocab_size": 384, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 2,
        "max_position_embeddings": 260, "pad_token_id": 0,
    },
    "MambaForCausalLM": {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
}
POOLED = ("ErnieForMaskedLM", "RemBertForMaskedLM", "MobileBertForMaskedLM")    # their classifiers have the pooler that the base lacks
LEARNED = ("DistilBertModel", "ModernBertModel", "DebertaV2Model", "ElectraModel", "XLMModel", "EuroBertModel", "BertForMaskedLM", *POOLED)


def base_of(name: str, folder: Path) -> FrozenBase:
    """Weights three times as large as fresh ones, or what stands beside a text would hardly show."""
    tiny_model(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(AutoConfig.for_model(kind.config_class.model_type, **BASES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return FrozenBase.load(folder)


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_classifier_in_a_mixed_batch_answers_as_peft(name: str, task: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    ref, other, plain = (AdapterRef(name, 1) for name in ("learned", "other", "plain"))
    config = replace(CONFIG, align_steps=3 if task == "SEQ_CLS" else 0)
    learned = train_adapter(base, ROWS[task], task_type=task, config=config, folder=tmp_path / "learned")
    second = train_adapter(base, ROWS[task], task_type=task, config=replace(CONFIG, use_dora=True, r=2, epochs=1), folder=tmp_path / "other")
    targets = sorted({module.rpartition(".")[2] for module in read_adapter(learned.folder, labels=learned.labels).deltas} - {"dense"})
    vectors = make_adapter(base, tmp_path / "plain", task_type=None, target_modules=targets)
    adapters = {one: read_adapter(it.folder, labels=it.labels) for one, it in ((ref, learned), (other, second))} | {plain: read_adapter(vectors)}
    for adapter in adapters.values():
        check_fits(adapter, base)
        assert check_acts(adapter, base) > 0
    outputs = iter(Engine(base, adapters.__getitem__).predict([Request(text, one) for one in (ref, plain, other) for text in TEXTS]))
    for folder in (learned.folder, None, second.folder):
        if folder is None:
            assert all(next(outputs).vector is not None for _ in TEXTS)
            continue
        for text, expected in zip(TEXTS, references(base, folder, task, TEXTS, len(learned.labels)), strict=True):
            output = next(outputs)
            if task == "SEQ_CLS":
                assert distance(list(output.scores.values()), expected) <= 1e-5
                continue
            places = [t for t, (start, end) in enumerate(base.encode([text])[0].offsets) if end > start]
            assert distance([token.score for token in output.tokens or ()], expected[places].max(axis=1)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "task", "fact"),
    [
        ("ConvBertModel", "SEQ_CLS", "ConvBertForSequenceClassification answers a text otherwise beside a longer one, to whose length it is padded"),
        ("FNetModel", "TOKEN_CLS", "FNetForTokenClassification answers a text otherwise beside a longer one, to whose length it is padded"),
        ("XLNetModel", "SEQ_CLS", "XLNetForSequenceClassification answers a text otherwise beside a longer one, to whose length it is padded"),
        ("XLNetModel", "TOKEN_CLS", "no linear layer of .* can be adapted; of transformer.*layer_1: .* an input that all rows of a batch share"),
        ("LongformerModel", "SEQ_CLS", "LongformerForSequenceClassification tells its transformer more than a text's tokens"),
        ("FunnelModel", "SEQ_CLS", "the head of FunnelForSequenceClassification is fed by a FunnelBaseModel, and the base is a FunnelModel"),
        ("FunnelBaseModel", "SEQ_CLS", "FunnelForSequenceClassification answers a text otherwise beside a longer one"),
        ("FunnelBaseModel", "TOKEN_CLS", "the head of FunnelForTokenClassification is fed by a FunnelModel, and the base is a FunnelBaseModel"),
        ("AlbertForMaskedLM", "SEQ_CLS", "the base was saved without its pooler, of which AlbertModel computes a part itself"),
        ("OPTForCausalLM", "TOKEN_CLS", "transformers has no AutoModelForTokenClassification for 'opt'"),
        ("MambaForCausalLM", "SEQ_CLS", "transformers has no AutoModelForSequenceClassification for 'mamba'"),
    ],
)
def test_a_base_whose_classifier_could_not_be_served_is_refused_before_it_is_trained(name: str, task: str, fact: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    with pytest.raises(WrongBase, match=fact):
        train_adapter(base, ROWS[task], task_type=task, config=CONFIG, folder=tmp_path / "adapter", checkpoint_folder=tmp_path / "kept")
    assert not (tmp_path / "adapter").exists() and not [*(tmp_path / "kept").iterdir()]


@pytest.mark.parametrize(("name", "fact"), [("LongformerModel", "tells its transformer more"), ("FunnelModel", "is fed by a FunnelBaseModel")])
def test_an_adapter_from_elsewhere_whose_head_could_not_be_served_is_refused(name: str, fact: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    targets = {"LongformerModel": ["intermediate.dense"], "FunnelModel": ["ffn.linear_1"]}[name]
    adapter = read_adapter(make_adapter(base, tmp_path / "adapter", target_modules=targets, size=0.2), labels=("x", "y"))
    with pytest.raises(AdapterRejected, match=fact):
        check_fits(adapter, base)
        check_acts(adapter, base)


def test_one_that_was_registered_before_that_was_asked_is_told_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("FNetModel", tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["intermediate.dense"], size=0.2)
    with Hub.create(tmp_path / "registry", base_model=tmp_path / "base", encoder="hash") as hub:
        with monkeypatch.context() as earlier:
            earlier.setattr("adapter_hub.adapters.checks.check_head_runs", lambda *given: None)
            ref = hub.register("things", folder, ["my plum"], labels=["x", "y"])
        [problem] = hub.verify().problems
        assert problem.where == str(ref) and "FNetForSequenceClassification answers a text otherwise beside a longer one" in problem.fact


def test_a_head_that_brings_its_pooler_is_run_before_it_is_taken_in(tmp_path: Path) -> None:
    """Previously such heads were not: that they are fed by hidden states alone was believed."""
    base = base_of("AlbertForMaskedLM", tmp_path / "base")    # its pooler is a half of one, and what is around it the transformer's
    saved = {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"], "size": 0.2}
    adapter = read_adapter(make_adapter(base, tmp_path / "adapter", **saved), labels=("x", "y"))
    with pytest.raises(WrongBase, match="the base was saved without its pooler, and what AlbertForSequenceClassification pools are not the hidden"):
        check_acts(adapter, base)
    assert base.body.pooler is None


def test_what_peft_does_not_adapt_is_named_with_those_that_it_may(tmp_path: Path) -> None:
    base, rows = base_of("MambaForCausalLM", tmp_path / "base"), [Example(text, f" {kind}") for text, _, kind in PAIRS]
    with pytest.raises(InvalidInput, match=r"'out_proj' is incompatible with Mamba.*named dt_proj, in_proj, lm_head, out_proj, x_proj: name those"):
        train_adapter(base, rows, task_type="CAUSAL_LM", config=CONFIG, folder=tmp_path / "adapter")
    result = train_adapter(base, rows, task_type="CAUSAL_LM", config=replace(CONFIG, target_modules=("in_proj",)), folder=tmp_path / "adapter")
    check_fits(read_adapter(result.folder), base)


@pytest.mark.parametrize("name", ["DebertaV2Model", "BertForMaskedLM"])
def test_a_hub_learns_on_from_such_a_classifier(name: str, tmp_path: Path) -> None:
    base_of(name, tmp_path / "base")
    rows = [{"text": row.text, "label": row.label} for row in ROWS["SEQ_CLS"]]
    with Hub.create(tmp_path / "registry", base_model=tmp_path / "base", encoder="hash") as hub:
        first = hub.learn("things", rows, config={"epochs": 2, "steps_min": 0, "r": 4}, promote="always")
        fewer = [row | {"text": row["text"] + "!"} for row in rows]
        second = hub.learn("things", fewer, start="warm", promote="always")
        assert (first.ref.version, second.ref.version) == (1, 2) and second.to_json()["gate"]
        [answer] = hub.predict(["my plum"], adapters="things")
        assert answer.label in WORDS and answer.adapter == second.ref
