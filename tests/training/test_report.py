"""Near-duplicates, contradictions and leaks are found, and near-duplicates stay on one side of a split."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.training.data import hold_out, split
from adapter_hub.training.report import SIMILAR, Contradiction, Leak, near_duplicates, normalised, report_of
from adapter_hub.training.tasks import Number, Several, Spans, Writing

LONG = "please tell me how many vacation days i still have left for the rest of this year"
NEARLY = LONG.replace("still ", "")
WORDS = st.lists(st.sampled_from("how many days off do i have in may please tell me the balance of my account now".split()), max_size=12)


def grams(text: str) -> set[str]:
    """The 3-grams that scikit-learn's char_wb counts: within words, each with a space on either side."""
    return {padded[i : i + 3] for word in text.split() for padded in [f" {word} "] for i in range(max(1, len(padded) - 2))}


@pytest.mark.parametrize("other", ["What is  my balance?", "WHAT IS MY BALANCE", "what is my balance…", "what is my ｂａｌａｎｃｅ"])
def test_texts_that_read_the_same_are_one(other: str) -> None:
    assert normalised(other) == "what is my balance"


def test_texts_of_marks_alone_stay_apart() -> None:
    assert near_duplicates(["?!", "…", "?!", "✓"]) == [0, 1, 0, 3]


@given(st.lists(WORDS.map(" ".join), max_size=25))
def test_groups_are_those_of_all_pairs_compared(texts: list[str]) -> None:
    """The slow way: every pair's Jaccard similarity. What MinHash may miss lies so close to the threshold that it is left open here."""
    found = near_duplicates(texts)
    for i, a in enumerate(texts):
        for j, b in enumerate(texts[:i]):
            ours, theirs = grams(normalised(a)), grams(normalised(b))
            alike = len(ours & theirs) / len(ours | theirs) if ours | theirs else float(a == b)
            if alike >= SIMILAR:
                assert found[i] == found[j]
    for i, group in enumerate(found):    # who is in a group is like one of it
        others = [j for j, other in enumerate(found) if other == group and j != i]
        ours = grams(normalised(texts[i]))
        assert not others or any(not ours or len(ours & (g := grams(normalised(texts[j])))) >= SIMILAR * len(ours | g) for j in others)


def test_a_report_names_what_is_wrong_with_the_rows() -> None:
    rows = [Example(LONG, "days"), Example(NEARLY, "days"), Example("Stop!", "no"), Example("stop", "yes"), Example("go on then", "yes")]
    report = report_of(rows, [Example("an unseen text", "days"), Example("Go on, then!", "yes")])
    assert report.contradictions == (Contradiction("Stop!", ("no", "yes")),) and report.contradictions_count == 1
    assert report.leaks == (Leak(5, 2, "Go on, then!"),) and report.leaks_count == 1
    assert (report.rows, report.duplicates) == (5, 1)
    assert report.rows_per_label == (("no", 1), ("days", 2), ("yes", 2)) and report.imbalance == 2


def test_targets_that_are_no_classes_contradict_each_other_and_are_not_rare() -> None:
    rows = [Example("a red fox", str(number)) for number in (1, 1, 2)] + [Example(f"fox {i} of many", "3") for i in range(9)]
    report = report_of(rows, target=Number.shown, classes=False)
    assert report.contradictions == (Contradiction("a red fox", ("1", "2")),) and report.rows_per_label == () and report.imbalance == 1
    assert report.warnings == ("1 text stands with two targets or more, as 'a red fox': '1', '2'",)
    spans = [Example("a red fox", extra={"spans": [{"start": 2, "end": 5, "label": label}]}) for label in ("colour", "colour", "mood")]
    assert report_of(spans, target=Spans.shown, classes=False).contradictions[0].labels == ("red (colour)", "red (mood)")


def test_near_duplicates_stay_on_one_side() -> None:
    endings = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima".split()
    rows = [Example(f"{LONG} {end}{mark}", label) for end in endings for mark in ("", "!") for label in ("a",)]
    rows += [Example(f"where is {end} street {mark}", "b") for end in endings for mark in ("", "?")]
    sides = [{normalised(row.text) for row in part} for part in split(rows, None, 0.2, 3)]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_a_label_whose_rows_are_all_alike_is_still_held_out_of_but_not_word_for_word() -> None:
    rows = [Example(f"{LONG} {number}", label) for label in "ab" for number in range(8) for _ in range(2)]
    train, held_out = hold_out([Example(row.text + row.label, row.label) for row in rows], 0.25, 0)  # type: ignore[operator]
    assert held_out and {row.label for row in train} == {"a", "b"}
    assert not {row.text for row in train} & {row.text for row in held_out}


def test_one_text_repeated_cannot_be_held_out() -> None:
    with pytest.raises(InvalidInput, match="every label has one text, repeated"):
        hold_out([Example("yes", "a"), Example("Yes!", "a"), Example("no", "b"), Example("no.", "b")], 0.5, 0)


def test_held_out_rows_that_nearly_repeat_what_is_trained_on_are_counted() -> None:
    rows = [Example(f"{LONG} {number}", label) for label in "ab" for number in range(20)]
    apart = [Example("a red fox", "a"), Example("no snow in june", "b")]
    train = split([*rows, *apart], apart, 0.1, 0).train
    assert report_of(train).held_out_alike == 0
    parts = split(rows, None, 0.1, 0)
    report = report_of(rows, train=parts.train)
    assert (report.held_out, report.held_out_alike) == (8, 8)
    assert "8 of the 8 rows held out are near-duplicates of rows that are trained on, and what is measured by that flatters" in report.warnings[-1]
    assert report_of([*rows, *apart], train=rows).held_out_alike == 0


def test_conversations_are_alike_by_all_that_goes_before_the_answer() -> None:
    rows = []
    for question, answer in ((LONG, "nine"), ("stop", "ok")):
        said = ("user", question), ("assistant", "sure?"), ("user", "yes"), ("assistant", answer)
        rows.append(Example("yes", extra={"messages": [{"role": role, "content": words} for role, words in said]}))
    report = report_of(rows[:1], rows[1:], Writing.shown, classes=False)
    assert report.leaks_count == report_of(rows, target=Writing.shown, classes=False).contradictions_count == 0


def test_rows_that_are_not_trained_on_are_said_where_they_are_many() -> None:
    rows = [Example(f"{word} {number}", word) for word in ("red", "blue") for number in ("one", "two", "three")]
    report = report_of(rows)
    assert replace(report, held_out=1).warnings == ()
    [warning] = replace(report, held_out=4).warnings
    assert warning.startswith("4 of 6 rows are held out to choose the epoch and to measure it: with validation rows of your own")


def test_validation_rows_that_are_a_handful_are_said_with_what_rests_on_them() -> None:
    report = report_of([Example(f"{word} {number}", word) for word in ("red", "blue") for number in ("one", "two", "three")])
    assert replace(report, choosing=5, measuring=5).warnings == ()
    assert replace(report, choosing=4, measuring=5).warnings == (
        "the choice of the epoch and its figures rest on 9 validation rows: so few tell little, give more",
    )
    one = replace(report, leaks_count=1, leaks=(Leak(3, 1, "red"),), held_out_alike=1, held_out=1)
    assert one.warnings[0].startswith("1 validation row stands in training too, or nearly, as row 1, row 3 of training")
    assert one.warnings[1].startswith("1 of the 1 row held out is a near-duplicate of rows that are trained on")    # previously "1 rows"
    assert replace(report, measuring=1).warnings == ("its figures rest on 1 validation row: so few tell little, give more",)


def test_labels_that_differ_in_case_or_outer_blanks_are_told_and_stay_apart() -> None:
    """Previously they were two classes without a word."""
    labels = ["yes", "yes ", "YES", "no", "no"]
    report = report_of([Example(f"{word} text", label) for word, label in zip(("red", "blue", "green", "old", "new"), labels, strict=True)])
    assert (report.alike_labels_count, report.alike_labels) == (1, (("YES", "yes", "yes "),)) and len(report.rows_per_label) == 4
    assert report.warnings == ("the labels 'YES' and 'yes' and 'yes ' differ in case or outer blanks alone: each is learned as a label of its own",)
    several = [Example("a red fox", extra={"labels": ["fox", "red"]}), Example("a dog", extra={"labels": ["Red", "FOX"]})]
    report = report_of(several, target=Several.shown, classes=False, named=Several.named)
    assert report.alike_labels == (("FOX", "fox"), ("Red", "red")) and "'FOX' and 'fox' differ" in report.warnings[-1]
    assert "(and 1 more such sets)" in report.warnings[-1]
    assert report_of([Example("a", "c"), Example("b", "c++")]).alike_labels == ()


def test_labels_that_no_validation_row_has_are_told() -> None:
    rows = [Example(f"{word} number {number}", word) for word in ("red", "blue", "green") for number in range(9)]
    report = report_of(rows, [Example("a blue one", "blue"), Example("a red one", "red")])
    assert (report.unvalidated_count, report.unvalidated, report.validation_label) == (1, ("green",), None)
    assert report.warnings == ("1 label that training has no validation row has, and nothing measures: 'green'",)
    [warning] = report_of(rows, [Example("a blue one", "blue")]).warnings
    assert warning == "all validation rows have the label 'blue': how the others are told from it is not measured"
    assert report_of(rows).warnings == report_of(rows, [Example(f"a {word} one", word) for word in ("red", "blue", "green")]).warnings == ()
    many = [Example(f"row {number} of many", f"l{number}") for number in range(30)]
    report = report_of(many, many[:2])
    assert report.unvalidated_count == 28 and len(report.unvalidated) == 20
    assert any(said.endswith("'l10', 'l11', 'l12', 'l13', 'l14', …") for said in report.warnings)
    assert report.beside((), given=False).unvalidated == () and report.beside((), given=True) == report
    spans = [Example("a red fox", extra={"spans": [{"start": 2, "end": 5, "label": label}]}) for label in ("colour", "mood")]
    assert report_of(spans, spans[:1], Spans.shown, classes=False, named=Spans.named).unvalidated == ("mood",)


def test_labels_that_are_numbers_and_mostly_differ_are_pointed_to_a_regression() -> None:
    """Previously each number became a class."""
    prices = [Example(f"house {number} in {word} street", str(100.5 + number)) for number, word in enumerate("red blue green old new".split())]
    rows = [*prices, Example("one more house", "100.5")]
    [warning] = report_of(rows).warnings
    assert warning.startswith('the 5 labels are numbers, and most of them of one row: problem_type="regression" (`--problem-type regression`)')
    stars = [Example(f"{number} text of many", str(number % 5)) for number in range(20)]
    assert report_of(stars).warnings == report_of([*rows, Example("so to say", "none")]).warnings == ()


def test_a_validation_row_that_contradicts_a_training_row_is_one_and_a_leak() -> None:
    rows = [Example("stop it", "no"), Example("go on", "yes")]
    report = report_of(rows, [Example("Stop it!", "yes")])
    assert report.contradictions == (Contradiction("stop it", ("no", "yes")),) and report.leaks_count == 1


def test_labels_that_weigh_alike_are_not_said_to_be_rare() -> None:
    report = report_of([*(Example(f"text {i}", "many") for i in range(40)), Example("one", "few")])
    assert any("class_weights=True" in said for said in report.warnings)
    assert not any("class_weights" in said for said in replace(report, weighed=True).warnings)
