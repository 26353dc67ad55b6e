"""Each task trains into an adapter that the engine runs, and only what is to be written is in the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.chat import Conversation
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import load_peft, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.tasks import IGNORED, VALUE, Number, Rewriting, Spans, Writing
from adapter_hub.training.train import TrainResult, train_adapter
from adapter_hub.training.warm import Start

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("hammer", "saw", "drill", "pliers")}
FRAMES = ("a {}", "the {}", "my {}", "her {}", "one {}", "{}", "no {}", "this {}")
CONFIG = TrainConfig(r=8, epochs=15, steps_min=0, batch_size=8, learning_rate=1e-2)
PAIRS = [(frame.format(word), word, kind) for frame in FRAMES for kind, words in WORDS.items() for word in words]
ROWS = {
    "multi_label_classification": [Example(t, extra={"labels": sorted({kind, *(["mine"] if t.startswith("my") else [])})}) for t, _, kind in PAIRS],
    "regression": [Example(t, str(2.0 if kind == "fruit" else -1.0)) for t, _, kind in PAIRS],
}
SPANS = [Example(t, extra={"spans": [{"start": t.index(word), "end": len(t), "label": kind}]}) for t, word, kind in PAIRS]
WRITING = [Example(f"{t} is", f" a {kind}") for t, _, kind in PAIRS]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FrozenBase]:
    root = tmp_path_factory.mktemp("models")
    return {shape: FrozenBase.load(tiny_model(root / shape, shape)) for shape in ("bert", "llama", "t5")}


def predicted(base: FrozenBase, result: TrainResult, texts: list[str], **generation: Any) -> list[Output]:
    """By the engine."""
    problem = None if result.problem_type is None else str(result.problem_type)
    adapter = read_adapter(result.folder, labels=result.labels or None, problem_type=problem, prompt_template=result.prompt_template)
    check_fits(adapter, base)
    assert check_acts(adapter, base) > 0
    ref = AdapterRef("trained", 1)
    return Engine(base, lambda _: adapter).predict([Request(text, ref) for text in texts], generation=generation or None)


def test_several_labels_are_learned_each_by_itself(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    result = train_adapter(
        bases["bert"], ROWS["multi_label_classification"], problem_type="multi_label_classification", config=CONFIG, folder=tmp_path
    )
    assert result.labels == ("fruit", "mine", "tool") and result.metrics["macro_f1"] > 0.6
    outputs = predicted(bases["bert"], result, [row.text for row in result.validation])
    right = [list(output.labels or ()) == row.extra["labels"] for output, row in zip(outputs, result.validation, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right))


def test_a_number_is_learned(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    config = replace(CONFIG, learning_rate=3e-3)
    result = train_adapter(bases["bert"], ROWS["regression"], problem_type="regression", config=config, folder=tmp_path)
    outputs = predicted(bases["bert"], result, [row.text for row in result.validation])
    apart = [(output.value or 0.0) - float(row.label or "") for output, row in zip(outputs, result.validation, strict=True)]
    assert result.metrics["rmse"] == pytest.approx(math.sqrt(np.mean(np.square(apart))), abs=1e-5)
    assert result.metrics["rmse"] < 1.2    # 1.5 for who always says the mean


def test_a_number_begins_with_the_mean_of_its_rows(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    rows = [replace(row, label=str(1000 + i % 2)) for i, row in enumerate(ROWS["regression"])]
    still = replace(CONFIG, epochs=1, learning_rate=1e-9)
    result = train_adapter(bases["bert"], rows, problem_type="regression", config=still, folder=tmp_path / "mean")
    assert result.metrics["mae"] < 10
    zero = train_adapter(bases["bert"], rows, problem_type="regression", config=replace(still, probe=False), folder=tmp_path / "zero")
    assert zero.metrics["mae"] > 900


def test_numbers_of_any_size_are_learned_alike(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    """Previously prices stayed at their mean, for a head's weights move by a learning rate a step; and 1e20 was "no effect"."""

    def learned(size: float) -> tuple[float, list[float]]:
        rows = [replace(row, label=repr(float(row.label or "") * size)) for row in ROWS["regression"]]
        result = train_adapter(bases["bert"], rows, problem_type="regression", config=replace(CONFIG, epochs=3), folder=tmp_path / str(size))
        return result.metrics["mae"] / size, [(output.value or 0.0) / size for output in predicted(bases["bert"], result, [row.text for row in rows])]

    error, values = learned(1)
    for size in (1e-6, 1e5, 1e20):
        found = learned(size)
        assert found[0] == pytest.approx(error, rel=1e-3)
        np.testing.assert_allclose(found[1], values, rtol=1e-3, atol=1e-3)


def test_a_regression_goes_on_from_the_numbers_of_the_one_before(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    rows = [replace(row, label=repr(1000 * float(row.label or ""))) for row in ROWS["regression"]]
    brief = replace(CONFIG, epochs=2)
    before = train_adapter(bases["bert"], rows, problem_type="regression", config=brief, folder=tmp_path / "before")
    still, others = replace(CONFIG, epochs=1, learning_rate=1e-9), [replace(rows[0], label="50000"), *rows[1:]]    # of another deviation
    start = Start(before.folder, VALUE)
    after = train_adapter(bases["bert"], others, problem_type="regression", config=still, folder=tmp_path / "after", start=start)
    texts = [row.text for row in rows]
    values = [[output.value for output in predicted(bases["bert"], one, texts)] for one in (before, after)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4)


def test_numbers_are_scaled_by_the_rows_that_are_trained_on_and_equal_ones_not_at_all() -> None:
    """Previously one wrong number that was held out made all others alike; and 0.1, fifty times, has a deviation of 3e-17."""
    rows = [Example(str(i), str(1 + 4 * (i % 2))) for i in range(50)]
    assert Number.of([*rows, Example("x", "1e6")], None, None).fitted(rows) == Number((), None, 2.0)
    for label in ("0.1", "1000", "0", "1e38"):
        assert Number((), None).fitted([Example(str(i), label) for i in range(50)]).scale == 1.0
    assert Number((), None).fitted([Example("a", "0"), Example("b", "1e-36")]).scale == 1.0    # its inverse is more than float32 holds


def test_a_number_that_starts_without_a_head_begins_with_the_mean(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    rows = [replace(row, label=repr(1e-6 * (3 + float(row.label or "")))) for row in ROWS["regression"]]
    still = replace(CONFIG, epochs=1, learning_rate=1e-9)
    first = train_adapter(bases["bert"], rows, problem_type="regression", config=still, folder=tmp_path / "first")
    pairs = {key: tensor for key, tensor in load_file(first.folder / "adapter_model.safetensors").items() if ".lora_" in key}
    (tmp_path / "pairs").mkdir()
    save_file(pairs, tmp_path / "pairs" / "adapter_model.safetensors")
    found = train_adapter(
        bases["bert"], rows, problem_type="regression", config=still, folder=tmp_path / "second", start=Start(tmp_path / "pairs", ())
    )    # fmt: skip
    assert found.metrics["mae"] < 5e-6


@pytest.mark.parametrize(("label", "fact"), [("1e39", r"the number 1e39, and float32 ends at 3\.4e\+38"), ("inf", "not finite")])
def test_numbers_that_float32_cannot_hold_are_refused(bases: dict[str, FrozenBase], tmp_path: Path, label: str, fact: str) -> None:
    rows = [replace(ROWS["regression"][0], label=label), *ROWS["regression"][1:]]
    with pytest.raises(InvalidInput, match=f"training row 1 has {'a number that is ' if label == 'inf' else ''}{fact}"):
        train_adapter(bases["bert"], rows, problem_type="regression", config=CONFIG, folder=tmp_path)


def test_spans_that_overlap_are_refused_unless_their_label_is_one(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    def spans(*labels: str) -> Example:
        return Example("a long text", extra={"spans": [{"start": 2 * i, "end": 2 * i + 4, "label": label} for i, label in enumerate(labels)]})

    assert Spans.fault(spans("x", "x", "x")) is None
    assert "overlap" in (Spans.fault(spans("x", "x", "y")) or "")
    within = Example("a long text", extra={"spans": [{"start": 0, "end": 9, "label": "x"}, {"start": 2, "end": 4, "label": "x"},
                                                     {"start": 6, "end": 8, "label": "y"}]})    # fmt: skip
    with pytest.raises(InvalidInput, match=r"training row 2 has spans of other labels that overlap.*a token has one label"):
        train_adapter(bases["bert"], [SPANS[0], within], task_type="TOKEN_CLS", config=CONFIG, folder=tmp_path)


def test_spans_are_learned_token_by_token(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    result = train_adapter(bases["bert"], SPANS, task_type="TOKEN_CLS", prompt_template="say {text}!", config=CONFIG, folder=tmp_path)
    assert result.labels == ("O", "fruit", "tool")
    outputs = predicted(bases["bert"], result, [row.text for row in result.validation])
    right = []
    for output, row in zip(outputs, result.validation, strict=True):
        [span] = row.extra["spans"]
        for token in output.tokens or ():
            inside = token.start < span["end"] and span["start"] < token.end
            right.append(token.label == (span["label"] if inside else "O"))
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right)) and np.mean(right) > 0.7


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_what_is_written_is_learned(bases: dict[str, FrozenBase], tmp_path: Path, shape: str) -> None:
    base = bases[shape]
    kind = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[shape]
    result = train_adapter(base, WRITING, task_type=kind, config=replace(CONFIG, epochs=30, learning_rate=2e-2), folder=tmp_path)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    # The frozen output layer of so small a model makes no token much likelier than e^2.5 times the mean one.
    assert result.metrics["loss"] < math.log(base.model.config.vocab_size) - 2
    outputs = predicted(base, result, [row.text for row in result.validation], max_new_tokens=12)
    assert {(output.text or "").strip() for output in outputs} <= {"a fruit", "a tool"}    # and it ends where the completion does


def test_the_measured_loss_is_pefts_own_on_the_completion(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    base = bases["llama"]
    result = train_adapter(base, WRITING, task_type="CAUSAL_LM", config=replace(CONFIG, epochs=2), folder=tmp_path)
    model, total, count = load_peft(base, result.folder), 0.0, 0
    for row in result.validation:
        prompt = base.encode([row.text])[0].ids["input_ids"]
        answer = [*base.tokenizer(row.label, add_special_tokens=False)["input_ids"], base.tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        total -= sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert result.metrics["loss"] == pytest.approx(total / count, abs=1e-4)


def test_of_a_chat_only_the_last_answer_is_in_the_loss_and_is_asked_for_as_the_engine_does(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "llama", "llama")
    base = FrozenBase.load(folder)
    base.tokenizer.chat_template = CHAT
    said = [("user", "hello"), ("assistant", "yes?"), ("user", "the fox"), ("assistant", "jumps")]
    row = Example("the fox", extra={"messages": [{"role": role, "content": content} for role, content in said]})
    [features] = Writing(()).features(base, [row])
    prompt = list(base.encode_chat(said[:-1]).ids["input_ids"])
    assert features["input_ids"][: len(prompt)] == prompt
    assert features["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert features["labels"][len(prompt) :] == features["input_ids"][len(prompt) :]
    assert base.tokenizer.decode(features["labels"][len(prompt) :]) == "jumps</s>"


def test_of_a_chat_a_decoder_writes_the_last_answer_and_the_encoder_reads_what_the_engine_gives_it(tmp_path: Path) -> None:
    """Previously rows of `messages` were refused for SEQ_2_SEQ_LM."""
    base = FrozenBase.load(tiny_model(tmp_path / "t5", "t5"))
    said = [("user", "hello"), ("assistant", "yes?"), ("user", "the fox"), ("assistant", "jumps")]
    row = Example("the fox", extra={"messages": [{"role": role, "content": content} for role, content in said]})
    with pytest.raises(InvalidInput, match=r"no chat template\. Give a text \(to learn, `text` and `label`\), or use a chat model's folder"):
        Rewriting(()).features(base, [row])
    base.tokenizer.chat_template = CHAT
    [features] = Rewriting(()).features(base, [row])
    assert base.decode([features["input_ids"]]) == ["<user>hello<assistant>yes?<user>the fox<assistant>"]
    assert features["labels"] == base.tokenizer("jumps")["input_ids"]
    with torch.no_grad():
        loss = base.model(input_ids=torch.tensor([features["input_ids"]]), labels=torch.tensor([features["labels"]])).loss
    [scored] = Engine(base, lambda _: None).score([Request(Conversation(tuple(said[:-1])), None)], ["jumps"])
    assert scored.nats / scored.tokens == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("turns", [1, 60])
def test_a_conversation_that_is_too_long_is_learned_as_the_engine_asks_it(tmp_path: Path, architecture: str, turns: int) -> None:
    """Previously its first tokens were cut off, wherever that was."""
    base = FrozenBase.load(tiny_model(tmp_path / architecture, architecture))
    base.tokenizer.chat_template = CHAT
    older = [("user", "hello hello hello"), ("assistant", "yes? yes?")] * (turns - 1)
    said = [("system", "be brief"), *older, ("user", "the fox " * (1 if older else 2000)), ("assistant", "jumps")]
    row = Example("the fox", extra={"messages": [{"role": role, "content": content} for role, content in said]})
    [features] = (Writing if architecture == "llama" else Rewriting)(()).features(base, [row])
    with torch.no_grad():
        loss = base.model(input_ids=torch.tensor([features["input_ids"]]), labels=torch.tensor([features["labels"]])).loss
    [scored] = Engine(base, lambda _: None).score([Request(Conversation(tuple(said[:-1])), None)], ["jumps"])
    assert scored.nats / scored.tokens == pytest.approx(float(loss), rel=1e-4)
    assert "<user>the fox" in base.decode([features["input_ids"]])[0].replace("be brief", "")


def test_rows_that_are_cut_are_counted(tmp_path: Path) -> None:
    """An adapter that never saw the ends of its rows says so; previously nothing did."""
    long = "fox " * 3000
    chat = [{"role": "user", "content": long}, {"role": "assistant", "content": "jumps"}]
    for architecture, task in (("llama", Writing(())), ("t5", Rewriting(()))):
        base = FrozenBase.load(tiny_model(tmp_path / architecture, architecture))
        base.tokenizer.chat_template = CHAT
        whole = [Example("the fox", "jumps"), Example("fox", extra={"messages": [{"role": "user", "content": "fox"}, chat[1]]})]
        assert task.cut(base, whole) == 0
        assert task.cut(base, [*whole, Example(long, "jumps"), Example("the fox", long), Example(long, extra={"messages": chat})]) == 3
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    rows = [Example(text, label) for label in ("a", "b") for text in (f"{label} one", f"{label} two", f"{long} {label}")]
    result = train_adapter(base, rows, config=replace(CONFIG, epochs=1), folder=tmp_path / "trained")
    assert result.report.cut == 2 and "2 rows are longer than what the model reads of them, and cut" in "; ".join(result.report.warnings)


def test_a_conversation_that_leaves_no_room_for_its_question_is_named(tmp_path: Path) -> None:
    """The engine would refuse to answer it."""
    base = FrozenBase.load(tiny_model(tmp_path / "llama", "llama"))
    base.tokenizer.chat_template = CHAT
    said = [("system", "be brief " * 2000), ("user", "the fox"), ("assistant", "jumps")]
    row = Example("the fox", extra={"messages": [{"role": role, "content": content} for role, content in said]})
    with pytest.raises(InvalidInput, match=r"the conversation that ends with 'the fox' cannot be learned: the chat template, with the system text"):
        Writing(()).features(base, [row])


def test_a_prompt_that_is_too_long_is_cut_and_the_completion_is_not(bases: dict[str, FrozenBase]) -> None:
    base = bases["llama"]
    [features] = Writing(()).features(base, [Example("fox " * 2000, "jumps")])
    assert len(features["input_ids"]) == base.tokens_limit
    kept = [token for token in features["labels"] if token != IGNORED]
    assert base.tokenizer.decode(kept) == "jumps</s>"


@pytest.mark.parametrize(
    ("row", "task", "says"),
    [
        (Example("a"), Writing, "training row 2 has no label to write"),
        (Example("a", " "), Rewriting, "training row 2 has no label to write"),
        (Example("a", extra={"messages": [{"role": "user", "content": "x"}]}), Writing, "`messages` that do not end with an assistant's"),
        (Example("a", extra={"spans": [{"start": 0, "end": 9, "label": "x"}]}), Spans, "training row 2 has the span"),
        (Example("a"), Spans, "training row 2 has no list `spans`"),
    ],
)
def test_a_row_without_its_target_is_refused_with_its_position(row: Example, task: Any, says: str) -> None:
    good = Example("a", "b", extra={"spans": [{"start": 0, "end": 1, "label": "x"}]})
    with pytest.raises(InvalidInput, match=says):
        task.of([good, row], None, None)


def test_what_cannot_be_trained_is_refused_by_name(bases: dict[str, FrozenBase], tmp_path: Path) -> None:
    for says, base, more in (
        ("takes no CAUSAL_LM adapter", "bert", {"task_type": "CAUSAL_LM"}),
        ("task_type='POETRY' cannot be trained", "bert", {"task_type": "POETRY"}),
        ("does not hold {text} once", "llama", {"task_type": "CAUSAL_LM", "prompt_template": "hm"}),
        ("class_weights=True is for one label", "llama", {"task_type": "CAUSAL_LM", "config": TrainConfig(class_weights=True)}),
        ("r_drop=1.0 is for one label", "llama", {"task_type": "CAUSAL_LM", "config": TrainConfig(r_drop=1.0)}),
    ):
        with pytest.raises(InvalidInput, match=says):
            train_adapter(bases[base], WRITING, folder=tmp_path / "adapter", **more)
    assert not (tmp_path / "adapter").exists()
