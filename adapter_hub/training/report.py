"""What is wrong with the rows: near-duplicates, contradictions, leaks between splits, imbalance. No torch, no files.

Near-duplicates are texts whose sets of character 3-grams are alike: Jaccard similarity of at least SIMILAR, found by MinHash in bands
(Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4) and then checked exactly.
"""

# n texts, g 3-grams of all texts together, k hashes

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_hub.errors import counted
from adapter_hub.examples import Example

SIMILAR = 0.85          # one word of ten differs
BANDS, BAND_HASHES = 16, 4    # finds 99.99 % of the pairs at SIMILAR
BUCKET_MAX = 64         # in a fuller bucket each row is compared with the first only
IMBALANCED = 3.0        # times the rows of the rarest label: said
HELD_OUT = 0.3          # of the rows not trained on: said
VALIDATION_FEW = 10     # fewer validation rows: said
SHOWN_MAX = 20          # examples of each fault that a report names
LABELS_SHOWN = 5        # in one warning
NUMBERS_LEAST = 5       # so many labels that are numbers, most of them of one row, are hardly classes
_PRIME = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One text with two labels or more, or other targets."""

    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relabelled:
    """One text, with the label (or other target) that the version before was taught, and the one that it has now."""

    text: str
    before: str
    now: str


@dataclass(frozen=True, slots=True)
class Leak:
    """A validation row whose text, or nearly so, is a training row's, too. Positions count from 1."""

    training_row: int
    validation_row: int
    text: str


@dataclass(frozen=True, slots=True)
class DataReport:
    """Facts about rows to learn from. Of each fault the first SHOWN_MAX are named, and all are counted."""

    rows: int
    rows_per_label: tuple[tuple[str, int], ...]    # rarest first; of one label among several, else empty
    duplicates: int                                # rows that repeat an earlier one with its label, nearly or word for word
    contradictions_count: int
    contradictions: tuple[Contradiction, ...]
    leaks_count: int                               # validation rows that training knows
    leaks: tuple[Leak, ...]
    held_out: int = 0                              # rows that choose the epoch and measure it instead of being trained on
    held_out_alike: int = 0                        # of them, near-duplicates of rows that are trained on
    choosing: int = 0                              # rows that choose the epoch, held out or given; 0 where those trained on do
    measuring: int = 0                             # rows that measure it
    relabelled_count: int = 0                      # texts that contradict what the version before was taught, as far as that is kept
    relabelled: tuple[Relabelled, ...] = ()
    alike_labels_count: int = 0                    # sets of labels that differ in case or outer blanks alone
    alike_labels: tuple[tuple[str, ...], ...] = ()
    unvalidated_count: int = 0                     # labels that no row has of the validation rows that were given
    unvalidated: tuple[str, ...] = ()
    cut: int = 0                                   # rows, of training and validation, that are longer than what the model reads
    weighed: bool = False                          # rare labels weigh more in the loss (`class_weights`)
    validation_label: str | None = None            # that all validation rows have that were given, where training has others

    @property
    def imbalance(self) -> float:
        """Rows of the commonest label over rows of the rarest, at least 1."""
        if not self.rows_per_label:
            return 1.0
        return self.rows_per_label[-1][1] / self.rows_per_label[0][1]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be looked at before the result is trusted, in words."""
        found = []
        if self.contradictions_count:
            first, what = self.contradictions[0], "labels" if self.rows_per_label else "targets"
            shown = ", ".join(map(repr, first.labels))
            texts = counted(self.contradictions_count, "text stands", "texts stand")
            found.append(f"{texts} with two {what} or more, as {first.text[:60]!r}: {shown}")
        if self.relabelled_count:
            one, what = self.relabelled[0], "label" if self.rows_per_label else "target"
            shown = f"{one.text[:60]!r}: {one.before!r} before, {one.now!r} now"
            texts = counted(self.relabelled_count, "text stands", "texts stand")
            found.append(f"{texts} with another {what} than the version before was taught, as {shown}")
        if self.cut:
            cut = counted(self.cut, "row is", "rows are")
            found.append(f"{cut} longer than what the model reads of them, and cut: shorten them, or raise max_tokens where the model takes more")
        if self.alike_labels_count:
            shown = " and ".join(map(repr, self.alike_labels[0]))
            more = f" (and {self.alike_labels_count - 1} more such sets)" if self.alike_labels_count > 1 else ""
            found.append(f"the labels {shown} differ in case or outer blanks alone{more}: each is learned as a label of its own")
        if seem_numbers(dict(self.rows_per_label)):
            found.append(f"the {len(self.rows_per_label)} labels are numbers, and most of them of one row: {AS_NUMBERS}")
        if self.validation_label is not None:
            found.append(f"all validation rows have the label {self.validation_label!r}: how the others are told from it is not measured")
        elif self.unvalidated_count:
            shown = ", ".join(map(repr, self.unvalidated[:LABELS_SHOWN])) + (", …" if self.unvalidated_count > LABELS_SHOWN else "")
            labels = counted(self.unvalidated_count, "label that training has", "labels that training has")
            found.append(f"{labels} no validation row has, and nothing measures: {shown}")
        if self.leaks_count:
            leak = self.leaks[0]
            place = f"row {leak.validation_row}, row {leak.training_row} of training"
            leaks = counted(self.leaks_count, "validation row stands", "validation rows stand")
            found.append(f"{leaks} in training too, or nearly, as {place}: what is measured by that flatters")
        if self.imbalance >= IMBALANCED and not self.weighed:
            (rare, few), (common, many) = self.rows_per_label[0], self.rows_per_label[-1]
            found.append(f"{rare!r} has {counted(few, 'row')} and {common!r} {many}: class_weights=True lets all labels weigh alike")
        if self.held_out > HELD_OUT * self.rows:
            are = "is" if self.held_out == 1 else "are"
            kept = f"{self.held_out} of {counted(self.rows, 'row')} {are} held out to choose the epoch and to measure it"
            found.append(f"{kept}: with validation rows of your own all of them are trained on")
        if self.held_out_alike:
            alike = "is a near-duplicate" if self.held_out_alike == 1 else "are near-duplicates"
            kept = f"{self.held_out_alike} of the {counted(self.held_out, 'row')} held out {alike} of rows that are trained on"
            found.append(f"{kept}, and what is measured by that flatters: validation rows of your own, written otherwise, would tell")
        if 0 < (rows := self.choosing + self.measuring) < VALIDATION_FEW:
            what = "the choice of the epoch and its figures rest" if self.choosing else "its figures rest"
            found.append(f"{what} on {counted(rows, 'validation row')}: so few tell little, give more")
        return tuple(found)

    def beside(self, relabelled: Sequence[Relabelled], *, given: bool) -> DataReport:
        """With what contradicts the version before. Where no validation rows were `given`, those held out need not have every label."""
        known = dataclasses.replace(self, relabelled_count=len(relabelled), relabelled=tuple(relabelled[:SHOWN_MAX]))
        return known if given else dataclasses.replace(known, unvalidated_count=0, unvalidated=(), validation_label=None)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"rows_per_label": dict(self.rows_per_label), "warnings": list(self.warnings)}


def _label(row: Example) -> str:
    return row.label or ""


def asked(row: Example) -> str:
    """The text by which rows are alike: of a conversation all that is said before the answer, but what the system is told, which many share."""
    messages = row.extra.get("messages") if row.label is None else None    # beside a label it is a column like any other
    said = [str(one["content"]) for one in messages[:-1] if one["role"] != "system"] if messages else []
    return "\n".join(said) or row.text


def report_of(
    rows: Sequence[Example],
    validation: Sequence[Example] = (),
    target: Callable[[Example], str] = _label,
    *,
    classes: bool = True,
    named: Callable[[Example], Sequence[str]] | None = None,
    train: Sequence[Example] | None = None,
) -> DataReport:
    """What is to be known about rows before anything learns from them. `target` says a row's; of `classes` each row has one, and is counted.

    `named` are the labels in a row's target, by default of `classes` the one. `train` are those of the rows that are not held out, by default all.
    """
    groups = near_duplicates([asked(row) for row in (*rows, *validation)])
    seen = {(group, target(row)) for group, row in zip(groups, rows, strict=False)}
    labels: dict[str, dict[str, str]] = {}
    for row in (*rows, *validation):
        labels.setdefault(normalised(asked(row)), {}).setdefault(target(row), row.text)
    opposed = [Contradiction(next(iter(one.values())), tuple(sorted(one))) for one in labels.values() if len(one) > 1]
    first: dict[int, int] = {}
    for position, group in enumerate(groups[: len(rows)], 1):
        first.setdefault(group, position)
    leaks = [
        Leak(first[group], position, row.text)
        for position, (group, row) in enumerate(zip(groups[len(rows) :], validation, strict=True), 1)
        if group in first
    ]
    trained = set(map(id, rows if train is None else train))
    own = {group for group, row in zip(groups, rows, strict=False) if id(row) in trained}
    held_out = [group for group, row in zip(groups, rows, strict=False) if id(row) not in trained]
    counts = sorted(Counter(map(target, rows if classes else ())).items(), key=lambda pair: (pair[1], pair[0]))
    named = named or (lambda row: (target(row),) if classes else ())
    taught, measured = ({label for row in part for label in named(row)} for part in (rows, validation))
    alike = alike_labels(taught)
    unvalidated = sorted(taught - measured) if validation else []
    return DataReport(
        len(rows), tuple(counts), len(rows) - len(seen), len(opposed), tuple(opposed[:SHOWN_MAX]), len(leaks), tuple(leaks[:SHOWN_MAX]),
        len(held_out), sum(group in own for group in held_out),
        alike_labels_count=len(alike), alike_labels=tuple(alike[:SHOWN_MAX]),
        unvalidated_count=len(unvalidated), unvalidated=tuple(unvalidated[:SHOWN_MAX]),
        validation_label=min(measured) if classes and len(measured) == 1 < len(taught) else None,
    )  # fmt: skip


AS_NUMBERS = 'problem_type="regression" (`--problem-type regression`) learns numbers as such'


def seem_numbers(rows_per_label: Mapping[str, int]) -> bool:
    """Whether labels are rather measured than named: all are numbers, and most of them of one row."""
    single = sum(count == 1 for count in rows_per_label.values())
    return len(rows_per_label) >= NUMBERS_LEAST and 2 * single > len(rows_per_label) and all(map(_is_number, rows_per_label))


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def alike_labels(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """Those that differ in case or outer blanks alone, together, sorted."""
    found: dict[str, list[str]] = {}
    for label in sorted(labels):
        found.setdefault(label.strip().casefold(), []).append(label)
    return [tuple(one) for one in found.values() if len(one) > 1]


def normalised(text: str) -> str:
    """Letters and digits, in one case, with single spaces: what is equal in it reads the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Marks belong to letters: without them many scripts lose their vowels.
    words = "".join(letter if letter.isalnum() or unicodedata.category(letter)[0] == "M" else " " for letter in folded).split()
    return " ".join(words) or folded.strip()


def equal_texts(texts: Sequence[str]) -> list[int]:
    """For each text the position of the first that reads the same, (n,)."""
    first: dict[str, int] = {}
    return [first.setdefault(normalised(text), position) for position, text in enumerate(texts)]


def near_duplicates(texts: Sequence[str], similar: float = SIMILAR) -> list[int]:
    """For each text the position of the first of its group, (n,). Who is like one of a group belongs to it."""
    leader = equal_texts(texts)
    distinct = sorted(set(leader))
    grams = _grams([normalised(texts[position]) for position in distinct])
    for a, b in _candidates(*grams):
        one, other = (grams[0][grams[1][i] : grams[1][i + 1]] for i in (a, b))
        common = np.intersect1d(one, other, assume_unique=True).size
        if common >= similar * (one.size + other.size - common):
            low, high = sorted((_root(leader, distinct[a]), _root(leader, distinct[b])))
            leader[high] = low
    return [_root(leader, position) for position in range(len(texts))]


def _root(leader: list[int], position: int) -> int:
    while leader[position] != position:
        leader[position] = leader[leader[position]]
        position = leader[position]
    return position


def _grams(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(hashed 3-grams of one text after another (g,), where each text's begin and the last one's end (n + 1,))."""
    from sklearn.feature_extraction.text import HashingVectorizer

    counter: Any = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=2**20, norm=None, binary=True, alternate_sign=False)
    matrix = counter.transform(list(texts) or [""])
    matrix.sort_indices()
    return matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)


def _candidates(grams: NDArray[np.int64], starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs that agree in all hashes of a band, each pair once."""
    filled = np.flatnonzero(np.diff(starts))    # reduceat has no empty slices
    if filled.size < 2:
        return
    generator = np.random.default_rng(0)
    seen: set[tuple[int, int]] = set()
    for _ in range(BANDS):
        factors = generator.integers(1, _PRIME, size=(BAND_HASHES, 2))
        hashes = [np.minimum.reduceat((a * grams + b) % _PRIME, starts[filled]) for a, b in factors]
        _, bucket = np.unique(np.stack(hashes, axis=1), axis=0, return_inverse=True)
        order = np.argsort(bucket.ravel(), kind="stable")
        for members in np.split(filled[order], np.flatnonzero(np.diff(bucket.ravel()[order])) + 1):
            if members.size > 1:
                found = members.tolist()
                pairs = combinations(found, 2) if len(found) <= BUCKET_MAX else ((found[0], other) for other in found[1:])
                new = set(pairs) - seen
                seen |= new
                yield from sorted(new)
