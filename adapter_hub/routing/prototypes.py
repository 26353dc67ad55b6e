"""One adapter by its class means: how close an input comes to each, and how close to the adapter as a whole. Pure numpy.

A prototype is a class mean divided by the length that the mean of very many exemplars would have, so that a class known by one
exemplar and one known by a hundred are measured alike. With many exemplars the product with an input is their cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapter_hub.routing.features import F32
from adapter_hub.routing.statistics import F64, I64, Exemplars

# n inputs, d encoder width, c classes of the adapter, p prototypes of all adapters, a adapters

F16 = NDArray[np.float16]

# Chosen on CLINC150's validation split with all-MiniLM-L6-v2: benchmarks/LOG.md.
SHARPNESS = 2.0                 # of the soft maximum: 0 is the adapter's centroid, infinity its nearest class
COHERENCE = 0.5                 # mean cosine of two exemplars of one class, before any pair was seen
COHERENCE_WEIGHT = 3.0          # what that expectation weighs, in exemplars
COHERENCE_MIN = 0.2
DESCRIPTION_COHERENCE = 0.2     # inputs are less like a description than like each other,
LABEL_COHERENCE = 0.4           # and a little less like the name of their label


@dataclass(frozen=True, slots=True, eq=False)
class Prototypes:
    """Of one adapter."""

    means: F16          # (c, d), rounded once: every index and matrix is made from these
    counts: F32         # (c,), distinct exemplars of the class that each is of for the head
    labelled: int       # how many are labels; the others, after them, are one class for the head
    single: bool        # a description with names of labels, or one example: the head never sees it

    @classmethod
    def of(cls, exemplars: Exemplars, described: bool) -> Prototypes:
        by_words = np.where(exemplars.labelled, LABEL_COHERENCE, DESCRIPTION_COHERENCE)
        coherence = by_words if described else coherences(exemplars.sums, exemplars.counts)
        means = exemplars.sums / (exemplars.counts * np.sqrt(coherence))[:, None]
        counts = np.bincount(exemplars.targets, minlength=exemplars.target_count)
        labelled = int(exemplars.labelled.sum())
        behind = counts[np.minimum(np.arange(len(means)), labelled)].astype(np.float32)
        return cls(means.astype(np.float16), behind, labelled, exemplars.single)


def coherences(sums: F64, counts: F64) -> F64:
    """(c,): the mean cosine of two exemplars of each class, without the terms of an exemplar with itself."""
    pairs = counts * (counts - 1)
    observed = ((sums**2).sum(axis=1) - counts) / np.maximum(pairs, 1)
    weight = np.maximum(counts - 1, 0)
    return np.asarray(np.clip((weight * observed + COHERENCE_WEIGHT * COHERENCE) / (weight + COHERENCE_WEIGHT), COHERENCE_MIN, 1))


def left_out_products(exemplars: Exemplars, rows: I64) -> F64:
    """(n,): the product of each of these exemplars with its own class's prototype made without it; -inf where nothing is left."""
    x, own = exemplars.features.dense[rows].astype(np.float64), exemplars.classes[rows]
    rest, counts = exemplars.sums[own] - x, exemplars.counts[own] - 1
    scale = np.maximum(counts, 1) * np.sqrt(coherences(rest, counts))
    return np.where(counts > 0, (x * rest).sum(axis=1) / scale, -np.inf)


def closeness(products: F32, starts: I64) -> F32:
    """(n, a): the soft maximum of an adapter's prototypes, from the products (n, p) and the first prototype of each adapter.

    log mean exp, sharpened: an input unlike every class still prefers the adapter that it is like as a whole.
    """
    sizes = np.diff(np.append(starts, products.shape[1]))
    sums = np.add.reduceat(np.exp(np.float32(SHARPNESS) * products), starts, axis=1)
    return np.asarray(np.log(sums / sizes) / np.float32(SHARPNESS), np.float32)
