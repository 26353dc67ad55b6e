"""Feedback: what somebody says an answer should have been, checked against the labels that there are before the log takes it."""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import TYPE_CHECKING

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.errors import InvalidInput, NotRoutable
from adapter_hub.refs import PRODUCTION, AdapterRef
from adapter_hub.registry.observations import Observation

if TYPE_CHECKING:
    from adapter_hub.hub import Hub


def feedback(hub: Hub, id: str, correct_label: str | None, correct_adapter: str | None, new_label: bool) -> Observation:
    """See `Hub.feedback`."""
    if correct_label is None and correct_adapter is None:
        raise InvalidInput("nothing is said of the answer.", hint="Give correct_label or correct_adapter (`--label`, `--adapter`).")
    seen, name = hub.log.find(id), None
    if correct_adapter is not None:
        name = AdapterRef.parse(correct_adapter).name
        hub.registry.resolve(correct_adapter) if "@" in str(correct_adapter) else hub.registry.aliases(name)
    if new_label and (not isinstance(correct_label, str) or not correct_label.strip() or (name is None and seen.adapter is None)):
        raise InvalidInput("new_label wants the label, and the adapter whose label it is to be.", hint="Give correct_label and correct_adapter.")
    if correct_label is not None and name is not None:
        _check_one_label(hub, name)
    if correct_label is not None and not new_label:
        _check_label(hub, correct_label, AdapterRef.parse(correct_adapter) if correct_adapter else seen.adapter)
    return hub.log.say(seen, correct_label, name)


def _check_one_label(hub: Hub, name: str) -> None:
    """Raises InvalidInput where what is in production under this name gives no single label."""
    with suppress(NotRoutable):    # nothing in production
        manifest = hub.registry.manifest(AdapterRef(name, alias=PRODUCTION))
        if manifest.task_type != TaskType.SEQ_CLS or manifest.problem_type not in (None, ProblemType.SINGLE):
            raise InvalidInput(f"{name} gives no single label: a correct one cannot be noted.", hint="Give correct_adapter alone (`--adapter`).")


def _check_label(hub: Hub, label: str, asked: AdapterRef | None) -> None:
    """Raises InvalidInput where neither this version of an adapter nor the one in production gives such a label."""
    if asked is None:
        raise InvalidInput("the base model answered, which has no labels.", hint="Say whose label it is: correct_adapter (`--adapter`).")
    labels: dict[str, None] = {}
    for ref in (asked, AdapterRef(asked.name, alias=PRODUCTION)):
        with suppress(NotRoutable):    # purged, or nothing in production
            labels |= dict.fromkeys(hub.registry.manifest(ref).labels or ())
    if label not in labels:
        closest = difflib.get_close_matches(str(label), labels, n=3)
        hint = f"Closest: {', '.join(map(repr, closest))}." if closest else f"It has {len(labels)} labels: `adapter-hub show {asked.name}`."
        raise InvalidInput(f"{label!r} is no label of {asked.name}.", hint=f"{hint} One that it is to learn: new_label=True (`--new-label`).")
