"""The gate: what the table in its docstring says, by counts alone; its bootstrap agrees with one that draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_hub.continual.gate import Evidence, GatePolicy, Paired, Routed, Verdict, chance_of_no_loss, is_worse, judge

POLICY = GatePolicy()
counts = st.integers(0, 60).flatmap(lambda n: st.integers(0, n).flatmap(lambda g: st.tuples(st.just(n), st.just(g), st.integers(0, n - g))))
answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
gravity = list(Verdict).index


def pairs(rows: int, gained: int = 0, lost: int = 0, reference: str = "skill@1") -> Paired:
    """Of `rows`, all right but those that one of the two alone has right."""
    same = rows - gained - lost
    return Paired(reference, (True,) * (same + gained) + (False,) * lost, (True,) * same + (False,) * gained + (True,) * lost)


def evidence(*, rows: int = 100, gained: int = 0, lost: int = 0, **more: object) -> Evidence:
    return replace(Evidence(pairs(rows, gained, lost), probed=False), **more)  # type: ignore[arg-type]


# ---- the bootstrap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "gained", "lost"), [(10, 1, 4), (100, 3, 9), (1000, 5, 15), (50, 0, 0), (7, 0, 7)])
def test_the_share_is_what_drawing_many_samples_comes_to(rows: int, gained: int, lost: int) -> None:
    differences = np.array([1] * (gained + 1) + [-1] * (lost + 1) + [0] * (rows - gained - lost))
    drawn = np.random.default_rng(0).choice(differences, (20_000, len(differences))).sum(axis=1)
    assert chance_of_no_loss(rows, gained, lost) == pytest.approx((drawn >= 0).mean(), abs=0.015)


@given(counts)
def test_candidate_and_reference_may_change_places(found: tuple[int, int, int]) -> None:
    rows, gained, lost = found
    ties = chance_of_no_loss(rows, gained, lost) + chance_of_no_loss(rows, lost, gained) - 1    # samples without a difference count for both
    assert -1e-8 <= ties <= 1
    assert not (is_worse(rows, gained, lost, 0.5) and is_worse(rows, lost, gained, 0.5))


@given(counts)
def test_a_row_more_that_is_right_never_makes_a_loss_more_likely(found: tuple[int, int, int]) -> None:
    rows, gained, lost = found
    now = chance_of_no_loss(rows, gained, lost)
    if lost:
        assert chance_of_no_loss(rows, gained, lost - 1) >= now - 1e-8
    if rows > gained + lost:
        assert chance_of_no_loss(rows, gained + 1, lost) >= now - 1e-8


def test_five_rows_of_one_mind_are_the_fewest_that_tell() -> None:
    assert [is_worse(rows, 0, rows, 0.05) for rows in range(7)] == [False] * 5 + [True] * 2
    assert not is_worse(1_000_000, 0, 4, 0.05) and is_worse(1_000_000, 0, 6, 0.05)


# ---- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict", "says"),
    [
        (evidence(gained=10), Verdict.PROMOTE, "validation accuracy 1.000, skill@1 0.900: better on 100 rows"),
        (evidence(), Verdict.PROMOTE, "not to be told apart on 100 rows"),
        (evidence(lost=2), Verdict.PROMOTE, "not to be told apart on 100 rows, 0 of them better, 2 worse"),
        (evidence(lost=20), Verdict.HOLD, "worse on 20 of 100 rows, better on 0"),
        (evidence(lost=20, probed=True), Verdict.REJECT, "worse on 20 of 100 rows"),
        (evidence(rows=1, lost=1), Verdict.PROMOTE, "not to be told apart on 1 rows"),
        (evidence(rows=0), Verdict.PROMOTE, "no row was left to judge it on"),
        (evidence(lost=50, commonest_right=50), Verdict.REJECT, "0.500 is not above always answering the commonest label (0.500)"),
        (evidence(faults=("its scores are not finite",)), Verdict.REJECT, "; but its scores are not finite"),
        (evidence(slices={"old inputs": pairs(100, lost=10)}), Verdict.HOLD, "; but of 100 old inputs it answers 10 wrongly that skill@1 has right"),
        (evidence(slices={"old inputs": pairs(100, gained=8, lost=10)}), Verdict.PROMOTE, "not to be told apart"),
        (evidence(slices={"old inputs": pairs(1000, lost=19)}), Verdict.PROMOTE, "not to be told apart"),    # within the margin
        (evidence(slices={"old inputs": pairs(0)}), Verdict.PROMOTE, "not to be told apart"),
        (evidence(lost_labels=("a", "b")), Verdict.HOLD, "it no longer knows 2 of the labels in production ('a', 'b')"),
        (evidence(routed=(Routed("other@1", 200, 0, 20, 0.1),)), Verdict.HOLD, "of 200 inputs of other@1 20 would no longer reach it"),
        (evidence(routed=(Routed("other@1", 200, 0, 3, 0.015),)), Verdict.PROMOTE, "not to be told apart"),
        (evidence(routed=(Routed("other@1", 200, 30, 20, 0.1),)), Verdict.PROMOTE, "not to be told apart"),    # more reach it than before
        (evidence(routed=(Routed("one@1", 0, 0, 0, 0.0),)), Verdict.PROMOTE, "not to be told apart"),
        (evidence(lost=20, faults=("it is broken",)), Verdict.REJECT, "worse on 20 of 100 rows, better on 0; but it is broken"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_table_and_says_why(found: Evidence, verdict: Verdict, says: str) -> None:
    report = judge(found, POLICY)
    assert report.verdict is verdict and says in report.reason
    assert judge(found, POLICY) == report and report.to_json()["verdict"] == str(verdict)


def test_many_adapters_that_each_lose_an_input_by_chance_hold_nobody_up_and_all_that_lose_some_do() -> None:
    assert judge(evidence(routed=tuple(Routed(f"a{i}@1", 20, 0, int(i < 4), 0.05 * (i < 4)) for i in range(50))), POLICY).verdict is Verdict.PROMOTE
    report = judge(evidence(routed=tuple(Routed(f"a{i}@1", 20, 0, 1, 0.05) for i in range(50))), POLICY)
    assert report.verdict is Verdict.HOLD and "of 1000 inputs of all other adapters 50 would no longer reach theirs" in report.reason


def test_max_taken_is_held_to_without_a_bootstrap_and_forbids_what_always_asks_for() -> None:
    found = evidence(routed=(Routed("other@1", 8, 0, 1, 0.125),))
    assert judge(found, POLICY).verdict is Verdict.PROMOTE and judge(found, POLICY).forbidden == ""
    report = judge(found, GatePolicy(max_taken=0.1))
    assert report.verdict is Verdict.HOLD and report.forbidden == "it would take 12.5 % of the inputs of other@1, hub.toml allows 10.0 %"
    assert judge(evidence(lost=20), POLICY).forbidden == ""


@settings(max_examples=200)
@given(answers, answers, st.booleans(), st.data())
def test_one_more_right_answer_never_makes_the_verdict_graver(
    rows: list[tuple[bool, bool]], old: list[tuple[bool, bool]], probed: bool, data: st.DataObject
) -> None:
    def found(rows: list[tuple[bool, bool]], old: list[tuple[bool, bool]]) -> Evidence:
        asked, slice_ = (Paired("skill@1", *zip(*part, strict=True)) for part in (rows, old))    # type: ignore[misc]
        return Evidence(asked, commonest_right=len(rows) // 2, probed=probed, slices={"old inputs": slice_})

    before = judge(found(rows, old), POLICY).verdict
    better = [list(rows), list(old)]
    part = better[data.draw(st.integers(0, 1))]
    place = data.draw(st.integers(0, len(part) - 1))
    part[place] = (True, part[place][1])
    assert gravity(judge(found(*better), POLICY).verdict) <= gravity(before)


def test_answers_to_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 rows of the candidate stand beside 1 of skill@1"):
        Paired("skill@1", (True, True), (True,))
