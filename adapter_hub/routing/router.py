"""An immutable snapshot that decides: every adapter's prototypes in one index, one calibration. It never embeds and never writes.

Readers hold a snapshot while the next one is built; `with_added` and `without` share what stays the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapter_hub.errors import InvalidInput, ModelChanged
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import Calibration, Normal, calibrate, check_encoder, check_rate
from adapter_hub.routing.decision import Decision, Reason
from adapter_hub.routing.encoder import Encoder
from adapter_hub.routing.index import FaissIndex, Index
from adapter_hub.routing.metric import F64, I64
from adapter_hub.routing.prototypes import Member
from adapter_hub.routing.statistics import Exemplars, RoutingState

# n inputs, d encoder width, a adapters, p prototypes of all, k candidates
CHUNK = 512             # inputs scored at once
SEARCH_MIN = 16         # prototypes asked of the index; more where they belong to too few adapters
SCORE_DECIMALS = 6      # so that an input decides the same alone and in a batch, where sums run in another order


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One adapter, compiled under a calibration."""

    rows: F64          # (c, 2d)
    biases: F64        # (c,)
    normal: Normal


class Router:
    """Make one with `build`."""

    def __init__(
        self,
        states: Mapping[AdapterRef, RoutingState],
        calibration: Calibration | None,
        entries: Mapping[AdapterRef, _Entry],
        index: Callable[[int], Index],
    ) -> None:
        self.states = states
        self.calibration = calibration      # None: no adapter has an exemplar
        self._entries = entries
        self._make_index = index
        self._refs = tuple(sorted(entries))
        if calibration is None or not self._refs:
            return
        parts = [entries[ref] for ref in self._refs]
        self._rows = np.concatenate([part.rows for part in parts])
        self._biases = np.concatenate([part.biases for part in parts])
        self._owner = np.repeat(np.arange(len(parts)), [len(part.biases) for part in parts])
        self._centres = np.array([part.normal.centre for part in parts])
        self._scales = np.array([part.normal.scale for part in parts])
        self._index = index(self._rows.shape[1] + 1)
        self._index.add(np.hstack([self._rows, self._biases[:, None]]).astype(np.float32))

    @classmethod
    def build(
        cls, states: Mapping[AdapterRef, RoutingState], calibration: Calibration | None = None, index: Callable[[int], Index] = FaissIndex
    ) -> Router:
        """The router over these versions. Without a calibration, one is made from them. Raises ModelChanged."""
        if calibration is None and any(state.count for state in states.values()):
            calibration = calibrate(states)
        states = {ref: states[ref] for ref in sorted(states)}
        return cls(states, calibration, {ref: e for ref, s in states.items() if (e := _compiled(ref, s, calibration))}, index)

    def with_added(self, ref: AdapterRef, state: RoutingState) -> Router:
        """The next snapshot, under the same calibration: nothing moves for the adapters that were there. Raises ModelChanged."""
        states = {**self.states, ref: state}
        if self.calibration is None:
            return Router.build(states, None, self._make_index)
        entry = _compiled(ref, state, self.calibration)
        kept = {other: e for other, e in self._entries.items() if other != ref}
        return Router(dict(sorted(states.items())), self.calibration, {**kept, ref: entry} if entry else kept, self._make_index)

    def without(self, ref: AdapterRef) -> Router:
        """The next snapshot, under the same calibration, as if `ref` had never been added after it. Unknown refs change nothing."""
        states = {other: state for other, state in self.states.items() if other != ref}
        return Router(states, self.calibration, {other: e for other, e in self._entries.items() if other != ref}, self._make_index)

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        """The adapters that can be routed to, sorted; those without exemplars are not among them."""
        return self._refs

    @property
    def digest(self) -> str:
        """Changes with anything that a decision depends on."""
        parts = [self.calibration.digest if self.calibration else "", *(f"{ref} {self.states[ref].digest}" for ref in self.states)]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def route(self, encoder: Encoder, texts: Sequence[str], k: int = 1, max_false_reject: float = 0.05) -> list[Decision]:
        """Encode and decide. Raises InvalidInput, and ModelChanged for another encoder than the exemplars'."""
        if self.calibration and encoder.fingerprint != self.calibration.encoder_fingerprint:
            raise ModelChanged(
                f"the router's exemplars were encoded by '{self.calibration.encoder}', not by '{encoder.id}' ({encoder.fingerprint[:19]}).",
                hint="Route with the registry's encoder.",
            )
        return self.route_vectors(encoder.encode(texts), k=k, max_false_reject=max_false_reject)

    def route_vectors(self, vectors: NDArray[np.float32], k: int = 1, max_false_reject: float = 0.05) -> list[Decision]:
        """Decide for each row of (n, d). `k` is how many candidates each decision shows. Raises InvalidInput."""
        rate = check_rate(max_false_reject)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InvalidInput(f"k={k!r} is not a positive count of candidates.")
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise InvalidInput(f"vectors of shape {vectors.shape} and type {vectors.dtype} are not rows of floats.")
        norms = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            raise InvalidInput(f"vector {bad[0] + 1} of {len(vectors)} is zero or not finite.")
        if self.calibration is None or not self._refs:
            number = self.calibration.id if self.calibration else None
            return [Decision(None, None, -math.inf if rate == 0 else None, None, Reason.NO_CANDIDATES, (), number)] * len(vectors)
        if vectors.shape[1] != self.calibration.metric.dim:
            raise InvalidInput(f"vectors of width {vectors.shape[1]} do not fit a router of width {self.calibration.metric.dim}.")
        threshold = self.calibration.threshold(rate)
        decisions: list[Decision] = []
        for start in range(0, len(vectors), CHUNK):
            decisions += self._decide(vectors[start : start + CHUNK].astype(np.float64), k, threshold)
        return decisions

    def _decide(self, vectors: F64, k: int, threshold: float) -> list[Decision]:
        assert self.calibration is not None
        adapters, scores = self._candidates(vectors, min(max(k, 2), len(self._refs)))
        acceptance = np.round((scores[:, 0] - self._centres[adapters[:, 0]]) / self._scales[adapters[:, 0]], SCORE_DECIMALS)
        scores = np.round(scores, SCORE_DECIMALS)
        decisions = []
        for row, row_scores, score in zip(adapters.tolist(), scores.tolist(), acceptance.tolist(), strict=True):
            accepted = score >= threshold
            decisions.append(
                Decision(
                    adapter=self._refs[row[0]] if accepted else None,
                    score=score,
                    threshold=threshold,
                    margin=round(row_scores[0] - row_scores[1], SCORE_DECIMALS) if len(row) > 1 else None,
                    reason=Reason.ACCEPTED if accepted else Reason.BELOW_THRESHOLD,
                    candidates=tuple((self._refs[a], s) for a, s in zip(row[:k], row_scores[:k], strict=True)),
                    calibration=self.calibration.id,
                )
            )
        return decisions

    def _candidates(self, vectors: F64, wanted: int) -> tuple[I64, F64]:
        """((n, wanted) adapters, their scores), best first; ties go to the first in name order."""
        assert self.calibration is not None
        whitened = self.calibration.metric.whiten(vectors)
        features = np.hstack([vectors, whitened * whitened])
        queries = np.hstack([features, np.ones((len(features), 1))]).astype(np.float32)
        adapters = np.zeros((len(vectors), wanted), np.int64)
        scores = np.zeros((len(vectors), wanted))
        open_rows, searched = np.arange(len(vectors)), min(max(SEARCH_MIN, 4 * wanted), len(self._biases))
        while len(open_rows):
            _, found = self._index.search(queries[open_rows], searched)
            complete = searched == len(self._biases)
            # The last hit may have shut out its equal: it does not count towards enough.
            owners = self._owner[found if complete else found[:, :-1]]
            enough = np.ones(len(open_rows), bool) if complete else _distinct(owners) >= wanted
            done = open_rows[enough]
            adapters[done], scores[done] = self._best(features[done], found[enough], wanted)
            open_rows, searched = open_rows[~enough], min(4 * searched, len(self._biases))
        return adapters, scores

    def _best(self, features: F64, found: I64, wanted: int) -> tuple[I64, F64]:
        """Score the found prototypes again in float64, input by input, and keep each adapter's best."""
        n = len(features)
        exact = np.einsum("nf,nkf->nk", features, self._rows[found]) + self._biases[found]
        best = np.full((n, len(self._refs)), -np.inf)
        np.maximum.at(best, (np.arange(n)[:, None], self._owner[found]), exact)
        order = np.argsort(-np.round(best, SCORE_DECIMALS), axis=1, kind="stable")[:, :wanted]
        return order, np.take_along_axis(best, order, axis=1)


def _compiled(ref: AdapterRef, state: RoutingState, calibration: Calibration | None) -> _Entry | None:
    """None for a version without exemplars. Raises ModelChanged."""
    if calibration is None or not state.count:
        return None
    check_encoder(str(ref), state, calibration.encoder_fingerprint, calibration.encoder)
    member = Member.of(Exemplars.of(state), calibration.metric)
    return _Entry(*member.rows(), calibration.normal_of(ref, member))


def _distinct(owners: I64) -> I64:
    """How many different values each row holds."""
    return np.asarray((np.diff(np.sort(owners, axis=1), axis=1) != 0).sum(axis=1) + 1)
