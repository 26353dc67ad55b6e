"""The catalogue is derived: lost, it comes back from manifests and histories. Folders from elsewhere are adopted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from adapter_hub.errors import CorruptVersion, NotRoutable, RegistryError, SchemaTooNew
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.registry import Registry
from tests.registry.conftest import CONFIG, Place


def everything(registry: Registry) -> dict[str, object]:
    names = registry.names()
    return {
        "versions": registry.versions(),
        "manifests": [registry.manifest(row.ref) for row in registry.versions()],
        "aliases": {name: registry.aliases(name) for name in names},
        "events": registry.events(),
        "calibrations": registry.latest_calibration(),
    }


def busy(registry: Registry, facts, files) -> None:
    """A registry in which everything has happened once."""
    for word in range(4):
        registry.add("banking", facts, files(str(word)), reason="grows")
    registry.add("travel", facts, files("t"), promote=False)
    registry.add_calibration(b"metric", [AdapterRef("banking", 4)], "first")
    registry.set_alias("travel", "staging", 1)
    registry.rollback("banking", reason="warum nicht – ünïcode")
    registry.retire("banking@1")
    registry.purge("banking@2", reason="asked to")
    registry.add("travel", facts, files("t2"))
    registry.retire("travel@2")


def test_a_lost_catalogue_comes_back_the_same(place, facts, files):
    registry = place.create()
    busy(registry, facts, files)
    before = everything(registry)
    place.forget()
    registry = place.open()
    assert everything(registry) == before
    assert registry.verify().to_json()["problems"] == []
    with pytest.raises(NotRoutable, match="that is neither retired nor purged"):    # what production named before is remembered too
        registry.rollback("banking")
    assert registry.add("banking", facts, files("new")).version == 5


def test_a_catalogue_moves_to_a_server_with_everything_in_it(sqlite_place, postgres_schema, facts, files):
    busy(registry := sqlite_place.create(), facts, files)
    before = everything(registry)
    sqlite_place.close()
    sqlite_place.url = postgres_schema()
    with pytest.raises(RegistryError, match=r"is in catalog\.sqlite\. To move it, close what has it open, delete .*catalog\.sqlite"):
        sqlite_place.open()
    holder = Registry.open(sqlite_place.folder)
    (sqlite_place.folder / "catalog.sqlite").unlink()
    assert everything(sqlite_place.open()) == before
    with pytest.raises(RegistryError, match="was removed or replaced"):
        holder.add("banking", facts, files("late"))
    holder.close()
    with pytest.raises(RegistryError, match=r"the catalogue of .* is in database"):
        Registry.open(sqlite_place.folder)
    assert not (sqlite_place.folder / "catalog.sqlite").exists()
    sqlite_place.open().add("banking", facts, files("on"))


def test_a_folder_has_one_catalogue_at_a_time(postgres_schema, tmp_path, facts, files):
    """A second one would give out the same numbers and move the same aliases."""
    first, second = Place(tmp_path / "registry", postgres_schema()), Place(tmp_path / "registry", postgres_schema())
    registry = first.create()
    registry.add("banking", facts, files("1"))
    with pytest.raises(RegistryError, match=r"the catalogue of .* is in database"):
        second.open()
    (first.folder / ".catalogue").unlink()    # as the error says
    assert second.open().add("banking", facts, files("2")).version == 2
    for write in (partial(registry.add, "banking", facts, files("3")), partial(registry.promote, "banking@1"), partial(registry.purge, "banking@1")):
        with pytest.raises(RegistryError, match=r"is not the catalogue of .* any more\. Open the registry again"):
            write()
    with pytest.raises(RegistryError, match=r"the catalogue of .* is in database"):
        first.open()
    assert second.open().verify().problems == () and second.open().verify().unregistered == ()
    first.close()
    second.close()


def test_a_link_is_not_read_to_say_where_the_catalogue_is(place, tmp_path):
    place.create()
    place.close()
    (tmp_path / "secret").write_text("nobody's business\n" * 2)
    (place.folder / ".catalogue").unlink()
    (place.folder / ".catalogue").symlink_to(tmp_path / "secret")
    with pytest.raises(RegistryError, match=r"\.catalogue is a symbolic link\. Delete") as caught:
        place.open()
    assert "business" not in str(caught.value)


def test_a_catalogue_of_the_schema_before_is_brought_up_to_date(place, facts, files):
    place.create().add("banking", facts, files())
    place.close()
    place.run("ALTER TABLE hub_schema DROP COLUMN catalogue")
    place.run("UPDATE hub_schema SET version = 1")
    (place.folder / ".catalogue").unlink()
    registry = place.open()
    assert registry.add("banking", facts, files()).version == 2 and registry.verify().ok


def test_a_torn_last_line_is_written_again(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    registry.add("banking", facts, files("2"))
    history = place.folder / "adapters/banking/history.jsonl"
    whole = history.read_bytes()
    for cut in (1, 30):    # the newline alone, and part of the last line, as a crash between write and mark leaves them
        place.run("UPDATE hub_events SET mirrored = 0 WHERE seq = 4")
        place.close()
        history.write_bytes(whole[:-cut])
        registry = place.open()
        assert history.read_bytes() == whole and registry.verify().ok


def test_a_line_that_was_written_but_not_marked_is_not_written_twice(place, facts, files):
    place.create().add("banking", facts, files())
    whole = (place.folder / "adapters/banking/history.jsonl").read_bytes()
    place.run("UPDATE hub_events SET mirrored = 0")
    place.close()
    place.open()
    assert (place.folder / "adapters/banking/history.jsonl").read_bytes() == whole


def test_a_rebuild_reads_past_a_torn_last_line_and_a_bad_one(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files("1"))
    history = sqlite_place.folder / "adapters/banking/history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(lines[0] + b"<<<<<<< HEAD\n" + lines[1] + b'{"seq": 3, "kind": "ad')
    sqlite_place.forget()
    registry = sqlite_place.open()
    assert registry.resolve("banking") == AdapterRef("banking", 1)
    assert [problem.where.rsplit(":")[-1] for problem in registry.verify().problems] == ["2"]
    registry.add("banking", facts, files("2"))
    assert len(history.read_bytes().splitlines()) == 5


BAD_LINES = {
    "an alias that is no text": b'{"seq": 9, "at": "t", "kind": "moved", "version": 1, "alias": ["p"]}',
    "an alias that is a path": b'{"seq": 9, "at": "t", "kind": "moved", "version": 1, "alias": "../../x y"}',
    "a version that was never registered": b'{"seq": 9, "at": "t", "kind": "moved", "version": 77, "alias": "production"}',
    "a number that no database holds": b'{"seq": 9, "at": "t", "kind": "added", "version": 9007199254740992}',
    "a NUL": b'{"seq": 9, "at": "t", "kind": "retired", "version": 1, "reason": "\\u0000"}',
    "half a character": b'{"seq": 9, "at": "t", "kind": "added", "version": 2, "detail": {"digest": "\\ud800"}}',
    "NaN": b'{"seq": 9, "at": "t", "kind": "retired", "version": 1, "detail": {"x": NaN}}',
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_one_bad_line_is_skipped_and_reported(place, facts, files, line):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    before = everything(registry)
    with (place.folder / "adapters/banking/history.jsonl").open("ab") as history:
        history.write(line + b"\n")
    assert not registry.verify().ok
    place.forget()
    registry = place.open()
    assert everything(registry) == before
    [problem] = registry.verify().problems
    assert "history.jsonl" in problem.where
    with pytest.raises(NotRoutable):
        registry.rollback("banking")


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"schema": 1, "peft": ' + '{"a":' * 400 + "1" + "}" * 401])
def test_a_manifest_of_bottomless_nesting_is_damage_like_any_other(sqlite_place, facts, files, bad):
    registry = sqlite_place.create()
    registry.add("banking", facts, files("1"))
    (sqlite_place.folder / "adapters/banking/1/manifest.json").write_text(bad)
    assert [problem.where for problem in registry.verify().problems] == ["banking@1"]
    sqlite_place.forget()
    assert [problem.where for problem in sqlite_place.open().verify().problems] == ["banking@1"]


def test_a_version_whose_folder_is_lost_keeps_its_number(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files("1"))
    registry.add("banking", facts, files("2"))
    shutil.rmtree(sqlite_place.folder / "adapters/banking/2")
    sqlite_place.forget()
    registry = sqlite_place.open()
    with pytest.raises(CorruptVersion, match="the folder of banking@2 is lost"):
        registry.manifest("banking@2")
    assert not registry.verify().ok
    assert registry.add("banking", facts, files("3")).version == 3
    assert registry.purge("banking@2") == [AdapterRef("banking", 2)]
    assert registry.verify().ok


def test_an_interrupted_purge_is_finished_at_the_next_open(place, facts, files):
    registry = place.create()
    registry.add("banking", facts, files())
    kept = place.folder / "kept"
    shutil.copytree(place.folder / "adapters/banking/1", kept)
    registry.purge("banking@1")
    for forget in (False, True):    # as a crash between commit and erasure leaves it, with and without its catalogue
        place.run("UPDATE hub_versions SET state = 'purging'")
        place.close()
        shutil.copytree(kept, place.folder / "adapters/banking/1", dirs_exist_ok=True)
        if forget:
            place.forget()
        registry = place.open()
        assert [path.name for path in (place.folder / "adapters/banking/1").iterdir()] == ["manifest.json"]
        with pytest.raises(NotRoutable):
            registry.resolve("banking@1")


def test_what_was_derived_goes_with_the_catalogue(place, facts, files):
    """The tombstones that a rebuild finds may have come with git, after the index was made."""
    registry = place.create()
    registry.add("banking", facts, files())
    (place.folder / "index/router").mkdir(parents=True)
    place.close()
    place.open()
    assert (place.folder / "index/router").exists()
    place.forget()
    place.open()
    assert not (place.folder / "index").exists()


@pytest.mark.parametrize("catalogue", [True, False], ids=["catalogue", "rebuilt"])
def test_a_complete_folder_that_no_history_names_is_seen_only_after_adopt(place, facts, files, tmp_path, catalogue):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    registry.add("banking", facts, files("2"))
    other = Registry.create(tmp_path / "other", config=registry.config)
    other.add("travel", facts, files("t"))
    other.close()
    shutil.copytree(tmp_path / "other/adapters/travel/1", place.folder / "adapters/travel/1")
    if not catalogue:
        place.forget()
        registry = place.open()
    assert registry.names() == ["banking"] and registry.verify().unregistered == ("travel@1",) and registry.verify().ok
    assert registry.adopt().to_json() == {"adopted": ["travel@1"], "events": 0, "conflicts": [], "refused": []}
    assert registry.names() == ["banking", "travel"] and registry.aliases("travel") == {}
    assert registry.promote("travel@1") and registry.add("travel", facts, files("t2")).version == 2
    assert registry.verify().ok
    before = everything(registry)
    place.forget()
    assert everything(place.open()) == before


def test_adopt_takes_in_what_a_pull_brought_with_its_history(sqlite_place, facts, files, tmp_path):
    registry = sqlite_place.create()
    registry.add("banking", facts, files("1"))
    sqlite_place.close()
    shutil.copytree(sqlite_place.folder, tmp_path / "clone", ignore=shutil.ignore_patterns("catalog.sqlite*", ".staging"))
    clone = Registry.open(tmp_path / "clone")
    clone.add("banking", facts, files("2"), reason="over there")
    clone.add("banking", facts, files("3"))
    clone.retire("banking@1")
    clone.purge("banking@2")
    wanted = (clone.versions(), clone.aliases("banking"))
    clone.close()
    shutil.copytree(tmp_path / "clone/adapters", sqlite_place.folder / "adapters", dirs_exist_ok=True)
    registry = sqlite_place.open()
    assert registry.resolve("banking").version == 1 and not registry.verify().ok
    report = registry.adopt()
    assert (report.conflicts, report.refused) == ((), ())
    assert (registry.versions(), registry.aliases("banking")) == wanted
    assert registry.verify().ok and registry.adopt().to_json() == {"adopted": [], "events": 0, "conflicts": [], "refused": []}
    before = everything(registry)
    sqlite_place.forget()
    assert everything(sqlite_place.open()) == before


def pull(clone: Path, folder: Path) -> None:
    """What `git pull` of another clone does where nothing conflicts."""
    for part in ("adapters", "calibrations"):
        if (clone / part).exists():
            shutil.copytree(clone / part, folder / part, dirs_exist_ok=True)


def cloned(place, tmp_path: Path) -> Registry:
    shutil.copytree(place.folder, tmp_path / "clone", ignore=shutil.ignore_patterns("catalog.sqlite*", ".staging", ".catalogue"))
    return Registry.open(tmp_path / "clone")


def test_a_promotion_that_is_committed_while_adopt_looks_is_not_lost(place, facts, files, tmp_path):
    registry = place.create()
    registry.add("banking", facts, files("1"))
    registry.add("banking", facts, files("2"))
    with cloned(place, tmp_path) as clone:
        clone.add("banking", facts, files("3"))
    pull(tmp_path / "clone", place.folder)
    colleague = place.open()
    report = registry.adopt(check=lambda folder, manifest: colleague.promote("banking@1", reason="meanwhile") and None)
    assert report.adopted == (AdapterRef("banking", 3),) and registry.production() == [AdapterRef("banking", 1)]
    assert registry.verify().problems == ()
    before = everything(registry)
    place.forget()
    assert everything(place.open())["aliases"] == before["aliases"]


def test_two_who_adopt_at_once_take_each_line_in_once(place, facts, files, tmp_path):
    registry, colleague = place.create(), place.open()
    registry.add("travel", facts, files())
    with cloned(place, tmp_path) as clone:
        clone.add("banking", facts, files("1"))
        clone.add("travel", facts, files("2"))
    pull(tmp_path / "clone", place.folder)
    reports = []
    registry.adopt(check=lambda folder, manifest: reports.append(colleague.adopt()))
    assert reports[0].events == 4
    assert len(registry.history("banking")) == 2 and len(registry.history("travel")) == 4 and registry.verify().problems == ()


def test_a_pulled_calibration_is_adopted(place, facts, files, tmp_path):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    registry.add_calibration(b"first", [ref], "why")
    with cloned(place, tmp_path) as clone:
        clone.add_calibration(b"second", [ref], "over there")
    history, record = place.folder / "calibrations/history.jsonl", place.folder / "calibrations/2.safetensors"
    shutil.copy(tmp_path / "clone/calibrations/history.jsonl", history)
    assert [problem.where for problem in registry.adopt().refused] == ["calibration 2"]    # its file has not come
    shutil.copy(tmp_path / "clone/calibrations/2.safetensors", record)
    assert registry.latest_calibration() == 1 and not registry.verify().ok
    assert registry.adopt().to_json() == {"adopted": [], "events": 1, "conflicts": [], "refused": []}
    assert (registry.latest_calibration(), registry.calibration(2)) == (2, b"second") and registry.verify().ok
    assert registry.add_calibration(b"third", [ref], "on") == 3
    before = everything(registry)
    place.forget()
    assert everything(place.open()) == before


@pytest.mark.parametrize("kept", [b"mine", b"theirs"])
def test_of_two_calibrations_with_one_number_the_file_says_which_is_meant(place, facts, files, tmp_path, kept):
    registry = place.create()
    ref = registry.add("banking", facts, files())
    with cloned(place, tmp_path) as clone:
        clone.add_calibration(b"theirs", [ref], "over there")
    registry.add_calibration(b"mine", [ref], "here")
    with (place.folder / "calibrations/history.jsonl").open("ab") as history:
        history.write((tmp_path / "clone/calibrations/history.jsonl").read_bytes())
    (place.folder / "calibrations/1.safetensors").write_bytes(kept)
    registry.adopt()
    assert registry.calibration(1) == kept and registry.verify().problems == ()
    place.forget()
    registry = place.open()
    assert registry.calibration(1) == kept and registry.verify().problems == ()


@pytest.mark.parametrize(
    ("changes", "without", "fact"),
    [
        ({"base_fingerprint": "sha256:another"}, None, "it was made for another base model (tiny)."),
        ({"encoder_fingerprint": "sha256:another"}, None, "its routing state was made with another encoder."),
        ({"encoder_fingerprint": None}, None, "its routing state was made with another encoder."),
        ({}, "routing.safetensors", "it has no routing.safetensors."),
        ({}, "adapter_config.json", "it has no adapter_config.json."),
        ({}, "adapter_model.safetensors", "it has no adapter_model.safetensors."),
    ],
)
def test_what_could_not_be_routed_or_run_is_not_adopted(sqlite_place, facts, files, tmp_path, changes, without, fact):
    config = dataclasses.replace(CONFIG, encoder_fingerprint="sha256:encoder")
    with Registry.create(tmp_path / "other", config=config) as other:
        stored = {file: data for file, data in files().items() if file != without}
        other.add("travel", dataclasses.replace(facts, **changes), stored)
    shutil.copytree(tmp_path / "other/adapters/travel/1", sqlite_place.folder / "adapters/travel/1")
    registry = Registry.create(sqlite_place.folder, config=config)
    assert [(problem.where, problem.fact) for problem in registry.adopt().refused] == [("travel@1", fact)]
    assert registry.names() == []
    registry.close()


def test_a_history_line_of_a_version_that_nobody_registered_is_not_adopted(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    with (sqlite_place.folder / "adapters/banking/history.jsonl").open("ab") as history:
        history.write(b'{"seq": 9, "at": "t", "kind": "moved", "version": 77, "alias": "production"}\n')
    assert [problem.fact for problem in registry.adopt().refused] == ["its history speaks of version 77, which it never registers."]
    assert registry.production() == [AdapterRef("banking", 1)]


def test_two_different_folders_with_one_number_are_a_conflict(place, facts, files, tmp_path):
    registry = place.create()
    registry.add("banking", facts, files("mine"))
    other = Registry.create(tmp_path / "other", config=registry.config)
    other.add("banking", facts, files("theirs"))
    other.close()
    shutil.copytree(tmp_path / "other/adapters/banking/1", place.folder / "adapters/banking/1", dirs_exist_ok=True)
    report = registry.adopt()
    assert [conflict.where for conflict in report.conflicts] == ["banking@1"] and report.adopted == ()
    with pytest.raises(CorruptVersion, match="is not the manifest that was registered"):
        registry.open_version("banking@1")


def test_folders_that_are_not_whole_versions_of_this_registry_are_refused(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    adapters = sqlite_place.folder / "adapters"
    shutil.copytree(adapters / "banking/1", adapters / "renamed/1")
    (adapters / "empty/1").mkdir(parents=True)
    (adapters / "linked").mkdir()
    (adapters / "linked/1").symlink_to(adapters / "banking/1")
    shutil.copytree(adapters / "banking/1", adapters / "banking/7")
    refused = {problem.where: problem.fact for problem in registry.adopt().refused}
    assert set(refused) == {"renamed@1", "empty@1", "linked@1", "banking@7"}
    assert "it was copied or renamed" in refused["renamed@1"] and "symbolic link" in refused["linked@1"]
    assert registry.names() == ["banking"]
    assert registry.add("banking", facts, files("2")).version == 8    # above every number that a folder has


def test_an_adapter_of_another_base_is_not_adopted(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    folder = sqlite_place.folder / "adapters/banking/1"
    shutil.move(folder, sqlite_place.folder / "aside")
    sqlite_place.close()
    (sqlite_place.folder / "adapters/banking/history.jsonl").unlink()
    sqlite_place.forget()
    toml = sqlite_place.folder / "hub.toml"
    toml.write_text(toml.read_text().replace("sha256:base", "sha256:another"))
    shutil.move(sqlite_place.folder / "aside", folder)
    assert [problem.fact for problem in sqlite_place.open().adopt().refused] == ["it was made for another base model (tiny)."]


def test_a_catalogue_of_a_newer_schema_is_refused_and_left_alone(place, facts, files, tree):
    place.create().add("banking", facts, files())
    place.run("UPDATE hub_schema SET version = 99")
    place.close()
    before = tree(place.folder)
    with pytest.raises(SchemaTooNew, match=r"has schema 99; this adapter_hub knows up to 4\. Upgrade adapter_hub\."):
        place.open()
    assert tree(place.folder) == before
    place.run("UPDATE hub_schema SET version = 4")
    assert place.open().verify().ok


def test_a_manifest_of_a_newer_schema_is_refused(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    path = sqlite_place.folder / "adapters/banking/1/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(SchemaTooNew, match="has manifest schema 2"):
        registry.open_version("banking")


def test_a_catalogue_that_is_removed_under_an_open_registry_is_noticed(sqlite_place, facts, files):
    registry = sqlite_place.create()
    registry.add("banking", facts, files())
    (sqlite_place.folder / "catalog.sqlite").unlink()
    with pytest.raises(Exception, match=r"catalog\.sqlite was removed or replaced while it was open. Open the registry again"):
        registry.add("banking", facts, files())
    registry = sqlite_place.open()
    assert registry.versions("banking")[0].ref.version == 1 and registry.verify().ok
