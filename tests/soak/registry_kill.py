"""Kill processes that write to a registry, at random moments, and look for damage.

    python -m tests.soak.registry_kill --kills 500
    python -m tests.soak.registry_kill --kills 500 --database postgresql+psycopg://user@host/database

Each child is forked after the imports, registers, moves, retires and purges as fast as it can, and tells its parent through a
pipe what was committed. After SIGKILL everything that it told must be there, nothing may be half there, and `verify` must
find nothing. The last line is JSON; exit code 1 where something was found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy

from adapter_hub.errors import NotRoutable
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.schema import VersionState

CONFIG = RegistryConfig(base_model="tiny", base_fingerprint="sha256:base", encoder="hash", max_tokens=64)
FACTS = VersionFacts(base_model="tiny", base_fingerprint="sha256:base", peft={"r": 8}, labels=("no", "yes"), tags=("soak",))
FILES = ("adapter_config.json", "adapter_model.safetensors", "routing.safetensors")
NAMES = ("banking", "travel", "auto")
DELAY_MAX_S = 0.25          # a registration takes about 0.04 s
FAULTS_MAX = 20
VERIFY_EVERY = 25           # kills between two full verifications
WEIGHTS_BYTES_MAX = 60_000


@contextmanager
def database_schema(database: str | None) -> Iterator[str | None]:
    """An empty schema of a PostgreSQL database, dropped afterwards; None stays None."""
    if database is None:
        yield None
        return
    schema = f"soak_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(database)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    url = sqlalchemy.make_url(database).update_query_dict({"options": f"-csearch_path={schema}"})
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
        engine.dispose()


def open_registry(folder: Path, url: str | None) -> Registry:
    return Registry.open(url or folder, artifacts=folder if url else None)


# ---- the child ------------------------------------------------------------------------------------------------------


def work(folder: Path, url: str | None, seed: int, told: int) -> None:
    """Write until killed. Each act is announced before it starts and told once it is committed."""
    choose = random.Random(seed)

    def tell(**fact: object) -> None:
        os.write(told, json.dumps(fact).encode() + b"\n")

    with open_registry(folder, url) as registry:
        tell(did="open")
        while True:
            name, act = choose.choice(NAMES), choose.choice(("add",) * 8 + ("promote", "rollback", "retire", "purge", "calibrate"))
            target = name if act in ("add", "calibrate") else _target(registry, name, choose)
            if target is None:
                continue
            tell(starts=act, ref=target)
            weights = choose.randbytes(choose.choice((100, 1_000, WEIGHTS_BYTES_MAX)))
            number = None
            if act == "add":
                target = str(registry.add(name, FACTS, {file: weights for file in FILES}))
            elif act == "calibrate":
                number = registry.add_calibration(weights, registry.production(), "soak")
            else:
                with suppress(NotRoutable):    # nothing to roll back to
                    getattr(registry, act)(name if act == "rollback" else target)
            production = {ref.name: ref.version for ref in registry.production()}
            tell(did=act, ref=target, weights=weights[:16].hex(), number=number, production=production)


def _target(registry: Registry, name: str, choose: random.Random) -> str | None:
    """A version that may be moved to, retired or purged; some are always left."""
    live = [str(row.ref) for row in registry.versions() if row.ref.name == name and row.state is VersionState.LIVE]
    return choose.choice(live) if len(live) >= 3 else None


# ---- the parent -----------------------------------------------------------------------------------------------------


class Soak:
    """Kills one child after the other and keeps what was told."""

    def __init__(self, folder: Path, url: str | None, seed: int) -> None:
        self.folder, self.url = folder, url
        self.choose = random.Random(seed)
        self.added: dict[str, str] = {}         # what children said was committed: ref -> first bytes of the weights
        self.gone: set[str] = set()             # refs that were purged
        self.perhaps_gone: set[str] = set()     # refs whose purge was interrupted
        self.production: dict[str, int] = {}    # name -> version, as last told
        self.unsure: set[str] = set()           # names whose production an interrupted act may have moved
        self.calibrations = 0
        self.interrupted: dict[str, int] = {}   # act -> how often a child died in it
        self.faults: list[str] = []
        self.last_error = ""

    def kill_one(self) -> None:
        read_end, write_end = os.pipe()
        seed = self.choose.randrange(2**32)    # drawn here: drawn in the child, the next one may draw the same, and store the same weights
        child = os.fork()
        if child == 0:
            try:
                os.close(read_end)
                work(self.folder, self.url, seed, write_end)
            except BaseException:
                os.write(write_end, json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
            finally:
                os._exit(1)
        os.close(write_end)
        lines = os.fdopen(read_end, "rb")
        first = lines.readline()                # the child has opened the registry
        time.sleep(self.choose.uniform(0, DELAY_MAX_S))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with lines:
            self._note([json.loads(line) for line in [first, *lines.readlines()] if line.endswith(b"\n")])
        if not os.WIFSIGNALED(status):
            self.faults.append(f"a child ended by itself: {self.last_error}")

    def _note(self, facts: list[dict[str, Any]]) -> None:
        for fact in facts:
            if "production" in fact:
                self.production = fact["production"]
                self.unsure.clear()
            self.last_error = fact.get("error", "")
            if fact.get("did") == "add":
                self.added[fact["ref"]] = fact["weights"]
            elif fact.get("did") == "purge":
                self.gone.add(fact["ref"])
            elif fact.get("did") == "calibrate":
                self.calibrations = max(self.calibrations, fact["number"])
        if facts and "starts" in facts[-1]:
            act, ref = str(facts[-1]["starts"]), str(facts[-1]["ref"])
            self.interrupted[act] = self.interrupted.get(act, 0) + 1
            self.unsure.add(ref.split("@")[0])
            if act == "purge":
                self.perhaps_gone.add(ref)

    def check(self, *, full: bool) -> None:
        """Look at what is visible now, through the opening of a registry after a crash."""
        with open_registry(self.folder, self.url) as registry:
            rows = {str(row.ref): row for row in registry.versions()}
            for ref, weights in self.added.items():
                if ref not in rows:
                    self.faults.append(f"{ref} was committed and is lost")
                elif rows[ref].state is not VersionState.PURGED:
                    if full and registry.read(ref, "adapter_model.safetensors")[:16].hex() != weights:
                        self.faults.append(f"{ref} has other weights")
                elif ref not in self.gone | self.perhaps_gone:
                    self.faults.append(f"{ref} is purged and nobody purged it")
            for ref in self.gone & rows.keys():
                if rows[ref].state is not VersionState.PURGED:
                    self.faults.append(f"{ref} was purged and is back")
            if (registry.latest_calibration() or 0) < self.calibrations:
                self.faults.append(f"calibration {self.calibrations} is lost")
            found = {ref.name: ref.version for ref in registry.production()}
            for name in set(NAMES) - self.unsure:
                if found.get(name) != self.production.get(name):
                    self.faults.append(f"production of {name} is {found.get(name)}, not {self.production.get(name)}")
            for ref in registry.production():
                registry.open_version(ref)
            if full:
                self.faults += [f"{problem.where}: {problem.fact}" for problem in registry.verify().problems]

    def check_rebuild(self) -> None:
        """What the files alone say must be what the catalogue says."""
        with open_registry(self.folder, self.url) as registry:
            registry.gc()
            before = (registry.versions(), registry.events(), registry.production())
        if self.url is not None:
            return    # the same code rebuilds both; tables are not dropped under a shared server
        (self.folder / "catalog.sqlite").unlink()
        with open_registry(self.folder, self.url) as registry:
            if (registry.versions(), registry.events(), registry.production()) != before:
                self.faults.append("the rebuilt catalogue differs")
            refused = registry.adopt()    # folders that were complete but not committed
            self.faults += [f"adopt, {problem.where}: {problem.fact}" for problem in refused.conflicts + refused.refused]
            self.faults += [f"after the rebuild, {problem.where}: {problem.fact}" for problem in registry.verify().problems]


def run(kills: int, database: str | None, folder: Path, seed: int) -> dict[str, object]:
    started = time.monotonic()
    with database_schema(database) as url:
        Registry.create(folder, config=CONFIG, database=url).close()
        soak = Soak(folder, url, seed)
        while soak.interrupted.get("add", 0) < kills and len(soak.faults) < FAULTS_MAX:
            soak.kill_one()
            killed = sum(soak.interrupted.values())
            soak.check(full=killed % VERIFY_EVERY == 0)
            if killed % VERIFY_EVERY == 0:
                print(f"{killed} kills, {len(soak.added)} versions told, {len(soak.faults)} faults", flush=True)
        soak.check(full=True)
        soak.check_rebuild()
        with open_registry(folder, url) as registry:
            report = registry.verify()
    return {
        "registrations_killed": soak.interrupted.get("add", 0),
        "catalogue": "postgresql" if database else "sqlite",
        "seed": seed,
        "interrupted": soak.interrupted,
        "versions_told": len(soak.added),
        "versions": report.versions,
        "unregistered_folders": len(report.unregistered),
        "faults": soak.faults,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="registrations to interrupt")
    parser.add_argument("--database", default=None, help="PostgreSQL URL; by default SQLite")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = run(arguments.kills, arguments.database, Path(folder) / "registry", arguments.seed)
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
