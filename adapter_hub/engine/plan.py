"""Plan a request of many rows: which rows share a forward, and which adapters must be resident for it. Pure: no torch, no files.

A plan depends on the request alone, never on what is resident or registered: the same request gives the same tensor shapes, and
so the same bytes. What must be loaded for a batch is asked separately, by `missing`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from adapter_hub.refs import AdapterRef

BATCH_ROWS_MAX = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One input as the planner sees it."""

    adapters: tuple[AdapterRef, ...]    # distinct, in order; empty: the base model; several: they answer it together
    kind: Hashable                      # rows of different kinds cannot share a forward: hidden states, or one set of generation settings
    tokens: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one batch that share their adapters, as positions in the request. Their weights may differ."""

    adapters: tuple[AdapterRef, ...]    # empty: the base model
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward. Its rows stand in the order of its segments; the base's segment, if any, is first."""

    kind: Hashable
    segments: tuple[Segment, ...]

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Each once, in order."""
        return tuple(sorted({ref for segment in self.segments for ref in segment.adapters}))

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(row for segment in self.segments for row in segment.rows)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    batches: tuple[Batch, ...]


def plan_batches(rows: Sequence[Row], *, rows_max: int = BATCH_ROWS_MAX, slots_max: int) -> BatchPlan:
    """Group rows by kind and length into batches of at most `rows_max` rows and `slots_max` distinct adapters.

    No row may need more adapters than that by itself.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    batches = []
    for kind in kinds:
        found = [i for i, row in enumerate(rows) if row.kind == kind]
        crowded = len({ref for i in found for ref in rows[i].adapters}) > slots_max
        # Rows of like length are padded little; ties keep the request's order. Where not all adapters can be resident,
        # each one's rows stay together instead: loading it once costs less than padding saves.
        order = sorted(found, key=lambda i: (tuple(map(str, rows[i].adapters)) if crowded else (), -rows[i].tokens))
        batches += [_batch(kind, rows, chunk) for chunk in _chunks(rows, order, rows_max, slots_max)]
    return BatchPlan(tuple(batches))


def missing(wanted: Iterable[AdapterRef], resident: Sequence[AdapterRef], slots_max: int) -> tuple[list[AdapterRef], list[AdapterRef]]:
    """(loads, evictions) that make `wanted` resident. `resident` is least recently used first; only what must go, goes."""
    wanted = list(dict.fromkeys(wanted))
    loads = [ref for ref in wanted if ref not in resident]
    excess = len(resident) + len(loads) - slots_max
    idle = [ref for ref in resident if ref not in wanted]
    return loads, idle[: max(excess, 0)]


def _chunks(rows: Sequence[Row], order: Sequence[int], rows_max: int, slots_max: int) -> Iterable[list[int]]:
    chunk: list[int] = []
    adapters: set[AdapterRef] = set()
    for i in order:
        if chunk and (len(chunk) == rows_max or len(adapters.union(rows[i].adapters)) > slots_max):
            yield chunk
            chunk, adapters = [], set()
        chunk.append(i)
        adapters.update(rows[i].adapters)
    if chunk:
        yield chunk


def _batch(kind: Hashable, rows: Sequence[Row], chunk: Sequence[int]) -> Batch:
    sets = sorted({rows[i].adapters for i in chunk})    # the empty one, the base's, is first
    return Batch(kind, tuple(Segment(refs, tuple(i for i in chunk if rows[i].adapters == refs)) for refs in sets))
