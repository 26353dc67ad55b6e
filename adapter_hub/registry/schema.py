"""The tables of the catalogue: one schema for SQLite and PostgreSQL. Every column that a query asks for is indexed."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, Table, Text

SCHEMA_VERSION = 4    # 1 had no id of the catalogue, 2 no observations and no feedback, 3 no candidate of an observation and no notes


class VersionState(StrEnum):
    RESERVED = "reserved"    # the number is taken; nothing is visible yet, or a crash left a gap
    LIVE = "live"
    RETIRED = "retired"
    PURGING = "purging"      # purged for every reader; its files may still have to be erased
    PURGED = "purged"


metadata = MetaData()

# Prefixed, because a team's database may hold other tables.
schema_version = Table(
    "hub_schema",
    metadata,
    Column("version", Integer, nullable=False),
    Column("catalogue", Text),    # a random id: a folder's `.catalogue` says which catalogue is its own
)

versions = Table(
    "hub_versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False, index=True),
    Column("digest", Text),
    Column("base_model", Text, index=True),
    Column("base_fingerprint", Text, index=True),
    Column("task_type", Text, index=True),
    Column("labels", Text),         # JSON
    Column("tags", Text),           # JSON; hub_tags is what is searched
    Column("description", Text),
    Column("created_at", Text),
    Column("manifest", Text),       # JSON; NULL where the folder was lost
)

tags = Table(
    "hub_tags",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("tag", Text, primary_key=True, index=True),
)

files = Table(
    "hub_files",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("file", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Index("hub_files_by_content", "name", "sha256"),
)

aliases = Table(
    "hub_aliases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True, index=True),
    Column("version", Integer, nullable=False),
)

calibrations = Table(
    "hub_calibrations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False, index=True),
    Column("sha256", Text),
)

events = Table(
    "hub_events",
    metadata,
    # Given out under the lock that all writers take, so events become visible in this order, without gaps.
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("at", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text),
    Column("version", Integer, nullable=False),
    Column("alias", Text),
    Column("previous", Integer),
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False),         # JSON
    Column("mirrored", Integer, nullable=False),    # 1 once the line in history.jsonl is durable
    Index("hub_events_by_alias", "name", "alias", "seq"),
    Index("hub_events_by_name", "name", "seq"),
    Index("hub_events_to_mirror", "mirrored", "name", "seq"),
)

# What was answered, and what people say of it: the log of this database, which no file holds and no rebuild brings back.
observations = Table(
    "hub_observations",
    metadata,
    Column("id", Text, primary_key=True),      # begins with the time: the order of the ids is that of the answers
    Column("at", Text, nullable=False),
    Column("name", Text),                      # NULL: the base model answered
    Column("version", Integer),
    Column("score", Double),
    Column("margin", Double),
    Column("reason", Text, nullable=False),
    Column("label", Text),
    Column("latency_ms", Double),
    Column("text", Text),
    Column("sha256", Text),                    # of the text
    Column("candidate", Text),                 # name of the best candidate, also where it was turned away; NULL: nothing was scored
    Index("hub_observations_by_name", "name", "id"),
)

feedback = Table(
    "hub_feedback",
    metadata,
    Column("observation", Text, primary_key=True),
    Column("correct_label", Text),
    Column("correct_adapter", Text),           # a name
    Column("at", Text, nullable=False, index=True),
)

# What is remembered from one pass over the log to the next. It comes from the log, and is lost with it.
notes = Table(
    "hub_notes",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("at", Text, nullable=False),
    Column("body", Text, nullable=False),      # JSON
)
