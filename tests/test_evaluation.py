"""An evaluation: every kind of adapter on the set that is kept with it or on given rows, when it is named and as routed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from adapter_hub.cli import app
from adapter_hub.engine.engine import Request
from adapter_hub.errors import AdapterNotFound, HubError, InvalidInput
from adapter_hub.evaluation import Kind, Task
from adapter_hub.examples import Example, digest_of, read_examples
from adapter_hub.hub import Hub
from adapter_hub.registry.manifest import Manifest
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig

# Of each adapter the word that all its inputs have, so that its rows find it.
WORDS = {"colours": "paint", "moods": "feel", "stars": "rate", "names": "meet", "vectors": "invoice"}
TARGETS: dict[str, list[dict[str, Any]]] = {
    "colours": [{"label": label} for label in ("red", "blue", "red", "blue")],
    "moods": [{"labels": labels} for labels in (["joy"], ["joy", "fear"], [], ["fear"])],
    "stars": [{"label": label} for label in ("1", "2.5", "-3", "4")],
    "names": [{"spans": spans} for spans in ([{"start": 0, "end": 4, "label": "PER"}], [], [{"start": 5, "end": 12, "label": "LOC"}], [])],
    "vectors": [{}] * 4,
}
THINGS = ("first", "second", "third", "fourth")
ROWS = {
    name: [{"text": f"{word} the {thing}", **target} for thing, target in zip(THINGS, TARGETS[name], strict=True)] for name, word in WORDS.items()
}
EXAMPLES = {name: [f"{word} the {thing}" for thing in ("house", "cat", "bill")] + [word] for name, word in WORDS.items()}
MAKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "colours": ({}, {"labels": ["red", "blue"]}),
    "moods": ({"outputs": 3}, {"labels": ["joy", "fear", "anger"], "problem_type": "multi_label_classification"}),
    "stars": ({"outputs": 1}, {}),
    "names": ({"task_type": "TOKEN_CLS", "outputs": 3}, {"labels": ["O", "PER", "LOC"]}),
    "vectors": ({"task_type": "FEATURE_EXTRACTION"}, {}),
}


def keeping(hub: Hub, root: Path) -> Hub:
    toml = root / "hub.toml"
    toml.write_text(toml.read_text().replace('keep = "vectors"', 'keep = "text"'))
    hub.close()
    return Hub.open(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    hub = keeping(Hub.create(root / "registry", base_model=tiny_model(root / "bert", "bert"), encoder="hash"), root / "registry")
    for seed, (name, (adapter, given)) in enumerate(MAKING.items()):
        folder = make_adapter(hub.base, root / name, seed=seed, size=0.5, **adapter)
        hub.register(name, folder, EXAMPLES[name], evaluation=ROWS[name], **given)
    hub.close()
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "registry", tmp_path / "registry")
    return tmp_path / "registry"


@pytest.fixture
def hub(root: Path) -> Hub:
    return Hub.open(root)


def everybody() -> list[dict[str, Any]]:
    return [{**row, "adapter": name} for name, rows in ROWS.items() for row in rows]


def test_each_adapter_is_measured_on_its_own_kept_set_as_its_task_is(hub: Hub) -> None:
    found = hub.evaluate()
    assert list(found["adapters"]) == sorted(f"{name}@1" for name in WORDS) and found["without"] == []
    assert found["rows"] == 20 and found["routing_accuracy"] == 1.0 and found["abstained"] == 0.0
    for name, rows in ROWS.items():
        told, answers = found["adapters"][f"{name}@1"], hub.predict([row["text"] for row in rows], adapters=name)
        assert told["oracle"] == told["routed"] and set(told["gap"].values()) <= {0.0}, name
        assert told["rows"] == 4 and told["digest"] == hub.show(name).evaluation_digest
        if name == "colours":
            labels = [answer.label for answer in answers]
            assert told["oracle"] == pytest.approx({
                "accuracy": np.mean([row["label"] == label for row, label in zip(rows, labels, strict=True)]),
                "macro_f1": f1_score([row["label"] for row in rows], labels, average="macro", zero_division=0),
            })
        elif name == "moods":
            assert told["oracle"]["accuracy"] == np.mean([set(row["labels"]) == set(a.labels or ()) for row, a in zip(rows, answers, strict=True)])
        elif name == "stars":
            apart = np.array([float(row["label"]) - (a.value or 0) for row, a in zip(rows, answers, strict=True)])
            assert told["oracle"]["rmse"] == pytest.approx(np.sqrt((apart**2).mean())) and told["oracle"]["answered"] == 1.0
        elif name == "names":
            assert set(told["oracle"]) == {"span_precision", "span_recall", "span_f1", "token_accuracy"}
        else:
            assert told["oracle"] == {} and told["task"] == "vector"
    mean = np.mean([found["adapters"][f"{name}@1"]["oracle"]["accuracy"] for name in ("colours", "moods")])
    assert found["mean_of_adapters"]["oracle"]["accuracy"] == mean and not {"oracle", "routed", "by_name"} & set(found)
    assert found["accuracy"] == found["accuracy_named"] and found["gap"] == 0.0


def test_given_rows_that_name_their_adapter_say_the_same_as_the_kept_ones(hub: Hub) -> None:
    kept, given = hub.evaluate(), hub.evaluate(everybody())
    assert set(kept) - set(given) == {"without"} and kept["adapters"].keys() == given["adapters"].keys()
    for ref, told in kept["adapters"].items():
        again = hub.evaluate(everybody(), names=[ref.partition("@")[0]])["adapters"][ref]    # in a batch of another size
        for side in ("oracle", "routed"):
            for other in (given["adapters"][ref], again):
                assert other[side] == pytest.approx(told[side], rel=1e-4)
        assert told["digest"] == given["adapters"][ref]["digest"] == again["digest"]
    assert hub.evaluate(names=["stars"]) == hub.evaluate(names=["stars@1"])
    assert "accuracy" not in hub.evaluate(names=["stars"])    # a number is not right or wrong


def test_what_goes_astray_is_wrong_as_routed_and_unchanged_when_named(hub: Hub) -> None:
    lost = {name: [{**row, "text": row["text"].replace(WORDS[name], WORDS["vectors"]), "adapter": name} for row in ROWS[name]] for name in WORDS}
    found = hub.evaluate([row for name in ("colours", "moods", "stars", "names") for row in lost[name]])
    each = found["adapters"]
    assert found["routing_accuracy"] == 0 == found["accuracy"] and {one["routing_accuracy"] for one in each.values()} == {0.0}
    assert each["colours@1"]["routed"] == {"accuracy": 0.0, "macro_f1": 0.0} and each["moods@1"]["routed"]["accuracy"] == 0
    assert each["stars@1"]["routed"] == {"answered": 0.0} and each["stars@1"]["gap"] == {"answered": 1.0}
    assert each["names@1"]["routed"] | {"token_accuracy": 0, "span_f1": 0} == each["names@1"]["routed"]
    assert each["colours@1"]["gap"]["accuracy"] == each["colours@1"]["oracle"]["accuracy"] == hub.evaluate(lost["colours"])["accuracy_named"]


def test_errors_of_numbers_have_no_gap_where_some_rows_got_no_number(hub: Hub) -> None:
    """Previously they were those of all rows less those of the rows that got one."""
    rows = [{**row, "adapter": "stars"} for row in ROWS["stars"]]
    rows[0]["text"] = rows[0]["text"].replace(WORDS["stars"], WORDS["vectors"])
    told = hub.evaluate(rows)["adapters"]["stars@1"]
    assert told["routed"]["answered"] == 0.75 and set(told["routed"]) == set(told["oracle"]) and told["gap"] == {"answered": 0.25}


def test_rows_that_name_no_adapter_are_measured_as_routed_alone(hub: Hub) -> None:
    given = hub.evaluate(ROWS["colours"])
    assert set(given) == {"rows", "accuracy", "abstained"} and given["accuracy"] == hub.evaluate(names=["colours"])["accuracy"]
    some = hub.evaluate([*everybody()[:2], *ROWS["colours"][2:]])
    assert some["accuracy"] == given["accuracy"] and "accuracy_named" not in some and some["adapters"]["colours@1"]["rows"] == 2
    empty = [{**row, "adapter": ""} for row in ROWS["colours"]]    # as an empty cell of a CSV file
    assert hub.evaluate(empty) == given


def test_a_mean_of_adapters_weighs_each_alike_and_accuracy_each_row(hub: Hub, root: Path, tmp_path: Path) -> None:
    """Previously both were the named accuracy of one report, and differed."""
    [cold] = hub.predict([ROWS["colours"][0]["text"]], adapters="colours")
    right, wrong = ({**row, "label": label} for row, label in zip(ROWS["colours"], (cold.label, "neither"), strict=False))
    moody = {**ROWS["moods"][0], "labels": ["none of its"], "adapter": "moods"}
    rows = [*({**row, "adapter": "colours"} for row in (right, right, right, wrong)), moody]
    found = hub.evaluate(rows)
    assert found["accuracy_named"] == found["accuracy"] == 3 / 5 and found["mean_of_adapters"]["oracle"]["accuracy"] == (3 / 4 + 0) / 2
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:4], {**rows[0], "adapter": "colours2"}]))
    folder = make_adapter(hub.base, tmp_path / "again", seed=0, size=0.5)
    hub.register("colours2", folder, EXAMPLES["colours"], labels=["red", "blue"])
    drawn, written = (CliRunner().invoke(app, ["evaluate", "--data", str(data), "--registry", str(root), *more]) for more in ([], ["--json"]))
    told = json.loads(written.stdout)
    lines = [line.split() for line in drawn.stdout.splitlines()]
    assert any(line[:3] == ["mean", "of", "adapters"] for line in lines) and ["accuracy_named", f"{told['accuracy_named']:.4g}"] in lines
    assert told["mean_of_adapters"]["oracle"]["accuracy"] == (3 / 4 + 1) / 2 and told["accuracy_named"] == 4 / 5


@pytest.mark.parametrize("how", [{"routed": False}, {}], ids=["by name", "without examples"])
def test_rows_of_what_only_its_name_reaches_are_in_no_routed_figure(hub: Hub, made: Path, how: dict[str, Any]) -> None:
    """Previously they counted as routed to it, or as the router's mistakes where it only lacks examples."""
    lost = [{**row, "text": row["text"].replace("paint", "invoice"), "adapter": "colours"} for row in ROWS["colours"]]
    alone = hub.evaluate(lost)
    hub.register("mine", made / "colours", EXAMPLES["colours"] if how else (), labels=["red", "blue"], evaluation=ROWS["colours"], **how)
    found = hub.evaluate([*lost, *({**row, "adapter": "mine"} for row in ROWS["colours"])])
    assert found["rows"] == 8 and found["by_name"] == 4
    for figure in ("accuracy", "abstained", "routing_accuracy", "gap"):
        assert found[figure] == alone[figure]
    mine, colours = found["adapters"]["mine@1"], found["adapters"]["colours@1"]
    assert mine["oracle"] and not {"routed", "gap", "routing_accuracy", "abstained"} & set(mine)
    assert found["accuracy_named"] == (mine["oracle"]["accuracy"] + colours["oracle"]["accuracy"]) / 2
    assert found["mean_of_adapters"]["routed"] == colours["routed"]
    only = hub.evaluate(names=["mine"])
    assert only["rows"] == only["by_name"] == 4 and only["adapters"]["mine@1"]["oracle"] == pytest.approx(mine["oracle"])
    assert not {"accuracy", "gap", "abstained", "routing_accuracy"} & set(only) and only["mean_of_adapters"]["routed"] == {}


def test_one_adapters_answers_are_in_memory_at_a_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously all sets were read and asked at once."""
    asked: list[int] = []
    predict = hub.engine.predict
    monkeypatch.setattr(hub.engine, "predict", lambda requests: (asked.append(len(requests)), predict(requests))[1])
    assert hub.evaluate()["rows"] == hub.evaluate(everybody())["rows"] == 20 and asked == [4] * 10


def test_rows_whose_answers_are_no_question_of_accuracy_are_found_before_any_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously after all the work."""
    asked: list[object] = []
    monkeypatch.setattr(hub.engine, "predict", asked.append)
    for name, says in (("moods", "moods@1 gives several labels"), ("stars", "or a number"), ("names", "names@1 gives spans")):
        with pytest.raises(InvalidInput, match=says):
            hub.evaluate([*everybody()[:4], {"text": ROWS[name][0]["text"], "label": "red"}])
    assert not asked


def test_a_version_that_is_not_in_production_is_measured_by_its_name_and_number_and_not_as_routed(hub: Hub, made: Path) -> None:
    """Previously the answers of the one in production counted as its routed ones, and what was retired as the router's mistakes."""
    folder = make_adapter(hub.base, made / "other", seed=31, size=0.5)
    ref = hub.register("colours", folder, EXAMPLES["colours"], evaluation=ROWS["colours"], labels=["red", "blue"], promote=False)
    alone = hub.evaluate(names=["colours", "moods"])
    assert list(hub.evaluate(names=[str(ref), "colours"])["adapters"]) == ["colours@1", "colours@2"]
    for change in (lambda: None, lambda: hub.promote(ref), lambda: hub.retire("colours@1")):
        change()
        out = "colours@2" if hub.registry.resolve("colours").version == 1 else "colours@1"
        found = hub.evaluate(names=[out, "colours", "moods"])
        assert found["by_name"] == 4 and found["rows"] == 12 and found["routing_accuracy"] == 1.0
        assert set(found["adapters"][out]) == {"task", "rows", "oracle", "digest"} and found["adapters"][out]["oracle"]
        assert found["accuracy"] == hub.evaluate(names=["colours", "moods"])["accuracy"] and found["abstained"] == alone["abstained"]
    given = hub.evaluate([{**row, "adapter": "colours@1"} for row in ROWS["colours"]])
    assert given["by_name"] == 4 and not {"accuracy", "routing_accuracy", "abstained"} & set(given)


def test_rows_that_name_no_adapter_are_the_one_that_is_named(hub: Hub, made: Path, root: Path, tmp_path: Path) -> None:
    """Previously "no row names the adapter 'colours'"."""
    for name in ("colours", "moods", "stars", "names"):
        assert hub.evaluate(ROWS[name], names=[name]) == hub.evaluate([{**row, "adapter": name} for row in ROWS[name]])
    ref = str(hub.register("colours", make_adapter(hub.base, made / "another", seed=7, size=0.5), EXAMPLES["colours"], labels=["red", "blue"]))
    both = hub.evaluate(ROWS["colours"], names=["colours@1", ref])    # two versions on the same rows
    assert list(both["adapters"]) == ["colours@1", ref] and {told["rows"] for told in both["adapters"].values()} == {4}
    mine = [{**row, "adapter": "colours"} for row in ROWS["colours"]]
    assert list(hub.evaluate([*mine, ROWS["colours"][0]], names=["colours@1"])["adapters"]) == ["colours@1"]
    assert hub.evaluate([*mine, ROWS["moods"][0]], names=["colours"])["rows"] == 4    # where some say whose they are, others are nobody's
    for names, says in ((["moods", "stars"], "no row names the adapter 'moods'"), (["moods"], "no row names the adapter 'moods'")):
        with pytest.raises(InvalidInput, match=says):
            hub.evaluate(ROWS["moods"] if len(names) > 1 else mine, names=names)
    with pytest.raises(AdapterNotFound, match="Closest: 'colours'"):
        hub.evaluate(ROWS["colours"], names=["colurs"])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS["colours"]))
    asked = CliRunner().invoke(app, ["evaluate", "colours@1", "--data", str(data), "--registry", str(root), "--json"])
    assert json.loads(asked.stdout)["adapters"]["colours@1"]["oracle"].keys() == {"accuracy", "macro_f1"}, asked.output


def test_labels_that_an_adapter_does_not_know_count_as_wrong_and_are_told(hub: Hub, root: Path, tmp_path: Path) -> None:
    """Previously they were wrong without a word."""
    rows = [*ROWS["colours"], {"text": "paint the fifth", "label": "purple"}, {"text": "paint the sixth", "label": "green"}]
    told = hub.evaluate(rows, names=["colours"])["adapters"]["colours@1"]
    known = hub.evaluate(ROWS["colours"], names=["colours"])["adapters"]["colours@1"]
    assert told["unknown_labels"] == {"rows": 2, "labels": ["green", "purple"]} and "unknown_labels" not in known
    assert told["oracle"]["accuracy"] == pytest.approx(known["oracle"]["accuracy"] * 4 / 6)
    moods = hub.evaluate([*ROWS["moods"], {"text": "feel it", "labels": ["joy", "awe"]}], names=["moods"])["adapters"]["moods@1"]
    spans = [{"start": 0, "end": 4, "label": label} for label in ("PER", "ORG")]
    names = hub.evaluate([{"text": "meet it", "spans": spans}], names=["names"])["adapters"]["names@1"]
    assert moods["unknown_labels"] == {"rows": 1, "labels": ["awe"]} and names["unknown_labels"] == {"rows": 1, "labels": ["ORG"]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = CliRunner().invoke(app, ["evaluate", "colours", "--data", str(data), "--registry", str(root)])
    said = "colours@1 does not know what 2 of its 6 rows ask for, such as 'green': these labels count as wrong."
    assert said in drawn.stdout.splitlines(), drawn.output


def test_a_span_that_a_tagged_head_names_by_its_bare_label_is_known() -> None:
    task = Task(Kind.SPANS, ("O", "B-PER", "I-PER"))
    row = Example("meet it", extra={"spans": [{"start": 0, "end": 4, "label": "PER"}, {"start": 5, "end": 7, "label": "LOC"}]})
    assert task.unknown(row) == {"LOC"}


def test_rows_without_a_target_count_for_routing_alone(hub: Hub, made: Path) -> None:
    held_out = ["glue the wood", {"text": "glue it", "label": "red"}]
    hub.register("plain", made / "colours", ["glue the paper", "glue"], evaluation=held_out, labels=["red", "blue"])
    told = hub.evaluate(names=["plain"])["adapters"]["plain@1"]
    assert (told["rows"], told["unlabelled"], told["routing_accuracy"]) == (2, 1, 1.0) and told["oracle"]["accuracy"] in (0.0, 1.0)


def test_where_no_set_is_kept_it_is_said_of_whom_and_what_to_do(hub: Hub, root: Path, made: Path) -> None:
    hub.register("bare", made / "colours", ["glue the paper"], labels=["red", "blue"])
    assert hub.evaluate()["without"] == ["bare@1"] and hub.show("bare").evaluation_digest is None
    with pytest.raises(InvalidInput, match=r"no evaluation set is kept of bare@1\. Give rows .*--data"):
        hub.evaluate(names=["bare"])
    result = CliRunner().invoke(app, ["evaluate", "bare", "stars", "--registry", str(root)])
    assert result.exit_code == 0 and "No evaluation set is kept of bare@1: give --data" in result.stdout


def test_the_digest_of_the_set_is_in_the_manifest_where_no_text_is_kept(tmp_path: Path, made: Path) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=made / "bert", encoder="hash")
    hub.register("moods", made / "moods", EXAMPLES["moods"], evaluation=ROWS["moods"], **MAKING["moods"][1])
    assert hub.show("moods").evaluation_digest == digest_of([Example(row["text"], extra={"labels": row["labels"]}) for row in ROWS["moods"]])
    given = hub.evaluate([{**row, "adapter": "moods"} for row in ROWS["moods"]])
    assert given["adapters"]["moods@1"]["digest"] == hub.show("moods").evaluation_digest
    assert hub.show(hub.teach("moods", ["feel well"])).evaluation_digest == hub.show("moods@1").evaluation_digest
    with pytest.raises(InvalidInput, match="no evaluation set is kept of moods@2"):
        hub.evaluate()
    hub.purge("moods@1", descendants=True)
    assert hub.verify().ok and "evaluation_digest" not in json.loads((tmp_path / "registry/adapters/moods/1/manifest.json").read_text())


def test_what_was_learned_has_the_digest_of_the_rows_that_measured_it(hub: Hub) -> None:
    rows = [{"text": f"ask {word} number {n}", "label": word} for word in ("apple", "zebra") for n in range(8)]
    report = hub.learn("words", rows, config=TrainConfig(r=4, epochs=1, steps_min=0), promote="always")
    kept = read_examples(hub.registry.folder(report.ref) / "evaluation.jsonl")
    assert kept and hub.show(report.ref).evaluation_digest == digest_of(kept)
    found = hub.evaluate(names=["words"])
    assert found["adapters"]["words@1"]["digest"] == digest_of(kept)
    # The rows that measured it in training are all that are kept.
    assert found["accuracy_named"] == pytest.approx(report.metrics["accuracy"])


def test_what_the_adapter_knows_measures_nothing(hub: Hub, made: Path) -> None:
    """Previously the kept set and its digest had rows that were examples or negatives, which the router had dropped."""
    rows = [{"text": f"glue the {thing}", "label": "red"} for thing in (*THINGS, "fifth")]
    texts = [row["text"] for row in rows]
    ref = hub.register("glue", made / "colours", [*texts[:2], "glue"], evaluation=rows, negatives=[texts[2]], labels=["red", "blue"])
    for version, left in ((ref, rows[3:]), (hub.teach(ref, [texts[3]]), rows[4:])):
        kept = read_examples(hub.registry.folder(version) / "evaluation.jsonl")
        assert [row.text for row in kept] == [row["text"] for row in left] and len(kept) == len(hub.state(version).evaluation)
        assert hub.evaluate(names=[str(version)])["rows"] == len(left) and hub.show(version).evaluation_digest == digest_of(kept)
    last = hub.teach("glue", negatives=[texts[4]])
    assert hub.show(last).evaluation_digest is None and hub.evaluate()["without"] == ["glue@3"]


def test_where_no_text_is_kept_a_digest_goes_with_the_first_row_that_is_taught(tmp_path: Path, made: Path) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=made / "bert", encoder="hash")
    rows = [Example(row["text"], row["label"]) for row in ROWS["colours"]]
    hub.register("colours", made / "colours", ["paint", rows[0].text], evaluation=rows, labels=["red", "blue"])
    assert hub.show("colours").evaluation_digest == digest_of(rows[1:])
    assert hub.show(hub.teach("colours", ["paint well"])).evaluation_digest == digest_of(rows[1:])
    assert hub.show(hub.teach("colours", [rows[1].text])).evaluation_digest is None


def test_rows_that_chose_the_epoch_serve_the_thresholds_and_measure_nothing(hub: Hub) -> None:
    """Previously the digest and `evaluate` were of all validation rows, half of which had chosen the epoch."""
    def words(*labels: str, frame: str, count: int = 8) -> list[Example]:
        return [Example(frame.format(word, n), word) for word in labels for n in range(count)]

    config = TrainConfig(r=4, epochs=1, steps_min=0)
    validation = words("apple", "zebra", frame="ask {} number {}", count=4)
    first = hub.learn("words", words("apple", "zebra", frame="tell {} number {}"), validation, config=config, promote="always")
    kept = read_examples(hub.registry.folder(first.ref) / "evaluation.jsonl")
    measuring = [row for row in kept if "chose_epoch" not in row.extra]
    assert {row.text for row in kept} == {row.text for row in validation} and len(measuring) == 4 and len(hub.state(first.ref).evaluation) == 8
    found = hub.evaluate(names=["words"])
    assert found["rows"] == 4 and found["accuracy_named"] == pytest.approx(first.metrics["accuracy"])
    assert hub.show(first.ref).evaluation_digest == digest_of(measuring) == found["adapters"]["words@1"]["digest"]
    # What is learned later keeps both, each as what it is; the digest is of old and new rows that measured.
    assert hub.show(hub.teach("words", ["tell me"])).evaluation_digest == digest_of(measuring)
    more = words("mango", frame="ask {} number {}", count=4)
    second = hub.learn("words", words("mango", frame="tell {} number {}"), more, config=config, promote="always")
    after = read_examples(hub.registry.folder(second.ref) / "evaluation.jsonl")
    assert after[:8] == kept and len(after) == 12 == len(hub.state(second.ref).evaluation)
    assert hub.evaluate(names=["words"])["rows"] == 6
    assert hub.show(second.ref).evaluation_digest == digest_of([row for row in after if "chose_epoch" not in row.extra])


def test_rows_that_were_held_out_of_training_rows_are_counted_as_known_to_the_router(hub: Hub) -> None:
    rows = [{"text": f"ask {word} number {n}", "label": word} for word in ("apple", "zebra") for n in range(8)]
    hub.learn("words", rows, config=TrainConfig(r=4, epochs=1, steps_min=0), promote="always")
    told = hub.evaluate()["adapters"]
    assert told["words@1"]["known"] == told["words@1"]["rows"] and "known" not in told["colours@1"]


def test_a_manifest_from_before_is_read_and_has_the_digest_that_it_was_sealed_with(hub: Hub) -> None:
    new = hub.show("colours")
    old = {key: value for key, value in new.to_json().items() if key not in ("digest", "evaluation_digest")}
    sealed = Manifest.from_json({**old, "digest": ""}, source="old").sealed()
    written = json.loads(sealed.to_bytes())
    assert "evaluation_digest" not in written and set(written) == {*old, "digest"}
    assert Manifest.from_bytes(sealed.to_bytes(), source="old") == sealed and sealed.digest != new.digest


BEYOND = [{"start": 2, "end": 9, "label": "PER"}]    # "meet" ends before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: h.evaluate([]), InvalidInput, "needs rows, each with a label"),
        (lambda h: h.evaluate([{"text": "paint", "adapter": "colurs", "label": "red"}]), AdapterNotFound, "Closest: 'colours'"),
        (lambda h: h.evaluate(names=["colurs"]), AdapterNotFound, "Closest: 'colours'"),
        (lambda h: h.evaluate([{"text": "feel", "adapter": "moods", "label": "joy"}]), InvalidInput, "of moods@1, each with a list `labels`; row 1"),
        (lambda h: h.evaluate([*everybody()[:4], {"text": "1", "adapter": "stars", "label": "red"}]), InvalidInput, "a number as its label; row 5"),
        (lambda h: h.evaluate([{"text": "meet", "adapter": "names", "spans": BEYOND}]), InvalidInput, "within its text"),
        (lambda h: h.evaluate([{"text": "paint", "adapter": "colours", "labels": ["red"]}]), InvalidInput, "of colours@1, each with a label; row 1"),
        (lambda h: h.evaluate(names=[]), InvalidInput, "names is empty"),
        (lambda h: h.evaluate(everybody(), names=[]), InvalidInput, "names is empty"),
        (lambda h: h.evaluate("absent.jsonl"), InvalidInput, "absent.jsonl"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_measured(hub: Hub, call: Callable[[Hub], Any], error: type[HubError], message: str) -> None:
    with pytest.raises(error) as caught:
        call(hub)
    assert message in str(caught.value)


def test_the_command_line_draws_an_adapter_a_line_and_writes_json(root: Path, tmp_path: Path) -> None:
    drawn, written = (CliRunner().invoke(app, ["evaluate", "colours", "stars", "--registry", str(root), *more]) for more in ([], ["--json"]))
    assert drawn.exit_code == written.exit_code == 0, drawn.output
    found = json.loads(written.stdout)
    lines = drawn.stdout.splitlines()
    assert found["adapters"]["colours@1"]["rows"] == 4 and any(line.startswith("colours@1") and line.count("accuracy=") == 2 for line in lines)
    assert not any(line.startswith("mean") for line in lines) and any(line.split() == ["routing_accuracy", "1"] for line in lines)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in everybody()))
    again = CliRunner().invoke(app, ["evaluate", "colours", "stars", "--data", str(data), "--registry", str(root), "--json"])
    assert json.loads(again.stdout)["adapters"] == found["adapters"]


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_written_texts_are_measured_and_their_perplexity_is_the_engines(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="the extra 'evaluation' is not installed")
    pytest.importorskip("rouge_score", reason="the extra 'evaluation' is not installed")
    root = tmp_path / "registry"
    hub = keeping(Hub.create(root, base_model=tiny_model(tmp_path / shape, shape), encoder="hash"), root)
    folder, settings = make_adapter(hub.base, tmp_path / "writer", size=0.3), {"max_new_tokens": 4}
    texts = ["write a line", "write the end"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, ["a cat", "the dog sat"], strict=True)]
    hub.register("writer", folder, ["write something", "write"], evaluation=rows, generation=settings)
    found = hub.evaluate()
    told = found["adapters"]["writer@1"]
    scored = hub.engine.score([Request(text, hub.registry.resolve("writer")) for text in texts], ["a cat", "the dog sat"])
    assert told["oracle"]["perplexity"] == pytest.approx(np.exp(sum(one.nats for one in scored) / sum(one.tokens for one in scored)))
    assert told["routed"] == {key: value for key, value in told["oracle"].items() if key != "perplexity"}
    assert set(told["routed"]) == {"exact_match", "rouge_l", "chrf"} and told["task"] == "text"
    # What it writes itself is what it is right about, with and without its name.
    mine = [{"text": text, "label": p.text} for text, p in zip(texts, hub.predict(texts, adapters="writer"), strict=True)]
    right = hub.evaluate([{**row, "adapter": "writer"} for row in mine])
    assert right["accuracy"] == right["accuracy_named"] == right["adapters"]["writer@1"]["oracle"]["exact_match"] == 1.0
    assert hub.evaluate(mine)["accuracy"] == 1.0


def test_who_turns_nobody_away_is_not_told_of_thresholds(hub: Hub, made: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Previously `evaluate`, whose default it is, said "calibration 1 knows 1 of the 6 adapters in production"."""
    for name in ("colours", "moods", "names", "vectors"):
        hub.retire(name)
    hub.calibrate()
    for seed in range(5):
        hub.register(f"colours{seed}", made / "colours", [f"{thing} {seed}" for thing in THINGS], labels=["red", "blue"])
    caplog.clear()
    hub.evaluate([{"text": "rate the first", "label": "1", "adapter": "stars"}])
    hub.route(["paint the wall"], max_false_reject=0)
    hub.predict(["paint the wall"], max_false_reject=0)
    (root / "rows.jsonl").write_text('{"text": "paint the wall"}\n')
    hub.run(root / "rows.jsonl", root / "answers.jsonl", max_false_reject=0)
    assert "thresholds" not in caplog.text
    hub.route(["paint the wall"])
    assert "knows 1 of the 6 adapters in production, thresholds of the others are estimates" in caplog.text
