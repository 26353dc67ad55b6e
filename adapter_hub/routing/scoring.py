"""What an input scores for an adapter: the response of its best class, plus how close the input comes to the adapter. Pure numpy.

The response is the head's where the head has solved the class; elsewhere it is what a prototype so close usually gets, so that a
newcomer competes at once. Closeness is what holds where inputs are unlike all exemplars: the head is sharp only where it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.features import F32
from adapter_hub.routing.head import Head
from adapter_hub.routing.prototypes import SHARPNESS, closeness
from adapter_hub.routing.statistics import I64

# n inputs, p prototypes (classes), a adapters, m prototypes of each, d encoder width

SCARCE = 0.25          # of the typical class's exemplars: with fewer, the head answers too little, and the prototype may speak for the class
# What is assumed before a head was solved: measured on CLINC150's validation split with all-MiniLM-L6-v2.
SLOPE, INTERCEPT = 1.5, -0.47
CLOSENESS = 1.0
TYPICAL_PRODUCT = 0.75    # of an input with the prototype of its class


@dataclass(frozen=True, slots=True)
class Scoring:
    """How responses and closeness add up; fitted when a registry is calibrated, and the same until it is calibrated again."""

    closeness: float = CLOSENESS       # weight of closeness beside the response
    slope: float = SLOPE               # response that a product of prototype and input lets expect, by a line
    intercept: float = INTERCEPT
    typical_count: float = 0.0         # exemplars of the class of a typical exemplar; 0: nothing was solved

    def expected(self, products: F32) -> F32:
        """(n, p): the response that these products of inputs and prototypes let expect, 0 to 1."""
        return np.asarray(np.clip(np.float32(self.slope) * products + np.float32(self.intercept), 0, 1), np.float32)

    def responses(self, products: F32, solved: F32 | None, columns: I64, counts: F32) -> F32:
        """(n, p): from products (n, p), the head's responses (n, k), each prototype's column in the head (-1: none) and exemplars."""
        expected = self.expected(products)
        if solved is None or (columns < 0).all():
            return expected
        return self.chosen(expected, solved[:, np.maximum(columns, 0)], columns, counts)

    def chosen(self, expected: F32, by_head: F32, columns: I64, counts: F32) -> F32:
        """The head's response; what is expected where the head has no such class; the greater for a scarce class. Shapes broadcast."""
        scarce = counts < SCARCE * self.typical_count
        return np.where(columns < 0, expected, np.where(scarce, np.maximum(by_head, expected), by_head))

    def scores(self, responses: F32, products: F32, starts: I64) -> F32:
        """(n, a)"""
        return self.combined(np.maximum.reduceat(responses, starts, axis=1), closeness(products, starts))

    def combined(self, responses: F32, close: F32) -> F32:
        return np.asarray(responses + np.float32(self.closeness) * close, np.float32)

    def tangents(self, means: F32) -> F32:
        """(a, m, d), for prototypes (a, m, d): rows whose greatest product with an input, plus the intercept, is about an adapter's score.

        Where an input is near one class, the score is a line of that class's product and a convex function of all of them. Each row is
        its tangent there. What is constant lies along the prototype, whose product with such an input is known.
        """
        units = means / np.maximum(np.linalg.norm(means, axis=2, keepdims=True), np.float32(1e-12))
        products = np.float32(TYPICAL_PRODUCT) * (units @ means.transpose(0, 2, 1))    # (a, class, other)
        shares = np.exp(np.float32(SHARPNESS) * products)
        close = np.log(shares.mean(axis=2)) / np.float32(SHARPNESS)
        shares /= shares.sum(axis=2, keepdims=True)
        constant = (close - (shares * products).sum(axis=2)) / np.float32(TYPICAL_PRODUCT)
        rows = np.float32(self.slope) * means + np.float32(self.closeness) * (shares @ means + constant[:, :, None] * units)
        return np.asarray(rows, np.float32)


def columns_of(head: Head | None, refs: Sequence[AdapterRef], sizes: I64, labelled: I64) -> I64:
    """(p,): the head's column of each prototype of these adapters, in order; -1 where the head has not solved it.

    `sizes` (a,) counts each adapter's prototypes, `labelled` (a,) those of them that are labels: the rest share one column.
    """
    if head is None:
        return np.full(int(sizes.sum()), -1)
    firsts = np.array([head.columns.get(ref, -1) for ref in refs], np.int64)
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(np.repeat(firsts, sizes) < 0, -1, np.repeat(firsts, sizes) + np.minimum(within, np.repeat(labelled, sizes)))
