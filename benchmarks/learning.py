"""How long a new skill takes: one domain of CLINC150, learned in an empty registry and beside nine others.

    python benchmarks/learning.py --data DIR [--repeats 3]

DIR holds clinc150/. The nine others are those of this repository's registry. Each time the domain's rows (a tenth of them carved for
validation) are learned by `balanced`, in turns; what the first `learn` of a process loads and imports is not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from continual_data import Task, load
from rich.console import Console
from rich.table import Table

from adapter_hub import Hub

REGISTRY = Path(__file__).parents[1] / "registry"
RESULTS = Path(__file__).parent / "results" / "learning.json"
DOMAIN = "banking"
PRESET = "balanced"
SECONDS_MOST, RATIO_MOST = 90.0, 1.15    # what the project promises, on two cores


def seconds(hub: Hub, task: Task, preset: str = PRESET) -> float:
    started = time.perf_counter()
    report = hub.learn(task.name, task.train, task.validation, config=preset)
    taken = time.perf_counter() - started
    assert report.promoted, report.reason
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of public data")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    task = next(one for one in load("clinc_domains", given.data, few=False, seed=0).tasks if one.name == DOMAIN)
    taken: dict[str, list[float]] = {"first": [], "tenth": []}
    with tempfile.TemporaryDirectory(prefix="learning-") as scratch:
        for turn in range(given.repeats + 1):
            folder = Path(scratch) / str(turn)
            shutil.copytree(REGISTRY, folder / "ten")
            with Hub.create(folder / "one") as empty, Hub.open(folder / "ten") as full:
                full.retire(DOMAIN, reason="it is learned anew")
                if not turn:    # imports, the base model, thread pools
                    seconds(empty, task, "fast")
                    continue
                full.settle()
                others = len(full.registry.production())
                taken["first"].append(seconds(empty, task))
                taken["tenth"].append(seconds(full, task))
    medians = {name: statistics.median(each) for name, each in taken.items()}
    ratio = statistics.median(tenth / first for first, tenth in zip(*taken.values(), strict=True))
    table = Table("", "median s", "least", "most", title=f"{DOMAIN}, {len(task.train)} rows, {PRESET}; beside {others} others: {ratio:.2f} times")
    for name, each in taken.items():
        table.add_row(name, f"{medians[name]:.1f}", f"{min(each):.1f}", f"{max(each):.1f}")
    Console(width=120).print(table)
    held = {"seconds": max(medians.values()) <= SECONDS_MOST, "ratio": 2 - RATIO_MOST <= ratio <= RATIO_MOST}
    result = {
        "benchmark": "learning", "rows": len(task.train), "others": others, "seconds": taken, "medians": medians, "ratio": ratio, "bars": held,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
