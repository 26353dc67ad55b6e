"""The metrics agree with scikit-learn's, which is written by others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from adapter_hub.training.evaluate import classifier_metrics


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**31 - 1))
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
