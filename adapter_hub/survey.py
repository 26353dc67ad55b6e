"""Look over a whole registry: gather what the knowledge map, the picture of the router's space and the report are made from. Changes nothing.

What is damaged is left out with a note: one bad file must not keep anybody from seeing the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_hub.adapters.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles
from adapter_hub.continual.knowledge_map import (
    Delta,
    Edge,
    EdgeKind,
    KnowledgeMap,
    Limits,
    Node,
    Pair,
    corrections,
    lineage,
    strongest,
    weight_cosine,
)
from adapter_hub.continual.maintenance import Memory
from adapter_hub.continual.proposals import KIND
from adapter_hub.continual.report import Facts, Judged, page
from adapter_hub.continual.space import Space, space_of
from adapter_hub.errors import HubError
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.layout import GATE_FILE
from adapter_hub.registry.manifest import Manifest
from adapter_hub.routing.decision import Reason

if TYPE_CHECKING:
    from adapter_hub.hub import Hub
    from adapter_hub.routing.statistics import RoutingState

JSON = Any
log = logging.getLogger("adapter_hub")

EXEMPLARS_MAX = 2_000        # of all adapters together, where a router is solved to measure confusion: its cost grows with their cube
LOADED_MAX = 128             # adapters whose weights are held at once
TRAFFIC_ROWS = 400           # of the newest, that the picture of the space shows
POINTS_MAX = 4_000           # exemplars and evaluation inputs that it shows
GENERATIONS_MAX = 1_000      # of one lineage


# ---- the map --------------------------------------------------------------------------------------------------------


def survey(hub: Hub, limits: Limits | None = None) -> KnowledgeMap:
    """See `Hub.map`."""
    limits, notes = limits or Limits(), list[str]()
    manifests = dict(_manifests(hub, notes))
    states = dict(_states(hub, manifests, notes))
    answers: dict[AdapterRef, int] = {}
    for row in hub.log.traffic():
        if row.adapter is not None:
            answers[row.adapter] = answers.get(row.adapter, 0) + row.answers
    nodes = [
        Node(
            ref, _task(manifest), tuple(manifest.labels or ()), states[ref].count if ref in states else 0, manifest.created_at,
            answers.get(ref, 0), manifest.origins,
        )
        for ref, manifest in manifests.items()
    ]  # fmt: skip
    edges = lineage({ref: _ancestors(hub, manifest) for ref, manifest in manifests.items()})
    close = _routing(states)
    edges += close
    related = [edge for edge in edges if edge.kind is EdgeKind.LINEAGE]
    edges += _weights(hub, strongest(related, limits) + strongest(close, limits), notes)    # some a node: each costs a look at every module
    edges += _confusion(hub, states, notes)
    edges += corrections(_said(hub), manifests)
    return KnowledgeMap.of(nodes, edges, limits, notes)


def _said(hub: Hub) -> Iterator[tuple[str | None, str]]:
    """Of each answer that people spoke of: who gave it, and whose it was. Who names a label alone says that it came from the right one."""
    for row in hub.log.corrected():
        answered = row.adapter.name if row.adapter else None
        if row.feedback is not None and (right := row.feedback.correct_adapter or answered) is not None:
            yield answered, right


def _manifests(hub: Hub, notes: list[str]) -> Iterator[tuple[AdapterRef, Manifest]]:
    for ref in hub.registry.production():
        try:
            yield ref, hub.registry.manifest(ref)
        except HubError as error:
            notes.append(f"{ref} is left out: {error}")


def _states(hub: Hub, refs: Iterable[AdapterRef], notes: list[str]) -> Iterator[tuple[AdapterRef, RoutingState]]:
    for ref in refs:
        try:
            yield ref, hub.state(ref)
        except HubError as error:
            notes.append(f"{ref} is not compared in routing: {error}")


def _task(manifest: Manifest) -> str:
    return " ".join(filter(None, (manifest.task_type or "embedding", manifest.problem_type)))


def _ancestors(hub: Hub, manifest: Manifest) -> list[str]:
    """The versions that it comes from, all generations."""
    found: dict[str, None] = {}
    ahead = list(manifest.origins)
    while ahead and len(found) < GENERATIONS_MAX:
        origin = ahead.pop()
        if origin not in found:
            found[origin] = None
            try:
                ahead += hub.registry.manifest(origin).origins
            except HubError:    # purged with its name, or damaged: the line ends there
                continue
    return list(found)


def _routing(states: Mapping[AdapterRef, RoutingState]) -> list[Edge]:
    from adapter_hub.routing.nearest import neighbours

    return [Edge(EdgeKind.ROUTING, one, other, closeness) for one, other, closeness in neighbours(states.items())]


def _weights(hub: Hub, joined: Iterable[Edge], notes: list[str]) -> list[Edge]:
    """Of the pairs that these edges join."""
    wanted = {(min(edge.source, edge.target), max(edge.source, edge.target)) for edge in joined}

    @lru_cache(LOADED_MAX)
    def delta(ref: AdapterRef) -> Delta | None:
        try:
            return _delta(hub, ref)
        except HubError as error:
            notes.append(f"{ref} is not compared in weights: {error}")
            return None

    found = []
    for one, other in sorted(wanted):
        if (mine := delta(one)) is not None and (theirs := delta(other)) is not None:
            found.append(Edge(EdgeKind.WEIGHTS, one, other, weight_cosine(mine, theirs)))
    return found


def _delta(hub: Hub, ref: AdapterRef) -> Delta:
    """What a version adds, as arrays. The base model is not needed for it."""
    from adapter_hub.adapters.weights import adapter_of

    manifest = hub.registry.manifest(ref)
    config, weights = (hub.registry.read(ref, file) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    adapter = adapter_of(AdapterFiles(config, weights, str(ref)), labels=manifest.labels, problem_type=manifest.problem_type)
    return {name: Pair(one.a.float().numpy(), one.b.float().numpy(), one.scaling) for name, one in adapter.deltas.items()}


def _confusion(hub: Hub, states: Mapping[AdapterRef, RoutingState], notes: list[str]) -> list[Edge]:
    """Evaluation inputs go through the router as it is; who has too few of them is measured on exemplars that are left out.

    Vectors are enough: no text is needed.
    """
    from adapter_hub.routing.calibration import EVALUATION_MIN
    from adapter_hub.routing.effect import INPUTS_MAX, confusion, shares_of
    from adapter_hub.routing.scoring import Scoring

    routed = {ref: state for ref, state in states.items() if state.count}
    if len(routed) < 2:
        return []
    router, measured = hub.settle(), dict[AdapterRef, tuple[int, dict[AdapterRef, float]]]()
    for ref, state in routed.items():
        if len(state.evaluation) >= EVALUATION_MIN:
            inputs = state.evaluation[_spread(len(state.evaluation), INPUTS_MAX).tolist()].features
            chosen = [decision.adapter for decision in router.route_features(inputs, max_false_reject=0.0)]
            measured[ref] = (len(chosen), shares_of(ref, chosen))
    if others := routed.keys() - measured.keys():
        exemplars = sum(state.count for state in routed.values())
        if exemplars > EXEMPLARS_MAX:
            notes.append(f"confusion of {len(others)} adapters without evaluation inputs is estimated with {EXEMPLARS_MAX} of {exemplars} exemplars")
        thinned = {ref: state.thinned(EXEMPLARS_MAX / exemplars) for ref, state in routed.items()}
        measured |= confusion(thinned, others, router.calibration.scoring if router.calibration else Scoring())
    unknown = [str(ref) for ref, (inputs, _) in sorted(measured.items()) if not inputs]
    if unknown:
        notes.append(f"no input is known to measure confusion of {', '.join(unknown[:5])}" + (f" and {len(unknown) - 5} more" if unknown[5:] else ""))
    return [Edge(EdgeKind.CONFUSION, ref, other, share, inputs) for ref, (inputs, shares) in measured.items() for other, share in shares.items()]


# ---- the router's space ---------------------------------------------------------------------------------------------


def space(hub: Hub) -> Space:
    """See `Hub.space`."""
    from adapter_hub.routing.features import extract

    router, rate, notes = hub.settle(), hub.config.max_false_reject, list[str]()
    states = {ref: state for ref, state in _states(hub, router.refs, notes) if state.count}
    each = max(2, POINTS_MAX // max(1, 2 * len(states)))
    exemplars, inputs, decided = {}, {}, {}
    for ref, state in states.items():
        vectors = state.exemplars.vectors
        exemplars[ref] = (vectors[_spread(len(vectors), each)], [str(state.class_names[c]) for c in state.classes[_spread(len(vectors), each)]])
        held = state.evaluation[_spread(len(state.evaluation), each).tolist()].features
        if len(state.evaluation):
            inputs[ref] = held.dense
            decided[ref] = [_margin(one) for one in router.route_features(held, k=1, max_false_reject=rate)]
    rows = list(islice((row for row in hub.log.read(rows_max=10 * TRAFFIC_ROWS) if row.text and row.score is not None), TRAFFIC_ROWS))
    asked = extract(hub.encoder, [row.text or "" for row in rows]).dense if rows else np.empty((0, router.dim if states else 0), np.float32)
    went = [(row.adapter, row.reason != Reason.BELOW_THRESHOLD) for row in rows]
    return space_of(exemplars, inputs, decided, asked, went, rate)


def _spread(count: int, most: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64) if count else np.empty(0, np.int64)


def _margin(decision: Any) -> float:
    """How far its score lies above the threshold: what is below 0 is turned away."""
    return float(decision.score - decision.threshold) if np.isfinite(decision.threshold) else float("inf")


# ---- the report -----------------------------------------------------------------------------------------------------


def report(hub: Hub) -> str:
    """See `Hub.report`: the page."""
    from adapter_hub.lifelong import ALARMS, MAINTENANCE

    registry, config = hub.registry, hub.config
    events = registry.events()
    remembered, production = registry.notes.read(MAINTENANCE), registry.production()
    alarms = {ref.name: Memory.from_json(remembered.get(ref.name)).of(ref.version or 0).alarm for ref in production}
    calibration = hub.settle().calibration if production else None
    facts = Facts(
        registry=registry.layout.root.resolve().name,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=config.base_model,
        encoder=config.encoder,
        map=survey(hub),
        events=tuple(events),
        judged=tuple(_judged(hub, events)),
        traffic=tuple(hub.log.traffic()),
        calibration=calibration.to_json() if calibration else None,
        alarms=tuple(registry.notes.read(ALARMS).values()),
        open_alarms={name: alarm for name, alarm in alarms.items() if alarm},
        proposals=registry.notes.read(KIND),
    )
    return page(facts)


def _judged(hub: Hub, events: Iterable[Event]) -> Iterator[Judged]:
    """What the gate said of each version that is still there, oldest first."""
    added = {(event.name, event.version): event.at for event in events if event.kind in (EventKind.ADDED, EventKind.ADOPTED)}
    live = {(event.name, event.version) for event in events if event.alias == PRODUCTION}
    for name, version in sorted(added, key=lambda key: added[key]):
        try:
            ref = AdapterRef(str(name), version)
            if GATE_FILE in hub.registry.manifest(ref).files:
                said = json.loads(hub.registry.read(ref, GATE_FILE))
                yield Judged(added[name, version], ref, str(said["verdict"]), str(said["reason"]), (name, version) in live)
        except (HubError, KeyError, TypeError, ValueError) as error:
            log.info("%s@%s is left out of the report: %s", name, version, error)
