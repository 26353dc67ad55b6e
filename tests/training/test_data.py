"""Rows are checked with their position; what is held out depends on the seed and the task alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
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


def test_a_new_label_does_not_reshuffle_what_is_held_out_of_the_others() -> None:
    _, before = hold_out(rows_of({"a": 20, "b": 20}), 0.2, 5)
    _, after = hold_out(rows_of({"a": 20, "b": 20, "c": 20}), 0.2, 5)
    assert before == [row for row in after if row.label != "c"]


def test_the_share_is_taken_of_each_label() -> None:
    _, held_out = hold_out(rows_of({"a": 100, "b": 20, "c": 4}), 0.1, 0)
    assert [sum(row.label == label for row in held_out) for label in "abc"] == [10, 2, 1]


def worded(seed: int) -> str:
    return " ".join(f"{random.Random(seed + 0.01 * place).randrange(36**5):x}" for place in range(12))


def apart(counts: dict[str, int]) -> list[Example]:
    """So many rows of each label, no two alike."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Example(worded(number), label) for number, label in enumerate(labels)]


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
