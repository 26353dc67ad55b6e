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

from adapter_hub.errors import CorruptVersion, InvalidInput, ModelChanged
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.statistics import Exemplars, RoutingState, build_state, quantise, state_of

ENCODER = HashEncoder(64)
ROWS = [Example("freeze my card", "freeze"), Example("what is my balance", "balance"), Example("block the card", "freeze"), Example("send money")]


def same(a: RoutingState, b: RoutingState) -> bool:
    return a.to_bytes() == b.to_bytes() and (a.vectors == b.vectors).all() and a.class_names == b.class_names


def test_labels_are_classes_and_the_rest_are_prototypes() -> None:
    state = build_state(ENCODER, ROWS)
    assert state.class_names == ("balance", "freeze", None)
    assert state.classes.tolist() == [1, 0, 1, 2]
    assert state.count == 4 and not state.from_description and state.encoder_fingerprint == ENCODER.fingerprint


def test_a_state_survives_its_bytes_exactly() -> None:
    state = build_state(ENCODER, ROWS)
    assert same(RoutingState.from_bytes(state.to_bytes()), state)
    assert state.to_bytes() == build_state(ENCODER, ROWS).to_bytes()


@given(arrays(np.float32, (5, 16), elements=st.floats(-1, 1, width=32)).filter(lambda a: (np.abs(a).max(axis=1) > 1e-3).all()))
def test_a_stored_number_is_within_half_a_step(vectors: Any) -> None:
    codes, scales = quantise(vectors)
    assert (np.abs(codes * scales[:, None] - vectors) <= scales[:, None] * 0.5001).all()
    assert (np.abs(codes).max(axis=1) == 127).all()


def test_quantised_unit_vectors_keep_their_direction() -> None:
    vectors = ENCODER.encode([row.text for row in ROWS])
    stored = build_state(ENCODER, ROWS).vectors
    cosines = (stored * vectors).sum(axis=1) / np.linalg.norm(stored, axis=1)
    assert cosines.min() > 0.9995


def test_without_examples_the_description_stands_in() -> None:
    state = build_state(ENCODER, [], "answers questions about bank cards")
    assert state.from_description and state.count == 1 and same(RoutingState.from_bytes(state.to_bytes()), state)
    assert not build_state(ENCODER, ROWS, "ignored where there are examples").from_description


def test_without_examples_and_description_nothing_is_stored() -> None:
    state = build_state(ENCODER, [], "  ")
    assert state.count == 0 and state.class_names == () and state.dim == 64
    assert same(RoutingState.from_bytes(state.to_bytes()), state)


def test_taught_examples_come_after_the_old_ones_and_replace_a_description() -> None:
    new = [Example("unfreeze it", "freeze"), Example("good morning")]
    assert same(build_state(ENCODER, ROWS).extended(ENCODER, new), build_state(ENCODER, [*ROWS, *new]))
    assert same(build_state(ENCODER, [], "cards").extended(ENCODER, new), build_state(ENCODER, new))
    assert same(build_state(ENCODER, []).extended(ENCODER, new), build_state(ENCODER, new))


def test_another_encoder_cannot_teach() -> None:
    with pytest.raises(ModelChanged, match="encoded by 'hash:64'"):
        build_state(ENCODER, ROWS).extended(HashEncoder(128), ROWS)


def test_prototypes_do_not_depend_on_the_order_of_the_rows(make_world: Callable[..., Any]) -> None:
    vectors, _ = make_world(1, 6).sample(0, 12)
    state = state_of(HashEncoder(32), vectors, [None] * len(vectors))
    order = np.random.default_rng(1).permutation(len(vectors))
    shuffled = state_of(HashEncoder(32), vectors[order], [None] * len(vectors))
    assert (shuffled.classes == state.classes[order]).all() and len(state.class_names) == 9


def test_what_is_computed_with_ignores_order_and_repetition() -> None:
    one = Exemplars.of(build_state(ENCODER, ROWS))
    other = Exemplars.of(build_state(ENCODER, [*ROWS[::-1], *ROWS, ROWS[0]]))
    for field in ("vectors", "classes", "counts", "sums"):
        assert (getattr(one, field) == getattr(other, field)).all()


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
