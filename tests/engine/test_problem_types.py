"""What a head's outputs mean: one label, several, or a number. Against transformers' own post-processing of PEFT's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.cli import app
from adapter_hub.engine.engine import Engine, Request
from adapter_hub.engine.mixtures import Mixture
from adapter_hub.errors import InvalidInput
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import load_peft, make_adapter, task_model, tiny_model

TEXTS = ["hello there", "what is the balance", "a", "the quick brown fox jumps over the lazy dog"]
LABELS = ("anger", "joy", "fear")
ONE, ANY, YES, STARS, MORE = (AdapterRef(name, 1) for name in ("one", "any", "yes", "stars", "more"))
MULTI, NUMBER = "multi_label_classification", "regression"
# outputs, what is said when it is read, and the form
KINDS: dict[AdapterRef, tuple[int, dict[str, Any], dict[str, Any]]] = {
    ONE: (3, {"labels": LABELS}, {}),
    ANY: (3, {"labels": LABELS, "problem_type": MULTI}, {"use_dora": True}),
    YES: (1, {"labels": ("spam",), "problem_type": MULTI}, {"r": 2}),
    STARS: (1, {}, {"use_rslora": True}),
    MORE: (1, {"labels": ("stars",), "problem_type": NUMBER}, {}),
}


class Shelf:
    def __init__(self, root: Path, shape: str) -> None:
        self.base = FrozenBase.load(tiny_model(root / shape, shape))
        self.folders = {
            ref: make_adapter(self.base, root / ref.name, task_type="SEQ_CLS", outputs=outputs, seed=seed, size=0.3, **form)
            for seed, (ref, (outputs, _, form)) in enumerate(KINDS.items())
        }
        self.engine = Engine(self.base, self.load)

    def load(self, ref: AdapterRef) -> Adapter:
        adapter = read_adapter(self.folders[ref], **KINDS[ref][1])
        check_fits(adapter, self.base)
        assert check_acts(adapter, self.base) > 0
        return adapter

    def logits(self, ref: AdapterRef) -> torch.Tensor:
        """Of each text by itself, (n, c)."""
        model = load_peft(self.base, self.folders[ref], "SEQ_CLS", KINDS[ref][0])
        with torch.inference_mode():
            return torch.cat([model(**self.base.tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp(request.param), request.param)


def test_a_batch_of_every_problem_type_is_what_peft_answers(shelf: Shelf) -> None:
    outputs = iter(shelf.engine.predict([Request(text, ref) for ref in KINDS for text in TEXTS]))
    for ref, (_, said, _) in KINDS.items():
        for logits in shelf.logits(ref):
            output = next(outputs)
            if ref in (STARS, MORE):
                assert output.value is not None and abs(output.value - float(logits[0])) <= 1e-5 * max(1, abs(float(logits[0])))
                assert (output.label, output.labels, output.scores) == (None, None, {})
                continue
            expected = torch.softmax(logits, -1) if ref == ONE else torch.sigmoid(logits)
            assert list(output.scores) == list(said["labels"])
            assert np.abs(np.array([*output.scores.values()]) - expected.numpy()).max() <= 1e-5
            likely = tuple(label for label, p in zip(said["labels"], expected.tolist(), strict=True) if p >= 0.5)
            assert (output.label, output.labels) == ((said["labels"][int(expected.argmax())], None) if ref == ONE else (None, likely))


def test_numbers_and_several_labels_mix_by_their_logits(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "bert"))
    for outputs, said in ((1, {}), (3, {"labels": LABELS, "problem_type": MULTI})):
        folders = {
            AdapterRef(f"a{i}", 1): make_adapter(base, tmp_path / f"{outputs}{i}", outputs=outputs, seed=i, size=0.3, target_modules=["pooler.dense"])
            for i in range(2)
        }
        mine = {ref: read_adapter(path, **said) for ref, path in folders.items()}    # type: ignore[arg-type]
        weights = {ref: weight for ref, weight in zip(folders, (0.25, 0.75), strict=True)}
        output = Engine(base, mine.__getitem__).predict([Request(TEXTS[0], Mixture.of(weights.items()))])[0]
        # The pooler's update is the weighted sum, and each head reads the pooler that was adapted so: written out by hand.
        model = task_model(base, "SEQ_CLS", outputs)
        with torch.inference_mode():
            for ref, adapter in mine.items():
                [delta] = adapter.deltas.values()
                model.bert.pooler.dense.weight += weights[ref] * delta.scaling * delta.b @ delta.a
            pooled = model.bert(**base.tokenizer(TEXTS[0], return_tensors="pt")).pooler_output[0]
            logits = sum(
                weights[ref] * (adapter.head["classifier.weight"] @ pooled + adapter.head["classifier.bias"]) for ref, adapter in mine.items()
            )
        assert isinstance(logits, torch.Tensor)
        found, expected = ([output.value], logits) if outputs == 1 else ([*output.scores.values()], torch.sigmoid(logits))
        assert np.abs(np.array(found) - expected.numpy()).max() <= 1e-5


def test_adapters_of_other_problem_types_do_not_mix(shelf: Shelf) -> None:
    with pytest.raises(InvalidInput, match="the problem type of more@1 is regression, that of yes@1 is multi_label"):
        shelf.engine.predict([Request("x", Mixture.of([(YES, 1), (MORE, 1)]))])


# ---- through the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "registry", base_model=tiny_model(tmp_path / "bert"), encoder="hash")
    for seed, (name, outputs, labels, problem) in enumerate(
        [("one", 3, LABELS, None), ("moods", 3, LABELS, MULTI), ("stars", 1, None, None), ("price", 1, ["euros"], NUMBER)]
    ):
        folder = make_adapter(hub.base, tmp_path / name, outputs=outputs, seed=seed, size=0.3)
        hub.register(name, folder, [f"{name} of this", f"the {name}"], labels=labels, problem_type=problem)
    return hub


def test_the_manifest_keeps_the_problem_type_and_is_as_before_without_one(hub: Hub, tmp_path: Path) -> None:
    assert [hub.show(name).problem_type for name in hub] == [MULTI, None, NUMBER, NUMBER]    # moods, one, price, stars
    assert "problem_type" not in json.loads((hub.registry.folder("one") / "manifest.json").read_text())
    card = (hub.export("moods", tmp_path / "out") / "README.md").read_text()
    assert 'num_labels=3, problem_type="multi_label_classification")' in card and "| problem | multi label classification |" in card
    assert "num_labels=1)" in (hub.export("stars", tmp_path / "stars-out") / "README.md").read_text()


def test_a_hub_opened_again_and_one_rebuilt_from_files_answer_the_same(hub: Hub, tmp_path: Path) -> None:
    answers = [p.to_json() for p in hub.predict(TEXTS[:3], adapters=["moods", "stars", "one"])]
    hub.close()
    with Hub.open(tmp_path / "registry") as again:
        assert [p.to_json() for p in again.predict(TEXTS[:3], adapters=["moods", "stars", "one"])] == answers
    (tmp_path / "registry" / "catalog.sqlite").unlink()
    with Hub.open(tmp_path / "registry") as rebuilt:
        assert [p.to_json() for p in rebuilt.predict(TEXTS[:3], adapters=["moods", "stars", "one"])] == answers
        assert rebuilt.verify().ok and str(rebuilt.teach("moods", ["more of it"])) == "moods@2" and rebuilt.show("moods@2").problem_type == MULTI


def test_predictions_and_rows_of_a_job_show_labels_and_numbers(hub: Hub, tmp_path: Path) -> None:
    moods, stars = hub.predict(["hello there", "hello there"], adapters=["moods", "stars"])
    assert moods.label is None and moods.labels is not None and set(moods.labels) == {label for label, p in moods.scores.items() if p >= 0.5}
    assert moods.to_json()["output"] == list(moods.labels) and set(moods.to_json()["scores"]) == set(LABELS)
    assert stars.value is not None and stars.to_json()["output"] == round(stars.value, 6) and "label" not in stars.to_json()
    texts = [f"{name} of this" for name in ("moods", "stars", "one")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for suffix in ("jsonl", "csv", "parquet"):
        assert hub.run(tmp_path / "in.jsonl", tmp_path / f"out.{suffix}", max_false_reject=0).failed == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"text": text} | p.row() for text, p in zip(texts, hub.predict(texts, max_false_reject=0), strict=True)]
    assert [type(row.get("output")) for row in rows] == [list, float, type(None)]


def test_accuracy_of_one_label_is_not_measured_on_several_or_on_numbers(hub: Hub) -> None:
    with pytest.raises(InvalidInput, match="moods@1 gives several labels or a number"):
        hub.evaluate([{"text": "moods of this", "label": "joy"}])


def test_the_command_line_registers_a_problem_type(hub: Hub, tmp_path: Path) -> None:
    args = ["register", "cli", str(tmp_path / "moods"), "--labels", "a,b,c", "--problem-type", MULTI, "--registry", str(tmp_path / "registry")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert hub.show("cli").problem_type == MULTI
