"""Many threads route while versions come and go: every answer must be that of one consistent snapshot.

    python -m tests.soak.router_threads --threads 16 --changes 1000

A second handle on the folder registers, promotes, rolls back, retires and purges. Each answer names the versions and the head behind it; the
router that is built at once over those versions, which must have been in production together, has to give the same candidates.
The last line is JSON; exit code 1 on a fault.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path

from adapter_hub.errors import NotRoutable
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.registry import Registry
from adapter_hub.routing.calibration import Calibration
from adapter_hub.routing.decision import Decision
from adapter_hub.routing.features import Features
from adapter_hub.routing.head import Head, Solver, can_solve, digest_of
from adapter_hub.routing.live import LiveRouter
from adapter_hub.routing.router import SCORE_DECIMALS, Router
from adapter_hub.routing.statistics import Exemplars, RoutingState
from tests.routing.conftest import World
from tests.routing.registries import CONFIG, add

STEP = 1.01 * 10**-SCORE_DECIMALS    # sums in another order may round to the neighbour
TASKS = 12


def run(threads: int, changes: int, folder: Path) -> dict[str, object]:
    started = time.monotonic()
    world = World(TASKS, 2, noise=0.9, seed=changes)
    queries = Features.concatenate([world.sample(place, 1)[0] for place in range(TASKS)])
    states: dict[AdapterRef, RoutingState] = {}
    with Registry.create(folder, config=CONFIG) as writer, Registry.open(folder) as reader:
        for place in range(4):
            state = world.state(place, 4)
            states[add(writer, f"task-{place:02d}", state)] = state
        live = LiveRouter(reader, lambda state: None)
        calibration = live.snapshot().calibration
        assert calibration is not None
        together = [frozenset(writer.production())]
        crowd = _Crowd(live, queries, threads)
        with crowd:
            for change in range(changes):
                _change(writer, world, states, random.Random(change))
                together.append(frozenset(writer.production()))
        last = live.snapshot(settled=True)
        crowd.note(last, last.route_features(queries, k=TASKS))
    faults = crowd.faults + check(crowd.answers, set(together), states, calibration, queries)
    if frozenset(last.versions) != together[-1] or not last.head or set(last.head.columns) != together[-1]:
        faults.append("the last snapshot does not know what is in production")
    seconds = round(time.monotonic() - started, 1)
    heads = len({head for _, head in crowd.answers})
    return {"threads": threads, "changes": changes, "snapshots": len(crowd.answers), "heads": heads, "faults": faults, "seconds": seconds}


def _change(writer: Registry, world: World, states: dict[AdapterRef, RoutingState], dice: random.Random) -> None:
    """One version more in production, one less, or another one of a name."""
    production = writer.production()
    act = dice.choice(["add", "add", "retire", "purge", "promote", "rollback"])
    older = [ref for ref in production if len(writer.versions(ref.name)) > 1]
    if act == "retire" and len(production) > 2:
        writer.retire(dice.choice(production))
    elif act == "purge" and len(production) > 2:
        writer.purge(dice.choice(production))
    elif act == "promote" and older:
        live = [row.ref for row in writer.versions(dice.choice(older).name) if row.state == "live"]
        writer.promote(dice.choice(live))
    elif act == "rollback" and older:
        with suppress(NotRoutable):    # where nothing lies before
            writer.rollback(dice.choice(older).name)
    else:
        place = dice.randrange(TASKS)
        state = world.state(place, 4)
        states[add(writer, f"task-{place:02d}", state)] = state


Answers = Mapping[tuple[frozenset[AdapterRef], str | None], list[list[Decision]]]


class _Crowd:
    """Threads that route as long as it is entered, and what they were told."""

    def __init__(self, live: LiveRouter, queries: Features, threads: int) -> None:
        self.answers: dict[tuple[frozenset[AdapterRef], str | None], list[list[Decision]]] = {}
        self.faults: list[str] = []
        self._live, self._queries, self._lock, self._stop = live, queries, threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._route, args=(number,)) for number in range(threads)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def note(self, router: Router, decisions: list[Decision]) -> None:
        with self._lock:
            told = self.answers.setdefault((frozenset(router.versions), router.head.digest if router.head else None), [])
            if decisions not in told:
                told.append(decisions)

    def _route(self, number: int) -> None:
        try:
            while not self._stop.wait(0.01):    # so that the writer gets its turns
                router = self._live.snapshot()
                self.note(router, router.route_features(self._queries, k=TASKS))
        except Exception as error:
            self.faults.append(f"thread {number}: {error!r}")


def check(
    answers: Answers, together: Set[frozenset[AdapterRef]], states: Mapping[AdapterRef, RoutingState], calibration: Calibration, queries: Features
) -> list[str]:
    faults = []
    sets = {digest_of({ref: states[ref].digest for ref in versions}): versions for versions in together}
    heads: dict[str | None, Head | None] = {None: None}
    for (versions, head), told in answers.items():
        if versions not in together or (head is not None and head not in sets):
            faults.append(f"{sorted(map(str, versions))} were never in production together, or their head's versions were not")
            continue
        if head not in heads:
            exemplars = {ref: Exemplars.of(states[ref]) for ref in sets[head or ""]}
            heads[head] = Solver(exemplars, next(iter(states.values())).dim).head(str(head)) if can_solve(exemplars) else None
        router = Router.build({ref: states[ref] for ref in versions}, calibration, heads[head])
        expected = router.route_features(queries, k=TASKS)
        faults += [f"{sorted(map(str, versions))} with head {head}: another answer" for found in told if not _agree(found, expected)]
    return faults


def _agree(found: list[Decision], expected: list[Decision]) -> bool:
    for a, b in zip(found, expected, strict=True):
        scores, others = dict(a.candidates), dict(b.candidates)
        if a.threshold != b.threshold or scores.keys() != others.keys() or any(abs(scores[ref] - others[ref]) > 2 * STEP for ref in scores):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--changes", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="router-") as folder:
        result = run(arguments.threads, arguments.changes, Path(folder) / "registry")
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
