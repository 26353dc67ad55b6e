"""The tasks of the routing benchmark: which inputs belong to which adapter, as features. Texts are encoded once and kept in a cache.

`Corpus` reads upstream's formats; `tasks` cuts them into tasks. What is carved from training rows is carved by a seed, by class.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from adapter_hub.routing.encoder import Encoder, HashEncoder
from adapter_hub.routing.features import Features, extract

# n inputs, a adapters, c classes
I64 = NDArray[np.int64]
TASKS = ("clinc10", "clinc150", "clinc10_10shot", "clinc150_10shot", "bank77", "bank77_all", "bank77_10shot", "prompt34")
SHOTS = 10
CARVED = 0.1            # of the training rows of each class, where upstream has no validation split
SHIFT_HOMES = ("banking", "credit_cards")
QUICK_TRAIN = 15        # a class
QUICK_TEST = 600
# A change of the sketch changes the sketch of this, and so the cache's key.
_PROBE = ["Whom did the quick brown fox see at 07:45, and why?", "naïve ☕ 東京", "?!"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Texts and what they are; aligned."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | I64) -> Rows:
        return Rows(tuple(self.texts[i] for i in rows), tuple(self.labels[i] for i in rows))


@dataclass(frozen=True, eq=False)
class Part:
    """Inputs that belong to adapters of a task."""

    features: Features
    adapters: I64       # (n,), index into the task's adapters
    classes: I64        # (n,), index into the task's classes

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, rows: I64) -> Part:
        return Part(self.features[rows], self.adapters[rows], self.classes[rows])


@dataclass(frozen=True, eq=False)
class Task:
    """Adapters, their exemplars, and inputs to route."""

    name: str
    corpus: str                       # tasks of one corpus have the same exemplars under the same classes
    adapters: tuple[str, ...]         # (a,)
    owner: I64                        # (c,), the adapter of each class
    class_names: tuple[str | None, ...]    # (c,), None: the adapter has no labels
    train: Part
    test: Part
    texts: tuple[str, ...]            # of the test inputs
    evaluation: Part | None = None    # held-out rows: they set thresholds and hyperparameters, and are no exemplars
    tuning: tuple[Part, Part] | None = None    # (fit, check) for hyperparameters; None: by folds of the exemplars
    outside: Features | None = None   # out-of-scope test inputs
    negatives: Features | None = None # out-of-scope training and validation inputs, for heads that cannot do without
    shifted: Features | None = None   # another data set's inputs, which belong to one of `homes`
    homes: tuple[int, ...] = ()


class Encoded:
    """Features of texts, by this encoder, kept in a folder. The key: the encoder's fingerprint, the sketch, and the texts."""

    def __init__(self, encoder: Encoder, cache: Path, say: Callable[[str], None] = print) -> None:
        self.encoder, self.cache, self.say = encoder, cache, say

    def __call__(self, texts: Sequence[str]) -> Features:
        path = self.cache / f"{self._key(texts)}.npz"
        if path.exists():
            with np.load(path) as kept:
                parts = (kept["data"], kept["indices"], kept["indptr"])
                return Features(kept["dense"], sparse.csr_matrix(parts, shape=tuple(kept["shape"])))
        self.say(f"encoding {len(texts):,} texts …")
        features = extract(self.encoder, texts)
        lexical = features.lexical
        self.cache.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".part.npz")
        np.savez(staged, dense=features.dense, data=lexical.data, indices=lexical.indices, indptr=lexical.indptr, shape=np.array(lexical.shape))
        staged.rename(path)
        return features

    def _key(self, texts: Sequence[str]) -> str:
        made = hashlib.sha256(f"{self.encoder.fingerprint} {self._sketch} {len(texts)}".encode())
        for text in texts:
            made.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return made.hexdigest()[:32]

    @cached_property
    def _sketch(self) -> str:
        lexical = extract(HashEncoder(), _PROBE).lexical
        return hashlib.sha256(lexical.indices.tobytes() + lexical.data.tobytes()).hexdigest()


class Corpus:
    """The public data under one folder, and its features."""

    def __init__(self, data: Path, encoded: Encoded, quick: bool = False) -> None:
        self.data, self.encoded, self.quick = data, encoded, quick

    # ---- upstream's formats -------------------------------------------------------------------------------------------

    @cached_property
    def _clinc(self) -> dict[str, list[list[str]]]:
        return json.loads((self.data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))

    @cached_property
    def domains(self) -> dict[str, str]:
        """Intent to domain."""
        domains = json.loads((self.data / "clinc150" / "domains.json").read_text(encoding="utf-8"))
        return {intent: slug(name) for name, intents in domains.items() for intent in intents}

    def clinc(self, split: str) -> Rows:
        rows = self._clinc[split]
        return self._cut(Rows(tuple(text for text, _ in rows), tuple(intent for _, intent in rows)), split)

    def bank(self, split: str) -> Rows:
        with (self.data / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return self._cut(Rows(tuple(row["text"] for row in rows), tuple(row["category"] for row in rows)), split)

    def few(self, name: str) -> Rows:
        """The usual 10-shot training split."""
        rows = _jsonl(self.data / "few_shot" / f"{name}_train_{SHOTS}.jsonl.gz")
        return Rows(tuple(row["text"] for row in rows), tuple(row["label"] for row in rows))

    def prompts(self, split: str) -> Rows:
        rows = [row for row in _jsonl(self.data / "prompt_tasks" / "t0_p3.jsonl.gz") if row["split"] == split]
        return self._cut(Rows(tuple(row["text"] for row in rows), tuple(row["label"] for row in rows)), split)

    def _cut(self, rows: Rows, split: str) -> Rows:
        """All rows; a few of them for a quick run."""
        if not self.quick:
            return rows
        if split.endswith("train"):
            return rows.take(drawn(rows.labels, QUICK_TRAIN, seed=0))
        return rows.take(np.sort(np.random.default_rng(0).permutation(len(rows))[:QUICK_TEST]))

    # ---- tasks --------------------------------------------------------------------------------------------------------

    def task(self, name: str, seed: int = 0) -> Task:
        """One of TASKS. With 10 shots seed 0 is the usual split, another one draws from the whole training split."""
        kind, _, variant = name.partition("_")
        if kind.startswith("clinc"):
            return self._clinc_task(name, kind, shots=variant == "10shot", seed=seed)
        if kind == "bank77":
            return self._bank_task(name, variant, seed)
        return self._prompt_task(name)

    def _clinc_task(self, name: str, kind: str, shots: bool, seed: int) -> Task:
        home = self.domains if kind == "clinc10" else {intent: slug(intent) for intent in self.domains}
        train = self._shots(self.few("clinc150"), self.clinc("train"), seed) if shots else self.clinc("train")
        test, oos = self.clinc("test"), self.clinc("oos_test")
        negatives = [self.encoded(self.clinc(split).texts) for split in ("oos_train", "oos_val")]
        made = self._made(name, f"clinc_{SHOTS}shot_{seed}" if shots else "clinc", home, train, test)
        homes = tuple(made.adapters.index(one) for one in SHIFT_HOMES) if kind == "clinc10" else ()
        made = replace(
            made,
            outside=self.encoded(oos.texts),
            negatives=Features.concatenate(negatives),
            shifted=self.encoded(self.bank("test").texts) if homes else None,
            homes=homes,
        )
        if shots:
            return made
        evaluation = self._part(made, self.clinc("val"))
        return replace(made, evaluation=evaluation, tuning=(made.train, evaluation))

    def _bank_task(self, name: str, variant: str, seed: int) -> Task:
        train, test = self.bank("train"), self.bank("test")
        home = {label: slug(label) for label in train.labels}
        if variant == "10shot":
            return self._made(name, f"bank_{SHOTS}shot_{seed}", home, self._shots(self.few("banking77"), train, seed), test)
        made = self._made(name, "bank" if variant else "bank_carved", home, train, test)
        kept, carved = carve(train.labels, CARVED, seed=0)
        tuning = (made.train[kept], made.train[carved])
        if variant:
            return replace(made, tuning=tuning)
        return replace(made, train=tuning[0], evaluation=tuning[1], tuning=tuning)

    def _prompt_task(self, name: str) -> Task:
        train, test = self.prompts("train"), self.prompts("test")
        made = self._made(name, name, {label: slug(label) for label in train.labels}, train, test)
        kept, carved = carve(train.labels, CARVED, seed=0)
        tuning = (made.train[kept], made.train[carved])
        # The label is the adapter: an adapter of its own has no labels here.
        return replace(made, class_names=(None,) * len(made.adapters), train=tuning[0], evaluation=tuning[1], tuning=tuning)

    def _shots(self, usual: Rows, train: Rows, seed: int) -> Rows:
        return usual if seed == 0 else train.take(drawn(train.labels, SHOTS, seed))

    def _made(self, name: str, corpus: str, home: dict[str, str], train: Rows, test: Rows) -> Task:
        classes = sorted(home)
        adapters = tuple(sorted(set(home.values())))
        owner = np.array([adapters.index(home[label]) for label in classes])
        empty = Part(Features.empty(1), np.empty(0, np.int64), np.empty(0, np.int64))
        made = Task(name, corpus, adapters, owner, tuple(classes), empty, empty, test.texts)
        return replace(made, train=self._part(made, train), test=self._part(made, test))

    def _part(self, task: Task, rows: Rows) -> Part:
        place = {label: i for i, label in enumerate(task.class_names)}
        classes = np.array([place[label] for label in rows.labels])
        return Part(self.encoded(rows.texts), task.owner[classes], classes)


def carve(labels: Sequence[str], share: float, seed: int) -> tuple[I64, I64]:
    """(kept, carved) rows, ascending: this share of each label is carved, one row at least."""
    chosen = np.concatenate([rows[: max(1, round(share * len(rows)))] for rows in _shuffled(labels, seed)])
    return np.setdiff1d(np.arange(len(labels)), chosen), np.sort(chosen)


def drawn(labels: Sequence[str], count: int, seed: int) -> I64:
    """`count` rows of each label, ascending."""
    return np.sort(np.concatenate([rows[:count] for rows in _shuffled(labels, seed)]))


def _shuffled(labels: Sequence[str], seed: int) -> Iterator[I64]:
    """The rows of each label, in an order of the seed's."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        rows[label].append(i)
    for label in sorted(rows):
        yield generator.permutation(rows[label])


def slug(name: str) -> str:
    """`name` as an adapter's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("&", "and")).strip("_")


def _jsonl(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
