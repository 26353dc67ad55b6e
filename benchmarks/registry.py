"""How long a registry takes with 10,000 versions in it: opening, listing, one registration.

    python benchmarks/registry.py
    python benchmarks/registry.py --versions 10000 --database postgresql+psycopg://user@host/database

The versions are made cheaply: manifests and histories are written as files without waiting for the disk, and the catalogue
is rebuilt from them, which is timed too. The last line is JSON. Imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import sqlalchemy

from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.events import Event, EventKind
from adapter_hub.registry.layout import HISTORY, MANIFEST
from adapter_hub.registry.manifest import Manifest, VersionFacts
from adapter_hub.registry.registry import Registry

CONFIG = RegistryConfig(base_model="tiny", base_fingerprint="sha256:base", encoder="hash", max_tokens=128)
LABELS = tuple(f"intent_{number}" for number in range(15))
PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"], "task_type": "SEQ_CLS"}
FACTS = VersionFacts(
    base_model="tiny", base_fingerprint="sha256:base", peft=PEFT, task_type="SEQ_CLS", labels=LABELS,
    metrics={"accuracy": 0.93}, description="A task among many.", tags=("bench", "english"),
)
WEIGHTS_BYTES = 700_000    # a LoRA of rank 8 on every linear layer of a small encoder
ADDS = 20                  # registrations that are timed, on the empty and on the full registry; their median counts
LIMITS_S = {"open_s": 1.0, "list_s": 1.0}
RATIO_MAX = 2.0


def fill(folder: Path, versions: int, names: int) -> None:
    """Write folders and histories of `versions` versions, without a catalogue and without waiting for the disk."""
    known = {item.name: getattr(FACTS, item.name) for item in fields(VersionFacts)}
    seq = 0
    for index in range(names):
        name, lines, production = f"task-{index:04}", [], None
        for version in range(1, versions // names + 1):
            at = f"2026-01-01T00:00:00.{seq:06}+00:00"
            made = Manifest(name=name, version=version, created_at=at, files={"adapter_model.safetensors": "0" * 64}, **known).sealed()
            place = folder / "adapters" / name / str(version)
            place.mkdir(parents=True)
            (place / MANIFEST).write_bytes(made.to_bytes())
            detail = {"digest": made.digest}
            lines.append(Event(seq + 1, at, EventKind.ADDED, name, version, detail=detail).to_line())
            lines.append(Event(seq + 2, at, EventKind.MOVED, name, version, "production", production).to_line())
            production, seq = version, seq + 2
        (folder / "adapters" / name / HISTORY).write_bytes(b"".join(lines))


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def add_s(registry: Registry, name: str, payload: bytes) -> float:
    """Median seconds of one registration; each has weights of its own."""

    def once(number: int) -> Callable[[], object]:
        weights = number.to_bytes(8, "big") + uuid.uuid4().bytes + payload
        return lambda: registry.add(name, FACTS, {"adapter_config.json": b"{}", "adapter_model.safetensors": weights})

    return statistics.median(timed(once(number)) for number in range(ADDS))


class Server:
    """Empty schemas of a PostgreSQL database, or nothing for SQLite."""

    def __init__(self, database: str | None) -> None:
        self.database = database
        self.schemas: list[str] = []

    def url(self) -> str | None:
        if self.database is None:
            return None
        self.schemas.append(f"bench_{uuid.uuid4().hex}")
        self._run(f"CREATE SCHEMA {self.schemas[-1]}")
        url = sqlalchemy.make_url(self.database).update_query_dict({"options": f"-csearch_path={self.schemas[-1]}"})
        return url.render_as_string(hide_password=False)

    def drop(self) -> None:
        for schema in self.schemas:
            self._run(f"DROP SCHEMA {schema} CASCADE")

    def _run(self, statement: str) -> None:
        engine = sqlalchemy.create_engine(self.database or "")
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


def measure(folder: Path, server: Server, versions: int, names: int) -> dict[str, float]:
    payload = bytes(WEIGHTS_BYTES)
    with Registry.create(folder / "empty", config=CONFIG, database=server.url()) as empty:
        empty_add_s = add_s(empty, "task-0000", payload)

    full, url = folder / "full", server.url()
    Registry.create(full, config=CONFIG).close()
    (full / "catalog.sqlite").unlink()
    fill_s = timed(lambda: fill(full, versions, names))

    def open_full() -> Registry:
        return Registry.open(url or full, artifacts=full if url else None)

    rebuild_s = timed(lambda: open_full().close())
    open_s = statistics.median(timed(lambda: open_full().close()) for _ in range(5))
    with open_full() as registry:
        assert len(registry.versions()) == versions
        result = {
            "open_s": open_s,
            "list_s": statistics.median(timed(registry.versions) for _ in range(5)),
            "list_by_tag_s": statistics.median(timed(lambda: registry.versions(tag="bench")) for _ in range(5)),
            "resolve_s": statistics.median(timed(lambda: registry.resolve("task-0000")) for _ in range(50)),
            "last_event_s": statistics.median(timed(registry.last_event) for _ in range(50)),
            "add_empty_s": empty_add_s,
            "add_full_s": add_s(registry, "task-0000", payload),
            "rebuild_s": rebuild_s,
            "fill_s": fill_s,
        }
    return result | {"add_ratio": result["add_full_s"] / empty_add_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--names", type=int, default=100, help="how many names the versions are spread over")
    parser.add_argument("--database", default=None, help="PostgreSQL URL; by default SQLite")
    arguments = parser.parse_args()
    server = Server(arguments.database)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            result = measure(Path(folder), server, arguments.versions, arguments.names)
        finally:
            server.drop()
    catalogue = "postgresql" if arguments.database else "sqlite"
    print(f"{arguments.versions} versions of {arguments.names} names, catalogue in {catalogue}")
    for key, value in result.items():
        print(f"  {key:14} {value:10.4f}")
    met = all(result[key] <= limit for key, limit in LIMITS_S.items()) and result["add_ratio"] <= RATIO_MAX
    print(json.dumps({"versions": arguments.versions, "names": arguments.names, "catalogue": catalogue, "met": met} | result))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
