"""PEFT's files as tensors, and the strict questions that are asked of them before anything is stored."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
)

from adapter_hub.adapters.checks import PROBE, applied, check_acts, check_fits
from adapter_hub.adapters.config import parse_config
from adapter_hub.adapters.patterns import check_pattern, matches_end
from adapter_hub.adapters.source import fetch_adapter
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.errors import CorruptAdapter, DoesNotFit, InvalidInput, LabelsRequired, NoEffect, NonFinite, UnsupportedOption, WrongBase
from adapter_hub.testing import load_peft, make_adapter, task_model, tiny_model

MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("llama"), "llama"))


# ---- config ---------------------------------------------------------------------------------------------------------


def test_what_peft_writes_by_itself_is_accepted() -> None:
    written = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS").to_dict()
    settings = parse_config(json.loads(json.dumps(written, default=lambda value: sorted(value) if isinstance(value, set) else str(value))))
    assert settings.r == 4 and settings.task_type == "SEQ_CLS"


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_pefts_own_for_every_module(bert: FrozenBase, rslora: bool) -> None:
    config = LoraConfig(
        r=3, lora_alpha=7, use_rslora=rslora, target_modules="all-linear",
        rank_pattern={"query": 5, r"layer\.1\..*dense": 2}, alpha_pattern={"layer.0.attention.self.query": 13},
    )
    model = get_peft_model(task_model(bert, None), config)
    settings = parse_config(MINIMAL | {key: getattr(config, key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")})
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 13
    for name, module in layers.items():
        assert settings.rank(name) == module.r["default"]
        assert math.isclose(settings.scaling(name), module.scaling["default"])


@pytest.mark.parametrize(
    ("changes", "error", "fact"),
    [
        ({"r": 0}, CorruptAdapter, "0 is not a rank"),
        ({"r": True}, CorruptAdapter, "True is not a rank"),
        ({"r": "four"}, CorruptAdapter, "wrong form"),
        ({"lora_alpha": float("inf")}, CorruptAdapter, "lora_alpha is not finite"),
        ({"rank_pattern": ["query"]}, CorruptAdapter, "wrong form"),
        ({"rank_pattern": {"(": 4}}, CorruptAdapter, "wrong form"),
        ({"alora_invocation_tokens": [1]}, UnsupportedOption, "alora_invocation_tokens=[1]"),
        ({"target_parameters": ["x"]}, UnsupportedOption, "target_parameters"),
        ({"use_qalora": True}, UnsupportedOption, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_16"}, UnsupportedOption, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, UnsupportedOption, "it alters the base's weights"),
        ({"peft_type": "ADALORA"}, UnsupportedOption, "only LORA adapters"),
        ({"peft_type": None}, UnsupportedOption, "only LORA adapters"),
        ({"task_type": ["SEQ_CLS"]}, UnsupportedOption, "task_type=['SEQ_CLS']"),
        ({"init_lora_weights": {}}, UnsupportedOption, "init_lora_weights={}"),
        ({"exclude_modules": "("}, CorruptAdapter, "'(' is not a regular expression"),
        ({"layers_pattern": "("}, CorruptAdapter, "'(' is not a regular expression"),
        ({"layers_pattern": ["h", "("]}, CorruptAdapter, "'(' is not a regular expression"),
        ({"rank_pattern": {"(?i)QUERY": 4}}, CorruptAdapter, "'(?i)QUERY' is not a regular expression"),
        ({"modules_to_save": "classifier"}, CorruptAdapter, "modules_to_save='classifier' is not a list of names"),
        ({"modules_to_save": ["("]}, CorruptAdapter, "'(' is not a regular expression"),
        ({"lora_alpha": 10**400}, CorruptAdapter, "wrong form"),
        ({"base_model_name_or_path": 5}, CorruptAdapter, "5 is not text"),
    ],
)
def test_a_config_is_refused_by_the_name_of_the_key(changes: dict[str, Any], error: type[Exception], fact: str) -> None:
    with pytest.raises(error) as caught:
        parse_config(MINIMAL | changes)
    assert fact in str(caught.value)


def test_a_config_without_a_rank_is_refused() -> None:
    with pytest.raises(CorruptAdapter, match="it has no 'r'"):
        parse_config({"peft_type": "LORA", "lora_alpha": 8})


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_could_run_for_ever_is_refused_unmatched(key: str) -> None:
    pattern = "([a-z0-9._]+)+!"
    with pytest.raises(CorruptAdapter, match="could run for ever"):
        parse_config(MINIMAL | {key: {pattern: 3} if key.endswith("k_pattern") or key.startswith("alpha") else pattern})


@pytest.mark.parametrize(
    "pattern", [r"(\w+)*x", "(a|ab)+x", "(?>(a+)+b)", "(.|.)" * 20, "a?" * 30, ".*.*.*.*x", "(?=(a*)*b)", "(a*){30}", r"(a)\1(\w*\w*)+"]
)
def test_choices_within_repetitions_are_counted_as_endless(pattern: str) -> None:
    with pytest.raises(ValueError, match="could run for ever"):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(", "*", "a{99999999999}", "(" * 5000 + ")" * 5000, "(?P<a>x", r"\1"])
def test_what_is_no_regular_expression_is_told(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        (r".*\.(q_proj|k_proj|v_proj|o_proj)", "layers.3.self_attn.q_proj"),
        (r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", "model.layers.11.self_attn.v_proj"),
        (r"(?!.*vision).*(?:query|key|value)", "encoder.layer.0.attention.self.key"),
        (r".*layers\.(" + "|".join(map(str, range(40))) + r")\..*\.(gate|up|down)_proj", "model.layers.39.mlp.up_proj"),
        ("query", "encoder.layer.0.attention.self.query"),
    ],
)
def test_patterns_that_people_write_are_fine(pattern: str, module: str) -> None:
    check_pattern(pattern)
    assert matches_end(pattern, module)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_the_obvious_forward_equals_peft(bert: FrozenBase, tmp_path: Path, dora: bool) -> None:
    folder = make_adapter(bert, tmp_path / "a", task_type=None, use_dora=dora)
    inputs = bert.tokenize(PROBE)
    with applied(bert, read_adapter(folder)):
        mine = bert.model(**inputs).last_hidden_state
    assert (mine - load_peft(bert, folder)(**inputs).last_hidden_state).abs().max() < 1e-5
    assert not any(module._forward_hooks for module in bert.model.modules())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_adapters_of_the_bare_model_and_of_the_one_with_a_head_fit_the_same_base(llama: FrozenBase, tmp_path: Path, auto: Any) -> None:
    model = auto.from_pretrained(llama.path)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    check_fits(adapter, llama)
    assert check_acts(adapter, llama) > 0
    inputs = llama.tokenize(PROBE)
    with applied(llama, adapter):
        mine = llama.body(**inputs).last_hidden_state
    wrapped = peft.base_model.model
    expected = (wrapped.model if hasattr(wrapped, "lm_head") else wrapped)(**inputs).last_hidden_state
    assert (mine - expected).abs().max() < 1e-5 * max(1.0, float(expected.detach().abs().max()))


Tensors = dict[str, torch.Tensor]


def first(tensors: Tensors, part: str) -> str:
    return next(key for key in sorted(tensors) if part in key)


def rename(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


@pytest.mark.parametrize(
    ("spoil", "error", "fact"),
    [
        (lambda t: t[first(t, "lora_A")].fill_(float("nan")), NonFinite, "holds NaN or infinity"),
        (lambda t: t.update({(k := first(t, "lora_A")): t[k].to(torch.float8_e4m3fn)}), DoesNotFit, "not floating point of 16 bits or more"),
        (lambda t: t.pop(first(t, "lora_B")), DoesNotFit, "lacks lora_B"),
        (lambda t: t.pop(first(t, "lora_magnitude")), DoesNotFit, "lacks lora_magnitude_vector"),
        (lambda t: t.update({(k := first(t, "lora_A")): t[k][:, :-1]}), DoesNotFit, "has shape (4, 31)"),
        (lambda t: t.update({(k := first(t, "lora_A")): t[k][:-1]}), DoesNotFit, "has shape (3, 32), the config says rank 4"),
        (lambda t: t.update({(k := first(t, "lora_magnitude")): t[k][:1]}), DoesNotFit, "has shape (1,)"),
        (lambda t: rename(t, "layer.1.", "layer.7."), DoesNotFit, "has no place in the base"),
        (lambda t: rename(t, "base_model.model.", ""), DoesNotFit, "does not begin with 'base_model.model.'"),
        (lambda t: t.update({"base_model.model.extra.weight": torch.ones(2, 2)}), DoesNotFit, "'extra.weight' has no place in the base"),
        (lambda t: [t.pop(key) for key in list(t) if "lora_" in key], DoesNotFit, "holds no LoRA tensors"),
        (lambda t: t.pop("base_model.model.classifier.weight"), DoesNotFit, "has no weight matrix"),
        (lambda t: t.pop("base_model.model.classifier.bias"), DoesNotFit, "'classifier.bias' is neither in the base nor in the adapter"),
        (lambda t: [t[key].zero_() for key in t if "lora_B" in key], NoEffect, "leaves the base's output unchanged"),
        (lambda t: [t[key].mul_(1e30) for key in t if "lora_" in key and "mag" not in key], NoEffect, "is not finite on a probe batch"),
    ],
)
def test_weights_that_are_spoilt_are_refused_with_the_tensor(
    bert: FrozenBase, tmp_path: Path, spoil: Callable[[Tensors], Any], error: type[Exception], fact: str
) -> None:
    folder = make_adapter(bert, tmp_path / "a", use_dora="magnitude" in fact or "(1,)" in fact)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(error) as caught:
        adapter = read_adapter(folder, labels=("x", "y"))
        check_fits(adapter, bert)
        check_acts(adapter, bert)
    assert type(caught.value) is error and fact in str(caught.value)


# ---- does it act ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_pooler_alone_acts(bert: FrozenBase, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(bert, tmp_path / "a", target_modules=["pooler.dense"]), labels=("x", "y"))
    check_fits(adapter, bert)
    assert check_acts(adapter, bert) > 0


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_an_adapter_being_checked_does_not_reach_another_threads_answers(bert: FrozenBase, tmp_path: Path, task_type: str | None) -> None:
    adapter = read_adapter(make_adapter(bert, tmp_path / "a", task_type=task_type, size=0.3), labels=("x", "y") if task_type else None)
    inputs, done = bert.tokenize(PROBE[::-1]), threading.Event()
    plain = bert.model(**inputs).last_hidden_state

    def check() -> None:
        while not done.is_set():
            check_acts(adapter, bert)

    thread = threading.Thread(target=check)
    thread.start()
    try:
        assert all(torch.equal(bert.model(**inputs).last_hidden_state, plain) for _ in range(100))
    finally:
        done.set()
        thread.join()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bert.model.modules())


def test_a_check_leaves_the_models_that_other_threads_build_where_they_belong(bert: FrozenBase, tmp_path: Path) -> None:
    """Previously modules that another thread made while an adapter was checked had no memory behind them."""
    adapter, done, devices = read_adapter(make_adapter(bert, tmp_path / "a"), labels=("x", "y")), threading.Event(), set()

    def build() -> None:
        while not done.is_set():
            devices.add(torch.nn.Linear(2, 2).weight.device.type)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        for _ in range(8):
            check_fits(adapter, bert)
    finally:
        done.set()
        thread.join()
    assert devices == {"cpu"}


def test_a_module_whose_input_all_rows_share_is_refused_before_it_fails_in_a_batch(bert: FrozenBase, tmp_path: Path) -> None:
    folder = shutil.copytree(bert.path, tmp_path / "deberta")
    config = DebertaV2Config(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=256,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=32,
    )
    DebertaV2Model(config).save_pretrained(folder)
    base = FrozenBase.load(folder)
    heads = {"modules_to_save": ["pooler", "classifier"]}
    value = read_adapter(make_adapter(base, tmp_path / "value", target_modules=["value_proj"], **heads), labels=("x", "y"))
    check_fits(value, base)
    assert check_acts(value, base) > 0
    query = read_adapter(make_adapter(base, tmp_path / "query", target_modules=["query_proj"], **heads), labels=("x", "y"))
    check_fits(query, base)
    with pytest.raises(UnsupportedOption, match=r"query_proj.*an input that all rows of a batch share"):
        check_acts(query, base)


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_width_does_not_fit(bert: FrozenBase, tmp_path: Path) -> None:
    wide = FrozenBase.load(tiny_model(tmp_path / "wide", width=48))
    adapter = read_adapter(make_adapter(wide, tmp_path / "a"), labels=("x", "y"))
    with pytest.raises(DoesNotFit, match=r"has shape \(.*48.*\), the base and the config's rank need"):
        check_fits(adapter, bert)


def test_an_adapter_of_another_architecture_does_not_fit(bert: FrozenBase, llama: FrozenBase, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(bert, tmp_path / "a", task_type=None))
    with pytest.raises(DoesNotFit):
        check_fits(adapter, llama)
    causal = read_adapter(make_adapter(llama, tmp_path / "c"))
    with pytest.raises(WrongBase, match="a CAUSAL_LM adapter cannot run on"):
        check_fits(causal, bert)


def test_weights_of_the_base_saved_whole_are_refused(bert: FrozenBase, tmp_path: Path) -> None:
    folder = make_adapter(bert, tmp_path / "a", modules_to_save=["pooler"], target_modules=["query"])
    with pytest.raises(UnsupportedOption, match="it replaces weights of the frozen base"):
        check_fits(read_adapter(folder, labels=("x", "y")), bert)


def test_a_pooler_that_the_base_was_saved_without_is_a_part_of_the_head_or_lost(bert: FrozenBase, tmp_path: Path) -> None:
    folder = shutil.copytree(bert.path, tmp_path / "bare")
    weights = folder / "model.safetensors"
    save_file({k: tensor for k, tensor in load_file(weights).items() if "pooler" not in k}, weights, metadata={"format": "pt"})
    base = FrozenBase.load(folder)
    saved = read_adapter(make_adapter(base, tmp_path / "a", modules_to_save=["pooler"], target_modules=["query"]), labels=("x", "y"))
    check_fits(saved, base)
    assert check_acts(saved, base) > 0
    lost = read_adapter(make_adapter(base, tmp_path / "b", target_modules=["query"]), labels=("x", "y"))
    with pytest.raises(DoesNotFit, match=r"'bert\.pooler\..*' is neither in the base nor in the adapter"):
        check_fits(lost, base)


def test_an_adapted_embedding_fits_and_acts_but_not_as_a_dora(bert: FrozenBase, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(bert, tmp_path / "a", task_type=None, target_modules=["word_embeddings"]))
    check_fits(adapter, bert)
    assert check_acts(adapter, bert) > 0
    dora = read_adapter(make_adapter(bert, tmp_path / "b", task_type=None, target_modules=["word_embeddings"], use_dora=True))
    with pytest.raises(UnsupportedOption, match="word_embeddings is an embedding, and only linear modules are run as DoRA"):
        check_fits(dora, bert)


def test_an_embedding_that_all_rows_share_is_refused(bert: FrozenBase, tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(bert, tmp_path / "a", task_type=None, target_modules=["position_embeddings"]))
    check_fits(adapter, bert)
    with pytest.raises(UnsupportedOption, match="all rows of a batch share"):
        check_acts(adapter, bert)


def test_a_head_that_is_saved_by_half_is_refused_with_the_module_to_save(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "bert")
    config = DistilBertConfig(vocab_size=384, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=256)
    DistilBertModel(config).save_pretrained(tmp_path / "distil")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.link(folder / file, tmp_path / "distil" / file)
    base = FrozenBase.load(tmp_path / "distil")
    model = DistilBertForSequenceClassification.from_pretrained(base.path, num_labels=2)
    peft = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"], modules_to_save=["pre_classifier", "classifier"]))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(str(tmp_path / "a"))
    check_fits(read_adapter(tmp_path / "a", labels=("x", "y")), base)    # the last layer has 2 outputs, the one before it 32
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "pre_classifier" not in key}, path)
    with pytest.raises(DoesNotFit, match=r"'pre_classifier\..*' is neither in the base nor in the adapter"):
        check_fits(read_adapter(tmp_path / "a", labels=("x", "y")), base)


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        (None, "has 2 outputs without names"),
        (("a", "b", "c"), "3 labels were given for a head of 2"),
        (("a", "a"), "labels must be distinct"),
        (("a", ""), "labels must be distinct texts that are not empty"),
    ],
)
def test_labels_must_name_each_output_once(bert: FrozenBase, tmp_path: Path, labels: Any, fact: str) -> None:
    folder = make_adapter(bert, tmp_path / "a")
    with pytest.raises(LabelsRequired, match=fact):
        read_adapter(folder, labels=labels)


@pytest.mark.parametrize(
    ("task_type", "outputs", "problem_type", "error", "fact"),
    [
        ("SEQ_CLS", 2, "multi", InvalidInput, "problem_type='multi' is not known. There are: single_label_classification, multi_label"),
        ("SEQ_CLS", 3, "regression", DoesNotFit, "a regression gives one number, and the adapter's head has 3 outputs"),
        ("SEQ_CLS", 1, "single_label_classification", DoesNotFit, "one label among one is no choice"),
        ("TOKEN_CLS", 1, None, UnsupportedOption, "a head of one output gives every token the same label"),
        ("TOKEN_CLS", 2, "regression", InvalidInput, "an adapter of task type TOKEN_CLS has none"),
        (None, 2, "regression", InvalidInput, "an adapter of task type None has none"),
    ],
)
def test_a_problem_type_that_the_head_cannot_have_is_refused(
    bert: FrozenBase, tmp_path: Path, task_type: str | None, outputs: int, problem_type: str | None, error: type[Exception], fact: str
) -> None:
    labels = tuple("abc"[:outputs]) if task_type else None
    with pytest.raises(error) as caught:
        read_adapter(make_adapter(bert, tmp_path / "a", task_type=task_type, outputs=outputs), labels=labels, problem_type=problem_type)
    assert fact in str(caught.value)


def test_one_output_without_a_problem_type_is_a_regression_as_in_transformers(bert: FrozenBase, tmp_path: Path) -> None:
    folder = make_adapter(bert, tmp_path / "a", outputs=1)
    assert read_adapter(folder).problem_type == read_adapter(folder, labels=("stars",)).problem_type == "regression"
    assert read_adapter(folder, labels=("spam",), problem_type="multi_label_classification").problem_type == "multi_label_classification"


def test_labels_without_a_head_are_refused(bert: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(LabelsRequired, match="has no head"):
        read_adapter(make_adapter(bert, tmp_path / "a", task_type=None), labels=("a", "b"))


@pytest.mark.parametrize("template", ["no place", "{text} and {text}"])
def test_a_prompt_template_holds_the_text_once(bert: FrozenBase, tmp_path: Path, template: str) -> None:
    with pytest.raises(DoesNotFit, match="exactly once"):
        read_adapter(make_adapter(bert, tmp_path / "a", task_type=None), prompt_template=template)


def test_a_prompt_template_that_is_no_text_is_refused(bert: FrozenBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the prompt template is int, not text"):
        read_adapter(make_adapter(bert, tmp_path / "a", task_type=None), prompt_template=5)


def test_a_bottomless_config_is_refused(bert: FrozenBase, tmp_path: Path) -> None:
    folder = make_adapter(bert, tmp_path / "a")
    (folder / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(CorruptAdapter, match=r"adapter_config\.json is not JSON"):
        read_adapter(folder, labels=("x", "y"))


# ---- the vocabulary is the base's -----------------------------------------------------------------------------------


def trained(model: Any, folder: Path, *, lora: dict[str, Any], **save: Any) -> Path:
    """PEFT's own folder of this config, as it writes it after training."""
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **lora}))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(str(folder), **save)
    return folder


@pytest.mark.parametrize(
    ("lora", "tokens", "save", "error", "fact"),
    [
        ({"trainable_token_indices": [5, 9]}, 384, {}, UnsupportedOption, "trainable_token_indices=[5, 9]: it replaces vectors of the base"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, 384, {}, UnsupportedOption, "trainable_token_indices={'embed_tokens': [5]}"),
        ({}, 390, {}, DoesNotFit, "'lm_head' of the adapter has 390 tokens, the base has 384: it was trained with a resized vocabulary"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, 390, {}, DoesNotFit, "has 390 tokens, the base has 384"),
        ({"target_modules": ["embed_tokens"]}, 390, {"save_embedding_layers": False}, DoesNotFit, "has 390 tokens, the base has 384"),
        ({"target_modules": ["lm_head"]}, 390, {"save_embedding_layers": False}, DoesNotFit, "'lm_head' of the adapter has 390 tokens"),
        ({"target_modules": ["embed_tokens"]}, 384, {}, DoesNotFit, "is the base's own: PEFT saves it too where the output layer or an embedding"),
        ({}, 384, {"save_embedding_layers": True}, DoesNotFit, "tensor 'lm_head.weight' is the base's own, saved by PEFT's save_embedding"),
        ({"modules_to_save": ["embed_tokens"]}, 384, {}, UnsupportedOption, "it replaces weights of the frozen base; only heads are saved whole"),
    ],
)
def test_what_peft_writes_for_other_tokens_is_refused_with_the_option_and_the_next_step(
    llama: FrozenBase, tmp_path: Path, lora: dict[str, Any], tokens: int, save: dict[str, Any], error: type[Exception], fact: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    model.resize_token_embeddings(tokens)
    folder = trained(model, tmp_path / "a", lora=lora, **save)
    with pytest.raises(error) as caught:
        check_fits(read_adapter(folder), llama)
    assert type(caught.value) is error and fact in str(caught.value) and caught.value.hint    # type: ignore[attr-defined]


# ---- where it comes from --------------------------------------------------------------------------------------------


def test_a_source_of_any_length_is_a_folder_or_a_hub_id_or_refused() -> None:
    for source in ("a" * 300, "~nobody/x", "x\0y", "a/" * 500):
        with pytest.raises(InvalidInput, match="there is no folder"):
            fetch_adapter(source)


def test_a_hub_repository_is_read_from_the_clients_cache_at_its_commit(bert: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--colours"
    folder = make_adapter(bert, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for source in ("someone/colours", "someone/colours@main", f"someone/colours@{commit}"):
        files = fetch_adapter(source)
        assert (files.repository, files.revision) == ("someone/colours", commit)
        assert files.weights == (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="the model hub did not give that repository"):
        fetch_adapter("someone/colours@v2")


def test_a_real_peft_model_loads_a_made_adapter(bert: FrozenBase, tmp_path: Path) -> None:
    folder = make_adapter(bert, tmp_path / "a")
    assert isinstance(PeftModel.from_pretrained(task_model(bert, "SEQ_CLS"), folder), PeftModel)
