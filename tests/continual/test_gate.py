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


def constant(rows: int, commonest: int, right: int) -> Evidence:
    """Of a first version that has `right` of `rows` right, `commonest` of which have the commonest label; a probe that answers as it does."""
    mine = (True,) * right + (False,) * (rows - right)
    always = Paired("always answering the commonest label", mine, (True,) * commonest + (False,) * (rows - commonest))
    return Evidence(Paired("a linear probe of the encoder", mine, mine), baseline=always)


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
        (evidence(rows=1, lost=1), Verdict.PROMOTE, "not to be told apart on 1 row, 0 of them better, 1 worse"),
        (evidence(rows=0), Verdict.PROMOTE, "no row was left to judge it on"),
        (constant(100, 50, 50), Verdict.REJECT, "0.500 is not above always answering the commonest label (0.500)"),
        (constant(100, 50, 51), Verdict.PROMOTE, "0.510, a linear probe of the encoder 0.510: not to be told apart on 100 rows"),
        (constant(2, 1, 0), Verdict.PROMOTE, "2 rows are too few to tell whether it is of more use than always answering the commonest"),
        (constant(9, 5, 5), Verdict.PROMOTE, "9 rows are too few to tell"),
        (constant(10, 5, 5), Verdict.REJECT, "0.500 is not above"),
        (constant(100, 97, 97), Verdict.PROMOTE, "100 rows are too few to tell"),    # three rows could be won
        (constant(100, 97, 90), Verdict.REJECT, "0.900 is not above always answering the commonest label (0.970)"),    # it is told to be worse
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


@pytest.mark.parametrize("others", [0, 1, 30, 1000])
def test_adapters_that_a_newcomer_does_not_touch_do_not_let_it_take_more_from_one(others: int) -> None:
    """Previously a twin beside 30 others was promoted that took 8 of 12 inputs: each adapter had its part of the level, touched or not."""
    untouched = tuple(Routed(f"a{i}@1", 200, 0, int(i < 4), 0.0) for i in range(others))
    report = judge(evidence(routed=(Routed("twin@1", 12, 0, 6, 0.5), *untouched)), POLICY)
    assert report.verdict is Verdict.HOLD and "of 12 inputs of twin@1 6 would no longer reach it" in report.reason


def test_of_adapters_that_all_change_by_chance_few_are_called_harmed() -> None:
    draws, held = np.random.default_rng(0), 0
    for _ in range(200):
        changed = draws.integers(0, 13, size=20)
        lost = draws.binomial(changed, 0.5)
        routed = tuple(Routed(f"a{i}@1", 40, int(c - n), int(n), 0.0) for i, (c, n) in enumerate(zip(changed, lost, strict=True)))
        found = judge(evidence(routed=routed), GatePolicy(routed_margin=0.0))
        held += any(one.check.startswith("routing of") for one in found.findings)
    assert held / 200 <= POLICY.level


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
        always = Paired("always", asked.candidate_right, tuple(place % 2 == 0 for place, _ in enumerate(rows)))
        return Evidence(asked, baseline=always, probed=probed, slices={"old inputs": slice_})

    before = judge(found(rows, old), POLICY).verdict
    better = [list(rows), list(old)]
    part = better[data.draw(st.integers(0, 1))]
    place = data.draw(st.integers(0, len(part) - 1))
    part[place] = (True, part[place][1])
    assert gravity(judge(found(*better), POLICY).verdict) <= gravity(before)


def test_no_first_version_is_rejected_or_promoted_by_a_single_row_where_rows_are_few() -> None:
    """Previously one row of two decided: right on it, it went live, and wrong it was of no use."""
    for rows, commonest in ((1, 1), (2, 1), (3, 2), (4, 3), (6, 5), (8, 4)):
        assert {judge(constant(rows, commonest, right), POLICY).verdict for right in range(max(0, commonest - 2), rows + 1)} == {Verdict.PROMOTE}
    for found in (constant(2, 1, 1), constant(2, 1, 2)):
        assert ("too few to tell" in judge(found, POLICY).reason) == (sum(found.validation.candidate_right) == 1)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_rows_are_enough_where_one_that_wins_all_that_can_be_won_would_be_told_to_be_better(level: float) -> None:
    for rows in range(1, 30):
        for commonest in range(1, rows + 1):
            equal = constant(rows, commonest, commonest)
            rejected = judge(equal, GatePolicy(level=level)).verdict is Verdict.REJECT
            assert rejected == is_worse(rows, 0, rows - commonest, level)


def test_answers_to_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="2 rows of the candidate stand beside 1 of skill@1"):
        Paired("skill@1", (True, True), (True,))
