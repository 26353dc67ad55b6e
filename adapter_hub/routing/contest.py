"""Which candidates come so near the best that their own answers shall decide, and what a label weighs. Standard library only.

The router knows inputs of every adapter, and sees them through the frozen encoder alone; an adapter sees more, and knows its own labels
alone. Of a near input each candidate is asked, and each of its labels is weighed by both: by the router's response to that label, and by
the probability that the adapter gives it (a product of experts, Hinton 2002). How much the latter counts is measured for each version that
is learned (`continual.weight`): one that knows no more than the frozen encoder has little to say.
"""

from __future__ import annotations

import math

from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Decision

# On validation rows, by maximum likelihood: benchmarks/LOG.md.
NEAR = 0.3            # of candidates' scores: 6 % of the inputs are nearer
TEMPERATURE = 0.05    # of responses, as log probabilities of labels: 0.04 to 0.07 on left-out examples of four registries
WEIGHT = 3.0          # of an adapter's log probabilities beside them, where it was not measured: of adapters of 90 and more rows a label
PROBABILITY_MIN = 1e-12
DECIMALS = 3    # sums run in another order in a batch than alone, and a response's last bits weigh 1 / TEMPERATURE times as much


def rivals(decision: Decision, ask: int) -> tuple[AdapterRef, ...]:
    """The other candidates, of the `ask` best, that are near the one that was accepted; none where none was."""
    if decision.adapter is None or not decision.candidates:
        return ()
    best = decision.candidates[0][1]
    return tuple(ref for ref, score in decision.candidates[1:ask] if best - score < NEAR)


def evidence(response: float, probability: float, weight: float = WEIGHT) -> float:
    """For a label, from the router's response to its label and the probability that its adapter gives it: log odds but for a constant."""
    return round(response / TEMPERATURE + weight * math.log(max(probability, PROBABILITY_MIN)), DECIMALS)
