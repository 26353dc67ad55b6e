"""What the router answers: an adapter or abstention, and everything that led there. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapter_hub.refs import AdapterRef

TEMPERATURE = 0.15    # of candidates' weights, in scores: a usual margin leaves the runner-up next to nothing. Set by hand, not measured


class Reason(StrEnum):
    """Why an input went where it went."""

    ACCEPTED = "accepted"                    # the best candidate's score reached the threshold
    BELOW_THRESHOLD = "below_threshold"      # it did not: no adapter fits, the base answers
    NO_CANDIDATES = "no_candidates"          # no adapter has examples or a description: only names reach them
    NAMED = "named"                          # the caller named the adapter (or the base): nothing was routed


class Method(StrEnum):
    """What scored the best candidate; closeness to its prototypes counts beside it in any case.

    The rule is by what there is: a description and names of labels, or one lone example, are never solved; examples are, in the space of
    exemplars up to 16,384 of them, of random features above, not at all above 4,096 classes or 200,000 exemplars. Where a class has few
    examples for the registry at hand, its prototype may speak for it inside the head (`scoring.SCARCE`).
    """

    KERNEL_RIDGE = "kernel_ridge"          # the head, few exemplars: their exact kernel
    RANDOM_FEATURES = "random_features"    # the head, many exemplars
    PROTOTYPES = "prototypes"              # not solved yet, or more than a head holds
    DESCRIPTION = "description"            # one text stands for the adapter, and the names of labels beside it


@dataclass(frozen=True, slots=True)
class Decision:
    """Where one input goes. `adapter is None` means the base answers: the router abstained, or the base was named."""

    adapter: AdapterRef | None
    score: float | None                              # acceptance score of the best candidate; higher belongs more; None: nothing was scored
    threshold: float | None                          # the least score that is accepted; -inf never abstains
    margin: float | None                             # best candidate minus runner-up, in candidate scores; None without a runner-up
    reason: Reason
    candidates: tuple[tuple[AdapterRef, float], ...]  # (adapter, score), best first; around 1 for inputs like the exemplars
    calibration: int | None                          # number of the record behind scores and threshold; None: not stored
    method: Method | None = None                     # what scored the best candidate; None: nothing was scored
    searched: bool = False                           # an index found the candidates, which were scored then; False: all adapters were scored

    @classmethod
    def named(cls, adapter: AdapterRef | None) -> Decision:
        """The decision of a caller who named the adapter, or the base by None."""
        return cls(adapter, None, None, None, Reason.NAMED, (), None)

    @property
    def weights(self) -> tuple[float, ...]:
        """A share for each candidate, summing to 1: what a mixture of them would weigh. Aligned with `candidates`."""
        if not self.candidates:
            return ()
        best = self.candidates[0][1]
        shares = [math.exp((score - best) / TEMPERATURE) for _, score in self.candidates]
        return tuple(share / sum(shares) for share in shares)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: references as text, and null where there is no finite number."""
        return {
            "adapter": str(self.adapter) if self.adapter else None,
            "score": _finite(self.score),
            "threshold": _finite(self.threshold),
            "margin": _finite(self.margin),
            "reason": self.reason.value,
            "candidates": [{"adapter": str(ref), "score": _finite(score)} for ref, score in self.candidates],
            "calibration": self.calibration,
            "method": self.method.value if self.method else None,
            "searched": self.searched,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
