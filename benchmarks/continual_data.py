"""Sequences of tasks: CLINC150 as domains and as random groups, BANKING77 as groups, standard_cl, cl_benchmark. Read from upstream's formats.

What chooses and measures while learning is carved from the training rows, of each class its share; the test split is only ever answered.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapter_hub.examples import Example

CARVED = 0.1           # of each class's training rows, where all are used
FEW, FEW_CARVED = 20, 0.2    # examples a class with `--budget small`, a fifth of them carved
ORDERS = 3
CLINC_GROUP, BANKING_GROUP = 10, 11    # intents a task
DRAW = 0               # the seed of random groups: the same tasks whatever the run's seed
STANDARD_ORDERS = (    # of the standard benchmark
    ("dbpedia", "amazon", "yahoo", "ag_news"),
    ("dbpedia", "amazon", "ag_news", "yahoo"),
    ("yahoo", "amazon", "ag_news", "dbpedia"),
)
# Order 4 of the long sequence (Razdaibiedina et al. 2023, "Progressive Prompts"), without yahoo, which is missing.
LONG = ("mnli", "cb", "wic", "copa", "qqp", "boolqa", "rte", "imdb", "yelp", "amazon", "sst2", "dbpedia", "agnews", "multirc")


@dataclass(frozen=True)
class Task:
    """One skill: rows with text and label."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def rows(self) -> tuple[Example, ...]:
        """All that may be learned."""
        return (*self.train, *self.validation)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({str(row.label) for row in self.train}))


@dataclass(frozen=True)
class TaskSequence:
    """Tasks, and the orders in which they are learned: positions in `tasks`."""

    name: str
    tasks: tuple[Task, ...]
    orders: tuple[tuple[int, ...], ...]

    def ordered(self, order: int) -> tuple[Task, ...]:
        return tuple(self.tasks[place] for place in self.orders[order])


def load(name: str, data: Path, few: bool, seed: int) -> TaskSequence:
    """The sequence of one of SEQUENCES; `few` takes FEW examples a class, drawn by `seed`."""
    return SEQUENCES[name](data, few, seed)


def clinc_domains(data: Path, few: bool, seed: int) -> TaskSequence:
    domains = json.loads((data / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    groups = {name.lower().replace("&", "and").replace(" ", "_"): intents for name, intents in domains.items()}
    return _grouped("clinc_domains", groups, *_clinc(data), few, seed)


def clinc_groups(data: Path, few: bool, seed: int) -> TaskSequence:
    train, test = _clinc(data)
    return _grouped("clinc_groups", _random_groups(train, CLINC_GROUP), train, test, few, seed)


def banking(data: Path, few: bool, seed: int) -> TaskSequence:
    train, test = (_csv(data / "banking77" / f"{split}.csv") for split in ("train", "test"))
    return _grouped("banking", _random_groups(train, BANKING_GROUP), train, test, few, seed)


def standard_cl(data: Path, few: bool, seed: int) -> TaskSequence:
    """16 examples a class, as upstream drew them: there is no larger budget."""
    tasks = []
    for name in STANDARD_ORDERS[0]:
        rows = list(_jsonl(data / "standard_cl" / f"{name}.jsonl.gz"))
        train, validation, test = (tuple(_examples(rows, split, seed)) for split in ("train", "valid", "test"))
        tasks.append(Task(name, train, validation, test))
    return TaskSequence("standard_cl", tuple(tasks), tuple(tuple(STANDARD_ORDERS[0].index(name) for name in order) for order in STANDARD_ORDERS))


def long_sequence(data: Path, few: bool, seed: int) -> TaskSequence:
    tasks = []
    for name in LONG:
        rows = list(_jsonl(data / "cl_benchmark" / f"{name}.jsonl.gz"))
        train, test = (tuple(_examples(rows, split)) for split in ("train", "test"))
        tasks.append(_task(name, train, test, few, seed))
    return TaskSequence("long_sequence", tuple(tasks), _orders(len(tasks)))


SEQUENCES: dict[str, Callable[[Path, bool, int], TaskSequence]] = {
    "clinc_domains": clinc_domains,
    "clinc_groups": clinc_groups,
    "banking": banking,
    "standard_cl": standard_cl,
    "long_sequence": long_sequence,
}


# ---- cut ----------------------------------------------------------------------------------------------------------------


def _grouped(
    name: str, groups: dict[str, list[str]], train: Sequence[Example], test: Sequence[Example], few: bool, seed: int
) -> TaskSequence:
    tasks = []
    for group, labels in groups.items():
        own, asked = ([row for row in rows if row.label in labels] for rows in (train, test))
        tasks.append(_task(group, own, asked, few, seed))
    return TaskSequence(name, tuple(tasks), _orders(len(tasks)))


def _task(name: str, train: Sequence[Example], test: Sequence[Example], few: bool, seed: int) -> Task:
    """Each class draws by a generator of its own: whatever task it is in, its rows are the same."""
    by_class: dict[str, list[Example]] = defaultdict(list)
    for row in train:
        by_class[str(row.label)].append(row)
    learned, carved = [], []
    for label, rows in by_class.items():
        drawn = random.Random(f"{seed} {label}").sample(rows, min(len(rows), FEW) if few else len(rows))
        count = max(1, round(len(drawn) * (FEW_CARVED if few else CARVED)))
        carved += drawn[:count]
        learned += drawn[count:]
    return Task(name, tuple(learned), tuple(carved), tuple(test))


def _random_groups(rows: Sequence[Example], size: int) -> dict[str, list[str]]:
    labels = sorted({str(row.label) for row in rows})
    random.Random(DRAW).shuffle(labels)
    return {f"group{start // size + 1:02}": labels[start : start + size] for start in range(0, len(labels), size)}


def _orders(count: int) -> tuple[tuple[int, ...], ...]:
    """As they come, and two random ones."""
    drawn = [random.Random(f"order {number}").sample(range(count), count) for number in range(1, ORDERS)]
    return (tuple(range(count)), *map(tuple, drawn))


# ---- read ---------------------------------------------------------------------------------------------------------------


def _clinc(data: Path) -> tuple[list[Example], list[Example]]:
    splits = json.loads((data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    train, test = ([Example(text, label) for text, label in splits[split]] for split in ("train", "test"))
    return train, test


def _csv(path: Path) -> list[Example]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Example(row["text"], row["category"]) for row in csv.DictReader(file)]


def _jsonl(path: Path) -> Iterator[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _examples(rows: Sequence[dict[str, object]], split: str, seed: int | None = None) -> Iterator[Example]:
    for row in rows:
        if row["split"] == split and (split == "test" or seed is None or row["seed"] == seed):
            yield Example(str(row["text"]), str(row["label"]))
