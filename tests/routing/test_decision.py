"""A decision in plain JSON."""

from __future__ import annotations

import json
import math

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Decision, Reason

BANKING = AdapterRef("banking", 3)


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
    }


def test_a_named_decision_scores_nothing() -> None:
    assert Decision.named(BANKING).adapter == BANKING and Decision.named(BANKING).score is None
    assert Decision.named(None).adapter is None and Decision.named(None).reason is Reason.NAMED
