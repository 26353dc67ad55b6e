"""Plans are pure: every row once, limits kept, and nothing but the request decides."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.engine.plan import (
    ADAPTER_COST,
    MERGE_GAIN_MIN,
    MERGE_TOKENS,
    Row,
    evictions,
    forecast,
    halves,
    merge_tokens_min,
    next_batch,
    plan_batches,
)
from adapter_hub.refs import AdapterRef

Refs = tuple[AdapterRef, ...]
REFS = [AdapterRef(f"a{i}", 1) for i in range(8)]
sets = st.sets(st.sampled_from(REFS), max_size=3).map(lambda refs: tuple(sorted(refs)))
rows_of = st.lists(st.builds(Row, sets, st.sampled_from(["hidden", "greedy"]), st.integers(1, 50)), max_size=60)


@given(rows_of, st.integers(1, 9), st.integers(1, 9))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(rows: list[Row], rows_max: int, slots_max: int) -> None:
    rows = [row for row in rows if len(row.adapters) <= slots_max]
    plan = plan_batches(rows, rows_max=rows_max, slots_max=slots_max)
    assert sorted(i for batch in plan.batches for i in batch.rows) == list(range(len(rows)))
    for batch in plan.batches:
        assert len(batch.rows) <= rows_max and len(batch.adapters) <= slots_max
        assert {rows[i].kind for i in batch.rows} == {batch.kind}
        assert all(rows[i].adapters == segment.adapters for segment in batch.segments for i in segment.rows)
        assert list(batch.adapters) == sorted({ref for i in batch.rows for ref in rows[i].adapters})
        assert all(segment.adapters for segment in batch.segments[1:])
    assert plan == plan_batches(rows, rows_max=rows_max, slots_max=slots_max)


@given(st.dictionaries(st.sampled_from(REFS), st.integers(1, 9)), st.data(), st.integers(0, 4), st.integers(1, 9), st.integers(1, 40))
def test_only_what_must_go_is_evicted(resident: dict[AdapterRef, int], data: st.DataObject, loads: int, slots_max: int, bytes_max: int) -> None:
    idle = [ref for ref in resident if data.draw(st.booleans())]
    gone = evictions(resident, idle, loads, 5 * loads, slots_max=slots_max, bytes_max=bytes_max)

    def fits(without: list[AdapterRef]) -> bool:
        left = [size for ref, size in resident.items() if ref not in without]
        return len(left) + loads <= slots_max and sum(left) + 5 * loads <= bytes_max

    assert gone == idle[: len(gone)]    # least recently used first
    assert fits(gone) or gone == idle
    assert not gone or not fits(gone[:-1])


@given(rows_of, st.integers(1, 9))
def test_a_batchs_adapters_take_no_more_bytes_than_there_are(rows: list[Row], bytes_max: int) -> None:
    sizes = {ref: place + 1 for place, ref in enumerate(REFS)}
    plan = plan_batches(rows, slots_max=9, bytes_max=bytes_max, sizes=sizes)
    assert sorted(i for batch in plan.batches for i in batch.rows) == list(range(len(rows)))
    for batch in plan.batches:
        assert sum(sizes[ref] for ref in batch.adapters) <= bytes_max or batch.adapters in {rows[i].adapters for i in batch.rows}


@given(rows_of)
def test_halves_are_the_same_rows(rows: list[Row]) -> None:
    for batch in plan_batches(rows, slots_max=9).batches:
        if len(batch.rows) > 1:
            first, second = halves(batch)
            assert first.rows + second.rows == batch.rows and abs(len(first.rows) - len(second.rows)) <= 1
            assert all(rows[i].adapters == segment.adapters for half in (first, second) for segment in half.segments for i in segment.rows)


@given(rows_of, st.dictionaries(st.sampled_from(REFS), st.integers(1, 200)))
def test_many_tokens_of_one_mergeable_adapter_are_batches_of_their_own(rows: list[Row], mergeable: dict[AdapterRef, int]) -> None:
    batches = plan_batches(rows, slots_max=9, mergeable=mergeable).batches
    assert sorted(i for batch in batches for i in batch.rows) == list(range(len(rows)))
    tokens = Counter[tuple[str, Refs]]()
    for row in rows:
        tokens[str(row.kind), row.adapters] += row.tokens
    for batch in batches:
        for segment in batch.segments:
            refs = segment.adapters
            whole = len(refs) == 1 and refs[0] in mergeable and tokens[str(batch.kind), refs] >= mergeable[refs[0]]
            assert batch.merged is whole
            assert not whole or len(batch.segments) == 1


@given(st.integers(1, 10**9), st.integers(1, 10**7))
def test_a_merged_copy_pays_from_where_it_saves_what_it_costs_so_many_times(weights: int, numbers: int) -> None:
    tokens = merge_tokens_min(weights, numbers)
    mixed, merged = tokens * (weights + ADAPTER_COST * numbers), (MERGE_TOKENS + tokens) * weights
    assert mixed - merged == pytest.approx((MERGE_GAIN_MIN - 1) * MERGE_TOKENS * weights, rel=1e-6)


def test_a_copy_pays_for_fewer_tokens_the_higher_the_rank_and_the_narrower_the_base() -> None:
    def least(width: int, rank: int) -> float:    # of a transformer's layer: four square modules, two of four times the width
        return merge_tokens_min(12 * width**2, rank * (4 * 2 * width + 2 * 5 * width))

    assert least(384, 8) / 16 == pytest.approx(256, rel=0.1)     # MiniLM's rows of 16 tokens: where measuring put it
    assert least(384, 32) == pytest.approx(least(384, 8) / 4) and least(4096, 8) == pytest.approx(least(384, 8) * 4096 / 384)


@given(st.lists(st.tuples(sets, st.integers(0, 2)), max_size=40))
def test_rows_of_one_form_stand_together_between_the_bases_and_those_of_several(found: list[tuple[tuple[AdapterRef, ...], int]]) -> None:
    forms = {refs: (2**form,) for refs, form in found if len(refs) == 1}
    [*batches] = plan_batches([Row(refs, "hidden", 1, forms.get(refs, ())) for refs, _ in found], slots_max=9).batches
    for batch in batches:
        order = [(len(segment.adapters) > 1, forms.get(segment.adapters, ())) for segment in batch.segments]
        assert order == sorted(order)


@given(rows_of, st.integers(1, 9), st.integers(1, 30), st.integers(1, 9))
def test_loads_are_forecast_as_a_list_of_the_last_used_counts_them(rows: list[Row], slots_max: int, bytes_max: int, rows_max: int) -> None:
    rows = [row for row in rows if len(row.adapters) <= slots_max]
    sizes = {ref: place + 1 for place, ref in enumerate(REFS)}
    plan = plan_batches(rows, slots_max=slots_max, bytes_max=bytes_max, rows_max=rows_max, sizes=sizes)
    used: list[AdapterRef] = []    # least recently first
    loads = []
    for batch in plan.batches:
        absent = [ref for ref in batch.adapters if ref not in used]
        kept = [ref for ref in used if ref not in batch.adapters]
        while kept and absent and (
            len(kept) + len(batch.adapters) > slots_max or sum(sizes[ref] for ref in [*kept, *batch.adapters]) > bytes_max
        ):
            del kept[0]
        used = [*kept, *batch.adapters]
        loads += absent
    found = forecast(plan, sizes, slots_max=slots_max, bytes_max=bytes_max)
    assert (found.loads, found.adapters, found.bytes) == (len(loads), len(set(loads)), sum(sizes[ref] for ref in set(loads)))
    assert found.fits is (len(set(loads)) < 2 or (len(set(loads)) <= slots_max and found.bytes <= bytes_max))
    assert found.extra_ms(2.0) == (0 if found.fits else 2 * found.loads) and not (found.fits and found.repeats)


queued = st.lists(sets, min_size=1, max_size=30)
SIZES = {ref: place + 1 for place, ref in enumerate(REFS[:6])}    # those of the others are not known


@given(queued, st.integers(1, 6), st.integers(1, 20), st.integers(1, 6))
def test_the_next_batch_is_the_oldest_and_in_order_what_fits_beside_it(waiting: list[Refs], slots_max: int, bytes_max: int, rows_max: int) -> None:
    chosen = next_batch(waiting, SIZES, slots_max=slots_max, bytes_max=bytes_max, rows_max=rows_max)
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and len(chosen) <= rows_max

    def fit(rows: list[int]) -> bool:
        adapters = {ref for i in rows for ref in waiting[i]}
        return len(adapters) <= slots_max and sum(SIZES.get(ref, 0) for ref in adapters) <= bytes_max

    assert fit(chosen) or {ref for i in chosen for ref in waiting[i]} == {*waiting[0]}    # too large by itself
    for i in range(chosen[-1] if len(chosen) == rows_max else len(waiting)):
        if i not in chosen:
            assert not fit([*(j for j in chosen if j < i), i])


@given(queued, queued, st.integers(1, 6), st.integers(1, 6))
def test_no_request_waits_for_more_batches_than_requests_came_before_it(
    first: list[Refs], later: list[Refs], slots_max: int, rows_max: int
) -> None:
    """Whatever goes on arriving, e.g. rows of one adapter that would fill every batch by themselves."""
    waiting = list(enumerate(first))
    turns = 0
    while left := [place for place, _ in waiting if place < len(first)]:
        assert min(left) >= turns    # each batch answers the oldest
        chosen = next_batch([one for _, one in waiting], SIZES, slots_max=slots_max, bytes_max=20, rows_max=rows_max)
        waiting = [one for i, one in enumerate(waiting) if i not in chosen] + [(len(first), one) for one in later]
        turns += 1
