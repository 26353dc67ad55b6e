"""What callers get: one output and the decision behind it, whole or piece by piece. No model here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from adapter_hub.engine.mixtures import Mixture, Shares
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.observations import Observation
from adapter_hub.routing.decision import Decision

if TYPE_CHECKING:
    from adapter_hub.engine.engine import Output
    from adapter_hub.engine.stream import Stream

ASKED = "asked"    # the reason of a row whose near candidates were asked: `adapter` knows the label that won

Answering = AdapterRef | Mixture | None    # who answers an input, resolved; None: the base model


@dataclass(frozen=True, slots=True)
class Prediction:
    """One output and the decision behind it. Exactly one of label, labels, value, text, vector, tokens says the answer.

    An abstained row on an encoder has `label` None and the base's `.vector`.
    """

    adapter: AdapterRef | None                  # the version that answered, of a mixture the weightiest; None is the base model. Of several
                                                # that were asked the one whose label won, which may be another than the decision's
    decision: Decision
    label: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)   # label -> probability
    text: str | None = None                     # generated text, without the prompt
    vector: Any = None                          # float32 (d,), the base's own pooling
    tokens: tuple[Any, ...] | None = None       # token classification: spans with label, score, start, end
    truncated: bool = False                     # the input was longer than the hub's max_tokens
    mixture: Shares = ()                        # (version, weight), weightiest first, where several answered together
    asked: Shares = ()                          # (version, the router's response to its label), best first, where several near candidates were asked
    labels: tuple[str, ...] | None = None       # of a classifier of several labels: those of probability 0.5 and more
    value: float | None = None                  # of a regression
    id: str | None = None                       # of its observation, for `Hub.feedback`; None where it is not logged

    @classmethod
    def of(cls, decision: Decision, answering: Answering, output: Output, asked: Shares = ()) -> Prediction:
        return cls(
            adapter=asked[0][0] if asked else decision.adapter,
            decision=decision,
            label=output.label,
            scores=output.scores or {},
            labels=output.labels,
            value=output.value,
            text=output.text,
            vector=output.vector,
            tokens=output.tokens,
            truncated=output.truncated,
            mixture=_mixture(answering),
            asked=asked,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything: the decision with its threshold, candidates and calibration, the answer, and the probability of each label."""
        scores = {label: rounded(score) for label, score in self.scores.items()}
        mixture = [{"adapter": str(ref), "weight": rounded(weight)} for ref, weight in self.mixture]
        asked = [{"adapter": str(ref), "response": response} for ref, response in self.asked]
        more = {"scores": scores, "mixture": mixture, "asked": asked, "observation": self.id}
        return self.decision.to_json() | self.row() | {key: value for key, value in more.items() if value}

    def observed(self, id: str, text: str, latency_ms: float | None) -> Observation:
        """What is logged of it."""
        reason = ASKED if self.asked else str(self.decision.reason)
        best = self.decision.candidates[0][0].name if self.decision.candidates else None
        return Observation(id, self.adapter, self.decision.score, self.decision.margin, reason, self.label, latency_ms, text, candidate=best)

    def row(self) -> dict[str, Any]:
        """The columns that the batch job adds to its input: flat, and the same for every row of a kind.

        `score` and `margin` are the router's, of its best candidate; where several were asked, the reason is that.
        """
        reason = ASKED if self.asked else str(self.decision.reason)
        row: dict[str, Any] = {"adapter": str(self.adapter) if self.adapter else None, "reason": reason}
        row |= {"score": rounded(self.decision.score), "margin": rounded(self.decision.margin)}
        return row | self.answer() | ({"truncated": True} if self.truncated else {})

    def answer(self) -> dict[str, Any]:
        """The prediction alone: `label` for a classifier and for abstention on an encoder, else `output`."""
        if self.labels is not None:
            return {"output": list(self.labels)}
        if self.value is not None:
            return {"output": rounded(self.value)}
        if self.text is not None:
            return {"output": self.text}
        if self.tokens is not None:
            return {"output": [span.to_json() for span in self.tokens]}
        if self.adapter is not None and self.label is None and self.vector is not None:
            return {"output": [rounded(float(x)) for x in self.vector]}
        return {"label": self.label}


class PredictionStream(Iterator[str]):
    """A text as it is being written, by `Hub.stream`. Joined, the pieces are what `predict` gives."""

    def __init__(self, decision: Decision, answering: Answering, pieces: Stream, id: str | None = None) -> None:
        self.id = id                          # as in a Prediction
        self.adapter = decision.adapter       # as in a Prediction: known before the first piece
        self.decision = decision
        self.mixture = _mixture(answering)
        self.truncated = pieces.truncated
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation; returns when what it held is free."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def foremost(adapter: Answering) -> AdapterRef | None:
    """The version that stands for it: of a mixture the weightiest."""
    return adapter.shares[0][0] if isinstance(adapter, Mixture) else adapter


def _mixture(adapter: Answering) -> Shares:
    return adapter.shares if isinstance(adapter, Mixture) and len(adapter.shares) > 1 else ()


def rounded(value: float | None) -> float | None:
    """Six decimals: what two runs of the same request on other batches agree on. None where there is no number."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
