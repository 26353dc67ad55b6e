"""Kill maintenance passes at random moments; the registry is sound after each, and the next pass ends what was begun.

    python -m tests.soak.maintenance_kill --kills 100

In each round a copy of one registry is maintained: one adapter is to be updated, one rolled back, one learns what agrees. After SIGKILL
`verify` must find nothing; after the next pass production names what an uninterrupted pass leaves there. The last line is JSON;
exit code 1 where something was found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from adapter_hub.hub import Hub
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TrainConfig

CONFIG = TrainConfig(r=4, epochs=4, steps_min=0, learning_rate=2e-2)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
OLD = {"fruit": ("apple", "plum"), "beast": ("zebra", "tiger")}
NEW = {"fruit": ("malum", "pirum"), "beast": ("equus", "felis")}
OTHER = {"fruit": "beast", "beast": "fruit"}


def rows(words: dict[str, tuple[str, ...]], count: int, frame: str) -> list[dict[str, str]]:
    return [{"text": frame.format(word, i), "label": label} for i in range(count) for label, own in words.items() for word in own]


def make(folder: Path) -> None:
    """Three adapters: the world has left the first behind, a bad version of the second is in production, much is said of the third and agrees."""
    with Hub.create(folder, base_model=tiny_model(folder.parent / "bert", "bert"), encoder="hash"):
        pass
    settings = folder / "hub.toml"
    text = settings.read_text().replace('keep = "vectors"', 'keep = "text"').replace('observe = "off"', 'observe = "text"')
    settings.write_text(text.replace("accuracy_floor = 0.7", "accuracy_floor = 0.8").replace("refresh_rows = 200", "refresh_rows = 100"))
    with Hub.open(folder) as hub:
        for name, frame in (("left", "{} number {}"), ("worse", "the {} at {}"), ("well", "one {} or {}")):
            hub.learn(name, rows(OLD, 10, frame), config=CONFIG, promote="always")
        swapped = [row | {"label": OTHER[row["label"]]} for row in rows(OLD, 10, "the {} at {}")]
        hub.learn("worse", swapped, config=CONFIG, start="cold", promote="always")
        agrees = rows(OLD, 40, "one {} or {}")[40:]
        for name, asked in (("left", rows(NEW, 25, "{} number {}")), ("worse", rows(OLD, 8, "the {} at {}")), ("well", agrees)):
            for row, answer in zip(asked, hub.predict([row["text"] for row in asked], adapters=name), strict=True):
                hub.feedback(answer.id, correct_label=row["label"])


def maintained(folder: Path) -> None:
    with Hub.open(folder) as hub:
        report = hub.maintain(config=CONFIG, now=NOW)
        if report.failed:
            raise AssertionError(str(report.failed))


def production(folder: Path) -> dict[str, int | None]:
    with Hub.open(folder) as hub:
        if not (found := hub.verify()).ok:
            raise AssertionError(f"verify: {found.problems}")
        return {ref.name: ref.version for ref in hub.registry.production()}


def forked(act: Callable[[], object]) -> int:
    """A child that does this and exits with 0, or 1 where it failed."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def succeeds(act: Callable[[], object]) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(forked(act), 0)[1]) == 0


def expects(folder: Path, expected: dict[str, int | None]) -> Callable[[], object]:
    def check() -> None:
        """A pass that dies while it stores a candidate leaves its number unused: the one that goes live may have a later one."""
        found = production(folder)
        if found | {name: min(found[name] or 0, expected[name] or 0) for name in ("left", "well")} != expected:
            raise AssertionError(f"production is {found}, not {expected}")

    return check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    luck, faults, hits = random.Random(given.seed), list[str](), 0
    with tempfile.TemporaryDirectory(prefix="maintenance-kill-") as scratch:
        template, folder = Path(scratch) / "template", Path(scratch) / "registry"
        if not succeeds(lambda: make(template)):
            raise SystemExit("the registry could not be made")
        shutil.copytree(template, folder)
        started = time.perf_counter()
        if not succeeds(lambda: maintained(folder)):
            raise SystemExit("an uninterrupted pass failed")
        seconds, expected = time.perf_counter() - started, {"left": 2, "worse": 1, "well": 2}
        if not succeeds(expects(folder, expected)):
            raise SystemExit("an uninterrupted pass left something else")
        while hits < given.kills and len(faults) < 5:
            shutil.rmtree(folder)
            shutil.copytree(template, folder)
            moments = [luck.uniform(0, seconds) for _ in range(luck.choice((1, 1, 2)))]    # the pass after a killed one is killed too
            for moment in moments:
                child = forked(lambda: maintained(folder))
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
                hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            if not succeeds(lambda: production(folder)):
                faults.append(f"after kills at {moments} s the registry was not sound")
            elif not (succeeds(lambda: maintained(folder)) and succeeds(expects(folder, expected))):
                faults.append(f"after kills at {moments} s the next pass did not end what was begun")
    print(json.dumps({"kills": hits, "pass_seconds": round(seconds, 2), "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
