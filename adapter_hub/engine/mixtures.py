"""Several adapters that answer one input together: with which weights, and which may. Decides only; `lora_layers` and `heads` run.

In every module the row gets Σ w_a s_a B_a A_a x: the updates are weighed and summed, never the factors. Its logits are the
weighted sum of what each head makes of the body that was adapted so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from adapter_hub.adapters.config import TaskType
from adapter_hub.engine.generation import merged
from adapter_hub.errors import InvalidInput
from adapter_hub.refs import AdapterRef

if TYPE_CHECKING:
    from adapter_hub.engine.slots import Facts  # torch: the hub names mixtures without it

Shares = tuple[tuple[AdapterRef, float], ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Adapters and their weights. Made by `Mixture.of`."""

    shares: Shares    # resolved; most weight first, above 0, summing to 1

    @classmethod
    def of(cls, weights: Iterable[tuple[AdapterRef, object]]) -> Self:
        """Weights in any unit, divided by their sum. A weight of 0 leaves its adapter out; those of one version are added.

        Raises InvalidInput for a weight that is negative or not finite, and where none is above 0.
        """
        summed: dict[AdapterRef, float] = {}
        for ref, weight in weights:
            # The comparison also turns away NaN, infinity and whole numbers beyond a float.
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= sys.float_info.max:
                raise InvalidInput(f"the weight of {ref} in a mixture is {weight!r}, not a finite number of at least 0.")
            summed[ref] = summed.get(ref, 0.0) + float(weight)
        total = sum(summed.values())
        if not 0 < total <= sys.float_info.max:
            what = "no weight above 0" if total == 0 else "weights whose sum is no finite number"
            raise InvalidInput(f"a mixture has {what}.", hint='For example {"legal": 0.7, "tax": 0.3}.')
        shares = ((ref, weight / total) for ref, weight in summed.items() if weight / total > 0)
        return cls(tuple(sorted(shares, key=lambda share: -share[1])))


def canonical(adapter: AdapterRef | Mixture | None) -> Shares:
    """What answers a row, in the order of references: no sum depends on how a mixture was written. Empty is the base model."""
    if isinstance(adapter, Mixture):
        return tuple(sorted(adapter.shares))
    return () if adapter is None else ((adapter, 1.0),)


def obstacle(first: tuple[AdapterRef, Facts], other: tuple[AdapterRef, Facts]) -> str | None:
    """Why these two cannot answer together; None where they can."""
    (a, ours), (b, theirs) = first, other
    for ref, facts in (first, other):
        if facts.form is not None and facts.form.dora:
            return f"{ref} is a DoRA adapter, whose output is not linear in B·A: a share of it is not defined"
    tasks = [facts.task_type or TaskType.FEATURE_EXTRACTION for facts in (ours, theirs)]
    if tasks[0] != tasks[1]:
        return f"the task of {a} is {tasks[0]}, that of {b} is {tasks[1]}"
    if ours.problem_type != theirs.problem_type:
        return f"the problem type of {a} is {ours.problem_type}, that of {b} is {theirs.problem_type}"
    if ours.labels != theirs.labels:
        return _other_labels(a, ours.labels or (), b, theirs.labels or ())
    if ours.prompt_template != theirs.prompt_template:
        return f"the prompt template of {a} is {_shown(ours.prompt_template)}, that of {b} is {_shown(theirs.prompt_template)}"
    settings = [dict(merged(facts.generation, None)) for facts in (ours, theirs)]
    for key in sorted({**settings[0], **settings[1]}):
        one, another = (found.get(key) for found in settings)
        if one != another:
            return f"{a} generates with {key}={one!r}, {b} with {key}={another!r}"
    return None


def _other_labels(a: AdapterRef, ours: tuple[str, ...], b: AdapterRef, theirs: tuple[str, ...]) -> str:
    if len(ours) != len(theirs):
        return f"{a} has {len(ours)} labels, {b} has {len(theirs)}"
    place, one, another = next((i, x, y) for i, (x, y) in enumerate(zip(ours, theirs, strict=True), 1) if x != y)
    return f"label {place} of {a} is {one!r}, that of {b} is {another!r}"


def _shown(template: str | None) -> str:
    return "none" if template is None else repr(template[:60])
