"""Looking over a whole registry: the map, the merge of near-duplicates, the report, and their verbs. Real tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.continual.knowledge_map import EdgeKind, weight_cosine
from adapter_hub.continual.report import Measured
from adapter_hub.errors import DataRemains, InvalidInput, NotRoutable, RegistryError
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.events import EventKind
from adapter_hub.survey import _delta
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig

CONFIG = TrainConfig(r=4, epochs=8, steps_min=0, learning_rate=5e-3)
WORDS = {"fruit": ("apple", "pear", "plum"), "beast": ("zebra", "tiger", "camel")}
FRAMES = ("{} number {}", "see {} {}")


def rows(count: int, start: int = 0, labels: dict[str, str] | None = None) -> list[dict[str, str]]:
    return [
        {"text": FRAMES[i % len(FRAMES)].format(word, i), "label": (labels or {}).get(label, label)}
        for i in range(start, start + count) for label, own in WORDS.items() for word in own
    ]    # fmt: skip


GREETINGS = [{"text": f"good {time} friend {i}", "label": time} for time in ("morning", "evening") for i in range(15)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two that know the same, one that does not, and answers to them in the log."""
    root = tmp_path_factory.mktemp("overview")
    with Hub.create(root / "registry", base_model=tiny_model(root / "bert", "bert"), encoder="hash"):
        pass
    settings = root / "registry" / "hub.toml"
    settings.write_text(settings.read_text().replace('keep = "vectors"', 'keep = "text"').replace('observe = "off"', 'observe = "text"'))
    with Hub.open(root / "registry") as hub:
        hub.learn("kinds", rows(12), rows(6, 60), config=CONFIG, promote="always")
        hub.learn("sorts", rows(12, 30), rows(6, 70), config=CONFIG, promote="always")
        hub.learn("greetings", GREETINGS, config=CONFIG, promote="always")
        hub.calibrate()
        hub.predict([row["text"] for row in rows(2, 90)] + ["good morning friend 77", "qwerty <b>zxcv</b> 000"])
        for answer in hub.predict([row["text"] for row in rows(1, 95)], adapters="kinds"):
            hub.feedback(answer.id, correct_adapter="sorts")
        for answer in hub.predict([row["text"] for row in rows(1, 97)[:2]], adapters="sorts"):
            hub.feedback(answer.id, correct_label="fruit")
        hub.maintain()
    return root / "registry"


@pytest.fixture
def hub(template: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(template, tmp_path / "registry")
    with Hub.open(tmp_path / "registry") as hub:
        yield hub


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout, result.stderr


# ---- the map --------------------------------------------------------------------------------------------------------


def test_the_map_has_who_is_in_production_what_they_answered_and_who_knows_the_same(hub: Hub) -> None:
    found = hub.map()
    assert [str(node.ref) for node in found.nodes] == ["greetings@1", "kinds@1", "sorts@1"] and found.notes == ()
    answers = {node.ref.name: node.answers for node in found.nodes}
    logged = [row.adapter.name for row in hub.observations() if row.adapter]
    assert answers == {name: logged.count(name) for name in answers} and answers["kinds"] >= 6
    [twins] = found.near_duplicates
    assert (twins.first.name, twins.second.name, twins.labels) == ("kinds", "sorts", ("beast", "fruit"))
    corrected = [edge for edge in found.edges if edge.kind is EdgeKind.CORRECTED]
    assert [(edge.source.name, edge.target.name, edge.value, edge.inputs) for edge in corrected] == [("sorts", "kinds", 0.75, 8)]
    assert "greetings" not in {ref.name for edge in found.edges for ref in (edge.source, edge.target)}


def test_confusion_is_what_the_router_does_with_evaluation_inputs(hub: Hub) -> None:
    edges = {(edge.source.name, edge.target.name): edge for edge in hub.map().edges if edge.kind is EdgeKind.CONFUSION}
    for name, other in (("kinds", "sorts"), ("sorts", "kinds")):
        inputs = hub.state(name).evaluation.features
        chosen = [decision.candidates[0][0].name for decision in hub.settle().route_features(inputs, k=1, max_false_reject=0)]
        share = chosen.count(other) / len(chosen)
        assert (edges[name, other].value if (name, other) in edges else 0.0) == pytest.approx(share if share >= 0.02 else 0.0)


def test_without_texts_and_evaluation_inputs_the_map_is_whole(tmp_path: Path) -> None:
    with Hub.create(tmp_path / "registry", base_model=tiny_model(tmp_path / "bert", "bert"), encoder="hash") as hub:
        for seed, name in enumerate(("one", "two")):
            hub.register(name, make_adapter(hub.base, tmp_path / name, seed=seed), rows(6, 10 * seed), labels=["fruit", "beast"])
        found = hub.map()
        assert [str(node.ref) for node in found.nodes] == ["one@1", "two@1"] and found.near_duplicates
        assert {edge.inputs for edge in found.edges if edge.kind is EdgeKind.CONFUSION} <= {36}
        deltas = [_delta(hub, ref) for ref in hub.registry.production()]
        full = [np.concatenate([(one.scaling * one.b @ one.a).ravel() for _, one in sorted(delta.items())]) for delta in deltas]
        assert weight_cosine(*deltas) == pytest.approx(full[0] @ full[1] / np.linalg.norm(full[0]) / np.linalg.norm(full[1]), abs=1e-5)


def test_a_version_that_was_started_from_another_name_is_joined_to_it_and_changes_the_base_alike(hub: Hub) -> None:
    report = hub.learn("heirs", rows(8, 40), config=CONFIG, instead_of=["kinds"], promote="always")
    assert hub.show(report.ref).started_from == ("kinds@1",)
    assert [(edge.source.name, edge.target.name) for edge in hub.map().edges if edge.kind is EdgeKind.LINEAGE] == [("kinds", "heirs")]
    assert [node.origins for node in hub.map().nodes if node.ref == report.ref] == [("kinds@1",)]


def test_a_damaged_version_is_left_out_with_a_note(hub: Hub) -> None:
    damaged = hub.registry.folder("sorts") / "adapter_model.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    found = hub.map()
    assert [node.ref.name for node in found.nodes] == ["greetings", "kinds", "sorts"] and "sorts@1 is not compared in weights" in "".join(found.notes)


def test_an_empty_registry_has_an_empty_map_and_a_page(tmp_path: Path) -> None:
    with Hub.create(tmp_path / "registry", base_model=tiny_model(tmp_path / "bert", "bert"), encoder="hash") as hub:
        assert hub.map().nodes == () and hub.map().to_dot().startswith("digraph") and not hub.space().lands
        assert "This registry is empty" in hub.report(tmp_path / "report.html").read_text()


# ---- the router's space ---------------------------------------------------------------------------------------------


def test_the_space_shows_exemplars_held_out_inputs_against_their_threshold_and_recent_traffic(hub: Hub) -> None:
    found = hub.space()
    assert [land.ref.name for land in found.lands] == ["greetings", "kinds", "sorts"]
    for land in found.lands:
        state = hub.state(land.ref)
        assert len(land.exemplars) == state.count and len(land.inputs) == len(state.evaluation) == len(land.margins)
        rate = hub.config.max_false_reject
        decisions = hub.settle().route_features(state.evaluation.features, max_false_reject=rate) if len(state.evaluation) else []
        assert [margin < 0 for margin in land.margins] == [decision.adapter is None for decision in decisions]
    routed = [row for row in hub.observations() if row.score is not None]
    assert [one.accepted for one in found.asked] == [row.adapter is not None for row in routed]


# ---- merge ----------------------------------------------------------------------------------------------------------


def test_near_duplicates_become_one_that_is_no_worse_and_both_can_be_brought_back(hub: Hub) -> None:
    before = {name: hub.predict([row["text"] for row in rows(3, 80)], adapters=name) for name in ("kinds", "sorts")}
    report = hub.merge(["kinds", "sorts"], "things", config=CONFIG, reason="twins")
    assert report.promoted and [str(ref) for ref in report.withdrawn] == ["kinds@1", "sorts@1"]
    assert {str(ref): pairs.counts[0] for ref, pairs in report.compared.items()} == {"kinds@1": 18, "sorts@1": 18}
    assert [str(ref) for ref in hub.registry.production()] == ["greetings@1", "things@1"] and hub.verify().ok
    assert hub.history("kinds")[-1].reason == "merged into things@1: twins" and "twins" in hub.history("things")[-1].reason
    with pytest.raises(NotRoutable):
        hub.predict(["apple number 3"], adapters="kinds")
    figures = hub.evaluate(names=["things"])["adapters"]["things@1"]
    assert figures["rows"] >= 36 and figures["oracle"]["accuracy"] > 0.8
    assert not hub.map().near_duplicates
    hub.promote("kinds@1", "they were two after all")
    again = hub.predict([row["text"] for row in rows(3, 80)], adapters="kinds")
    assert [one.scores for one in again] == [one.scores for one in before["kinds"]]


def test_what_was_merged_is_found_by_a_purge_of_what_it_was_made_from(hub: Hub) -> None:
    report = hub.merge(["kinds", "sorts"], "things", config=CONFIG)
    assert report.promoted and hub.show("things").origins == ("kinds@1", "sorts@1")
    with pytest.raises(DataRemains, match="things@1"):
        hub.purge("kinds@1")


def test_one_of_them_may_learn_what_the_other_knows(hub: Hub) -> None:
    report = hub.merge(["kinds", "sorts"], "kinds", config=CONFIG)
    assert report.promoted and str(report.ref) == "kinds@2" and [str(ref) for ref in report.withdrawn] == ["sorts@1"]
    assert hub.show("kinds@2").parent == "kinds@1" and hub.show("kinds@2").started_from == ("sorts@1",)
    assert str(hub.rollback("kinds")) == "kinds@1"


def test_what_would_be_worse_is_held_and_nothing_changes(hub: Hub) -> None:
    """They say the opposite of each other: no one adapter is as good as both."""
    swapped = {"fruit": "beast", "beast": "fruit"}
    hub.learn("upside", rows(12, 30, swapped), rows(6, 70, swapped), config=CONFIG, promote="always")
    before = hub.registry.production()
    report = hub.merge(["sorts", "upside"], "both", config=CONFIG)
    assert not report.promoted and report.withdrawn == () and "both@1 is held: of 18 evaluation inputs of sorts@1" in report.reason
    assert hub.registry.production() == before and str(report.ref) == "both@1"


def test_what_cannot_be_merged_is_said_before_anything_is_learned(hub: Hub, tmp_path: Path) -> None:
    numbers = [{"text": f"{word} {i}", "label": str(i)} for word in ("two", "four") for i in range(10)]
    hub.learn("sizes", numbers, config=CONFIG, problem_type="regression", promote="always")
    for names, into, said in [
        (["kinds"], "x", "two adapters or more"),
        (["kinds", "kinds@1"], "x", "two adapters or more"),
        (["kinds", "sizes"], "x", "cannot be one"),
        (["kinds", "sorts"], "greetings", "is in production and none of those to merge"),
    ]:
        with pytest.raises(InvalidInput, match=said):
            hub.merge(names, into, config=CONFIG)
    hub.register("mute", make_adapter(hub.base, tmp_path / "mute", seed=3), description="fruit and beasts", labels=["fruit", "beast"])
    with pytest.raises(InvalidInput, match=r'no text of the examples of mute@1 is kept.*keep = "text"'):
        hub.merge(["kinds", "mute"], "x", config=CONFIG)
    with hub.registry.maintaining(), pytest.raises(RegistryError, match="another process maintains this registry"):
        hub.merge(["kinds", "sorts"], "x", config=CONFIG)
    with pytest.raises(InvalidInput, match="reason"):
        hub.merge(["kinds", "sorts"], "x", config=CONFIG, reason="x" * 100_000)
    assert "x" not in hub.registry.names()


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_tells_what_passes_measured_and_no_text_that_was_asked(hub: Hub, tmp_path: Path) -> None:
    text = hub.report(tmp_path / "report.html").read_text(encoding="utf-8")
    measured = [found for event in hub.registry.events() if (found := Measured.of(event))]
    assert {one.ref.name for one in measured} == {"greetings", "kinds", "sorts"}
    for one in measured:
        assert one.oracle is not None and f"{100 * one.oracle:.1f} %<small>@1</small>" in text
    assert "qwerty" not in text and "apple number" not in text
    assert sum(event.kind is EventKind.MAINTAINED for event in hub.registry.events()) == len(measured)


def test_what_was_held_and_rolled_back_and_proposed_stands_in_the_report(hub: Hub, tmp_path: Path) -> None:
    hub.learn("kinds", [row | {"label": "fruit"} for row in rows(4, 50)], config=CONFIG, promote="never")
    hub.learn("greetings", GREETINGS, config=CONFIG, promote="always")
    hub.rollback("greetings", reason="people <complained>")
    taught = {"state": "accepted", "teach": "kinds", "result": "kinds@9", "groups": {"1": ["id"]}, "decided_at": "2026-03-01T10:00:00+00:00"}
    hub.registry.notes.write("proposals", {"3": {"state": "open", "why": "alike", "groups": {"1": ["a", "b"], "2": ["c"]}}, "4": taught})
    alarm = {"kind": "alarm", "adapter": "kinds", "signal": "score", "reason": "it fell", "noted_at": "2026-03-01"}
    hub.registry.notes.write("alarm", {"1": alarm})
    text = hub.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for said in ("kinds@2", "people &lt;complained&gt;", "rolled back", "alike", "it fell", "took: open (1)", "took: accepted (1)", "kinds@9"):
        assert said in text, said


# ---- the verbs ------------------------------------------------------------------------------------------------------


def test_the_verbs_print_what_the_hub_returns(template: Path, tmp_path: Path) -> None:
    registry = str(shutil.copytree(template, tmp_path / "registry"))
    code, out, _ = invoke("map", "--registry", registry, "--json")
    document = json.loads(out)
    assert code == 0 and [one["adapter"] for one in document["adapters"]] == ["greetings@1", "kinds@1", "sorts@1"]
    proposal = document["near_duplicates"][0]["proposal"]
    assert proposal in invoke("map", "--registry", registry)[1]
    assert invoke("map", "--registry", registry, "--dot")[1].startswith("digraph adapters {")
    code, out, _ = invoke("report", "--registry", registry, "--output", str(tmp_path / "page.html"), "--json")
    assert code == 0 and json.loads(out)["bytes"] == (tmp_path / "page.html").stat().st_size
    code, out, _ = invoke(*proposal.split()[1:], "--config", "fast", "--registry", registry, "--json")
    done = json.loads(out)
    assert code == (0 if done["promoted"] else 1) and done["ref"] == "kinds@2" and set(done["compared"]) == {"kinds@1", "sorts@1"}


def test_pictures_are_png_and_what_they_need_is_said(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = str(shutil.copytree(template, tmp_path / "registry"))
    assert "does not end with .png" in invoke("map", "--registry", registry, "--picture", "map.svg")[2]
    assert "both --dot and --json" in invoke("map", "--registry", registry, "--dot", "--json")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    code, _, err = invoke("map", "--registry", registry, "--picture", str(tmp_path / "map.png"))
    assert code == 2 and "matplotlib, which is not installed. Install the extra: pip install 'adapter_hub[bench]'." in err
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="the extra 'bench' is not installed")
    code, _, err = invoke("map", "--registry", registry, "--picture", str(tmp_path / "map.png"), "--space", str(tmp_path / "space.png"))
    assert code == 0, err
    for name in ("map.png", "space.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_who_was_retired_is_not_on_the_map(hub: Hub) -> None:
    hub.learn("heirs", rows(8, 40), config=CONFIG, instead_of=["kinds"], promote="always")
    hub.retire("kinds@1")
    assert AdapterRef("kinds", 1) not in {node.ref for node in hub.map().nodes} and not [e for e in hub.map().edges if e.kind is EdgeKind.LINEAGE]
