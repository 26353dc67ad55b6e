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
from adapter_hub.routing.prototypes import closeness
from adapter_hub.routing.statistics import I64

# n inputs, p prototypes (classes), a adapters

SCARCE = 0.25          # of the typical class's exemplars: with fewer, the head answers too little, and the prototype may speak for the class
# What is assumed before a head was solved: measured on CLINC150's validation split with all-MiniLM-L6-v2.
SLOPE, INTERCEPT = 1.5, -0.47
CLOSENESS = 1.0


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


def columns_of(head: Head | None, refs: Sequence[AdapterRef], sizes: I64, labelled: I64) -> I64:
    """(p,): the head's column of each prototype of these adapters, in order; -1 where the head has not solved it.

    `sizes` (a,) counts each adapter's prototypes, `labelled` (a,) those of them that are labels: the rest share one column.
    """
    if head is None:
        return np.full(int(sizes.sum()), -1)
    firsts = np.array([head.columns.get(ref, -1) for ref in refs], np.int64)
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.where(np.repeat(firsts, sizes) < 0, -1, np.repeat(firsts, sizes) + np.minimum(within, np.repeat(labelled, sizes)))
