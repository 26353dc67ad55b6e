"""A registry on each catalogue: SQLite always, PostgreSQL where ADAPTER_HUB_TEST_POSTGRES names a server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy

from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry

POSTGRES = os.environ.get("ADAPTER_HUB_TEST_POSTGRES", "")
CONFIG = RegistryConfig(base_model="tiny", base_fingerprint="sha256:base", encoder="hash", max_tokens=64)


@dataclass
class Place:
    """Where a registry is: its folder, and the database URL of its catalogue if that is not in the folder."""

    folder: Path
    url: str | None
    opened: list[Registry] = field(default_factory=list)

    def create(self) -> Registry:
        return self._kept(Registry.create(self.folder, config=CONFIG, database=self.url))

    def open(self) -> Registry:
        return self._kept(Registry.open(self.url or self.folder, artifacts=self.folder if self.url else None))

    def _kept(self, registry: Registry) -> Registry:
        self.opened.append(registry)
        return registry

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()

    def forget(self) -> None:
        """Lose the catalogue, as a fresh clone has none."""
        self.close()
        if self.url is None:
            (self.folder / "catalog.sqlite").unlink()
        else:
            drop_tables(self.url)
            (self.folder / ".catalogue").unlink()    # it says that those tables are the only ones

    def run(self, statement: str) -> None:
        """Write to the catalogue behind the registry's back."""
        engine = sqlalchemy.create_engine(self.url or f"sqlite:///{self.folder / 'catalog.sqlite'}")
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()


def drop_tables(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        found = sqlalchemy.MetaData()
        found.reflect(connection)
        found.drop_all(connection)
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_schema() -> Iterator[Callable[[], str]]:
    """Makes URLs of empty schemas; they are dropped at the end of the session."""
    made: list[str] = []
    engine = sqlalchemy.create_engine(POSTGRES) if POSTGRES else None

    def make() -> str:
        if engine is None:
            pytest.skip("ADAPTER_HUB_TEST_POSTGRES names no PostgreSQL server")
        schema = f"hub_{uuid.uuid4().hex}"
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        made.append(schema)
        url = sqlalchemy.make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"})
        return url.render_as_string(hide_password=False)

    yield make
    if engine is not None:
        for schema in made:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, postgres_schema: Callable[[], str]) -> str | None:
    """None for the catalogue in the folder, else the URL of an empty PostgreSQL schema."""
    return postgres_schema() if request.param == "postgresql" else None


@pytest.fixture
def place(tmp_path: Path, catalog_url: str | None) -> Iterator[Place]:
    place = Place(tmp_path / "registry", catalog_url)
    yield place
    place.close()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "registry", None)
    yield place
    place.close()


@pytest.fixture
def facts() -> VersionFacts:
    return VersionFacts(
        base_model="tiny",
        base_fingerprint="sha256:base",
        encoder_fingerprint="sha256:encoder",
        peft={"peft_type": "LORA", "r": 8},
        task_type="SEQ_CLS",
        labels=("no", "yes"),
        metrics={"accuracy": 0.91},
        license="CC-BY-3.0",
        description="Questions about cards.",
        tags=("bank", "english"),
    )


@pytest.fixture
def files() -> Callable[[str], dict[str, bytes]]:
    """Files of a version; another word gives other weights."""

    def make(word: str = "one") -> dict[str, bytes]:
        return {
            "adapter_config.json": b'{"peft_type": "LORA", "r": 8}',
            "adapter_model.safetensors": word.encode() * 1_000,
            "routing.safetensors": b"vectors of " + word.encode(),
        }

    return make


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """What is stored: every file with its bytes, folders by name; neither the catalogue's own files nor locks."""

    def look(folder: Path) -> dict[str, bytes]:
        paths = (path for path in sorted(folder.rglob("*")) if not path.name.startswith("catalog.sqlite") and path.suffix != ".lock")
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder" for path in paths}

    return look
