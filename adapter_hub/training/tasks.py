"""What an adapter is trained to give: a label, several, a number, labels of spans, or text. Rows become tensors, outputs become metrics.

Each task reads its targets from an Example: `label` where one word says it, else a field that travels along. How a text is encoded is the
base's to say, as for the engine.
"""

# n rows, t tokens, c labels, v vocabulary

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.base_model import BaseKind, Encoded, FrozenBase
from adapter_hub.chat import Conversation, shortened
from adapter_hub.errors import InvalidInput, counted
from adapter_hub.examples import Example, check_targets, text_fault
from adapter_hub.training.data import check_task
from adapter_hub.training.evaluate import OUTSIDE, classifier_metrics, labels_metrics, number_metrics

IGNORED = -100      # a label that is in no loss
VALUE = ("value",)  # the output of a regression
NUMBER_MAX = float(np.finfo(np.float32).max)
SCALE_MIN, ROUNDING = 1e-35, 1e-7    # of a deviation that is one: float32 holds its inverse, and tells numbers apart that differ by it
MODEL_INPUTS = ("input_ids", "attention_mask")    # one text has one segment: GPT-2 would add an embedding for token_type_ids

Features = dict[str, Any]    # of one row: MODEL_INPUTS, not padded, and "labels"


@dataclass(frozen=True, slots=True)
class Task:
    """One of several labels a text."""

    labels: tuple[str, ...]              # in the order of the head's outputs
    prompt_template: str | None = None   # with one {text}

    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    problem_type: ClassVar[ProblemType | None] = ProblemType.SINGLE
    fields: ClassVar[tuple[str, ...]] = ("label",)    # of a row, one of which holds its target
    auto: ClassVar[Any] = AutoModelForSequenceClassification
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "log_loss")

    @classmethod
    def of(cls, rows: Sequence[Example], validation: Sequence[Example] | None, prompt_template: str | None) -> Self:
        """The task of these rows. Raises InvalidInput with the position of a row that will not do."""
        return cls(check_task(rows, validation), prompt_template)

    def fitted(self, train: Sequence[Example]) -> Self:
        """The task with what is to be known of the rows that are trained on."""
        return self

    @classmethod
    def fault(cls, row: Example) -> str | None:
        """Why a row has no target of this kind, to be read after "the row"; None where it has."""
        return None if row.label and row.label.strip() else "has no label"

    @classmethod
    def named(cls, row: Example) -> tuple[str, ...]:
        """The labels in a row's target."""
        return (row.label or "",)

    @classmethod
    def shown(cls, row: Example) -> str:
        """A row's target in one line: of equal ones the same."""
        return row.label or ""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the head's outputs, in their order; none where there is no head."""
        return self.labels

    @classmethod
    def key(cls, row: Example) -> str:
        """What is asked: of rows with one key the last one holds, and all of them train, or none does."""
        return row.text

    def stratum(self, row: Example) -> str:
        """Of each such kind of row a share is held out."""
        return row.label or ""

    def strata(self, rows: Sequence[Example]) -> Callable[[Example], str]:
        """The `stratum` by which these rows are held out."""
        return self.stratum

    def features(self, base: FrozenBase, rows: Sequence[Example]) -> list[Features]:
        return [_inputs(ids) | {"labels": self.target(row, ids)} for row, ids in zip(rows, self.encoded(base, rows), strict=True)]

    def encoded(self, base: FrozenBase, rows: Sequence[Example]) -> list[Encoded]:
        return base.encode([self.prompt(row.text) for row in rows])

    def cut(self, base: FrozenBase, rows: Sequence[Example]) -> int:
        """How many rows are longer than what the model reads of them."""
        return sum(ids.truncated for ids in self.encoded(base, rows))

    def prompt(self, text: str) -> str:
        return text if self.prompt_template is None else self.prompt_template.replace("{text}", text)

    def target(self, row: Example, ids: Encoded) -> Any:
        return self.labels.index(row.label or "")

    def reduced(self, logits: Any, labels: torch.Tensor) -> Any:
        """What is kept of a batch's outputs until all are measured."""
        return logits

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        """Its `measures`, and `rank`, higher in the better epoch."""
        found = classifier_metrics(np.asarray(predicted.predictions), np.asarray(predicted.label_ids))
        # Not by accuracy: of the few rows that choose, epochs get as many right, and the first of them would win.
        return found | {"rank": -found["log_loss"]}


@dataclass(frozen=True, slots=True)
class Several(Task):
    """Any of several labels a text, each by itself: rows have `labels`, a list."""

    problem_type: ClassVar[ProblemType | None] = ProblemType.MULTI
    fields: ClassVar[tuple[str, ...]] = ("labels",)
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "log_loss")

    @classmethod
    def of(cls, rows: Sequence[Example], validation: Sequence[Example] | None, prompt_template: str | None) -> Self:
        _check(rows, validation, cls)
        known = tuple(sorted({label for row in rows for label in cls.named(row)}))
        if not known:
            raise InvalidInput("no training row has a label.", hint='A row is {"text": …, "labels": ["…"]}.')
        _check_known(validation, cls.named, known)
        return cls(known, prompt_template)

    @classmethod
    def fault(cls, row: Example) -> str | None:
        found = row.extra.get("labels")
        if not isinstance(found, list):
            return "has no list `labels`" if found is None else f"has `labels` that are no list: {str(found)[:60]!r}"
        return None if all(isinstance(one, str) and one for one in found) else f"has `labels` that are no texts: {str(found)[:60]}"

    @classmethod
    def named(cls, row: Example) -> tuple[str, ...]:
        return tuple(row.extra["labels"])

    @classmethod
    def shown(cls, row: Example) -> str:
        return ", ".join(sorted({*cls.named(row)})) or "none"

    def stratum(self, row: Example) -> str:
        return "\x00".join(sorted(self.named(row)))

    def strata(self, rows: Sequence[Example]) -> Callable[[Example], str]:
        """Sets of labels that all occur once are none."""
        return self.stratum if len(set(map(self.stratum, rows))) < len(rows) else lambda _: ""

    def target(self, row: Example, ids: Encoded) -> list[float]:
        return [float(label in row.extra["labels"]) for label in self.labels]

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        found = labels_metrics(np.asarray(predicted.predictions), np.asarray(predicted.label_ids) > 0)
        return found | {"rank": -found["log_loss"]}


@dataclass(frozen=True, slots=True)
class Number(Task):
    """A number a text: `label` holds it. Trained in units of `scale`: at one learning rate stars are learned, and prices are."""

    scale: float = 1.0    # standard deviation of the training rows' numbers

    problem_type: ClassVar[ProblemType | None] = ProblemType.REGRESSION
    measures: ClassVar[tuple[str, ...]] = ("rmse", "mae", "correlation")

    @classmethod
    def of(cls, rows: Sequence[Example], validation: Sequence[Example] | None, prompt_template: str | None) -> Self:
        _check(rows, validation, cls)
        return cls((), prompt_template)

    def fitted(self, train: Sequence[Example]) -> Self:
        numbers = np.array([float(row.label or "") for row in train])
        deviation, largest = float(numbers.std()), float(np.abs(numbers).max())
        return replace(self, scale=deviation if deviation > max(SCALE_MIN, ROUNDING * largest) else 1.0)    # of one number it is what was rounded

    @classmethod
    def fault(cls, row: Example) -> str | None:
        if row.label is None:
            return "has no label"
        try:
            number = float(row.label)
        except ValueError:
            return f"has the label {row.label!r}, which is no number"
        if math.isfinite(number):
            return None if abs(number) <= NUMBER_MAX else f"has the number {row.label}, and float32 ends at {NUMBER_MAX:.1e}"
        return "has a number that is not finite"

    @classmethod
    def named(cls, row: Example) -> tuple[str, ...]:
        return ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return VALUE

    @classmethod
    def shown(cls, row: Example) -> str:
        return repr(float(row.label or "")).removesuffix(".0")

    def stratum(self, row: Example) -> str:
        return ""

    def target(self, row: Example, ids: Encoded) -> float:
        return float(row.label or "") / self.scale

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        said, right = (np.asarray(one, dtype=np.float64).reshape(-1) * self.scale for one in (predicted.predictions, predicted.label_ids))
        found = number_metrics(said, right)
        return found | {"rank": -found["rmse"]}


@dataclass(frozen=True, slots=True)
class Spans(Task):
    """A label a token: rows have `spans`, each {"start", "end", "label"} in characters; what no span holds is OUTSIDE."""

    task_type: ClassVar[TaskType] = TaskType.TOKEN_CLS
    problem_type: ClassVar[ProblemType | None] = None
    fields: ClassVar[tuple[str, ...]] = ("spans",)
    auto: ClassVar[Any] = AutoModelForTokenClassification

    @classmethod
    def of(cls, rows: Sequence[Example], validation: Sequence[Example] | None, prompt_template: str | None) -> Self:
        _check(rows, validation, cls)
        known = tuple(sorted({label for row in rows for label in cls.named(row)} - {OUTSIDE}))
        if not known:
            raise InvalidInput("no training row has a span.", hint='A row is {"text": …, "spans": [{"start": 0, "end": 3, "label": "…"}]}.')
        _check_known(validation, cls.named, (OUTSIDE, *known))
        return cls((OUTSIDE, *known), prompt_template)

    @classmethod
    def fault(cls, row: Example) -> str | None:
        spans = row.extra.get("spans")
        if not isinstance(spans, list):
            return "has no list `spans`"
        for span in spans:
            try:
                inside = isinstance(span["start"], int) and isinstance(span["end"], int) and bool(span["label"]) and isinstance(span["label"], str)
                inside = inside and 0 <= span["start"] < span["end"] <= len(row.text)
            except (TypeError, KeyError):
                inside = False
            if not inside:
                return f"has the span {span!r}, which is not {{start, end, label}} within its text"
        furthest: Any = None
        for span in sorted(spans, key=lambda span: int(span["start"])):
            if furthest and span["start"] < furthest["end"] and span["label"] != furthest["label"]:
                return f"has spans of other labels that overlap, {furthest!r} and {span!r}: a token has one label"
            furthest = span if furthest is None else max(furthest, span, key=lambda span: int(span["end"]))
        return None

    @classmethod
    def named(cls, row: Example) -> tuple[str, ...]:
        return tuple(span["label"] for span in row.extra["spans"])

    @classmethod
    def shown(cls, row: Example) -> str:
        spans = sorted((span["start"], span["end"], span["label"]) for span in row.extra["spans"])
        return ", ".join(f"{row.text[start:end]} ({label})" for start, end, label in spans) or "none"

    def stratum(self, row: Example) -> str:
        return ""

    def target(self, row: Example, ids: Encoded) -> list[int]:
        shift = 0 if self.prompt_template is None else self.prompt_template.index("{text}")
        found = []
        # A token may lie in the template and in the text, too; as for the engine, its part of the text counts.
        for start, end in ((max(start - shift, 0), min(end - shift, len(row.text))) for start, end in ids.offsets):
            if start >= end:    # special tokens, and those of the template
                found.append(IGNORED)
                continue
            found.append(self.labels.index(label_at(row, start, end)))
        return found

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        logits, targets = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
        known = targets != IGNORED
        found = classifier_metrics(logits[known], targets[known])
        return found | {"rank": found["macro_f1"] - 1e-5 * min(found["log_loss"], 10.0)}


@dataclass(frozen=True, slots=True)
class Writing(Task):
    """Text that goes on: `text` is the prompt and `label` the completion; or `messages`, of which the last is the assistant's.

    Only the completion is in the loss, and the token that ends it.
    """

    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM
    problem_type: ClassVar[ProblemType | None] = None
    fields: ClassVar[tuple[str, ...]] = ("label", "messages")
    auto: ClassVar[Any] = AutoModelForCausalLM
    measures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    shift: ClassVar[int] = 1    # a position's logits are for the next token

    @classmethod
    def of(cls, rows: Sequence[Example], validation: Sequence[Example] | None, prompt_template: str | None) -> Self:
        _check(rows, validation, cls)
        if prompt_template is not None and cls.conversing([*rows, *(validation or ())]):
            fact = "rows with `messages` go through the chat template, and take no prompt template"
            raise InvalidInput(f"{fact}.", hint="Leave the prompt template out, or give `text` and `label`.")
        return cls((), prompt_template)

    @classmethod
    def conversing(cls, rows: Sequence[Example]) -> bool:
        """Whether any row is a conversation."""
        return any("messages" in row.extra for row in rows)

    @classmethod
    def written(cls, row: Example) -> str:
        """What is to be written."""
        return str(row.extra["messages"][-1]["content"]) if cls.conversing([row]) else row.label or ""

    @classmethod
    def named(cls, row: Example) -> tuple[str, ...]:
        return ()

    @classmethod
    def shown(cls, row: Example) -> str:
        return cls.written(row)

    @classmethod
    def fault(cls, row: Example) -> str | None:
        if "messages" not in row.extra:
            return "has no label to write" if text_fault(row.label) else None
        messages = row.extra["messages"]
        try:
            said = all(isinstance(one["content"], str) and isinstance(one["role"], str) for one in messages)
            good = said and len(messages) > 1 and messages[-1]["role"] == "assistant" and not text_fault(messages[-1]["content"])
            if good and text_fault(messages[-2]["content"]):
                return "has `messages` whose last question is empty"
        except (TypeError, KeyError):
            good = False
        return None if good else "has `messages` that do not end with an assistant's"

    @classmethod
    def key(cls, row: Example) -> str:
        """A prompt may be gone on from in several ways, and of a conversation `text` is the last question alone."""
        return json.dumps([row.text, row.label, row.extra.get("messages")], default=str)

    def stratum(self, row: Example) -> str:
        return ""

    def features(self, base: FrozenBase, rows: Sequence[Example]) -> list[Features]:
        tokenizer = base.copy_tokenizer()
        return [self._row(base, tokenizer, row) for row in rows]

    def _row(self, base: FrozenBase, tokenizer: PreTrainedTokenizerBase, row: Example) -> Features:
        messages = _messages(row)
        prompt, answer = _chat(base, tokenizer, messages) if messages else ([], base.encode_answer(row.label or ""))
        answer = answer[: max(1, base.tokens_limit // 2)]
        room = min(base.max_tokens, base.tokens_limit - len(answer))
        if not messages:
            prompt = list(base.encode([self.prompt(row.text)], max_tokens=room)[0].ids["input_ids"])
        elif len(prompt) > room:
            prompt = _asked(base, messages[:-1], room)
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}

    def cut(self, base: FrozenBase, rows: Sequence[Example]) -> int:
        return sum(self._is_cut(base, row) for row in rows)

    def _is_cut(self, base: FrozenBase, row: Example) -> bool:
        rewrites, answer = base.kind is BaseKind.SEQ2SEQ, base.encode_answer(self.written(row))
        if len(answer) >= (base.max_tokens if rewrites else max(1, base.tokens_limit // 2)):    # as it was cut, or all that there is room for
            return True
        room = base.max_tokens if rewrites else min(base.max_tokens, base.tokens_limit - len(answer))
        if messages := _messages(row):
            return len(base.encode_chat(messages[:-1])) > room
        return base.encode([self.prompt(row.text)], max_tokens=room)[0].truncated

    def reduced(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Of each row (n, 3): summed loss of its completion's tokens, how many are right, and how many there are."""
        scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        scores, targets = scores[:, : scores.shape[1] - self.shift].float(), labels[:, self.shift :]
        known = targets != IGNORED
        own = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        right = (scores.argmax(dim=2) == targets) & known
        return torch.stack([own.sum(dim=1), right.sum(dim=1).float(), known.sum(dim=1).float()], dim=1)

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        own, right, count = np.asarray(predicted.predictions, dtype=np.float64).sum(axis=0)
        loss = float(own / count)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": float(right / count), "rank": -loss}


@dataclass(frozen=True, slots=True)
class Rewriting(Writing):
    """Text from text, by an encoder and a decoder: `text` is read, `label` written; or all of `messages` but the last, which is written."""

    task_type: ClassVar[TaskType] = TaskType.SEQ_2_SEQ_LM
    auto: ClassVar[Any] = AutoModelForSeq2SeqLM
    shift: ClassVar[int] = 0

    def _row(self, base: FrozenBase, tokenizer: PreTrainedTokenizerBase, row: Example) -> Features:
        if not (messages := _messages(row)):
            return _inputs(base.encode([self.prompt(row.text)])[0]) | {"labels": base.encode_answer(row.label or "")}
        ids = _asked(base, messages[:-1], base.max_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": base.encode_answer(self.written(row))}


def task_of(task_type: str, problem_type: str | None) -> type[Task]:
    """The task of PEFT's and transformers' names. Raises InvalidInput."""
    tasks: tuple[type[Task], ...] = (Task, Several, Number, Spans, Writing, Rewriting)
    for one in tasks:
        if one.task_type == task_type and (problem_type is None or one.problem_type == problem_type):
            return one
    names = ", ".join(f"{one.task_type} ({one.problem_type})" if one.problem_type else str(one.task_type) for one in tasks)
    shown = f"task_type={str(task_type)!r}" + (f" with problem_type={str(problem_type)!r}" if problem_type else "")
    raise InvalidInput(f"{shown} cannot be trained.", hint=f"There are: {names}.")


def check_template(template: object) -> None:
    """Raises InvalidInput for what is no prompt template."""
    if template is None or (isinstance(template, str) and template.count("{text}") == 1):
        return
    shown = repr(template[:60]) if isinstance(template, str) else type(template).__name__
    raise InvalidInput(f"the prompt template {shown} does not hold {{text}} once.", hint='As in "Sentiment of: {text}".')


def label_at(row: Example, start: int, end: int) -> str:
    """What a token of `text[start:end]` should be told: the label of the first span that it touches. It may begin with the space before its word."""
    return next((span["label"] for span in row.extra["spans"] if span["start"] < end and start < span["end"]), OUTSIDE)


def _inputs(ids: Encoded) -> Features:
    return {key: list(ids.ids[key]) for key in MODEL_INPUTS}


def _messages(row: Example) -> list[tuple[str, str]]:
    """(role, content); none where the row is no conversation."""
    return [(one["role"], one["content"]) for one in row.extra.get("messages", ())]


def _asked(base: FrozenBase, messages: Sequence[tuple[str, str]], room: int) -> list[int]:
    """Token ids of a conversation as the engine asks it: of one that is too long, what it asks instead."""

    def encoded(some: Conversation) -> Encoded:
        return base.encode_chat(some.messages)

    conversation = Conversation(tuple(messages))
    ids = encoded(conversation)
    try:
        return list((ids if len(ids) <= room else shortened(conversation, encoded, room)).ids["input_ids"])
    except InvalidInput as error:    # the engine would not answer it either
        fact = f"the conversation that ends with {conversation.question[:60]!r} cannot be learned: {error.fact}"
        raise InvalidInput(fact, hint="Shorten what the system is told there, or leave the row out.") from None


def _chat(base: FrozenBase, tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of what comes before the answer, as the engine asks, and of the answer as the chat template ends it."""
    prompt = list(base.encode_chat(messages[:-1]).ids["input_ids"])
    said = [{"role": role, "content": content} for role, content in messages]
    found: Any = tokenizer.apply_chat_template(said, return_dict=True, sanitize_control_tokens=True, truncation=False)
    whole = list(found["input_ids"])
    # A template that writes the answer otherwise than it asks for one: the answer's own tokens are what is generated.
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt and len(whole) > len(prompt) else base.encode_answer(messages[-1][1])
    return prompt, answer


def _check(rows: Sequence[Example], validation: Sequence[Example] | None, kind: type[Task]) -> None:
    if len(rows) < 2:
        raise InvalidInput(f"{counted(len(rows), 'training row is', 'training rows are')} too few.", hint="Give at least two.")
    if validation is not None and not validation:
        raise InvalidInput("the validation rows are empty.", hint="Leave validation out: then some training rows are held out.")
    for what, part in (("training", rows), ("validation", validation or ())):
        check_targets(part, what, kind.fields)
        for position, row in enumerate(part, 1):
            reason = f"has a text that {text_fault(row.text)}" if text_fault(row.text) else kind.fault(row)
            if reason:
                raise InvalidInput(f"{what} row {position} {reason}.", hint="Remove it or write what is missing.")


def _check_known(validation: Sequence[Example] | None, labels_of: Any, known: Sequence[str]) -> None:
    for position, row in enumerate(validation or (), 1):
        for label in labels_of(row):
            if label not in known:
                fact = f"validation row {position} has the label {label!r}, which no training row has"
                raise InvalidInput(f"{fact}.", hint=f"Labels to learn: {', '.join(known[:10])}.")
