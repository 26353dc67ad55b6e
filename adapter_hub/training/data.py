"""What a classifier is trained on: rows checked, labels named and ordered, validation held out. Near-duplicates are
`report`'s to find. No torch, no files."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from adapter_hub.errors import InvalidInput, counted
from adapter_hub.examples import Example, check_targets, text_fault
from adapter_hub.training.report import AS_NUMBERS, asked, equal_texts, near_duplicates, seem_numbers

ROWS_WORTH_SPLITTING = 4    # a label with fewer rows keeps them all for training, as far as others make up the share
ROWS_ABOVE = 10             # that may be held out beyond the share, so that labels of few rows have one


def task_seed(seed: int, task: str, labels: Sequence[str]) -> int:
    """The seed of one task, 0 to 2³¹ − 1. It knows the task, not the run: adding a task never changes another's weights."""
    digest = hashlib.sha256("\x00".join([str(seed), task, *labels]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def check_rows(rows: Sequence[Example], what: str = "training") -> tuple[str, ...]:
    """The labels of the rows, sorted. Raises InvalidInput with the position (from 1) of the first row that will not do."""
    if len(rows) < 2:
        few = counted(len(rows), f"{what} row is", f"{what} rows are")
        raise InvalidInput(f"{few} too few.", hint="Give at least two rows with different labels.")
    check_targets(rows, what, ("label",))
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
        check_targets(validation, "validation", ("label",))
        for position, row in enumerate(validation, 1):
            reason = text_fault(row.text)
            if reason or row.label not in labels:
                unknown = f"has the label {row.label!r}, which no training row has" if row.label else "has no label"
                fact = f"has a text that {reason}" if reason else unknown
                hint = f"Labels to learn: {', '.join(labels[:10])}.{_numbers_hint(list(map(label_of, rows)))}"
                raise InvalidInput(f"validation row {position} {fact}.", hint=hint)
    return labels


def label_of(row: Example) -> str:
    return row.label or ""


def check_held_out(rows: Sequence[Example], stratum: Callable[[Example], str] = label_of) -> None:
    """Raises InvalidInput where no row can be held out: those that read the same are all that a label has."""
    names = list(map(stratum, rows))
    counts = Counter(names)
    hint = f"Give validation rows, or more training rows.{_numbers_hint(names)}"
    if max(counts.values(), default=0) < 2:
        raise InvalidInput("every label has one row, none can be held out.", hint=hint)
    takes = _takes(equal_texts(list(map(asked, rows))), names)
    if not any(_leaves_all(taken, counts) for taken in takes.values()):
        all_of_it = "every label has" if len(counts) > 1 else "all rows have"
        raise InvalidInput(f"{all_of_it} one text, repeated: none can be held out.", hint=hint)


def _numbers_hint(labels: Sequence[str]) -> str:
    return f" Or are the labels numbers? {AS_NUMBERS}." if seem_numbers(Counter(labels)) else ""


def hold_out(
    rows: Sequence[Example], share: float, seed: int, stratum: Callable[[Example], str] = label_of
) -> tuple[list[Example], list[Example]]:
    """(training, validation): of each label (or other `stratum`) `share` of its rows, rounded, at least one, never all. Order is kept.

    All together may be `share` of all rows, or what the labels add up to whose share is a row or more, since each is rounded; and ROWS_ABOVE
    rows, or as many again, beyond. Where one of each label would be more, labels of the fewest rows keep theirs. Near-duplicates stay on one
    side, whatever their labels; groups that are too large for what is to be held out are trained on, and with them half of the label's other
    rows. Only where all groups are, those stay together that read the same, however many. Raises InvalidInput when no row can be held out.
    """
    check_held_out(rows, stratum)
    names, texts = list(map(stratum, rows)), list(map(asked, rows))
    counts = Counter(names)
    wanted = {label: min(count - 1, max(1, math.floor(count * share + 0.5))) for label, count in counts.items()}
    total = max(1, math.floor(len(rows) * share + 0.5), sum(wanted[label] for label, count in counts.items() if count * share >= 1))
    most = total + min(total, ROWS_ABOVE)
    # Each label draws from its own generator: a new label does not reshuffle the others.
    generators = {label: random.Random(f"{seed}\x00{label}") for label in counts}
    drawn = {label: generators[label].sample(positions, len(positions)) for label, positions in _members(names).items()}
    order = sorted(counts, key=lambda label: (-counts[label], generators[label].random()))
    few = min(ROWS_WORTH_SPLITTING, counts[order[0]])
    room = {label: total if counts[label] < few else most for label in order}
    for groups, smallest_max in ((near_duplicates(texts), most), (equal_texts(texts), len(rows))):
        takes = _takes(groups, names)
        draws = [(label, groups[position]) for label in order for position in drawn[label] if _leaves_all(takes[groups[position]], counts)]
        # Where most rows stand in groups too large to go, training keeps half of the others.
        loose = Counter(label for label, group in draws if takes[group][label] <= _closely(wanted[label]))
        fewer = {label: min(rows, math.ceil(loose[label] * max(share, 0.5))) or rows for label, rows in wanted.items()}
        chosen = _chosen(draws, takes, counts, fewer, room)
        if not chosen:
            smallest = min((group for _, group in draws), key=lambda group: takes[group].total(), default=None)
            chosen = {smallest} if smallest is not None and takes[smallest].total() <= smallest_max else set()
        if chosen:
            break
    train = [row for row, group in zip(rows, groups, strict=True) if group not in chosen]
    return train, [row for row, group in zip(rows, groups, strict=True) if group in chosen]


def _chosen(
    draws: Sequence[tuple[str, int]],
    takes: Mapping[int, Counter[str]],
    counts: Mapping[str, int],
    wanted: Mapping[str, int],
    room: Mapping[str, int],
) -> set[int]:
    """The groups to hold out, of (label, group) in the order in which they are drawn, until each label has what is `wanted` of it.

    A group that has far more of a label than is wanted of it is passed over, unless the label would have none; `room` is how many rows in all
    may be held out when it is the label's turn.
    """
    chosen: set[int] = set()
    held: Counter[str] = Counter()
    total = 0
    closely, twice = ({label: limit(number) for label, number in wanted.items()} for limit in (_closely, lambda number: 2 * number))
    for goal, limit in ((wanted, closely), (dict.fromkeys(wanted, 1), twice)):
        for label, group in draws:
            taken = takes[group]
            if held[label] < goal[label] and group not in chosen and total + taken.total() <= room[label]:
                if all(held[name] + rows <= min(limit[name], counts[name] - 1) for name, rows in taken.items()):
                    chosen.add(group)
                    held.update(taken)
                    total += taken.total()
    return chosen


def _closely(wanted: int) -> int:
    """So many rows are near enough to those wanted."""
    return wanted + wanted // 5


def _takes(groups: Sequence[int], names: Sequence[str]) -> dict[int, Counter[str]]:
    """For each group how many rows of which labels it has."""
    found: dict[int, Counter[str]] = {}
    for group, name in zip(groups, names, strict=True):
        found.setdefault(group, Counter())[name] += 1
    return found


def _leaves_all(taken: Mapping[str, int], counts: Mapping[str, int]) -> bool:
    """Whether every label keeps a row."""
    return all(one < counts[name] for name, one in taken.items())


def _members(names: Sequence[str]) -> dict[str, list[int]]:
    """Of each name its positions."""
    members: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        members.setdefault(name, []).append(position)
    return members


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
