"""Route with the `semantic-router` package and its own thresholds. Runs in an environment of its own; `routing.py --semantic PYTHON` calls it.

    python -m venv .semantic && .semantic/bin/pip install semantic-router==1.1.1      # or ==0.3.3, the last that fits thresholds
    python benchmarks/routing.py --data DIR --semantic .semantic/bin/python

Reads an .npz (unit vectors and route names of the utterances and of rows to fit thresholds on; vectors of queries), writes an .npz with
the answers. Needs numpy and semantic-router, nothing of this project. Releases before 1.0 search a threshold a route at random by
accuracy on training rows; releases since 1.0 calibrate confidences on labelled rows, and accept from a confidence that the user names.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import semantic_router
from semantic_router import Route
from semantic_router.encoders import DenseEncoder

RANKED = 5
FIT_ROWS = 300          # that thresholds are searched on, before 1.0: each try routes all of them, one by one
FIT_TRIES = 20
CONFIDENCE = 0.5        # since 1.0: an answer more likely right than wrong is accepted
ADDED = 10              # routes that are removed and added, timed


class Lookup(DenseEncoder):
    """Vectors that were computed before, by a name in the place of the text."""

    vectors: ClassVar[dict[str, np.ndarray]] = {}
    name: str = "lookup"

    def __call__(self, docs: Sequence[str]) -> list[list[float]]:
        # Before 1.0 it encodes a word of its own, to see how wide vectors are.
        some = next(iter(self.vectors.values()))
        return [self.vectors.get(doc, some).tolist() for doc in docs]


class Thresholds:
    """Before 1.0: the five nearest utterances, mean cosine a route, a threshold a route."""

    def __init__(self, routes: list[Route]) -> None:
        from semantic_router.routers import SemanticRouter

        self.router = SemanticRouter(encoder=Lookup(), routes=routes, auto_sync="local")

    def fit(self, texts: Sequence[str], names: Sequence[str | None]) -> None:
        random.seed(0)
        self.router.fit(list(texts), list(names), max_iter=FIT_TRIES)
        self.thresholds = dict(self.router.get_thresholds())
        self.router.set_threshold(0.0)    # from here on it ranks; the thresholds are applied to what it ranked

    def ranked(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        rows = []
        for text in texts:
            found = self.router(vector=Lookup.vectors[text], limit=None)
            rows.append([(choice.name, choice.similarity_score) for choice in (found if isinstance(found, list) else [found])])
        return rows

    def chosen(self, row: Sequence[tuple[str, float]]) -> str | None:
        """The first route that passes its own threshold."""
        return next((name for name, score in row if score >= self.thresholds[name]), None)

    def remove(self, name: str) -> None:
        self.router.delete(name)

    def add(self, route: Route) -> None:
        self.router.add(route)


class Confidences:
    """Since 1.0: the same scores, turned into the probability that the best route is right."""

    def __init__(self, routes: list[Route]) -> None:
        from semantic_router import IndexedRouter

        self.router: Any = IndexedRouter(encoder=Lookup(), routes=routes)

    def fit(self, texts: Sequence[str], names: Sequence[str | None]) -> None:
        self.router.fit(list(texts), list(names))

    def ranked(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        rows = []
        for text in texts:
            found = self.router(text, limit=RANKED, threshold=0.0)
            rows.append([(choice.name, choice.confidence) for choice in found])
        return rows

    def chosen(self, row: Sequence[tuple[str, float]]) -> str | None:
        name, confidence = row[0]
        return name if confidence >= CONFIDENCE else None

    def remove(self, name: str) -> None:
        # Not `remove`: it would calibrate again, with this route's rows as unroutable.
        self.router.index.delete(name)
        self.router.refresh()

    def add(self, route: Route) -> None:
        self.router._index([route])
        self.router.refresh()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", type=Path, help="the .npz to read")
    parser.add_argument("answers", type=Path, help="the .npz to write")
    arguments = parser.parse_args()
    with np.load(arguments.task) as data:
        task = {name: data[name] for name in data.files}
    parts = [str(name) for name in task["parts"]]
    texts = {part: [f"{part} {i}" for i in range(len(task[f"{part}_vectors"]))] for part in ("train", "fit", *parts)}
    for part, keys in texts.items():
        Lookup.vectors.update(zip(keys, task[f"{part}_vectors"], strict=True))
    names = sorted(set(task["train_routes"].tolist()))
    utterances: dict[str, list[str]] = {name: [] for name in names}
    for text, name in zip(texts["train"], task["train_routes"].tolist(), strict=True):
        utterances[name].append(text)
    routes = [Route(name=name, utterances=keys) for name, keys in utterances.items()]
    old = semantic_router.__version__.startswith("0.")
    started = time.perf_counter()
    router = Thresholds(routes) if old else Confidences(routes)
    built_s = time.perf_counter() - started

    started = time.perf_counter()
    fit_texts, fit_routes = texts["fit"], [name or None for name in task["fit_routes"].tolist()]
    if old:
        chosen = sorted(random.Random(0).sample(range(len(fit_texts)), min(FIT_ROWS, len(fit_texts))))
        fit_texts, fit_routes = [fit_texts[i] for i in chosen], [fit_routes[i] for i in chosen]
    fitted = True
    try:
        router.fit(fit_texts, fit_routes)
    except ValueError:    # every row was right: nothing to calibrate on
        fitted = False
    fit_s = time.perf_counter() - started

    place = {name: i for i, name in enumerate(names)}
    results: dict[str, Any] = {}
    query_s, queries = 0.0, 0
    for part in parts:
        started = time.perf_counter()
        rows = router.ranked(texts[part])
        query_s, queries = query_s + time.perf_counter() - started, queries + len(rows)
        ranked = np.full((len(rows), RANKED), -1)
        for at, row in enumerate(rows):
            found = [place[name] for name, score in row[:RANKED] if score > 0]
            ranked[at, : len(found)] = found
        results[f"{part}_ranked"] = ranked
        results[f"{part}_acceptance"] = np.array([row[0][1] for row in rows], float)
        results[f"{part}_chosen"] = np.array([place.get(router.chosen(row), -1) for row in rows])

    add_s = []
    for route in routes[:: max(1, len(routes) // ADDED)][:ADDED]:
        router.remove(route.name)
        started = time.perf_counter()
        router.add(route)
        add_s.append(time.perf_counter() - started)
    facts = {
        "version": semantic_router.__version__,
        "thresholds": "a route each, random search" if old else f"confidence {CONFIDENCE}",
        "fitted": fitted,
        "fit_rows": len(fit_texts),
        "fit_s": built_s + fit_s,
        "query_ms": 1e3 * query_s / max(1, queries),
        "add_ms": 1e3 * float(np.median(add_s)),
        "bytes_stored": int(sum(len(route.utterances) for route in routes) * task["train_vectors"].shape[1] * 8),
    }
    np.savez(arguments.answers, facts=np.array(json.dumps(facts)), names=np.array(names), **results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
