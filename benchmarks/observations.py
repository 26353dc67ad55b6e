"""What logging every answer with its text costs: requests of 64 rows with `observe` off and on, round by round in one run.

An act is some requests of `Hub.predict` and, at its end, what waits to be written: that would else fall on whoever comes next. Beside the
hub that logs stands another that does not: what two equal hubs differ by is the noise of the figure. Seconds of the clock, and of the
processor, which other work on the machine moves less and which do not see the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "observations.json"
ROWS, REQUESTS = 64, 2
RATIO_MAX = 1.05


def opened(root: Path, name: str, observe: str):  # type: ignore[no-untyped-def]
    """A hub of its own on a copy of the registry that ships."""
    from adapter_hub.hub import Hub

    folder = root / name
    shutil.copytree(ROOT / "registry", folder, ignore=shutil.ignore_patterns("catalog.sqlite*", "index", ".catalogue"))
    settings = folder / "hub.toml"
    settings.write_text(settings.read_text().replace('keep = "vectors"', 'keep = "text"') + f'observe = "{observe}"\n')
    hub = Hub.open(folder)
    hub.predict(["hello"])
    hub.settle()
    return hub


def measure(rounds: int) -> dict[str, object]:
    from engine_rounds import spread

    inbox = [json.loads(line)["text"] for line in (ROOT / "examples" / "inbox.jsonl").read_text().splitlines()]
    requests = [[inbox[(turn * ROWS + row) % len(inbox)] for row in range(ROWS)] for turn in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as folder:
        hubs = {name: opened(Path(folder), name, observe) for name, observe in (("off", "off"), ("off again", "off"), ("text", "text"))}

        def act(name: str):  # type: ignore[no-untyped-def]
            def ask() -> None:
                for texts in requests:
                    hubs[name].predict(texts)
                hubs[name].flush_observations()

            return ask

        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in hubs}
        for turn in range(-1, rounds):    # the first warms up
            names = list(hubs)
            for name in names[turn % 3 :] + names[: turn % 3]:    # in another order each round
                clock, processor = time.perf_counter(), time.process_time()
                act(name)()
                taken[name].append((time.perf_counter() - clock, time.process_time() - processor))
        found: dict[str, object] = {"off, ms": spread([1e3 * each[0] for each in taken["off"][1:]])}
        for which, what in enumerate(("clock", "processor")):
            for name in ("off again", "text"):
                pairs = zip(taken[name][1:], taken["off"][1:], strict=True)
                found[f"{name} / off, {what}"] = spread([mine[which] / theirs[which] for mine, theirs in pairs])
        logged = sum(1 for _ in hubs["text"].observations())
        dropped = hubs["text"].observations_dropped
        for hub in hubs.values():
            hub.close()
    assert (logged, dropped) == ((rounds + 1) * REQUESTS * ROWS + 1, 0), (logged, dropped)
    return {"rows": ROWS, "requests": REQUESTS, "rounds": rounds} | found | {"logged": logged, "dropped": dropped}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures = measure(arguments.rounds)
    for name, told in figures.items():
        print(f"{name:>26}  {' / '.join(f'{value:.3f}' for value in told) if isinstance(told, list) else told}")
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return 0 if figures["text / off, clock"][1] <= RATIO_MAX else 1    # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
