"""Which adapters are closest to a newcomer, by the class means that the router keeps of each. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.statistics import F64, Exemplars, RoutingState

# c classes, d encoder width


def nearest(state: RoutingState, others: Mapping[AdapterRef, RoutingState]) -> list[tuple[AdapterRef, float]]:
    """(ref, closeness) of the others, closest first, ties by reference; those without exemplars are left out.

    Closeness is the mean, over the newcomer's class means, of the best cosine with one of the other's: -1 to 1.
    """
    if not state.count:
        return []
    own = _directions(state)
    found = {ref: float((own @ _directions(other).T).max(axis=1).mean()) for ref, other in others.items() if other.count}
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def _directions(state: RoutingState) -> F64:
    """(c, d), unit rows."""
    sums = Exemplars.of(state).sums
    return np.asarray(sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12))
