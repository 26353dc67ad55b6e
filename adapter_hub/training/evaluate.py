"""How good a classifier is on labelled rows: numbers from probabilities. Pure numpy."""

# n rows, c classes

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOG_LOSS_FLOOR = 1e-12


def classifier_metrics(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 and log_loss (nats) of logits (n, c) against class numbers (n,).

    macro_f1 averages over the classes that occur, in targets or in answers.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    answers = logits.argmax(axis=1)
    own = probabilities[np.arange(len(targets)), targets]
    return {
        "accuracy": float((answers == targets).mean()),
        "macro_f1": _macro_f1(answers, targets),
        "log_loss": float(-np.log(np.maximum(own, LOG_LOSS_FLOOR)).mean()),
    }


def _macro_f1(answers: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
    scores = []
    for label in np.union1d(answers, targets):
        hits = ((answers == label) & (targets == label)).sum()
        scores.append(2 * hits / ((answers == label).sum() + (targets == label).sum()))
    return float(np.mean(scores))
