"""Plans are pure: every row once, limits kept, and nothing but the request decides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.engine.plan import Row, missing, plan_batches
from adapter_hub.refs import AdapterRef

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


@given(st.lists(st.sampled_from(REFS), unique=True), st.lists(st.sampled_from(REFS), unique=True), st.integers(1, 9))
def test_only_what_must_go_is_evicted(wanted: list[AdapterRef], resident: list[AdapterRef], slots_max: int) -> None:
    loads, evicted = missing(wanted, resident, slots_max)
    after = [ref for ref in resident if ref not in evicted] + loads
    assert set(wanted) <= set(after) and not set(evicted) & set(wanted)
    if len(wanted) <= slots_max and len(resident) <= slots_max:
        assert len(after) <= slots_max
        assert not evicted or len(after) == slots_max
    assert evicted == [ref for ref in resident if ref not in wanted][: len(evicted)]    # least recently used first
