"""The hub on a sequence of tasks: one `learn` a task, then what it answers to a shuffled mixture of all tests, with and without the name."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual_data import Task

from adapter_hub import Hub
from adapter_hub.examples import Example
from adapter_hub.prediction import Prediction
from adapter_hub.training.config import TrainConfig

GOLDEN_ROWS = 50    # of each task, whose answers are kept and asked for again at the end
ASKED = 2           # candidates, where they come near
SINGLE_ROWS = 100   # asked one at a time


@dataclass(frozen=True)
class Answered:
    """What each row got, aligned."""

    routed: list[str | None]    # of near candidates both are asked
    alone: list[str | None]     # the router's choice alone answers
    named: list[str | None]
    right_adapter: list[bool]


class HubRun:
    """A registry that learns task after task. What it has learned already, as of a run that was cut off, is taken as it is."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._folder, self._config = folder, config
        self.hub = Hub.open(folder) if (folder / "hub.toml").exists() else Hub.create(folder)
        self._golden: dict[str, list[str]] = {}
        self._asked: dict[str, list[str]] = {}

    def learn(self, task: Task, other: Path | None = None) -> dict[str, Any]:
        """Seconds, bytes and the gate's verdict. With `other`, the folder of another run's registry, its version is registered here."""
        facts = self._folder / f"{task.name}.json"
        if task.name not in self.hub.names() or not facts.exists():
            if other is None:
                started = time.perf_counter()
                report = self.hub.learn(task.name, task.train, task.validation, config=self._config, promote="always")
                found = {"seconds": time.perf_counter() - started, "verdict": str(report.verdict), "reason": report.reason}
            else:
                with Hub.open(other) as learned:
                    ref = learned.registry.resolve(task.name)
                    source, labels = learned.registry.open_version(ref), learned.show(ref).labels
                    self.hub.register(task.name, source, task.train, labels=labels, evaluation=task.validation, assume_base=True)
                found = json.loads((other / f"{task.name}.json").read_text())
            version = self.hub.registry.open_version(self.hub.registry.resolve(task.name))
            found["bytes"] = sum(file.stat().st_size for file in version.iterdir())
            facts.write_text(json.dumps(found))
        self.hub.calibrate()
        self.hub.settle()
        self._asked[task.name] = [row.text for row in task.test[:GOLDEN_ROWS]]
        self._golden[task.name] = self._named(task.name)
        result: dict[str, Any] = json.loads(facts.read_text())
        return result

    def answered(self, rows: Sequence[Example], homes: Sequence[str]) -> Answered:
        texts = [row.text for row in rows]
        alone, routed = (self.hub.predict(texts, max_false_reject=0, ask=ask) for ask in (1, ASKED))
        named = self.hub.predict(texts, adapters=list(homes))
        right = [one.adapter is not None and one.adapter.name == home for one, home in zip(routed, homes, strict=True)]
        return Answered([one.label for one in routed], [one.label for one in alone], [one.label for one in named], right)

    def at_random(self, rows: Sequence[Example], seed: int) -> list[str | None]:
        """Each by an adapter drawn for it."""
        draw, names = random.Random(seed), self.hub.names()
        return [one.label for one in self.hub.predict([row.text for row in rows], adapters=[draw.choice(names) for _ in rows])]

    def golden_same(self) -> bool:
        """Whether every earlier task's named answers are what they were when it was learned, byte for byte."""
        return all(self._named(name) == before for name, before in self._golden.items())

    def singles_same(self, rows: Sequence[Example]) -> bool:
        """Whether rows asked one at a time go where they go in a batch, and get its labels."""
        texts = [row.text for row in rows[:SINGLE_ROWS]]
        together = self.hub.predict(texts, max_false_reject=0, ask=ASKED)
        alone = [self.hub.predict([text], max_false_reject=0, ask=ASKED)[0] for text in texts]
        return [_answer(one) for one in together] == [_answer(one) for one in alone]

    def _named(self, name: str) -> list[str]:
        """Label and probabilities, each number as its bits."""
        found = self.hub.predict(self._asked[name], adapters=name)
        return [repr((one.label, [(label, score.hex()) for label, score in one.scores.items()])) for one in found]


def _answer(one: Prediction) -> tuple[str | None, str | None]:
    return (str(one.adapter) if one.adapter else None, one.label)
