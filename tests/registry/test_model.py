"""A registry against a plain dictionary: any order of acts, with the catalogue closed, lost and rebuilt in between."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_hub.errors import AdapterNotFound, DataRemains, NotRoutable
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry

CONFIG = RegistryConfig(base_model="tiny", base_fingerprint="sha256:base", encoder="hash", max_tokens=64)
NAMES = ("banking", "a.b-c_1")
names = st.sampled_from(NAMES)
numbers = st.integers(1, 6)
reasons = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)


@dataclass
class Name:
    """What the model knows of one name, kept the slow and obvious way."""

    contents: dict[int, bytes] = field(default_factory=dict)      # of every version that was ever registered
    retired: set[int] = field(default_factory=set)
    purged: set[int] = field(default_factory=set)
    aliases: dict[str, int] = field(default_factory=dict)
    before: list[int] = field(default_factory=list)               # versions that production was at, oldest first, now excluded

    def usable(self, version: int) -> bool:
        return version in self.contents and version not in self.retired | self.purged

    def move_production(self, version: int) -> None:
        now = self.aliases.get("production")
        if now is not None and now != version:
            self.before.append(now)
        if now is None and self.before and self.before[-1] == version:
            self.before.pop()
        self.aliases["production"] = version

    def drop(self, version: int, *, every_alias: bool) -> None:
        for alias in [alias for alias, named in self.aliases.items() if named == version]:
            if every_alias or alias == "production":
                del self.aliases[alias]


class RegistryMachine(RuleBasedStateMachine):
    make_url = staticmethod(lambda: None)

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="model-")) / "registry"
        self.url = self.make_url()
        self.registry = Registry.create(self.folder, config=CONFIG, database=self.url)
        self.model = {name: Name() for name in NAMES}
        self.events: list[object] = []

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.registry.close()
            shutil.rmtree(self.folder.parent)

    # ---- acts -------------------------------------------------------------------------------------------------------

    @rule(name=names, content=st.binary(min_size=1, max_size=3), promote=st.booleans(), tag=st.sampled_from(["x", "y"]))
    def add(self, name: str, content: bytes, promote: bool, tag: str) -> None:
        facts = VersionFacts(base_model="tiny", base_fingerprint="sha256:base", peft={}, tags=(tag,))
        ref = self.registry.add(name, facts, {"adapter_model.safetensors": content}, promote=promote)
        model = self.model[name]
        assert ref == AdapterRef(name, len(model.contents) + 1)
        model.contents[len(model.contents) + 1] = content
        if promote:
            model.move_production(len(model.contents))

    @rule(name=names, version=numbers, alias=st.sampled_from(["production", "staging"]), reason=reasons)
    def set_alias(self, name: str, version: int, alias: str, reason: str) -> None:
        model = self.model[name]
        if version not in model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.set_alias(name, alias, version, reason)
        elif version in model.purged or (alias == "production" and version in model.retired):
            with pytest.raises(NotRoutable):
                self.registry.set_alias(name, alias, version, reason)
        else:
            self.registry.set_alias(name, alias, version, reason)
            if alias == "production":
                model.move_production(version)
            else:
                model.aliases[alias] = version

    @rule(name=names)
    def rollback(self, name: str) -> None:
        model = self.model[name]
        if not model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.rollback(name)
        elif not any(model.usable(version) and version != model.aliases.get("production") for version in model.before):
            with pytest.raises(NotRoutable):
                self.registry.rollback(name)
        else:
            while not model.usable(model.before[-1]) or model.before[-1] == model.aliases.get("production"):
                model.before.pop()
            model.aliases["production"] = model.before.pop()
            assert self.registry.rollback(name).version == model.aliases["production"]

    @rule(name=names, reason=reasons)
    def withdraw(self, name: str, reason: str) -> None:
        model = self.model[name]
        if not model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.withdraw(name, reason)
        else:
            named = self.registry.withdraw(name, reason)
            assert (named and named.version) == model.aliases.pop("production", None)

    @rule(name=names, version=numbers)
    def retire(self, name: str, version: int) -> None:
        model = self.model[name]
        if version not in model.contents or version in model.purged:
            with pytest.raises(AdapterNotFound if version not in model.contents else NotRoutable):
                self.registry.retire(AdapterRef(name, version))
        else:
            self.registry.retire(AdapterRef(name, version))
            if version not in model.retired:
                model.drop(version, every_alias=False)
            model.retired.add(version)

    @rule(name=names, version=numbers, descendants=st.booleans())
    def purge(self, name: str, version: int, descendants: bool) -> None:
        model = self.model[name]
        if version not in model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.purge(AdapterRef(name, version))
            return
        same = {(n, v) for n, m in self.model.items() for v, content in m.contents.items() if content == model.contents[version]}
        gone = {(n, v) for n, v in same if version not in model.purged and v not in self.model[n].purged} | {(name, version)}
        if len(gone) > 1 and not descendants:
            with pytest.raises(DataRemains):
                self.registry.purge(AdapterRef(name, version))
            return
        self.registry.purge(AdapterRef(name, version), descendants=descendants)
        for n, v in gone:
            self.model[n].drop(v, every_alias=True)
            self.model[n].purged.add(v)

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry.open(self.url or self.folder, artifacts=self.folder if self.url else None)

    @precondition(lambda self: self.url is None)
    @rule()
    def lose_the_catalogue(self) -> None:
        self.registry.close()
        (self.folder / "catalog.sqlite").unlink()
        self.registry = Registry.open(self.folder)

    @rule()
    def tidy(self) -> None:
        (self.folder / ".staging/left by a crash").mkdir()
        assert self.registry.gc().removed == ("left by a crash",)
        assert self.registry.adopt().adopted == ()

    # ---- what must hold after each ----------------------------------------------------------------------------------

    @invariant()
    def versions_and_aliases_are_the_models(self) -> None:
        if not hasattr(self, "registry"):
            return
        rows = {row.ref: row for row in self.registry.versions()}
        assert list(rows) == [AdapterRef(name, v) for name in sorted(NAMES) for v in sorted(self.model[name].contents)]
        for ref, row in rows.items():
            model = self.model[ref.name]
            state = "purged" if ref.version in model.purged else "retired" if ref.version in model.retired else "live"
            aliases = tuple(sorted(alias for alias, version in model.aliases.items() if version == ref.version))
            assert (row.state, row.aliases) == (state, aliases)
            if state == "purged":
                assert [path.name for path in (self.folder / "adapters" / ref.name / str(ref.version)).iterdir()] == ["manifest.json"]
            else:
                assert self.registry.read(ref, "adapter_model.safetensors") == model.contents[ref.version or 0]
        in_production = [AdapterRef(n, self.model[n].aliases["production"]) for n in sorted(NAMES) if "production" in self.model[n].aliases]
        assert self.registry.production() == in_production

    @invariant()
    def events_only_grow_and_verify_finds_nothing(self) -> None:
        if not hasattr(self, "registry"):
            return
        events = self.registry.events()
        assert events[: len(self.events)] == self.events
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        self.events = list(events)
        report = self.registry.verify()
        assert report.problems == () and report.unregistered == ()


SMALL = settings(max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))


class TestOnSqlite(RegistryMachine.TestCase):
    settings = SMALL


def test_the_same_on_postgresql(postgres_schema):
    from hypothesis.stateful import run_state_machine_as_test

    class OnPostgres(RegistryMachine):
        make_url = staticmethod(postgres_schema)

    run_state_machine_as_test(OnPostgres, settings=settings(SMALL, max_examples=8))
