"""Which adapters are closest to a newcomer, by the class means that the router keeps of each. Pure numpy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.statistics import F64, Exemplars, RoutingState

# c classes, d encoder width

RANKED_MAX = 32    # more than that are not near


def nearest(state: RoutingState, others: Iterable[tuple[AdapterRef, RoutingState]]) -> list[tuple[AdapterRef, float]]:
    """(ref, closeness) of at most RANKED_MAX others, closest first, ties by reference; those without exemplars are left out.

    One of the others is held at a time. Closeness is the mean, over the newcomer's class means, of the best cosine with one of the other's: -1 to 1.
    """
    if not state.count:
        return []
    own = _directions(state)
    found = ((ref, float((own @ _directions(other).T).max(axis=1).mean())) for ref, other in others if other.count)
    return heapq.nsmallest(RANKED_MAX, found, key=lambda pair: (-pair[1], pair[0]))


def _directions(state: RoutingState) -> F64:
    """(c, d), unit rows."""
    sums = Exemplars.of(state).sums
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12))
