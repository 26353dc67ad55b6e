"""What all adapters share: the metric, and the score below which an input is turned away. An immutable, numbered record.

Adapters registered later are measured by the record as it stands: nothing moves for the others until a new one is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adapter_hub.errors import InvalidInput, ModelChanged
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.metric import F64, I64, Metric, Moments
from adapter_hub.routing.prototypes import Member, Panel, expected_scores
from adapter_hub.routing.statistics import Exemplars, RoutingState, corrupt, read_tensors

# a adapters, d encoder width, n left-out exemplars
SCHEMA = 1
FOLDS = 5
QUANTILES = 1025           # kept of the left-out scores, evenly spaced from 0 to 1
QUANTILE_RANK_MIN = 5.0    # with fewer scores in the tail, a Student t bound stands in for their quantile
TAIL = 0.05                # where the standard error of the quantiles is measured
CLASS_FULL = 5.0           # classes with more exemplars than this count the same in the quantiles
POOLED_WEIGHT = 50.0       # left-out exemplars that an adapter needs to outweigh the pool in its own centre
PRIOR_WEIGHT = 2.0         # what the expectation before any score was seen weighs, in scores
PRIOR_FREEDOM = 4.0        # how well the prior is known, in degrees of freedom
SINGLE_CENTRE = 0.5        # of the expected score: what inputs score for a description, as on CLINC150's validation split
SINGLE_SCALE = 0.25
PRIOR_SCALE = 0.35         # standard deviation over mean of the scores of inputs that belong, as on CLINC150's validation split


@dataclass(frozen=True, slots=True)
class Normal:
    """How the inputs of an adapter usually score. acceptance = (score - centre) / scale."""

    centre: float    # nats
    scale: float     # nats, above 0


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Metric, normalisation and quantiles."""

    id: int | None                     # the registry's number; None: not stored
    encoder: str
    encoder_fingerprint: str
    normals: Mapping[AdapterRef, Normal]   # of each version that it was fitted on, sorted
    pool: Normal                       # over all members
    metric: Metric
    quantiles: F64                     # (QUANTILES,) of left-out acceptance scores, ascending; empty if nothing could be left out
    count: float                       # how many independent scores the quantiles are worth: exemplars of one class are alike
    mean: float                        # of the left-out acceptance scores
    deviation: float

    @property
    def members(self) -> tuple[AdapterRef, ...]:
        """The versions that it was fitted on, sorted."""
        return tuple(self.normals)

    def threshold(self, max_false_reject: float) -> float:
        """The acceptance score below which at most this share of belonging inputs falls; -inf for 0, which never abstains.

        A quantile of the left-out scores, every class counting the same, lowered by one standard error: the rate is a maximum.
        With too few scores in that tail, a one-sided Student t prediction bound. Raises InvalidInput for a rate outside 0 to 1.
        """
        rate = check_rate(max_false_reject)
        if rate in (0.0, 1.0):
            return -math.inf if rate == 0 else math.inf
        seldom = QUANTILE_RANK_MIN / self.count if self.count > QUANTILE_RANK_MIN else 1.0
        if rate >= seldom:
            return self._quantile(rate)
        from scipy.stats import t

        known = self.count + PRIOR_WEIGHT
        bound = self.mean + float(t.ppf(rate, self.count + PRIOR_FREEDOM)) * self.deviation * math.sqrt(1 + 1 / known)
        # A lower rate never turns away more.
        return min(bound, self._quantile(seldom)) if seldom < 1 else bound

    def _quantile(self, rate: float) -> float:
        share = rate - math.sqrt(rate * (1 - rate) / self.count)
        return float(np.interp(share, np.linspace(0, 1, QUANTILES), self.quantiles))

    def normal_of(self, ref: AdapterRef, member: Member) -> Normal:
        """By the adapter's own left-out scores, and the pool's where it has few. Depends on no other adapter registered since."""
        if ref in self.normals:
            return self.normals[ref]
        return _normal(self.metric, member, member.left_out_scores(self.metric, member.exemplars.testable()), self.pool)

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The same bytes for the same record; its number is the registry's to give."""
        facts = {
            "schema": SCHEMA,
            "encoder": self.encoder,
            "encoder_fingerprint": self.encoder_fingerprint,
            "pool": [self.pool.centre, self.pool.scale],
            "normals": [[str(ref), normal.centre, normal.scale] for ref, normal in self.normals.items()],
            "count": self.count,
            "mean": self.mean,
            "deviation": self.deviation,
        }
        tensors: dict[str, NDArray[Any]] = {
            "quantiles": self.quantiles,
            "metric.mean": self.metric.mean.astype(np.float32),
            "metric.transform": self.metric.transform.astype(np.float32),
            "metric.spread": self.metric.spread.astype(np.float32),
        }
        # One key: safetensors writes several in no fixed order.
        return safetensors.numpy.save(tensors, {"calibration": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, id: int | None = None, source: Path | str = "calibration.safetensors") -> Calibration:
        """Raises CorruptVersion if these are not the bytes of a record."""
        tensors, facts = read_tensors(data, "calibration", SCHEMA, source)
        try:
            metric = Metric(*(tensors[f"metric.{key}"].astype(np.float64) for key in ("mean", "transform", "spread")))
            record = cls(
                id=id,
                encoder=str(facts["encoder"]),
                encoder_fingerprint=str(facts["encoder_fingerprint"]),
                pool=Normal(*map(float, facts["pool"])),
                normals={AdapterRef.parse(ref): Normal(float(centre), float(scale)) for ref, centre, scale in facts["normals"]},
                metric=metric,
                quantiles=tensors["quantiles"],
                count=float(facts["count"]),
                mean=float(facts["mean"]),
                deviation=float(facts["deviation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(source, f"{error} is missing or has another form") from error
        record._check(source)
        return record

    def _check(self, source: Path | str) -> None:
        mean, transform, spread = self.metric.mean, self.metric.transform, self.metric.spread
        d, quantiles = mean.size, QUANTILES if self.count else 0
        shapes = (mean.shape, transform.shape, spread.shape, self.quantiles.shape)
        if shapes != ((d,), (d, d), (d,), (quantiles,)):
            raise corrupt(source, f"the shapes are {', '.join(map(str, shapes))}")
        normals = [self.pool, *self.normals.values()]
        numbers = np.array([self.count, self.mean, self.deviation, *(n.centre for n in normals), *(n.scale for n in normals)])
        if not all(np.isfinite(a).all() for a in (mean, transform, spread, self.quantiles, numbers)):
            raise corrupt(source, "a number is not finite")
        if (spread < 0).any() or min(n.scale for n in normals) <= 0 or self.count < 0 or self.deviation <= 0 or (np.diff(self.quantiles) < 0).any():
            raise corrupt(source, "a number is out of range")


def calibrate(states: Mapping[AdapterRef, RoutingState]) -> Calibration:
    """Fit metric and acceptance scores on these versions. Pure, and the same bytes in whatever order they are given.

    Raises InvalidInput where no version has an exemplar, ModelChanged where two encoders met.
    """
    # On one thread, so that sums run in one order; small eigenproblems are no slower for it.
    with threadpool_limits(1):
        return _calibrated(states)


def _calibrated(states: Mapping[AdapterRef, RoutingState]) -> Calibration:
    refs = tuple(sorted(ref for ref, state in states.items() if state.count))
    if not refs:
        hint = "Register one with examples or a description."
        raise InvalidInput("there is nothing to calibrate on: no version has an exemplar.", hint=hint)
    first = states[refs[0]]
    for ref in refs:
        check_encoder(str(ref), states[ref], first.encoder_fingerprint, first.encoder)
    adapters = [Exemplars.of(states[ref]) for ref in refs]
    moments = _moments(adapters)
    metric = Metric.fit(moments)
    left_out = _left_out(adapters, moments)
    members = [Member.of(one, metric) for one in adapters]
    expected = float(np.concatenate([expected_scores(metric, member) for member in members]).mean())
    own = [scores[:, place] for place, scores in enumerate(left_out)]
    pool = Normal(*_mean_and_deviation(np.concatenate(own), np.ones(sum(map(len, own))), expected, max(PRIOR_SCALE * abs(expected), 1e-3)))
    normals = [_normal(metric, member, scores, pool) for member, scores in zip(members, own, strict=True)]

    scores = np.concatenate(left_out)
    best = scores.argmax(axis=1)
    acceptance = (scores.max(axis=1) - np.array([n.centre for n in normals])[best]) / np.array([n.scale for n in normals])[best]
    starts = np.cumsum([0, *(len(one.counts) for one in adapters)])
    classes = np.concatenate([one.classes[one.testable()] + start for one, start in zip(adapters, starts, strict=False)])
    weights = 1 / np.maximum(np.concatenate([one.counts for one in adapters]), CLASS_FULL)[classes]
    # Acceptance scores are normalised: before any was seen they have mean 0 and deviation 1.
    mean, deviation = _mean_and_deviation(acceptance, weights / max(weights.mean(), 1e-12) if len(weights) else weights, 0.0, 1.0)
    return Calibration(
        id=None,
        encoder=first.encoder,
        encoder_fingerprint=first.encoder_fingerprint,
        pool=pool,
        normals=dict(zip(refs, normals, strict=True)),
        metric=metric,
        quantiles=_quantiles(acceptance, weights),
        count=_independent(acceptance, weights, classes),
        mean=mean,
        deviation=deviation,
    )


def _left_out(adapters: Sequence[Exemplars], moments: Moments) -> list[F64]:
    """For each adapter (n, a): the scores of its testable exemplars for every adapter.

    Each exemplar is left out of its own class mean and centroid exactly, and of the metric with its fold: a metric that saw an
    input scores it well whatever the class; with two exemplars a class, half of all belonging inputs were rejected at "5 %".
    """
    scores = [np.zeros((len(one.vectors), len(adapters))) for one in adapters]
    # Ordered by class, exemplars are dealt to the folds in turn, so that every class is spread over them.
    folds = [(np.arange(len(one.vectors)) + place) % FOLDS for place, one in enumerate(adapters)]
    for fold in range(FOLDS):
        rows = [(found := one.testable())[dealt[found] == fold] for one, dealt in zip(adapters, folds, strict=True)]
        if not any(len(chosen) for chosen in rows):
            continue
        metric = Metric.fit(moments.minus(_moments(adapters, [dealt == fold for dealt in folds])))
        members = [Member.of(one, metric) for one in adapters]
        panel = Panel.of(members)
        for place, (member, chosen) in enumerate(zip(members, rows, strict=True)):
            x = member.exemplars.vectors[chosen]
            scores[place][chosen] = panel.scores(x, metric.whiten(x))
            scores[place][chosen, place] = member.left_out_scores(metric, chosen)
    return [all_rows[one.testable()] for all_rows, one in zip(scores, adapters, strict=True)]


def _moments(adapters: Sequence[Exemplars], chosen: Sequence[NDArray[np.bool_]] | None = None) -> Moments:
    """Of all exemplars, or of the chosen ones, in canonical order."""
    starts = np.cumsum([0, *(len(one.counts) for one in adapters)])
    vectors = np.concatenate([one.vectors for one in adapters])
    classes = np.concatenate([one.classes + start for one, start in zip(adapters, starts, strict=False)])
    if chosen is not None:
        mask = np.concatenate(chosen)
        vectors, classes = vectors[mask], classes[mask]
    return Moments.of(vectors, classes, int(starts[-1]))


def _normal(metric: Metric, member: Member, own: F64, pool: Normal) -> Normal:
    """From the left-out scores of the adapter's exemplars, and the pool's where it has few.

    The scale is the pool's: one of each adapter's own would even out the rates a little and cost 0.6 points of AUROC on CLINC150.
    """
    if member.exemplars.single:
        expected = max(abs(float(expected_scores(metric, member).mean())), 1e-3)
        return Normal(SINGLE_CENTRE * expected, SINGLE_SCALE * expected)
    return Normal((float(own.sum()) + POOLED_WEIGHT * pool.centre) / (len(own) + POOLED_WEIGHT), pool.scale)


def _mean_and_deviation(values: F64, weights: F64, prior_mean: float, prior_deviation: float) -> tuple[float, float]:
    """With the prior counted as PRIOR_WEIGHT further values."""
    total = float(weights.sum()) + PRIOR_WEIGHT
    mean = (float(weights @ values) + PRIOR_WEIGHT * prior_mean) / total
    squares = float(weights @ (values - mean) ** 2) + PRIOR_WEIGHT * (prior_deviation**2 + (prior_mean - mean) ** 2)
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
        raise InvalidInput(f"max_false_reject={rate!r} is not a share.", hint="Give a number from 0 (never abstain) to 1.")
    return float(rate)


def check_encoder(name: str, state: RoutingState, fingerprint: str, encoder: str) -> None:
    """Vectors of two encoders cannot be compared. Raises ModelChanged."""
    if state.encoder_fingerprint != fingerprint:
        raise ModelChanged(
            f"'{name}' was encoded by '{state.encoder}' ({state.encoder_fingerprint[:19]}), "
            f"the router's exemplars by '{encoder}' ({fingerprint[:19]}).",
            hint="Register it again from its texts with the registry's encoder.",
        )
