"""What all adapters share: how scores add up, and the score below which an input is turned away. An immutable, numbered record.

Adapters registered later are measured by the record as it stands: nothing moves for the others until a new one is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from adapter_hub.errors import InvalidInput, InvalidName, ModelChanged
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.contrast import Contrast, left_out_penalties
from adapter_hub.routing.features import F32, Features
from adapter_hub.routing.head import BLOCK, Head, Solver, can_solve, digest_of
from adapter_hub.routing.head import SCHEMA as SOLVED
from adapter_hub.routing.prototypes import Prototypes, closeness, left_out_products
from adapter_hub.routing.scoring import Scoring, columns_of
from adapter_hub.routing.statistics import F64, I64, Exemplars, RoutingState, corrupt, read_tensors

# a adapters, n scored inputs, p prototypes, w weights tried
SCHEMA = 2
QUANTILES = 1025               # kept of the scores, evenly spaced from 0 to 1
LEFT_OUT_MAX = 20_000          # exemplars that are left out, evenly spread over all; fewer where they are scored for very many classes
LEFT_OUT_NUMBERS_MAX = 2**26
NUMBERS_MAX = 2**25            # of products held at once
EVALUATION_MIN = 10            # evaluation inputs of an adapter that take the place of its left-out exemplars
OWN_MAX = 500                  # exemplars that the centre of a newcomer is measured on
CENTRE_WEIGHT = 50.0           # scored inputs that an adapter needs to outweigh all others in its own centre
CLASS_FULL = 5.0               # classes with more exemplars than this count the same
WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25)    # of closeness that are tried
# Left-out accuracy that the greatest weight may cost. What it gains lies where there are no exemplars, and most of that by the other
# classes of an adapter: where each has one, there is nothing to gain, and the least of the best weights is taken.
TOLERANCE, TOLERANCE_ONE_CLASS = 0.002, 0.0002
ACCURACY_MIN = 50              # left-out exemplars that can tell one weight from another
PRIOR_DEVIATION = 0.35         # of scores, before any was seen, and what that weighs, in scores and in degrees of freedom
PRIOR_WEIGHT = 2.0
PRIOR_FREEDOM = 4.0
SINGLE_DROP = 0.3              # as descriptions of CLINC150's domains: without it a quarter of their inputs is turned away at "5 %"
PRIOR_PRODUCT = 0.7            # of an input with the prototype of its class, before any was seen
SLOPE_MIN = 1e-6               # 0 times the product of nothing, which is -inf, would be no number
RATES = (0.02, 0.05, 0.1)      # of false rejects, that are shown
# Facts about what stood before, each followed by a rate or a version.
THRESHOLD_BEFORE, ACCEPTED_BEFORE, ACCEPTED = "threshold_before", "accepted_before", "accepted"
TAIL = 0.05                    # where the standard error of the quantiles is measured


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Scoring, each adapter's centre, and the distribution of acceptance scores (score - centre) of inputs that belong."""

    encoder: str
    encoder_fingerprint: str
    scoring: Scoring
    centres: Mapping[AdapterRef, float]    # of each version that it was fitted on, sorted
    centre: float                          # of all their scores; what is measured of a newcomer is drawn to it
    quantiles: F64                         # (QUANTILES,) of acceptance scores, ascending; empty if nothing could be scored
    count: float                           # how many independent scores the quantiles are worth: exemplars of one class are alike
    deviation: float                       # of acceptance scores, whose mean is `mean`
    mean: float
    facts: Mapping[str, float] = field(default_factory=dict)    # how it was made, for people
    id: int | None = None                  # the registry's number; None: not stored

    @property
    def members(self) -> tuple[AdapterRef, ...]:
        """The versions that it was fitted on, sorted."""
        return tuple(self.centres)

    def centre_of(self, ref: AdapterRef, state: RoutingState, exemplars: Exemplars, prototypes: Prototypes, solved: F32 | None = None) -> float:
        """What inputs of an adapter usually score.

        One that came after this record is measured by its own inputs (see `own_inputs`): from its prototypes alone, or from the responses
        of a head that knows it, `solved` (n, its classes for the head).
        """
        if ref in self.centres:
            return self.centres[ref]
        features, rows = own_inputs(state, exemplars)
        products = features.dense @ prototypes.means.astype(np.float32).T
        if rows is not None:
            products[np.arange(len(rows)), exemplars.classes[rows]] = left_out_products(exemplars, rows)
        columns = np.minimum(np.arange(len(prototypes.counts)), prototypes.labelled if solved is not None else -1)
        responses = self.scoring.responses(products, solved, columns, prototypes.counts)
        scores = self.scoring.scores(responses, products, np.zeros(1, np.int64))[:, 0].astype(np.float64)
        if contrast := Contrast.of(exemplars):
            scores -= contrast.penalties(features) if rows is None else left_out_penalties(exemplars, rows)
        return _centre(scores, self.centre, exemplars.single)

    def threshold(self, max_false_reject: float) -> float:
        """The acceptance score below which this share of belonging inputs falls; -inf for 0, which never abstains.

        The conformal quantile: of n scores the one of rank rate × (n + 1) (Vovk, Gammerman and Shafer 2005). With too few scores
        for that rank, a one-sided Student t prediction bound. Raises InvalidInput for a rate outside 0 to 1.
        """
        rate = check_rate(max_false_reject)
        if rate in (0.0, 1.0):
            return -math.inf if rate == 0 else math.inf
        seldom = 1 / (self.count + 1)
        if rate >= seldom and self.count > 1:
            return self._ranked(rate)
        from scipy.stats import t

        known = self.count + PRIOR_WEIGHT
        bound = self.mean + float(t.ppf(rate, self.count + PRIOR_FREEDOM)) * self.deviation * math.sqrt(1 + 1 / known)
        # A lower rate never turns away more.
        return min(bound, self._ranked(seldom)) if self.count > 1 else bound

    def _ranked(self, rate: float) -> float:
        share = min(1.0, max(0.0, (rate * (self.count + 1) - 1) / (self.count - 1)))
        return float(np.interp(share, np.linspace(0, 1, QUANTILES), self.quantiles))

    def false_reject_range(self, max_false_reject: float) -> tuple[float, float]:
        """(low, high): what share of belonging inputs will be turned away, nine times in ten, by how many scores there were.

        The share that a conformal threshold turns away is Beta distributed (Vovk 2012, "Conditional validity of inductive
        conformal predictors"). Inputs unlike the exemplars and evaluation inputs are not in it.
        """
        rate = check_rate(max_false_reject)
        if rate in (0.0, 1.0):
            return rate, rate
        from scipy.stats import beta

        rank = max(rate * (self.count + 1), 0.5)
        low, high = beta.ppf([0.05, 0.95], rank, max(self.count + 1 - rank, 0.5))
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """For people: how it was made, what each rate means and meant before, and whose inputs are let in more or less often at 5 %."""
        rates: dict[str, dict[str, Any]] = {}
        for rate in RATES:
            low, high = self.false_reject_range(rate)
            before = self.facts.get(f"{THRESHOLD_BEFORE} {rate:g}")
            was = {} if before is None else {"before": round(before, 4)}
            rates[f"{100 * rate:g} %"] = {"threshold": round(self.threshold(rate), 4), **was, "expect": f"{100 * low:.1f} to {100 * high:.1f} %"}
        scoring = {"closeness": self.scoring.closeness, "slope": round(self.scoring.slope, 4), "intercept": round(self.scoring.intercept, 4)}
        facts = {name: fact for name, fact in self.facts.items() if " " not in name}    # those of a rate or a version are told below
        shown = {"calibration": self.id, **facts, "measured_on": self._measured_on, "scoring": scoring, "max_false_reject": rates}
        return shown | ({"changed": self._changed} if self._changed else {})

    @property
    def _changed(self) -> list[dict[str, Any]]:
        """The adapters whose share of accepted inputs changed, most first."""
        refs = [name.partition(" ")[2] for name in self.facts if name.startswith(f"{ACCEPTED_BEFORE} ")]
        found = [{"adapter": ref, **{name: self.facts.get(f"{name} {ref}", 0.0) for name in (ACCEPTED_BEFORE, ACCEPTED)}} for ref in refs]
        return sorted(found, key=lambda one: (-abs(one[ACCEPTED] - one[ACCEPTED_BEFORE]), one["adapter"]))

    @property
    def of_earlier_head(self) -> bool:
        """Whether its scores are on the scale of a head that is solved no more."""
        return self.facts.get("head", 0) not in (0, SOLVED)

    @property
    def _measured_on(self) -> str:
        """What the ranges of errors hold for."""
        left_out, evaluation = self.facts.get("left_out", 0), self.facts.get("evaluation", 0)
        if not left_out + evaluation:
            return "nothing: what is usually so"
        if evaluation >= left_out:
            return "evaluation inputs"
        return "examples left out: inputs that are less like them than they are like each other are turned away more often"

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The same bytes for the same record; its number is the registry's to give."""
        scoring = self.scoring
        facts = {
            "schema": SCHEMA,
            "encoder": self.encoder,
            "encoder_fingerprint": self.encoder_fingerprint,
            "scoring": [scoring.closeness, scoring.slope, scoring.intercept, scoring.typical_count],
            "centre": self.centre,
            "centres": [[str(ref), centre] for ref, centre in self.centres.items()],
            "count": self.count,
            "mean": self.mean,
            "deviation": self.deviation,
            "facts": dict(self.facts),
        }
        # One key: safetensors writes several in no fixed order.
        return safetensors.numpy.save({"quantiles": self.quantiles}, {"calibration": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, id: int | None = None, source: Path | str = "calibration.safetensors") -> Calibration:
        """Raises CorruptVersion if these are not the bytes of a record."""
        tensors, facts = read_tensors(data, "calibration", SCHEMA, source)
        try:
            weight, slope, intercept, typical_count = map(float, facts["scoring"])
            record = cls(
                encoder=str(facts["encoder"]),
                encoder_fingerprint=str(facts["encoder_fingerprint"]),
                scoring=Scoring(weight, slope, intercept, typical_count),
                centres={AdapterRef.parse(ref): float(centre) for ref, centre in facts["centres"]},
                centre=float(facts["centre"]),
                quantiles=tensors["quantiles"],
                count=float(facts["count"]),
                mean=float(facts["mean"]),
                deviation=float(facts["deviation"]),
                facts={str(key): float(value) for key, value in facts["facts"].items()},
                id=id,
            )
        except (KeyError, TypeError, ValueError, AttributeError, InvalidName) as error:
            raise corrupt(source, f"{error} is missing or has another form") from error
        record._check(source)
        return record

    def _check(self, source: Path | str) -> None:
        if self.quantiles.shape != (QUANTILES if self.count else 0,) or self.quantiles.dtype != np.float64:
            raise corrupt(source, f"the quantiles are {self.quantiles.dtype} {self.quantiles.shape}")
        scoring = self.scoring
        numbers = [self.count, self.mean, self.deviation, self.centre, *self.centres.values(), scoring.closeness, scoring.slope]
        numbers += [scoring.intercept, scoring.typical_count]
        if not np.isfinite(self.quantiles).all() or not np.isfinite(numbers).all():
            raise corrupt(source, "a number is not finite")
        if self.count < 0 or self.deviation <= 0 or scoring.closeness < 0 or (np.diff(self.quantiles) < 0).any():
            raise corrupt(source, "a number is out of range")


def own_inputs(state: RoutingState, exemplars: Exemplars) -> tuple[Features, I64 | None]:
    """What a newcomer is measured on: its evaluation inputs, or some exemplars and their rows, to be scored as if never given."""
    if len(state.evaluation) >= EVALUATION_MIN:
        return state.evaluation.features, None
    rows = np.flatnonzero(exemplars.testable)
    rows = rows[:: max(1, -(-len(rows) // OWN_MAX))]
    return exemplars.features[rows], rows


def _centre(scores: F64, common: float, single: bool) -> float:
    """The mean of an adapter's scores, drawn to the common centre while they are few; a description's inputs usually score less."""
    prior = common - SINGLE_DROP if single else common
    return (float(scores.sum()) + CENTRE_WEIGHT * prior) / (len(scores) + CENTRE_WEIGHT)


def solved_centres(
    calibration: Calibration, states: Mapping[AdapterRef, RoutingState], exemplars: Mapping[AdapterRef, Exemplars], solver: Solver, head: Head
) -> dict[AdapterRef, float]:
    """The centres, on the scale of this head, of the versions that it knows and the calibration does not."""
    found, start = {}, 0
    for ref, column in head.columns.items():    # in the solver's order
        one = exemplars[ref]
        if ref not in calibration.centres:
            features, rows = own_inputs(states[ref], one)
            responses = head.responses(features) if rows is None else solver.left_out(start + rows)
            prototypes = Prototypes.of(one, states[ref].from_description)
            found[ref] = calibration.centre_of(ref, states[ref], one, prototypes, responses[:, column : column + one.target_count])
        start += len(one)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A calibration, the head that was solved on the way (None where there is nothing to solve, or too much), and what both were made on."""

    calibration: Calibration
    head: Head | None
    bench: Bench


def calibrate(states: Mapping[AdapterRef, RoutingState]) -> Calibration:
    """The record alone; see `fit`."""
    return fit(states).calibration


def fit(states: Mapping[AdapterRef, RoutingState]) -> Fitted:
    """Solve the head and measure acceptance scores on these versions. Pure, and the same bytes in whatever order they are given.

    An adapter's scores are those of its evaluation inputs, or of its exemplars, each scored as if it had never been given.
    Raises InvalidInput where no version has an exemplar, ModelChanged where two encoders met.
    """
    states = {ref: states[ref] for ref in sorted(states) if states[ref].count}
    if not states:
        hint = "Register one with examples or a description."
        raise InvalidInput("there is nothing to calibrate on: no version has an exemplar.", hint=hint)
    first = next(iter(states.values()))
    for ref, state in states.items():
        check_encoder(str(ref), state, first.encoder_fingerprint, first.encoder)
    exemplars = {ref: Exemplars.of(state) for ref, state in states.items()}
    solver = Solver(exemplars, first.dim) if can_solve(exemplars) else None
    head = solver.head(digest_of({ref: state.digest for ref, state in states.items()})) if solver else None
    bench = Bench(states, exemplars, solver, head)
    del solver
    scoring = bench.fitted_scoring()
    scores = bench.scores(scoring)
    own = [scores.values[scores.adapters == place] for place in range(len(states))]
    prior = float(scoring.expected(np.full(1, PRIOR_PRODUCT, np.float32))[0]) + scoring.closeness * PRIOR_PRODUCT
    centre = (float(scores.values.sum()) + PRIOR_WEIGHT * prior) / (len(scores.values) + PRIOR_WEIGHT)
    centres = [_centre(values, centre, one.single) for values, one in zip(own, exemplars.values(), strict=True)]
    acceptance = scores.values - np.array(centres)[scores.adapters]
    mean, deviation = _mean_and_deviation(acceptance, scores.weights)
    calibration = Calibration(
        encoder=first.encoder,
        encoder_fingerprint=first.encoder_fingerprint,
        scoring=scoring,
        centres=dict(zip(states, centres, strict=True)),
        centre=centre,
        quantiles=_quantiles(acceptance, scores.weights),
        count=_independent(acceptance, scores.weights, scores.groups),
        mean=mean,
        deviation=deviation,
        facts={
            "adapters": float(len(states)),
            "exemplars": float(sum(map(len, exemplars.values()))),
            "left_out": float(scores.left_out),
            "evaluation": float(len(acceptance) - scores.left_out),
            "left_out_accuracy": round(bench.accuracy, 6),
            "head": float(SOLVED if head else 0),
            "contradictions": float(_contradictions(states)),
        },
    )
    return Fitted(calibration, head, bench)


def _contradictions(states: Mapping[AdapterRef, RoutingState]) -> int:
    """Exemplars that more than one adapter has."""
    owners = Counter(key for state in states.values() for key in set(state.exemplars.keys))
    return sum(count > 1 for count in owners.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """Of inputs that belong, each by the adapter that it would go to."""

    values: F64
    adapters: I64       # place of that adapter
    weights: F64        # every class counts the same
    groups: I64         # inputs that are alike: exemplars of one class; an evaluation input is its own group
    left_out: int       # how many are exemplars


class Bench:
    """All adapters side by side, in the order of their references, and inputs to score: exemplars without themselves, and evaluation inputs.

    `rows` names the exemplars of each adapter that are left out; without it they are evenly spread over all.
    """

    def __init__(
        self,
        states: Mapping[AdapterRef, RoutingState],
        exemplars: Mapping[AdapterRef, Exemplars],
        solver: Solver | None,
        head: Head | None,
        rows: Sequence[I64] | None = None,
    ) -> None:
        self.states, self.exemplars = states, list(exemplars.values())
        self.head = head
        prototypes = [Prototypes.of(one, states[ref].from_description) for ref, one in exemplars.items()]
        self.prototypes = prototypes
        sizes = np.array([len(p.counts) for p in prototypes])
        self.starts: I64 = np.cumsum([0, *sizes])[:-1]
        self.means: F32 = np.concatenate([p.means for p in prototypes]).astype(np.float32)
        self.counts: F32 = np.concatenate([p.counts for p in prototypes])
        self.columns = columns_of(head, tuple(states), sizes, np.array([p.labelled for p in prototypes]))
        found = ((place, Contrast.of(one)) for place, one in enumerate(self.exemplars))
        self.contrasts = {place: contrast for place, contrast in found if contrast}
        self._taken: dict[int, F32] = {}    # by adapter, of its exemplars that are left out
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.rows = self._left_out_rows(solver) if rows is None else list(rows)
        self.solved = self._left_out_responses(solver)    # which holds gigabytes, and is not kept
        self.accuracy = 0.0

    def _left_out_rows(self, solver: Solver | None) -> list[I64]:
        """For each adapter, its exemplars that are left out, evenly spread."""
        testable = [np.flatnonzero(one.testable) for one in self.exemplars]
        total = sum(map(len, testable))
        most = min(LEFT_OUT_MAX, LEFT_OUT_NUMBERS_MAX // len(self.means)) if solver else LEFT_OUT_MAX
        step = max(1, -(-total // most))
        starts = np.cumsum([0, *map(len, testable)])
        return [rows[(-start) % step :: step] for rows, start in zip(testable, starts, strict=False)]

    def _left_out_responses(self, solver: Solver | None) -> list[F32 | None]:
        """For each adapter (n, k), the head's responses to the exemplars that are left out."""
        if solver is None:
            return [None] * len(self.rows)
        solved_before = np.cumsum([0, *(0 if one.single else len(one) for one in self.exemplars)])
        chosen = np.concatenate([start + rows for start, rows in zip(solved_before, self.rows, strict=False)]).astype(np.int64)
        blocks = [solver.left_out(chosen[start : start + BLOCK]) for start in range(0, len(chosen), BLOCK)]
        if not blocks:
            return [None] * len(self.rows)
        return list(np.split(np.concatenate(blocks), np.cumsum([len(rows) for rows in self.rows])[:-1]))

    def _penalties(self, features: Features) -> F32:
        """(n, a)"""
        found = np.zeros((len(features), len(self.exemplars)), np.float32)
        for place, contrast in self.contrasts.items():
            found[:, place] = contrast.penalties(features)
        return found

    def _left_out_penalties(self, place: int, rows: I64) -> F32:
        """(n, a), of these exemplars of one adapter, which are left out."""
        if not self.contrasts:
            return np.zeros((len(rows), 1), np.float32)
        if place not in self._taken:    # several passes ask
            left_out = self.rows[place]
            self._taken[place] = self._penalties(self.exemplars[place].features[left_out])
            if place in self.contrasts:
                self._taken[place][:, place] = left_out_penalties(self.exemplars[place], left_out)
        return self._taken[place][np.searchsorted(self.rows[place], rows)]

    def _blocks(self) -> Iterator[tuple[int, I64, F32, F32 | None]]:
        """(adapter, exemplars left out, products (n, p), head's responses (n, k)), each as if the exemplar had never been given."""
        size = max(16, NUMBERS_MAX // len(self.means))
        for place, (one, rows, solved) in enumerate(zip(self.exemplars, self.rows, self.solved, strict=True)):
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                products = one.features.dense[chosen] @ self.means.T
                products[np.arange(len(chosen)), self.starts[place] + one.classes[chosen]] = left_out_products(one, chosen)
                yield place, chosen, products, None if solved is None else solved[start : start + size]

    def fitted_scoring(self) -> Scoring:
        """The line from products to responses, and the weight of closeness: see TOLERANCE."""
        scoring = Scoring(typical_count=self._typical_count() if self.head else 0.0)
        x, y = self._products_and_responses()
        if len(x) >= ACCURACY_MIN and x.std() > 1e-3:
            slope, intercept = np.polyfit(x, y, 1)
            scoring = replace(scoring, slope=max(float(slope), SLOPE_MIN), intercept=float(intercept))
        return replace(scoring, closeness=self._weight(scoring))

    def _products_and_responses(self) -> tuple[F64, F64]:
        """Of each exemplar that is left out with its own class and with the closest other one."""
        pairs = [(np.empty(0), np.empty(0))]
        for place, rows, products, solved in self._blocks():
            if solved is None:
                continue
            at = np.arange(len(rows))
            own = self.starts[place] + self.exemplars[place].classes[rows]
            others = products.copy()
            others[at, own] = -np.inf
            for seen in (own, others.argmax(axis=1)):
                usable = np.isfinite(products[at, seen]) & (self.columns[seen] >= 0)
                pairs.append((products[at, seen][usable], solved[at, self.columns[seen]][usable]))
        x, y = (np.concatenate([pair[i] for pair in pairs]).astype(np.float64) for i in (0, 1))
        return x, y

    def _typical_count(self) -> float:
        counts = np.sort(self.counts[self.columns >= 0])
        return float(counts[np.searchsorted(np.cumsum(counts), counts.sum() / 2)])

    def _weight(self, scoring: Scoring) -> float:
        right, total = np.zeros(len(WEIGHTS)), 0
        for place, rows, products, solved in self._blocks():
            responses = np.maximum.reduceat(scoring.responses(products, solved, self.columns, self.counts), self.starts, axis=1)
            responses = responses - self._left_out_penalties(place, rows)
            close = closeness(products, self.starts)
            for i, weight in enumerate(WEIGHTS):
                right[i] += ((responses + np.float32(weight) * close).argmax(axis=1) == place).sum()
            total += len(products)
        if total < ACCURACY_MIN or len(self.starts) < 2:
            return scoring.closeness
        accuracy = right / total
        several = sum(one.target_count for one in self.exemplars) > len(self.exemplars)
        chosen = good_enough(accuracy, several)
        self.accuracy = float(accuracy[chosen])
        return WEIGHTS[chosen]

    @property
    def evaluated(self) -> set[int]:
        """Places of the adapters whose evaluation inputs speak for them, not their exemplars."""
        return {place for place, state in enumerate(self.states.values()) if len(state.evaluation) >= EVALUATION_MIN}

    def left_out_scores(self, scoring: Scoring) -> Iterator[tuple[int, F32]]:
        """(adapter, scores (n, a)) of its exemplars that are left out, each as if it had never been given, block by block."""
        for place, rows, products, solved in self._blocks():
            yield place, self._scored(scoring, products, solved) - self._left_out_penalties(place, rows)

    def scores_of(self, scoring: Scoring, features: Features) -> F32:
        """(n, a), of inputs that are no exemplars."""
        solved = self.head.responses(features) if self.head else None
        return self._scored(scoring, features.dense @ self.means.T, solved) - self._penalties(features)

    def _scored(self, scoring: Scoring, products: F32, solved: F32 | None) -> F32:
        return scoring.scores(scoring.responses(products, solved, self.columns, self.counts), products, self.starts)

    def scores(self, scoring: Scoring) -> _Scores:
        values: list[F64] = []
        adapters: list[I64] = []
        weights: list[F64] = []
        groups: list[I64] = []
        evaluated = self.evaluated
        left_out = 0
        for place, rows, products, solved in self._blocks():
            if place not in evaluated:
                classes = self.exemplars[place].classes[rows]
                _note(self._scored(scoring, products, solved) - self._left_out_penalties(place, rows), values, adapters)
                weights.append(1 / np.maximum(self.exemplars[place].counts[classes], CLASS_FULL))
                groups.append(self.starts[place] + classes)
                left_out += len(rows)
        for place, state in enumerate(self.states.values()):
            if place in evaluated:
                features = state.evaluation.features
                _note(self.scores_of(scoring, features), values, adapters)
                classes_here = len(self.exemplars[place].counts)
                weights.append(np.full(len(features), classes_here / len(features)))
                groups.append(len(self.means) + sum(map(len, groups)) + np.arange(len(features)))
        if not values:
            return _Scores(np.empty(0), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), 0)
        return _Scores(np.concatenate(values), np.concatenate(adapters), np.concatenate(weights), np.concatenate(groups), left_out)


def good_enough(accuracy: F64, several: bool) -> int:
    """The place of the greatest weight that costs at most TOLERANCE; where no adapter has `several` classes, of the least of the best."""
    return int(np.flatnonzero(accuracy >= accuracy.max() - (TOLERANCE if several else TOLERANCE_ONE_CLASS))[-1 if several else 0])


def _note(scores: F32, values: list[F64], adapters: list[I64]) -> None:
    values.append(scores.max(axis=1).astype(np.float64))
    adapters.append(scores.argmax(axis=1))


def _mean_and_deviation(values: F64, weights: F64) -> tuple[float, float]:
    """Of acceptance scores, which centre on 0; the prior counts as PRIOR_WEIGHT further values."""
    weights = weights / max(weights.mean(), 1e-12) if len(weights) else weights
    total = float(weights.sum()) + PRIOR_WEIGHT
    mean = float(weights @ values) / total
    squares = float(weights @ (values - mean) ** 2) + PRIOR_WEIGHT * (PRIOR_DEVIATION**2 + mean**2)
    return mean, math.sqrt(squares / total)


def _quantiles(values: F64, weights: F64) -> F64:
    """Weighted, by linear interpolation; with equal weights numpy's."""
    if not len(values):
        return np.empty(0)
    order = np.lexsort((weights, values))
    values, weights = values[order], weights[order]
    places = np.cumsum(weights) - weights / 2
    places = (places - places[0]) / max(places[-1] - places[0], 1e-12)
    return np.asarray(np.interp(np.linspace(0, 1, QUANTILES), places, values))


def _independent(values: F64, weights: F64, classes: I64) -> float:
    """How many independent scores have the same standard error of a 5 % tail as these, which come class by class."""
    if not len(values):
        return 0.0
    apart = float(weights.sum() ** 2 / (weights**2).sum())
    below = values < np.interp(TAIL, np.linspace(0, 1, QUANTILES), _quantiles(values, weights))
    share = float(weights @ below) / float(weights.sum())
    by_class = np.bincount(classes, weights * (below - share))
    variance = float((by_class**2).sum()) / float(weights.sum()) ** 2
    return min(apart, share * (1 - share) / variance) if variance > 0 else min(apart, float(len(np.unique(classes))))


def check_rate(rate: float) -> float:
    """`rate` as a float. Raises InvalidInput unless it is a number from 0 to 1."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating)) or not 0 <= rate <= 1:
        raise InvalidInput(f"max_false_reject={rate!r} is not a share.", hint="Give a number from 0 (never abstain) to 1: 5 % is 0.05.")
    return float(rate)


def check_encoder(name: str, state: RoutingState, fingerprint: str, encoder: str) -> None:
    """Vectors of two encoders cannot be compared. Raises ModelChanged."""
    if state.encoder_fingerprint != fingerprint:
        raise ModelChanged(
            f"'{name}' was encoded by '{state.encoder}' ({state.encoder_fingerprint[:19]}), "
            f"the router's exemplars by '{encoder}' ({fingerprint[:19]}).",
            hint="Register it again from its texts with the registry's encoder; where they are kept, `adapter-hub reembed` does that.",
        )
