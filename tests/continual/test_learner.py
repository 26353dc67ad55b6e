"""Learning on: what a lesson is made of, what a new version keeps of the old one, and what the gate says of it. Real tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load

from adapter_hub.continual.gate import GatePolicy, Verdict, judge
from adapter_hub.continual.learner import EVALUATION, REPLAYED, Asked, Current, evidence_of, linear_probe, plan_lesson
from adapter_hub.continual.measures import Kind
from adapter_hub.engine.engine import Output
from adapter_hub.errors import HubError, InvalidInput
from adapter_hub.examples import CHOSE, Example
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from adapter_hub.training.report import Relabelled

CONFIG = TrainConfig(r=4, epochs=8, steps_min=0, learning_rate=5e-3)
PEFT = {"r": 4, "lora_alpha": 16, "use_rslora": False, "use_dora": False, "target_modules": ["query", "value"]}


def texts(rows: Iterable[Example] | None) -> set[str]:
    return {row.text for row in rows or ()}


def rows(*words: str, count: int = 12, frame: str = "{} number {}") -> list[Example]:
    return [Example(frame.format(word, i), word) for word in words for i in range(count)]


WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron".split()
OLD = tuple(rows("apple", "zebra"))
CURRENT = Current(AdapterRef("words", 1), Path("."), ("apple", "zebra"), PEFT, exemplars=OLD, evaluation=tuple(rows("apple", "zebra", count=2)))


# ---- the lesson -----------------------------------------------------------------------------------------------------


def test_new_rows_are_learned_beside_the_old_ones_without_those_that_measure() -> None:
    new = rows("mango", "apple", frame="fresh {} {}")
    lesson = plan_lesson("words", new, None, CONFIG, CURRENT, "auto")
    assert lesson.parent == CURRENT.ref and lesson.start is not None and lesson.start.labels == CURRENT.labels
    assert texts(CURRENT.evaluation).isdisjoint(texts(lesson.train))
    assert set(lesson.slices) == {REPLAYED, EVALUATION} and texts(lesson.slices[EVALUATION]) == texts(CURRENT.evaluation)
    assert len(lesson.slices[REPLAYED]) == 20 and texts(lesson.slices[REPLAYED]) <= texts(lesson.train)


def test_the_two_versions_are_compared_on_rows_that_are_new_to_both() -> None:
    new = rows("mango", "apple", frame="fresh {} {}")
    lesson = plan_lesson("words", [*OLD, *new], None, CONFIG, CURRENT, "auto")
    assert lesson.unseen and lesson.validation and texts(lesson.validation) <= texts(new)
    assert texts(lesson.validation).isdisjoint(texts(lesson.train))
    measured = texts(CURRENT.evaluation)    # of OLD too, and no training rows of CURRENT's
    assert texts(lesson.validation) | texts(lesson.train) == (texts(OLD) | texts(new)) - measured
    assert texts(lesson.slices[EVALUATION]) == texts(lesson.again) == measured
    bare = plan_lesson("words", OLD, None, CONFIG, replace(CURRENT, evaluation=()), "auto")
    assert not bare.unseen and bare.validation is None
    given = plan_lesson("words", new, OLD[2:6], CONFIG, CURRENT, "auto")
    assert not given.unseen and texts(OLD[2:6]).isdisjoint(texts(given.train))
    assert plan_lesson("words", new, OLD[:6], CONFIG, CURRENT, "auto").unseen
    seen = plan_lesson("words", new, None, CONFIG, replace(CURRENT, exemplars=(), evaluation=()), "cold", lambda: range(len(new)))
    assert not seen.unseen    # by their vectors: the texts are not kept


def test_sets_of_labels_that_all_occur_once_are_held_out_to_compare_by() -> None:
    """Previously they were strata of one row each, of which none can be held out."""
    kind = Kind.wanted("SEQ_CLS", "multi_label_classification", None, None)
    pairs = combinations("abcdef", 2)
    new = [Example(f"{word} the {word[::-1]} story", extra={"labels": list(pair)}) for word, pair in zip(WORDS, pairs, strict=True)]
    current = Current(AdapterRef("words", 1), Path("."), tuple("abcdef"), PEFT, kind)
    lesson = plan_lesson("words", new, None, None, current, "cold", tuple, kind)
    assert lesson.unseen and lesson.validation and texts(lesson.train) | texts(lesson.validation) == texts(new)


@pytest.mark.parametrize("start", ["auto", "cold"])
def test_where_no_row_is_new_the_versions_are_compared_on_those_that_measured_the_one_in_production(start: str) -> None:
    """Previously on none: the rows that measured it were trained on."""
    lesson = plan_lesson("words", OLD, None, CONFIG, CURRENT, start)
    assert lesson.unseen and lesson.validation == lesson.again == CURRENT.evaluation and EVALUATION not in lesson.slices
    assert texts(lesson.train) == texts(OLD) - texts(CURRENT.evaluation)
    assert lesson.known == texts(lesson.train)
    assert lesson.notes[-1] == "4 of the rows measured words@1 or chose its epoch: they do so again, and are not trained on"
    first, *others = CURRENT.evaluation
    flattering = replace(CURRENT, evaluation=(replace(first, extra={CHOSE: True}), *others))
    chosen = plan_lesson("words", OLD, None, CONFIG, flattering, start)
    assert texts(chosen.validation) == texts(CURRENT.evaluation) and first.text in chosen.known    # it may choose again, and compares nothing
    assert texts(others).isdisjoint(chosen.known)
    if start == "auto":
        assert lesson.notes[0] == "no example of words@1 is replayed: those kept are among the rows"
    changed = plan_lesson("words", [Example(OLD[0].text, "zebra"), *OLD[1:]], None, CONFIG, CURRENT, start)
    assert texts(changed.again) == texts(CURRENT.evaluation) - {OLD[0].text} and OLD[0].text in texts(changed.train)
    told = plan_lesson("words", OLD, rows("apple", "zebra", frame="fresh {} {}"), CONFIG, CURRENT, start)
    assert told.again == () and texts(told.train) == texts(OLD)    # other rows measure: these are free to learn from
    few = plan_lesson("words", CURRENT.evaluation, None, CONFIG, replace(CURRENT, exemplars=()), start)
    assert few.again == () and {row.label for row in few.train} == {"apple", "zebra"}    # or no label would be left


def test_one_validation_row_that_is_known_leaves_the_others_to_compare_on() -> None:
    """Previously it left none: a worse version was promoted."""
    new = rows("mango", "apple", frame="fresh {} {}")
    asked_of = (*new[:6], OLD[3])
    lesson = plan_lesson("words", new[6:], asked_of, CONFIG, CURRENT, "cold")
    assert lesson.unseen
    right, wrong = ({row.text: Output(label=answer(row)) for row in asked_of} for answer in (lambda row: row.label, lambda row: "none"))
    evidence = evidence_of(lesson, Asked(asked_of, {}, wrong, right), CURRENT, lambda texts: np.eye(len(texts), dtype=np.float32))
    assert evidence.validation.counts == (6, 0, 6) and not evidence.probed
    assert any(note == "left out: 1 validation row that words@1 was made with" for note in evidence.notes)


def test_what_is_said_now_holds_against_what_was_said_before() -> None:
    lesson = plan_lesson("words", [Example(OLD[5].text, "zebra"), *rows("apple", frame="fresh {} {}")], None, CONFIG, CURRENT, "auto")
    assert [row.label for row in lesson.train if row.text == OLD[5].text] == ["zebra"]


def test_without_the_kept_texts_old_labels_must_be_among_the_new_rows() -> None:
    bare = replace(CURRENT, exemplars=(), evaluation=())
    with pytest.raises(InvalidInput, match=r"1 label of words@1 would be lost \('zebra'\).*start=\"cold\".*keep = \"text\""):
        plan_lesson("words", rows("apple", "mango", frame="fresh {} {}"), None, CONFIG, bare, "auto")
    for word, lost in (("apple", "1 label of words@1 would be lost ('zebra')"), ("mango", "2 labels of words@1 would be lost ('apple', 'zebra')")):
        for count in (1, 12):    # previously "all 12 training rows have the label 'apple'. A classifier needs two labels or more.", or "too few"
            with pytest.raises(InvalidInput) as caught:
                plan_lesson("words", rows(word, frame="fresh {} {}", count=count), None, CONFIG, bare, "auto")
            assert lost in caught.value.fact and str(caught.value.hint).startswith("Give rows of these labels too. Rows of one label alone make no")
    lesson = plan_lesson("words", rows("apple", "mango", frame="fresh {} {}"), None, CONFIG, bare, "cold")
    assert lesson.lost_labels == ("zebra",) and lesson.parent is None and lesson.start is None
    whole = plan_lesson("words", rows("apple", "zebra", "mango", frame="fresh {} {}"), None, CONFIG, bare, "auto")
    assert whole.start is not None and whole.notes[0] == "no text of words@1 is kept that could be replayed"


@pytest.mark.parametrize(
    ("config", "current", "says"),
    [
        (replace(CONFIG, r=8), CURRENT, "it has r=4, and the config says 8"),
        (replace(CONFIG, use_dora=True), CURRENT, "it has use_dora=False, and the config says True"),
        (replace(CONFIG, target_modules=("query",)), CURRENT, "it adapts modules that the config does not name"),
        (None, replace(CURRENT, peft=PEFT | {"rank_pattern": {"query": 8}}), "its rank differs from module to module"),
        (replace(CONFIG, lora={"rank_pattern": {"query": 8}}), CURRENT, "it has rank_pattern=None, and the config says {'query': 8}"),
        (replace(CONFIG, lora={"layers_to_transform": [1]}), CURRENT, "it has layers_to_transform=None, and the config says [1]"),
    ],
)
def test_weights_that_do_not_fit_are_no_start_and_it_is_said_why(config: TrainConfig | None, current: Current, says: str) -> None:
    new = rows("mango", frame="fresh {} {}")
    lesson = plan_lesson("words", new, None, config, current, "auto")
    assert lesson.start is None and lesson.parent == current.ref and any(says in note for note in lesson.notes)
    with pytest.raises(InvalidInput, match="words@1 is nothing to start from"):
        plan_lesson("words", new, None, config, current, "warm")


def test_without_a_config_the_shape_of_the_old_one_is_taken() -> None:
    config = plan_lesson("words", rows("mango", frame="fresh {} {}"), None, None, CURRENT, "auto").config
    upper = replace(CURRENT, peft=PEFT | {"layers_to_transform": [1], "exclude_modules": "key", "init_lora_weights": "gaussian", "bias": "none"})
    lesson = plan_lesson("words", rows("mango", frame="fresh {} {}"), None, None, upper, "auto")
    assert lesson.start is not None and lesson.config.lora == {"layers_to_transform": (1,)} and config.lora is None
    assert (config.r, config.alpha, config.target_modules) == (4, 16, ("query", "value"))


def test_a_training_that_was_killed_goes_on_after_there_is_lora() -> None:
    """The config's repr is what its checkpoints are known by. Previously what layers_share left out was copied into `lora`."""
    fast = replace(CURRENT, peft=PEFT | {"exclude_modules": r"bert\.encoder\.layer\.(0)\..*", "layers_to_transform": None, "rank_pattern": {}})
    lesson = plan_lesson("words", rows("mango", frame="fresh {} {}"), None, None, fast, "auto")
    assert repr(lesson.config) == repr(replace(TrainConfig(), r=4, alpha=16, target_modules=("query", "value"))) and lesson.start is not None


def test_the_probe_answers_as_one_would_by_the_vectors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.eye(3)[[0, 0, 1, 1, 2]]
    assert linear_probe(vectors, ["a", "a", "b", "b", "c"], np.eye(3)) == ["a", "b", "c"]
    assert linear_probe(vectors, ["a"] * 5, np.eye(3)) == ["a"] * 3
    monkeypatch.setattr("adapter_hub.continual.learner.PROBE_CELLS_MAX", 1)    # by the means
    assert linear_probe(vectors, ["a", "a", "b", "b", "c"], np.eye(3)) == ["a", "b", "c"]


def test_a_candidate_that_answers_otherwise_in_use_than_in_training_is_rejected() -> None:
    lesson = plan_lesson("words", OLD, None, CONFIG, None, "auto")
    right = {row.text: Output(label=row.label) for row in OLD}
    asked = Asked(OLD[6:18], {}, right, trained={"accuracy": 0.5})
    report = judge(evidence_of(lesson, asked, None, lambda texts: np.eye(len(texts), dtype=np.float32)), GatePolicy())
    assert report.verdict is Verdict.REJECT and "in use it answers 12 of 12 validation rows rightly, 6 in training" in report.reason


# ---- a hub that learns on -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture(scope="module")
def taught(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Registries that have learned `words` once: one keeps texts, one keeps vectors."""
    found = {}
    for keep in ("text", "vectors"):
        found[keep] = tmp_path_factory.mktemp(keep) / "registry"
        Hub.create(found[keep], base_model=bert, encoder="hash")
        settings = found[keep] / "hub.toml"
        settings.write_text(settings.read_text().replace('keep = "vectors"', f'keep = "{keep}"'))
        report = Hub.open(found[keep]).learn("words", OLD, config=CONFIG, description="Words.", tags=["w"], promote="always")
        assert report.promoted
    return found


def opened(taught: Mapping[str, Path], keep: str, tmp_path: Path) -> Hub:
    shutil.copytree(taught[keep], tmp_path / "registry")
    return Hub.open(tmp_path / "registry")


def weights(hub: Hub, ref: AdapterRef | str) -> dict[str, object]:
    return dict(load(hub.registry.read(ref, "adapter_model.safetensors")))


def test_the_gates_report_is_stored_with_the_version_that_it_judged(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "text", tmp_path)
    report = hub.learn("letters", rows("alpha", "beta"), config=CONFIG)
    stored = json.loads(hub.registry.read(report.ref, "gate.json"))
    training = stored.pop("training")    # to learn it again
    assert TrainConfig.from_dict(training) == CONFIG
    assert stored == report.gate.to_json() | {"start": False} and stored["verdict"] == str(report.verdict)
    assert {"validation", "integrity", "routing", "max_taken"} <= {finding["check"] for finding in stored["findings"]}
    assert "a linear probe of the encoder" in report.reason and hub.verify().ok
    assert report.promoted == (report.verdict is Verdict.PROMOTE)
    assert all(row.text not in json.dumps(stored) for row in rows("alpha", "beta"))


def test_a_skill_learns_on_with_a_new_label_and_keeps_what_it_knew(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "text", tmp_path)
    before = weights(hub, "words@1")
    report = hub.learn("words", rows("mango"), config=replace(CONFIG, learning_rate=1e-9, epochs=1), promote="always")
    manifest = hub.show(report.ref)
    assert (str(report.ref), manifest.parent, manifest.labels) == ("words@2", "words@1", ("apple", "mango", "zebra"))
    assert (manifest.description, manifest.tags) == ("Words.", ("w",)) and report.promoted
    after = weights(hub, report.ref)
    for key, old in before.items():    # so small a rate leaves them where they began
        new = after[key][[0, 2]] if "classifier" in key else after[key]    # type: ignore[index]
        assert np.allclose(new, old, atol=1e-5), key
    exemplars, evaluation = ((hub.registry.folder(report.ref) / f"{what}.jsonl").read_text() for what in ("exemplars", "evaluation"))
    assert exemplars.count("\n") == hub.state(report.ref).count == 36 and "apple" in evaluation and "mango" in evaluation
    assert {"replayed examples", "old evaluation inputs"} <= {finding.check for finding in report.gate.findings}
    assert {p.adapter.name for p in hub.predict(["apple number 3", "mango number 3"], max_false_reject=0) if p.adapter} == {"words"}


@pytest.mark.parametrize("more", [{}, {"layers_share": 0.5}, {"target_modules": ("query", "key")}, {"target_modules": ".*(query|key)"}])
def test_what_was_learned_with_modules_excluded_is_learned_on_with_the_same_config(bert: Path, tmp_path: Path, more: dict[str, object]) -> None:
    """Previously they were compared as text, the regular expression that was stored with the list of the config."""
    hub = Hub.create(tmp_path / "registry", base_model=bert, encoder="hash")
    config = replace(CONFIG, epochs=1, lora={"exclude_modules": ["key"]}, **more)  # type: ignore[arg-type]
    hub.learn("words", OLD, config=config, promote="always")
    again = hub.learn("words", OLD, config=config, start="warm", promote="always")
    assert again.ref.version == 2
    shaped = hub.learn("words", OLD, start="warm", promote="never", config=None)
    assert {key for key in weights(hub, shaped.ref) if "lora" in key} == {key for key in weights(hub, "words@1") if "lora" in key}
    with pytest.raises(InvalidInput, match=r"it adapts bert\.encoder\.layer\.\d\.attention\.self\.query, and the config excludes it"):
        hub.learn("words", OLD, config=replace(config, lora={"exclude_modules": ["query"]}), start="warm")


def test_a_version_that_forgets_is_held_and_the_one_in_production_stays(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "text", tmp_path)
    swapped = [Example(row.text, "zebra" if row.label == "apple" else "apple") for row in OLD]
    report = hub.learn("words", swapped, config=CONFIG, start="cold", validation=rows("apple", "zebra", frame="{} item {}"))
    assert report.verdict is not Verdict.PROMOTE and not report.promoted and hub.registry.aliases("words") == {"production": 1}
    assert hub.registry.history("words")[-1].reason == report.reason
    assert hub.registry.read(report.ref, "gate.json")
    kept = hub.learn("words", rows("apple", "mango", frame="fresh {} {}"), config=CONFIG, start="cold")
    assert kept.verdict is not Verdict.PROMOTE and "it no longer knows 1 of the labels in production ('zebra')" in kept.reason
    assert not kept.promoted and hub.show(kept.ref).parent is None
    assert hub.learn("words", rows("apple", "mango", frame="fresh {} {}"), config=CONFIG, start="cold", promote="always").promoted


@pytest.mark.parametrize("keep", ["text", "vectors"])
def test_rows_that_contradict_what_the_version_before_was_taught_are_told(
    taught: Mapping[str, Path], tmp_path: Path, keep: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Previously they took the place of the old ones without a word."""
    hub, still = opened(taught, keep, tmp_path), replace(CONFIG, learning_rate=1e-9, epochs=1)
    turned = [Example(OLD[5].text, "zebra"), Example(OLD[20].text, "mango"), OLD[3], *rows("apple", "zebra", "mango", frame="fresh {} {}")]
    cold = hub.learn("words", turned, config=still, start="cold", promote="never")
    assert (cold.data.relabelled_count, cold.data.relabelled) == (0, ()) and "than the version before" not in caplog.text    # it replaces all
    report = hub.learn("words", turned, config=still, promote="never")
    assert report.data.relabelled == (Relabelled(OLD[5].text, "apple", "zebra"), Relabelled(OLD[20].text, "zebra", "mango"))
    said = f"2 texts stand with another label than the version before was taught, as {OLD[5].text!r}: 'apple' before, 'zebra' now"
    assert report.data.relabelled_count == 2 and said in report.data.warnings and f"words: {said}." in caplog.text
    assert report.to_json()["data"]["relabelled"][1] == {"text": OLD[20].text, "before": "zebra", "now": "mango"}
    assert report.data.contradictions_count == 0


def test_where_only_vectors_are_kept_the_router_keeps_them_and_lost_labels_are_refused(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "vectors", tmp_path)
    events = hub.registry.last_event()
    with pytest.raises(InvalidInput, match="2 labels of words@1 would be lost"):
        hub.learn("words", rows("mango", "cherry"), config=CONFIG)
    assert hub.registry.last_event() == events
    report = hub.learn("words", rows("apple", "zebra", "mango", frame="fresh {} {}"), config=CONFIG, promote="always")
    assert hub.state(report.ref).count == 24 + 36 and "no text of words@1 is kept that could be replayed" in report.gate.notes
    again = hub.learn("words", rows("apple", "zebra", "mango", frame="fresh {} {}"), config=CONFIG, promote="always")
    assert hub.state(again.ref).count == 60 and "words@2 may know the validation rows: on them it is not compared with" in again.gate.notes


def test_the_same_rows_again_are_compared_on_what_measured_the_version_before(taught: Mapping[str, Path], tmp_path: Path) -> None:
    """Previously its note said that no text was kept, and nothing compared the two."""
    hub = opened(taught, "text", tmp_path)
    kept = hub.kept(AdapterRef("words", 1), "evaluation.jsonl")
    for version in (1, 2):
        report = hub.learn("words", OLD, config=CONFIG, promote="always")
        before = f"words@{version}"
        assert f"no example of {before} is replayed: those kept are among the rows" in report.gate.notes
        assert f"{before} 1.000" in report.gate.reason and not any("may know the validation rows" in note for note in report.gate.notes)
        assert texts(hub.kept(report.ref, "evaluation.jsonl")) == texts(kept) and len(hub.kept(report.ref, "exemplars.jsonl")) == len(OLD)
    grown = hub.learn("words", [*OLD, *rows("apple", "zebra", frame="fresh {} {}")], config=CONFIG, promote="always")
    assert EVALUATION in {finding.check for finding in grown.gate.findings}
    assert texts(kept) < texts(hub.kept(grown.ref, "evaluation.jsonl"))


def test_a_training_that_takes_minutes_is_told_of_before_it_begins(
    taught: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previously nothing was said until it was done."""
    hub, once = opened(taught, "text", tmp_path), replace(CONFIG, epochs=1)
    for limit, progress in ((len(OLD), False), (len(OLD) - 1, True)):
        monkeypatch.setattr("adapter_hub.learning.PASSES_LONG", limit)
        hub.learn("short", OLD, config=replace(once, progress=progress), promote="never")
        assert "is learned from" not in caplog.text
    hub.learn("long", OLD, config=once, promote="never")
    assert 'long: it is learned from 24 rows of 2 labels in 1 epoch, which takes minutes; progress=True in the config' in caplog.text


def test_what_is_refused_is_refused_before_anything_is_encoded(taught: Mapping[str, Path], tmp_path: Path) -> None:
    """Previously the kept rows of a version that only its name reaches were encoded first."""
    hub = opened(taught, "text", tmp_path)
    hub.learn("words", OLD, config=replace(CONFIG, epochs=1), routed=False, promote="always")
    hub = Hub.open(tmp_path / "registry")
    with pytest.raises(InvalidInput, match="it has r=4, and the config says 8"):
        hub.learn("words", rows("mango"), config=replace(CONFIG, r=8), start="warm")
    assert hub._encoder is None


@pytest.mark.parametrize("given", [True, False])
def test_labels_without_a_validation_row_are_told_of_the_rows_that_were_given(taught: Mapping[str, Path], tmp_path: Path, given: bool) -> None:
    hub = opened(taught, "text", tmp_path)
    validation = rows("mango", count=4, frame="a {} {}") if given else None
    report = hub.learn("words", rows("mango"), validation, config=replace(CONFIG, epochs=1), promote="never")
    assert (report.data.validation_label, report.data.unvalidated) == (("mango", ("apple", "zebra")) if given else (None, ()))


@pytest.mark.parametrize("name", ["words", "new"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([Example("a text")], "no training row has a target|too few"),
        ([Example(" ", "apple"), *OLD], "row 1"),
        ([*OLD, Example("a text")], "row 25 has no label"),
        ([], "too few|nothing to learn"),
    ],
)
def test_rows_that_cannot_be_learned_leave_the_registry_as_it_was(
    taught: Mapping[str, Path], tmp_path: Path, name: str, given: list[Example], says: str
) -> None:
    hub = opened(taught, "text", tmp_path)
    listed, events = [row.to_json() for row in hub.list()], hub.registry.last_event()
    with pytest.raises(InvalidInput, match=says):
        hub.learn(name, given, config=CONFIG)
    for bad in ({"start": "hot"}, {"validation": [Example("x", "nobody")]}, {"validation": []}):
        with pytest.raises(InvalidInput):
            hub.learn(name, OLD, config=CONFIG, **bad)  # type: ignore[arg-type]
    assert [row.to_json() for row in hub.list()] == listed and hub.registry.last_event() == events
    assert not list((tmp_path / "registry" / "adapters").glob("new"))


def test_one_class_and_a_start_that_is_not_there_are_refused(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "text", tmp_path)
    with pytest.raises(InvalidInput, match="all 3 training rows have the label 'one'"):
        hub.learn("new", rows("one", count=3), config=CONFIG)
    with pytest.raises(InvalidInput, match="new has nothing in production to start from"):
        hub.learn("new", OLD, config=CONFIG, start="warm")
    with pytest.raises(HubError, match="it has r=4, and the config says 8"):
        hub.learn("words", rows("mango"), config=replace(CONFIG, r=8), start="warm")
    assert hub.names() == ["words"]


def test_a_new_name_starts_from_its_nearest_where_trials_say_so_and_says_from_whom(bert: Path, taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "vectors", tmp_path)
    hub.register("others", make_adapter(hub.base, tmp_path / "others", use_dora=True), OLD, labels=["zebra", "apple"])
    before = weights(hub, "words@1")
    new = rows("apple", "zebra", count=20, frame="{} item {}")    # what words@1 tells apart already
    config = replace(CONFIG, learning_rate=1e-9, epochs=1)    # what counts is what its weights make of the rows
    report = hub.learn("things", new, config=config, start="transfer", promote="always")
    stored = json.loads(hub.registry.read(report.ref, "gate.json"))
    assert report.transfer is not None and stored["transfer"] == report.transfer.to_json() == report.to_json()["transfer"]
    [trial] = report.transfer.trials
    assert trial.origins == (AdapterRef("words", 1),) and report.transfer.rows == 14 and trial.advantage > trial.error
    why = "it is a DoRA, whose pairs are nothing without its magnitudes, and a start is pairs alone"
    assert stored["start"] and stored["transfer"]["unfit"] == {"others@1": why}
    assert report.transfer.note in stored["notes"] and "it starts from words@1: the best start gains +" in report.transfer.note
    manifest = hub.show(report.ref)
    assert (manifest.started_from, manifest.parent) == (("words@1",), None)
    assert hub.state(report.ref).count == len(new) and weights(hub, "words@1").keys() == before.keys()
    with pytest.raises(HubError, match="things@1"):
        hub.purge("words@1")
    assert hub.show(hub.teach("things", ["a thing"])).started_from == ("words@1",)


def test_a_damaged_neighbour_is_left_out_with_a_warning(taught: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Previously it stopped the learning."""
    hub = opened(taught, "vectors", tmp_path)
    hub.register("broken", make_adapter(hub.base, tmp_path / "broken", seed=2), OLD, labels=["zebra", "apple"])
    assert len(hub.settle().refs) == 2    # the router has read it
    path = hub.registry.folder(AdapterRef("broken", 1)) / "routing.safetensors"
    path.chmod(0o644)
    path.write_bytes(b"damaged" + path.read_bytes()[7:])
    new = rows("apple", "zebra", frame="{} item {}")
    report = hub.learn("things", new, config=replace(CONFIG, learning_rate=1e-9, epochs=1), start="transfer")
    assert report.transfer is not None and [trial.origins for trial in report.transfer.trials] == [(AdapterRef("words", 1),)]
    assert "broken@1 is left out of the comparison: " in caplog.text


def test_a_new_name_without_neighbours_starts_cold_and_one_in_production_is_learned_on(taught: Mapping[str, Path], tmp_path: Path) -> None:
    hub = opened(taught, "vectors", tmp_path)
    with pytest.raises(InvalidInput, match=r"words@1 is in production: .* start=\"auto\""):
        hub.learn("words", OLD, config=CONFIG, start="transfer")
    report = hub.learn("things", OLD, config=replace(CONFIG, use_dora=True, epochs=1), start="transfer")
    assert report.transfer is not None and report.transfer.origins == () and hub.show(report.ref).started_from == ()
    assert report.transfer.note in report.gate.notes and "no adapter fits to start from" in report.transfer.note


def test_an_adapter_that_was_registered_learns_on_too(bert: Path, tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "registry", base_model=bert, encoder="hash")
    hub.register("words", make_adapter(hub.base, tmp_path / "a", seed=1), OLD, labels=["zebra", "apple"])    # in another order
    report = hub.learn("words", rows("apple", "zebra", "mango"), config=None, promote="always", validation=rows("mango", count=4, frame="a {} {}"))
    assert report.promoted and hub.show(report.ref).parent == "words@1" and hub.show(report.ref).labels == ("apple", "mango", "zebra")
