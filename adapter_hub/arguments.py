"""What callers of the hub may give, checked: each error names the position, the fact and the next step. No model here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_hub.adapters.config import TaskType
from adapter_hub.chat import Conversation
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, as_examples, read_examples, text_fault
from adapter_hub.refs import AdapterRef

Named = str | AdapterRef | Mapping[str | AdapterRef, float] | None    # an adapter, a mixture by weights, the base model
Input = str | Conversation | Sequence[Mapping[str, str]]              # a text, or a conversation: messages of "role" and "content"
Generation = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None    # settings for all inputs, or for each


def texts_of(what: str, texts: Any) -> tuple[Any, ...]:
    """Of any iterable but one text. Raises InvalidInput."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        hint = f"Give a list: [{texts[:20]!r}]." if isinstance(texts, str) else "Give a list of texts."
        raise InvalidInput(f"{what} is {'one string' if isinstance(texts, str) else type(texts).__name__}.", hint=hint)
    return tuple(texts)


def inputs_of(texts: Any) -> tuple[str | Conversation, ...]:
    """Of what is to be routed or answered. Raises InvalidInput with the position of the one that cannot be read."""
    given = texts_of("texts", texts)
    found: list[str | Conversation] = []
    for position, text in enumerate(given, 1):
        if isinstance(text, Mapping):
            raise InvalidInput(f"text {position} of {len(given)} is one message.", hint="A conversation is a list of messages: [[…]].")
        if isinstance(text, Conversation):
            found.append(text)
        elif isinstance(text, list | tuple):
            found.append(Conversation.of(text, f"conversation {position} of {len(given)}"))
        elif reason := text_fault(text):
            raise InvalidInput(f"text {position} of {len(given)} {reason}.", hint="Remove it or write its text.")
        else:
            found.append(text)
    return tuple(found)


def aligned(adapters: Any, count: int) -> Sequence[Named]:
    if isinstance(adapters, str | AdapterRef | Mapping):
        return [adapters] * count
    named: Sequence[Named] = texts_of("adapters", adapters)
    if len(named) != count:
        raise InvalidInput(f"{len(named)} adapters were named for {count} texts.", hint="Name one for each text, or one for all.")
    return named


def rows_of(source: str | Path | Iterable[Mapping[str, Any] | Example]) -> list[Example]:
    return read_examples(source) if isinstance(source, str | Path) else as_examples(source)


def task_type_of(text: str) -> str:
    """As the manifests write it. Raises InvalidInput for one that there is not."""
    found = str(text).upper()
    if found not in TaskType.__members__:
        raise InvalidInput(f"{text!r} is not a task type.", hint=f"Known are {', '.join(TaskType)}.")
    return found


def limits_of(**given: int | None) -> dict[str, int]:
    """Of the engine or the queue, those that were given. Raises InvalidInput."""
    for name, limit in given.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise InvalidInput(f"{name}={limit!r} is not a whole number of at least 1.", hint="Give one, or leave it out.")
    return {name: limit for name, limit in given.items() if limit is not None}


def wait_of(wait_ms: float | None) -> dict[str, float]:
    """Of the queue, where it was given. Raises InvalidInput."""
    if wait_ms is None:
        return {}
    if isinstance(wait_ms, bool) or not isinstance(wait_ms, int | float) or not 0 <= wait_ms < math.inf:
        raise InvalidInput(f"wait_ms={wait_ms!r} is not a time in milliseconds.", hint="Give 0 or more, or leave it out.")
    return {"wait_ms": wait_ms}
