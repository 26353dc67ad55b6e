"""Which candidates come so near the best that their own answers shall decide, and what a label weighs. Standard library only.

The router knows inputs of every adapter, and sees them through the frozen encoder alone; an adapter sees more, and knows its own labels
alone. Of a near input each candidate is asked. Among its own labels both decide: the router's response to a label, and the probability
that the adapter gives it (a product of experts, Hinton 2002). Among adapters the router's response to those labels does: how sure an
adapter is of an input that is not its own says nothing.
"""

from __future__ import annotations

import math

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Decision

# Both on validation rows, of many examples and of few: benchmarks/LOG.md.
NEAR = 0.2             # of candidates' scores: 4 % of CLINC150's inputs are nearer
TEMPERATURE = 0.075    # of responses beside log probabilities
PROBABILITY_MIN = 1e-12
DECIMALS = 3    # sums run in another order in a batch than alone, and a response's last bits weigh 1 / TEMPERATURE times as much


def rivals(decision: Decision, ask: int) -> tuple[AdapterRef, ...]:
    """The other candidates, of the `ask` best, that are near the one that was accepted; none where none was."""
    if decision.adapter is None or not decision.candidates:
        return ()
    best = decision.candidates[0][1]
    return tuple(ref for ref, score in decision.candidates[1:ask] if best - score < NEAR)


def evidence(response: float, probability: float) -> float:
    """For a label, from the router's response to its label and the probability that its adapter gives it: log odds but for a constant."""
    return round(response / TEMPERATURE + math.log(max(probability, PROBABILITY_MIN)), DECIMALS)
