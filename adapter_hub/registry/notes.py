"""What is remembered from one pass over the log to the next: JSON documents by kind and key. Knows nothing of what they say.

They lie in the catalogue's database beside the log, and like it no file holds them and no rebuild brings them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select

from adapter_hub.registry import schema
from adapter_hub.registry.catalog import Catalog

JSON = Any


class Notes:
    """The notes of one registry. Safe between threads and processes; who writes last is right."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def read(self, kind: str) -> dict[str, JSON]:
        """Documents by key, in the order of the keys. Raises RegistryError."""
        n = schema.notes.c
        with self._catalog.reading() as connection:
            rows = connection.execute(select(n.key, n.body).where(n.kind == kind).order_by(n.key)).all()
        return {key: json.loads(body) for key, body in rows}

    def write(self, kind: str, bodies: Mapping[str, JSON | None]) -> None:
        """All of these documents in one transaction, in place of those of their keys; None removes one. Raises ReadOnlyRegistry, RegistryError."""
        n, at = schema.notes.c, datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [{"kind": kind, "key": key, "at": at, "body": json.dumps(body)} for key, body in bodies.items() if body is not None]
        with self._catalog.writing() as connection:
            connection.execute(delete(schema.notes).where(n.kind == kind, n.key.in_(list(bodies))))
            if rows:
                connection.execute(insert(schema.notes), rows)

    def forget(self, kind: str | None = None) -> None:
        """Erase those of a kind, or all. Raises ReadOnlyRegistry, RegistryError."""
        chosen = delete(schema.notes)
        with self._catalog.writing() as connection:
            connection.execute(chosen if kind is None else chosen.where(schema.notes.c.kind == kind))
