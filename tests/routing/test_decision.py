"""A decision in plain JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import TEMPERATURE, Decision, Method, Reason

BANKING, TRAVEL = AdapterRef("banking", 3), AdapterRef("travel", 1)


def test_what_is_not_finite_becomes_null() -> None:
    decision = Decision(BANKING, -1.5, -math.inf, None, Reason.ACCEPTED, ((BANKING, 12.25),), 4)
    assert json.loads(json.dumps(decision.to_json(), allow_nan=False)) == {
        "adapter": "banking@3",
        "score": -1.5,
        "threshold": None,
        "margin": None,
        "reason": "accepted",
        "candidates": [{"adapter": "banking@3", "score": 12.25}],
        "calibration": 4,
        "method": None,
        "searched": False,
    }


def test_everything_that_led_there_is_shown() -> None:
    decision = Decision(None, 0.25, 0.5, 0.125, Reason.BELOW_THRESHOLD, ((BANKING, 1.5), (TRAVEL, 1.375)), None, Method.KERNEL_RIDGE)
    assert decision.to_json() == {
        "adapter": None,
        "score": 0.25,
        "threshold": 0.5,
        "margin": 0.125,
        "reason": "below_threshold",
        "candidates": [{"adapter": "banking@3", "score": 1.5}, {"adapter": "travel@1", "score": 1.375}],
        "calibration": None,
        "method": "kernel_ridge",
        "searched": False,
    }


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_weights_are_shares_in_the_order_of_the_scores(scores: list[float]) -> None:
    ordered = sorted(scores, reverse=True)
    weights = Decision(BANKING, 0.0, 0.0, None, Reason.ACCEPTED, tuple((BANKING, score) for score in ordered), None).weights
    assert math.fsum(weights) == pytest.approx(1) and list(weights) == sorted(weights, reverse=True) and weights[0] > 0


def test_a_weight_falls_by_e_with_every_temperature() -> None:
    candidates = ((BANKING, 2.0), (TRAVEL, 2.0 - TEMPERATURE))
    first, second = Decision(BANKING, 0.0, 0.0, None, Reason.ACCEPTED, candidates, None).weights
    assert first / second == pytest.approx(math.e)
    assert Decision(BANKING, 0.0, 0.0, None, Reason.ACCEPTED, candidates[:1], None).weights == (1.0,)
    assert Decision.named(BANKING).weights == ()


def test_a_named_decision_scores_nothing() -> None:
    assert Decision.named(BANKING).adapter == BANKING and Decision.named(BANKING).score is None
    assert Decision.named(None).adapter is None and Decision.named(None).reason is Reason.NAMED
