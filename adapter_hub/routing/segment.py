"""Some adapters side by side: their prototypes as one matrix and one index. Immutable, so that snapshots share them.

A small segment scores every adapter. A large one asks the index for the closest prototypes and scores the adapters that own them,
exactly: two stages, one answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.features import F32
from adapter_hub.routing.head import Head
from adapter_hub.routing.index import FaissIndex, Index
from adapter_hub.routing.prototypes import F16, SHARPNESS, Prototypes
from adapter_hub.routing.scoring import Scoring, columns_of
from adapter_hub.routing.statistics import F64, I64

# n inputs, d encoder width, p prototypes, a adapters, c candidates, m most prototypes of one adapter
DENSE_MAX = 4096        # prototypes that are all scored
FOUND = 128             # prototypes asked of the index; at least four for each candidate wanted
CANDIDATES = 32         # adapters scored exactly, of those that own what was found
GATHER_MAX = 2**25      # numbers gathered at once: 200 MB, however wide the encoder and however many the classes


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
        means: F16,
        counts: F32,
        index: Index | None = None,
    ) -> None:
        self.refs = tuple(refs)
        self.digests = tuple(digests)
        self.centres = np.asarray(centres, np.float64)    # (a,) what inputs of each usually score
        self.sizes = np.asarray(sizes, np.int64)          # (a,) prototypes of each
        self.labelled = np.asarray(labelled, np.int64)    # (a,) those that are labels; they come first
        self.means = means
        self.counts = counts
        self.starts: I64 = np.cumsum(np.append(0, self.sizes))[:-1]
        self._given = index

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
            np.concatenate([p.means for p in prototypes]),
            np.concatenate([p.counts for p in prototypes]),
        )

    def __len__(self) -> int:
        """Prototypes."""
        return len(self.means)

    @cached_property
    def place(self) -> Mapping[AdapterRef, int]:
        return {ref: place for place, ref in enumerate(self.refs)}

    def merged(self, other: Segment, gone: Collection[AdapterRef] = ()) -> Segment:
        """Both, without those that are gone."""
        parts = [(segment, i) for segment in (self, other) for i, ref in enumerate(segment.refs) if ref not in gone]
        return Segment._of_parts(parts)

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
            np.concatenate([segment.means[span] for segment, span in spans]) if spans else np.empty((0, 0), np.float16),
            np.concatenate([segment.counts[span] for segment, span in spans]) if spans else np.empty(0, np.float32),
        )

    def columns(self, head: Head | None) -> I64:
        """(p,): see `scoring.columns_of`."""
        return columns_of(head, self.refs, self.sizes, self.labelled)

    @cached_property
    def index(self) -> Index:
        return self._given if self._given is not None else FaissIndex.build(self.means)

    @cached_property
    def _means32(self) -> F32:
        return self.means.astype(np.float32)

    @cached_property
    def _owner(self) -> I64:
        return np.repeat(np.arange(len(self.refs)), self.sizes)

    def scores(self, dense: F32, solved: F32 | None, columns: I64, scoring: Scoring, wanted: int) -> tuple[I64, F32]:
        """((n, c) adapters, (n, c) scores) of the candidates, in no order: at least `wanted`, or all; -1 and -inf fill up."""
        if len(self) <= DENSE_MAX or len(self.refs) <= max(CANDIDATES, wanted):
            products = dense @ self._means32.T
            responses = scoring.responses(products, solved, columns, self.counts)
            adapters = np.broadcast_to(np.arange(len(self.refs)), (len(dense), len(self.refs)))
            return adapters, scoring.scores(responses, products, self.starts)
        size = max(1, GATHER_MAX // (max(CANDIDATES, wanted) * int(self.sizes.max()) * self.means.shape[1]))
        parts = []
        for start in range(0, len(dense), size):
            rows = slice(start, start + size)
            adapters = self._candidates(dense[rows], wanted)
            parts.append((adapters, self._exact(dense[rows], None if solved is None else solved[rows], columns, scoring, adapters)))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _candidates(self, dense: F32, wanted: int) -> I64:
        """(n, c): the adapters that own the closest prototypes; -1 fills up."""
        most = max(CANDIDATES, wanted)
        _, found = self.index.search(dense, max(FOUND, 4 * wanted))
        owners = np.where(found < 0, -1, self._owner[found])
        # The first place of each owner in its row, in the order of closeness.
        order = np.argsort(owners, axis=1, kind="stable")
        in_order = np.take_along_axis(owners, order, axis=1)
        again = np.zeros(owners.shape, bool)
        again[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
        repeated = np.zeros(owners.shape, bool)
        np.put_along_axis(repeated, order, again, axis=1)
        closest = np.argsort(repeated | (owners < 0), axis=1, kind="stable")[:, :most]
        firsts = np.take_along_axis(owners, closest, axis=1)
        return np.where(np.take_along_axis(repeated, closest, axis=1), -1, firsts)

    def _exact(self, dense: F32, solved: F32 | None, columns: I64, scoring: Scoring, adapters: I64) -> F32:
        """(n, c): the scores of these adapters, all of their prototypes counted."""
        n, c = adapters.shape
        m = int(self.sizes.max())
        known = np.maximum(adapters, 0)
        real = (np.arange(m) < self.sizes[known][:, :, None]) & (adapters >= 0)[:, :, None]        # (n, c, m)
        rows = np.where(real, self.starts[known][:, :, None] + np.arange(m), 0)
        products = np.einsum("nd,nrd->nr", dense, self.means[rows.reshape(n, -1)].astype(np.float32)).reshape(n, c, m)
        responses = scoring.expected(products)
        if solved is not None and (columns >= 0).any():
            at = np.arange(n)[:, None, None]
            places = columns[rows]
            responses = scoring.chosen(responses, solved[at, np.maximum(places, 0)], places, self.counts[rows])
        best = np.where(real, responses, -np.inf).max(axis=2)
        sums = np.where(real, np.exp(np.float32(SHARPNESS) * products), 0).sum(axis=2) / self.sizes[known]
        close = np.log(np.maximum(sums, 1e-30)) / np.float32(SHARPNESS)
        return np.where(adapters >= 0, scoring.combined(best, close), -np.inf).astype(np.float32)
