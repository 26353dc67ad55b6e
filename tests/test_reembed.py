"""A registry that goes over to another encoder: new versions from kept texts, whatever is in the way and wherever it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.errors import InvalidInput, ModelChanged, ModelNotFound, ReadOnlyRegistry, RegistryError
from adapter_hub.hub import Hub
from adapter_hub.registry.config import with_encoder
from adapter_hub.registry.registry import Registry
from adapter_hub.routing.encoder import load_encoder
from adapter_hub.testing import make_adapter, tiny_model

COLOURS = [{"text": f"paint the {thing} {colour}", "label": colour} for thing in ("wall", "door", "car", "fence") for colour in ("red", "blue")]
ANIMALS = [{"text": f"the {animal} {does}", "label": animal} for animal in ("dog", "cat") for does in ("runs", "sleeps", "eats its food", "is old")]
TEXTS = ["paint the gate blue", "the cat sleeps again", "embeddings of invoices"]
EVALUATION = [*(f"paint the {thing} red" for thing in ("roof", "gate", "shelf")), COLOURS[0]["text"]]    # the last is an example: dropped
ROUTING, WEIGHTS = "routing.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reembed")
    with Hub.create(root / "first", base_model=tiny_model(root / "bert"), encoder="hash") as hub:
        make_adapter(hub.base, root / "c", seed=1)
        make_adapter(hub.base, root / "a", seed=2)
        make_adapter(hub.base, root / "v", seed=3, task_type="FEATURE_EXTRACTION")
    tiny_model(root / "encoder", seed=4)
    return root


@pytest.fixture
def hub(folders: Path, tmp_path: Path) -> Hub:
    """Examples with evaluation inputs, examples that were taught further, a description, and one that only its name reaches."""
    Hub.create(tmp_path / "registry", base_model=folders / "bert", encoder="hash").close()
    toml = tmp_path / "registry" / "hub.toml"
    toml.write_text("# ours\n" + toml.read_text().replace('keep = "vectors"', 'keep = "text"    # so that we may go elsewhere'))
    hub = Hub.open(tmp_path / "registry")
    hub.register("colours", folders / "c", COLOURS, labels=["red", "blue"], evaluation=EVALUATION)
    hub.register("animals", folders / "a", ANIMALS, labels=["dog", "cat"])
    hub.teach("animals", [{"text": "the dog barks", "label": "dog"}, "the cat purrs"])
    hub.register("vectors", folders / "v", description="embeddings of invoices")
    hub.register("unseen", folders / "v", COLOURS[:2], description="colours by name", routed=False)
    assert routed(hub) == ["colours@1", "animals@2", "vectors@1"]
    return hub


def standing(hub: Hub) -> list[str]:
    return [str(ref) for ref in hub.registry.production()]


def routed(hub: Hub) -> list[str]:
    return [str(decision.adapter) for decision in hub.route(TEXTS, max_false_reject=0)]


OLD, NEW = ["animals@2", "colours@1", "unseen@1", "vectors@1"], ["animals@3", "colours@2", "unseen@2", "vectors@2"]


@pytest.mark.parametrize("kind", ["hash:64", "model"])
def test_each_version_in_production_becomes_a_new_one_by_the_new_encoder(hub: Hub, folders: Path, kind: str, tmp_path: Path) -> None:
    assert routed(hub) == ["colours@1", "animals@2", "vectors@1"]
    encoder = load_encoder(kind if kind != "model" else str(folders / "encoder"))
    found = hub.reembed(encoder.id)
    assert [(str(before), str(now)) for before, now in found.versions] == list(zip(OLD, NEW, strict=True))
    assert standing(hub) == NEW and found.calibration == 2 == hub.settle().calibration.id
    assert hub.settle().calibration.encoder_fingerprint == encoder.fingerprint == hub.config.encoder_fingerprint
    for before, now in found.versions:
        old, new = hub.show(before), hub.show(now)
        assert new.parent == str(before) and new.encoder_fingerprint == encoder.fingerprint and new.labels == old.labels
        assert (hub.registry.folder(now) / WEIGHTS).samefile(hub.registry.folder(before) / WEIGHTS)
        texts = {file for file in old.files if file.endswith(".jsonl")}
        assert {file: new.files[file] for file in texts} == {file: old.files[file] for file in texts}
    with Hub.create(tmp_path / "fresh", base_model=folders / "bert", encoder=encoder.id) as fresh:
        fresh.register("colours", folders / "c", COLOURS, labels=["red", "blue"], evaluation=EVALUATION)
        fresh.register("animals", folders / "a", [*ANIMALS, {"text": "the dog barks", "label": "dog"}, "the cat purrs"], labels=["dog", "cat"])
        fresh.register("vectors", folders / "v", description="embeddings of invoices")
        for name in ("colours", "animals", "vectors"):
            assert fresh.registry.read(name, ROUTING) == hub.registry.read(name, ROUTING)
    assert [event.reason for event in hub.history("colours")][-1] == f"encoded anew by {encoder.id}"
    assert routed(hub) == routed(Hub.open(tmp_path / "registry")) and hub.verify().ok
    if kind != "model":    # whose weights are random
        assert routed(hub) == ["colours@2", "animals@3", "vectors@2"]


def test_hub_toml_keeps_the_lines_of_people(hub: Hub, tmp_path: Path) -> None:
    before = (tmp_path / "registry" / "hub.toml").read_text()
    hub.reembed("hash:64")
    encoder, old = load_encoder("hash:64"), load_encoder("hash")
    after = (tmp_path / "registry" / "hub.toml").read_text()
    assert after == before.replace('encoder = "hash"', 'encoder = "hash:64"').replace(old.fingerprint, encoder.fingerprint)
    assert after.startswith("# ours\n") and "# so that we may go elsewhere" in after


def test_the_way_back_makes_new_versions_with_the_same_bytes(hub: Hub) -> None:
    states = {name: hub.registry.read(name, ROUTING) for name in ("colours", "animals", "vectors", "unseen")}
    hub.reembed("hash:64")
    found = hub.reembed("hash")
    assert standing(hub) == ["animals@4", "colours@3", "unseen@3", "vectors@3"] and found.calibration == 3
    assert {name: hub.registry.read(name, ROUTING) for name in states} == states
    assert routed(hub) == ["colours@3", "animals@4", "vectors@3"] and hub.verify().ok


def test_the_same_again_changes_nothing(hub: Hub) -> None:
    hub.reembed("hash:64")
    before = hub.registry.last_event()
    found = hub.reembed("hash:64")
    assert found.versions == () and found.calibration == 2 and hub.registry.last_event() == before


def test_without_texts_it_is_refused_by_name_and_nothing_changes(hub: Hub, folders: Path, tmp_path: Path) -> None:
    toml = tmp_path / "registry" / "hub.toml"
    kept = toml.read_text()
    toml.write_text(kept.replace('keep = "text"', 'keep = "vectors"'))
    bare = Hub.open(tmp_path / "registry")
    bare.register("bare", folders / "c", COLOURS, labels=["red", "blue"])
    bare.register("half", folders / "a", ANIMALS, labels=["dog", "cat"])
    bare.register("measured", folders / "v", description="what accountants write", evaluation=["an invoice"])
    bare.register("taught", folders / "a", ANIMALS, labels=["dog", "cat"])
    toml.write_text(kept)
    hub = Hub.open(tmp_path / "registry")
    hub.teach("taught", ["the cow moos"])    # keeps this text alone
    before, event = toml.read_bytes(), hub.registry.last_event()
    with pytest.raises(RegistryError, match=r"encoded anew: bare@1, half@1, measured@1, taught@2\. .*register them again with their examples"):
        hub.reembed("hash:64")
    assert toml.read_bytes() == before and hub.registry.last_event() == event and hub.route(TEXTS)
    for name in ("bare", "half", "measured", "taught"):
        hub.retire(name)
    assert len(hub.reembed("hash:64").versions) == 4


@pytest.mark.parametrize(("encoder", "error"), [("no/such/model", ModelNotFound), ("hash:x", InvalidInput)])
def test_an_encoder_that_is_not_there_changes_nothing(hub: Hub, encoder: str, error: type[Exception]) -> None:
    event = hub.registry.last_event()
    with pytest.raises(error):
        hub.reembed(encoder)
    assert hub.registry.last_event() == event and hub.config.encoder == "hash" and routed(hub)


class Crash(BaseException):
    """As if the process were killed: nothing catches it."""


ACTS = ("add", "name_encoder", "promote", "add_calibration")


def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Crash as the act of this number begins; returns the acts that were begun."""
    begun: list[str] = []

    def wrapped(act: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*args: Any, **options: Any) -> Any:
            begun.append(act)
            if len(begun) == at:
                raise Crash
            return real(*args, **options)

        return acting

    for act in ACTS:
        monkeypatch.setattr(Registry, act, wrapped(act, getattr(Registry, act)))
    return begun


@pytest.mark.parametrize("done", range(10))
def test_a_crash_between_any_two_steps_is_made_good_by_the_same_call(hub: Hub, done: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = ["add"] * 4 + ["name_encoder"] + ["promote"] * 4 + ["add_calibration"]
    begun = crashing(monkeypatch, done + 1)
    with pytest.raises(Crash):
        hub.reembed("hash:64")
    monkeypatch.undo()
    assert begun == expected[: done + 1]
    with Hub.open(tmp_path / "registry") as left:    # a service that starts in between
        if done < 5:
            assert routed(left) == ["colours@1", "animals@2", "vectors@1"]
        elif done < 9:
            with pytest.raises(ModelChanged, match="`adapter-hub reembed hash:64` encodes what is in production anew"):
                left.route(TEXTS)
            assert not left.verify().ok
        else:    # all of them are there: what was left to do is done by whoever routes
            assert routed(left) == ["colours@2", "animals@3", "vectors@2"]
    with Hub.open(tmp_path / "registry") as again:
        found = again.reembed("hash:64")
        assert standing(again) == NEW and found.calibration == 2 == again.registry.latest_calibration()
        assert [row.ref.version for row in again.list("colours")] == [1, 2] and [row.ref.version for row in again.list("animals")] == [1, 2, 3]
        assert routed(again) == ["colours@2", "animals@3", "vectors@2"] and again.verify().ok and again.config.encoder == "hash:64"


def test_what_moved_after_a_crash_is_what_is_encoded(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crashing(monkeypatch, 5)
    with pytest.raises(Crash):
        hub.reembed("hash:64")
    monkeypatch.undo()
    with Hub.open(tmp_path / "registry") as again:
        again.teach("colours", ["paint it black"])    # of colours@1, beside what was encoded anew already
        again.retire("vectors")
        found = again.reembed("hash:64")
        assert standing(again) == ["animals@3", "colours@4", "unseen@2"]
        assert again.show("colours@4").parent == "colours@3" and [str(now) for _, now in found.versions] == ["animals@3", "colours@4", "unseen@2"]


def test_another_open_hub_says_that_the_encoder_has_changed(hub: Hub, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routing, fresh = Hub.open(tmp_path / "registry"), Hub.open(tmp_path / "registry")
    assert routed(routing) == ["colours@1", "animals@2", "vectors@1"]
    router = routing.settle()
    crashing(monkeypatch, 6)    # hub.toml is written, nothing is promoted
    with pytest.raises(Crash):
        hub.reembed("hash:64")
    monkeypatch.undo()
    said = r"hub\.toml names the encoder 'hash:64' now, this hub was opened with 'hash'\. Open the registry again"
    for _ in range(2):
        for asked in (
            lambda: routing.route(TEXTS),
            lambda: fresh.explain(TEXTS[0]),
            lambda: routing.register("late", folders / "c", COLOURS, labels=["red", "blue"]),
            lambda: fresh.teach("colours@1", ["paint it black"]),
        ):
            with pytest.raises(ModelChanged, match=said):
                asked()
        Hub.open(tmp_path / "registry").reembed("hash:64")
    assert "late" not in routing.names() and router.refs
    assert routing.predict(["x"], adapters="colours")[0].adapter is not None    # by name nothing is encoded


def test_a_job_that_is_running_ends_with_the_encoder_it_began_with(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 100))
    other = Hub.open(tmp_path / "registry")
    seen: list[int] = []

    def meanwhile(progress: object) -> None:
        if not seen:
            seen.append(1)
            other.reembed("hash:64")

    summary = hub.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_false_reject=0, progress=meanwhile)
    assert seen and summary.answered == 300 and set(summary.adapters) == {"colours@1", "animals@2", "vectors@1"}


def test_two_at_once_make_one_change(hub: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda one: one.reembed("hash:64"), [hub, Hub.open(tmp_path / "registry")])
    assert sorted([len(first.versions), len(second.versions)]) == [0, 4]
    assert standing(hub) == NEW and len(hub.list()) == 9 and routed(hub) == ["colours@2", "animals@3", "vectors@2"]


def test_a_version_of_the_old_encoder_is_not_put_into_production(hub: Hub) -> None:
    """It would stop routing for all."""
    hub.reembed("hash:64")
    for move in (lambda: hub.promote("colours@1"), lambda: hub.rollback("colours"), lambda: hub.set_alias("colours", "production", 1)):
        with pytest.raises(ModelChanged, match=r"colours@1 was encoded by an encoder with fingerprint sha256:.*, and hub\.toml names 'hash:64'"):
            move()
    assert standing(hub) == NEW and str(hub.set_alias("colours", "before", 1)) == "colours@1"
    ref = hub.teach("colours", ["paint it black"])
    assert str(hub.rollback("colours")) == "colours@2" and ref.version == 3


def test_a_damaged_record_of_the_old_encoder_is_in_nobodys_way(hub: Hub, tmp_path: Path) -> None:
    hub.route(TEXTS)
    record = tmp_path / "registry" / "calibrations" / "1.safetensors"
    record.chmod(0o644)
    record.write_bytes(b"damaged")
    assert hub.reembed("hash:64").calibration == 2 and routed(hub) == ["colours@2", "animals@3", "vectors@2"]


def test_an_empty_registry_changes_its_encoder(folders: Path, tmp_path: Path) -> None:
    with Hub.create(tmp_path / "registry", base_model=folders / "bert", encoder="hash") as hub:
        assert hub.reembed("hash:64").to_json()["versions"] == [] and hub.config.encoder == "hash:64"
        hub.register("colours", folders / "c", COLOURS, labels=["red", "blue"])
        assert str(hub.route(TEXTS, max_false_reject=0)[0].adapter) == "colours@1"


def test_a_registry_that_may_only_be_read_is_not_changed(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    with Hub.open(tmp_path / "registry") as reader:
        reader.registry._catalog.writable = False
        with pytest.raises(ReadOnlyRegistry):
            reader.reembed("hash:64")


def test_the_verb_says_what_took_whose_place_and_what_has_no_text(hub: Hub, folders: Path, tmp_path: Path) -> None:
    registry = ["--registry", str(tmp_path / "registry")]
    done = CliRunner().invoke(app, ["reembed", "hash:64", "--reason", "shorter", *registry])
    assert done.exit_code == 0 and done.stdout.startswith("the encoder is hash:64, the calibration 2; encoded anew: 4\n")
    assert "colours@1" in done.stdout and "colours@2" in done.stdout
    done = CliRunner().invoke(app, ["reembed", "hash", "--json", *registry])
    assert json.loads(done.stdout)["versions"][1] == {"before": "colours@2", "now": "colours@3"}
    toml = tmp_path / "registry" / "hub.toml"
    toml.write_text(toml.read_text().replace('keep = "text"', 'keep = "vectors"'))
    with Hub.open(tmp_path / "registry") as bare:
        bare.register("bare", folders / "c", COLOURS, labels=["red", "blue"])
    done = CliRunner().invoke(app, ["reembed", "hash:64", *registry])
    assert done.exit_code == 2 and done.stderr.startswith("error: without all of their texts these cannot be encoded anew: bare@1.")


# ---- hub.toml -------------------------------------------------------------------------------------------------------

TOP = 'base_model = "b"\nmax_tokens = 8\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('encoder = "a" # why\nencoder_fingerprint = "f"\n', 'encoder = "x\\"y" # why\nencoder_fingerprint = "g"\n'),
        ("encoder='a'\n", 'encoder="x\\"y"\nencoder_fingerprint = "g"\n'),
        ('  encoder = "a # b"#c\r\n[policy]\r\n', '  encoder = "x\\"y"#c\r\nencoder_fingerprint = "g"\r\n[policy]\r\n'),
    ],
)
def test_only_the_lines_of_the_encoder_change(before: str, after: str) -> None:
    assert with_encoder(TOP + before, 'x"y', "g") == TOP + after


@pytest.mark.parametrize("text", ['"encoder" = "a"\n', 'encoder = """a"""\n', "\n"])
def test_a_line_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="the line of the encoder cannot be changed"):
        with_encoder(TOP + text, "x", "g")
