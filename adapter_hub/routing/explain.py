"""A decision in words, with the exemplars that stand behind it. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Decision, Method, Reason
from adapter_hub.routing.features import SKETCH_WEIGHT, Features
from adapter_hub.routing.statistics import RoutingState

NEIGHBOURS = 3    # shown of each candidate
HOW = {
    Method.KERNEL_RIDGE: "by the head and by its prototypes",
    Method.RANDOM_FEATURES: "by the head and by its prototypes",
    Method.PROTOTYPES: "by its prototypes alone",
    Method.DESCRIPTION: "by its description alone",
}


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An exemplar close to the input."""

    adapter: AdapterRef
    likeness: float         # cosine of the joined features, -1 to 1
    label: str | None
    text: str | None        # None where the registry keeps no texts
    described: bool = False  # no input: the adapter's description, or the name of a label beside it, stands for its exemplars

    def to_json(self) -> dict[str, Any]:
        facts = {"adapter": str(self.adapter), "likeness": round(self.likeness, 4), "label": self.label, "text": self.text}
        return facts | {"described": self.described}


@dataclass(frozen=True, slots=True)
class Explanation:
    decision: Decision
    words: str                              # the reason, for people
    neighbours: tuple[Neighbour, ...]       # of each candidate in turn, closest first

    def to_json(self) -> dict[str, Any]:
        return self.decision.to_json() | {"words": self.words, "neighbours": [n.to_json() for n in self.neighbours]}


def explain(
    decision: Decision,
    features: Features,
    states: Mapping[AdapterRef, RoutingState],
    texts: Mapping[AdapterRef, Sequence[str]],
    rate: float,
) -> Explanation:
    """`features` is the one input, `states` and `texts` are of the candidates; a version without kept texts is absent from `texts`."""
    neighbours: list[Neighbour] = []
    for ref, _ in decision.candidates:
        state = states[ref]
        exemplars = state.exemplars.features
        products = exemplars.dense @ features.dense[0] + SKETCH_WEIGHT**2 * (exemplars.lexical @ features.lexical.T).toarray()[:, 0]
        likeness = products / (1 + SKETCH_WEIGHT**2)
        kept = texts.get(ref, ())
        for row in np.argsort(-likeness, kind="stable")[:NEIGHBOURS].tolist():
            text = kept[row] if row < len(kept) else None
            label = state.class_names[state.classes[row]]
            neighbours.append(Neighbour(ref, float(likeness[row]), label, text, state.from_description))
    return Explanation(decision, in_words(decision, rate), tuple(neighbours))


def in_words(decision: Decision, rate: float) -> str:
    """One or two sentences: who was best, by how much, and why that was enough or not."""
    if decision.reason is Reason.NAMED:
        return f"{decision.adapter or 'The base model'} was named: nothing was routed."
    if decision.reason is Reason.NO_CANDIDATES or decision.score is None or decision.threshold is None:
        return "No adapter in production has examples or a description, so there is nothing to compare with: the base model answers."
    best, score = decision.candidates[0]
    lead = f", {decision.margin:.2f} more than the next adapter" if decision.margin is not None else ""
    how = HOW[decision.method] if decision.method else ""
    first = f"{best} fits best: it scores {score:.2f} {how}{lead}."
    if rate == 0:
        return f"{first} It answers, since no input may be turned away."
    if rate == 1:
        return f"{first} But every input is to be turned away: the base model answers."
    bar = f"{decision.score:+.2f} from its centre, where {100 * rate:g} % of inputs that belong lie below {decision.threshold:+.2f}"
    if decision.adapter is not None:
        return f"{first} The input lies {bar}: accepted."
    return f"{first} But the input lies {bar}: no adapter fits, and the base model answers."
