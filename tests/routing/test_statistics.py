"""The routing state: small, exact about what it stores, and strict about what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapter_hub.base_model import DEFAULT_MODEL
from adapter_hub.errors import CorruptVersion, InvalidInput, ModelChanged, ModelNotFound
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import HashEncoder, SentenceEncoder
from adapter_hub.routing.features import Features, extract, sketch
from adapter_hub.routing.statistics import SCHEMA, Encodings, Exemplars, RoutingState, build_state, quantise, state_of

ENCODER = HashEncoder(64)
HELD_OUT = [Example("is the card blocked", "freeze"), Example("how much is left")]
ROWS = [Example("freeze my card", "freeze"), Example("what is my balance", "balance"), Example("block the card", "freeze"), Example("send money")]


def same(a: RoutingState, b: RoutingState) -> bool:
    equal = (a.exemplars.vectors == b.exemplars.vectors).all() and a.class_names == b.class_names and (a.classes == b.classes).all()
    return a.to_bytes() == b.to_bytes() and a.digest == b.digest and bool(equal) and len(a.evaluation) == len(b.evaluation)


def test_labels_are_classes_and_the_rest_are_prototypes() -> None:
    state = build_state(ENCODER, ROWS)
    assert state.class_names == ("balance", "freeze", None)
    assert state.classes.tolist() == [1, 0, 1, 2]
    assert state.count == 4 and not state.from_description and state.encoder_fingerprint == ENCODER.fingerprint


def test_a_state_survives_its_bytes_exactly() -> None:
    state = build_state(ENCODER, ROWS)
    assert same(RoutingState.from_bytes(state.to_bytes()), state)
    assert state.to_bytes() == build_state(ENCODER, ROWS).to_bytes()
    assert same(RoutingState.from_bytes(build_state(ENCODER, ROWS, evaluation=HELD_OUT).to_bytes()), build_state(ENCODER, ROWS, evaluation=HELD_OUT))


def test_a_state_is_written_as_it_is_read_however_its_vectors_lie_in_memory() -> None:
    """safetensors writes memory as it lies."""
    features = extract(ENCODER, [row.text for row in ROWS])
    by_columns = Features(np.asfortranarray(features.dense), features.lexical)
    labels = [row.label for row in ROWS]
    assert same(state_of(ENCODER, by_columns, labels), state_of(ENCODER, features, labels))
    state = state_of(ENCODER, by_columns, labels, by_columns)
    assert same(RoutingState.from_bytes(state.to_bytes()), state)


def test_evaluation_inputs_are_kept_beside_the_exemplars() -> None:
    state = RoutingState.from_bytes(build_state(ENCODER, ROWS, evaluation=HELD_OUT).to_bytes())
    assert state.count == 4 and len(state.evaluation) == 2
    alone = build_state(ENCODER, HELD_OUT).exemplars
    assert state.evaluation.keys == alone.keys
    assert state.exemplars.keys == build_state(ENCODER, ROWS).exemplars.keys
    assert len(state.extended(ENCODER, [Example("more")]).evaluation) == 2


def test_an_evaluation_input_that_is_an_exemplar_is_dropped() -> None:
    held_out = [HELD_OUT[0], ROWS[0], Example("FREEZE my card", "another"), HELD_OUT[1], ROWS[3]]
    assert same(build_state(ENCODER, ROWS, evaluation=held_out), build_state(ENCODER, ROWS, evaluation=HELD_OUT))
    nothing = build_state(ENCODER, ROWS, evaluation=ROWS)
    assert same(nothing, build_state(ENCODER, ROWS)) and same(RoutingState.from_bytes(nothing.to_bytes()), nothing)
    assert build_state(ENCODER, [], evaluation=held_out).evaluation.keys == build_state(ENCODER, held_out).exemplars.keys


def test_what_is_taught_is_no_evaluation_input_any_more() -> None:
    state = build_state(ENCODER, ROWS, evaluation=[*HELD_OUT, Example("where is my money")])
    taught = state.extended(ENCODER, [HELD_OUT[0], Example("more")])
    assert same(taught, build_state(ENCODER, [*ROWS, HELD_OUT[0], Example("more")], evaluation=[HELD_OUT[1], Example("where is my money")]))


def test_features_are_stored_at_a_byte_a_number_and_a_byte_a_place() -> None:
    texts = [row.text for row in ROWS]
    made = Encodings.of(extract(ENCODER, texts))
    assert made.codes.nbytes == 4 * 64 and made.sketches.nbytes < 1.1 * sketch(texts).nnz + 16 * len(texts)
    again = made.features
    assert (again.lexical != sketch(texts)).nnz == 0
    assert (again.dense * ENCODER.encode(texts)).sum(axis=1).min() > 0.9995
    np.testing.assert_allclose(np.linalg.norm(again.dense, axis=1), 1, atol=1e-6)


def test_encodings_add_up_row_by_row() -> None:
    texts = [row.text for row in ROWS]
    whole, first, rest = (Encodings.of(extract(ENCODER, some)) for some in (texts, texts[:1], texts[1:]))
    nothing = Encodings.of(Features.empty(64))
    for total in (first + rest, nothing + whole, whole + nothing):
        assert total.keys == whole.keys and (total.offsets == whole.offsets).all()
        assert all((total.tensors()[name] == whole.tensors()[name]).all() for name in whole.tensors())


def test_keys_are_equal_for_equal_texts_alone() -> None:
    keys = Encodings.of(extract(ENCODER, ["freeze my card", "freeze my cards", "Freeze my card", "freeze my card"])).keys
    assert keys[0] == keys[2] == keys[3] != keys[1]


def test_keys_do_not_follow_the_last_bits_of_an_encoder() -> None:
    """Which a batch decides: the same text in another company would else be no duplicate and no contradiction."""
    features = extract(ENCODER, [row.text for row in ROWS])
    nearly = Features(features.dense * np.float32(1 + 2**-22), features.lexical)
    assert (Encodings.of(nearly).scales != Encodings.of(features).scales).any()
    assert Encodings.of(nearly).keys == Encodings.of(features).keys


def test_a_sentence_encoder_gives_a_text_one_key_in_any_company() -> None:
    try:
        encoder = SentenceEncoder(DEFAULT_MODEL)
    except ModelNotFound as error:
        pytest.skip(f"the default model is not here: {error}")
    company = [f"a longer text that needs some padding, number {i}" for i in range(6)]
    alone = Encodings.of(extract(encoder, ["call me back"])).keys[0]
    assert Encodings.of(extract(encoder, ["call me back", *company])).keys[0] == alone
    taught = build_state(encoder, [Example("call me back")]).extended(encoder, [Example("call me back"), *map(Example, company)])
    assert len(Exemplars.of(taught)) == 7


@given(arrays(np.float32, (5, 16), elements=st.floats(-1, 1, width=32)).filter(lambda a: (np.abs(a).max(axis=1) > 1e-3).all()))
def test_a_stored_number_is_within_half_a_step(vectors: Any) -> None:
    codes, scales = quantise(vectors)
    assert (np.abs(codes * scales[:, None] - vectors) <= scales[:, None] * 0.5001).all()
    assert (np.abs(codes).max(axis=1) == 127).all()


def test_quantised_unit_vectors_keep_their_direction() -> None:
    vectors = ENCODER.encode([row.text for row in ROWS])
    stored = build_state(ENCODER, ROWS).exemplars.vectors
    cosines = (stored * vectors).sum(axis=1) / np.linalg.norm(stored, axis=1)
    assert cosines.min() > 0.9995


def test_without_examples_the_description_stands_in() -> None:
    state = build_state(ENCODER, [], "answers questions about bank cards")
    assert state.from_description and state.count == 1 and same(RoutingState.from_bytes(state.to_bytes()), state)
    assert not build_state(ENCODER, ROWS, "ignored where there are examples").from_description


def test_beside_a_description_each_name_of_a_label_stands_for_its_label() -> None:
    state = build_state(ENCODER, [], "bank cards", label_names=["report_fraud", "freeze", "_"])
    given = [Example("bank cards"), Example("report fraud", "report_fraud"), Example("freeze", "freeze")]
    assert state.from_description and state.class_names == ("freeze", "report_fraud", None)
    assert (state.exemplars.codes == build_state(ENCODER, given).exemplars.codes).all() and same(RoutingState.from_bytes(state.to_bytes()), state)
    exemplars = Exemplars.of(state)
    assert exemplars.single and not exemplars.testable.any()
    assert same(build_state(ENCODER, ROWS, "bank cards", label_names=["freeze"]), build_state(ENCODER, ROWS))


def test_without_examples_and_description_nothing_is_stored() -> None:
    state = build_state(ENCODER, [], "  ", label_names=["True", "False"])
    assert state.count == 0 and state.class_names == () and state.dim == 64
    assert same(RoutingState.from_bytes(state.to_bytes()), state)


def test_taught_examples_come_after_the_old_ones_and_replace_a_description() -> None:
    new = [Example("unfreeze it", "freeze"), Example("good morning")]
    assert same(build_state(ENCODER, ROWS).extended(ENCODER, new), build_state(ENCODER, [*ROWS, *new]))
    assert same(build_state(ENCODER, [], "cards", label_names=["freeze", "lost"]).extended(ENCODER, new), build_state(ENCODER, new))
    assert same(build_state(ENCODER, []).extended(ENCODER, new), build_state(ENCODER, new))


def test_another_encoder_cannot_teach() -> None:
    with pytest.raises(ModelChanged, match="encoded by 'hash:64'"):
        build_state(ENCODER, ROWS).extended(HashEncoder(128), ROWS)


def test_prototypes_do_not_depend_on_the_order_of_the_rows(make_world: Callable[..., Any]) -> None:
    features, _ = make_world(1, 6).sample(0, 12)
    state = state_of(HashEncoder(32), features, [None] * len(features))
    order = np.random.default_rng(1).permutation(len(features))
    shuffled = state_of(HashEncoder(32), features[order], [None] * len(features))
    assert (shuffled.classes == state.classes[order]).all() and len(state.class_names) == 9


def test_what_is_computed_with_ignores_order_and_repetition() -> None:
    one = Exemplars.of(build_state(ENCODER, ROWS))
    other = Exemplars.of(build_state(ENCODER, [*ROWS[::-1], *ROWS, ROWS[0]]))
    for field in ("classes", "counts", "sums", "labelled", "testable"):
        assert (getattr(one, field) == getattr(other, field)).all()
    assert (one.features.dense == other.features.dense).all() and (one.features.lexical != other.features.lexical).nnz == 0


def test_one_text_under_two_labels_is_two_exemplars() -> None:
    one = Exemplars.of(build_state(ENCODER, [Example("call me", "phone"), Example("call me", "contact"), Example("call me", "phone")]))
    assert len(one) == 2 and one.counts.tolist() == [1, 1] and not one.testable.any()


@pytest.mark.parametrize(
    ("rows", "single", "testable"),
    [
        ([Example("a")], True, 0),                                                            # nothing says how wide it is
        ([Example("a"), Example("a")], True, 0),
        ([Example("a", "x")], False, 0),
        ([Example("a", "x"), Example("b", "y")], False, 0),                                   # nothing of a label stays behind
        ([Example("a", "x"), Example("b", "x"), Example("c", "y")], False, 2),
        ([Example("a"), Example("b")], False, 2),
        ([Example("a"), Example("b", "x")], False, 1),
    ],
)
def test_what_can_be_left_out_leaves_something_behind(rows: list[Example], single: bool, testable: int) -> None:
    one = Exemplars.of(build_state(ENCODER, rows))
    assert one.single is single and one.testable.sum() == testable


def test_nan_and_zero_vectors_are_refused() -> None:
    for bad in (np.nan, np.inf, 0.0):
        vectors = np.ones((3, 8), np.float32)
        vectors[1] = bad
        with pytest.raises(InvalidInput, match="exemplar 2 of 3"):
            quantise(vectors)


def tampered(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    data = build_state(ENCODER, ROWS).to_bytes()
    facts = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["routing"])
    tensors = {k: v.copy() for k, v in safetensors.numpy.load(data).items()}
    change(tensors, facts)
    return safetensors.numpy.save(tensors, {"routing": json.dumps(facts)})


@pytest.mark.parametrize(
    "change",
    [
        lambda t, f: t["scales"].__setitem__(0, np.nan),
        lambda t, f: t["scales"].__setitem__(0, 0.0),
        lambda t, f: t["codes"].__setitem__(0, 0),
        lambda t, f: t["classes"].__setitem__(0, 9),
        lambda t, f: t["classes"].__setitem__(0, -1),
        lambda t, f: t.update(codes=t["codes"].astype(np.float32)),
        lambda t, f: t.update(scales=t["scales"].astype(np.float64)),
        lambda t, f: t.update(scales=t["scales"][:2]),
        lambda t, f: t.update(codes=t["codes"].ravel()),
        lambda t, f: t.pop("classes"),
        lambda t, f: f.update(class_names=["freeze"]),
        lambda t, f: f.update(from_description=True),
        lambda t, f: f.update(schema=99),
        lambda t, f: f.pop("encoder_fingerprint"),
        lambda t, f: f.update(schema=SCHEMA - 1),
        lambda t, f: t["offsets"].__setitem__(1, 10**6),
        lambda t, f: t["offsets"].__setitem__(0, 1),
        lambda t, f: t.update(offsets=t["offsets"][:-1]),
        lambda t, f: t.update(offsets=t["offsets"].astype(np.int64)),
        lambda t, f: t["sketches"].__setitem__(slice(None), 255),
        lambda t, f: t["sketches"].__setitem__(slice(None), 254),
        lambda t, f: t.update(sketches=t["sketches"][:-1]),
        lambda t, f: t.pop("sketches"),
        lambda t, f: t.pop("evaluation.codes"),
        lambda t, f: t.update({"evaluation.codes": np.zeros((0, 32), np.int8)}),
        lambda t, f: t.update(classes=t["classes"].astype(np.int64)),
        lambda t, f: f.update(class_names=None),
    ],
)
def test_a_damaged_state_is_refused(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    with pytest.raises(CorruptVersion, match="somewhere/routing"):
        RoutingState.from_bytes(tampered(change), source="somewhere/routing.safetensors")


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x04pickle", b"\xff" * 64])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptVersion):
        RoutingState.from_bytes(data)
    with pytest.raises(CorruptVersion):
        RoutingState.from_bytes(build_state(ENCODER, ROWS).to_bytes()[:-3])
    with pytest.raises(CorruptVersion, match="not a routing file"):
        RoutingState.from_bytes(safetensors.numpy.save({"codes": np.zeros((1, 2), np.int8)}))


def test_a_successor_knows_both_and_what_is_newer_holds() -> None:
    newer = build_state(ENCODER, [Example("send money", "transfer"), Example("lost it", "lost")], evaluation=[Example("it is gone")])
    older = build_state(ENCODER, ROWS, evaluation=HELD_OUT, negatives=[Example("lost it"), Example("the weather")])
    both = older.succeeded(ENCODER, newer)
    assert older.rows_before(newer) == [0, 1, 2]
    told = [*ROWS[:3], Example("send money", "transfer"), Example("lost it", "lost")]
    assert same(both, build_state(ENCODER, told, evaluation=[*HELD_OUT, Example("it is gone")], negatives=[Example("the weather")]))
    assert same(build_state(ENCODER, [], "cards").succeeded(ENCODER, newer), newer)
    assert newer.succeeded(ENCODER, newer).count == newer.count    # learned again, nothing is there twice


def test_a_thinned_state_has_its_share_of_each_class_and_at_least_two(make_world: Callable[..., Any]) -> None:
    state = make_world(1, 3).state(0, 20, evaluation=4)
    thin = state.thinned(0.2)
    assert np.bincount(thin.classes).tolist() == [4, 4, 4] and thin.class_names == state.class_names
    assert len(thin.evaluation) == 12 and set(thin.exemplars.keys) <= set(state.exemplars.keys)
    assert np.bincount(state.thinned(0.0).classes).tolist() == [2, 2, 2] and state.thinned(1.0) is state
    assert RoutingState.from_bytes(thin.to_bytes()).digest == thin.digest
