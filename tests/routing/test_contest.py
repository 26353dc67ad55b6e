"""Which candidates are asked beside the best, and what a label of one of them weighs among its own."""

from __future__ import annotations

import math

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.contest import NEAR, evidence, rivals
from adapter_hub.routing.decision import Decision, Reason

A, B, C = (AdapterRef(name, 1) for name in "abc")


def decided(*scores: float, accepted: bool = True) -> Decision:
    candidates = tuple(zip((A, B, C), scores, strict=False))
    return Decision(A if accepted else None, scores[0], 0.0, None, Reason.ACCEPTED if accepted else Reason.BELOW_THRESHOLD, candidates, 1)


def test_only_what_comes_near_the_best_is_asked_beside_it() -> None:
    near, far = decided(1.0, 1.0 - 0.9 * NEAR, 1.0 - 1.1 * NEAR), decided(1.0, 1.0 - 1.1 * NEAR)
    assert [rivals(near, ask) for ask in (1, 2, 3)] == [(), (B,), (B,)]
    assert rivals(far, 3) == () == rivals(decided(1.0), 2) == rivals(decided(1.0, 1.0, accepted=False), 2) == rivals(Decision.named(A), 2)


def test_a_label_weighs_more_the_surer_its_adapter_and_the_more_the_router_responds_to_its_label() -> None:
    assert evidence(0.5, 0.9) > evidence(0.5, 0.6) > evidence(0.4, 0.6)
    assert math.isfinite(evidence(0.5, 0.0))
