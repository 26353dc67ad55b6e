"""Names cannot leave the registry, and each refusal says why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.errors import AdapterNotFound, InvalidName
from adapter_hub.refs import AdapterRef, check_name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it is empty"),
        ("../x", "'/' (U+002F) is not allowed there"),
        ("a/b/c", "'/' (U+002F) is not allowed there"),
        ("a\\b", "'\\\\' (U+005C) is not allowed there"),
        ("con", "it is a reserved device name"),
        ("nul.txt", "it is a reserved device name"),
        ("lpt1", "it is a reserved device name"),
        ("a" * 300, "it has 300 characters"),
        ("bаnking", "'а' (U+0430) is not allowed there"),
        ("banking\n", "(U+000A) is not allowed there"),
        ("Banking", "'B' (U+0042) is not allowed there"),
        (".hidden", "'.' (U+002E) is not allowed there"),
        ("-rf", "'-' (U+002D) is not allowed there"),
        ("trailing.", "it ends with a dot"),
        ("a b", "' ' (U+0020) is not allowed there"),
        ("a\x00b", "(U+0000) is not allowed there"),
        (None, "it is NoneType, not text"),
        (3, "it is int, not text"),
    ],
)
def test_an_unsafe_name_is_refused_with_its_reason(name: object, reason: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a", "0", "banking", "kitchen_and_dining", "v1.2-beta", "console", "a" * 96])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name) == name


@given(st.text(max_size=120))
def test_a_name_that_is_taken_stays_one_plain_folder_name(text: str) -> None:
    try:
        check_name(text)
    except InvalidName:
        return
    assert text.isascii() and text == text.lower() and "/" not in text and not text.startswith(".")


def test_the_three_forms_of_a_reference() -> None:
    assert AdapterRef.parse("banking@3") == AdapterRef("banking", version=3)
    assert AdapterRef.parse("banking@staging") == AdapterRef("banking", alias="staging")
    assert AdapterRef.parse("banking") == AdapterRef("banking", alias="production")
    assert str(AdapterRef.parse("banking")) == "banking@production"


@pytest.mark.parametrize("text", ["banking@", "banking@0", "banking@-1", "banking@1.5@2", "@3", "banking@٣", "banking@../x", "banking@99999999999"])
def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        AdapterRef.parse(text)


def test_an_unknown_reference_shows_the_closest_names() -> None:
    error = AdapterNotFound("sentment@3", known=["sentiment@3", "banking@1"])
    assert str(error) == "adapter 'sentment@3' is not registered. Closest: 'sentiment@3'. See `adapter-hub list`."
