"""What is decided over proposals without a hub: which is the same as before, what is labelled how, and who knows the inputs already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adapter_hub.continual.discovery import Cluster
from adapter_hub.continual.proposals import OTHERS_MIN, SURE, Chosen, Encoded, advice, labelled, numbered, shown
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.registry.observations import Feedback, Observation
from adapter_hub.routing.decision import Reason
from adapter_hub.routing.encoder import HashEncoder, Vectors
from adapter_hub.routing.features import extract


def ids(text: str) -> frozenset[str]:
    return frozenset(text)


class Counting(HashEncoder):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        return super().encode(texts)


def test_a_look_encodes_only_what_is_new_and_gives_the_rows_in_their_order() -> None:
    encoder = Counting()
    encoded = Encoded(encoder)
    rows = [Observation(id, None, None, None, Reason.BELOW_THRESHOLD, None, None, f"text {id}") for id in "abcd"]
    for chosen, asked in ((rows[:2], ["text a", "text b"]), ([rows[3], rows[1]], ["text d"]), ([], []), (rows[1:2], ["text b"])):
        encoder.asked.clear()
        found = encoded(chosen)
        assert encoder.asked == asked
        if chosen:
            expected = extract(HashEncoder(), [row.text or "" for row in chosen])
            np.testing.assert_array_equal(found.dense, expected.dense)
            assert (found.lexical != expected.lexical).nnz == 0


# ---- the same as before ---------------------------------------------------------------------------------------------


def test_what_shares_half_of_the_smaller_one_is_the_same_and_the_rest_is_new() -> None:
    before = {"4": ids("abcd"), "7": ids("wxyz")}
    assert numbered([ids("wxy"), ids("abklmnop"), ids("qr")], before, 7) == (["7", "4", "8"], 8)
    assert numbered([ids("aklmnop")], before, 7) == (["8"], 8)


def test_of_two_parts_of_one_the_larger_keeps_its_number_and_of_two_that_merge_the_larger_gives_it() -> None:
    assert numbered([ids("ab"), ids("cdef")], {"1": ids("abcdef")}, 1) == (["2", "1"], 2)
    assert numbered([ids("abcdef")], {"1": ids("ab"), "2": ids("cdef")}, 2) == (["2"], 2)


def test_a_number_is_never_given_twice() -> None:
    assert numbered([ids("ab")], {}, 9) == (["10"], 10)


# ---- names ----------------------------------------------------------------------------------------------------------

ASKED = {f"{i}": text for i, text in enumerate([f"book a flight to {city}" for city in ("rome", "oslo", "lima")] + ["find a cheap hotel"] * 2)}
LOGGED = {id: Observation(id, None, None, None, Reason.BELOW_THRESHOLD, None, None, text) for id, text in ASKED.items()}


def named(suggested: dict[str, str], others: Sequence[str] = (), taken: Sequence[str] = (), own: str = "012") -> tuple[str, str]:
    """What proposal 3 and its group are called."""
    body = {"state": "open", "groups": {"1": [*own]}, "nearest": [], "cohesion": 1.0, "stability": 1.0, "at": "2026-01-01", "suggested": suggested}
    [found] = shown({"3": body}, LOGGED, [*(ASKED[id] for id in own), *others], taken)
    return found.suggested, found.groups[0].suggested


def test_a_name_stays_while_the_inputs_have_its_words_and_nobody_else_has_it() -> None:
    before = {"3": "book_flight", "3.1": "flight_rome"}
    others = ["book a table", "flight tax"] * 20
    assert named({}, others) != ("book_flight", "flight_rome"), "it would be called otherwise now"
    assert named(before, others) == ("book_flight", "flight_rome")
    assert named(before, taken=["book_flight"])[0] not in ("", "book_flight")
    assert named(before, own="12")[1] != "flight_rome" and named(before, own="34")[0] != "book_flight"    # the words have left the log


def test_a_new_proposal_does_not_take_the_name_of_an_older_one() -> None:
    body = {"state": "open", "nearest": [], "cohesion": 1.0, "stability": 1.0, "at": "2026-01-01"}
    older = body | {"groups": {"1": ["2"]}, "suggested": {"7": "flight_book"}}
    found = {one.id: one.suggested for one in shown({"8": body | {"groups": {"1": ["0", "1"]}}, "7": older}, LOGGED, [*ASKED.values()], ())}
    assert found["7"] == "flight_book" != found["8"]


# ---- labels ---------------------------------------------------------------------------------------------------------

GROUPS = {"a": "3.1", "b": "3.1", "c": "3.2", "d": "4.1"}
ROWS = [Example(text, None, f"id{place}", {"group": group}) for place, (text, group) in enumerate(GROUPS.items())]


def given(labels: dict[str, str | None], rows: Sequence[Example] = ROWS) -> dict[str, str | None]:
    return {row.text: row.label for row in labelled(rows, labels)}


def test_the_most_particular_label_counts_and_what_has_none_is_left_out() -> None:
    assert given({"3": "x", "3.2": "y", "b": "z", "id0": None}) == {"b": "z", "c": "y"}
    assert given({"3": "x", "4": "y"}) == {"a": "x", "b": "x", "c": "x", "d": "y"}


def test_what_somebody_said_of_an_answer_is_its_label_until_another_is_given() -> None:
    said = [replace(ROWS[0], label="p"), replace(ROWS[1], label="q"), *ROWS[2:]]
    assert given({}, said) == {"a": "p", "b": "q"} and given({"a": "r"}, said) == {"a": "r", "b": "q"}


def test_labels_that_name_nothing_or_tell_nothing_apart_are_refused() -> None:
    for labels, said in (({"5": "x"}, "'5' is no observation, text or group"), ({"3": "x"}, "1 label is too few"), ({}, "0 labels are too few")):
        with pytest.raises(InvalidInput, match=said):
            labelled(ROWS, labels)


# ---- who knows them already -----------------------------------------------------------------------------------------

OTHERS = [f"other {number}" for number in range(OTHERS_MIN)]


def chosen(count: int = 20, said: Sequence[str] = ()) -> Chosen:
    rows = tuple(
        Observation(
            f"{place}", None, -1.0, None, Reason.BELOW_THRESHOLD, None, None, f"new {place}",
            feedback=Feedback(None, said[place], "2026-01-01") if place < len(said) else None,
        )
        for place in range(count)
    )  # fmt: skip
    return Chosen((rows,), (("near", 0.7), ("far", 0.3)), Cluster((tuple(range(count)),), 0.5, 1.0))


def answers(**sure: tuple[float, float]) -> object:
    """Adapters' probabilities on new inputs and on others."""
    return lambda name, texts: [sure[name][text.startswith("other")] for text in texts] if name in sure else []


@pytest.mark.parametrize(
    ("heads", "teach"),
    [
        ({"near": (0.5, 0.4), "far": (0.9, 0.5)}, "far"),           # however near the router thinks them
        ({"near": (0.95, 0.5), "far": (0.6, 0.5)}, "near"),
        ({"near": (SURE - 0.01, 0.2), "far": (0.5, 0.5)}, None),    # not sure
        ({"near": (0.97, 0.93), "far": (0.5, 0.5)}, None),          # sure of everything
        ({}, None),                                                 # no classifier of one label
    ],
)
def test_an_adapter_knows_inputs_that_its_head_is_sure_of_where_it_is_not_sure_of_everything(
    heads: dict[str, tuple[float, float]], teach: str | None
) -> None:
    found, why = advice(chosen(), OTHERS, answers(**heads))    # type: ignore[arg-type]
    assert found == teach and why


def test_without_others_to_compare_with_a_head_proves_nothing() -> None:
    assert advice(chosen(), OTHERS[1:], answers(near=(0.99, 0.3)))[0] is None    # type: ignore[arg-type]


def test_what_people_said_counts_first_where_enough_of_them_agree() -> None:
    for said, teach in ((["far"] * 3, "far"), (["far"] * 2, None), (["far"] * 3 + ["near"], None), (["far"] * 4 + ["near"], "far")):
        assert advice(chosen(6, said), OTHERS, answers())[0] == teach    # type: ignore[arg-type]


def test_what_people_said_of_some_or_of_labels_that_it_lacks_does_not_make_it_know_all() -> None:
    assert advice(chosen(7, ["far"] * 3), OTHERS, answers())[0] is None    # type: ignore[arg-type]
    assert advice(chosen(3, ["far"] * 3), OTHERS, answers(), lambda name, label: False)[0] is None    # type: ignore[arg-type]
