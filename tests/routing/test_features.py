"""Features: the same for ever, the same alone and in company, and packed without loss."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from adapter_hub.errors import InvalidInput
from adapter_hub.routing.features import SKETCH_DIM, SKETCH_WEIGHT, Features, Hidden, extract, hashed, pack, sketch, unpack
from tests.routing.conftest import ENCODER, World

TEXTS = ["what is my balance?", "Überweisung nach 東京", "?!", "a", "\x00\x07 control", "🙂", "\ud800 lone", "ǅ ẞ İ", "word " * 500]
TEXTS.append(TEXTS[0])
PINNED = [(155, 1), (873, 1), (1185, -1), (1221, -1), (1414, 1), (1644, 1), (1920, -1)]
PINNED_DIGEST = "6e04e6751040341007de73703ab86a0451563e05555a3c33401093d629f80572"
PINNED_SIGNS = "4a67240ed7c712b8da303f201256d083daa83d5d4297f4dfaf5190732a191f82"
PINNED_WIDE = "88844ca9e1f806f3784676ee01f9d4729e131b65aa04b13d1f630ddf56f612fd"
texts = st.text(min_size=1, max_size=40)


def slow_features(text: str) -> set[int]:
    """Read off the docstrings: words 1-2 and characters 2-5, crc32 of kind and feature."""
    words, word = [], ""
    for character in text.casefold() + " ":
        if character.isalnum() or character == "_":
            word += character
        elif word:
            words.append(word)
            word = ""
    found = ["w " + one for one in words] + [f"w {words[i]} {words[i + 1]}" for i in range(len(words) - 1)]
    letters = " " + (" ".join(words) if words else text) + " "
    for start in range(len(letters)):
        found += ["c " + letters[start:stop] for stop in range(start + 2, start + 6) if stop <= len(letters)]
    return {zlib.crc32(feature.encode("utf-8", "surrogatepass")) for feature in found}


def slow_sketch(text: str) -> Any:
    row = np.zeros(SKETCH_DIM)
    for value in slow_features(text):
        row[(value // 2) % SKETCH_DIM] += 1 if value % 2 else -1
    return np.sign(row) / np.sqrt(np.count_nonzero(row))


@pytest.mark.parametrize("text", TEXTS)
def test_hashes_are_those_of_a_slow_loop(text: str) -> None:
    assert hashed(text) == slow_features(text)
    np.testing.assert_allclose(sketch([text]).toarray()[0], slow_sketch(text), atol=1e-6)


@given(st.text(st.characters(categories=["L", "P", "Zs", "Nd"], max_codepoint=0x24F), max_size=30))
def test_hashes_of_any_text_are_those_of_a_slow_loop(text: str) -> None:
    assert hashed(text) == slow_features(text)


def test_a_sketch_is_the_same_function_for_ever() -> None:
    """Stored exemplars would be worthless otherwise: these places were computed when the sketch was made."""
    row = sketch(["hi"])
    signed = [(int(place), int(np.sign(value))) for place, value in zip(row.indices, row.data, strict=True)]
    assert signed == PINNED
    made = sketch(TEXTS)
    assert sha256(made.indptr.astype("<i4"), made.indices.astype("<i4"), np.signbit(made.data)) == PINNED_DIGEST


def sha256(*parts: Any) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_rows_are_unit_and_do_not_depend_on_company() -> None:
    together = sketch(TEXTS)
    assert together.shape == (len(TEXTS), SKETCH_DIM) and together.dtype == np.float32
    np.testing.assert_allclose(np.asarray(together.multiply(together).sum(axis=1))[:, 0], 1, atol=1e-6)
    for place, text in enumerate(TEXTS):
        assert (sketch([text]) != together[place]).nnz == 0
    assert (together[0] != together[-1]).nnz == 0


@given(st.lists(texts, min_size=1, max_size=5))
def test_any_text_has_a_unit_sketch_in_ascending_places(some: list[str]) -> None:
    made = sketch(some)
    for row in range(len(some)):
        places = made.indices[made.indptr[row] : made.indptr[row + 1]]
        assert len(places) and (np.diff(places) > 0).all()
    np.testing.assert_allclose(np.asarray(made.multiply(made).sum(axis=1))[:, 0], 1, atol=1e-5)


def test_features_that_cancel_leave_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No short text is known whose features all cancel; two that do are made up here."""
    monkeypatch.setattr("adapter_hub.routing.features.hashed", lambda text: {2 * 5, 2 * 5 + 1})
    row = sketch(["x"])
    assert row.indices.tolist() == [5] and row.data.tolist() == [1.0]


def test_form_is_likeness() -> None:
    a, b, c = sketch(["freeze my credit card", "please freeze my card", "weather in Paris tomorrow"])
    assert (a @ b.T)[0, 0] > 0.4 > 0.15 > (a @ c.T)[0, 0]


def test_case_and_punctuation_do_not_count_beside_words() -> None:
    assert (sketch(["Freeze, my CARD!"]) != sketch(["freeze my card"])).nnz == 0


# ---- packed -------------------------------------------------------------------------------------------------------------


@st.composite
def sketches(draw: st.DrawFn) -> Any:
    """Rows of signed places: close together, far apart, one alone, at both ends."""
    places = st.one_of(st.integers(0, SKETCH_DIM - 1), st.sampled_from([0, 126, 127, 128, 254, SKETCH_DIM - 1]))
    rows = draw(st.lists(st.sets(places, min_size=1), max_size=6))
    indices = [sorted(row) for row in rows]
    signs = [draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(row), max_size=len(row))) for row in indices]
    data = [np.array(row, np.float32) / np.float32(np.sqrt(len(row))) for row in signs]
    indptr = np.cumsum([0, *map(len, indices)])
    columns = np.concatenate([np.empty(0, np.int32), *indices]).astype(np.int32)
    return sparse.csr_matrix((np.concatenate([np.empty(0, np.float32), *data]), columns, indptr), (len(rows), SKETCH_DIM))


@given(sketches())
def test_what_was_packed_is_unpacked(lexical: Any) -> None:
    offsets, codes = pack(lexical)
    assert offsets.dtype == np.uint32 and codes.dtype == np.uint8 and offsets[-1] == len(codes)
    again = unpack(offsets, codes)
    assert again.shape == lexical.shape and (again.indices == lexical.indices).all() and (again.indptr == lexical.indptr).all()
    assert (np.sign(again.data) == np.sign(lexical.data)).all()
    np.testing.assert_allclose(again.data, lexical.data, rtol=1e-6)


@pytest.mark.parametrize("places", [[0], [127], [128], [SKETCH_DIM - 1], [0, SKETCH_DIM - 1], list(range(SKETCH_DIM))])
def test_a_place_costs_a_byte_and_every_127_empty_ones_another(places: list[int]) -> None:
    row = sparse.csr_matrix((np.ones(len(places), np.float32), places, [0, len(places)]), (1, SKETCH_DIM))
    offsets, codes = pack(row)
    gaps = np.diff([-1, *places])
    assert len(codes) == len(places) + sum((gap - 1) // 127 for gap in gaps)
    assert unpack(offsets, codes).indices.tolist() == places


def test_texts_are_unpacked_to_the_bit() -> None:
    assert (unpack(*pack(sketch(TEXTS))) != sketch(TEXTS)).nnz == 0
    assert unpack(np.zeros(1, np.uint32), np.empty(0, np.uint8)).shape == (0, SKETCH_DIM)


@pytest.mark.parametrize(
    "offsets, codes",
    [
        ([], []),                          # no beginning
        ([1, 2], [0, 0]),                  # not from the first
        ([0, 1], [0, 0]),                  # not to the last
        ([0, 3], [0, 0]),
        ([0, 0, 2], [0, 0]),               # an empty sketch
        ([0, 2, 1, 3], [0, 0, 0]),         # backwards
        ([0, 2], [0, 255]),                # ends in a gap
        ([0, 18], [255] * 17 + [0]),       # leaves its width
        ([0, 2049], [0] * 2049),
    ],
)
def test_bytes_that_are_no_sketch_are_refused(offsets: list[int], codes: list[int]) -> None:
    with pytest.raises(ValueError):
        unpack(np.array(offsets, np.uint32), np.array(codes, np.uint8))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=6), st.binary(max_size=60))
def test_any_bytes_are_a_sketch_or_refused(offsets: list[int], codes: bytes) -> None:
    found = np.array([0, *offsets, len(codes)], np.uint32)
    try:
        made = unpack(found, np.frombuffer(codes, np.uint8))
    except ValueError:
        return
    assert len(found) == made.shape[0] + 1 and made.nnz == sum(code != 255 for code in codes)
    assert (unpack(*pack(made)) != made).nnz == 0


# ---- rows of features ---------------------------------------------------------------------------------------------------


def test_features_are_the_embedding_and_the_sketch_of_each_text() -> None:
    found = extract(ENCODER, TEXTS)
    np.testing.assert_array_equal(found.dense, ENCODER.encode(TEXTS))
    assert (found.lexical != sketch(TEXTS)).nnz == 0 and len(found) == len(TEXTS)
    assert len(extract(ENCODER, [])) == 0 and extract(ENCODER, []).dense.shape == (0, ENCODER.dim)
    parts = Features.concatenate([found[:3], found[3:], Features.empty(ENCODER.dim)])
    assert (parts.dense == found.dense).all() and (parts.lexical != found.lexical).nnz == 0
    assert (found[4].dense == found.dense[4:5]).all() and (found[[5, 1]].lexical != found.lexical[[5, 1]]).nnz == 0


@pytest.mark.parametrize("bad", [["fine", ""], ["\t\n"], "one text", [None]])
def test_what_the_encoder_refuses_has_no_features(bad: Any) -> None:
    with pytest.raises(InvalidInput):
        extract(ENCODER, bad)


# ---- random features ----------------------------------------------------------------------------------------------------


def test_the_random_projections_are_the_same_for_ever() -> None:
    made = Hidden.of(32, 64)
    assert made.dense.shape == (32, 64) and made.lexical.shape == (SKETCH_DIM, 64)
    size = np.float32(np.sqrt(2 / 64))
    assert set(np.unique(made.dense)) == {-size, size} and set(np.unique(made.lexical / np.float32(SKETCH_WEIGHT))) == {-size, size}
    assert sha256(np.signbit(made.dense), np.signbit(made.lexical)) == PINNED_SIGNS
    wide = Hidden.of(384)
    assert wide.width == 4096 + 384 + SKETCH_DIM
    assert sha256(np.signbit(wide.dense[::37, ::41]), np.signbit(wide.lexical[::37, ::41])) == PINNED_WIDE


def test_products_of_random_features_approach_the_arc_cosine_kernel() -> None:
    """Cho and Saul 2009: |x||y| (sin θ + (π - θ) cos θ) / π, of the joined features."""
    features = Features.concatenate([World(2, 2, seed=1).sample(0, 5)[0], World(2, 2, seed=2).sample(1, 5)[0]])
    joined = np.hstack([features.dense.astype(np.float64), SKETCH_WEIGHT * features.lexical.toarray().astype(np.float64)])
    lengths = np.linalg.norm(joined, axis=1)
    np.testing.assert_allclose(lengths**2, 1 + SKETCH_WEIGHT**2, rtol=1e-5)
    angles = np.arccos(np.clip(joined @ joined.T / np.outer(lengths, lengths), -1, 1))
    kernel = np.outer(lengths, lengths) * (np.sin(angles) + (np.pi - angles) * np.cos(angles)) / np.pi
    errors = []
    for width in (256, 4096):
        whole = Hidden.of(features.dense.shape[1], width)(features)
        hidden, rest = whole[:, :width], whole[:, width:]
        assert whole.dtype == np.float32 and (hidden >= 0).all()
        np.testing.assert_allclose(rest, joined, atol=1e-7)    # the linear part
        errors.append(np.abs(hidden @ hidden.T - kernel).mean())
    assert errors[1] < 0.04 and errors[1] < errors[0] / 2
