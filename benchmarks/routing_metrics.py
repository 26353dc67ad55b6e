"""What is measured of routed inputs. Pure numpy and scikit-learn; every score is higher where an input belongs more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

# n inputs, k candidates shown
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]
BINS = 15
Z95 = 1.959964


@dataclass(frozen=True, eq=False)
class Answers:
    """How a head routed n inputs."""

    ranked: I64        # (n, k), adapters, best first; -1: none
    acceptance: F64    # (n,), one score decides whether the best candidate is accepted
    accepted: Mapping[float, Mask] = field(default_factory=dict)    # by the stated rate of false rejection; empty where nothing set thresholds

    def __len__(self) -> int:
        return len(self.acceptance)


def top(answers: Answers, right: I64, k: int) -> float:
    """Share of inputs whose adapter is among the first k."""
    return float((answers.ranked[:, :k] == right[:, None]).any(axis=1).mean())


def macro_recall(answers: Answers, right: I64) -> float:
    """Mean over adapters of the share of their inputs that reach them."""
    hits = answers.ranked[:, 0] == right
    counts = np.bincount(right)
    return float((np.bincount(right, hits)[counts > 0] / counts[counts > 0]).mean())


def auroc(inside: F64, outside: F64) -> float:
    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    return float(roc_auc_score(truth, np.concatenate([inside, outside])))


def fpr95(inside: F64, outside: F64) -> float:
    """Share of out-of-scope inputs accepted where 95 % of in-scope inputs are."""
    return float((outside >= np.quantile(inside, 0.05)).mean())


def risks(acceptance: F64, wrong: Mask) -> F64:
    """(n,): the share of wrong answers among the i + 1 inputs with the highest acceptance scores."""
    order = np.argsort(-acceptance, kind="stable")
    return np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)


def curve(values: F64, points: int = 20) -> list[float]:
    """`values` at coverages 1/points, 2/points, …, 1."""
    return [float(values[max(0, round(len(values) * (i + 1) / points) - 1)]) for i in range(points)]


@dataclass(frozen=True, eq=False)
class Probability:
    """That an answer is right, by its acceptance score; monotone, fitted on held-out rows (Zadrozny and Elkan 2002)."""

    fitted: IsotonicRegression

    @classmethod
    def of(cls, acceptance: F64, right: Mask) -> Probability:
        return cls(IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0).fit(acceptance, right))

    def __call__(self, acceptance: F64) -> F64:
        return self.fitted.predict(acceptance)


def calibration_error(stated: F64, right: Mask) -> float:
    """Expected calibration error over bins of equally many inputs (Nixon et al. 2019)."""
    order = np.argsort(stated, kind="stable")
    bins = np.array_split(order, BINS)
    return float(sum(len(rows) * abs(stated[rows].mean() - right[rows].mean()) for rows in bins if len(rows)) / len(stated))


def paired_difference(right: Mask, other: Mask) -> tuple[float, float, float]:
    """(difference, low, high) of two heads' accuracies on the same inputs, with a normal 95 % interval of the paired difference."""
    each = right.astype(float) - other.astype(float)
    half = Z95 * float(each.std(ddof=1)) / math.sqrt(len(each))
    return float(each.mean()), float(each.mean()) - half, float(each.mean()) + half


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation) over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
