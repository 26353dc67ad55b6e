"""How much an adapter's answers weigh: what it is measured on is said by it and by the router, and one of them is right more often."""

from __future__ import annotations

import numpy as np
import pytest

from adapter_hub.continual.weight import DEVIATION, ROWS_MAX, WEIGHT_MAX, answer_weight, measured, weight_of
from adapter_hub.examples import Example
from adapter_hub.routing.contest import TEMPERATURE, WEIGHT
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.routing.features import extract
from adapter_hub.routing.statistics import build_state


def opinions(skill: float, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(log probabilities (n, 4), right labels (n,)): noise, and `skill` more for the right one."""
    rng = np.random.default_rng(seed)
    right = rng.integers(4, size=rows)
    scores = rng.normal(size=(rows, 4)) + skill * np.eye(4)[right]
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)), right


@pytest.mark.parametrize("skill", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("rows", [3, 30, 300])
def test_the_weight_is_the_likeliest_one(skill: float, rows: int) -> None:
    logs, right = opinions(skill, rows)
    responses = TEMPERATURE * np.random.default_rng(1).normal(size=logs.shape)

    def loss(weight: float) -> float:
        scores = responses / TEMPERATURE + weight * logs
        rest = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(rows), right]
        return float(rest.sum() + ((weight - WEIGHT) / DEVIATION) ** 2 / 2)

    found = answer_weight(responses, np.exp(logs), right.tolist())
    tried = np.linspace(0, WEIGHT_MAX, 1001)
    assert found == pytest.approx(tried[np.argmin([loss(weight) for weight in tried])], abs=0.02)


def test_who_guesses_weighs_nothing_and_who_is_never_wrong_much() -> None:
    responses = np.zeros((200, 4))
    weights = [answer_weight(responses, np.exp(logs), right.tolist()) for logs, right in (opinions(skill, 200) for skill in (0.0, 1.0, 4.0))]
    assert weights[0] < 0.2 and weights == sorted(weights)
    assert answer_weight([[0.0, 0.0]], [[0.5, 0.5]], [0]) == pytest.approx(WEIGHT, abs=0.02)    # a row that says nothing
    assert answer_weight([[0.0, 0.0]], [[0.0, 1.0]], [0]) >= 0    # what it calls impossible is the right one


def test_only_rows_that_can_tell_are_asked() -> None:
    rows = [Example(f"text {i}", label) for i in range(ROWS_MAX) for label in ("a", "b", "unknown")]
    found = measured(rows, ("a", "b"))
    assert len(found) == ROWS_MAX and {row.label for row in found} == {"a", "b"} and found[0] == rows[0] and found[-1] == rows[-2]
    assert measured([Example("text"), Example("text", "c")], ("a", "b")) == ()


def test_rows_that_are_exemplars_do_not_speak_for_the_router() -> None:
    encoder = HashEncoder()
    train = [Example(f"{word} {i}", label) for i in range(8) for word, label in (("wall", "red"), ("door", "blue"))]
    rows = [Example(f"{word} here {i}", label) for i in range(8) for word, label in (("wall", "red"), ("door", "blue"))]
    noise = [{"red": 0.5 + 0.4 * (-1) ** (i // 2), "blue": 0.5 - 0.4 * (-1) ** (i // 2)} for i in range(len(rows))]
    features = extract(encoder, [row.text for row in rows])
    weight = weight_of(build_state(encoder, train), rows, features, noise)
    assert weight is not None and weight < WEIGHT
    assert weight_of(build_state(encoder, [*train, *rows]), rows, features, noise) == weight
    assert weight_of(build_state(encoder, rows), rows, features, noise) is None    # nothing is left to respond
