"""The benchmark of continual learning on toy tasks: it goes on where it was cut off, and its baselines are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from adapter_hub import Hub
from adapter_hub.base_model import FrozenBase
from adapter_hub.examples import Example
from adapter_hub.routing.encoder import HashEncoder
from adapter_hub.testing import tiny_model
from adapter_hub.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig(r=2, alpha=4, epochs=2, steps_min=0, learning_rate=1e-2)
LONGER = replace(CONFIG, epochs=30)
THINGS = ("wall", "door", "car", "fence", "roof", "gate")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return {name: __import__(name) for name in ("continual", "continual_data", "continual_hub", "continual_methods")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "bert", "bert")


@pytest.fixture
def tasks(modules: dict[str, ModuleType]) -> tuple[Any, ...]:
    def task(name: str, verb: str, labels: tuple[str, str]) -> Any:
        rows = [Example(f"{verb} the {thing} {label}", label) for thing in THINGS for label in labels]
        return modules["continual_data"].Task(name, tuple(rows[:6]), tuple(rows[6:8]), tuple(rows[8:]))

    return task("colours", "paint", ("red", "blue")), task("animals", "feed", ("dog", "cat"))


def labels_of(tasks: tuple[Any, ...]) -> list[str]:
    return sorted(label for task in tasks for label in task.labels)


@pytest.mark.parametrize("taught", [True, False])
def test_a_run_that_was_cut_off_goes_on_behind_its_last_stage(
    modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...], tmp_path: Path, taught: bool
) -> None:
    module, models = modules["continual_hub"], {"base_model": bert, "encoder": "hash"}

    def stages(run: Any, numbers: range, other: Path | None = None) -> list[dict[str, Any]]:
        asked = [[(row, task.name) for task in tasks[: number + 1] for row in task.test] for number in (0, 1)]
        return [run.stage(n, tasks[: n + 1], ([row for row, _ in asked[n]], [name for _, name in asked[n]]), other) for n in numbers]

    whole = stages(module.HubRun(tmp_path / "whole", CONFIG, **models), range(2))
    assert module.golden_same(whole) and all(one["verdict"] for one in whole)
    texts = [row.text for task in tasks for row in task.test]
    with Hub.open(tmp_path / "whole") as hub:
        assert whole[1]["alone"] == [one.label for one in hub.predict(texts, max_false_reject=0)]
    cut = module.HubRun(tmp_path / "cut", CONFIG, **models)
    stages(cut, range(1))
    if taught:
        cut._learned(tasks[1])    # and killed before it was measured
    else:
        cut.hub.learn(tasks[1].name, tasks[1].train, tasks[1].validation, config=CONFIG, promote="always", start="cold")
    again = module.HubRun(tmp_path / "cut", CONFIG)
    asked: list[str] = []
    learned = again._learned
    again._learned = lambda task: asked.append(task.name) or learned(task)
    resumed = stages(again, range(2))
    assert asked == ["animals"]
    for before, after in zip(whole, resumed, strict=True):
        assert [before[key] for key in ("routed", "alone", "named", "golden")] == [after[key] for key in ("routed", "alone", "named", "golden")]
    taken = stages(module.HubRun(tmp_path / "other", CONFIG, **models), range(2), tmp_path / "whole")    # as another order does
    for before, after in zip(whole, taken, strict=True):
        assert [before[key] for key in ("routed", "alone", "named", "golden")] == [after[key] for key in ("routed", "alone", "named", "golden")]
    damaged = [resumed[0], resumed[1] | {"golden": {name: ["other"] for name in resumed[1]["golden"]}}]
    assert not module.golden_same(damaged)


@pytest.mark.parametrize("name", ["SequentialLora", "Replay", "Elastic", "OrthogonalLora", "Alone"])
def test_a_label_that_was_never_seen_is_never_answered(modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...], name: str) -> None:
    method = getattr(modules["continual_methods"], name)(FrozenBase.load(bert), labels_of(tasks), CONFIG, 0)
    texts = [row.text for task in tasks for row in task.test]
    method.learn(tasks[:1])
    known = np.isin(labels_of(tasks), tasks[0].labels)
    scores = method.scores(texts)
    assert np.isfinite(scores[:, known]).all() and (scores[:, ~known] == -np.inf).all()
    method.learn(tasks[1:])
    assert np.isfinite(method.scores(texts)[:, ~known]).all() and method.bytes_stored > 0


def test_what_is_trained_learns_its_task(modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...]) -> None:
    method = modules["continual_methods"].SequentialLora(FrozenBase.load(bert), labels_of(tasks), LONGER, 0)
    method.learn(tasks[:1])
    best = method.scores([row.text for row in tasks[0].train]).argmax(axis=1)
    assert [labels_of(tasks)[place] for place in best] == [row.label for row in tasks[0].train]


def test_orthogonal_adapters_leave_the_heads_rows_of_earlier_labels_and_keep_every_earlier_a(
    modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...]
) -> None:
    method = modules["continual_methods"].OrthogonalLora(FrozenBase.load(bert), labels_of(tasks), CONFIG, 0)
    method.learn(tasks[:1])
    rows = [labels_of(tasks).index(label) for label in tasks[0].labels]
    head = method._whole.classifier.modules_to_save["default"].weight
    before = head[rows].clone()
    method.learn(tasks[1:])
    assert torch.equal(head[rows], before) and {len(kept) for kept in method._earlier.values()} == {2}


def test_what_resists_enough_does_not_move(modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...]) -> None:
    free, held = (modules["continual_methods"].Elastic(FrozenBase.load(bert), labels_of(tasks), LONGER, 0, strength) for strength in (0.0, 1e4))
    moved = []
    for method in (free, held):
        method.learn(tasks[:1])
        anchor, fisher = dict(method._anchor), dict(method._fisher)
        method.learn(tasks[1:])
        with torch.no_grad():
            moved.append(sum(float((fisher[name] * (value - anchor[name]) ** 2).sum()) for name, value in method._trained().items()))
    assert moved[1] < moved[0]


def test_the_random_ridge_does_not_depend_on_the_order(
    modules: dict[str, ModuleType], tasks: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = modules["continual_methods"]
    monkeypatch.setattr(methods, "RANDOM_FEATURES", 64)
    texts = [row.text for task in tasks for row in task.test]
    found = []
    for order in (tasks, tasks[::-1]):
        ridge = methods.RandomRidge(methods.Vectors(HashEncoder()), labels_of(tasks), 0)
        for task in order:
            ridge.learn([task])
        found.append(ridge.scores(texts))
    np.testing.assert_allclose(*found, atol=1e-4)


def test_a_label_that_an_earlier_task_had_keeps_its_row_of_the_head(modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...]) -> None:
    """Previously each task's probe overwrote them, and what was learned of a shared label was lost before the first step."""
    method = modules["continual_methods"].SequentialLora(FrozenBase.load(bert), labels_of(tasks), LONGER, 0)
    method.learn(tasks[:1])
    head = method._whole.classifier.modules_to_save["default"].weight
    before, known = head.detach().clone(), [labels_of(tasks).index(label) for label in tasks[0].labels]
    again = replace(tasks[0], train=(*tasks[0].train, *tasks[1].train))
    method._start(again)
    moved = (head.detach() != before).any(dim=1)
    assert not moved[known].any() and moved.sum() == len(tasks[1].labels)


@pytest.mark.parametrize("name", ["ClassMean", "RandomRidge", "JointProbe"])
def test_rows_that_chose_are_learned_then(
    modules: dict[str, ModuleType], tasks: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    methods = modules["continual_methods"]
    for setting, value in (("RANDOM_FEATURES", 64), ("PENALTIES", (0.1,)), ("INVERSE_PENALTIES", (10.0,))):    # there is nothing to choose
        monkeypatch.setattr(methods, setting, value)
    texts, scores = [row.text for task in tasks for row in task.test], []
    for carved in (tasks, [replace(task, validation=task.test[:2]) for task in tasks]):
        method = getattr(methods, name)(methods.Vectors(HashEncoder()), labels_of(tasks), *([0] if name == "RandomRidge" else []))
        method.learn(carved)
        scores.append(method.scores(texts))
    assert not np.allclose(*scores)


def run_of(modules: dict[str, ModuleType], acc: float, seed: int = 0, order: int = 1, method: str = "hub", **more: float) -> dict[str, float]:
    module = modules["continual"]
    return {"seed": seed, "order": order, "recipe": module.RECIPES.get(method, module.RECIPE), "acc": acc, **more}


GOOD = {"minus_named": -0.01, "bwt_named": 0.0, "golden_same": 1.0, "singles_same": 1.0}


def test_the_others_are_beaten_where_all_of_them_were_measured(modules: dict[str, ModuleType]) -> None:
    module, run = modules["continual"], partial(run_of, modules)
    places = [(seed, order) for seed in (0, 1, 2) for order in (1, 2, 3)]
    hub = {"hub": [run(0.6, *place, **GOOD) for place in places]}
    joint = {"joint": [run(0.6, seed) for seed in (0, 1, 2)]}
    others = {
        name: [run(0.5, *place, name) for place in places if name in module.SEQUENTIAL or place[1] == 1] for name in module.ONE_BY_ONE
    }
    assert module.missed("standard_cl", hub | joint | others) == []
    better = {"ridge": [run(0.6, 0), run(0.6, 1), run(0.63, 2)]}
    assert module.missed("standard_cl", hub | joint | others | better) == ["standard_cl: minus_others -0.0100 < 0"]
    found = module.missed("standard_cl", hub | joint | {"base": [run(0.1, 0)], "ewc": [run(0.1, 0) | {"recipe": 1}]})
    assert found[0] == "standard_cl: sequential was not measured at 9 of 9 seeds and orders"
    assert "standard_cl: base was not measured at 2 of 3 seeds and orders" in found
    assert "standard_cl: ewc was not measured at 9 of 9 seeds and orders" in found    # by another recipe
    assert found[-1] == "standard_cl: minus_others was not measured"


def test_methods_are_compared_where_both_were_run(modules: dict[str, ModuleType]) -> None:
    """Previously means of different seeds stood beside each other, and a hub that was behind on the common one was not."""
    missed, run = modules["continual"].missed, partial(run_of, modules)
    figures = {"hub": [run(0.90, 0, **GOOD), run(0.99, 1, **GOOD)], "joint": [run(0.95, 0), run(0.80, 7)]}
    assert missed("clinc_domains", figures) == ["clinc_domains: acc 0.9450 < 0.965", "clinc_domains: minus_joint -0.0500 < -0.003"]


def test_a_bar_that_was_not_measured_is_missed(modules: dict[str, ModuleType]) -> None:
    missed, run = modules["continual"].missed, partial(run_of, modules)
    assert any("acc was not measured" in line for line in missed("clinc_domains", {}))
    assert missed("clinc_domains", {"hub": [run(0.97, **GOOD)], "joint": [run(0.972)]}) == []
    damaged = [run(0.97, **GOOD), run(0.97, 1, **GOOD | {"golden_same": 0.0})]
    assert missed("clinc_domains", {"hub": damaged, "joint": [run(0.98)]}) == [
        "clinc_domains: minus_joint -0.0100 < -0.003",
        "clinc_domains: golden_same 0.5000 < 1",
    ]


def test_seeds_and_orders_that_were_measured_at_different_times_stand_together(modules: dict[str, ModuleType]) -> None:
    joined, run = modules["continual"].joined, partial(run_of, modules)
    old = run(0.3) | {"recipe": 1}
    before = {"hub": [run(0.1, 0), run(0.2, 1)], "joint": [old], "base": [old], "sequential": [run(0.3, method="sequential", fwt=0.02)]}
    now = {"hub": [run(0.5, 1), run(0.6, 0, 2)], "joint": [run(0.7, 1)], "sequential": [run(0.4, method="sequential")], "ewc": [run(0.8)]}
    assert joined(before, now) == {
        "hub": [run(0.1, 0), run(0.6, 0, 2), run(0.5, 1)],
        "joint": [run(0.7, 1)],    # by another recipe before
        "base": [old],
        "sequential": [run(0.4, method="sequential", fwt=0.02)],    # which needs the record of another method
        "ewc": now["ewc"],
    }


def test_runs_beside_each_other_measure_what_they_measure_one_after_the_other(
    modules: dict[str, ModuleType], tasks: tuple[Any, ...], tmp_path: Path
) -> None:
    module, sequence = modules["continual"], modules["continual_data"].TaskSequence("toys", tasks, ((0, 1),))
    found = []
    for jobs in (1, 2):
        (work := tmp_path / str(jobs)).mkdir()
        runs = [module.Run(sequence, "small", seed, 0, method, work) for method in ("means", "base") for seed in (0, 1)]
        assert module.compute(runs, jobs) == sorted(runs, key=module._unit)
        assert module.compute(runs, jobs) == []    # what was measured is not measured again
        found.append([json.loads(run.path.read_text()) | {"seconds": None} for run in runs])
    assert found[0] == found[1]


def test_what_reaches_the_first_adapted_layer_is_computed_once(modules: dict[str, ModuleType], bert: Path, tasks: tuple[Any, ...]) -> None:
    upper = replace(CONFIG, layers_share=0.5)
    method = modules["continual_methods"].OrthogonalLora(FrozenBase.load(bert), labels_of(tasks), upper, 0)
    texts = [row.text for task in tasks for row in task.test]
    method.learn(tasks[:1])
    method.scores(texts[:3])
    method.learn(tasks[1:])
    kept = method.scores(texts)
    assert set(method._below) == set(texts)
    inputs = [{key: torch.tensor(row.ids[key]) for key in ("input_ids", "attention_mask")} for row in method._base.encode(texts)]
    with torch.inference_mode():
        whole = method._model(**method._padded(inputs)).logits[:, method._seen].numpy()
    np.testing.assert_allclose(kept[:, method._seen], whole, atol=1e-5)
