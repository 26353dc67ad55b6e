"""How much an adapter's answers weigh beside the router's responses: by maximum likelihood on rows that neither of them has learned."""

# n rows, c labels

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.contest import PROBABILITY_MIN, TEMPERATURE, WEIGHT
from adapter_hub.routing.features import Features
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import Encodings, RoutingState

ROWS_MAX = 200       # that are asked, evenly spread
DEVIATION = 3.0      # of weights from the usual one, before any row was seen
WEIGHT_MAX = 10.0
DECIMALS = 2


def measured(rows: Sequence[Example], labels: Collection[str]) -> tuple[Example, ...]:
    """Those of the rows that can tell: of these labels, and no more than is needed."""
    known = [row for row in rows if row.label in labels]
    return tuple(known[place] for place in np.linspace(0, len(known) - 1, min(len(known), ROWS_MAX)).astype(int))


def weight_of(state: RoutingState, rows: Sequence[Example], features: Features, scores: Sequence[Mapping[str, float]]) -> float | None:
    """The weight of a version with this state whose adapter gave `scores`, each label's probability, to these rows (n,); None: nothing is known.

    The router is one of this version alone; rows that are exemplars too are left out of it.
    """
    alone, known = AdapterRef("alone", 1), state.without(Encodings.of(features))
    places = {label: place for place, label in enumerate(known.class_names)}
    at = [place for place, row in enumerate(rows) if row.label in places]
    if len(places) < 2 or not at:
        return None
    responses = Router.build({alone: known}).label_responses(features[at], [alone] * len(at))
    probabilities = [[scores[place].get(str(label), 0.0) for label in places] for place in at]
    return answer_weight(responses, probabilities, [places[rows[place].label] for place in at])


def answer_weight(responses: ArrayLike, probabilities: ArrayLike, right: Sequence[int]) -> float:
    """The weight w, 0 to WEIGHT_MAX, under which softmax(responses / TEMPERATURE + w log probabilities) makes the right labels likeliest.

    `responses` (n, c) are the router's, `probabilities` (n, c) the adapter's of the same labels, `right` (n,) are places among them, n > 0.
    A normal prior about WEIGHT holds where rows are few.
    """
    known, logs = np.asarray(responses, np.float64) / TEMPERATURE, np.log(np.maximum(np.asarray(probabilities, np.float64), PROBABILITY_MIN))
    at = np.arange(len(right)), np.asarray(right)

    def loss(weight: float) -> float:    # convex
        scores = known + weight * logs
        scores -= scores.max(axis=1, keepdims=True)
        surprise = np.log(np.exp(scores).sum(axis=1)) - scores[at]
        return float(surprise.sum() + ((weight - WEIGHT) / DEVIATION) ** 2 / 2)

    return round(float(minimize_scalar(loss, bounds=(0, WEIGHT_MAX), method="bounded").x), DECIMALS)
