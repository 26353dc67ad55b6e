"""A simulated year of a registry that looks after itself: does every task end at least as good as it began?

    python benchmarks/year.py --data DIR [--seed 0]

DIR holds clinc150/. Four domains of CLINC150 are learned from 20 rows an intent; then, month by month, inputs that were no part of it come in,
people say of some of the answers what they should have been (one label in twenty is wrong), and `hub.maintain` makes one pass. In
April people begin to use other words for what `banking` is about; in June a fifth domain comes that nobody has registered; in
September all feedback to `home` is poisoned, each intent named as the next; in November somebody puts a spoiled version of `work` into
production by hand. A person does two things only: names what discovery proposes, and spoils `work`. Accuracy is measured on the test
split, routed, `banking`'s in the words of the time; it chooses nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from adapter_hub import Hub
from adapter_hub.continual.maintenance import Step

RESULTS = Path(__file__).parent / "results" / "year.json"
DOMAINS = ("banking", "travel", "home", "work")
MOVED, POISONED, SPOILED, NEWCOMER = "banking", "home", "work", "auto_and_commute"
MOVES, COMES, POISON, SPOIL = 4, 6, 9, 11    # months
LEARNED = 20              # rows of each intent that a task begins with
MONTHLY = 90              # inputs of each task a month
SPOKEN_OF = 0.7           # share of the answers that people say something of
NOISE = 0.05              # share of what they say that is wrong
RENAMED = 12              # words of MOVED's that are replaced by others
SYLLABLES = ("ba", "ke", "di", "lo", "mu", "ra", "ti", "so", "ne", "vu")
POLICY = {"keep": "text", "observe": "text", "cooldown_days": 14}
Row = dict[str, str]


@dataclass
class Year:
    """What was asked, answered and measured."""

    hub: Hub
    luck: random.Random
    domain_of: dict[str, str]
    intents: dict[str, list[str]]
    words: dict[str, str]                      # old -> new, of MOVED
    learned: dict[str, list[Row]]
    streams: dict[str, list[Row]]
    tests: dict[str, list[Row]]
    measured: list[dict[str, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    promoted: dict[tuple[str, int], bool] = field(default_factory=dict)    # what became of an update, by task and month
    rolled_back: set[str] = field(default_factory=set)
    truth: dict[str, str] = field(default_factory=dict)    # of each text that was asked

    # ---- the world --------------------------------------------------------------------------------------------------

    def said(self, row: Row, month: int) -> str:
        """The text as people put it in this month."""
        if month < MOVES or self.domain_of[row["label"]] != MOVED:
            return row["text"]
        return re.sub(r"\w+", lambda word: self.words.get(word[0].lower(), word[0]), row["text"])

    def claimed(self, row: Row, month: int) -> str:
        """What people say that it should have been answered."""
        domain = self.domain_of[row["label"]]
        own = self.intents[domain]
        if month == POISON and domain == POISONED:
            return own[(own.index(row["label"]) + 1) % len(own)]
        return self.luck.choice(own) if self.luck.random() < NOISE else row["label"]

    def inputs(self, month: int) -> list[Row]:
        names = [*DOMAINS, *([NEWCOMER] if month >= COMES else [])]
        found = [self.streams[name].pop() for name in names for _ in range(MONTHLY)]
        self.luck.shuffle(found)
        return found

    # ---- a month ----------------------------------------------------------------------------------------------------

    def month(self, number: int) -> None:
        """What comes in, what people say of it, one pass of maintenance, and what is measured then."""
        if number == SPOIL:
            self.spoil()
        asked, known = self.inputs(number), set(self.hub.names())
        answers = self.hub.predict([self.said(row, number) for row in asked])
        for row, answer in zip(asked, answers, strict=True):
            home = self.domain_of[row["label"]]
            if home in known and self.luck.random() < SPOKEN_OF:
                self.hub.feedback(str(answer.id), correct_label=self.claimed(row, number), correct_adapter=home, new_label=True)
        report = self.hub.maintain(config="fast", now=datetime(2026, number, 28, tzinfo=UTC))
        self.events += [f"{number:02}: {one.ref} {one.step}: {one.reason}" for one in report.done if one.step is not Step.NONE]
        self.promoted |= {(one.ref.name, number): one.promoted for one in report.done if one.step is Step.UPDATE}
        self.rolled_back |= {one.ref.name for one in report.done if one.step is Step.ROLL_BACK}
        self.truth |= {self.said(row, number): row["label"] for row in asked}
        if number >= COMES and NEWCOMER not in known:
            self.name_newcomer(number)
        self.measured.append(self.measure(number))

    def name_newcomer(self, month: int) -> None:
        """A person looks at what is proposed: what is mostly of the new domain becomes a skill, with the labels that they know."""
        own = {one.id: [text for group in one.groups for text in group.texts] for one in self.hub.proposals()}
        own = {id: texts for id, texts in own.items() if self.share_of_newcomer(texts) > 0.5}
        labels = {text: self.truth[text] for texts in own.values() for text in texts if self.domain_of[self.truth[text]] == NEWCOMER}
        if own:
            done = self.hub.accept(list(own), NEWCOMER, labels, config="fast")
            self.events.append(f"{month:02}: {NEWCOMER} was proposed ({len(labels)} inputs of it): {done.ref}, {done.report.reason}")

    def share_of_newcomer(self, texts: Sequence[str]) -> float:
        return sum(self.domain_of[self.truth[text]] == NEWCOMER for text in texts) / max(1, len(texts))

    def spoil(self) -> None:
        """Every label is the next one's, and nobody asked the gate."""
        own = self.intents[SPOILED]
        rows = [row | {"label": own[(own.index(row["label"]) + 1) % len(own)]} for row in self.learned[SPOILED]]
        self.hub.learn(SPOILED, rows, config="fast", start="cold", promote="always")

    def measure(self, month: int) -> dict[str, float]:
        """Accuracy of each task, routed, nobody turned away: in the words of the month."""
        names = [name for name in self.hub.names() if name in self.tests]
        rows = [{"text": self.said(row, month), "label": row["label"], "adapter": name} for name in names for row in self.tests[name]]
        return {ref.partition("@")[0]: float(one["routed"]["accuracy"]) for ref, one in self.hub.evaluate(rows)["adapters"].items()}


def renamed(rows: Sequence[Row], luck: random.Random) -> dict[str, str]:
    """The words of content that stand in the most of these rows, each with one that nobody has seen."""
    seen = Counter(word for row in rows for word in set(re.findall(r"[a-z]{3,}", row["text"].lower())) if word not in ENGLISH_STOP_WORDS)
    return {word: "".join(luck.choices(SYLLABLES, k=3)) for word, _ in seen.most_common(RENAMED)}


def begin(data: Path, seed: int, folder: Path) -> Year:
    """The registry of January, and what will come."""
    luck = random.Random(seed)
    splits = json.loads((data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((data / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    intents = {name.lower().replace("&", "and").replace(" ", "_"): sorted(own) for name, own in domains.items()}
    intents = {name: intents[name] for name in (*DOMAINS, NEWCOMER)}
    domain_of = {intent: name for name, own in intents.items() for intent in own}
    learned: dict[str, list[Row]] = {name: [] for name in intents}
    streams: dict[str, list[Row]] = {name: [] for name in intents}
    for intent, name in domain_of.items():
        rows = [{"text": text, "label": label} for text, label in splits["train"] if label == intent]
        luck.shuffle(rows)
        learned[name] += rows[:LEARNED]
        streams[name] += rows[LEARNED:]
    for rows in streams.values():
        luck.shuffle(rows)
    tests = {name: [{"text": text, "label": label} for text, label in splits["test"] if domain_of.get(label) == name] for name in intents}
    hub = Hub.create(folder, policy=POLICY)
    for name in DOMAINS:
        hub.learn(name, learned[name], config="fast", promote="always")
    hub.calibrate()
    return Year(hub, luck, domain_of, intents, renamed(learned[MOVED], luck), learned, streams, tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public data")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    console, started = Console(width=150), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="year-") as scratch:
        year = begin(given.data, given.seed, Path(scratch) / "registry")
        year.measured.append(year.measure(0))
        for number in range(1, 13):
            said = len(year.events)
            year.month(number)
            figures = ", ".join(f"{name} {100 * share:.2f}" for name, share in year.measured[-1].items())
            console.print("\n".join([f"{number:02}: {figures}", *year.events[said:]]), highlight=False, markup=False)
        verified, names = year.hub.verify().ok, year.hub.names()
        year.hub.close()
    first, last = ({name: next(one[name] for one in order if name in one) for name in names} for order in (year.measured, year.measured[::-1]))
    table = Table("task", "first", "least", "last", title="accuracy, routed")
    for name in names:
        own = [one[name] for one in year.measured if name in one]
        table.add_row(name, *(f"{100 * value:.2f}" for value in (own[0], min(own), own[-1])))
    console.print(table)
    claims = {
        "every_task_as_good": all(last[name] >= first[name] for name in names),
        "poison_rejected": year.promoted.get((POISONED, POISON)) is False,
        "spoiled_rolled_back": SPOILED in year.rolled_back,
        "moved_learned": any(name == MOVED and good for (name, _), good in year.promoted.items()),
        "newcomer_learned": NEWCOMER in names,
        "verified": verified,
    }
    result = {
        "benchmark": "year", "seed": given.seed, "seconds": round(time.perf_counter() - started), "claims": claims, "first": first, "last": last,
        "measured": year.measured, "events": year.events, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(before | {str(given.seed): result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("benchmark", "seed", "seconds", "claims", "first", "last")}))
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
