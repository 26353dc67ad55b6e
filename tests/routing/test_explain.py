"""Explanations: words for every reason, and the exemplars that are really the nearest."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Decision, Method, Reason
from adapter_hub.routing.explain import NEIGHBOURS, explain, in_words
from adapter_hub.routing.features import SKETCH_WEIGHT, extract
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import build_state
from tests.routing.conftest import ENCODER

TEXTS = {
    "cards": ["freeze my card", "block the credit card", "my card was stolen", "unfreeze the card please", "order a new card"],
    "travel": ["book a flight to Rome", "which hotel is near", "cancel my flight", "my card for the train", "a window seat"],
    "food": ["a recipe for soup", "order a pizza"],
}
ROWS = {name: [Example(text, f"{name} {i % 2}") for i, text in enumerate(texts)] for name, texts in TEXTS.items()}
STATES = {AdapterRef(name, 1): build_state(ENCODER, rows) for name, rows in ROWS.items()}
ROUTER = Router.build(STATES)
KEPT = {AdapterRef(name, 1): texts for name, texts in TEXTS.items()}
CARDS = AdapterRef("cards", 1)


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def joined(text: str) -> Any:
    features = extract(ENCODER, [text])
    return np.concatenate([features.dense[0].astype(np.float64), SKETCH_WEIGHT * features.lexical.toarray()[0].astype(np.float64)])


@pytest.mark.parametrize("question", ["freeze the stolen card", "a flight for my card", "zzz"])
def test_neighbours_are_the_nearest_by_a_slow_loop(question: str) -> None:
    features = extract(ENCODER, [question])
    decision = ROUTER.route_features(features, k=3)[0]
    found = explain(decision, features, STATES, KEPT, 0.05)
    assert found.decision is decision
    expected = []
    for ref, _ in decision.candidates:
        likeness = sorted(((cosine(joined(question), joined(text)), i) for i, text in enumerate(TEXTS[ref.name])), key=lambda pair: -pair[0])
        expected += [(ref, TEXTS[ref.name][i], f"{ref.name} {i % 2}", value) for value, i in likeness[:NEIGHBOURS]]
    assert [(n.adapter, n.label) for n in found.neighbours] == [(ref, label) for ref, _, label, _ in expected]
    assert [n.text for n in found.neighbours] == [text for _, text, _, _ in expected]
    np.testing.assert_allclose([n.likeness for n in found.neighbours], [value for *_, value in expected], atol=0.01)    # stored at a byte a number


def test_an_exemplar_is_its_own_nearest() -> None:
    features = extract(ENCODER, ["cancel my flight"])
    nearest = explain(ROUTER.route_features(features)[0], features, STATES, KEPT, 0.05).neighbours[0]
    assert nearest.text == "cancel my flight" and nearest.likeness == pytest.approx(1, abs=1e-3)


def test_without_kept_texts_neighbours_have_none() -> None:
    features = extract(ENCODER, ["freeze my card"])
    found = explain(ROUTER.route_features(features, k=2)[0], features, STATES, {}, 0.05)
    assert {neighbour.text for neighbour in found.neighbours} == {None} and len(found.neighbours) >= 4
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown["words"] == found.words and shown["neighbours"][0]["text"] is None and shown["adapter"] == "cards@1"


WORDS = [
    (Decision.named(CARDS), 0.05, "cards@1 was named: nothing was routed."),
    (Decision.named(None), 0.05, "The base model was named: nothing was routed."),
    (
        Decision(None, None, None, None, Reason.NO_CANDIDATES, (), None),
        0.05,
        "No adapter in production has examples or a description, so there is nothing to compare with: the base model answers.",
    ),
    (
        Decision(CARDS, 0.25, -0.5, 0.75, Reason.ACCEPTED, ((CARDS, 1.5),), 1, Method.KERNEL_RIDGE),
        0.05,
        "cards@1 fits best: it scores 1.50 by the head and by its prototypes, 0.75 more than the next adapter. "
        "The input lies +0.25 from its centre, where 5 % of inputs that belong lie below -0.50: accepted.",
    ),
    (
        Decision(None, -0.75, -0.5, None, Reason.BELOW_THRESHOLD, ((CARDS, 0.5),), 1, Method.PROTOTYPES),
        0.025,
        "cards@1 fits best: it scores 0.50 by its prototypes alone. "
        "But the input lies -0.75 from its centre, where 2.5 % of inputs that belong lie below -0.50: no adapter fits, and the base model answers.",
    ),
    (
        Decision(CARDS, -0.75, -math.inf, None, Reason.ACCEPTED, ((CARDS, 0.5),), 1, Method.PROTOTYPES),
        0.0,
        "cards@1 fits best: it scores 0.50 by its prototypes alone. It answers, since no input may be turned away.",
    ),
]


@pytest.mark.parametrize(("decision", "rate", "words"), WORDS)
def test_every_reason_has_its_words(decision: Decision, rate: float, words: str) -> None:
    assert in_words(decision, rate) == words


def test_no_reason_is_without_words() -> None:
    assert {decision.reason for decision, _, _ in WORDS} == set(Reason)


def test_a_rate_of_1_is_said_without_infinity() -> None:
    decision = ROUTER.route(ENCODER, ["freeze my card"], max_false_reject=1)[0]
    assert decision.adapter is None and in_words(decision, 1.0).endswith("But every input is to be turned away: the base model answers.")
