"""Evaluate: a hub is asked labelled rows, and its answers become figures, by adapter and over all.

A row's target is where training has it: `label` (a label, a number, the text to write), the lists `labels` and `spans`, or the end of
`messages`.
Every adapter is measured twice. *oracle* is what it answers when it is named; *routed* what came when nobody named one: of its rows,
whoever answered them. One that the router never chooses, as what is not in production, is measured as oracle alone: nobody asks it otherwise,
and a routed figure of its rows would be either its own answers again, another's, or a fault of the router's that is none. Numbers are
`training.evaluate`'s.
"""

# n rows, c labels

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.answering import checked_ask, checked_rate, contest, or_raise, requests_of, route, router_at
from adapter_hub.arguments import rows_of, texts_of
from adapter_hub.chat import Conversation
from adapter_hub.engine.engine import Likelihood
from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, digest_of, measuring, text_fault
from adapter_hub.prediction import Prediction
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.layout import EVALUATION_FILE, EXEMPLARS_FILE
from adapter_hub.registry.manifest import Manifest
from adapter_hub.routing.decision import Decision
from adapter_hub.routing.live import ROUTING_FILE
from adapter_hub.training.evaluate import (
    OUTSIDE,
    check_text_packages,
    label_metrics,
    mean_metrics,
    number_metrics,
    perplexity,
    same_text,
    sets_metrics,
    spans_metrics,
    spans_of,
    text_metrics,
    token_hits,
    trimmed,
)

if TYPE_CHECKING:
    from adapter_hub.hub import Hub
    from adapter_hub.routing.router import Router


LABELS_SHOWN = 5    # of those that an adapter does not know


class Kind(StrEnum):
    """What an adapter gives, and so what the target of its rows is."""

    LABEL = "label"      # one of its head's
    LABELS = "labels"    # any of them
    NUMBER = "number"
    SPANS = "spans"
    TEXT = "text"        # that it writes
    VECTOR = "vector"    # nothing to compare with: only where its rows go is measured


_WANTED = {
    Kind.LABEL: "a label",
    Kind.LABELS: "a list `labels`",
    Kind.NUMBER: "a number as its label",
    Kind.SPANS: "a list `spans` of {start, end, label} within its text",
    Kind.TEXT: "a label, the text to write",
}


@dataclass(frozen=True, slots=True)
class Task:
    """Of one version."""

    kind: Kind
    labels: tuple[str, ...] = ()    # of its head
    chats: bool = False             # it goes on with conversations, in the chat template

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        labels = manifest.labels or ()
        if manifest.task_type == TaskType.SEQ_CLS:
            kinds = {ProblemType.MULTI: Kind.LABELS, ProblemType.REGRESSION: Kind.NUMBER}
            return cls(kinds.get(ProblemType(manifest.problem_type or ProblemType.SINGLE), Kind.LABEL), labels)
        kinds_of = {TaskType.TOKEN_CLS: Kind.SPANS, TaskType.CAUSAL_LM: Kind.TEXT, TaskType.SEQ_2_SEQ_LM: Kind.TEXT}
        kind = kinds_of.get(TaskType(manifest.task_type), Kind.VECTOR) if manifest.task_type else Kind.VECTOR
        return cls(kind, labels, kind is Kind.TEXT and manifest.prompt_template is None)

    def asked(self, row: Example) -> str | Conversation:
        """What it is asked: where a row is a conversation and it goes on with such, what was said before the answer."""
        said = _said(row) if self.chats else ()
        return Conversation(said[:-1]) if said else row.text

    def target(self, row: Example) -> Any:
        """None where the row has none of this kind."""
        if self.kind is Kind.LABELS:
            labels = row.extra.get("labels")
            return frozenset(labels) if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else None
        if self.kind is Kind.SPANS:
            return _spans(row)
        if self.kind is Kind.NUMBER:
            try:
                return number if math.isfinite(number := float(row.label or "")) else None
            except ValueError:
                return None
        if self.kind is Kind.TEXT and self.chats and (said := _said(row)):
            return said[-1][1]
        return None if self.kind is Kind.VECTOR or (self.kind is Kind.TEXT and text_fault(row.label)) else row.label

    def unknown(self, row: Example) -> frozenset[str]:
        """The labels of its target that the head has not: no answer can have them."""
        target = self.target(row) if self.labels and self.kind in (Kind.LABEL, Kind.LABELS, Kind.SPANS) else None
        if target is None:
            return frozenset()
        wanted = {target} if self.kind is Kind.LABEL else {span[2] for span in target} if self.kind is Kind.SPANS else target
        tagged = (label[2:] for label in self.labels if self.kind is Kind.SPANS and label[:2] in ("B-", "I-"))
        return frozenset(wanted).difference(self.labels, tagged)

    def right(self, row: Example, answer: Prediction) -> bool | None:
        """Whether the whole answer is right; None where that is no question: of numbers, and of rows without a target."""
        target = self.target(row)
        if target is None or self.kind is Kind.NUMBER:
            return None
        if self.kind is Kind.LABEL:
            return bool(answer.label == target)
        if self.kind is Kind.LABELS:
            return answer.labels is not None and frozenset(answer.labels) == target
        if self.kind is Kind.SPANS:
            return answer.tokens is not None and self._found(row, answer) == target
        return same_text(answer.text, target)

    def metrics(self, answered: Sequence[Answered], *, routed: bool) -> dict[str, float]:
        """Of its rows that have a target; nothing where none has."""
        mine = [one for one in answered if self.target(one.row) is not None]
        if not mine:
            return {}
        targets = [self.target(one.row) for one in mine]
        answers = [one.routed if routed or one.named is None else one.named for one in mine]
        if self.kind is Kind.LABEL:
            return label_metrics([answer.label for answer in answers], targets, self.labels)
        if self.kind is Kind.LABELS:
            return self._of_sets(mine, answers, targets)
        if self.kind is Kind.NUMBER:
            pairs = [(answer.value, target) for answer, target in zip(answers, targets, strict=True) if answer.value is not None]
            share = {"answered": len(pairs) / len(mine)}    # by a number: whoever gives none is not so and so far off
            return number_metrics(*np.array(pairs, dtype=np.float64).T) | share if pairs else share
        if self.kind is Kind.SPANS:
            return self._of_spans(mine, answers, targets)
        found = text_metrics([answer.text or "" for answer in answers], targets)
        nats, tokens = (sum(getattr(one.likelihood, what) for one in mine if one.likelihood) for what in ("nats", "tokens"))
        return found | ({"perplexity": perplexity(nats, tokens)} if tokens and not routed else {})

    def _of_sets(self, mine: Sequence[Answered], answers: Sequence[Prediction], targets: Sequence[frozenset[str]]) -> dict[str, float]:
        known = list(dict.fromkeys([*self.labels, *sorted(frozenset().union(*targets))]))
        given = [frozenset(answer.labels or ()) for answer in answers]
        mine_of, theirs = (np.array([[label in row for label in known] for row in rows], dtype=bool) for rows in (given, targets))
        # Who gave no labels at all did not say that there are none.
        right = [bool(self.right(one.row, answer)) for one, answer in zip(mine, answers, strict=True)]
        return sets_metrics(mine_of, theirs) | {"accuracy": float(np.mean(right))}

    def _of_spans(self, mine: Sequence[Answered], answers: Sequence[Prediction], targets: Sequence[Any]) -> dict[str, float]:
        found = spans_metrics([self._found(one.row, answer) for one, answer in zip(mine, answers, strict=True)], targets)
        hits: list[bool] = []
        for one, answer, target in zip(mine, answers, targets, strict=True):
            tokens = [(token.start, token.end, token.label) for token in answer.tokens or ()]
            if answer.tokens is None and one.named is not None:    # none of its tokens is right
                tokens = [(token.start, token.end, None) for token in one.named.tokens or ()]
            hits += token_hits(tokens, target, self.labels)
        return found | ({"token_accuracy": float(np.mean(hits))} if hits else {})

    def _found(self, row: Example, answer: Prediction) -> frozenset[Any]:
        return spans_of([(token.start, token.end, token.label) for token in answer.tokens or ()], row.text, self.labels)


@dataclass(frozen=True, slots=True)
class Answered:
    """A row and what was answered to it."""

    row: Example
    routed: Prediction
    named: Prediction | None = None             # by the adapter whose row it is; None where the row names none
    likelihood: Likelihood | None = None        # of the target under that adapter, where it writes


def _spans(row: Example) -> frozenset[Any] | None:
    try:
        spans = [(span["start"], span["end"], span["label"]) for span in row.extra["spans"]]
        whole = all(type(start) is type(end) is int and isinstance(label, str) for start, end, label in spans)
        inside = whole and all(0 <= start < end <= len(row.text) for start, end, _ in spans)
    except (KeyError, TypeError):
        return None
    return frozenset(trimmed(span, row.text) for span in spans if span[2] != OUTSIDE) if inside else None


def _said(row: Example) -> tuple[tuple[str, str], ...]:
    """(role, content) of a conversation that an assistant's message ends; else nothing."""
    try:
        said = tuple((str(one["role"]), str(one["content"])) for one in row.extra["messages"])
    except (KeyError, TypeError):
        return ()
    return said if len(said) > 1 and said[-1][0] == "assistant" and not any(text_fault(said[at][1]) for at in (-2, -1)) else ()


def check_packages(tasks: Iterable[Task]) -> None:
    """Raises InvalidInput where texts are to be measured and a package for it is not installed."""
    if any(task.kind is Kind.TEXT for task in tasks):
        check_text_packages()


def check_rows(rows: Sequence[Example], homes: Sequence[AdapterRef | None], tasks: Mapping[AdapterRef, Task]) -> None:
    """Raises InvalidInput for no rows, and with its position for one without the target that its adapter gives."""
    hint = 'Rows look like {"text": …, "label": …, "adapter": …}; instead of `label` also `labels` or `spans`, as in training.'
    if not rows:
        raise InvalidInput("evaluation needs rows, each with a label.", hint=hint)
    for position, (row, home) in enumerate(zip(rows, homes, strict=True), 1):
        task = tasks[home] if home else Task(Kind.LABEL)
        if task.kind is not Kind.VECTOR and task.target(row) is None:
            whose = f" of {home}" if home else ""
            raise InvalidInput(f"evaluation needs rows{whose}, each with {_WANTED[task.kind]}; row {position} has none.", hint=hint)


def check_answers(answering: Mapping[AdapterRef, Task]) -> None:
    """Raises InvalidInput where rows that name no adapter go to one that gives neither a label nor a text."""
    for ref, task in answering.items():
        if task.kind in (Kind.LABELS, Kind.NUMBER, Kind.SPANS):
            fact = f"{ref} gives {'spans' if task.kind is Kind.SPANS else 'several labels or a number'}"
            raise InvalidInput(f"{fact}: accuracy is of one label.", hint="Name the adapter of each row, in its field `adapter`.")


@dataclass(frozen=True, slots=True)
class Part:
    """What is left of rows that were measured together: all of one adapter's, or all that name none. Counts add up; answers are let go."""

    rows: int
    abstained: int
    measurable: int                     # rows whose whole answer can be right or wrong
    right: int                          # of those, as routed
    home: AdapterRef | None = None
    named_right: int = 0
    reached: int = 0                    # were routed to their adapter, in whatever version is in production
    by_name: bool = False               # the router never chooses `home`: its rows are in no routed figure
    figures: Mapping[str, Any] = field(default_factory=dict)    # of the adapter


def part_of(answered: Sequence[Answered], home: AdapterRef | None, task: Task, known: int = 0, *, by_name: bool = False) -> Part:
    """Of at least one row, all of `home`. `known` of them are its examples too; `by_name` is as in `Part`."""
    if home is None:
        right = [_same(one.row, one.routed) for one in answered]
        return Part(len(answered), _abstained(answered), len(right), sum(right))
    routed, named = ([task.right(one.row, answer) for one in answered if (answer := getattr(one, side))] for side in ("routed", "named"))
    reached = sum(one.routed.adapter is not None and one.routed.adapter.name == home.name for one in answered)
    abstained, measurable = _abstained(answered), sum(hit is not None for hit in routed)
    figures = _of_adapter(task, answered, by_name)
    figures |= {} if by_name else {"routing_accuracy": reached / len(answered), "abstained": abstained / len(answered)}
    figures |= {"digest": digest_of([one.row for one in answered])} | ({"known": known} if known else {}) | _unknown(task, answered)
    return Part(len(answered), abstained, measurable, routed.count(True), home, named.count(True), reached, by_name, figures)


def report(parts: Sequence[Part]) -> dict[str, Any]:
    """Of at least one part, each of another adapter: see `Hub.evaluate`."""
    routed = [part for part in parts if not part.by_name]

    def total(what: str, among: Sequence[Part] = routed) -> int:
        return sum(getattr(part, what) for part in among)

    facts: dict[str, Any] = {"rows": total("rows", parts)} | ({"accuracy": total("right") / total("measurable")} if total("measurable") else {})
    if routed:
        facts["abstained"] = total("abstained") / total("rows")
    if all(part.home for part in parts):
        if routed:
            facts["routing_accuracy"] = total("reached") / total("rows")
        if total("measurable", parts):
            facts["accuracy_named"] = total("named_right", parts) / total("measurable", parts)
        if "accuracy" in facts:
            facts["gap"] = total("named_right") / total("measurable") - facts["accuracy"]
    if by_name := facts["rows"] - total("rows"):
        facts["by_name"] = by_name
    if each := dict(sorted((part.home, part.figures) for part in parts if part.home)):
        sides = ("oracle", "routed")
        facts["mean_of_adapters"] = {side: mean_metrics(one[side] for one in each.values() if side in one) for side in sides}
        facts["adapters"] = {str(ref): dict(figures) for ref, figures in each.items()}
    return facts


def _of_adapter(task: Task, rows: Sequence[Answered], by_name: bool) -> dict[str, Any]:
    oracle, routed = (task.metrics(rows, routed=side) for side in (False, True))
    unlabelled = sum(task.target(one.row) is None for one in rows) if task.kind is not Kind.VECTOR else 0
    # Errors of numbers are over the rows that got one: over fewer rows than the oracle's they compare with nothing.
    compared = ("answered",) if routed.get("answered", 1.0) < 1 else oracle
    gap = {key: oracle[key] - routed[key] for key in compared if key in routed}
    facts = {"task": str(task.kind), "rows": len(rows), "oracle": oracle} | ({} if by_name else {"routed": routed, "gap": gap})
    return facts | ({"unlabelled": unlabelled} if unlabelled else {})


def _unknown(task: Task, rows: Sequence[Answered]) -> dict[str, Any]:
    """Rows that ask for a label which the adapter has not, and some of those labels; nothing where there are none."""
    found = [labels for one in rows if (labels := task.unknown(one.row))]
    return {"unknown_labels": {"rows": len(found), "labels": sorted(frozenset().union(*found))[:LABELS_SHOWN]}} if found else {}


def _same(row: Example, answer: Prediction) -> bool:
    return same_text(answer.text, row.label or "") if answer.text is not None else answer.label == row.label


def _abstained(rows: Sequence[Answered]) -> int:
    return sum(one.routed.adapter is None for one in rows)


# ---- ask a hub ------------------------------------------------------------------------------------------------------


def evaluate(
    hub: Hub,
    data: str | Path | Iterable[Mapping[str, Any] | Example] | None,
    names: Iterable[str] | None,
    max_false_reject: float | None,
    ask: int,
) -> dict[str, Any]:
    """See `Hub.evaluate`."""
    checked_ask(ask)
    wanted = None if names is None else texts_of("names", names)
    if wanted == ():
        raise InvalidInput("names is empty: nobody is to be measured.", hint="Name adapters, or leave `names` out.")
    groups: Iterable[tuple[AdapterRef | None, Sequence[Example]]]
    if data is None:
        refs = list(dict.fromkeys(hub.registry.production() if wanted is None else map(hub.registry.resolve, wanted)))
        manifests = (hub.registry.manifest(ref) for ref in refs)
        check_packages(Task.of(manifest) for manifest in manifests if EVALUATION_FILE in manifest.files)
        groups = ((ref, measuring(hub.kept(ref, EVALUATION_FILE))) for ref in refs)    # one set in memory at a time
    else:
        rows, homes = _placed(hub, rows_of(data), wanted)
        tasks = {ref: Task.of(hub.registry.manifest(ref)) for ref in homes if ref}
        check_rows(rows, homes, tasks)
        check_packages(tasks.values())
        by_home: dict[AdapterRef | None, list[Example]] = {None: []}    # first: who cannot answer them is found before the work
        for row, home in zip(rows, homes, strict=True):
            by_home.setdefault(home, []).append(row)
        groups = by_home.items()
    router, live, parts, without = router_at(hub, max_false_reject), frozenset(hub.registry.production()), [], []
    for home, group in groups:
        if group:
            by_name = home is not None and _by_name(hub, router, live, home)
            parts.append(_measured(hub, router, home, group, max_false_reject, ask, by_name))
        elif home:
            without.append(str(home))
    if not parts:
        whose = ", ".join(without) or "any adapter: none is in production"
        hint = 'Give rows (`--data FILE`). With keep = "text" in hub.toml, a version that is registered with evaluation= keeps its set.'
        raise InvalidInput(f"no evaluation set is kept of {whose}.", hint=hint)
    return report(parts) | ({"without": without} if data is None else {})


def _measured(
    hub: Hub, router: Router, home: AdapterRef | None, rows: Sequence[Example], max_false_reject: float | None, ask: int, by_name: bool
) -> Part:
    """Of the rows of one adapter, or of those that name none: what they are in figures. The answers are let go."""
    task = Task.of(hub.registry.manifest(home)) if home else Task(Kind.LABEL)
    texts = [row.text for row in rows]
    decisions = [Decision.named(home)] * len(rows) if by_name and home else route(hub, router, texts, 1, max_false_reject)    # no other way to it
    answering = [decision.adapter for decision in decisions]
    tasks: dict[AdapterRef | None, Task] = {ref: Task.of(hub.registry.manifest(ref)) for ref in (*answering, home) if ref}
    if home is None:
        check_answers({ref: one for ref, one in tasks.items() if ref})
    else:
        tasks[None] = Task(Kind.VECTOR, chats=hub.base.kind != "encoder")
    asked = list(dict.fromkeys([*enumerate(answering), *((i, home) for i, _ in enumerate(rows) if home)]))
    questions = [tasks[ref].asked(rows[i]) if home and task.chats else texts[i] for i, ref in asked]
    outputs = dict(zip(asked, hub.engine.predict(requests_of(hub, questions, [ref for _, ref in asked], True)), strict=True))
    writing = [i for i, row in enumerate(rows) if home and task.kind is Kind.TEXT and task.target(row) is not None]
    requests = requests_of(hub, [task.asked(rows[i]) for i in writing], [home] * len(writing), True)
    likelihoods = dict(zip(writing, hub.engine.score(requests, [task.target(rows[i]) for i in writing]), strict=True))
    routed = [Prediction.of(decisions[i], answering[i], outputs[i, answering[i]]) for i, _ in enumerate(rows)]
    if ask > 1 and not by_name:    # what writes is asked as its rows say, and nothing of it is judged
        judged = contest(hub, router, hub.encoder_of(router), texts, None, checked_rate(hub, max_false_reject), True, ask)
        single = [tasks[ref].kind is Kind.LABEL if ref else False for ref in answering]
        routed = [or_raise(judged[i]) if single[i] else one for i, one in enumerate(routed)]
    answered = [
        Answered(
            row,
            routed[i],
            Prediction.of(Decision.named(home), home, outputs[i, home]) if home else None,
            likelihoods.get(i),
        )
        for i, row in enumerate(rows)
    ]
    examples = {row.text for row in hub.kept(home, EXEMPLARS_FILE)} if home else set()
    return part_of(answered, home, task, known=sum(text in examples for text in texts), by_name=by_name)


def _by_name(hub: Hub, router: Router, live: Collection[AdapterRef], ref: AdapterRef) -> bool:
    """Whether the router is not to choose it, or knows nothing to choose it by. Of one that is damaged it should: its rows count as routed.

    What is retired, or gave way to a later version, the router does not know: `live` are those in production.
    """
    manifest = hub.registry.manifest(ref)
    unknown = ref not in live or (ref in router.versions and ref not in router.refs)
    return unknown or not manifest.routed or ROUTING_FILE not in manifest.files


def _placed(hub: Hub, rows: Sequence[Example], names: Sequence[str] | None) -> tuple[list[Example], list[AdapterRef | None]]:
    """(the rows that are measured, whose each is). With `names` those of these adapters; where no row says whose it is, all are the named one's.

    Raises AdapterNotFound, InvalidInput for a name that no row mentions.
    """
    said = [home if isinstance(home := row.extra.get("adapter"), str) and home else None for row in rows]
    resolve = cache(hub.registry.resolve)
    if names is None:
        return list(rows), [None if home is None else resolve(home) for home in said]
    alone = not any(said) and len({_bare(name) for name in names}) == 1    # also two versions of one name
    found: dict[tuple[int, AdapterRef], Example] = {}
    for name in names:
        hub.registry.aliases(_bare(name))
        mine = [i for i, home in enumerate(said) if alone or (home is not None and _is_of(home, name, resolve))]
        if not mine and rows:
            hint = "The field `adapter` of a row says whose it is; where no row has one and one adapter is named, all are its."
            raise InvalidInput(f"no row names the adapter {name!r}.", hint=hint)
        found |= {(i, resolve(name if alone or "@" in name else str(said[i]))): rows[i] for i in mine}
    return list(found.values()), [home for _, home in found]


def _bare(name: str) -> str:
    return name.partition("@")[0]


def _is_of(home: str, name: str, resolve: Callable[[str], AdapterRef]) -> bool:
    """Whether a row that says `home` is meant by `name`: of two versions both count."""
    return _bare(home) == _bare(name) and ("@" not in home or "@" not in name or resolve(home) == resolve(name))
