"""The heads that ours is measured against, all on the same frozen features. Each answers with adapters ranked and one acceptance score."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from routing_data import I64, Part, Task
from routing_metrics import Answers
from scipy import linalg
from sklearn.linear_model import LogisticRegression

from adapter_hub.routing.features import Features

# n inputs, a adapters, c classes, d encoder width, s sketch width, w width of both joined, k candidates
F32 = NDArray[np.float32]
LEXICAL = 0.5           # weight of the sketch beside the embedding, as the router's own
RANKED = 5
NEIGHBOURS = 10
BLOCK = 1024
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)    # C of the logistic regression, chosen on validation rows
FOLDS = 3                        # where there are none
JOINT = "joint logistic, dense + lexical"    # the bound for a frozen encoder
CENTROID = "one centroid"    # LoraRetriever's way


class Head(Protocol):
    def answers(self, features: Features) -> Answers: ...

    @property
    def bytes_stored(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Linear:
    """One score a class: an inner product. Centroids by cosine, and logistic regression."""

    dense: F32                 # (d, c)
    lexical: F32 | None        # (s, c), the weight of the sketch included
    bias: F32                  # (c,)
    owner: I64                 # (c,), the adapter of each class

    @classmethod
    def centroids(cls, part: Part, owner: I64, classes: I64, lexical: float) -> Linear:
        """Unit means of the exemplars of each of `classes`, an index for each exemplar."""
        joint = joined(part.features, lexical)
        sums = np.zeros((len(owner), joint.shape[1]), np.float32)
        np.add.at(sums, classes, joint)
        sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12) * np.sqrt(1 + lexical**2)
        d = part.features.dense.shape[1]
        return cls(sums[:, :d].T.copy(), lexical * sums[:, d:].T if lexical else None, np.zeros(len(owner), np.float32), owner)

    @classmethod
    def logistic(cls, part: Part, owner: I64, lexical: float, penalty: float) -> Linear:
        """Multinomial logistic regression over all classes at once; a class without exemplars is never chosen."""
        found = LogisticRegression(C=penalty, max_iter=500).fit(joined(part.features, lexical), part.classes)
        d = part.features.dense.shape[1]
        weights, bias = np.zeros((len(owner), found.coef_.shape[1]), np.float32), np.full(len(owner), -1e9, np.float32)
        if len(found.classes_) == 2:    # scikit-learn keeps the difference of two classes only
            weights[found.classes_], bias[found.classes_] = found.coef_ * [[-0.5], [0.5]], found.intercept_ * [-0.5, 0.5]
        else:
            weights[found.classes_], bias[found.classes_] = found.coef_, found.intercept_
        return cls(weights[:, :d].T.copy(), lexical * weights[:, d:].T if lexical else None, bias, owner)

    def class_scores(self, features: Features) -> F32:
        scores = features.dense @ self.dense + self.bias
        return scores if self.lexical is None else scores + features.lexical @ self.lexical

    def answers(self, features: Features) -> Answers:
        scores = by_adapter(self.class_scores(features), self.owner)
        return Answers(ranked(scores), scores.max(axis=1).astype(np.float64))

    @property
    def bytes_stored(self) -> int:
        return self.dense.nbytes + self.bias.nbytes + (0 if self.lexical is None else self.lexical.nbytes)


@dataclass(frozen=True, eq=False)
class Discriminant:
    """LDA: one shrunk covariance shared by all classes. Accepts by the relative Mahalanobis distance (Ren et al. 2021)."""

    means: F32          # (c, w), whitened by the covariance within classes
    within: F32         # (w, w), x @ within is white
    around: F32         # (w, w), by the covariance of everything
    centre: F32         # (w,), whitened by `around`
    owner: I64
    lexical: float

    @classmethod
    def of(cls, part: Part, owner: I64, lexical: float) -> Discriminant:
        joint = joined(part.features, lexical)
        sums = np.zeros((len(owner), joint.shape[1]), np.float32)
        np.add.at(sums, part.classes, joint)
        counts = np.bincount(part.classes, minlength=len(owner))
        means = sums / counts[:, None]
        within, around = _whitening(joint - means[part.classes]), _whitening(joint - joint.mean(axis=0))
        return cls(means @ within, within, around, joint.mean(axis=0) @ around, owner, lexical)

    def answers(self, features: Features) -> Answers:
        joint = joined(features, self.lexical)
        white = joint @ self.within
        distances = (white**2).sum(axis=1, keepdims=True) - 2 * white @ self.means.T + (self.means**2).sum(axis=1)
        background = ((joint @ self.around - self.centre) ** 2).sum(axis=1)
        scores = by_adapter(-distances, self.owner)
        return Answers(ranked(scores), (scores.max(axis=1) + background).astype(np.float64))

    @property
    def bytes_stored(self) -> int:
        return self.means.nbytes + self.within.nbytes + self.around.nbytes + self.centre.nbytes


def _whitening(rows: F32) -> F32:
    """(w, w), from centred rows: the covariance shrunk towards its mean variance, by how many rows there are (OAS, Chen et al. 2010)."""
    n, w = rows.shape
    covariance = rows.T @ rows / n
    mean, square = float(np.trace(covariance)) / w, float((covariance**2).mean())
    shrinkage = min(1.0, (square + mean**2) / ((n + 1) * (square - mean**2 / w)))
    covariance *= 1 - shrinkage
    covariance[np.diag_indices(w)] += shrinkage * mean
    return linalg.inv(linalg.cholesky(covariance, lower=True)).T.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest exemplars vote with their cosines. Accepts by their mean cosine."""

    exemplars: F32      # (m, w), unit rows
    adapters: I64       # (m,)
    count: int          # of adapters
    lexical: float

    @classmethod
    def of(cls, part: Part, count: int, lexical: float) -> Neighbours:
        return cls(_unit(joined(part.features, lexical)), part.adapters, count, lexical)

    def answers(self, features: Features) -> Answers:
        parts = [self._block(features[np.arange(start, min(start + BLOCK, len(features)))]) for start in range(0, len(features), BLOCK)]
        return Answers(np.concatenate([p.ranked for p in parts]), np.concatenate([p.acceptance for p in parts]))

    def _block(self, features: Features) -> Answers:
        cosines = _unit(joined(features, self.lexical)) @ self.exemplars.T
        k = min(NEIGHBOURS, cosines.shape[1])
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(cosines, nearest, axis=1)
        at = np.repeat(np.arange(len(features)), k)
        scores = np.zeros((len(features), self.count))
        np.add.at(scores, (at, self.adapters[nearest].ravel()), values.ravel())
        return Answers(ranked(scores), values.mean(axis=1).astype(np.float64))

    @property
    def bytes_stored(self) -> int:
        return self.exemplars.nbytes


def joined(features: Features, lexical: float) -> F32:
    """(n, w): the embedding, and the sketch beside it."""
    if not lexical:
        return features.dense
    return np.hstack([features.dense, np.float32(lexical) * features.lexical.toarray()])


def by_adapter(scores: F32, owner: I64) -> F32:
    """(n, a): each adapter's best class."""
    order = np.argsort(owner, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(owner[order]) > 0])
    return np.maximum.reduceat(scores[:, order], starts, axis=1)


def ranked(scores: NDArray[np.floating]) -> I64:
    return np.argsort(-scores, axis=1, kind="stable")[:, :RANKED]


def _unit(rows: F32) -> F32:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# ---- by name ---------------------------------------------------------------------------------------------------------------


class Joint:
    """Logistic regression, its penalty chosen on held-out rows. Tasks of one corpus share what was fitted."""

    def __init__(self, lexical: float) -> None:
        self.lexical = lexical
        self._fitted: dict[tuple[str, float], Linear] = {}
        self._chosen: dict[str, float] = {}
        self.fit_s: dict[str, float] = {}      # of each corpus: the last fit

    def __call__(self, task: Task) -> Linear:
        penalty = self.penalty(task)
        fitted = self._fit(task.corpus, task.train, task, penalty)
        return Linear(fitted.dense, fitted.lexical, fitted.bias, task.owner)

    def penalty(self, task: Task) -> float:
        """By accuracy over classes, on the rows for tuning or by folds; for another draw of shots, as for the usual one."""
        key = _usual(task.corpus)
        if key not in self._chosen:
            scores = {penalty: self._checked(task, penalty) for penalty in PENALTIES}
            self._chosen[key] = max(scores, key=lambda penalty: scores[penalty])
        return self._chosen[key]

    def _checked(self, task: Task, penalty: float) -> float:
        hits: list[np.ndarray] = []
        for number, (fit, check) in enumerate(_tuning(task)):
            whole = fit is task.train
            corpus = task.corpus if whole else f"{task.corpus} fold {number}"
            scores = self._fit(corpus, fit, task, penalty).class_scores(check.features)
            hits.append(scores.argmax(axis=1) == check.classes)
        return float(np.concatenate(hits).mean())

    def _fit(self, corpus: str, part: Part, task: Task, penalty: float) -> Linear:
        key = corpus, penalty
        if key not in self._fitted:
            started = time.perf_counter()
            self._fitted[key] = Linear.logistic(part, task.owner, self.lexical, penalty)
            self.fit_s[corpus] = time.perf_counter() - started
        return self._fitted[key]


def _usual(corpus: str) -> str:
    head, shots, _ = corpus.partition("shot_")
    return head + shots


def _tuning(task: Task) -> Iterator[tuple[Part, Part]]:
    if task.tuning:
        yield task.tuning
        return
    fold = np.empty(len(task.train), np.int64)
    for number in np.unique(task.train.classes):
        rows = np.flatnonzero(task.train.classes == number)
        fold[rows] = np.arange(len(rows)) % FOLDS
    for number in range(FOLDS):
        yield task.train[np.flatnonzero(fold != number)], task.train[np.flatnonzero(fold == number)]


def one_centroid(task: Task, lexical: float = 0.0) -> Linear:
    return Linear.centroids(task.train, np.arange(len(task.adapters)), task.train.adapters, lexical)


def class_centroids(task: Task, lexical: float = 0.0) -> Linear:
    return Linear.centroids(task.train, task.owner, task.train.classes, lexical)


def discriminant(task: Task, lexical: float = 0.0) -> Discriminant:
    return Discriminant.of(task.train, task.owner, lexical)


def neighbours(task: Task, lexical: float = 0.0) -> Neighbours:
    return Neighbours.of(task.train, len(task.adapters), lexical)


def heads(quick: bool = False) -> Mapping[str, Callable[[Task], Head]]:
    """By name, in the order of the tables. The dense ones are what others ship; with the sketch they see what ours sees."""
    made: dict[str, Callable[[Task], Head]] = {}
    plain = {CENTROID: one_centroid, "class centroids": class_centroids, f"kNN-{NEIGHBOURS}": neighbours, "LDA": discriminant}
    for name, head in plain.items():
        made[name] = head
        made[f"{name}, dense + lexical"] = lambda task, head=head: head(task, LEXICAL)
    if not quick:
        made["joint logistic"] = Joint(0.0)
    made[JOINT] = Joint(LEXICAL)
    return made


# These learn a task from its own exemplars alone; the others are fitted again on everything.
ADDS = frozenset({CENTROID, "class centroids", f"kNN-{NEIGHBOURS}"})


def adds(name: str) -> bool:
    return name.split(",")[0] in ADDS

