"""Every kind of task is learned, judged, kept, measured and learned on as a classifier is. Real tiny models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from transformers import AutoTokenizer

from adapter_hub.continual.gate import Evidence, GatePolicy, Paired, Verdict, judge
from adapter_hub.continual.learner import Asked, Current, evidence_of, plan_lesson
from adapter_hub.continual.measures import Answers, Kind
from adapter_hub.engine.engine import Likelihood, Output, TokenLabel
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, digest_of
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.setup import prepared

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers")}
OLD = [(f"{frame} {word}", word, kind) for frame in ("a", "the", "my", "her", "one", "no") for kind, words in WORDS.items() for word in words]
NEW = [(f"{frame} {word}", word, kind) for frame in ("some", "our", "my own") for kind, words in WORDS.items() for word in words]
CONFIG = TrainConfig(r=8, epochs=15, steps_min=0, batch_size=8, learning_rate=1e-2)
STILL = replace(CONFIG, epochs=1, learning_rate=1e-9)    # so small a rate leaves the weights where they began
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
VALUES = {"fruit": 2.0, "tool": -1.0}

MULTI, NUMBER = Kind(problem_type="multi_label_classification"), Kind(problem_type="regression")
SPANS, TEXT = Kind("TOKEN_CLS", None), Kind("CAUSAL_LM", None)


def target(name: str, text: str, word: str, kind: str) -> Example:
    if name == "several":
        return Example(text, extra={"labels": sorted({kind, *(["mine"] if text.startswith("my") else [])})})
    if name == "number":
        return Example(text, str(VALUES[kind]))
    if name == "spans":
        return Example(text, extra={"spans": [{"start": text.index(word), "end": len(text), "label": kind}]})
    return Example(f"{text} is", f" a {kind}")


def rows(name: str, pairs: list[tuple[str, str, str]] = OLD) -> list[Example]:
    return [target(name, *pair) for pair in pairs]


SHAPES = {"several": "bert", "number": "bert", "spans": "bert", "causal": "llama", "seq2seq": "t5"}
HOW: dict[str, dict[str, Any]] = {
    "several": {"problem_type": "multi_label_classification"},
    "number": {"problem_type": "regression"},
    "spans": {"task_type": "token_cls", "prompt_template": "say {text}!"},
    "causal": {"task_type": "CAUSAL_LM", "generation": {"max_new_tokens": 8}},
    "seq2seq": {"task_type": "SEQ_2_SEQ_LM"},
}
METRICS = {"several": "macro_f1", "number": "mae", "spans": "span_f1", "causal": "perplexity", "seq2seq": "exact_match"}


def config(name: str) -> TrainConfig:
    return replace(CONFIG, epochs=30, learning_rate=2e-2) if name in ("causal", "seq2seq") else CONFIG


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {shape: tiny_model(root / shape, shape) for shape in ("bert", "llama", "t5")}


@pytest.fixture(scope="module")
def taught(models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A registry for each kind, which keeps texts and has learned it once."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = tmp_path_factory.mktemp(name) / "registry"
        registry_that_keeps_texts(found[name], models[shape])
        report = Hub.open(found[name]).learn(name, rows(name), config=config(name), description="Things.", **HOW[name])
        assert report.promoted, report.reason
    return found


def registry_that_keeps_texts(folder: Path, base: Path) -> None:
    Hub.create(folder, base_model=base, encoder="hash")
    settings = folder / "hub.toml"
    settings.write_text(settings.read_text().replace('keep = "vectors"', 'keep = "text"'))


def opened(taught: Mapping[str, Path], name: str, tmp_path: Path) -> Hub:
    shutil.copytree(taught[name], tmp_path / "registry")
    return Hub.open(tmp_path / "registry")


def kept(hub: Hub, ref: AdapterRef, what: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (hub.registry.folder(ref) / f"{what}.jsonl").read_text().splitlines()]


# ---- a hub that learns them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_kind_is_learned_routed_answered_and_measured(taught: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    hub = opened(taught, name, tmp_path)
    manifest = hub.show(name)
    assert manifest.task_type == HOW[name].get("task_type", "SEQ_CLS").upper() and manifest.problem_type == HOW[name].get("problem_type")
    assert manifest.prompt_template == HOW[name].get("prompt_template") and manifest.generation == HOW[name].get("generation", {})
    asked = rows(name)[0]
    [answer] = hub.predict([asked.text], adapters=name)
    found = {"several": answer.labels, "number": answer.value, "spans": answer.tokens}.get(name, answer.text)
    assert found is not None and answer.adapter == manifest.ref
    assert {prediction.adapter for prediction in hub.predict([row.text for row in rows(name)], max_false_reject=0)} == {manifest.ref}
    assert hub.state(name).class_names == (None,) * len(hub.state(name).class_names)    # no number and no text to write is a class of inputs
    examples, evaluation = (kept(hub, manifest.ref, what) for what in ("exemplars", "evaluation"))
    assert digest_of([Example(**known(row)) for row in examples]) == digest_of(rows(name))
    figures = hub.evaluate()["adapters"][str(manifest.ref)]
    assert figures["digest"] == manifest.evaluation_digest and figures["rows"] == sum("chose_epoch" not in row for row in evaluation)
    assert METRICS[name] in figures["oracle"] and "unlabelled" not in figures
    stored = json.loads(hub.registry.read(manifest.ref, "gate.json"))
    [judged] = [finding for finding in stored["findings"] if finding["check"] == "validation"]
    assert stored["verdict"] == "promote" and judged["numbers"]["above_baseline"] > judged["numbers"]["below_baseline"]


def known(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row.pop("text"), "label": row.pop("label", None), "extra": row}


@pytest.mark.parametrize("name", SHAPES)
def test_a_kind_learns_on_from_its_weights_and_its_kept_examples(taught: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    hub = opened(taught, name, tmp_path)
    before, first = dict(load(hub.registry.read(name, "adapter_model.safetensors"))), hub.show(name)
    report = hub.learn(name, rows(name, NEW), config=STILL)
    manifest = hub.show(report.ref)
    after = load(hub.registry.read(report.ref, "adapter_model.safetensors"))
    assert before.keys() == after.keys() and all(np.allclose(after[key], old, atol=1e-5) for key, old in before.items())
    assert (manifest.parent, manifest.description, manifest.generation) == (f"{name}@1", "Things.", first.generation)
    assert (manifest.task_type, manifest.problem_type, manifest.prompt_template) == (first.task_type, first.problem_type, first.prompt_template)
    assert report.promoted and f"{name}@1" in report.reason    # the same answers
    assert {"replayed examples", "old evaluation inputs"} <= {finding.check for finding in report.gate.findings}
    assert all(finding.numbers["gained"] == finding.numbers["lost"] == 0 for finding in report.gate.findings if "gained" in finding.numbers)
    assert {row["text"] for row in kept(hub, report.ref, "exemplars")} == {row.text for row in rows(name, [*OLD, *NEW])}
    assert hub.state(report.ref).count == len(OLD) + len(NEW)
    texts = {row["text"] for row in kept(hub, report.ref, "evaluation")}
    assert texts & {row.text for row in rows(name)} and texts & {row.text for row in rows(name, NEW)}
    assert hub.evaluate()["adapters"][str(report.ref)]["digest"] == manifest.evaluation_digest and hub.verify().ok


@pytest.mark.parametrize(("name", "told"), [("several", "'fruit' before, 'tool' now"), ("number", "'2' before, '-1' now"), ("causal", "' a tool'")])
def test_a_target_that_is_another_than_before_is_told(taught: Mapping[str, Path], tmp_path: Path, name: str, told: str) -> None:
    hub, (text, word, _) = opened(taught, name, tmp_path), OLD[0]
    report = hub.learn(name, [target(name, text, word, "tool"), *rows(name, OLD[1:4] + NEW)], config=STILL, promote="never")
    # A text may be gone on from in several ways: the old one is replayed, and both stand in one data set.
    counts = (0, 1) if name == "causal" else (1, 0)
    assert (report.data.relabelled_count, report.data.contradictions_count) == counts
    assert any(text in said and told in said for said in report.data.warnings)


@pytest.mark.parametrize("name", ["several", "spans"])
def test_a_new_label_is_learned_beside_the_old_ones_that_are_replayed(taught: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    hub = opened(taught, name, tmp_path)
    before = dict(load(hub.registry.read(name, "adapter_model.safetensors")))
    report = hub.learn(name, rows(name, [(f"{frame} robin", "robin", "bird") for frame in ("a", "the", "one", "no")]), config=STILL, start="warm")
    old, new = hub.show(f"{name}@1").labels or (), hub.show(report.ref).labels or ()
    assert set(new) == {*old, "bird"}
    places = [new.index(label) for label in old]
    for key, tensor in load(hub.registry.read(report.ref, "adapter_model.safetensors")).items():
        assert np.allclose(tensor[places] if tensor.shape != before[key].shape else tensor, before[key], atol=1e-5), key


def test_a_row_that_alone_has_a_label_is_trained_on_and_others_compare() -> None:
    known = Current(AdapterRef("skill", 1), Path("."), ("O", "fruit", "tool"), {"r": 8, "lora_alpha": 16, "target_modules": ["query"]}, SPANS)
    alone = [Example(f"the {word}", extra={"spans": [{"start": 4, "end": 4 + len(word), "label": word}]}) for word in ("robin", "carp", "newt")]
    lesson = plan_lesson("skill", [*rows("spans"), *alone], None, replace(CONFIG, validation_share=0.3), known, "auto", kind=SPANS)
    assert lesson.unseen and lesson.validation and {row.text for row in alone} <= {row.text for row in lesson.train}


@pytest.mark.parametrize("name", SHAPES)
def test_a_worse_candidate_does_not_go_live_and_it_is_said_on_what_it_is_worse(taught: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    hub = opened(taught, name, tmp_path)
    others = [(text.replace("my own", "my last").replace("our", "your").replace("some", "this"), word, kind) for text, word, kind in NEW]
    learned = [replace(row, label=f"{50 + i}") for i, row in enumerate(rows(name, NEW))] if name == "number" else rows(name, NEW)
    report = hub.learn(name, learned, rows(name, others), config=STILL, start="cold")
    assert report.verdict is not Verdict.PROMOTE and not report.promoted and hub.registry.aliases(name) == {"production": 1}
    [compared] = [finding for finding in report.gate.findings if finding.check == "validation"]
    assert f"{name}@1" in compared.reason or compared.verdict is Verdict.REJECT
    assert compared.numbers["lost"] > compared.numbers["gained"] and compared.reason in report.reason
    assert hub.show(report.ref).parent is None and hub.registry.history(name)[-1].reason == report.reason
    stored = json.loads(hub.registry.read(report.ref, "gate.json"))
    assert stored == report.gate.to_json() | {"start": False, "training": stored["training"]}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("several", {"problem_type": "regression"}),
        ("several", {"task_type": "SEQ_CLS"}),    # one label
        ("number", {"task_type": "TOKEN_CLS"}),
        ("spans", {"prompt_template": "say {text}"}),
        ("spans", {"prompt_template": "{text}"}),
        ("causal", {"prompt_template": "Q: {text}"}),
        ("causal", {"task_type": "SEQ_CLS"}),
    ],
)
def test_another_kind_than_that_in_production_is_refused_and_nothing_is_stored(
    taught: Mapping[str, Path], tmp_path: Path, name: str, how: dict[str, Any]
) -> None:
    hub = opened(taught, name, tmp_path)
    listed, events = [row.to_json() for row in hub.list()], hub.registry.last_event()
    with pytest.raises(InvalidInput, match=rf"{name}@1 is .*, and what is to be learned .*start=\"cold\""):
        hub.learn(name, rows(name, NEW), config=STILL, **how)
    assert [row.to_json() for row in hub.list()] == listed and hub.registry.last_event() == events


def test_a_cold_start_replaces_one_kind_by_another_and_compares_with_nothing(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "number", tmp_path)
    named = [Example(text, kind) for text, _, kind in OLD]
    report = hub.learn("number", named, config=CONFIG, start="cold", task_type="SEQ_CLS", promote="always")
    assert hub.show("number").labels == ("fruit", "tool") and hub.show("number").problem_type is None
    assert report.gate.notes == ("a cold start: number@1 is SEQ_CLS (regression), and not compared with",)
    assert "a linear probe of the encoder" in report.reason


def test_an_adapter_that_gives_vectors_is_not_learned_on(models: Mapping[str, Path], tmp_path: Path) -> None:
    """Previously a classifier took its place, unsaid."""
    hub = Hub.create(tmp_path / "registry", base_model=models["bert"], encoder="hash")
    hub.register("vectors", make_adapter(hub.base, tmp_path / "a", task_type=None), ["a text"])
    with pytest.raises(InvalidInput, match="vectors@1 is an embedding, and what is to be learned SEQ_CLS"):
        hub.learn("vectors", [Example(text, kind) for text, _, kind in OLD], config=STILL)
    assert hub.registry.aliases("vectors") == {"production": 1} and len(hub.list()) == 1


def test_a_number_that_was_registered_learns_on_and_keeps_its_name(models: Mapping[str, Path], tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=models["bert"], encoder="hash")
    hub.register("price", make_adapter(hub.base, tmp_path / "a", outputs=1), ["a text"], labels=["euros"], problem_type="regression")
    report = hub.learn("price", rows("number"), config=replace(STILL, r=4, alpha=8), start="warm", promote="always")
    manifest = hub.show(report.ref)
    assert (manifest.labels, manifest.problem_type, manifest.parent) == (("euros",), "regression", "price@1")
    assert "no text of price@1 is kept that could be replayed" in report.gate.notes


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"task_type": "QUESTION_ANSWERING"}, "is not a task type"),
        ({"task_type": "FEATURE_EXTRACTION"}, "cannot be trained"),
        ({"problem_type": "ranking"}, "cannot be trained"),
        ({"task_type": "TOKEN_CLS"}, r"no training row has a target in `spans`; beside `text` they have 'label'\."),
        ({"problem_type": "multi_label_classification"}, "no training row has a target in `labels`"),
        ({"problem_type": "regression"}, "has the label 'fruit', which is no number"),
        ({"task_type": "CAUSAL_LM"}, "takes no CAUSAL_LM adapter"),
        ({"prompt_template": "no place"}, "does not hold"),
        ({"prompt_template": 5}, "does not hold"),
        ({"generation": {"max_new_token": 3}}, "max_new_token"),
        ({"problem_type": "regression", "start": "transfer"}, "is for one label among several"),
        ({"prompt_template": "say {text}", "start": "transfer"}, "does not go with a prompt template"),
        ({"config": replace(STILL, pissa=True, r=4), "start": "transfer"}, "does not go with pissa"),
        ({"config": {"lora": {"rank_pattern": {"query": 2}}}, "start": "transfer"}, "does not go with lora={'rank_pattern': {'query': 2}}"),
        ({"config": replace(STILL, pissa=True, r=64)}, "pissa with r=64: the narrowest module that is adapted has"),
        ({"task_type": "TOKEN_CLS", "start": "warm"}, "new has nothing in production to start from"),
    ],
)
def test_what_cannot_be_learned_so_is_refused_before_anything_is_stored(
    models: Mapping[str, Path], tmp_path: Path, how: dict[str, Any], says: str
) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=models["bert"], encoder="hash")
    with pytest.raises(InvalidInput, match=says):
        hub.learn("new", [Example(text, kind) for text, _, kind in OLD], **{"config": STILL, **how})
    assert hub.names() == [] and not list((tmp_path / "registry" / "adapters").glob("new"))


def chatting(models: Mapping[str, Path], tmp_path: Path, shape: str = "llama") -> Hub:
    """A hub on a model that writes and has a chat template."""
    base = shutil.copytree(models[shape], tmp_path / shape)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    registry_that_keeps_texts(tmp_path / "registry", base)
    return Hub.open(tmp_path / "registry")


@pytest.mark.parametrize(("shape", "task_type"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_conversations_are_learned_kept_and_measured_as_they_are_asked(
    models: Mapping[str, Path], tmp_path: Path, shape: str, task_type: str
) -> None:
    hub = chatting(models, tmp_path, shape)
    chats = [{"messages": [{"role": "user", "content": f"{text}?"}, {"role": "assistant", "content": f"a {kind}"}]} for text, _, kind in OLD]
    with pytest.raises(InvalidInput, match="take no prompt template"):
        hub.learn("chat", chats, config=STILL, task_type=task_type, prompt_template="Q: {text}")
    report = hub.learn("chat", chats, config=config("causal"), task_type=task_type, generation={"max_new_tokens": 8, "chat": True})
    assert report.promoted and "the base model" in report.reason
    asked = [hub.predict([given], adapters="chat")[0].text for given in (chats[0]["messages"][0]["content"], chats[0]["messages"][:1])]
    assert asked[0] == asked[1]    # `chat` makes a conversation of a text
    assert [row["messages"] for row in kept(hub, report.ref, "exemplars")] == [row["messages"] for row in chats]
    figures = hub.evaluate()["adapters"]["chat@1"]
    # Some of five are written to the letter, as the base writes none; which, is the machine's: there are two answers, and the model is tiny.
    assert figures["oracle"]["exact_match"] > 0 and figures["oracle"]["perplexity"] < 60 and "unlabelled" not in figures
    again = hub.learn("chat", chats[:4] + [{**row, "text": f"so, {row['messages'][0]['content']}"} for row in chats[4:8]], config=STILL)
    assert "replayed examples" in {finding.check for finding in again.gate.findings} and hub.show(again.ref).parent == "chat@1"


def test_conversations_that_end_alike_are_several_and_none_is_forgotten(models: Mapping[str, Path], tmp_path: Path) -> None:
    """Previously only the last question told them apart: 40 could not be learned, and of those that were, half was dropped unsaid."""
    hub = chatting(models, tmp_path)
    roles = ("user", "assistant", "user", "assistant")
    told = [(f"Tell me of {number} {word} and {word}s.", kind) for number, (_, word, kind) in enumerate(OLD[:20])]
    chats = [
        {"messages": [{"role": role, "content": said} for role, said in zip(roles, (first, "Well.\n", "Go on.", f"a {kind}"), strict=True)]}
        for first, kind in told
    ]
    for part in (chats[:16], chats[16:]):
        report = hub.learn("chat", part, config=STILL, task_type="CAUSAL_LM", promote="always")
    assert sorted(json.dumps(row["messages"]) for row in kept(hub, report.ref, "exemplars")) == sorted(json.dumps(row["messages"]) for row in chats)
    assert hub.state(report.ref).count == 20
    lines = [{"text": "write a line", "label": f"line {i}"} for i in range(6)] + [{"text": f"write of {i}", "label": "a line"} for i in range(6)]
    hub.learn("lines", lines, config=STILL, task_type="CAUSAL_LM", promote="always")
    more = [{"text": "write a line", "label": "another"}, {"text": "write more", "label": "more"}]
    report = hub.learn("lines", more, config=STILL, promote="always")
    assert len(kept(hub, report.ref, "exemplars")) == 14
    with pytest.raises(InvalidInput, match="`messages` whose last question is empty"):
        empty = [{"role": "user", "content": "x"}, {"role": "tool", "content": ""}, {"role": "assistant", "content": "y"}]
        hub.learn("tools", [{"text": "x", "messages": empty}] * 4, config=STILL, task_type="CAUSAL_LM")


def test_what_is_taught_to_who_gives_numbers_is_no_class(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "number", tmp_path)
    state = hub.state(hub.teach("number", [{"text": "a ripe apple", "label": "3.5"}]))
    assert set(state.class_names) == {None}


def test_sets_of_labels_that_occur_once_are_learned_and_so_is_a_label_of_one_row(models: Mapping[str, Path], tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=models["bert"], encoder="hash")
    names = [f"l{i}" for i in range(6)]
    told = [[name for bit, name in enumerate(names) if i >> bit & 1] for i in range(1, 41)]
    sets = [Example(f"{text} {i}", extra={"labels": labels}) for i, ((text, *_), labels) in enumerate(zip(OLD[:40], told, strict=True))]
    assert hub.learn("sets", sets, config=STILL, promote="always", **HOW["several"]).ref.version == 1
    spans = [*rows("spans")[:20], Example("a strange thing", extra={"spans": [{"start": 2, "end": 9, "label": "rare"}]})]
    for seed in range(12):
        _, _, parts = prepared(hub.base, spans, None, replace(STILL, seed=seed), "t", "TOKEN_CLS", None, None)
        assert any("rare" in SPANS.task.named(row) for row in parts.train)
        assert len(parts.train) + len(parts.choice) + len(parts.validation) == len(spans)
    with pytest.raises(InvalidInput, match=r"row 1 has the span .* which is not \{start, end, label\}"):
        hub.learn("x", [Example("a b", extra={"spans": [{"start": 0.0, "end": 1.0, "label": "a"}]})] * 4, config=STILL, task_type="TOKEN_CLS")


def test_an_adapter_that_was_trained_with_pissa_is_learned_on_from_the_base(models: Mapping[str, Path], tmp_path: Path) -> None:
    registry_that_keeps_texts(tmp_path / "registry", models["bert"])
    hub, labelled = Hub.open(tmp_path / "registry"), [Example(text, kind) for text, _, kind in OLD]
    hub.learn("things", labelled, config=replace(STILL, pissa=True, r=4, alpha=8), promote="always")
    report = hub.learn("things", [Example(text, kind) for text, _, kind in NEW], config=replace(STILL, pissa=True, r=8, alpha=16), promote="always")
    assert any("pissa begins with the base's singular vectors" in note for note in report.gate.notes)


# ---- scores ---------------------------------------------------------------------------------------------------------


def tokens(text: str, *labels: str) -> Output:
    """Words, each a token."""
    found, start = [], 0
    for word, label in zip(text.split(), labels, strict=True):
        found.append(TokenLabel(start, start + len(word), label, 0.9))
        start += len(word) + 1
    return Output(tokens=tuple(found))


def test_an_answers_score_is_what_the_table_says() -> None:
    row = Example("big red fox", extra={"spans": [{"start": 4, "end": 7, "label": "colour"}], "labels": ["a", "b"]})
    assert SPANS.measure.score(row, tokens(row.text, "O", "colour", "O")) == 1.0
    assert SPANS.measure.score(row, tokens(row.text, "O", "O", "colour")) == pytest.approx(1 / 3)
    assert MULTI.measure.score(row, Output(labels=("b", "c"))) == pytest.approx(1 / 3)
    assert MULTI.measure.score(replace(row, extra={"labels": []}), Output(labels=())) == 1.0
    assert NUMBER.measure.score(Example("x", "3"), Output(value=2.5)) == -0.5
    assert math.isnan(NUMBER.measure.score(Example("x", "3"), Output()))
    assert TEXT.measure.score(Example("x", "y"), Likelihood(6.0, 3)) == -2.0
    assert Kind().measure.score(Example("x", "y"), Output(label="y")) == 1.0


def judged(kind: Kind, asked: list[Example], candidate: Answers, *, base: Answers | None = None, current: Answers | None = None) -> Any:
    """The gate's report on these answers; `asked` are new to both."""
    known = Current(AdapterRef("skill", 1), Path("."), (), {}, kind) if current is not None else None
    train = [replace(row, text=f"trained {row.text}") for row in asked]
    lesson = plan_lesson("skill", train, asked, CONFIG, known, "auto" if known is None else "cold", kind=kind)
    found = Asked(asked, {}, candidate, current, base or {})
    return judge(evidence_of(lesson, found, known, lambda texts: np.eye(len(texts), dtype=np.float32)), GatePolicy())


def by_row(kind: Kind, asked: list[Example], answers: list[Any]) -> Answers:
    return {kind.measure.key(row): answer for row, answer in zip(asked, answers, strict=True)}


def test_a_constant_answer_is_of_no_use_whatever_the_task() -> None:
    sets = [Example(f"{i}", extra={"labels": ["a"] if i < 9 else ["b"]}) for i in range(15)]
    report = judged(MULTI, sets, by_row(MULTI, sets, [Output(labels=("a",))] * 15))
    assert report.verdict is Verdict.REJECT and "always the commonest set of labels 0.600: better on 0 of 15 rows" in report.reason
    numbers = [Example(f"{i}", str(i)) for i in range(10)]
    report = judged(NUMBER, numbers, by_row(NUMBER, numbers, [Output(value=4.5)] * 10))
    assert report.verdict is Verdict.REJECT and "mean absolute error 2.500, always the mean of the training rows 2.500" in report.reason
    spans = [Example("big red fox", extra={"spans": [{"start": 4, "end": 7, "label": "colour"}]}, id=i) for i in range(10)]
    spans = [replace(row, text=f"{row.text}{'!' * i}") for i, row in enumerate(spans)]
    report = judged(SPANS, spans, by_row(SPANS, spans, [tokens(row.text, "O", "O", "O") for row in spans]))
    assert report.verdict is Verdict.REJECT and "always the label 'O' 0.667" in report.reason
    texts = [Example(f"{i}", "y") for i in range(10)]
    sure, unsure = (by_row(TEXT, texts, [Likelihood(nats, 2)] * 10) for nats in (2.0, 2.01))
    report = judged(TEXT, texts, sure, base=unsure)    # a hundredth of a nat is no difference
    assert report.verdict is Verdict.REJECT and "nats a token 1.000, the base model 1.005" in report.reason
    assert judged(TEXT, texts, sure, base=by_row(TEXT, texts, [Likelihood(3.0, 2)] * 10)).verdict is Verdict.PROMOTE


def test_rows_that_could_not_show_a_use_reject_nobody_and_it_is_said() -> None:
    """Previously a single row, or none at all, decided that it is of no use."""
    sets = [Example(f"{i}", extra={"labels": ["a"] if i < 6 else ["b"]}) for i in range(10)]    # four can be won
    report = judged(MULTI, sets, by_row(MULTI, sets, [Output(labels=("a",))] * 10))
    assert report.verdict is Verdict.PROMOTE
    assert "10 rows are too few to tell whether it is of more use than always the commonest set of labels" in report.reason
    assert judged(MULTI, sets, by_row(MULTI, sets, [Output(labels=())] * 10)).verdict is Verdict.REJECT    # worse on six
    for kind, row, answer in (
        (NUMBER, Example("x", "3"), Output(value=9.0)),
        (TEXT, Example("x", "y"), Likelihood(6.0, 2)),
        (Kind(), Example("x", "y"), Output(label="z")),
    ):
        one = [row, replace(row, text="other", label="z" if kind == Kind() else "3.5")]
        base = by_row(kind, one, [Likelihood(2.0, 2)] * 2) if kind == TEXT else None
        report = judged(kind, one, by_row(kind, one, [answer] * 2), base=base)
        assert report.verdict is Verdict.PROMOTE and "2 rows are too few to tell" in report.reason, report.reason


def test_rows_on_which_one_answer_is_always_right_tell_nothing() -> None:
    sets = [Example(f"{i}", extra={"labels": ["a"]}) for i in range(6)]
    assert judged(MULTI, sets, by_row(MULTI, sets, [Output(labels=("a",))] * 6)).verdict is Verdict.PROMOTE


def test_who_is_worse_than_an_answer_that_is_always_right_is_of_no_use() -> None:
    sets = [Example(f"{i}", extra={"labels": ["a"]}) for i in range(10)]
    assert judged(MULTI, sets, by_row(MULTI, sets, [Output(labels=("b",))] * 10)).verdict is Verdict.REJECT


def test_rounding_is_no_gain() -> None:
    up, down = [0.1, 0.2, 0.3] * 3, [0.3, 0.2, 0.1] * 3    # their sums differ in the last bit
    assert sum(up) != sum(down)
    pairs = [Paired.of_scores("always", *sides, measure="overlap", least=0.0) for sides in ((up, down), (down, up))]
    assert {judge(Evidence(one, baseline=one), GatePolicy()).verdict for one in pairs} == {Verdict.REJECT}


def test_a_smaller_error_in_the_mean_is_of_use_though_the_mean_is_nearer_on_most_rows() -> None:
    numbers = [Example(f"{i}", "0" if i < 8 else "100") for i in range(10)]
    near = [Output(value=25.0) if i < 8 else Output(value=100.0) for i in range(10)]    # the mean says 20
    assert judged(NUMBER, numbers, by_row(NUMBER, numbers, near)).verdict is Verdict.PROMOTE


def test_the_version_in_production_is_beaten_or_lost_to_row_by_row() -> None:
    numbers = [Example(f"{i}", str(i)) for i in range(10)]
    exact, off, hair = (by_row(NUMBER, numbers, [Output(value=i + shift) for i in range(10)]) for shift in (0.0, 1.0, 0.01))
    worse = judged(NUMBER, numbers, off, current=exact)
    assert worse.verdict is Verdict.HOLD and "mean absolute error 1.000, skill@1 0.000: better on 0 of 10 rows, worse on 10" in worse.reason
    assert judged(NUMBER, numbers, exact, current=off).verdict is Verdict.PROMOTE
    assert judged(NUMBER, numbers, hair, current=exact).verdict is Verdict.PROMOTE    # within what counts as alike
    broken = judged(NUMBER, numbers, by_row(NUMBER, numbers, [Output(value=math.nan)] * 10), current=exact)
    assert broken.verdict is Verdict.REJECT and "its scores are not finite" in broken.reason
    assert "NaN" not in json.dumps(broken.to_json()) and "Infinity" not in json.dumps(broken.to_json())


def test_in_use_as_in_training_or_rejected() -> None:
    numbers = [Example(f"{i}", str(i)) for i in range(10)]
    answers = by_row(NUMBER, numbers, [Output(value=i + 1.0) for i in range(10)])
    assert NUMBER.measure.unlike_training(numbers, answers, {"mae": 1.0}) == ""
    assert NUMBER.measure.unlike_training(numbers, answers, {"mae": 2.0}) == "in use its mean absolute error is 1, 2 in training"
    texts = [Example("x", "y")]
    said = by_row(TEXT, texts, [Likelihood(6.0, 3)])
    assert TEXT.measure.unlike_training(texts, said, {"loss": 2.01}) == ""
    assert TEXT.measure.unlike_training(texts, said, {"loss": 1.0}) == "in use it needs 2.000 nats a token, 1.000 in training"
    row = Example("big red fox", extra={"spans": [{"start": 4, "end": 7, "label": "colour"}]})
    words = by_row(SPANS, [row], [tokens(row.text, "O", "O", "colour")])
    assert SPANS.measure.unlike_training([row], words, {"accuracy": 1 / 3}) == ""
    assert "1 of 3 tokens of validation rows rightly, 3 in training" in SPANS.measure.unlike_training([row], words, {"accuracy": 1.0})


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), max_size=20), st.floats(0, 1))
def test_of_two_scores_the_higher_wins_and_like_ones_draw(pairs: list[tuple[float, float]], least: float) -> None:
    mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    found = Paired.of_scores("other", mine, theirs, measure="m", least=least)
    gained, lost = sum(a - b > least for a, b in pairs), sum(b - a > least for a, b in pairs)
    assert found.counts == (len(pairs), gained, lost)
    assert Paired.of_scores("other", theirs, mine, measure="m", least=least).counts == (len(pairs), lost, gained)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_one_text_are_refused_before_anything_is_encoded(taught: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    """Previously only those of one label were."""
    hub = opened(taught, name, tmp_path)
    with pytest.raises(InvalidInput, match="all rows have one text, repeated: none can be held out"):
        hub.learn("new", [replace(row, text=rows(name)[0].text + mark) for row in rows(name)[:1] for mark in ("", "!", "…")], **HOW[name])
    assert hub._encoder is None and hub.names() == [name]
