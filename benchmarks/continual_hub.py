"""The hub on a sequence of tasks: one `learn` a task, then what it answers to a shuffled mixture of all tests, with and without the name."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from continual_data import Task

from adapter_hub import Hub
from adapter_hub.examples import Example
from adapter_hub.prediction import Prediction
from adapter_hub.refs import AdapterRef
from adapter_hub.training.config import TrainConfig

GOLDEN_ROWS = 50    # of each task, whose answers are kept and asked for again at the end
ASKED = 3           # candidates, where they come near
SINGLE_ROWS = 100   # asked one at a time


Record = dict[str, Any]


class HubRun:
    """A registry that learns task after task, and writes what it measured after each: a run that was cut off goes on behind the last stage."""

    def __init__(self, folder: Path, config: TrainConfig, device: str = "cpu", **models: Any) -> None:
        self._folder, self._config = folder, config
        self.hub = Hub.open(folder, device=device) if (folder / "hub.toml").exists() else Hub.create(folder, device=device, **models)

    def stage(self, number: int, tasks: Sequence[Task], mixture: tuple[Sequence[Example], Sequence[str]], other: Path | None = None) -> Record:
        """Learn the last of `tasks`, and answer the mixture: rows, and the name of each one's task. What was measured before is read again.

        With `other`, another run's registry, the version is taken from there: no other order changes it.
        """
        path = self._folder / f"stage-{number:03}.json"
        if path.exists():
            found: Record = json.loads(path.read_text())
            return found
        task = tasks[-1]
        found = self._learned(task) if other is None else self._taken(task, other)
        rows, homes = mixture
        texts = [row.text for row in rows]
        routed = self.hub.predict(texts, max_false_reject=0, ask=ASKED)
        named = self.hub.predict(texts, adapters=list(homes))
        found |= {kind: [one.label for one in answers] for kind, answers in (("routed", routed), ("named", named))}
        found["alone"] = self._alone(texts, [one.decision.adapter for one in routed], homes, found["named"])
        found["right_adapter"] = [one.adapter is not None and one.adapter.name == home for one, home in zip(routed, homes, strict=True)]
        found["golden"] = {one.name: self._golden(one) for one in tasks}
        found["bytes"] = self._stored(task.name)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)
        return found

    def _learned(self, task: Task) -> Record:
        """Cold: a task that was learned before the run was cut off, and not measured, is learned again to the same weights.

        The carved rows choose the epoch; then the router is taught them, too.
        """
        started = time.perf_counter()
        report = self.hub.learn(task.name, task.train, task.validation, config=self._config, promote="always", start="cold")
        self.hub.teach(task.name, task.validation)
        learned = time.perf_counter() - started
        self.hub.calibrate()
        self.hub.settle()
        return {"learning": learned, "seconds": time.perf_counter() - started, "verdict": str(report.verdict), "reason": report.reason}

    def _taken(self, task: Task, other: Path) -> Record:
        started = time.perf_counter()
        with Hub.open(other) as learned:
            ref = learned.registry.resolve(task.name)
            source, labels = learned.registry.open_version(ref), learned.show(ref).labels
            self.hub.register(task.name, source, task.train, labels=labels, evaluation=task.validation, assume_base=True)
        self.hub.teach(task.name, task.validation)
        self.hub.calibrate()
        self.hub.settle()
        return {"seconds": time.perf_counter() - started, "verdict": None}

    def _alone(
        self, texts: Sequence[str], chosen: Sequence[AdapterRef | None], homes: Sequence[str], named: Sequence[str | None]
    ) -> list[str | None]:
        """What the adapters of the router's own choice say: where that is an input's task, it was said with the task named."""
        labels = list(named)
        if strays := [row for row, (ref, home) in enumerate(zip(chosen, homes, strict=True)) if ref is None or ref.name != home]:
            answers = self.hub.predict([texts[row] for row in strays], adapters=[chosen[row] for row in strays])
            for row, one in zip(strays, answers, strict=True):
                labels[row] = one.label
        return labels

    def _stored(self, name: str) -> int:
        """Bytes of all versions of a name; what several have lies there once."""
        sizes: dict[str, int] = {}
        for row in self.hub.registry.versions(name):
            folder, files = self.hub.registry.open_version(row.ref), self.hub.registry.manifest(row.ref).files
            sizes |= {sha256: (folder / file).stat().st_size for file, sha256 in files.items()}
        return sum(sizes.values())

    def at_random(self, rows: Sequence[Example], seed: int) -> list[str | None]:
        """Each by an adapter drawn for it."""
        draw, names = random.Random(seed), self.hub.names()
        return [one.label for one in self.hub.predict([row.text for row in rows], adapters=[draw.choice(names) for _ in rows])]

    def singles_same(self, rows: Sequence[Example]) -> bool:
        """Whether rows asked one at a time go where they go in a batch, and get its labels."""
        texts = [row.text for row in rows[:SINGLE_ROWS]]
        together = self.hub.predict(texts, max_false_reject=0, ask=ASKED)
        alone = [self.hub.predict([text], max_false_reject=0, ask=ASKED)[0] for text in texts]
        return [_answer(one) for one in together] == [_answer(one) for one in alone]

    def _golden(self, task: Task) -> list[str]:
        """Label and probabilities of its first test rows, each number as its bits."""
        found = self.hub.predict([row.text for row in task.test[:GOLDEN_ROWS]], adapters=task.name)
        return [repr((one.label, [(label, score.hex()) for label, score in one.scores.items()])) for one in found]


def golden_same(stages: Sequence[Record]) -> bool:
    """Whether every task's named answers are to the last stage what they were when it was learned, byte for byte."""
    return all(later["golden"][name] == answers for stage, later in pairwise(stages) for name, answers in stage["golden"].items())


def _answer(one: Prediction) -> tuple[str | None, str | None]:
    return (str(one.adapter) if one.adapter else None, one.label)
