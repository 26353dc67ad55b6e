"""The log of answers as people use it: off unless asked for, every way to ask, feedback that is checked, erasure."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.errors import AdapterNotFound, HubError, InvalidConfig, InvalidInput
from adapter_hub.hub import Hub
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from tests.soak.registry_kill import database_schema

COLOURS = [{"text": f"paint the {thing} {colour}", "label": colour} for thing in ("wall", "door", "car", "fence") for colour in ("red", "blue")]
ANIMALS = [{"text": f"the {animal} {does}", "label": animal} for animal in ("dog", "cat") for does in ("runs", "sleeps", "eats its food", "is old")]
TEXTS = ["paint the gate blue", "the cat sleeps again", "zzz qqq 0000 jjjj"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of two classifiers."""
    root = tmp_path_factory.mktemp("template")
    with Hub.create(root / "registry", base_model=tiny_model(root / "bert", "bert"), encoder="hash") as hub:
        hub.register("colours", make_adapter(hub.base, root / "c", seed=1), COLOURS, labels=["red", "blue"])
        hub.register("animals", make_adapter(hub.base, root / "a", seed=2), ANIMALS, labels=["dog", "cat"])
    return root / "registry"


def configure(folder: Path, **policy: object) -> None:
    settings = folder / "hub.toml"
    kept = [line for line in settings.read_text().splitlines() if line.partition(" = ")[0] not in policy]
    settings.write_text("\n".join([*kept, *(f"{key} = {json.dumps(value)}" for key, value in policy.items())]) + "\n")


@pytest.fixture
def opened(template: Path, tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    """Opens the hub with what hub.toml shall say."""
    hubs: list[Hub] = []
    shutil.copytree(template, tmp_path / "registry")

    def open(**policy: object) -> Hub:
        if policy.get("observe") == "text":
            policy = {"keep": "text", **policy}
        configure(tmp_path / "registry", **policy)
        hubs.append(Hub.open(tmp_path / "registry"))
        return hubs[-1]

    yield open
    for hub in hubs:
        hub.close()


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- off, and on ----------------------------------------------------------------------------------------------------


def test_nothing_is_logged_and_no_row_is_another_unless_it_is_asked_for(opened: Callable[..., Hub], tmp_path: Path) -> None:
    hub = opened()
    predictions = [*hub.predict(TEXTS), hub.submit(TEXTS[0]).result()]
    assert [p.id for p in predictions] == [None] * 4 and not [p for p in predictions if "observation" in p.to_json()]
    rows = write(tmp_path / "in.jsonl", [{"id": 7, "text": text, "observation": "mine"} for text in TEXTS])
    hub.run(rows, tmp_path / "off.jsonl")
    assert list(hub.observations()) == []
    loud = opened(observe="text")
    loud.run(rows, tmp_path / "on.jsonl")
    off, on = read(tmp_path / "off.jsonl"), read(tmp_path / "on.jsonl")
    assert [{key: value for key, value in row.items() if key != "observation"} | {"observation": row["input_observation"]} for row in on] == [
        row | {"input_observation": "mine"} for row in off
    ]
    assert [row["id"] for row in on] == [7] * 3    # the input's own


def test_every_way_to_ask_is_logged_with_who_answered_and_why(opened: Callable[..., Hub], tmp_path: Path) -> None:
    hub = opened(observe="text")
    asked = [*hub.predict(TEXTS, max_false_reject=0.2), *hub.predict(TEXTS[:1], adapters="animals"), hub.submit(TEXTS[1]).result()]
    hub.run(write(tmp_path / "in.jsonl", [{"text": TEXTS[0]}, {"text": ""}, {"text": TEXTS[2]}]), tmp_path / "out.jsonl")
    found = {one.id: one for one in hub.observations()}
    rows = read(tmp_path / "out.jsonl")
    assert list(found) == [rows[1]["observation"], rows[0]["observation"], *(p.id for p in reversed(asked))]
    for text, prediction in zip([*TEXTS, TEXTS[0], TEXTS[1]], asked, strict=True):
        seen, decision = found[prediction.id or ""], prediction.decision
        told = (seen.adapter, seen.label, seen.score, seen.margin, seen.reason)
        assert told == (prediction.adapter, prediction.label, decision.score, decision.margin, decision.reason)
        assert seen.text == text and seen.sha256 == hashlib.sha256(text.encode()).hexdigest() and (seen.latency_ms or 0) > 0
        assert prediction.to_json()["observation"] == prediction.id
    for row in rows:
        seen = found[str(row["observation"])]
        assert (seen.text, str(seen.adapter) if seen.adapter else None, seen.reason) == (row["text"], row["adapter"], row["reason"])


def test_a_stream_says_its_id_at_once(tmp_path: Path) -> None:
    with Hub.create(tmp_path / "r", base_model=tiny_model(tmp_path / "gpt2", "gpt2"), encoder="hash"):
        configure(tmp_path / "r", observe="decisions")
    with Hub.open(tmp_path / "r") as hub:
        with hub.stream("once upon a time", generation={"max_new_tokens": 3}) as pieces:
            [seen] = hub.observations()
        assert (seen.id, seen.adapter, seen.latency_ms, seen.text) == (pieces.id, None, None, None)
        assert "".join(pieces) == "" and len(list(hub.observations())) == 1


def test_what_the_hub_asks_itself_is_not_logged(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="decisions")
    rows = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]
    config = TrainConfig(epochs=2, steps_min=0, learning_rate=5e-3)
    hub.learn("words", rows, config=config, promote="always")
    more = [{"text": f"{word} shop {i}", "label": word} for word in ("apple", "pear", "zebra") for i in range(12)]
    hub.learn("words", more, config=config)    # beside the version in production, which is asked as well
    hub.evaluate(COLOURS)
    hub.route(TEXTS)
    assert list(hub.observations()) == []


def test_a_share_of_the_answers_is_logged_and_the_others_have_no_id(opened: Callable[..., Hub], tmp_path: Path) -> None:
    hub = opened(observe="decisions", observe_share=0.5)
    ids = [p.id for _ in range(4) for p in hub.predict(TEXTS * 20)]
    logged = [id for id in ids if id]
    assert 60 < len(logged) < 180 and [one.id for one in hub.observations()] == logged[::-1]
    hub.run(write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS * 20]), tmp_path / "out.jsonl")
    assert {type(row["observation"]) for row in read(tmp_path / "out.jsonl")} == {str, type(None)}    # one column in every row


def test_the_log_is_bounded(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="decisions", observations_max=10)
    ids = [p.id for _ in range(5) for p in hub.predict(TEXTS * 2)]
    assert [one.id for one in hub.observations()] == ids[::-1][:10]


def test_threads_that_ask_at_once_are_all_logged(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="text")
    with ThreadPoolExecutor(4) as pool:
        asked = [f.result() for f in [pool.submit(hub.predict, TEXTS) for _ in range(8)]]
        submitted = [f.result().id for f in [hub.submit(text) for text in TEXTS * 4]]
    ids = {p.id for predictions in asked for p in predictions} | set(submitted)
    assert {one.id for one in hub.observations()} == ids and len(ids) == 36 and hub.observations_dropped == 0


# ---- policy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observe", ["decisions", "hash"])
def test_no_text_reaches_the_registry_where_it_may_not(opened: Callable[..., Hub], tmp_path: Path, observe: str) -> None:
    hub = opened(observe=observe)
    hub.predict(["paint my secret lair blue"])
    hub.flush_observations()
    assert not [path for path in (tmp_path / "registry").rglob("*") if path.is_file() and b"secret lair" in path.read_bytes()]


def test_texts_are_not_logged_where_keep_forbids_texts(opened: Callable[..., Hub]) -> None:
    with pytest.raises(InvalidConfig, match=r'policy\.observe = "text" keeps texts, and policy\.keep = "vectors" forbids it\. Set observe to'):
        opened(observe="text", keep="vectors")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"observe": "all"}, "policy.observe = 'all' is not \"off\", \"decisions\", \"hash\" or \"text\""),
        ({"observe_share": 1.5}, "policy.observe_share = 1.5 is not a number from 0 to 1"),
        ({"observations_max": 0}, "policy.observations_max = 0 is not a whole number from 1 to"),
    ],
)
def test_a_wrong_setting_is_named(opened: Callable[..., Hub], policy: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        opened(**policy)
    assert said in str(caught.value)


# ---- feedback -------------------------------------------------------------------------------------------------------


def test_feedback_is_joined_and_the_last_word_counts(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="decisions")
    right, wrong, abstained = hub.predict(TEXTS, max_false_reject=0.2)
    assert right.id and wrong.id and abstained.id and abstained.adapter is None
    hub.feedback(right.id, correct_label="red")
    hub.feedback(right.id, "blue")
    seen = hub.feedback(abstained.id, correct_label="dog", correct_adapter="animals@1")
    assert seen.feedback and (seen.feedback.correct_label, seen.feedback.correct_adapter) == ("dog", "animals")
    hub.feedback(wrong.id, correct_adapter="colours")
    said = [(one.feedback.correct_label, one.feedback.correct_adapter) for one in hub.observations() if one.feedback]
    assert said == [("dog", "animals"), (None, "colours"), ("blue", None)]


def test_a_label_that_is_yet_to_be_learned_is_taken_where_that_is_said(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="text")
    [answer] = hub.predict(["paint the gate green"], adapters="colours")
    with pytest.raises(InvalidInput, match=r"'green' is no label of colours\..*new_label=True"):
        hub.feedback(answer.id, "green")
    assert hub.feedback(answer.id, "green", new_label=True).feedback.correct_label == "green"
    [abstained] = hub.predict(["zzz"], adapters=[None])
    with pytest.raises(InvalidInput, match="the adapter whose label it is to be"):
        hub.feedback(abstained.id, "green", new_label=True)



def test_what_is_said_wrongly_is_told_and_nothing_is_kept(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="decisions")
    answered, _, abstained = (p.id or "" for p in hub.predict(TEXTS, max_false_reject=0.2))
    for call, error, said in (
        (lambda: hub.feedback(answered), InvalidInput, "nothing is said of the answer"),
        (lambda: hub.feedback("nobody", "red"), InvalidInput, "there is no observation 'nobody'"),
        (lambda: hub.feedback(answered, "rde"), InvalidInput, "'rde' is no label of colours. Closest: 'red'."),
        (lambda: hub.feedback(answered, "dog"), InvalidInput, "'dog' is no label of colours. It has 2 labels"),
        (lambda: hub.feedback(answered, "red", "animals"), InvalidInput, "'red' is no label of animals"),
        (lambda: hub.feedback(abstained, "red"), InvalidInput, "the base model answered, which has no labels. Say whose label it is"),
        (lambda: hub.feedback(answered, correct_adapter="animal"), AdapterNotFound, "Closest: 'animals'"),
        (lambda: hub.feedback(answered, correct_adapter="animals@9"), AdapterNotFound, "'animals@9' is not registered"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert said in str(caught.value)
    assert [one.feedback for one in hub.observations()] == [None] * 3


def test_a_label_that_came_with_a_later_version_may_be_said_of_an_earlier_answer(opened: Callable[..., Hub], tmp_path: Path) -> None:
    hub = opened(observe="decisions")
    id = hub.predict(TEXTS[:1])[0].id or ""
    rows = [*COLOURS, {"text": "paint the hut green", "label": "green"}]
    hub.register("colours", make_adapter(hub.base, tmp_path / "c3", seed=3, outputs=3), rows, labels=["cyan", "blue", "green"])
    for label in ("green", "red"):
        assert hub.feedback(id, label).label in ("red", "blue")
    hub.purge("colours@1")
    with pytest.raises(InvalidInput, match="'red' is no label of colours"):
        hub.feedback(id, "red")
    hub.feedback(id, "green")


# ---- look, and forget -----------------------------------------------------------------------------------------------


def test_the_log_is_chosen_from_and_forgotten_by_time_and_adapter(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="text")
    first = [p.id for p in hub.predict(TEXTS, max_false_reject=0.2)]
    assert [one.id for one in hub.observations(adapter="animals")] == [first[1]] == [one.id for one in hub.observations(adapter="animals@production")]
    assert [one.id for one in hub.observations(limit=2)] == first[:0:-1]
    assert len(list(hub.observations(since="2020-01-01"))) == 3 and list(hub.observations(before="2020-01-01")) == []
    for call, error in (
        (lambda: hub.observations(limit=0), InvalidInput),
        (lambda: hub.observations(since="soon"), InvalidInput),
        (lambda: hub.observations(adapter="nobody"), AdapterNotFound),
        (lambda: hub.forget_observations(adapter="animals@7"), AdapterNotFound),
    ):
        with pytest.raises(error):
            call()
    assert hub.forget_observations(before="2020-01-01") == 0 and hub.forget_observations(adapter="animals") == 1
    assert hub.forget_observations() == 2 and list(hub.observations()) == []


def test_the_verbs_show_judge_and_erase(opened: Callable[..., Hub], tmp_path: Path) -> None:
    opened().close()
    base = ["--registry", str(tmp_path / "registry")]

    def verb(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*words, *base], prog_name="adapter-hub")
        return result.exit_code, result.stdout + result.stderr

    for looking in ("observations", "watch", "maintain"):
        code, out = verb(looking)
        assert code == 0 and 'hub.toml says observe = "off". Set observe = "text" and keep = "text" in hub.toml, and restart' in out
    assert 'Set observe = "text" and keep = "text" in hub.toml, and restart what serves' in verb("proposals")[1]
    configure(tmp_path / "registry", observe="text", keep="text")
    command = [sys.executable, "-W", "ignore", "-m", "adapter_hub.cli", "predict", *TEXTS, "--json", *base]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)    # it ends by itself
    ids = [row["observation"] for row in json.loads(done.stdout)]
    code, out = verb("feedback", ids[0], "--label", "red", "--adapter", "colours")
    assert (code, out) == (0, f"{ids[0]} should have been answered red by colours\n")
    code, out = verb("observations", "--json")
    assert [(row["id"], row["text"]) for row in json.loads(out)] == list(zip(ids, TEXTS, strict=True))[::-1]
    code, out = verb("observations", "--adapter", "colours")
    assert code == 0 and ids[0] in out and ids[1] not in out and "correct_label" in out
    assert verb("feedback", ids[0], "--label", "rde")[0] == 2
    assert "there is no terminal to ask on. Pass --yes." in verb("observations", "--forget")[1]
    assert "Leave out --since and --limit" in verb("observations", "--forget", "--limit", "3")[1]
    assert verb("observations", "--forget", "--yes", "--adapter", "colours") == (0, "forgotten: 1\n")
    assert len(json.loads(verb("observations", "--json")[1])) == 2


# ---- nobody who asks is harmed --------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_told_once_and_answers_go_on(
    opened: Callable[..., Hub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = opened(observe="decisions")
    before = hub.predict(TEXTS)
    hub.flush_observations()
    with sqlite3.connect(tmp_path / "registry/catalog.sqlite") as behind:
        behind.execute("DROP TABLE hub_observations")
    behind.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [p.label for p in hub.predict(TEXTS)] == [p.label for p in before]
            with pytest.raises(HubError):
                hub.flush_observations()
    assert hub.observations_dropped == 6 and sum("observations were lost" in record.message for record in caplog.records) == 1


def test_a_registry_that_may_only_be_read_answers_and_says_that_it_logs_nothing(
    opened: Callable[..., Hub], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(observe="decisions").predict(TEXTS)
    from adapter_hub.registry.config import read_config
    from adapter_hub.registry.layout import Layout
    from adapter_hub.registry.registry import Registry

    layout = Layout(tmp_path / "registry")
    with caplog.at_level(logging.WARNING), Hub(Registry._open_read_only(layout, read_config(layout.config))) as hub:
        assert [p.id for p in hub.predict(TEXTS)] == [None] * 3
    assert sum("is open for reading only: what is answered is not logged." in record.message for record in caplog.records) == 1


def test_a_closed_hub_has_written_its_log_and_takes_no_feedback(opened: Callable[..., Hub]) -> None:
    hub = opened(observe="decisions")
    id = hub.predict(TEXTS[:1])[0].id or ""
    hub.close()
    hub.close()
    with pytest.raises(HubError, match="this hub is closed"):
        hub.feedback(id, "red")
    with pytest.raises(HubError, match="this hub is closed"):
        hub.observations()
    later = opened(observe="off")    # turned off, what was logged is still there
    assert later.feedback(id, "red").id == id and [one.id for one in later.observations()] == [id]


def test_a_team_shares_its_log_in_a_database(template: Path, tmp_path: Path) -> None:
    server = os.environ.get("ADAPTER_HUB_TEST_POSTGRES")
    if not server:
        pytest.skip("ADAPTER_HUB_TEST_POSTGRES names no PostgreSQL server")
    shutil.copytree(template, tmp_path / "registry", ignore=shutil.ignore_patterns("catalog.sqlite*", ".catalogue"))
    configure(tmp_path / "registry", observe="hash")
    with database_schema(server) as url, Hub.open(str(url), artifacts=tmp_path / "registry") as one:
        with Hub.open(str(url), artifacts=tmp_path / "registry") as other:
            ids = [p.id or "" for hub in (one, other) for p in hub.predict(TEXTS)]
            one.flush_observations()
            assert other.feedback(ids[0], "red").adapter == one.predict(TEXTS)[0].adapter
        assert {seen.id for seen in one.observations()} > set(ids)
        assert one.forget_observations(adapter="colours") == 3
