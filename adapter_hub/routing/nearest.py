"""Which adapters are closest to a newcomer, or to each other, by the class means that the router keeps of each. Pure numpy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.statistics import F64, Exemplars, RoutingState

# n adapters, c classes, d encoder width

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


def neighbours(states: Iterable[tuple[AdapterRef, RoutingState]]) -> list[tuple[AdapterRef, AdapterRef, float]]:
    """(a, b, closeness), a before b, of each adapter with at most RANKED_MAX others that its mean is closest to; in the order of references.

    Closeness is as in `nearest`, the lesser of both ways: each lies in the other. Those without exemplars have none. One state is held at a time.
    """
    own = {ref: _directions(state).astype(np.float32) for ref, state in sorted(states, key=lambda pair: pair[0]) if state.count}
    refs = list(own)
    if len(refs) < 2:
        return []
    means = np.array([directions.mean(axis=0) for directions in own.values()])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    pairs = set()
    for place, mean in enumerate(means):    # (n,) at a time: of many adapters the whole product would be large
        likeness = means @ mean
        likeness[place] = -np.inf
        pairs |= {(min(place, other), max(place, other)) for other in np.argsort(-likeness, kind="stable")[: min(RANKED_MAX, len(refs) - 1)].tolist()}
    found = []
    for one, other in sorted(pairs):
        products = own[refs[one]] @ own[refs[other]].T
        found.append((refs[one], refs[other], float(min(products.max(axis=1).mean(), products.max(axis=0).mean()))))
    return found


def _directions(state: RoutingState) -> F64:
    """(c, d), unit rows."""
    sums = Exemplars.of(state).sums
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12))
