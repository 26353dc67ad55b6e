"""One adapter under a metric: a prototype for each class, what they score, and what they would score without one exemplar.

The score of an input for a class is the log-likelihood ratio of "drawn from this class, which is known from n exemplars" to
"drawn from anywhere": a relative Mahalanobis distance (Ren et al. 2021) that knows how well each prototype is known. Two cosines
are added, in nats. An adapter scores as its best class. Everything is linear in [x, q²], so an inner-product index can search it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapter_hub.routing.metric import F64, I64, PRIOR_WITHIN_TRACE, Metric
from adapter_hub.routing.statistics import Exemplars

# n inputs, d encoder width, c classes of the adapter

# Nats for a cosine of 1, chosen on CLINC150's validation split with all-MiniLM-L6-v2.
CLASS_COSINE = 100.0      # to the class mean: the better half of abstention, and of few examples
ADAPTER_COSINE = 50.0     # to the adapter's centroid: holds under shift, where the ratio is too sharp


@dataclass(frozen=True, slots=True, eq=False)
class Prototypes:
    """score(x) = x · linear + q² · square + bias, by class; q is x whitened."""

    linear: F64      # (c, d)
    square: F64      # (c, d)
    bias: F64        # (c,)
    centres: F64     # (c, d), where the class's inputs are expected in whitened space
    widths: F64      # (c, d), their variance there: above 1 by the uncertainty of the mean

    @classmethod
    def fit(cls, metric: Metric, means: F64, counts: F64) -> Prototypes:
        """From class means (c, d) and the distinct exemplars behind each (c,)."""
        spread, known = metric.spread, counts[:, None] * metric.spread
        widths = 1 + spread / (known + 1)
        centres = known / (known + 1) * metric.whiten(means)
        from_whitened = (centres / widths) @ metric.transform.T
        bias = 0.5 * (np.log((1 + spread) / widths) - centres**2 / widths).sum(axis=1) - from_whitened @ metric.mean
        return cls(from_whitened + CLASS_COSINE * unit(means), 0.5 * (1 / (1 + spread) - 1 / widths), bias, centres, widths)

    def scores(self, vectors: F64, whitened: F64) -> F64:
        """(n, c): every input for every class."""
        return np.asarray(vectors @ self.linear.T + (whitened * whitened) @ self.square.T + self.bias)

    def paired_scores(self, vectors: F64, whitened: F64) -> F64:
        """(n,): input i for class i."""
        return np.asarray((vectors * self.linear).sum(axis=1) + (whitened * whitened * self.square).sum(axis=1) + self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One adapter under a metric."""

    exemplars: Exemplars
    prototypes: Prototypes
    centroid: F64             # (d,), unit; every class counts the same

    @classmethod
    def of(cls, exemplars: Exemplars, metric: Metric) -> Member:
        means = exemplars.means
        return cls(exemplars, Prototypes.fit(metric, means, exemplars.known), unit(means.sum(axis=0)))

    def rows(self) -> tuple[F64, F64]:
        """((c, 2d), (c,)): what an index over [x, q²] holds, and the biases."""
        return np.hstack([self.prototypes.linear + ADAPTER_COSINE * self.centroid, self.prototypes.square]), self.prototypes.bias

    def left_out_scores(self, metric: Metric, rows: I64) -> F64:
        """(n,): the adapter's score of its own exemplars `rows`, each left out of its class mean and of the centroid.

        Closed form. Honest where the metric was fitted without those rows.
        """
        e, class_means = self.exemplars, self.exemplars.means
        x, own = e.vectors[rows], e.classes[rows]
        q, n = metric.whiten(x), e.counts[own]
        stays = n > 1
        means = np.where(stays[:, None], (e.sums[own] - x) / np.maximum(n - 1, 1)[:, None], 0.0)
        scores = self.prototypes.scores(x, q)
        reduced = Prototypes.fit(metric, means, np.maximum(n - 1, 1)).paired_scores(x, q)
        scores[np.arange(len(rows)), own] = np.where(stays, reduced, -np.inf)
        centroids = unit(class_means.sum(axis=0) - class_means[own] + means)
        return np.asarray(scores.max(axis=1) + ADAPTER_COSINE * (x * centroids).sum(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """All adapters side by side, for scoring one adapter's exemplars against every other."""

    prototypes: Prototypes
    starts: I64          # (a,), the first class of each adapter
    centroids: F64       # (a, d)

    @classmethod
    def of(cls, members: Sequence[Member]) -> Panel:
        parts = [member.prototypes for member in members]
        joined = Prototypes(*(np.concatenate([getattr(part, name) for part in parts]) for name in Prototypes.__slots__))
        starts = np.cumsum([0, *(len(part.bias) for part in parts)])[:-1]
        return cls(joined, starts, np.array([member.centroid for member in members]))

    def scores(self, vectors: F64, whitened: F64) -> F64:
        """(n, a): any inputs for every adapter."""
        best = np.maximum.reduceat(self.prototypes.scores(vectors, whitened), self.starts, axis=1)
        return np.asarray(best + ADAPTER_COSINE * (vectors @ self.centroids.T))


def expected_scores(metric: Metric, member: Member) -> F64:
    """(c,): what an input of each class would score on average, were the model true: the prior before any input was seen."""
    spread, p = metric.spread, member.prototypes
    ratio = 0.5 * (np.log((1 + spread) / p.widths) - 1 + (p.widths + p.centres**2) / (1 + spread)).sum(axis=1)
    shared = 1 - PRIOR_WITHIN_TRACE
    alike = shared / np.sqrt(shared + PRIOR_WITHIN_TRACE / member.exemplars.counts)
    return np.asarray(ratio + (CLASS_COSINE + ADAPTER_COSINE) * alike)


def unit(rows: F64) -> F64:
    """Each row at length 1. A zero row stays: contradictory exemplars that cancel have no direction and pull nowhere."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norms > 1e-12, norms, 1.0))
