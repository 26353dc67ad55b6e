"""The metrics agree with scikit-learn's, which is written by others, and with what a hand counts."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from adapter_hub.errors import InvalidInput
from adapter_hub.training import evaluate
from adapter_hub.training.evaluate import (
    classifier_metrics,
    label_metrics,
    labels_metrics,
    mean_metrics,
    number_metrics,
    perplexity,
    same_text,
    sets_metrics,
    spans_metrics,
    spans_of,
    text_metrics,
    token_hits,
)


@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%:UserWarning")    # from the reference
@given(st.integers(1, 40), st.integers(2, 30), st.integers(0, 2**31 - 1))
def test_metrics_equal_scikit_learns(rows: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)).astype(np.float32) * 3
    targets = generator.integers(0, classes, size=rows)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)
    answers = logits.argmax(axis=1)
    assert classifier_metrics(logits, targets) == pytest.approx(
        {
            "accuracy": accuracy_score(targets, answers),
            "macro_f1": f1_score(targets, answers, average="macro"),
            "log_loss": log_loss(targets, probabilities, labels=range(classes)),
        }
    )


def test_a_sure_mistake_costs_much_but_not_infinitely_much() -> None:
    metrics = classifier_metrics(np.array([[1000.0, 0.0]], dtype=np.float32), np.array([1]))
    assert metrics["log_loss"] == pytest.approx(-np.log(1e-12))


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_metrics_of_several_labels_equal_scikit_learns(rows: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    answers, targets = (generator.random((rows, classes)) < 0.4 for _ in range(2))
    occurring = np.flatnonzero((answers | targets).any(axis=0))
    each = [f1_score(targets[:, label], answers[:, label], zero_division=0) for label in occurring]
    found = sets_metrics(answers, targets)
    assert found["accuracy"] == pytest.approx(np.mean([(mine == theirs).all() for mine, theirs in zip(answers, targets, strict=True)]))
    assert found["macro_f1"] == pytest.approx(np.mean(each) if each else 1.0)
    logits = np.where(answers, 1.0, -1.0).astype(np.float32)
    assert {key: labels_metrics(logits, targets)[key] for key in found} == found


def test_an_answer_of_another_task_is_wrong_and_no_class_of_its_own() -> None:
    answers, targets = ["red", "dog", None, "blue"], ["red", "red", "blue", "blue"]
    assert label_metrics(answers, targets, ["red", "blue"]) == pytest.approx({"accuracy": 0.5, "macro_f1": 2 / 3})    # F1 of each: 2 · 1 / 3
    assert label_metrics(answers, targets, ["red", "blue", "dog"])["macro_f1"] == pytest.approx(4 / 9)
    assert label_metrics([None], ["red"], []) == {"accuracy": 0.0, "macro_f1": 0.0}


@pytest.mark.filterwarnings("error")
def test_as_many_labels_as_rows_are_measured_without_a_warning() -> None:
    """Previously scikit-learn supposed a regression, at each epoch and in each evaluation."""
    labels = [f"label {number}" for number in range(30)]
    assert label_metrics(labels, labels, labels) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert label_metrics([None] * 30, labels, labels) == {"accuracy": 0.0, "macro_f1": 0.0}
    assert label_metrics([labels[0]] * 30, labels, labels) == pytest.approx({"accuracy": 1 / 30, "macro_f1": 2 / 31 / 30})


def test_numbers_are_measured_by_their_distance() -> None:
    found = number_metrics(np.array([1.0, 2.0, 6.0]), np.array([1.0, 4.0, 5.0]))
    assert found == pytest.approx({"rmse": (5 / 3) ** 0.5, "mae": 1.0, "correlation": np.corrcoef([1, 2, 6], [1, 4, 5])[0, 1]})
    assert number_metrics(np.array([1.0, 1.0]), np.array([0.0, 4.0]))["correlation"] == 0


TEXT = "Ada Lovelace met Babbage in London"


def test_neighbouring_tokens_of_one_label_are_a_span_without_the_space_before_it() -> None:
    tokens = [(0, 3, "PER"), (3, 12, "PER"), (12, 16, "O"), (16, 20, "PER"), (20, 24, "PER"), (24, 27, "O"), (27, 34, "LOC")]
    assert spans_of(tokens, TEXT, ["O", "PER", "LOC"]) == {(0, 12, "PER"), (17, 24, "PER"), (28, 34, "LOC")}


def test_b_begins_a_span_and_so_does_an_i_that_follows_nothing_of_its_kind() -> None:
    tokens = [(0, 3, "B-PER"), (4, 12, "B-PER"), (13, 16, "I-PER"), (17, 24, "I-LOC"), (25, 27, "O"), (28, 34, "I-LOC")]
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    assert spans_of(tokens, TEXT, labels) == {(0, 3, "PER"), (4, 16, "PER"), (17, 24, "LOC"), (28, 34, "LOC")}
    assert token_hits(tokens, [(0, 16, "PER"), (28, 34, "PER")], labels) == [True, True, True, False, True, False]


def test_a_span_counts_with_both_borders_and_its_label() -> None:
    wanted = [frozenset({(0, 12, "PER"), (17, 24, "PER")}), frozenset({(0, 3, "LOC")})]
    found = [frozenset({(0, 12, "PER"), (17, 20, "PER"), (28, 34, "LOC")}), frozenset({(0, 3, "PER")})]
    assert spans_metrics(found, wanted) == pytest.approx({"span_precision": 1 / 4, "span_recall": 1 / 3, "span_f1": 2 / 7})
    assert spans_metrics([frozenset()], [frozenset()]) == {"span_precision": 1.0, "span_recall": 1.0, "span_f1": 1.0}
    assert spans_metrics([frozenset()], wanted[:1])["span_f1"] == spans_metrics(found[:1], [frozenset()])["span_precision"] == 0


def test_texts_are_the_same_but_for_white_space() -> None:
    assert same_text(" half past\n nine ", "half past nine") and not same_text("Half past nine", "half past nine") and not same_text(None, "a")


def test_written_texts_are_measured_by_what_others_count() -> None:
    pytest.importorskip("sacrebleu", reason="the extra 'evaluation' is not installed")
    pytest.importorskip("rouge_score", reason="the extra 'evaluation' is not installed")
    handlers = [*logging.getLogger().handlers]
    assert text_metrics(["the cat sat"], ["the cat sat"]) == pytest.approx({"exact_match": 1.0, "rouge_l": 1.0, "chrf": 1.0})
    # Longest common words: "the cat", of 2 and of 3: F = 2 · 1 · ⅔ / (1 + ⅔).
    assert text_metrics(["the cat", ""], ["the cat sat", "a"])["rouge_l"] == pytest.approx((4 / 5 + 0) / 2)
    assert logging.getLogger().handlers == handlers    # rouge-score would set up the program's
    # Of "ab" against "abc": precision 1 and 1, recall 2/3 and 1/2 for 1 and 2 characters, and none of 3, whose precision is not defined.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert text_metrics(["ab"], ["abc"])["chrf"] == pytest.approx(5 * precision * recall / (4 * precision + recall), abs=1e-4)


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_TEXT_PACKAGES", ("rouge_score_absent", "json"))
    with pytest.raises(InvalidInput, match=r"needs rouge_score_absent, which is not installed\. .*adapter_hub\[evaluation\]"):
        text_metrics(["a"], ["a"])


def test_perplexity_is_of_the_mean_token_and_may_be_beyond_a_float() -> None:
    assert perplexity(2 * np.log(8), 2) == pytest.approx(8) and perplexity(1e6, 1) == float("inf")


def test_a_mean_is_over_those_that_have_the_metric() -> None:
    assert mean_metrics([{"accuracy": 1.0}, {"accuracy": 0.5, "macro_f1": 0.2}, {}]) == {"accuracy": 0.75, "macro_f1": 0.2}
