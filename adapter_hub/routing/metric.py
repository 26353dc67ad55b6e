"""The shared model of what a class looks like: one Gaussian within every class, one for where classes lie. Pure numpy.

Two-covariance model (Ioffe 2006, "Probabilistic linear discriminant analysis"), both covariances shrunk (Chen et al. 2010,
"Shrinkage algorithms for MMSE covariance estimation", OAS), so that few examples fall back to distance from the prototype.
`prototypes` scores inputs in the space that this module finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# n inputs, d encoder width, c classes
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Chosen on CLINC150's validation split (`oos_val`, `oos_train` for abstention) with all-MiniLM-L6-v2.
WITHIN_SHRINKAGE_MIN = 0.1    # heavy tails: the OAS optimum assumes Gaussians
BETWEEN_SHRINKAGE_MIN = 0.1
# Before any class has two exemplars: sentence vectors are unit length and about half of it varies within a class.
PRIOR_WITHIN_TRACE = 0.5
PRIOR_COUNT = 5.0             # what the prior traces weigh, in degrees of freedom


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """All that the metric needs to know of the exemplars. Sums, so that a part can be taken away again."""

    counts: F64     # (c,)
    sums: F64       # (c, d)
    squares: F64    # (d, d), sum of outer products

    @classmethod
    def of(cls, vectors: F64, classes: I64, class_count: int) -> Moments:
        sums = np.zeros((class_count, vectors.shape[1]))
        np.add.at(sums, classes, vectors)
        return cls(np.bincount(classes, minlength=class_count).astype(np.float64), sums, vectors.T @ vectors)

    def minus(self, part: Moments) -> Moments:
        return Moments(self.counts - part.counts, self.sums - part.sums, self.squares - part.squares)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """q = (x - mean) @ transform: there, the covariance within a class is I and that of class means is diag(spread)."""

    mean: F64          # (d,)
    transform: F64     # (d, d)
    spread: F64        # (d,), 0 or above

    @property
    def dim(self) -> int:
        return len(self.mean)

    def whiten(self, vectors: F64) -> F64:
        return (vectors - self.mean) @ self.transform

    @classmethod
    def fit(cls, moments: Moments) -> Metric:
        """The same numbers for the same moments, to the last bit."""
        used = moments.counts > 0    # a fold may hold every exemplar of a class
        counts, sums = moments.counts[used], moments.sums[used]
        dim = sums.shape[1]
        means = sums / counts[:, None]
        free = float(counts.sum()) - len(counts)
        within = (moments.squares - means.T @ sums) / max(free, 1.0)
        if free <= 0:
            within[:] = 0.0    # what is left is rounding
        shrinkage = max(WITHIN_SHRINKAGE_MIN, _oas(within, free))
        trace = (free * np.trace(within) + PRIOR_COUNT * PRIOR_WITHIN_TRACE) / (free + PRIOR_COUNT)
        shrunk = (1 - shrinkage) * within + shrinkage * trace / dim * np.eye(dim)

        mean = means.sum(axis=0) / (len(counts) + 1)    # one imagined class at the origin, where unit vectors centre
        offsets = means - mean
        observed = offsets.T @ offsets / max(len(counts), 1)
        between = observed - (1 / counts).mean() * within    # class means carry noise of their own
        shrinkage_between = max(BETWEEN_SHRINKAGE_MIN, _oas(observed, len(counts) - 1))
        prior = max(1 - trace, 0.1)
        trace_between = (len(counts) * max(np.trace(between), 0.05) + PRIOR_COUNT * prior) / (len(counts) + PRIOR_COUNT)
        between = (1 - shrinkage_between) * between + shrinkage_between * trace_between / dim * np.eye(dim)

        scale, axes = np.linalg.eigh(shrunk)
        whitener = axes / np.sqrt(scale)
        spread, turn = np.linalg.eigh(whitener.T @ between @ whitener)
        # Rounded to what the record stores, so that memory and disk agree exactly.
        stored = [np.asarray(a, np.float32).astype(np.float64) for a in (mean, whitener @ turn, np.clip(spread, 0, None))]
        return cls(*stored)


def _oas(covariance: F64, free: float) -> float:
    """Weight of the identity, 0 to 1."""
    dim = len(covariance)
    squares, trace = float((covariance * covariance).sum()), float(np.trace(covariance))
    excess = squares - trace**2 / dim
    if free <= 0 or excess <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / dim) * squares + trace**2) / ((free + 1 - 2 / dim) * excess))
