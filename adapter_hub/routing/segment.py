"""Some adapters side by side: their prototypes as one matrix and one index. Immutable, so that snapshots share them.

A small segment scores every adapter. A large one asks an index of the scores' tangents for the adapters that score most, and scores
these exactly: two stages, one answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.features import F32
from adapter_hub.routing.head import Head
from adapter_hub.routing.index import FaissIndex, Index
from adapter_hub.routing.prototypes import F16, SHARPNESS, Prototypes
from adapter_hub.routing.scoring import Scoring, columns_of
from adapter_hub.routing.statistics import F64, I64

# n inputs, d encoder width, p prototypes, a adapters, c candidates, m most prototypes of one adapter
Mask = NDArray[np.bool_]

DENSE_MAX = 4096        # prototypes that are all scored
# Chosen by benchmarks/routing_scale.py on made queries.
FOUND = 64              # tangents asked of the index; at least four for each candidate wanted
CANDIDATES = 8          # adapters scored exactly beyond those wanted, of those that own what was found
GATHER_MAX = 2**20      # numbers gathered at once: what a processor's cache holds, however wide the encoder and however many the classes


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What one adapter brings to a segment."""

    ref: AdapterRef
    prototypes: Prototypes
    centre: float           # what its inputs usually score
    digest: str             # of its routing state


class Segment:
    """Adapters in the order of their references."""

    def __init__(
        self,
        refs: Sequence[AdapterRef],
        digests: Sequence[str],
        centres: F64,
        sizes: I64,
        labelled: I64,
        singles: Mask,
        means: F16,
        counts: F32,
        index: Index | None = None,
    ) -> None:
        self.refs = tuple(refs)
        self.digests = tuple(digests)
        self.centres = np.asarray(centres, np.float64)    # (a,) what inputs of each usually score
        self.sizes = np.asarray(sizes, np.int64)          # (a,) prototypes of each
        self.labelled = np.asarray(labelled, np.int64)    # (a,) those that are labels; they come first
        self.singles = np.asarray(singles, bool)          # (a,) which the head never sees
        self.means = means
        self.counts = counts
        self.starts: I64 = np.cumsum(np.append(0, self.sizes))[:-1]
        self._index = index
        self._columns: tuple[Head | None, I64] | None = None

    @classmethod
    def of(cls, entries: Collection[Entry]) -> Segment:
        entries = sorted(entries, key=lambda entry: entry.ref)
        prototypes = [entry.prototypes for entry in entries]
        return cls(
            [entry.ref for entry in entries],
            [entry.digest for entry in entries],
            np.array([entry.centre for entry in entries]),
            np.array([len(p.counts) for p in prototypes]),
            np.array([p.labelled for p in prototypes]),
            np.array([p.single for p in prototypes]),
            np.concatenate([p.means for p in prototypes]),
            np.concatenate([p.counts for p in prototypes]),
        )

    def __len__(self) -> int:
        """Prototypes."""
        return len(self.means)

    @cached_property
    def place(self) -> Mapping[AdapterRef, int]:
        return {ref: place for place, ref in enumerate(self.refs)}

    @staticmethod
    def merged(segments: Sequence[Segment], gone: Collection[AdapterRef] = ()) -> Segment:
        """All of them, without those that are gone."""
        return Segment._of_parts([(segment, i) for segment in segments for i, ref in enumerate(segment.refs) if ref not in gone])

    def without(self, *gone: AdapterRef) -> Segment:
        return Segment._of_parts([(self, i) for i, ref in enumerate(self.refs) if ref not in gone])

    @classmethod
    def _of_parts(cls, parts: Sequence[tuple[Segment, int]]) -> Segment:
        parts = sorted(parts, key=lambda part: part[0].refs[part[1]])
        spans = [(segment, slice(segment.starts[i], segment.starts[i] + segment.sizes[i])) for segment, i in parts]
        return cls(
            [segment.refs[i] for segment, i in parts],
            [segment.digests[i] for segment, i in parts],
            np.array([segment.centres[i] for segment, i in parts], np.float64),
            np.array([segment.sizes[i] for segment, i in parts], np.int64),
            np.array([segment.labelled[i] for segment, i in parts], np.int64),
            np.array([segment.singles[i] for segment, i in parts], bool),
            np.concatenate([segment.means[span] for segment, span in spans]) if spans else np.empty((0, 0), np.float16),
            np.concatenate([segment.counts[span] for segment, span in spans]) if spans else np.empty(0, np.float32),
        )

    @cached_property
    def solved_counts(self) -> I64:
        """(a, 2): the classes and the exemplars that each brings to a head; what is unlabelled is one class there."""
        first = np.arange(len(self)) - self.starts[self._owner] <= self.labelled[self._owner]    # of the unlabelled, the first speaks for all
        parts = [np.bincount(self._owner, numbers * first, len(self.refs)) for numbers in (np.ones(len(self)), self.counts)]
        return np.asarray(np.where(self.singles[:, None], 0, np.stack(parts, axis=1)), np.int64)

    def columns(self, head: Head | None) -> I64:
        """(p,): see `scoring.columns_of`. Those of the last head are kept, for the snapshots that share both."""
        kept = self._columns
        if kept is None or kept[0] is not head:
            kept = self._columns = head, columns_of(head, self.refs, self.sizes, self.labelled)
        return kept[1]

    def index(self, scoring: Scoring) -> Index:
        """Over one row a prototype, by `Scoring.tangents`. Made once: a segment lives under one calibration, as its centres do."""
        if self._index is None:
            self._index = FaissIndex.build(self._tangents(scoring))
        return self._index

    def _tangents(self, scoring: Scoring) -> F16:
        made = np.empty_like(self.means)
        for size in np.unique(self.sizes).tolist():
            starts = self.starts[self.sizes == size]
            step = max(1, GATHER_MAX // (size * max(size, self.means.shape[1])))
            for start in range(0, len(starts), step):
                rows = starts[start : start + step, None] + np.arange(size)
                made[rows] = scoring.tangents(self.means[rows].astype(np.float32))
        return made

    @cached_property
    def _means32(self) -> F32:
        return self.means.astype(np.float32)

    @cached_property
    def _owner(self) -> I64:
        return np.repeat(np.arange(len(self.refs)), self.sizes)

    def absent(self, gone: Collection[AdapterRef]) -> Mask | None:
        """(a,): which of its adapters are gone; None: none."""
        places = [self.place[ref] for ref in gone if ref in self.place]
        return np.isin(np.arange(len(self.refs)), places) if places else None

    def searches(self, wanted: int) -> bool:
        """Whether an index is asked for candidates, or every adapter is scored."""
        return len(self) > DENSE_MAX and len(self.refs) > wanted + CANDIDATES

    def scores(
        self, dense: F32, solved: F32 | None, columns: I64, scoring: Scoring, wanted: int, absent: Mask | None = None
    ) -> tuple[I64, F32]:
        """((n, c) adapters, (n, c) scores) of the candidates, in no order: at least `wanted`, or all; -1 and -inf fill up.

        Those that are `absent` (a,) are no candidates.
        """
        if not self.searches(wanted):
            products = dense @ self._means32.T
            responses = scoring.responses(products, solved, columns, self.counts)
            adapters = np.broadcast_to(np.arange(len(self.refs)), (len(dense), len(self.refs)))
            scores = scoring.scores(responses, products, self.starts)
            return (adapters, scores) if absent is None else (np.where(absent, -1, adapters), np.where(absent, np.float32(-np.inf), scores))
        candidates, parts = self._candidates(dense, scoring, wanted, absent), []
        size = max(1, GATHER_MAX // (candidates.shape[1] * int(self.sizes[candidates].max()) * self.means.shape[1]))
        for start in range(0, len(dense), size):
            rows = slice(start, start + size)
            parts.append(self._exact(dense[rows], None if solved is None else solved[rows], columns, scoring, candidates[rows]))
        return candidates, np.concatenate(parts)

    def label_responses(self, dense: F32, solved: F32 | None, columns: I64, scoring: Scoring, ref: AdapterRef) -> F32:
        """(n, c): the responses to the labels of one adapter, in alphabetical order."""
        place = self.place[ref]
        own = slice(self.starts[place], self.starts[place] + self.labelled[place])
        return scoring.responses(dense @ self._means32[own].T, solved, columns[own], self.counts[own])

    def _candidates(self, dense: F32, scoring: Scoring, wanted: int, absent: Mask | None) -> I64:
        """(n, c): the adapters whose tangents promise the most; -1 fills up."""
        present = len(self.refs) - (0 if absent is None else int(absent.sum()))
        asked = max(FOUND, 4 * wanted)
        while True:
            _, found = self.index(scoring).search(dense, asked)
            owners = np.where(found < 0, -1, self._owner[found])
            if absent is not None:
                owners[absent[owners]] = -1
            candidates = _firsts(owners, wanted + CANDIDATES)
            if asked >= len(self) or ((candidates >= 0).sum(axis=1) >= min(wanted, present)).all():
                return candidates
            asked *= 4    # few adapters own all of these, or most of them are gone

    def _exact(self, dense: F32, solved: F32 | None, columns: I64, scoring: Scoring, adapters: I64) -> F32:
        """(n, c): the scores of these adapters, all of their prototypes counted."""
        n, c = adapters.shape
        known = np.maximum(adapters, 0)
        m = int(self.sizes[known].max())
        real = (np.arange(m) < self.sizes[known][:, :, None]) & (adapters >= 0)[:, :, None]        # (n, c, m)
        rows = np.where(real, self.starts[known][:, :, None] + np.arange(m), 0)
        products = np.einsum("nd,nrd->nr", dense, self.means[rows.reshape(n, -1)].astype(np.float32)).reshape(n, c, m)
        responses = scoring.expected(products)
        places = columns[rows]
        if solved is not None and (places >= 0).any():
            at = np.arange(n)[:, None, None]
            responses = scoring.chosen(responses, solved[at, np.maximum(places, 0)], places, self.counts[rows])
        best = np.where(real, responses, -np.inf).max(axis=2)
        sums = np.where(real, np.exp(np.float32(SHARPNESS) * products), 0).sum(axis=2) / self.sizes[known]
        close = np.log(np.maximum(sums, 1e-30)) / np.float32(SHARPNESS)
        return np.where(adapters >= 0, scoring.combined(best, close), -np.inf).astype(np.float32)


def _firsts(owners: I64, most: int) -> I64:
    """(n, most): of each row the different owners in the order of their first places; -1, which is none, fills up."""
    order = np.argsort(owners, axis=1, kind="stable")
    in_order = np.take_along_axis(owners, order, axis=1)
    again = np.zeros(owners.shape, bool)
    again[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    repeated = np.zeros(owners.shape, bool)
    np.put_along_axis(repeated, order, again, axis=1)
    closest = np.argsort(repeated | (owners < 0), axis=1, kind="stable")[:, :most]
    firsts = np.take_along_axis(owners, closest, axis=1)
    return np.where(np.take_along_axis(repeated, closest, axis=1), -1, firsts)
