"""What a classifier is trained on: rows checked, labels named and ordered, validation held out. Near-duplicates are
`report`'s to find. No torch, no files."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapter_hub.errors import InvalidInput
from adapter_hub.examples import Example, text_fault
from adapter_hub.training.report import equal_texts, near_duplicates

ROWS_WORTH_SPLITTING = 4    # a label with fewer rows keeps them all for training, if any other label can spare one


def task_seed(seed: int, task: str, labels: Sequence[str]) -> int:
    """The seed of one task, 0 to 2³¹ − 1. It knows the task, not the run: adding a task never changes another's weights."""
    digest = hashlib.sha256("\x00".join([str(seed), task, *labels]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def check_rows(rows: Sequence[Example], what: str = "training") -> tuple[str, ...]:
    """The labels of the rows, sorted. Raises InvalidInput with the position (from 1) of the first row that will not do."""
    if len(rows) < 2:
        raise InvalidInput(f"{len(rows)} {what} rows are too few.", hint="Give at least two rows with different labels.")
    labels: set[str] = set()
    for position, row in enumerate(rows, 1):
        if reason := text_fault(row.text):
            raise InvalidInput(f"{what} row {position} has a text that {reason}.", hint="Remove it or write its text.")
        if row.label is None or not row.label.strip():
            raise InvalidInput(f"{what} row {position} has no label.", hint='A row to learn from is {"text": …, "label": …}.')
        labels.add(row.label)
    return tuple(sorted(labels))


def check_task(rows: Sequence[Example], validation: Sequence[Example] | None) -> tuple[str, ...]:
    """The labels to learn, sorted. Raises InvalidInput: one class only, or a validation label that training lacks."""
    labels = check_rows(rows)
    if len(labels) < 2:
        raise InvalidInput(f"all {len(rows)} training rows have the label {labels[0]!r}.", hint="A classifier needs two labels or more.")
    if validation is not None:
        if not validation:
            raise InvalidInput("the validation rows are empty.", hint="Leave validation out: then some training rows are held out.")
        for position, row in enumerate(validation, 1):
            reason = text_fault(row.text)
            if reason or row.label not in labels:
                unknown = f"has the label {row.label!r}, which no training row has" if row.label else "has no label"
                fact = f"has a text that {reason}" if reason else unknown
                raise InvalidInput(f"validation row {position} {fact}.", hint=f"Labels to learn: {', '.join(labels[:10])}.")
    return labels


def label_of(row: Example) -> str:
    return row.label or ""


def hold_out(
    rows: Sequence[Example], share: float, seed: int, stratum: Callable[[Example], str] = label_of
) -> tuple[list[Example], list[Example]]:
    """(training, validation): of each label (or other `stratum`) `share` of its rows, at least one, never all. Order is kept.

    Near-duplicates stay on one side; where a label's rows are all alike, only those that read the same do, and where they all read the
    same, none is held out. Raises InvalidInput when there is no label of which a row can be.
    """
    by_label: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        by_label.setdefault(stratum(row), []).append(position)
    rows_max = max(len(positions) for positions in by_label.values())
    if rows_max < 2:
        raise InvalidInput("every label has one row, none can be held out.", hint="Give validation rows, or more training rows.")
    texts = list(map(_asked, rows))
    alike = _members(near_duplicates(texts))
    equal = _members(equal_texts(texts))
    left = {label: len(positions) for label, positions in by_label.items()}
    chosen: set[int] = set()
    for label in sorted(by_label):
        positions = by_label[label]
        if len(positions) < min(rows_max, ROWS_WORTH_SPLITTING):
            continue
        count = min(len(positions) - 1, max(1, math.floor(len(positions) * share + 0.5)))
        # Each label draws from its own generator: a new label does not reshuffle the others.
        order = random.Random(f"{seed}\x00{label}").sample(positions, len(positions))
        for groups in (alike, equal):
            found = 0
            for position in order:
                group = groups[position]
                takes = Counter(stratum(rows[member]) for member in group)
                fits = found + takes[label] <= count or (not found and takes[label] <= max(2, 2 * count))
                if found < count and position not in chosen and fits and all(left[name] > taken for name, taken in takes.items()):
                    chosen.update(group)
                    left.update({name: left[name] - taken for name, taken in takes.items()})
                    found += takes[label]
            if found:
                break
    if not chosen:
        raise InvalidInput("every label has one text, repeated: none can be held out.", hint="Give validation rows, or more training rows.")
    train = [row for position, row in enumerate(rows) if position not in chosen]
    return train, [row for position, row in enumerate(rows) if position in chosen]


def _asked(row: Example) -> str:
    """The text that must not stand on both sides: of a conversation all that goes before the answer."""
    messages = row.extra.get("messages")
    return "\n".join(str(one["content"]) for one in messages[:-1]) if messages else row.text


def _members(groups: Sequence[int]) -> list[list[int]]:
    """For each position those of its group, itself among them."""
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return [members[group] for group in groups]


class Parts(NamedTuple):
    """Which rows do what. The best of many epochs is flattered by the rows that chose it, so others measure it."""

    train: Sequence[Example]
    choice: Sequence[Example]        # tell which epoch is kept; the training rows, where there are too few for rows of their own
    validation: Sequence[Example]    # tell how good it is


def split(
    rows: Sequence[Example],
    validation: Sequence[Example] | None,
    share: float,
    seed: int,
    stratum: Callable[[Example], str] = label_of,
) -> Parts:
    """Given validation rows choose and measure by halves; without any, `share` of each label is held out for the one and for the other.

    Raises InvalidInput when no label has a second row.
    """
    if validation is None:
        rest, measuring = hold_out(rows, share, seed, stratum)
        try:
            return Parts(*hold_out(rest, share, seed, stratum), measuring)
        except InvalidInput:
            return Parts(rest, rest, measuring)
    try:
        return Parts(rows, *hold_out(validation, 0.5, seed, stratum))
    except InvalidInput:
        return Parts(rows, rows, validation)
