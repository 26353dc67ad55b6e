"""Rows are checked with their position; what is held out depends on the seed and the task alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.data import check_held_out, check_task, hold_out, split, task_seed
from adapter_hub.training.report import near_duplicates

GOOD = [Example("a sharp saw", "tool"), Example("a ripe pear", "fruit")]


def rows_of(counts: dict[str, int]) -> list[Example]:
    return [Example(f"{label} number {i}", label) for label, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "0 training rows are too few"),
        (GOOD[:1], "1 training row is too few"),
        ([*GOOD, Example("   ", "tool")], "training row 3 has a text that is empty"),
        ([GOOD[0], Example("a ripe fig"), GOOD[1]], "training row 2 has no label"),
        ([*GOOD, Example("a ripe fig", " ")], "training row 3 has no label"),
        ([GOOD[0]] * 3, "all 3 training rows have the label 'tool'"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused_with_their_position(rows: list[Example], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_task(rows, None)


@pytest.mark.parametrize(
    ("validation", "says"),
    [
        ([], "the validation rows are empty"),
        ([GOOD[0], Example("a red car", "vehicle")], "validation row 2 has the label 'vehicle', which no training row has"),
        ([GOOD[0], Example("a red car")], "validation row 2 has no label"),
        ([Example("", "tool")], "validation row 1 has a text that is empty"),
    ],
)
def test_validation_rows_that_cannot_be_measured_are_refused_with_their_position(validation: list[Example], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_task(GOOD, validation)


def test_labels_that_seem_numbers_are_pointed_to_a_regression_where_they_cannot_be_classes() -> None:
    prices = [Example(f"house {number}", str(100.5 + number)) for number in range(6)]
    for check in (check_held_out, lambda rows: check_task(rows[:5], rows[5:])):
        with pytest.raises(InvalidInput, match=r"Or are the labels numbers\? problem_type=\"regression\" \(`--problem-type regression`\)"):
            check(prices)
    with pytest.raises(InvalidInput) as caught:
        check_held_out([Example(f"house {number}", f"street {number}") for number in range(6)])
    assert str(caught.value.hint) == "Give validation rows, or more training rows."


def test_labels_are_in_one_order_whatever_the_order_of_the_rows() -> None:
    assert check_task(GOOD, None) == check_task(GOOD[::-1], None) == ("fruit", "tool")


def test_the_seed_knows_the_task_and_its_labels() -> None:
    seeds = {task_seed(0, "a", ("x", "y")), task_seed(1, "a", ("x", "y")), task_seed(0, "b", ("x", "y")), task_seed(0, "a", ("x", "z"))}
    assert len(seeds) == 4
    assert task_seed(0, "a", ("x", "y")) == 1_221_901_108


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=2), st.floats(0.05, 0.5), st.integers(0, 2**31 - 1))
def test_holding_out_splits_the_rows_and_leaves_every_label_to_train_on(counts: dict[str, int], share: float, seed: int) -> None:
    rows = rows_of(counts)
    if max(counts.values()) < 2:
        with pytest.raises(InvalidInput, match="every label has one row"):
            hold_out(rows, share, seed)
        return
    train, held_out = hold_out(rows, share, seed)
    assert sorted(row.text for row in [*train, *held_out]) == sorted(row.text for row in rows)
    assert {row.label for row in train} == set(counts)
    assert held_out
    assert (train, held_out) == hold_out(rows, share, seed)


def test_the_share_is_taken_of_each_label() -> None:
    _, held_out = hold_out(rows_of({"a": 100, "b": 20, "c": 4}), 0.1, 0)
    assert [sum(row.label == label for row in held_out) for label in "abc"] == [10, 2, 1]


@cache
def worded(seed: int) -> str:
    return " ".join(f"{random.Random(seed + 0.01 * place).randrange(36**5):x}" for place in range(12))


def apart(counts: dict[str, int]) -> list[Example]:
    """So many rows of each label, no two alike."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Example(worded(number), label) for number, label in enumerate(labels)]


def grouped(*groups: str) -> list[Example]:
    """One row for each letter, its label; the rows of one group are near-duplicates of each other, and read otherwise."""
    return [Example(f"{worded(10_000 + number)} {place}", label) for number, group in enumerate(groups) for place, label in enumerate(group)]


def held_by_label(rows: list[Example], share: float = 0.1, seed: int = 0) -> Counter[str | None]:
    return Counter(row.label for row in hold_out(rows, share, seed)[1])


def held_of_each_size(counts: Sequence[int], share: float) -> dict[int, int]:
    """How many rows are held out of all labels of so many rows, no two of which are alike, by the rules in words.

    Each label's share is rounded, is one row at least, and leaves one. All together may be the rounded share of all rows, or what the labels add up
    to whose share is a row or more; labels of fewer than 4 rows, unless there are no others, keep to that, and others may go 10 rows, or as much
    again, beyond. Labels of many rows come first.
    """
    wanted = {count: min(count - 1, max(1, math.floor(count * share + 0.5))) for count in counts}
    shares = sum(wanted[count] for count in counts if count * share >= 1)
    total, found = max(1, math.floor(sum(counts) * share + 0.5), shares), dict[int, int]()
    for count in sorted(set(counts), reverse=True):
        room = total if count < 4 and count < max(counts) else total + min(total, 10)
        found[count] = min(wanted[count] * counts.count(count), room - sum(found.values()))
        found[count] = max(found[count], 0)
    return found


@given(st.lists(st.integers(1, 24), min_size=2, max_size=20), st.sampled_from([0.05, 0.1, 0.2, 0.5, 0.9]), st.integers(0, 99))
@example([10] * 40 + [15] * 40, 0.1, 0)    # shares of exactly one row count, and are what all may be
@example([3] * 20 + [4] * 20, 0.1, 0)
@example([40, 3, 3, 4, 5], 0.1, 0)
@example([4] * 5, 0.1, 0)
@example([2, 2], 0.1, 0)
def test_of_rows_that_are_not_alike_each_label_has_its_rounded_share_held_out(counts: list[int], share: float, seed: int) -> None:
    assume(max(counts) > 1)
    rows = apart({f"l{number}": count for number, count in enumerate(counts)})
    held = held_by_label(rows, share, seed)
    found = {count: sum(held[f"l{number}"] for number, other in enumerate(counts) if other == count) for count in counts}
    assert found == held_of_each_size(counts, share)


GROUPS = st.lists(st.text("aaabbc", min_size=1, max_size=7), min_size=1, max_size=14)


@given(GROUPS, st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.integers(0, 99), st.randoms())
@example(["aa", "b" * 20], 0.1, 0, random.Random(0))
@example(["ab", "b" * 20], 0.1, 0, random.Random(0))
@example(["ab", "ab", "cb", "ca"], 0.5, 0, random.Random(0))
def test_rows_are_parted_in_their_order_and_near_duplicates_stay_on_one_side(
    groups: list[str], share: float, seed: int, shuffled: random.Random
) -> None:
    rows = [replace(row, id=place) for place, row in enumerate(grouped(*groups))]
    counts = Counter(row.label for row in rows)
    assume(max(counts.values()) > 1)
    shuffled.shuffle(rows)
    train, held = hold_out(rows, share, seed)
    out = {row.id for row in held}
    assert held and [row for row in rows if row.id in out] == held and [row for row in rows if row.id not in out] == train
    assert {row.label for row in train} == set(counts)    # each label keeps a row
    rounded = {count: min(count - 1, max(1, math.floor(count * share + 0.5))) for count in counts.values()}
    total = max(1, math.floor(len(rows) * share + 0.5), sum(rounded[count] for count in counts.values() if count * share >= 1))
    assert len(held) <= total + min(total, 10)
    leader = near_duplicates([row.text for row in rows])
    taken = [Counter(row.label for row, other in zip(rows, leader, strict=True) if other == group) for group in set(leader)]
    free = [one for one in taken if one.total() <= total + min(total, 10) and all(one[label] < counts[label] for label in one)]
    sides = {(group, row.id in out) for group, row in zip(leader, rows, strict=True)}
    if free:    # a group that leaves every label a row, and is not too large
        assert len(sides) == len(set(leader))


@given(st.lists(st.integers(10, 30), min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_labels_that_are_added_do_not_reshuffle_what_is_held_out_of_the_others(counts: list[int], seed: int, first: bool) -> None:
    rows = apart({"a": 20, "b": 30} | {f"l{number}": count for number, count in enumerate(counts)})
    rows, others = rows[:50], rows[50:]
    both = [*others, *rows] if first else [*rows, *others]
    assert hold_out(rows, 0.1, seed)[1] == [row for row in hold_out(both, 0.1, seed)[1] if row.label in ("a", "b")]


def test_each_label_draws_for_itself_and_each_seed_otherwise() -> None:
    counts = {f"l{number}": 20 for number in range(8)}
    rows = [replace(row, id=place % 20) for place, row in enumerate(apart(counts))]
    drawn = [tuple(row.id for row in hold_out(rows, 0.1, seed)[1] if row.label == label) for seed in range(3) for label in counts]
    assert len(set(drawn)) > 18    # of 24
    few = {f"l{number:02}": 3 for number in range(40)}    # of which some keep all rows: by lot, not by name
    assert len({frozenset(held_by_label(apart(few), seed=seed)) for seed in range(5)}) == 5


def test_a_group_counts_once_however_often_it_is_drawn() -> None:
    assert held_by_label(grouped(*["aa"] * 40, *"b" * 80), share=0.5) == {"a": 40, "b": 40}


def test_a_group_may_go_that_is_a_fifth_larger_than_what_is_wanted_of_its_label() -> None:
    five = {held_by_label(grouped(*["a" * 6] * 8, "a", "a", *"b" * 50), seed=seed)["a"] for seed in range(6)}
    assert max(five) == 6    # 5 are wanted of 50
    four = {held_by_label(grouped(*["a" * 5] * 7, *"a" * 5, *"b" * 40), seed=seed)["a"] for seed in range(6)}
    assert four == {3}    # 4 are wanted of 40, groups of 5 are too large, and of the 5 others training keeps some


def test_where_all_groups_of_a_label_are_larger_one_of_twice_what_is_wanted_may_go() -> None:
    assert held_by_label(grouped("a" * 10, "a" * 42, *"b" * 50)) == {"a": 10, "b": 5}    # 5 are wanted of each
    assert held_by_label(grouped("a" * 11, "a" * 41, *"b" * 50)) == {"b": 5}
    assert held_by_label(grouped(*["a" * 7] * 7, *["b" * 7] * 7)) == {"a": 7, "b": 7}
    assert held_by_label(grouped(*["a" * 4] * 3, "a" * 38, *"b" * 50)) == {"a": 4, "b": 5}    # it has one already: no more for the sake of the share


def test_training_keeps_half_of_what_is_not_in_groups_too_large_or_the_share() -> None:
    counts = (1, 4, 5, 8)
    assert [held_by_label(grouped("a" * (50 - loose), *"a" * loose, *"b" * 50))["a"] for loose in counts] == [1, 2, 3, 4]
    assert held_by_label(grouped("a" * 42, "a" * 6, "a", "a", *"b" * 50))["a"] == 2    # 8 might go, of which a group of 6 is more than half
    assert held_by_label(grouped("a" * 145, *"a" * 5, *"b" * 50), share=0.8)["a"] == 4


def test_where_no_group_is_small_enough_the_smallest_goes_unless_it_is_larger_than_what_may_go() -> None:
    for sizes in ((13, 12, 11), (11, 12, 13)):
        assert sum(held_by_label(grouped(*("a" * size for size in sizes), *("b" * size for size in sizes))).values()) == 11
    assert sum(held_by_label(grouped("a" * 12, "a" * 13, "b" * 12, "b" * 13)).values()) == 12    # 6 are wanted: 12 may go
    assert held_by_label(grouped("a" * 13, "a" * 14, "b" * 13, "b" * 14)) == {"a": 3, "b": 3}    # single texts: all groups are too large
    words = [[worded(2 * number), worded(2 * number + 1)] for number in range(2)]
    train, held = hold_out([Example(text, label) for label, two in zip("ab", words, strict=True) for text in two for _ in range(30)], 0.1, 0)
    assert len(held) == 30 and len({row.text for row in held}) == 1 and len(train) == 90    # equal texts stay together, however many


def test_of_labels_with_few_rows_no_more_is_held_out_than_the_share_and_a_little() -> None:
    few = {f"label {number}": 3 for number in range(400)}
    for rows in (apart(few), rows_of(few)):    # those of `rows_of` are all near-duplicates
        parts = split(rows, None, 0.1, 0)
        assert [len(part) for part in parts] == [953, 117, 130]    # asked for were 972, 108, 120
        assert len({row.label for row in parts.train}) == 400
    held_out = [hold_out(apart({"most": most} | few), 0.1, 0)[1] for most in (4, 40)]    # not the four alone are measured, and all of few keep two
    assert [Counter(row.label for row in one)["most"] for one in held_out] == [1, 4] and [len(one) for one in held_out] == [120, 124]
    assert max(Counter(row.label for row in held_out[0]).values()) == 1


def alike(labels: int, rows: int, together: int) -> list[Example]:
    """Of `together` labels one row each are near-duplicates: they differ in their last letter."""
    return [Example(f"{worded(label // together * rows + row)} {label % together}", f"l{label}") for label in range(labels) for row in range(rows)]


@pytest.mark.parametrize(("labels", "rows", "together"), [(100, 3, 5), (100, 4, 5), (2, 100, 2), (40, 20, 20), (12, 10, 3)])
def test_near_duplicates_of_many_labels_stay_on_one_side_and_no_more_than_the_share_goes(labels: int, rows: int, together: int) -> None:
    parts = split(all_rows := alike(labels, rows, together), None, 0.1, 1)
    sides = {row.text: side for side, part in enumerate(parts) for row in part}
    groups = near_duplicates([row.text for row in all_rows])
    assert len(set(groups)) == labels * rows // together
    assert len({(group, sides[row.text]) for group, row in zip(groups, all_rows, strict=True)}) == len(set(groups))
    asked = labels * rows / 10
    assert all(asked * 0.8 <= len(part) <= asked + 10 for part in parts[1:])
    assert len({row.label for row in parts.train}) == labels
    assert parts == split(all_rows, None, 0.1, 1) != split(all_rows, None, 0.1, 2)


def test_a_group_that_is_too_large_is_trained_on_and_half_of_the_others_with_it() -> None:
    rows = [Example(f"{worded(0)} {number}", "ab"[number % 2]) for number in range(90)]
    _, held_out = hold_out([*rows, *(Example(worded(number), "ab"[number % 2]) for number in range(1, 9))], 0.1, 0)
    assert Counter(row.label for row in held_out) == {"a": 2, "b": 2} and not {row.text for row in held_out} & {row.text for row in rows}
    # All of one group: those that read the same stay together, and no more go than the share.
    parts = split(rows, None, 0.1, 0)
    assert [len(part) for part in parts] == [72, 8, 10]


def test_without_validation_each_row_trains_or_chooses_or_measures() -> None:
    rows = rows_of({"a": 20, "b": 20})
    parts = split(rows, None, 0.1, 7)
    assert sorted(row.text for part in parts for row in part) == sorted(row.text for row in rows)
    assert [sum(row.label == label for row in part) for part in parts for label in "ab"] == [16, 16, 2, 2, 2, 2]


def test_given_validation_rows_choose_and_measure_by_halves() -> None:
    rows, validation = rows_of({"a": 20, "b": 20}), rows_of({"a": 6, "b": 4})
    parts = split(rows, validation, 0.1, 7)
    assert parts.train == rows
    assert [sum(row.label == label for row in part) for part in parts[1:] for label in "ab"] == [3, 2, 3, 2]
    assert sorted(row.text for part in parts[1:] for row in part) == sorted(row.text for row in validation)


@pytest.mark.parametrize(("validation", "measured"), [(None, 2), (rows_of({"a": 1, "b": 1}), 2)])
def test_where_rows_are_too_few_to_choose_by_the_training_rows_choose(validation: list[Example] | None, measured: int) -> None:
    parts = split(rows_of({"a": 2, "b": 2}), validation, 0.1, 7)
    assert parts.choice == parts.train and len(parts.validation) == measured
    assert not {id(row) for row in parts.validation} & {id(row) for row in parts.choice}
