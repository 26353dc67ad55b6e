"""Plan a request of many rows: which rows share a forward, and which adapters must be resident for it. Pure: no torch, no files.

A plan depends on the request alone, never on what is resident or registered: the same request gives the same tensor shapes, and
so the same bytes. What must be loaded for a batch is asked separately, by `evictions`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapter_hub.refs import AdapterRef

BATCH_ROWS_MAX = 64
# Measured on one thread, for MiniLM and a base of width 1,024 at ranks 8 and 32: a merged copy takes as long as the forward of 125 to 226
# tokens, whatever the base's size, and a number of an adapter as long as 1.5 to 3.7 weights of the base.
MERGE_TOKENS = 160
ADAPTER_COST = 2.5
MERGE_GAIN_MIN = 2    # a copy is made where it saves so many times what it costs: a machine's noise is as large as the rest


@dataclass(frozen=True, slots=True)
class Row:
    """One input as the planner sees it."""

    adapters: tuple[AdapterRef, ...]    # distinct, in order; empty: the base model; several: they answer it together
    kind: Hashable                      # rows of different kinds cannot share a forward: hidden states, or one set of generation settings
    tokens: int
    form: tuple[int, ...] = ()          # rows of one form are run by one product; empty: the base model, and rows of several adapters


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
    merged: bool = False    # its one adapter is merged into a copy of the base

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


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan costs in loads where nothing is resident when it begins."""

    adapters: int    # the working set
    bytes: int       # that it takes
    fits: bool       # into the slots, all at once: then a request like it finds them resident
    loads: int

    @property
    def repeats(self) -> int:
        """Loads of what was loaded before for the same plan, and had to go."""
        return self.loads - self.adapters

    def extra_ms(self, load_ms: float) -> float:
        """Of a request whose working set does not fit over one whose set does and stays resident, about: reading ahead may hide some."""
        return 0.0 if self.fits else self.loads * load_ms


def merge_tokens_min(weights: int, numbers: int) -> float:
    """The tokens of one adapter from which a merged copy of the base pays; `weights` are those it touches, `numbers` its own A and B.

    In units of one token's product with one weight, n tokens cost n (w + c a) mixed and m w + n w merged, for w weights, a numbers,
    m = MERGE_TOKENS and c = ADAPTER_COST: merging saves n c a for m w. It pays g = MERGE_GAIN_MIN times over from n = g m w / (c a).
    Of w = Σ i o and a = Σ r (i + o) that is proportional to the base's width over the adapter's rank. Rows of one adapter that are
    run by themselves without merging (grouped) save nothing over mixed ones but loads, and are so only where places are too few.
    """
    return MERGE_GAIN_MIN * MERGE_TOKENS * weights / (ADAPTER_COST * numbers)


def plan_batches(
    rows: Sequence[Row],
    *,
    slots_max: int,
    rows_max: int = BATCH_ROWS_MAX,
    bytes_max: int | None = None,
    sizes: Mapping[AdapterRef, int] = {},
    mergeable: Mapping[AdapterRef, float] = {},
) -> BatchPlan:
    """Group rows by kind and length into batches of at most `rows_max` rows and `slots_max` distinct adapters of `bytes_max` together.

    No row may need more adapters than that by itself; one adapter may be larger than `bytes_max`, alone. Those of the
    `mergeable` that have as many tokens of a kind as stand beside them (`merge_tokens_min`) get batches of their own, one adapter after
    another, before the mixed ones.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    batches = []
    for kind in kinds:
        found = [i for i, row in enumerate(rows) if row.kind == kind]
        tokens = Counter[tuple[AdapterRef, ...]]()
        for i in found:
            tokens[rows[i].adapters] += rows[i].tokens
        for refs in sorted(refs for refs, count in tokens.items() if len(refs) == 1 and count >= mergeable.get(refs[0], math.inf)):
            own = sorted((i for i in found if rows[i].adapters == refs), key=lambda i: -rows[i].tokens)
            batches += [replace(_batch(kind, rows, own[at : at + rows_max]), merged=True) for at in range(0, len(own), rows_max)]
            found = [i for i in found if rows[i].adapters != refs]

        def fits(adapters: Collection[AdapterRef]) -> bool:
            return _fit(adapters, sizes, slots_max, bytes_max)

        crowded = not fits({ref for i in found for ref in rows[i].adapters})
        # Rows of like length are padded little; ties keep the request's order. Where not all adapters can be resident,
        # each one's rows stay together instead: loading it once costs less than padding saves.
        order = sorted(found, key=lambda i: (tuple(map(str, rows[i].adapters)) if crowded else (), -rows[i].tokens))
        batches += [_batch(kind, rows, chunk) for chunk in _chunks(rows, order, rows_max, fits)]
    return BatchPlan(tuple(batches))


def forecast(plan: BatchPlan, sizes: Mapping[AdapterRef, int], *, slots_max: int, bytes_max: int) -> Forecast:
    """How often adapters of these bytes are loaded, as `evictions` lets them go."""
    resident: OrderedDict[AdapterRef, int] = OrderedDict()    # least recently used first
    loads = 0
    for batch in plan.batches:
        absent = [ref for ref in batch.adapters if ref not in resident]
        idle = [ref for ref in resident if ref not in batch.adapters]
        size = sum(sizes[ref] for ref in absent)
        for ref in evictions(resident, idle, len(absent), size, slots_max=slots_max, bytes_max=bytes_max) if absent else ():
            del resident[ref]
        for ref in batch.adapters:
            resident[ref] = sizes[ref]
            resident.move_to_end(ref)
        loads += len(absent)
    every = {ref for batch in plan.batches for ref in batch.adapters}
    fits = len(every) == 1 or _fit(every, sizes, slots_max, bytes_max)    # one alone may be larger
    return Forecast(len(every), sum(sizes[ref] for ref in every), fits, loads)


def next_batch(
    waiting: Sequence[tuple[AdapterRef, ...]], sizes: Mapping[AdapterRef, int], *, slots_max: int, bytes_max: int, rows_max: int = BATCH_ROWS_MAX
) -> list[int]:
    """Which of those that wait, oldest first, are answered next: the oldest, and in order of arrival those that fit beside it.

    `waiting` names the adapters of each, none for the base model; those of a batch are resident at once. Each call answers the oldest, so a
    request that n others precede is in one of the next n + 1 batches, whatever comes after it. Adapters of unknown size count as 0 bytes.
    """
    chosen: list[int] = []
    adapters: set[AdapterRef] = set()
    for i, needed in enumerate(waiting):
        if len(chosen) == rows_max:
            break
        more = adapters.union(needed)
        if not chosen or more == adapters or _fit(more, sizes, slots_max, bytes_max):
            chosen.append(i)
            adapters = more
    return chosen


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The same rows in two batches, for a machine whose memory one of them was too large for."""
    rows = batch.rows
    first = set(rows[: len(rows) // 2])

    def part(chosen: Callable[[int], bool]) -> Batch:
        cut = [Segment(segment.adapters, tuple(row for row in segment.rows if chosen(row))) for segment in batch.segments]
        return replace(batch, segments=tuple(segment for segment in cut if segment.rows))

    return part(lambda row: row in first), part(lambda row: row not in first)


def evictions(
    resident: Mapping[AdapterRef, int], idle: Sequence[AdapterRef], loads: int, loads_bytes: int, *, slots_max: int, bytes_max: int
) -> list[AdapterRef]:
    """Which of the idle must go so that `loads` more adapters fit, in their order; all of them where that is not enough.

    `resident` holds the bytes of each, `idle` those that no batch needs, least recently used first.
    """
    count, size = len(resident) + loads, sum(resident.values()) + loads_bytes
    gone: list[AdapterRef] = []
    for ref in idle:
        if count <= slots_max and size <= bytes_max:
            break
        gone.append(ref)
        count, size = count - 1, size - resident[ref]
    return gone


def _fit(adapters: Collection[AdapterRef], sizes: Mapping[AdapterRef, int], slots_max: int, bytes_max: int | None) -> bool:
    return len(adapters) <= slots_max and (bytes_max is None or sum(sizes.get(ref, 0) for ref in adapters) <= bytes_max)


def _chunks(rows: Sequence[Row], order: Sequence[int], rows_max: int, fits: Callable[[Collection[AdapterRef]], bool]) -> Iterable[list[int]]:
    chunk: list[int] = []
    adapters: set[AdapterRef] = set()
    for i in order:
        more = adapters.union(rows[i].adapters)
        if chunk and (len(chunk) == rows_max or (more != adapters and not fits(more))):
            yield chunk
            chunk, more = [], set(rows[i].adapters)
        chunk.append(i)
        adapters = more
    if chunk:
        yield chunk


def _batch(kind: Hashable, rows: Sequence[Row], chunk: Sequence[int]) -> Batch:
    # The base's is first, then each form's, then rows of several adapters.
    sets = sorted({(len(rows[i].adapters) > 1, rows[i].form, rows[i].adapters) for i in chunk})
    by_set: dict[tuple[AdapterRef, ...], list[int]] = {}
    for i in chunk:
        by_set.setdefault(rows[i].adapters, []).append(i)
    return Batch(kind, tuple(Segment(refs, tuple(by_set[refs])) for _, _, refs in sets))
