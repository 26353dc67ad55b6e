"""What kinds of task are learned, and how good one answer of each is: right or wrong, or a score of which the higher is the better.

`gate` compares by rows that one of two wins, so every kind needs no more than a number a row. `training.tasks` says what a row's target is.
"""

# n rows

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.chat import Conversation
from adapter_hub.continual.gate import Paired
from adapter_hub.engine.engine import Engine, Likelihood, Output, Request, TokenLabel
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.manifest import Manifest
from adapter_hub.training.tasks import Number, Several, Spans, Task, Writing, check_template, label_at, task_of

Answer = Output | Likelihood
Answers = Mapping[str, Answer]    # by `Measure.key` of the row

NATS_LEAST = 0.02         # a token: texts that are so much likelier, one percent in fifty, are not told from one another
DEVIATIONS_LEAST = 0.02   # standard deviations of the training rows' numbers, likewise
ROWS_APART = 1.5          # between training and use: one may go either way by rounding
TOKENS_APART = 0.01       # share of the tokens, likewise
ERRORS_APART = 0.05       # of the larger of mean error and spread, likewise
NATS_APART = 0.02         # times one more than the loss, likewise


@dataclass(frozen=True, slots=True)
class Kind:
    """What a version gives, in PEFT's and transformers' words, and the template around its inputs."""

    task_type: str | None = TaskType.SEQ_CLS
    problem_type: str | None = ProblemType.SINGLE    # of SEQ_CLS
    prompt_template: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        headed = manifest.task_type == TaskType.SEQ_CLS
        template = None if manifest.prompt_template == "{text}" else manifest.prompt_template
        return cls(manifest.task_type, (manifest.problem_type or ProblemType.SINGLE) if headed else None, template)

    @classmethod
    def wanted(cls, task_type: str | None, problem_type: str | None, prompt_template: str | None, known: Kind | None = None) -> Self:
        """What is asked for; of what is not said, what is `known`, else one label among several. Raises InvalidInput for what is not trained."""
        check_template(prompt_template)
        if task_type is None and problem_type is None and known is not None and known.trainable:
            task_type, problem_type = known.task_type, known.problem_type
        task = task_of(task_type or TaskType.SEQ_CLS, problem_type)
        if prompt_template is None and known is not None and known.trainable and known.task is task:
            prompt_template = known.prompt_template
        return cls(task.task_type, task.problem_type, None if prompt_template == "{text}" else prompt_template)

    def __str__(self) -> str:
        template = "" if self.prompt_template is None else f" with the prompt template {self.prompt_template[:60]!r}"
        return f"{self.task_type or 'an embedding'}{f' ({self.problem_type})' if self.problem_type else ''}{template}"

    @property
    def trainable(self) -> bool:
        try:
            return bool(self.task)
        except InvalidInput:
            return False

    @property
    def task(self) -> type[Task]:
        """Raises InvalidInput where there is none."""
        return task_of(self.task_type or "", self.problem_type)

    @property
    def writes(self) -> bool:
        return self.trainable and issubclass(self.task, Writing)

    @property
    def measure(self) -> Measure:
        task = self.task
        found: tuple[tuple[type[Task], type[Measure]], ...] = ((Several, OfSets), (Number, OfNumbers), (Spans, OfTokens), (Writing, OfTexts))
        return next((measure for one, measure in found if issubclass(task, one)), Measure)(self)

    def knows(self, row: Example, labels: Sequence[str]) -> bool:
        """Whether a row has a target of this kind, and none but these labels in it."""
        return self.trainable and self.task.fault(row) is None and set(self.task.named(row)) <= set(labels)

    def routed(self, rows: Sequence[Example]) -> list[Example]:
        """The rows as the router meets them: a number, or a text to write, is no class of inputs."""
        single = self.task is Task
        return [row if single or row.label is None else Example(row.text, id=row.id) for row in rows]


ONE_LABEL = Kind()


@dataclass(frozen=True, slots=True)
class Measure:
    """Of one label among several: right or wrong."""

    kind: Kind

    words: ClassVar[str] = ""     # what a mean of the scores is called; of errors and nats without their sign
    best: ClassVar[float] = 1.0    # of all scores

    def key(self, row: Example) -> str:
        """What tells a row's answer from others."""
        return self.kind.task.key(row)

    def asked(self, engine: Engine, rows: Sequence[Example], adapter: AdapterRef | None) -> Answers:
        """What this version, or the base model, answers. Raises InvalidInput as `Engine.predict`."""
        found = {self.key(row): row for row in rows}
        outputs = engine.predict([Request(row.text, adapter) for row in found.values()])
        return dict(zip(found, outputs, strict=True))

    def finite(self, answer: Answer) -> bool:
        assert isinstance(answer, Output)
        return all(map(math.isfinite, answer.scores.values()))

    def score(self, row: Example, answer: Answer) -> float:
        assert isinstance(answer, Output)
        return float(answer.label == row.label)

    def scores(self, rows: Sequence[Example], answers: Answers) -> list[float]:
        return [self.score(row, answers[self.key(row)]) for row in rows]

    def paired(self, rows: Sequence[Example], candidate: Answers, reference: Answers, name: str, train: Sequence[Example]) -> Paired:
        """Their answers to `rows`; `train` are what the candidate was trained on."""
        return self._paired(name, self.scores(rows, candidate), self.scores(rows, reference), train)

    def _paired(self, name: str, mine: Sequence[float], theirs: Sequence[float], train: Sequence[Example]) -> Paired:
        if not self.words:
            return Paired(name, tuple(map(bool, mine)), tuple(map(bool, theirs)))
        return Paired.of_scores(name, mine, theirs, measure=self.words, least=self.least(train), best=self.best)

    def least(self, train: Sequence[Example]) -> float:
        """By how much two scores must differ for one to win."""
        return 0.0

    def beside_baseline(self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers) -> Paired:
        """The candidate's answers beside those of what it must beat whoever is in production: a constant answer, or the base model."""
        name, scores = self.baseline(rows, candidate, train, base)
        return self._paired(name, self.scores(rows, candidate), scores, train)

    def baseline(
        self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers
    ) -> tuple[str, list[float]]:
        """Who that is, in words, and its scores of `rows`."""
        (always, _), *_ = Counter(row.label for row in rows).most_common(1) or [(None, 0)]
        return "always answering the commonest label", [float(row.label == always) for row in rows]

    def unlike_training(self, rows: Sequence[Example], answers: Answers, metrics: Mapping[str, float]) -> str:
        """How the answers differ from what training measured on the same rows, in words; empty where they do not, or may for a reason."""
        # What is too long loses the end of the prompt in training, and less of its text in use.
        cut = any(isinstance(answer, Output) and answer.truncated for answer in answers.values())
        return "" if cut and self.kind.prompt_template is not None else self._unlike(rows, answers, metrics)

    def _unlike(self, rows: Sequence[Example], answers: Answers, metrics: Mapping[str, float]) -> str:
        right, trained = sum(self.right(row, answers[self.key(row)]) for row in rows), metrics["accuracy"] * len(rows)
        return _apart(right, trained, len(rows), ROWS_APART)

    def right(self, row: Example, answer: Answer) -> bool:
        return self.score(row, answer) == 1.0


class OfSets(Measure):
    """Of several labels: the overlap of those given and those wanted."""

    words: ClassVar[str] = "mean overlap of the labels"

    def score(self, row: Example, answer: Answer) -> float:
        assert isinstance(answer, Output)
        return _overlap(frozenset(answer.labels or ()), frozenset(Several.named(row)))

    def baseline(
        self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers
    ) -> tuple[str, list[float]]:
        sets = Counter(frozenset(Several.named(row)) for row in train or rows)
        always = min(sets, key=lambda one: (-sets[one], sorted(one)))
        return "always the commonest set of labels", [_overlap(always, frozenset(Several.named(row))) for row in rows]


class OfNumbers(Measure):
    """Of a number: how far it is off."""

    words: ClassVar[str] = "mean absolute error"
    best: ClassVar[float] = 0.0

    def finite(self, answer: Answer) -> bool:
        assert isinstance(answer, Output)
        return answer.value is not None and math.isfinite(answer.value)

    def score(self, row: Example, answer: Answer) -> float:
        assert isinstance(answer, Output)
        return -abs((math.nan if answer.value is None else answer.value) - _number(row))

    def least(self, train: Sequence[Example]) -> float:
        return DEVIATIONS_LEAST * float(np.std([_number(row) for row in train])) if train else 0.0

    def baseline(
        self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers
    ) -> tuple[str, list[float]]:
        mean = float(np.mean([_number(row) for row in train or rows]))
        return "always the mean of the training rows", [-abs(mean - _number(row)) for row in rows]

    def _unlike(self, rows: Sequence[Example], answers: Answers, metrics: Mapping[str, float]) -> str:
        found, trained = -float(np.mean(self.scores(rows, answers))), metrics["mae"]
        numbers = [_number(row) for row in rows]
        limit = ERRORS_APART * max(trained, float(np.std(numbers))) + 1e-4 * (1 + max(map(abs, numbers)))
        return "" if abs(found - trained) <= limit else f"in use its mean absolute error is {found:.4g}, {trained:.4g} in training"


class OfTokens(Measure):
    """Of labels of tokens: the share that is right."""

    words: ClassVar[str] = "share of tokens right"

    def finite(self, answer: Answer) -> bool:
        return all(math.isfinite(token.score) for token in _tokens(answer))

    def score(self, row: Example, answer: Answer) -> float:
        return _share([token.label == label_at(row, token.start, token.end) for token in _tokens(answer)])

    def baseline(
        self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers
    ) -> tuple[str, list[float]]:
        wanted = [[label_at(row, token.start, token.end) for token in _tokens(candidate[self.key(row)])] for row in rows]
        counts = Counter(label for labels in wanted for label in labels)
        always = min(counts, key=lambda label: (-counts[label], label), default="")
        return f"always the label {always!r}", [_share([label == always for label in labels]) for labels in wanted]

    def _unlike(self, rows: Sequence[Example], answers: Answers, metrics: Mapping[str, float]) -> str:
        pairs = [(row, token) for row in rows for token in _tokens(answers[self.key(row)])]
        right = sum(token.label == label_at(row, token.start, token.end) for row, token in pairs)
        return _apart(right, metrics["accuracy"] * len(pairs), len(pairs), max(ROWS_APART, TOKENS_APART * len(pairs)), "tokens of validation rows")


class OfTexts(Measure):
    """Of text: how surely what is wanted is written."""

    words: ClassVar[str] = "nats a token"
    best: ClassVar[float] = 0.0

    def asked(self, engine: Engine, rows: Sequence[Example], adapter: AdapterRef | None) -> Answers:
        found, task = {self.key(row): row for row in rows}, self._task
        requests = [Request(self._input(row, adapter), adapter) for row in found.values()]
        return dict(zip(found, engine.score(requests, [task.written(row) for row in found.values()]), strict=True))

    @property
    def _task(self) -> type[Writing]:
        task = self.kind.task
        assert issubclass(task, Writing)
        return task

    def _input(self, row: Example, adapter: AdapterRef | None) -> str | Conversation:
        if self._task.conversing([row]):    # as in training, whatever its roles are
            return Conversation(tuple((one["role"], one["content"]) for one in row.extra["messages"][:-1]))
        template = self.kind.prompt_template
        return row.text if adapter is not None or template is None else template.replace("{text}", row.text)

    def finite(self, answer: Answer) -> bool:
        assert isinstance(answer, Likelihood)
        return math.isfinite(answer.nats)

    def score(self, row: Example, answer: Answer) -> float:
        assert isinstance(answer, Likelihood)
        return -answer.nats / max(1, answer.tokens)

    def least(self, train: Sequence[Example]) -> float:
        return NATS_LEAST

    def baseline(
        self, rows: Sequence[Example], candidate: Answers, train: Sequence[Example], base: Answers
    ) -> tuple[str, list[float]]:
        return "the base model", self.scores(rows, base)

    def _unlike(self, rows: Sequence[Example], answers: Answers, metrics: Mapping[str, float]) -> str:
        # A chat template may end an answer otherwise than it is scored; whether a prompt was cut, a likelihood does not say.
        if self._task.conversing(rows) or self.kind.prompt_template is not None:
            return ""
        found = [answer for row in rows if isinstance(answer := answers[self.key(row)], Likelihood)]
        loss, trained = sum(one.nats for one in found) / max(1, sum(one.tokens for one in found)), metrics["loss"]
        return "" if abs(loss - trained) <= NATS_APART * (1 + trained) else f"in use it needs {loss:.3f} nats a token, {trained:.3f} in training"


def _apart(right: float, trained: float, count: int, limit: float, what: str = "validation rows") -> str:
    return f"in use it answers {right} of {count} {what} rightly, {trained:.0f} in training" if abs(right - trained) > limit else ""


def _overlap(given: frozenset[str], wanted: frozenset[str]) -> float:
    """Jaccard's; of two empty sets 1."""
    return len(given & wanted) / len(given | wanted) if given | wanted else 1.0


def _number(row: Example) -> float:
    return float(row.label or "")


def _tokens(answer: Answer) -> Sequence[TokenLabel]:
    assert isinstance(answer, Output)
    return answer.tokens or ()


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else 1.0
