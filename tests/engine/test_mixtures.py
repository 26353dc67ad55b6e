"""Several adapters that answer one input: the exact weighted sum of what each does, row by row, in a batch with everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from adapter_hub.adapters.weights import read_adapter
from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.cli import app
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.mixtures import Mixture
from adapter_hub.errors import AdapterNotFound, InvalidInput
from adapter_hub.hub import Hub
from adapter_hub.refs import AdapterRef
from adapter_hub.routing.decision import Reason
from adapter_hub.testing import make_adapter, tiny_model
from tests.engine.reference import FORMS, distance, mixed_references, references
from tests.engine.test_parity import LABELS, OWN_TASK, TEXTS, assert_same

A, B, C, D = (AdapterRef(name, 1) for name in ("a", "b", "c", "dora"))
SETS: list[dict[AdapterRef, float]] = [{A: 0.5, B: 0.5}, {A: 0.15, B: 0.85}, {A: 0.2, B: 0.5, C: 0.3}, {C: 0.6, B: 0.4}]
NEW = {"max_new_tokens": 6}


class Folders:
    """Adapters by reference, each of its own form, rank, size and modules."""

    def __init__(self, base: FrozenBase, root: Path, task: str | None) -> None:
        self.base, self.task = base, task
        some = {BaseKind.ENCODER: ["query", "dense"], BaseKind.CAUSAL: ["c_attn", "q_proj", "down_proj"], BaseKind.SEQ2SEQ: ["q", "wo"]}
        forms = {A: FORMS["lora"], B: FORMS["rslora"] | {"r": 6}, C: FORMS["patterns"] | {"target_modules": some[base.kind]}, D: FORMS["dora"]}
        self.paths = {
            ref: make_adapter(base, root / ref.name, task_type=task, outputs=3, seed=seed, size=0.1, **form)
            for seed, (ref, form) in enumerate(forms.items())
        }

    def engine(self, **settings: Any) -> Engine:
        labels = LABELS if self.task in ("SEQ_CLS", "TOKEN_CLS") else None
        return Engine(self.base, lambda ref: read_adapter(self.paths[ref], labels=labels), **settings)

    def expected(self, adapter: AdapterRef | Mixture | None, **generation: Any) -> list[Any]:
        if isinstance(adapter, Mixture):
            refs = sorted((ref for ref, _ in adapter.shares), key=lambda ref: ref == B)    # rsLoRA last: see the reference
            weights = dict(adapter.shares)
            return mixed_references(self.base, [self.paths[r] for r in refs], [weights[r] for r in refs], self.task, TEXTS, **generation)
        task = OWN_TASK[self.base.kind] if adapter is None else self.task
        return references(self.base, self.paths[adapter] if adapter else None, task, TEXTS, **generation)


def mixture(weights: dict[AdapterRef, float]) -> Mixture:
    return Mixture.of(weights.items())


def numbers(output: Output) -> Any:
    if output.tokens is not None:
        return np.array([token.score for token in output.tokens])
    if output.text is not None:
        return output.text
    return np.array([*output.scores.values()]) if output.vector is None else output.vector


def exact(outputs: Sequence[Output]) -> list[Any]:
    return [found if isinstance(found := numbers(output), str) else found.tobytes() for output in outputs]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("bert")))


CASES = {"bert": ["SEQ_CLS", "TOKEN_CLS", None], "gpt2": ["CAUSAL_LM"], "llama": ["CAUSAL_LM", "SEQ_CLS"], "t5": ["SEQ_2_SEQ_LM"]}


@pytest.fixture(scope="module", params=[(shape, task) for shape, tasks in CASES.items() for task in tasks], ids=str)
def folders(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    shape, task = request.param
    root = tmp_path_factory.mktemp(shape)
    return Folders(FrozenBase.load(tiny_model(root / "base", shape), device=device), root, task)


ANSWERING: list[AdapterRef | Mixture | None] = [None, A, *map(mixture, SETS), D, B]


def test_a_batch_of_base_rows_single_adapters_and_mixtures_equals_peft_one_by_one(folders: Folders) -> None:
    fingerprint = folders.base.compute_fingerprint()
    outputs = iter(folders.engine().predict([Request(text, adapter) for adapter in ANSWERING for text in TEXTS], generation=NEW))
    for adapter in ANSWERING:
        task = OWN_TASK[folders.base.kind] if adapter is None else folders.task
        for text, expected in zip(TEXTS, folders.expected(adapter, do_sample=False, **NEW), strict=True):
            assert_same(folders.base, next(outputs), expected, task, text)
    assert folders.base.compute_fingerprint() == fingerprint


def test_a_row_of_such_a_batch_equals_the_row_alone(folders: Folders) -> None:
    engine = folders.engine()
    asked = [Request(text, adapter) for text in TEXTS[:2] for adapter in ANSWERING]
    for request, output in zip(asked, engine.predict(asked, generation=NEW), strict=True):
        [alone] = engine.predict([request], generation=NEW)
        size = max(1.0, float(np.abs(numbers(alone)).max())) if output.vector is not None else 1.0
        assert distance(numbers(output), numbers(alone)) <= 1e-5 * size


def test_a_mixture_of_one_is_that_adapter_byte_for_byte(folders: Folders) -> None:
    engine = folders.engine()
    plain = exact(engine.predict([Request(text, ref) for ref in (A, B, D) for text in TEXTS], generation=NEW))
    for others in ([], [(C, 0), (D, 0.0), (A, 0)]):
        alone = [Request(text, Mixture.of([(ref, 3.0), *others])) for ref in (A, B, D) for text in TEXTS]
        assert exact(engine.predict(alone, generation=NEW)) == plain


def test_the_order_of_a_set_changes_nothing(folders: Folders) -> None:
    shares, engine = {A: 0.2, B: 0.5, C: 0.3}, folders.engine()
    found = [
        exact(engine.predict([Request(text, Mixture.of((ref, shares[ref]) for ref in order)) for text in TEXTS], generation=NEW))
        for order in ([A, B, C], [C, B, A], [B, A, C])
    ]
    assert all(other == found[0] for other in found)


def test_neighbours_that_mix_leave_base_rows_and_doras_as_they_are(bert: FrozenBase, tmp_path: Path) -> None:
    folders = Folders(bert, tmp_path, None)
    asked = [Request(text, adapter) for adapter in (None, A, D) for text in TEXTS]
    mixed = folders.engine().predict([*asked, Request("x", mixture(SETS[2]))])
    for output, alone in zip(mixed, folders.engine().predict(asked), strict=False):
        assert distance(output.vector, alone.vector) <= 2e-6 * float(np.abs(alone.vector).max())


def test_weights_are_those_of_the_dense_sum(bert: FrozenBase, tmp_path: Path) -> None:
    folders, weights = Folders(bert, tmp_path, None), {A: 0.25, B: 0.45, C: 0.3}
    model = FrozenBase.load(bert.path).model
    for ref, weight in weights.items():
        for name, delta in read_adapter(folders.paths[ref]).deltas.items():
            model.get_submodule(name).weight.data += weight * delta.scaling * delta.b @ delta.a
    with torch.inference_mode():
        for output, text in zip(folders.engine().predict([Request(text, mixture(weights)) for text in TEXTS]), TEXTS, strict=True):
            inputs = bert.tokenize([text])
            expected = bert.pool(model(**inputs).last_hidden_state, inputs["attention_mask"])[0].numpy()
            assert distance(output.vector, expected) <= 1e-5


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_beams_of_a_mixture_equal_peft_beam_for_beam(shape: str, tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "base", shape))
    folders, settings = Folders(base, tmp_path, OWN_TASK[base.kind]), {"max_new_tokens": 6, "num_beams": 3}
    answering = [mixture(SETS[1]), None, D]
    outputs = iter(folders.engine().predict([Request(text, adapter) for adapter in answering for text in TEXTS], generation=settings))
    for adapter in answering:
        assert [next(outputs).text for _ in TEXTS] == folders.expected(adapter, do_sample=False, **settings)


def test_one_product_a_module_serves_all_adapters_of_a_form_and_the_bases_rows_are_in_none(bert: FrozenBase, tmp_path: Path) -> None:
    folders = Folders(bert, tmp_path, None)

    def products(*adapters: AdapterRef | Mixture | None) -> list[tuple[int, ...]]:
        class Record(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.bmm:
                    shapes.append((*args[0].shape, args[1].shape[-1]))
                return func(*args, **(kwargs or {}))

        shapes: list[tuple[int, ...]] = []
        with Record():
            folders.engine().predict([Request("one two", adapter) for adapter in adapters])
        return shapes

    modules = len(read_adapter(folders.paths[A]).deltas)
    assert products(None, None) == []
    single, mixed = products(None, A, B), products(None, A, B, mixture({A: 1, B: 2}))
    assert len(single) == modules and {(shape[0], shape[3]) for shape in single} == {(2, 8)}
    assert len(mixed) == 3 * modules    # one more for each adapter that shares the row


def test_mixtures_share_few_slots_by_turns(bert: FrozenBase, tmp_path: Path) -> None:
    folders = Folders(bert, tmp_path, "SEQ_CLS")
    asked = [Request(text, adapter) for text in TEXTS for adapter in (mixture(SETS[0]), C, None, mixture(SETS[3]), D, A)]
    tight = folders.engine(slots_max=2)
    for output, expected in zip(tight.predict(asked), folders.engine().predict(asked), strict=True):
        assert distance(numbers(output), numbers(expected)) <= 1e-5
    assert len(tight.slots.resident) <= 2
    with pytest.raises(InvalidInput) as caught:
        tight.predict([Request("x", mixture(SETS[2]))])
    assert str(caught.value) == "a mixture of 3 adapters needs them all at once, and this engine holds 2. Mix fewer, or raise slots_max."


def test_a_mixture_knows_its_shares() -> None:
    assert Mixture.of([(A, 1), (B, 3), (C, 0)]).shares == ((B, 0.75), (A, 0.25))
    assert Mixture.of([(A, 0.25), (B, 0.5), (A, 0.25)]).shares == ((A, 0.5), (B, 0.5))
    assert Mixture.of([(A, np.float64(2)), (B, 2)]).shares == ((A, 0.5), (B, 0.5))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([(A, -0.1), (B, 1)], "the weight of a@1 in a mixture is -0.1, not a finite number of at least 0."),
        ([(A, 1), (B, float("nan"))], "the weight of b@1 in a mixture is nan, not a finite number of at least 0."),
        ([(A, float("inf"))], "the weight of a@1 in a mixture is inf, not a finite number of at least 0."),
        ([(A, "1")], "the weight of a@1 in a mixture is '1', not a finite number of at least 0."),
        ([(A, True)], "the weight of a@1 in a mixture is True, not a finite number of at least 0."),
        ([(A, 10**400)], f"the weight of a@1 in a mixture is {10**400}, not a finite number of at least 0."),
        ([(A, 0), (B, 0.0)], 'a mixture has no weight above 0. For example {"legal": 0.7, "tax": 0.3}.'),
        ([], 'a mixture has no weight above 0. For example {"legal": 0.7, "tax": 0.3}.'),
        ([(A, 1e308), (B, 1e308)], 'a mixture has weights whose sum is no finite number. For example {"legal": 0.7, "tax": 0.3}.'),
    ],
)
def test_weights_that_share_nothing_out_are_refused(weights: list[tuple[AdapterRef, Any]], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Mixture.of(weights)
    assert str(caught.value) == message


# ---- what does not mix ----------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # shape, what is made otherwise, what is read otherwise, the reason
    "dora": ("bert", {"use_dora": True}, {}, "b@1 is a DoRA adapter, whose output is not linear in B·A: a share of it is not defined"),
    "task": ("bert", {"task_type": "TOKEN_CLS"}, {}, "the task of a@1 is SEQ_CLS, that of b@1 is TOKEN_CLS"),
    "no head": ("bert", {"task_type": None}, {"labels": None}, "the task of a@1 is SEQ_CLS, that of b@1 is FEATURE_EXTRACTION"),
    "labels": ("bert", {}, {"labels": ("x", "q", "z")}, "label 2 of a@1 is 'y', that of b@1 is 'q'"),
    "order of labels": ("bert", {}, {"labels": ("y", "x", "z")}, "label 1 of a@1 is 'x', that of b@1 is 'y'"),
    "count of labels": ("bert", {"outputs": 2}, {"labels": ("x", "y")}, "a@1 has 3 labels, b@1 has 2"),
    "template": ("bert", {}, {"prompt_template": "Q: {text}"}, "the prompt template of a@1 is none, that of b@1 is 'Q: {text}'"),
    "settings": ("llama", {}, {"generation": {"max_new_tokens": 5}}, "a@1 generates with max_new_tokens=64, b@1 with max_new_tokens=5"),
    "a setting of one": ("llama", {}, {"generation": {"num_beams": 2}}, "a@1 generates with num_beams=1, b@1 with num_beams=2"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_mix_is_refused_with_the_reason_and_answers_by_itself(case: str, tmp_path: Path) -> None:
    shape, made, read, reason = REFUSALS[case]
    base = FrozenBase.load(tiny_model(tmp_path / "base", shape))
    facts: dict[str, Any] = {"labels": LABELS if shape == "bert" else None}
    a, b = (make_adapter(base, tmp_path / str(i), seed=i, **{"outputs": 3, **more}) for i, more in enumerate(({}, made)))
    adapters = {A: read_adapter(a, **facts), B: read_adapter(b, **{**facts, **read})}
    engine = Engine(base, adapters.__getitem__)
    with pytest.raises(InvalidInput) as caught:
        engine.predict([Request("x", None), Request("x", mixture({B: 0.9, A: 0.1}))], generation=NEW if shape == "llama" else None)
    assert str(caught.value) == f"a@1 and b@1 cannot answer together: {reason}. Ask each by itself."
    assert engine.mixable([A, B]) == [A] and engine.mixable([B, A]) == [B]
    engine.predict([Request("x", A), Request("x", B)])


def test_settings_that_come_to_the_same_mix(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "base", "llama"))
    generations: list[dict[str, Any]] = [{}, {"max_new_tokens": 64, "do_sample": False}]
    adapters = {
        ref: read_adapter(make_adapter(base, tmp_path / ref.name, seed=i), generation=generations[i], prompt_template="Say {text}:")
        for i, ref in enumerate((A, B))
    }
    [output] = Engine(base, adapters.__getitem__).predict([Request("x", mixture({A: 1, B: 1}))], generation=NEW)
    assert output.text


# ---- the hub --------------------------------------------------------------------------------------------------------

WALLS = [f"paint the {thing} {colour}" for thing in ("wall", "door", "fence", "gate") for colour in ("red", "blue")]
CARS = [f"paint the {thing} {colour}" for thing in ("car", "van", "truck", "bike") for colour in ("red", "blue")]
ANIMALS = [f"the {animal} {does}" for animal in ("dog", "cat") for does in ("runs", "sleeps", "eats its food", "is old")]
NOTHING = "zzz qqq 0000 jjjj"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("hub")
    hub = Hub.create(root / "registry", base_model=tiny_model(root / "bert"), encoder="hash")
    for seed, (name, texts, labels, more) in enumerate(
        [
            ("walls", WALLS, ["red", "blue"], {}),
            ("cars", CARS, ["red", "blue"], {"r": 8}),
            ("shades", [text.replace("paint", "tint") for text in CARS], ["red", "blue"], {"use_dora": True}),
            ("animals", ANIMALS, ["dog", "cat"], {}),
        ]
    ):
        hub.register(name, make_adapter(hub.base, root / name, seed=seed, size=0.2, **more), texts, labels=labels)
    return hub


def test_a_routed_input_is_answered_by_the_candidates_that_mix_with_the_best(hub: Hub) -> None:
    texts = ["paint the wall red", "paint the car blue", "the dog sleeps", "tint the van blue", NOTHING]
    found = hub.predict(texts, mix=4, max_false_reject=0.2)
    decisions = hub.route(texts, k=4, max_false_reject=0.2)
    assert [p.decision for p in found] == decisions and [p.adapter for p in found] == [d.adapter for d in decisions]
    assert [p.adapter and p.adapter.name for p in found] == ["walls", "cars", "animals", "shades", None]
    requests: list[Request] = []
    for text, p in zip(texts, found, strict=True):
        weights = {ref: weight for (ref, _), weight in zip(p.decision.candidates, p.decision.weights, strict=True)}
        kept = {ref: weight for ref, weight in weights.items() if p.adapter and p.adapter.name in ("walls", "cars") and ref.name in ("walls", "cars")}
        assert dict(p.mixture) == pytest.approx({ref: weight / sum(kept.values()) for ref, weight in kept.items()})
        requests.append(Request(text, Mixture.of(p.mixture) if p.mixture else p.adapter))
    for p, output in zip(found, hub.engine.predict(requests), strict=True):
        assert p.label == output.label and distance(p.vector if p.label is None else [*p.scores.values()], numbers(output)) <= 1e-5
    assert len(found[0].mixture) == len(found[1].mixture) == 2 and found[0].mixture[0][0].name == "walls"
    assert found[4].label is None and found[4].vector is not None and found[4].decision.reason is Reason.BELOW_THRESHOLD


def test_mix_of_one_is_what_routing_does_anyway(hub: Hub) -> None:
    texts = ["paint the wall red", "the dog sleeps", NOTHING]
    assert [p.to_json() for p in hub.predict(texts, mix=1)] == [p.to_json() for p in hub.predict(texts)]
    assert all("mixture" not in p.to_json() for p in hub.predict(texts))


def test_named_weights_are_a_mixture_and_the_prediction_says_so(hub: Hub) -> None:
    walls, cars = AdapterRef("walls", 1), AdapterRef("cars", 1)
    text = "paint it red"
    mixed, base, alone, one = hub.predict([text] * 4, adapters=[{"walls@1": 3, cars: 7}, None, "cars", {"cars": 2.0}])
    assert mixed.mixture == ((cars, 0.7), (walls, 0.3)) and mixed.adapter == mixed.decision.adapter == cars
    assert mixed.decision.reason is Reason.NAMED and mixed.to_json()["mixture"] == [
        {"adapter": "cars@1", "weight": 0.7},
        {"adapter": "walls@1", "weight": 0.3},
    ]
    assert base.adapter is None and base.mixture == alone.mixture == one.mixture == () and alone.scores == one.scores != mixed.scores
    [same] = hub.predict([text], adapters={"cars": 0.7, "walls": 0.3})
    assert distance([*same.scores.values()], np.array([*mixed.scores.values()])) <= 1e-5


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda h: h.predict(["x"], mix=0), InvalidInput, "mix=0 is not a positive count of adapters."),
        (lambda h: h.predict(["x"], mix=True), InvalidInput, "mix=True is not a positive count of adapters."),
        (lambda h: h.predict(["x"], adapters="cars", mix=2), InvalidInput, "adapters were named, and mix is for routed inputs. Name a mixture"),
        (lambda h: h.predict(["x"], adapters={}), InvalidInput, "a mixture has no weight above 0."),
        (lambda h: h.predict(["x"], adapters={"cars": -1}), InvalidInput, "the weight of cars@1 in a mixture is -1, not a finite number"),
        (lambda h: h.predict(["x"], adapters={"cars": 1, "lorries": 1}), AdapterNotFound, "adapter 'lorries' is not registered."),
        (
            lambda h: h.predict(["x"], adapters=[{"cars": 1, "animals": 1}]),
            InvalidInput,
            "animals@1 and cars@1 cannot answer together: label 1 of animals@1 is 'dog', that of cars@1 is 'red'. Ask each by itself.",
        ),
    ],
)
def test_the_hub_refuses_what_is_no_mixture(hub: Hub, ask: Callable[[Hub], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        ask(hub)
    assert str(caught.value).startswith(message)


def test_the_command_line_mixes(hub: Hub) -> None:
    folder = str(hub.registry.folder("cars").parents[2])
    words = ["predict", "paint the car blue", "--mix", "2", "--max-false-reject", "0", "--registry", folder]
    done = CliRunner().invoke(app, [*words, "--json"])
    [document] = json.loads(done.stdout)
    [expected] = hub.predict(["paint the car blue"], mix=2, max_false_reject=0)
    assert done.exit_code == 0 and document["mixture"] == expected.to_json()["mixture"] and document["label"] == expected.label
    table = CliRunner().invoke(app, words).stdout
    assert all(f"{share['weight']:.4g} {share['adapter']}" in table for share in document["mixture"])
    assert CliRunner().invoke(app, [*words, "--adapter", "cars"]).exit_code == 2
