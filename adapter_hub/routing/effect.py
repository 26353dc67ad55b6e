"""What a newcomer would take from whom, before it goes live, and what a recalibration moves. Pure: states, and inputs whose home is known.

These inputs are evaluation inputs, or exemplars where there are too few; each exemplar is scored as if its adapter had never been given
it, because a head knows its own exemplars by heart and would let nobody take them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import (
    ACCEPTED,
    ACCEPTED_BEFORE,
    EVALUATION_MIN,
    LEFT_OUT_MAX,
    LEFT_OUT_NUMBERS_MAX,
    RATES,
    THRESHOLD_BEFORE,
    Bench,
    Calibration,
)
from adapter_hub.routing.features import F32
from adapter_hub.routing.head import CLASSES_MAX, Solver, can_solve, digest_of
from adapter_hub.routing.router import SCORE_DECIMALS
from adapter_hub.routing.scoring import Scoring
from adapter_hub.routing.statistics import F64, I64, Exemplars, RoutingState

# n inputs, a adapters
CHANGED_MAX = 5     # adapters that a recalibration names
INPUTS_MAX = 200    # of each adapter; fewer, but EVALUATION_MIN at least, where there are very many adapters


@dataclass(frozen=True, slots=True)
class Taken:
    """What one adapter would lose. Shares of its inputs, 0-1."""

    adapter: AdapterRef
    inputs: int          # that were looked at: evaluation inputs, or left-out exemplars; 0 where none can be left out, and nothing is known
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
    instead_of: AdapterRef | None = None    # the version of its name that gives way; what that one took is not counted

    @property
    def most_taken(self) -> float:
        """The greatest share that any adapter would lose to the newcomer, 0-1."""
        return max((other.taken for other in self.others), default=0.0)

    def to_json(self) -> dict[str, Any]:
        instead_of = str(self.instead_of) if self.instead_of else None
        facts = {"newcomer": str(self.newcomer), "instead_of": instead_of, "most_taken": round(self.most_taken, 6)}
        return facts | {"others": [other.to_json() for other in self.others]}


def effect(production: Mapping[AdapterRef, RoutingState], newcomer: AdapterRef, state: RoutingState, scoring: Scoring) -> Effect:
    """`production` are the versions there are; one of the newcomer's name gives way to it, and what went to that one is not taken from
    anybody: the router as it is now stands against the router with the newcomer in its place. The newcomer need not be stored yet.

    Both sides are solved in full. Nothing abstains here: what counts is who would be chosen. An exemplar that the newcomer has too is
    left out of its own adapter alone, and goes to the newcomer as a rule: `contradictions` counts them.
    """
    before = {ref: one for ref, one in production.items() if one.count and ref != newcomer}
    others = {ref: one for ref, one in before.items() if ref.name != newcomer.name}
    exemplars = {ref: Exemplars.of(one) for ref, one in (before | {newcomer: state}).items() if one.count}
    rows = _rows(others, exemplars)
    was = _chosen(before, exemplars, rows, scoring)
    will = _chosen(others | ({newcomer: state} if state.count else {}), exemplars, rows, scoring)
    new = set(state.exemplars.keys)
    found = []
    for ref, other in others.items():
        inputs = max(len(rows[ref]), 1)
        taken = sum(a == ref and b == newcomer for a, b in zip(was[ref], will[ref], strict=True)) / inputs
        same = sum(key in new for key in other.exemplars.keys)
        found.append(Taken(ref, len(rows[ref]), taken, was[ref].count(ref) / inputs, will[ref].count(ref) / inputs, same))
    gives_way = next((ref for ref in production if ref.name == newcomer.name and ref != newcomer), None)
    return Effect(newcomer, tuple(sorted(found, key=lambda other: (-other.taken, -other.contradictions, other.adapter))), gives_way)


def confusion(
    production: Mapping[AdapterRef, RoutingState], of: Collection[AdapterRef], scoring: Scoring
) -> dict[AdapterRef, tuple[int, dict[AdapterRef, float]]]:
    """Of each of these adapters how many of its inputs were looked at, and the share of them, 0-1, that each other one would be chosen for.

    Needs no texts. As in `effect` the router is solved in full, exemplars are left out, and nothing abstains. Of an adapter that has
    neither evaluation inputs nor an exemplar that can be left out nothing is known: 0 inputs.
    """
    states = {ref: state for ref, state in sorted(production.items(), key=lambda pair: pair[0]) if state.count}
    exemplars = {ref: Exemplars.of(state) for ref, state in states.items()}
    chosen = _chosen(states, exemplars, _rows({ref: state for ref, state in states.items() if ref in of}, exemplars), scoring)
    return {ref: (len(who), shares_of(ref, who)) for ref, who in chosen.items()}


def shares_of(home: AdapterRef, chosen: Sequence[AdapterRef | None]) -> dict[AdapterRef, float]:
    """Of the inputs of one adapter, the share that each other one was chosen for."""
    counts = Counter(ref for ref in chosen if ref is not None and ref != home)
    return {ref: counts[ref] / len(chosen) for ref in sorted(counts)}


def _rows(states: Mapping[AdapterRef, RoutingState], exemplars: Mapping[AdapterRef, Exemplars]) -> dict[AdapterRef, I64]:
    """Of each adapter's evaluation inputs, or of its exemplars that can be left out: those looked at, evenly spread."""
    most = min(LEFT_OUT_MAX, LEFT_OUT_NUMBERS_MAX // max(1, sum(len(one.counts) for one in exemplars.values())))
    each = min(INPUTS_MAX, max(EVALUATION_MIN, most // max(1, len(states))))
    rows = {}
    for ref, state in states.items():
        usable = np.arange(len(state.evaluation)) if _evaluated(state) else np.flatnonzero(exemplars[ref].testable)
        rows[ref] = usable[np.linspace(0, len(usable) - 1, min(len(usable), each)).astype(np.int64)]
    return rows


def _evaluated(state: RoutingState) -> bool:
    return len(state.evaluation) >= EVALUATION_MIN


def _chosen(
    states: Mapping[AdapterRef, RoutingState], known: Mapping[AdapterRef, Exemplars], rows: Mapping[AdapterRef, I64], scoring: Scoring
) -> dict[AdapterRef, list[AdapterRef]]:
    """For each adapter of `rows`, who of `states` would be chosen for each of these inputs."""
    found: dict[AdapterRef, list[AdapterRef]] = {ref: [] for ref in rows}
    if not rows:
        return found
    refs = sorted(states)
    states, exemplars = {ref: states[ref] for ref in refs}, {ref: known[ref] for ref in refs}
    # As a router that follows a registration: beyond this, prototypes alone.
    solvable = can_solve(exemplars) and sum(len(one.counts) for one in exemplars.values()) <= CLASSES_MAX
    solver = Solver(exemplars, states[refs[0]].dim) if solvable else None
    head = solver.head(digest_of({ref: state.digest for ref, state in states.items()})) if solver else None
    none = np.empty(0, np.int64)
    left_out = [none if _evaluated(state) else rows.get(ref, none) for ref, state in states.items()]
    bench = Bench(states, exemplars, solver, head, left_out)
    del solver
    for place, scores in bench.left_out_scores(scoring):
        found[refs[place]] += [refs[best] for best in _best(scores)[0]]
    for ref in rows:
        if _evaluated(states[ref]):
            scores = bench.scores_of(scoring, states[ref].evaluation.features[rows[ref]])
            found[ref] += [refs[best] for best in _best(scores)[0]]
    return found


def _best(scores: F32) -> tuple[I64, F64]:
    """((n,) places, (n,) scores) as the router rounds and orders them: ties go to the first in name order."""
    rounded = np.round(scores.astype(np.float64), SCORE_DECIMALS)
    return rounded.argmax(axis=1), rounded.max(axis=1)


def moves(bench: Bench, before: Calibration, after: Calibration, max_false_reject: float = 0.05) -> dict[str, float]:
    """What another calibration changes, as shares of the inputs that it was fitted on: going elsewhere, let in, turned away.

    Beside them the thresholds that were, and of the adapters whose inputs are let in more or less often (at most CHANGED_MAX, the most
    changed) how often they were and are: by the names that `Calibration.to_json` reads. Exemplars are left out, and both sides have the
    head that knows all: what a new head changes is not the calibration's doing.
    """
    was, will = list(_decided(bench, before, max_false_reject)), list(_decided(bench, after, max_false_reject))
    pairs = list(zip(was, will, strict=True))
    elsewhere = sum(a != b for (_, a, _), (_, b, _) in pairs)
    let_in = sum(b and not a for (*_, a), (*_, b) in pairs)
    turned_away = sum(a and not b for (*_, a), (*_, b) in pairs)
    counts = (("moved", elsewhere), ("let_in", let_in), ("turned_away", turned_away))
    found = {name: round(count / max(len(pairs), 1), 6) for name, count in counts}
    found |= {f"{THRESHOLD_BEFORE} {rate:g}": before.threshold(rate) for rate in RATES}
    homes, refs = np.array([home for home, *_ in was], np.int64), list(bench.states)
    inputs = np.maximum(np.bincount(homes, minlength=len(refs)), 1)
    shares = [np.bincount(homes, [accepted for *_, accepted in side], len(refs)) / inputs for side in (was, will)]
    change = np.abs(shares[1] - shares[0])
    for place in [place for place in np.argsort(-change, kind="stable")[:CHANGED_MAX] if change[place]]:    # ties in name order
        found |= {f"{name} {refs[place]}": round(float(share[place]), 6) for name, share in zip((ACCEPTED_BEFORE, ACCEPTED), shares, strict=True)}
    return found


def _decided(bench: Bench, calibration: Calibration, max_false_reject: float) -> Iterator[tuple[int, int, bool]]:
    """(place of its adapter, place of who is chosen, whether it is accepted), for each input of `_scored`."""
    parts = zip(bench.states.items(), bench.exemplars, bench.prototypes, strict=True)
    centres = np.array([calibration.centre_of(ref, state, one, prototypes) for (ref, state), one, prototypes in parts])
    threshold = calibration.threshold(max_false_reject)
    for home, scores in _scored(bench, calibration.scoring):
        places, best = _best(scores)
        accepted = np.round(best - centres[places], SCORE_DECIMALS) >= threshold
        yield from ((home, place, let_in) for place, let_in in zip(places.tolist(), accepted.tolist(), strict=True))


def _scored(bench: Bench, scoring: Scoring) -> Iterator[tuple[int, F32]]:
    """(place of their adapter, their scores), of left-out exemplars first, then of evaluation inputs."""
    evaluated = bench.evaluated
    yield from ((place, scores) for place, scores in bench.left_out_scores(scoring) if place not in evaluated)
    states = list(bench.states.values())
    yield from ((place, bench.scores_of(scoring, states[place].evaluation.features)) for place in sorted(evaluated))
