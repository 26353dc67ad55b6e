"""Conversations as inputs: their form, which part is the question, and what goes first where one is too long. Standard library only.

How a conversation becomes tokens is the base's own chat template, which `FrozenBase.encode_chat` applies.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from adapter_hub.errors import InvalidInput
from adapter_hub.examples import fault, text_fault

ROLES = ("system", "user", "assistant")
_Ids = TypeVar("_Ids", bound=Sized)
_HINT = 'A conversation is [{"role": "user", "content": "…"}, …], and ends with a user.'


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with a user's. Made by `Conversation.of`."""

    messages: tuple[tuple[str, str], ...]    # (role, content); system first if at all, then user and assistant

    @classmethod
    def of(cls, messages: Any, name: str = "the conversation") -> Self:
        """Raises InvalidInput with the name and the position of the message that cannot be read."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise InvalidInput(f"{name} is {type(messages).__name__}, not a list of messages.", hint=_HINT)
        for position, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise InvalidInput(f"message {position} of {name} is not a role and a content.", hint=_HINT)
            if message["role"] not in ROLES or (message["role"] == "system" and position > 1):
                raise InvalidInput(f"message {position} of {name} has the role {message['role']!r}.", hint="user, assistant, or at the start system.")
            if fault := text_fault(message["content"]):
                raise InvalidInput(f"message {position} of {name} {fault}.", hint="Remove it or write its text.")
        if not messages or messages[-1]["role"] != "user":
            raise InvalidInput(f"{name} does not end with a user's message.", hint=_HINT)
        return cls(tuple((message["role"], message["content"]) for message in messages))

    def to_json(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def question(self) -> str:
        """The last message: what is to be answered, and what the router goes by."""
        return self.messages[-1][1]

    @property
    def questions(self) -> tuple[int, ...]:
        """Where each user's message stands."""
        return tuple(at for at, (role, _) in enumerate(self.messages) if role == "user")

    def asking(self, text: str) -> Conversation:
        """With another last message."""
        return Conversation((*self.messages[:-1], (self.messages[-1][0], text)))

    def under(self, system: str | None) -> Conversation:
        """With this system text, where there is one and the conversation brings none itself."""
        return self if system is None or self.messages[0][0] == "system" else Conversation((("system", system), *self.messages))

    def since(self, at: int) -> Conversation:
        """Without what stands before this message, but for the system text."""
        system = self.messages[:1] if self.messages[0][0] == "system" else ()
        return Conversation((*system, *self.messages[at:]))


def shortened(conversation: Conversation, encoded: Callable[[Conversation], _Ids], limit: int) -> _Ids:
    """The tokens of what of it fits into `limit`: without its oldest questions and answers, and in the end with less of the last question.

    Raises InvalidInput where there is no room for a question.
    """
    last = len(conversation.messages) - 1
    older = [at for at in conversation.questions if at < last]
    kept = bisect.bisect_left(older, True, key=lambda at: len(encoded(conversation.since(at))) <= limit)
    conversation = conversation.since([*older, last][kept])
    ids = encoded(conversation)
    if len(ids) <= limit:
        return ids
    text = conversation.question
    what = "the chat template, with the system text," if conversation.messages[0][0] == "system" else "the chat template"
    count = fitting(what, lambda count: len(encoded(conversation.asking(text[:count]))) > limit, len(text), limit)
    return encoded(conversation.asking(text[:count]))


def fitting(what: str, cut: Callable[[int], bool], length: int, limit: int) -> int:
    """How many characters of a text there is room for in `limit` tokens; `cut` says whether so many are too many. Raises InvalidInput for none."""
    most = limit    # doubled until it is too many: the search takes no longer for a longer text
    while most < length and not cut(most):
        most *= 2
    kept = bisect.bisect_left(range(min(most, length)), True, key=cut) - 1
    if kept < 1:
        raise InvalidInput(f"{what} leaves no room for a text in {limit} tokens.", hint="Shorten it, or ask for fewer new tokens.")
    return kept


def question_of(text: str | Conversation) -> str:
    """What a text or a conversation asks."""
    return text.question if isinstance(text, Conversation) else text


def input_of(row: object, name: str = "the row") -> str | Conversation:
    """What a row of a file asks: its `text`, or where it has none its `messages`, which may be JSON in a cell of a table.

    Raises InvalidInput with the name and the reason.
    """
    if not isinstance(row, Mapping) or "messages" not in row or row.get("text") not in (None, ""):
        if reason := fault(row):
            raise InvalidInput(f"{name} {reason}.", hint="A row has a text, or messages of a role and a content each.")
        return str(row["text"])    # type: ignore[index]
    messages = row["messages"]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{name} has messages that are not JSON.", hint=_HINT) from None
    return Conversation.of(messages, f"{name}'s conversation")
