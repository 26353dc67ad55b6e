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
    answers = logits.argmax(axis=1)
    return {
        "accuracy": float((answers == targets).mean()),
        "macro_f1": _macro_f1(answers, targets),
        "log_loss": float(log_losses(logits, targets).mean()),
    }


def log_losses(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,), nats, of logits (n, c) against class numbers (n,)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(-np.log(np.maximum(probabilities[np.arange(len(targets)), targets], LOG_LOSS_FLOOR)))


def _macro_f1(answers: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
    scores = []
    for label in np.union1d(answers, targets):
        hits = ((answers == label) & (targets == label)).sum()
        scores.append(2 * hits / ((answers == label).sum() + (targets == label).sum()))
    return float(np.mean(scores))


def labels_metrics(logits: NDArray[np.float32], targets: NDArray[np.bool_]) -> dict[str, float]:
    """accuracy (rows whose every label is right), macro_f1 over the labels that occur, and log_loss a label, of logits (n, c), each by itself."""
    answers = logits >= 0    # probability ½
    scores = [
        2 * (answers[:, label] & targets[:, label]).sum() / (answers[:, label].sum() + targets[:, label].sum())
        for label in np.flatnonzero((answers | targets).any(axis=0))
    ]
    signed = np.where(targets, logits, -logits).astype(np.float64)
    return {
        "accuracy": float((answers == targets).all(axis=1).mean()),
        "macro_f1": float(np.mean(scores)) if scores else 1.0,
        "log_loss": float(np.logaddexp(0, -signed).mean()),
    }


def number_metrics(answers: NDArray[np.float32], targets: NDArray[np.float32]) -> dict[str, float]:
    """rmse, mae, and Pearson's correlation (0 where either side is constant) of numbers (n,)."""
    apart = answers.astype(np.float64) - targets
    constant = np.ptp(answers) == 0 or np.ptp(targets) == 0
    return {
        "rmse": float(np.sqrt((apart**2).mean())),
        "mae": float(np.abs(apart).mean()),
        "correlation": 0.0 if constant else float(np.corrcoef(answers, targets)[0, 1]),
    }
