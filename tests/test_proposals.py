"""Proposals as people use them: found in the log, the same from look to look, labelled and learned, taught, dismissed, forgotten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.continual.proposals import Proposal, State
from adapter_hub.errors import InvalidInput, InvalidName
from adapter_hub.hub import Hub
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from tests.soak.registry_kill import database_schema
from tests.test_observations import ANIMALS, COLOURS, configure, read

CITIES = "rome oslo paris london cairo tokyo lima quito delhi vienna lagos dublin accra bern".split()
FLIGHTS = [f"please find a flight to {city}" for city in CITIES]
HOTELS = [f"reserve our hotel room in {city}" for city in CITIES]
SONGS = [f"play some jazz music by {name}" for name in "anna bela carl dora emil finn gina hugo ines jan kira lars mona nils otto paul".split()]
SONGS += [f"play some rock music by {name}" for name in "anna bela carl dora emil finn gina hugo ines jan".split()]
ODD = ["zzz qqq 0000 jjjj", "how strange it all is", "1234 5678 9012", "no", "per aspera ad astra", "why though"]
KNOWN = ["paint the gate blue", "the cat sleeps again"]
FAST = TrainConfig(epochs=2, steps_min=0, learning_rate=5e-3)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    with Hub.create(root / "registry", base_model=tiny_model(root / "bert", "bert"), encoder="hash") as hub:
        hub.register("colours", make_adapter(hub.base, root / "c", seed=1), COLOURS, labels=["red", "blue"])
        hub.register("animals", make_adapter(hub.base, root / "a", seed=2), ANIMALS, labels=["dog", "cat"])
    configure(root / "registry", observe="text", keep="text", max_false_reject=0.2)
    return root / "registry"


@pytest.fixture
def hub(template: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(template, tmp_path / "registry")
    with Hub.open(tmp_path / "registry") as opened:
        yield opened


def texts_of(proposal: Proposal) -> set[str]:
    return {text for group in proposal.groups for text in group.texts}


def test_a_task_that_nobody_taught_is_proposed_and_what_is_odd_or_known_is_not(hub: Hub) -> None:
    hub.predict([*KNOWN, *ODD])
    assert hub.proposals() == []
    hub.predict(SONGS)
    [found] = hub.proposals()
    assert texts_of(found) == set(SONGS) and found.state is State.OPEN and found.size == len(SONGS)
    assert found.suggested in ("music_play", "play_music", "play_some") or "music" in found.suggested or "play" in found.suggested
    assert {name for name, _ in found.nearest} <= {"colours", "animals"} and found.teach is None and set(found.examples) <= set(SONGS)
    logged = {one.id: one.text for one in hub.observations()}
    assert [logged[id] for group in found.groups for id in group.observations] == [text for group in found.groups for text in group.texts]


def test_a_proposal_that_grows_keeps_its_id_and_another_gets_the_next(hub: Hub) -> None:
    hub.predict([*KNOWN, *SONGS[:22]])
    [first] = hub.proposals()
    hub.predict([*SONGS[22:], *SONGS[:5], *(text.replace("find", "book") for text in FLIGHTS), *FLIGHTS])
    songs, flights = hub.proposals() if len(hub.proposals()) == 2 else (None, None)
    assert songs and flights
    by_id = {songs.id: songs, flights.id: flights}
    assert texts_of(by_id[first.id]) == set(SONGS) and by_id[first.id].at == first.at and by_id[first.id].suggested == first.suggested
    assert {*by_id} == {"1", "2"}
    with Hub.open(hub.registry.layout.root) as later:
        assert {one.id: texts_of(one) for one in later.proposals()} == {id: texts_of(one) for id, one in by_id.items()}
        assert {one.id: one.suggested for one in later.proposals()} == {id: one.suggested for id, one in by_id.items()}


def test_labels_of_groups_make_a_skill_that_answers_and_is_proposed_no_more(hub: Hub) -> None:
    hub.predict([*KNOWN, *FLIGHTS, *HOTELS, *(text + " now" for text in FLIGHTS + HOTELS)])
    found = hub.proposals()
    labels = {group.id: "flight" if "flight" in group.texts[0] else "hotel" for one in found for group in one.groups}
    odd = found[0].groups[0].texts[0]
    done = hub.accept([one.id for one in found], "travel", labels | {odd: None}, config=FAST, promote="always", reason="asked for daily")
    assert str(done.ref) == "travel@1" and done.report and done.report.promoted and not done.rows
    assert hub.predict(["reserve our hotel room in madrid"])[0].adapter == done.ref
    assert hub.proposals() == []
    told = {one.id: one for one in hub.proposals(decided=True)}
    assert {*told} == {one.id for one in found} and {one.result for one in told.values()} == {"travel@1"}
    assert {(one.state, one.reason) for one in told.values()} == {(State.ACCEPTED, "asked for daily")}


def test_without_labels_the_rows_come_back_and_nothing_is_decided(hub: Hub) -> None:
    asked = hub.predict([*KNOWN, *SONGS])
    hub.feedback(asked[2].id or "", correct_label="red", correct_adapter="colours")
    [found] = hub.proposals()
    done = hub.accept(found.id, "music")
    assert {row.text for row in done.rows} == set(SONGS) and done.ref is None and [one.id for one in hub.proposals()] == [found.id]
    assert {row.label for row in done.rows if row.text == SONGS[0]} == {"red"}    # what somebody said of it
    rows = [{"text": row.text, "label": "rock" if "rock" in row.text else "jazz"} for row in done.rows]
    rows[0]["label"] = None    # left blank
    assert str(hub.accept(found.id, "music", train=rows, config=FAST).ref) == "music@1"
    assert [one.result for one in hub.proposals(decided=True)] == ["music@1"]


def test_a_registered_name_alone_is_taught(hub: Hub) -> None:
    hub.predict([*KNOWN, *SONGS])
    [found] = hub.proposals()
    done = hub.accept(found.id, "colours")
    assert str(done.ref) == "colours@2" and done.report is None
    assert hub.predict(["play some jazz music by olga"])[0].adapter == done.ref and hub.proposals() == []


def test_what_was_dismissed_does_not_come_back_and_neither_does_what_is_like_it(hub: Hub) -> None:
    hub.predict([*KNOWN, *SONGS])
    [found] = hub.proposals()
    hub.dismiss(found.id, "not ours")
    hub.predict([text + " please" for text in SONGS])
    assert hub.proposals() == []
    [told] = hub.proposals(decided=True)
    assert (told.state, told.reason, told.size, texts_of(told)) == (State.DISMISSED, "not ours", len(SONGS), set(SONGS))
    hub.forget_observations()    # and with the inputs what was said of them is forgotten
    hub.predict([*KNOWN, *SONGS])
    assert [texts_of(one) for one in hub.proposals()] == [set(SONGS)]


def test_a_group_is_decided_apart_from_its_proposal(hub: Hub) -> None:
    lost = [f"find my lost bag on the flight from {city} today" for city in CITIES]
    hub.predict([*KNOWN, *FLIGHTS, *lost])
    [found] = hub.proposals()
    assert {frozenset(group.texts) for group in found.groups} == {frozenset(FLIGHTS), frozenset(lost)}
    assert {group.id for group in found.groups} == {"1.1", "1.2"}
    apart = found.groups[0]
    hub.dismiss(apart.id)
    assert hub.proposals() == []    # what is left is too little
    hub.predict([text + " tomorrow" for text in {*found.groups[1].texts}])
    [told] = hub.proposals(decided=True)
    assert told.id == apart.id and texts_of(told) == set(apart.texts)
    [left] = hub.proposals()
    assert texts_of(left) >= {*found.groups[1].texts} and not texts_of(left) & {*apart.texts}


def test_notes_hold_no_text(hub: Hub) -> None:
    hub.predict([*KNOWN, *SONGS])
    assert hub.proposals()
    assert not [text for text in SONGS if text in json.dumps(hub.registry.notes.read("proposals"))]


@pytest.mark.parametrize("decided", [False, True])
def test_names_are_forgotten_with_the_texts_that_have_their_words_and_when_it_is_decided(hub: Hub, decided: bool) -> None:
    hub.predict([*KNOWN, *SONGS])
    [found] = hub.proposals()

    def kept() -> list[str]:
        return [name for body in hub.registry.notes.read("proposals").values() for name in body["suggested"].values()]

    assert found.suggested in kept()
    hub.forget_observations(adapter="colours")
    hub.forget_observations(before="2020-01-01")
    assert found.suggested in kept()
    if decided:    # the log may drop its texts at any time
        hub.dismiss(found.id)
    else:
        hub.forget_observations()
    assert kept() == []


def test_what_cannot_be_done_is_told_and_nothing_is_decided(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"there is no open proposal '7'\. None is open"):
        hub.accept("7", "music")
    hub.predict([*KNOWN, *SONGS])
    [found] = hub.proposals()
    group = found.groups[0].id
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: hub.accept(found.id), InvalidInput, "these proposals have no name"),
        (lambda: hub.accept(found.id, "No Name"), InvalidName, "not an adapter name"),
        (lambda: hub.accept("1.99", "music"), InvalidInput, "there is no open proposal '1.99'. Open are 1"),
        (lambda: hub.accept([], "music"), InvalidInput, "no proposal was named"),
        (lambda: hub.accept([found.id, group], "music"), InvalidInput, f"{group} is a part of {found.id}"),
        (lambda: hub.accept(found.id, "music", {"nobody": "x"}), InvalidInput, "'nobody' is no observation, text or group"),
        (lambda: hub.accept(found.id, "music", {found.id: "x"}), InvalidInput, "1 label is too few"),
        (lambda: hub.dismiss("x.y"), InvalidInput, "there is no open proposal 'x.y'"),
    ]
    for call, error, said in calls:
        with pytest.raises(error) as caught:
            call()
        assert said in str(caught.value)
    assert [one.id for one in hub.proposals()] == [found.id] and hub.proposals(decided=True) == []
    configure(tmp_path / "registry", observe="decisions")
    with Hub.open(tmp_path / "registry") as silent, pytest.raises(InvalidInput, match='Set observe = "text" and keep = "text" in'):
        silent.proposals()


def test_the_verbs_propose_export_learn_and_dismiss(hub: Hub, tmp_path: Path) -> None:
    hub.predict([*KNOWN, *SONGS])
    hub.close()
    base = ["--registry", str(tmp_path / "registry")]

    def verb(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*words, *base], prog_name="adapter-hub")
        return result.exit_code, result.stdout + result.stderr

    code, out = verb("proposals", "--json")
    [found] = json.loads(out)
    assert code == 0 and found["size"] == len(SONGS) and set(found["examples"]) <= set(SONGS)
    assert "a new skill" in verb("proposals")[1]
    rows = tmp_path / "rows.jsonl"
    code, out = verb("accept", found["id"], "--name", "music", "--output", str(rows))
    assert code == 0 and f"{len(SONGS)} rows are in {rows}" in out and {row["text"] for row in read(rows)} == set(SONGS)
    written = [row | {"label": "rock" if "rock" in str(row["text"]) else "jazz"} for row in read(rows)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    settings = json.dumps({"epochs": 2, "steps_min": 0, "learning_rate": 5e-3})
    learning = ["--train", str(rows), "--config", settings, "--promote", "never"]
    code, out = verb("accept", found["id"], "--name", "music", *learning, "--reason", "why not")
    assert code == 0 and "music@1" in out
    code, out = verb("proposals", "--decided", "--json")
    assert [(row["state"], row["result"], row["reason"]) for row in json.loads(out)] == [("accepted", "music@1", "why not")]
    assert verb("accept", found["id"], "--label", "nonsense")[0] == 2 and verb("dismiss", found["id"])[0] == 2
    assert "nothing is proposed" in verb("proposals")[1]


def test_a_team_shares_its_proposals_in_a_database(template: Path, tmp_path: Path) -> None:
    server = os.environ.get("ADAPTER_HUB_TEST_POSTGRES")
    if not server:
        pytest.skip("ADAPTER_HUB_TEST_POSTGRES names no PostgreSQL server")
    shutil.copytree(template, tmp_path / "registry", ignore=shutil.ignore_patterns("catalog.sqlite*", ".catalogue"))
    with database_schema(server) as url, Hub.open(str(url), artifacts=tmp_path / "registry") as one:
        one.predict([*KNOWN, *SONGS])
        with Hub.open(str(url), artifacts=tmp_path / "registry") as other:
            one.flush_observations()
            [found], [same] = other.proposals(), one.proposals()
            assert (found.id, texts_of(found)) == (same.id, texts_of(same)) == ("1", set(SONGS))
            other.dismiss("1", "not ours")
        assert one.proposals() == [] and [told.reason for told in one.proposals(decided=True)] == ["not ours"]


def test_a_registry_without_adapters_finds_its_first_task(tmp_path: Path) -> None:
    with Hub.create(tmp_path / "r", base_model=tiny_model(tmp_path / "bert", "bert"), encoder="hash"):
        configure(tmp_path / "r", observe="text", keep="text")
    with Hub.open(tmp_path / "r") as hub:
        hub.predict([*SONGS, *ODD])
        [found] = hub.proposals()
        assert texts_of(found) == set(SONGS) and found.nearest == () and found.teach is None
        done = hub.accept(found.id, "music", {text: "rock" if "rock" in text else "jazz" for text in SONGS}, config=FAST, promote="always")
        assert str(done.ref) == "music@1" and hub.proposals() == []
