"""What a newcomer would take from whom, before it goes live. Pure: two routers, and inputs whose home is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import EVALUATION_MIN
from adapter_hub.routing.features import Features
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import RoutingState

INPUTS_MAX = 200    # of each adapter


@dataclass(frozen=True, slots=True)
class Taken:
    """What one adapter would lose. Shares of its inputs, 0-1."""

    adapter: AdapterRef
    inputs: int          # its evaluation inputs, or its exemplars where it has too few
    taken: float         # went to it, and would go to the newcomer
    before: float        # go to it now
    after: float         # would go to it
    contradictions: int  # exemplars that the newcomer has too

    def to_json(self) -> dict[str, Any]:
        shares = {name: round(getattr(self, name), 6) for name in ("taken", "before", "after")}
        return {"adapter": str(self.adapter), "inputs": self.inputs, **shares, "contradictions": self.contradictions}


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one newcomer on all others, those that lose most first."""

    newcomer: AdapterRef
    others: tuple[Taken, ...]

    @property
    def most_taken(self) -> float:
        """The greatest share that any adapter would lose to the newcomer, 0-1."""
        return max((other.taken for other in self.others), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {"newcomer": str(self.newcomer), "most_taken": round(self.most_taken, 6), "others": [other.to_json() for other in self.others]}


def effect(before: Router, after: Router, newcomer: AdapterRef, states: Mapping[AdapterRef, RoutingState]) -> Effect:
    """`states` are of the newcomer and of all others. Nothing abstains here: what counts is who would be chosen."""
    new = set(states[newcomer].exemplars.keys)
    others = []
    for ref, state in states.items():
        if ref == newcomer or not state.count:
            continue
        features = inputs_of(state)
        was = [decision.candidates[0][0] for decision in before.route_features(features, max_false_reject=0.0)]
        will = [decision.candidates[0][0] for decision in after.route_features(features, max_false_reject=0.0)]
        taken = sum(a == ref and b == newcomer for a, b in zip(was, will, strict=True)) / len(features)
        same = sum(key in new for key in state.exemplars.keys)
        others.append(Taken(ref, len(features), taken, was.count(ref) / len(features), will.count(ref) / len(features), same))
    return Effect(newcomer, tuple(sorted(others, key=lambda other: (-other.taken, -other.contradictions, other.adapter))))


def moves(before: Router, after: Router, states: Mapping[AdapterRef, RoutingState], max_false_reject: float = 0.05) -> dict[str, float]:
    """What another calibration changes, as shares of the adapters' own inputs: going elsewhere, let in, turned away."""
    features = Features.concatenate([inputs_of(state) for state in states.values() if state.count])
    was = before.route_features(features, max_false_reject=max_false_reject)
    will = after.route_features(features, max_false_reject=max_false_reject)
    pairs = list(zip(was, will, strict=True))
    elsewhere = sum(a.candidates[0][0] != b.candidates[0][0] for a, b in pairs)
    let_in = sum(a.adapter is None and b.adapter is not None for a, b in pairs)
    turned_away = sum(a.adapter is not None and b.adapter is None for a, b in pairs)
    return {name: round(count / len(pairs), 6) for name, count in (("moved", elsewhere), ("let_in", let_in), ("turned_away", turned_away))}


def inputs_of(state: RoutingState) -> Features:
    """At most INPUTS_MAX evaluation inputs of an adapter, or exemplars where it has too few, evenly spread."""
    encodings = state.evaluation if len(state.evaluation) >= EVALUATION_MIN else state.exemplars
    count = min(len(encodings), INPUTS_MAX)
    return encodings.features[np.linspace(0, len(encodings) - 1, count).astype(np.int64)]
