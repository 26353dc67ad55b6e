"""What a registry promises its callers, on both catalogues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_hub.errors import (
    AdapterNotFound,
    CorruptVersion,
    DataRemains,
    InvalidInput,
    InvalidName,
    NotRoutable,
    RegistryError,
    RegistryExists,
    RegistryNotFound,
)
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.config import RegistryConfig
from adapter_hub.registry.events import EventKind
from adapter_hub.registry.manifest import VersionFacts
from adapter_hub.registry.registry import Registry
from adapter_hub.registry.schema import VersionState


def test_a_version_is_read_back_byte_for_byte_with_its_facts(place, facts, files):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    assert ref == AdapterRef("banking", 1)
    assert {file: registry.read(ref, file) for file in files()} == files()
    manifest = registry.manifest("banking")
    assert manifest.facts() == facts
    assert {file: manifest.files[file] for file in files()} == {f: hashlib.sha256(data).hexdigest() for f, data in files().items()}
    on_disk = json.loads((registry.folder(ref) / "manifest.json").read_bytes())
    assert on_disk["digest"] == manifest.digest == manifest.computed_digest()


def test_files_may_be_given_as_paths_and_links(place, facts, files, tmp_path):
    real, link = tmp_path / "weights", tmp_path / "link"
    real.write_bytes(b"weights")
    link.symlink_to(real)    # a model hub's cache is made of links
    registry = place.create()
    ref = registry.add("banking", facts, files() | {"adapter_model.safetensors": link})
    stored = registry.folder(ref) / "adapter_model.safetensors"
    assert stored.read_bytes() == b"weights" and not stored.is_symlink()


def test_every_registration_makes_the_next_version_and_moves_production(place, facts, files):
    registry = place.create()
    refs = [registry.add("banking", facts, files(str(word))) for word in range(3)]
    candidate = registry.add("banking", facts, files("candidate"), promote=False)
    assert [*refs, candidate] == [AdapterRef("banking", n) for n in (1, 2, 3, 4)]
    assert registry.production() == [AdapterRef("banking", 3)]
    assert registry.resolve("banking") == registry.resolve("banking@production") == AdapterRef("banking", 3)
    assert registry.resolve("banking@4") == candidate


def test_equal_files_of_one_name_are_stored_once(place, facts, files):
    registry = place.create()
    first, second = registry.add("banking", facts, files("same")), registry.add("banking", facts, files("same"))
    other = registry.add("travel", facts, files("same"))
    inodes = [(registry.folder(ref) / "adapter_model.safetensors").stat().st_ino for ref in (first, second, other)]
    assert inodes[0] == inodes[1] != inodes[2]
    assert (registry.folder(first) / "README.md").stat().st_ino != (registry.folder(second) / "README.md").stat().st_ino


def test_a_damaged_file_is_not_linked_into_a_new_version(place, facts, files):
    registry = place.create()
    first = registry.add("banking", facts, files("same"))
    (registry.folder(first) / "adapter_model.safetensors").write_bytes(b"damaged")
    second = registry.add("banking", facts, files("same"))
    assert registry.read(second, "adapter_model.safetensors") == files("same")["adapter_model.safetensors"]


def test_search_by_name_base_tag_and_task_type(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files())
    registry.add("stories", VersionFacts(base_model="other", base_fingerprint="sha256:other", peft={}, task_type="CAUSAL_LM"), files())
    found = {
        "all": registry.versions(),
        "name": registry.versions("stories"),
        "base": registry.versions(base="other"),
        "fingerprint": registry.versions(base="sha256:base"),
        "tag": registry.versions(tag="bank"),
        "part of a tag": registry.versions(tag="ban"),
        "task": registry.versions(task_type="CAUSAL_LM"),
        "both": registry.versions(tag="bank", task_type="CAUSAL_LM"),
    }
    assert {key: [row.ref.name for row in rows] for key, rows in found.items()} == {
        "all": ["banking", "stories"], "name": ["stories"], "base": ["stories"], "fingerprint": ["banking"],
        "tag": ["banking"], "part of a tag": [], "task": ["stories"], "both": [],
    }    # fmt: skip
    row = found["tag"][0]
    assert (row.aliases, row.state, row.labels, row.tags) == (("production",), VersionState.LIVE, ("no", "yes"), ("bank", "english"))
    assert registry.names() == ["banking", "stories"]


def test_rollback_walks_back_through_what_was_in_production(place, facts, files):
    registry = place.create()
    for word in range(4):
        registry.add("banking", facts, files(str(word)))
    registry.promote("banking@2")
    assert [registry.rollback("banking").version for _ in range(2)] == [4, 3]
    registry.promote("banking@1")    # what was rolled back from is forgotten
    assert [registry.rollback("banking").version for _ in range(3)] == [3, 2, 1]
    with pytest.raises(NotRoutable, match="'banking' has no earlier version in production"):
        registry.rollback("banking")
    assert registry.resolve("banking").version == 1


def test_rollback_goes_on_past_retired_and_purged_versions(place, facts, files):
    registry = place.create()
    for word in range(5):
        registry.add("banking", facts, files(str(word)))
    registry.retire("banking@4")
    registry.purge("banking@3")
    assert registry.rollback("banking").version == 2
    registry.retire("banking@1")
    with pytest.raises(NotRoutable, match="no earlier version in production that is neither retired nor purged"):
        registry.rollback("banking")
    assert registry.resolve("banking").version == 2
    registry.close()
    registry.layout.catalog.unlink(missing_ok=True)
    assert place.open().resolve("banking").version == 2    # also where the history is replayed


def test_a_retired_version_leaves_production_and_can_still_be_read(place, facts, files):
    registry = place.create()
    first, second = registry.add("banking", facts, files("1")), registry.add("banking", facts, files("2"))
    registry.set_alias("banking", "old", 2)
    assert registry.retire("banking", reason="worse") == second
    with pytest.raises(NotRoutable, match=r"no version of 'banking' is in production\. `adapter-hub history banking` says why; .*promote banking@1`"):
        registry.resolve("banking")
    with pytest.raises(NotRoutable, match="banking@2 is retired"):
        registry.promote("banking@2")
    assert registry.read("banking@2", "routing.safetensors") == files("2")["routing.safetensors"]
    assert registry.aliases("banking") == {"old": 2} and registry.production() == []
    assert registry.rollback("banking") == first


def test_purge_erases_the_data_and_keeps_a_tombstone(place, facts, files):
    registry = place.create()
    same = files("same") | {"exemplars.jsonl": b"{}"}
    first, second = registry.add("banking", facts, files("1") | same), registry.add("banking", facts, files("2") | {"exemplars.jsonl": b"{}"})
    digest = registry.manifest(second).digest
    assert registry.purge("banking@2", reason="asked to") == [second]
    folder = place.folder / "adapters/banking/2"
    assert os.listdir(folder) == ["manifest.json"]
    assert b"cards" not in (folder / "manifest.json").read_bytes()
    with pytest.raises(NotRoutable, match="banking@2 was purged"):
        registry.resolve("banking@2")
    tombstone = registry.manifest("banking@2")
    assert (tombstone.digest, tombstone.files, tombstone.labels, tombstone.description) == (digest, {}, None, "")
    assert tombstone.purged_at is not None
    assert registry.open_version(first) and registry.verify().ok    # the linked sibling keeps its bytes
    assert registry.purge("banking@2") == [second] and registry.versions("banking")[1].state is VersionState.PURGED
    assert registry.add("banking", facts, files("3")).version == 3
    assert [event.kind for event in registry.history("banking") if event.version == 2][-2:] == [EventKind.REMOVED, EventKind.PURGED]


def test_threads_that_purge_one_version_at_once_all_find_it_done(place, facts, files):
    registry, start = place.create(), threading.Barrier(4)
    many = {f"part{i}.safetensors": bytes([i]) for i in range(60)}

    def purge(ref: AdapterRef) -> list[AdapterRef]:
        start.wait(60)
        return registry.purge(ref)

    with ThreadPoolExecutor(4) as threads:
        for number in range(5):
            ref = registry.add("banking", facts, files(str(number)) | many)
            assert list(threads.map(purge, [ref] * 4)) == [[ref]] * 4
            assert os.listdir(place.folder / f"adapters/banking/{ref.version}") == ["manifest.json"]
    assert registry.verify().ok and [event.kind for event in registry.events()].count(EventKind.PURGED) == 5


def index_of(place, *names: str) -> None:
    for name in names:    # a saved router, and what a process left that died while saving
        (place.folder / "index" / name).mkdir(parents=True)
        (place.folder / "index" / name / "0.safetensors").write_bytes(b"vectors of 1")


def test_a_purge_leaves_nothing_that_was_derived(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    index_of(place, "router", ".router.0123")
    registry.purge("banking@1")
    assert not (place.folder / "index").exists() and registry.purge("banking@1")
    index_of(place, "router")
    place.run("UPDATE hub_versions SET state = 'purging'")    # a crash in between
    registry = place.open()
    assert not (place.folder / "index").exists()
    (place.folder / "index").symlink_to(place.folder / "adapters")
    with pytest.raises(CorruptVersion, match="index is a symbolic link"):
        registry.purge("banking@1")


def test_a_purge_waits_for_who_is_writing_what_is_derived_and_erases_that_too(place, facts, files):
    registry = place.create()
    ref, other = registry.add("banking", facts, files("1")), registry.add("banking", facts, files("2"))
    with ThreadPoolExecutor(1) as threads:
        with registry.deriving() as purged:
            purging = threads.submit(place.open().purge, ref)
            while registry.versions("banking")[0].state is not VersionState.PURGED:
                time.sleep(0.01)
            index_of(place, "router")
            assert purged == set() and not purging.done()
        assert purging.result(60) == [ref] and not (place.folder / "index").exists()
    with registry.deriving() as purged:
        assert purged == {ref} and registry.resolve(other) == other


def test_who_reads_a_version_while_it_is_purged_is_told_so(place, facts, files):
    registry = place.create()

    def read(ref: AdapterRef) -> list[object]:
        raised: list[object] = []
        for ask in (lambda: registry.read(ref, "routing.safetensors"), lambda: registry.open_version(ref)):
            try:
                while ask():
                    pass
            except NotRoutable:
                raised.append("purged")
            except Exception as error:
                raised.append(error)
        return raised

    with ThreadPoolExecutor(2) as threads:
        for number in range(25):
            ref = registry.add("banking", facts, files(str(number)))
            reading = [threads.submit(read, ref) for _ in range(2)]
            registry.purge(ref)
            assert [each.result(60) for each in reading] == [["purged", "purged"]] * 2


@pytest.fixture
def family(place, facts, files) -> Registry:
    """banking@1, and what holds its data: @2 made from it, @3 made from @2, @4 and copy@1 with its weights or vectors. Not: travel@1."""
    registry = place.create()
    registry.add("banking", facts, files("one"))
    registry.add("banking", dataclasses.replace(facts, parent="banking@1"), files("one") | {"routing.safetensors": b"more vectors"})
    registry.add("banking", dataclasses.replace(facts, parent="banking@2"), files("three"))
    registry.add("banking", facts, files("four") | {"routing.safetensors": files("one")["routing.safetensors"]})
    registry.add("copy", facts, files("one"))
    registry.add("travel", facts, files("two"))
    registry.retire("copy@1")
    return registry


def test_purge_is_refused_while_other_versions_hold_the_same_data(family):
    with pytest.raises(DataRemains) as caught:
        family.purge("banking@1")
    assert {str(ref) for ref in caught.value.holders} == {"banking@2", "banking@3", "banking@4", "copy@1"}
    for part in ("banking@2", "copy@1", "descendants=True", "--descendants"):
        assert part in str(caught.value)
    assert family.production() == [AdapterRef("banking", 4), AdapterRef("travel", 1)] and family.verify().ok


def test_purge_with_descendants_erases_the_data_wherever_they_are(family, place):
    first, *others = family.purge("banking@1", "asked to", descendants=True)
    assert (str(first), {str(ref) for ref in others}) == ("banking@1", {"banking@2", "banking@3", "banking@4", "copy@1"})
    assert [str(row.ref) for row in family.versions() if row.state is not VersionState.PURGED] == ["travel@1"]
    left = [path for path in place.folder.rglob("*.safetensors") if path.parent.parent.name != "travel"]
    assert left == [] and family.verify().ok
    assert family.purge("banking@2") == [AdapterRef("banking", 2)]    # nothing holds its data any more


def test_what_a_version_has_from_its_parent_does_not_hold_up_its_purge(family):
    """banking@2 has the weights of banking@1, which stays; what is its own is also in @3, made from it."""
    with pytest.raises(DataRemains) as caught:
        family.purge("banking@2")
    assert [str(ref) for ref in caught.value.holders] == ["banking@3"]
    family.purge("banking@3")
    family.purge("banking@2")
    assert family.open_version("banking@1") and family.verify().ok


def test_what_was_started_from_a_versions_weights_holds_its_data(family, facts, files):
    """letters@1 began with the weights of two others; letters@2 was made from it."""
    family.add("letters", dataclasses.replace(facts, started_from=("travel@1", "banking@4")), files("five"))
    family.add("letters", dataclasses.replace(facts, parent="letters@1"), files("six"))
    with pytest.raises(DataRemains) as caught:
        family.purge("travel@1")
    assert [str(ref) for ref in caught.value.holders] == ["letters@1", "letters@2"]
    assert family.manifest("letters@1").origins == ("travel@1", "banking@4") and b"travel@1, banking@4" in family.read("letters@1", "README.md")
    assert {str(ref) for ref in family.purge("travel@1", descendants=True)} == {"travel@1", "letters@1", "letters@2"}
    assert family.open_version("banking@4") and family.verify().ok


def test_a_version_that_was_started_from_none_says_nothing_of_it(family):
    assert "started_from" not in family.manifest("travel@1").to_json()


def test_routing_states_without_vectors_are_no_shared_data(place, facts, files):
    registry, empty = place.create(), (2).to_bytes(8, "little") + b"{}"
    for name in ("banking", "travel"):
        registry.add(name, facts, files(name) | {"routing.safetensors": empty})
    assert registry.purge("banking@1") and registry.open_version("travel")


def test_a_calibration_stays_when_a_member_is_purged(place, facts, files):
    registry = place.create()
    first, second = registry.add("banking", facts, files("1")), registry.add("travel", facts, files("2"))
    registry.add_calibration(b"both", [first, second], "why")
    registry.purge(second)
    for forget in (False, True):
        if forget:
            place.forget()
            registry = place.open()
        assert (registry.latest_calibration(), registry.snapshot().calibration, registry.calibration(1)) == (1, 1, b"both")
        assert registry.verify().problems == ()


def test_a_calibration_of_what_was_purged_meanwhile_is_not_stored(place, facts, files):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    registry.purge(ref)
    with pytest.raises(NotRoutable, match="banking@1 was purged"):
        registry.add_calibration(b"metric", [ref], "why")
    assert registry.latest_calibration() is None and not list((place.folder / "calibrations").iterdir())


def test_numbers_are_not_reused_after_purging_the_newest(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files())
    registry.purge("banking@1")
    place.forget()
    assert place.open().add("banking", facts, files()).version == 2


def test_history_tells_each_move_with_time_reason_and_the_version_it_left(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files("1"), reason="first")
    registry.add("banking", facts, files("2"), promote=False)
    registry.promote("banking@2", reason="better")
    registry.promote("banking@2", reason="again")    # nothing moves
    registry.rollback("banking", reason="worse")
    told = [(e.seq, e.kind.value, e.version, e.alias, e.previous, e.reason) for e in registry.history("banking")]
    assert told == [
        (1, "added", 1, None, None, "first"),
        (2, "moved", 1, "production", None, "first"),
        (3, "added", 2, None, None, ""),
        (4, "moved", 2, "production", 1, "better"),
        (5, "rolled_back", 1, "production", 2, "worse"),
    ]
    assert registry.events(after=3) == registry.history("banking")[3:] and registry.last_event() == 5
    lines = [json.loads(line) for line in (place.folder / "adapters/banking/history.jsonl").read_text().splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5]


def test_an_unknown_reference_is_an_error_that_shows_the_closest(place, facts, files):
    registry = place.create()
    registry.add("sentiment", facts, files())
    with pytest.raises(AdapterNotFound, match=r"adapter 'sentment' is not registered\. Closest: 'sentiment'"):
        registry.versions("sentment")
    for asked in ("sentment", "sentment@3", "sentment@production"):    # the message names what was misspelt, with nothing added
        with pytest.raises(AdapterNotFound, match=r"adapter 'sentment' is not registered\. Closest: 'sentiment'"):
            registry.manifest(asked)
    with pytest.raises(AdapterNotFound, match="Closest: 'sentiment@1'"):
        registry.resolve("sentiment@2")
    for call in (registry.manifest, registry.folder, registry.promote, registry.retire, registry.purge, registry.open_version):
        with pytest.raises(AdapterNotFound):
            call("nobody@1")
    for call in (registry.aliases, registry.history, registry.rollback):
        with pytest.raises(AdapterNotFound):
            call("nobody")
    with pytest.raises(AdapterNotFound):
        registry.set_alias("sentiment", "staging", 7)


BAD_NAMES = ["../x", "a/b/c", "con", "", "x" * 300, "b\u0430nking", "Banking", ".hidden", "a\n", 3]    # U+0430 looks like an a


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_the_registry_is_refused_before_anything_is_written(sqlite_place, facts, files, tree, name):
    registry = sqlite_place.create()
    before = tree(sqlite_place.folder)
    calls = (registry.versions, registry.rollback, registry.history, lambda name: registry.set_alias("banking", name, 1))
    for call in (*calls, lambda name: registry.add(name, facts, files())):
        with pytest.raises(InvalidName):
            call(name)
    assert tree(sqlite_place.folder) == before


@pytest.mark.parametrize("file", ["../x", "a/b", "", ".hidden", "manifest.json", "x" * 200, "a\0"])
def test_a_file_name_that_could_leave_the_version_is_refused(sqlite_place, facts, tree, file):
    registry = sqlite_place.create()
    before = tree(sqlite_place.folder)
    with pytest.raises(InvalidInput, match="cannot be a file of a version"):
        registry.add("banking", facts, {file: b"x"})
    assert tree(sqlite_place.folder) == before


def test_facts_that_json_cannot_hold_are_refused():
    endless: dict[str, object] = {}
    endless["again"] = endless
    not_json = ({"metrics": {"loss": float("nan")}}, {"peft": {"target_modules": {"q"}}}, {"peft": endless})
    for changes in (*not_json, {"description": "\ud800"}, {"labels": "abc"}):
        with pytest.raises(InvalidInput):
            VersionFacts(**{"base_model": "b", "base_fingerprint": "f", "peft": {}} | changes)


def test_a_source_that_cannot_be_read_stores_nothing(sqlite_place, facts, files, tree, tmp_path):
    registry = sqlite_place.create()
    before = tree(sqlite_place.folder)
    with pytest.raises(InvalidInput, match="absent cannot be read: No such file"):
        registry.add("banking", facts, files() | {"exemplars.jsonl": tmp_path / "absent"})
    with pytest.raises(InvalidInput, match="given as str"):
        registry.add("banking", facts, {"adapter_config.json": "text"})
    with pytest.raises(InvalidInput, match="at least one file"):
        registry.add("banking", facts, {})
    assert tree(sqlite_place.folder) == before and registry.names() == []


def test_export_is_a_plain_peft_folder(place, facts, files, tmp_path):
    registry = place.create()
    ref = registry.add("banking", facts, files() | {"exemplars.jsonl": b"private"})
    target = registry.export(ref, tmp_path / "out")
    assert sorted(os.listdir(target)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (target / "adapter_model.safetensors").read_bytes() == files()["adapter_model.safetensors"]
    with pytest.raises(InvalidInput, match="not an empty folder"):
        registry.export(ref, target)


def test_the_model_card_says_what_it_is_and_how_to_load_it(place, facts, files):
    registry = place.create()
    card = registry.read(registry.add("banking", facts, files()), "README.md").decode()
    for part in ("# banking@1", "Questions about cards.", "`tiny`", "SEQ_CLS", "no, yes", "CC-BY-3.0", "PeftModel.from_pretrained"):
        assert part in card
    assert registry.read(registry.add("banking", facts, files() | {"README.md": b"mine"}), "README.md") == b"mine"


def test_calibrations_are_numbered_and_immutable(place, facts, files):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    assert registry.latest_calibration() is None
    assert [registry.add_calibration(data, [ref], "why") for data in (b"first", b"second")] == [1, 2]
    assert (registry.latest_calibration(), registry.calibration(1), registry.calibration(2)) == (2, b"first", b"second")
    event = registry.events()[-1]
    assert (event.kind, event.name, event.version, event.reason) == (EventKind.CALIBRATED, None, 2, "why")
    assert event.detail["members"] == ["banking@1"]
    with pytest.raises(InvalidInput, match=r"no calibration 3\. Known: 1, 2"):
        registry.calibration(3)


def test_create_refuses_a_registry_and_open_refuses_what_is_none(place, tmp_path):
    place.create()
    with pytest.raises(RegistryExists):
        Registry.create(place.folder, config=RegistryConfig("tiny", "hash", 8))
    if place.url:
        with pytest.raises(RegistryExists, match="holds a catalogue already"):
            Registry.create(tmp_path / "another", config=RegistryConfig("tiny", "hash", 8), database=place.url)
    for nothing in (tmp_path / "nothing", Path(__file__)):
        with pytest.raises(RegistryNotFound, match="there is no registry at"):
            Registry.open(nothing)


def test_a_folder_whose_catalogue_is_on_a_server_is_not_opened_without_it(postgres_schema, place):
    place.url = place.url or postgres_schema()
    place.create()
    with pytest.raises(RegistryError, match=r"the catalogue of .* is in database") as caught:
        Registry.open(place.folder)
    assert "@" not in str(caught.value).split("is in database")[1].split("Open its URL")[0]


def test_a_database_that_is_none_is_refused_with_a_reason(sqlite_place):
    sqlite_place.create()
    sqlite_place.forget()
    cases = {
        "mysql://host/db": (InvalidInput, "cannot be kept in mysql"),
        "://": (InvalidInput, "not one"),
        "postgresql+psycopg://nobody@127.0.0.1:1/none": (RegistryError, "cannot be reached"),
    }
    for url, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            Registry.open(url, artifacts=sqlite_place.folder)
        with pytest.raises(error, match=message):
            Registry.create(sqlite_place.folder / "another", config=sqlite_place.open().config, database=url)
        assert not (sqlite_place.folder / "another").exists()
        sqlite_place.forget()
    with pytest.raises(InvalidInput, match="does not say where the files are"):
        Registry.open("postgresql://127.0.0.1/db")
