"""Many processes register under one name at once: every version must be there, each number once.

    python -m tests.soak.registry_race --processes 8 --each 50
    python -m tests.soak.registry_race --processes 8 --each 50 --database postgresql+psycopg://user@host/database

Meanwhile the parent follows the events, as a router does, and must miss none. The last line is JSON; exit code 1 on a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from adapter_hub.registry.registry import Registry
from tests.soak.registry_kill import CONFIG, FACTS, database_schema, open_registry

NAME = "banking"


def register_many(folder: Path, url: str | None, process: int, each: int) -> None:
    with open_registry(folder, url) as registry:
        for number in range(each):
            weights = f"{process}/{number}".encode()
            registry.add(NAME, FACTS, {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}, reason=weights.decode())


def run(processes: int, each: int, database: str | None, folder: Path) -> dict[str, object]:
    started = time.monotonic()
    with database_schema(database) as url:
        registry = Registry.create(folder, config=CONFIG, database=url)
        children = []
        for process in range(processes):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    register_many(folder, url, process, each)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        followed: list[int] = []
        statuses: list[int] = []
        while len(statuses) < processes:
            followed += [event.seq for event in registry.events(after=followed[-1] if followed else 0)]
            done, status = os.waitpid(-1, os.WNOHANG)
            statuses += [status] if done else []
            time.sleep(0.002)
        followed += [event.seq for event in registry.events(after=followed[-1] if followed else 0)]
        faults = check(registry, processes, each, followed, statuses)
        registry.close()
    seconds = round(time.monotonic() - started, 1)
    catalogue = "postgresql" if database else "sqlite"
    return {"processes": processes, "each": each, "catalogue": catalogue, "faults": faults, "seconds": seconds}


def check(registry: Registry, processes: int, each: int, followed: list[int], statuses: list[int]) -> list[str]:
    faults = [f"a child ended with status {status}" for status in statuses if status]
    versions = [row.ref.version for row in registry.versions(NAME)]
    if versions != list(range(1, processes * each + 1)):
        faults.append(f"the versions are not 1 to {processes * each}: {versions}")
    stored = sorted(registry.read(f"{NAME}@{version}", "adapter_model.safetensors").decode() for version in versions)
    if stored != sorted(f"{process}/{number}" for process in range(processes) for number in range(each)):
        faults.append("not every registration is there once")
    if followed != [event.seq for event in registry.events()]:
        faults.append("whoever follows the events missed one")
    return faults + [f"{problem.where}: {problem.fact}" for problem in registry.verify().problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--each", type=int, default=50)
    parser.add_argument("--database", default=None, help="PostgreSQL URL; by default SQLite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        result = run(arguments.processes, arguments.each, arguments.database, Path(folder) / "registry")
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
