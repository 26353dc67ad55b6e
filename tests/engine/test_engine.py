"""What a row gets depends on its text and its adapter: not on neighbours, residency, threads or what came before."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration

from adapter_hub.adapters.weights import Adapter, read_adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.draws import Draws
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.mixtures import Mixture
from adapter_hub.errors import CorruptAdapter, InvalidInput, OutOfMemory
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import make_adapter, tiny_model
from tests.engine.reference import CUDA, distance, references

TEXTS = ["one text", "another text that is a good deal longer than the first", "x", "the quick brown fox"]


class Shelf:
    """Adapters by reference, counting how often each is read."""

    def __init__(self, base: FrozenBase, root: Path) -> None:
        self.base, self.root = base, root
        self.folders: dict[AdapterRef, tuple[Path, Mapping[str, Any]]] = {}
        self.reads: list[AdapterRef] = []

    def put(self, name: str, read: Mapping[str, Any] | None = None, **settings: Any) -> AdapterRef:
        ref = AdapterRef(name, 1)
        self.folders[ref] = (make_adapter(self.base, self.root / name, seed=len(self.folders), **settings), read or {})
        return ref

    def load(self, ref: AdapterRef) -> Adapter:
        self.reads.append(ref)
        folder, read = self.folders[ref]
        return read_adapter(folder, **{"labels": ("a", "b"), **read})


@pytest.fixture(scope="module")
def bert(device: str, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("bert")), device=device)


@pytest.fixture(scope="module")
def llama(device: str, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("llama"), "llama"), device=device)


@pytest.fixture
def shelf(bert: FrozenBase, tmp_path: Path) -> Shelf:
    shelf = Shelf(bert, tmp_path)
    for i in range(6):
        shelf.put(f"a{i}", r=2 + i, use_dora=i == 3, target_modules=["query", "dense"] if i == 4 else "all-linear")
    return shelf


def numbers(outputs: list[Output]) -> list[bytes]:
    return [np.array([*o.scores.values()] if o.vector is None else o.vector).tobytes() for o in outputs]


def numbers_of(output: Output) -> Any:
    return [*output.scores.values()] if output.vector is None else output.vector


def requests(refs: list[AdapterRef | None]) -> list[Request]:
    return [Request(text, ref) for ref in refs for text in TEXTS]


def test_the_same_request_gives_the_same_bytes_whatever_is_resident(shelf: Shelf) -> None:
    refs = list(shelf.folders)
    asked = requests([None, refs[0], refs[3]])
    fresh = numbers(Engine(shelf.base, shelf.load).predict(asked))
    busy = Engine(shelf.base, shelf.load, slots_max=3)
    for _ in range(2):
        busy.predict(requests([refs[5], refs[4]]))
        assert numbers(busy.predict(asked)) == fresh
    busy.predict(requests([*refs]))
    assert numbers(busy.predict(asked)) == fresh


def test_one_row_at_a_time_equals_the_batch(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load)
    asked = requests([None, *shelf.folders])
    together = engine.predict(asked)
    for request, output in zip(asked, together, strict=True):
        [alone] = engine.predict([request])
        assert (alone.label, alone.tokens) == (output.label, output.tokens)
        assert np.abs(np.frombuffer(numbers([alone])[0]) - np.frombuffer(numbers([output])[0])).max() <= 1e-5 if alone.scores else True
        if alone.vector is not None and output.vector is not None:
            assert np.abs(alone.vector - output.vector).max() <= 1e-5


def test_base_rows_of_a_mixed_batch_are_the_bases_own(shelf: Shelf) -> None:
    mixed = Engine(shelf.base, shelf.load).predict(requests([*shelf.folders, None]))[-len(TEXTS) :]
    for output, expected in zip(mixed, references(shelf.base, None, None, TEXTS), strict=True):
        assert distance(output.vector, expected) <= (1e-6 if shelf.base.device.type == "cpu" else 1e-5)


def test_no_more_adapters_than_slots_stay_and_the_least_recently_used_goes_first(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=2)
    a, b, c, *_ = shelf.folders
    for ref in (a, b, a, c):
        engine.predict([Request("x", ref)])
    assert engine.slots.resident == (a, c)


def test_a_pinned_adapter_stays_until_it_is_unpinned_or_purged(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=2)
    a, b, c, *_ = shelf.folders
    engine.slots.pin([a])
    for ref in (b, c, b):
        engine.predict([Request("x", ref)])
    assert engine.slots.resident == (a, b)
    with pytest.raises(InvalidInput, match="2 pinned adapters leave no place for others"):
        engine.slots.pin([a, b])
    engine.slots.unpin([a, c])
    engine.predict([Request("x", c)])
    assert engine.slots.resident == (b, c)
    engine.slots.pin([b])
    engine.evict(b)
    assert engine.slots.resident == (c,) and engine.slots.bytes > 0
    engine.evict(c)
    assert engine.slots.bytes == 0


def test_what_was_read_not_long_ago_is_not_read_again_where_memory_is_given_for_it(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=1, host_bytes_max=2**20)
    a, b, *_ = shelf.folders
    expected = numbers(engine.predict([Request("x", a)]))
    engine.predict([Request("x", b)])
    assert numbers(engine.predict([Request("x", a)])) == expected and shelf.reads == [a, b]
    engine.evict(a)
    engine.predict([Request("x", a)])
    assert shelf.reads == [a, b, a]


def test_places_take_no_more_than_the_budget_of_bytes(shelf: Shelf) -> None:
    """Of one form; one more adapter than the budget has room for is in a place of its own, while its batch runs."""
    a, b, c, *_ = shelf.folders
    size = Engine(shelf.base, shelf.load).slots.facts(a).bytes
    for budget, places in ((1, 1), (2 * size, 2), (3 * size + 1, 3)):
        engine = Engine(shelf.base, shelf.load, bytes_max=budget)
        for ref in (a, b, c):
            engine.predict([Request("x", ref)])
        assert engine.slots.bytes == places * size and len(engine.slots.resident) == places


def test_where_adapters_outnumber_slots_each_is_read_once_for_a_request(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=2)
    for ref in shelf.folders:
        engine.slots.facts(ref)
    shelf.reads.clear()
    engine.predict(requests([None, *shelf.folders]))
    assert sorted(shelf.reads) <= sorted(shelf.folders) and len(engine.slots.resident) == 2


def test_an_evicted_adapter_is_read_again(shelf: Shelf) -> None:
    engine, ref = Engine(shelf.base, shelf.load), next(iter(shelf.folders))
    engine.predict([Request("x", ref)])
    engine.evict(ref)
    assert engine.slots.resident == ()
    engine.predict([Request("x", ref)])
    assert shelf.reads == [ref, ref]


def test_threads_never_mix_rows(shelf: Shelf) -> None:
    engine, refs = Engine(shelf.base, shelf.load, slots_max=3), [None, *shelf.folders]
    jobs = [requests([refs[i % 7], refs[(i + 3) % 7]]) for i in range(24)]
    expected = [numbers(Engine(shelf.base, shelf.load).predict(job)) for job in jobs]
    gate = threading.Barrier(4)

    def work(job: list[Request]) -> list[bytes]:
        if gate.n_waiting < 4 and not gate.broken:
            gate.wait(timeout=10)
        return numbers(engine.predict(job))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, jobs)) == expected


def test_the_base_is_the_same_after_everything(shelf: Shelf) -> None:
    before = shelf.base.compute_fingerprint()
    plain = shelf.base.model(**shelf.base.tokenize(TEXTS)).last_hidden_state
    engine = Engine(shelf.base, shelf.load)
    engine.predict(requests([None, *shelf.folders]))
    assert shelf.base.compute_fingerprint() == before
    assert torch.equal(plain, shelf.base.model(**shelf.base.tokenize(TEXTS)).last_hidden_state)
    assert not any(parameter.requires_grad for parameter in shelf.base.model.parameters())


def test_a_batch_that_fails_leaves_no_adapter_applied(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ref = Engine(shelf.base, shelf.load), next(iter(shelf.folders))
    expected = numbers(engine.predict([Request("x", None)]))
    handle = shelf.base.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(OutOfMemory, match="one row of 3 tokens needs more memory than there is"):
        engine.predict([Request("x", ref)])
    handle.remove()
    assert numbers(engine.predict([Request("x", None)])) == expected


def test_a_row_too_large_for_the_memory_fails_alone(shelf: Shelf) -> None:
    engine, ref = Engine(shelf.base, shelf.load), next(iter(shelf.folders))

    def small(_: Any, __: Any, output: Any) -> None:
        if output.last_hidden_state.shape[1] > 20:
            raise MemoryError("no room")

    asked = [Request("x", ref), Request("word " * 40, ref), Request("y", None)]
    expected = numbers(engine.predict([asked[0]])) + numbers(engine.predict([asked[2]]))
    handle = shelf.base.model.register_forward_hook(small)
    first, fault, last = engine.answers(asked)
    handle.remove()
    assert isinstance(fault, OutOfMemory) and isinstance(first, Output) and isinstance(last, Output)
    assert numbers([first, last]) == expected


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_weights_saved_in_bfloat16_run_in_the_bases_type(shelf: Shelf, dora: bool) -> None:
    ref = shelf.put("half", task_type=None, use_dora=dora, size=0.2)
    path = shelf.folders[ref][0] / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    shelf.folders[ref] = (path.parent, {"labels": None})
    mine = Engine(shelf.base, shelf.load).predict([Request(text, ref) for text in TEXTS])
    for output, expected in zip(mine, references(shelf.base, path.parent, None, TEXTS), strict=True):
        assert distance(output.vector, expected) <= 1e-5


def test_adapters_of_different_layers_share_a_batch(shelf: Shelf) -> None:
    layers = [{"layers_to_transform": [0]}, {"layers_to_transform": [1], "use_dora": True}, {}]
    refs = [shelf.put(f"l{i}", {"labels": None}, task_type=None, target_modules=["query", "value"], **more) for i, more in enumerate(layers)]
    outputs = iter(Engine(shelf.base, shelf.load).predict(requests([None, *refs])))
    for ref in [None, *refs]:
        for expected in references(shelf.base, ref and shelf.folders[ref][0], None, TEXTS):
            assert distance(next(outputs).vector, expected) <= 1e-5


def test_a_dora_stays_what_it_is_when_another_brings_modules_that_it_has_not(shelf: Shelf) -> None:
    """Previously the first one's outputs of those modules became zero, unsaid."""
    modules = [["query"], ["query", "value", "dense"]]
    few, many = (shelf.put(f"d{i}", {"labels": None}, task_type=None, use_dora=True, target_modules=m) for i, m in enumerate(modules))
    engine = Engine(shelf.base, shelf.load)
    engine.predict([Request("x", few)])
    outputs = iter(engine.predict(requests([many, few])))
    for ref in (many, few):
        for expected in references(shelf.base, shelf.folders[ref][0], None, TEXTS):
            assert distance(next(outputs).vector, expected) <= 1e-5


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        (None, "is null, not a string"),
        (b"x", "is bytes, not a string"),
        ("a\ud800", "has half of a surrogate pair"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_by_its_position(shelf: Shelf, text: Any, fact: str) -> None:
    with pytest.raises(InvalidInput, match=f"text 2 of 3 {fact}"):
        Engine(shelf.base, shelf.load).predict([Request("fine", None), Request(text, None), Request("fine", None)])


def test_a_cut_input_says_so(shelf: Shelf) -> None:
    long, exact = Engine(shelf.base, shelf.load).predict([Request("word " * 2_000, None), Request("word", None)])
    assert long.truncated and not exact.truncated


def test_token_places_count_in_the_text_and_not_in_the_prompt_made_of_it(shelf: Shelf) -> None:
    ref = shelf.put("tags", {"prompt_template": "Tag this: {text} !"}, task_type="TOKEN_CLS")
    text = "my account"
    [output] = Engine(shelf.base, shelf.load).predict([Request(text, ref)])
    assert output.tokens is not None
    assert [(token.start, token.end) for token in output.tokens] == [(0, 2), (2, 10)]    # "my", " account": nothing of the template


def test_a_batch_that_another_thread_holds_is_not_evicted_and_no_more_than_the_slots_stay(shelf: Shelf) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=3)
    a, b, c, d, *_ = shelf.folders
    engine.predict(requests([a, b, c]))
    with engine.slots.hold([a]):
        engine.predict(requests([b, c]))
        assert engine.slots.resident[0] == a    # the least recently used, and in use
        engine.predict([Request("x", d)])
        assert set(engine.slots.resident) == {a, c, d}
        engine.evict(a)
        engine.predict([Request("x", b)])    # an evicted one that is still held is not read again for others
        assert a not in engine.slots.resident


def test_a_place_is_not_given_to_another_while_a_batch_holds_it(shelf: Shelf) -> None:
    """Previously the batch cached the stacked weights of an adapter that was purged meanwhile."""
    engine, (a, b, *_) = Engine(shelf.base, shelf.load), shelf.folders
    with engine.slots.hold([a]) as [held]:
        engine.evict(a)
        with engine.slots.hold([a, b]) as again:
            assert held.place not in {adapter.place for adapter in again if adapter.table is held.table}
        assert engine.slots.resident == (a, b)
    engine.evict(a)
    engine.evict(b)
    assert engine.slots.bytes == 0


def test_an_adapter_that_is_purged_while_it_is_read_serves_its_batch_and_is_not_kept(shelf: Shelf) -> None:
    def purged_meanwhile(ref: AdapterRef) -> Adapter:
        adapter = shelf.load(ref)
        engine.evict(ref)
        return adapter

    engine, ref = Engine(shelf.base, purged_meanwhile), next(iter(shelf.folders))
    with engine.slots.hold([ref]) as [held]:
        assert held.holders == 1
    assert engine.slots.resident == () and engine.slots.bytes == 0


def test_a_thousand_loads_and_evictions_take_no_more_memory_than_the_slots(shelf: Shelf) -> None:
    engine, refs = Engine(shelf.base, shelf.load, slots_max=2), list(shelf.folders)
    sizes = []
    for turn in range(1000):
        with engine.slots.hold([refs[turn % 3]]):    # of one form
            sizes.append(engine.slots.bytes)
    assert max(sizes) == sizes[0]


def test_no_more_bytes_than_there_are_stay(shelf: Shelf) -> None:
    refs = list(shelf.folders)
    size = Engine(shelf.base, shelf.load).slots.facts(refs[0]).bytes
    engine = Engine(shelf.base, shelf.load, bytes_max=2 * size)
    expected = numbers(Engine(shelf.base, shelf.load).predict(requests([*refs])))
    found = numbers(engine.predict(requests([*refs])))
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.frombuffer(one) - np.frombuffer(other)).max() <= 1e-5
    assert sum(engine.slots.facts(ref).bytes for ref in engine.slots.resident) <= 2 * size


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
)
def test_a_batch_too_large_for_the_memory_is_run_in_halves(shelf: Shelf, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    engine, asked = Engine(shelf.base, shelf.load), requests([None, *shelf.folders])
    expected = engine.predict(asked)

    def small(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            raise error

    handle = shelf.base.body.register_forward_pre_hook(small, with_kwargs=True)
    try:
        found = engine.predict(asked)
    finally:
        handle.remove()
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert np.abs(np.frombuffer(one) - np.frombuffer(other)).max() <= 1e-5
    assert "needs more memory than there is" in caplog.text
    with pytest.raises(RuntimeError, match="another reason"):
        handle = shelf.base.body.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("another reason")))
        try:
            engine.predict(asked)
        finally:
            handle.remove()


@CUDA
def test_a_batch_too_large_for_a_devices_memory_is_run_in_halves_and_what_follows_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "wide", width=512), device="cuda")
    shelf = Shelf(base, tmp_path)
    refs = [None, *(shelf.put(f"a{i}") for i in range(3))]
    engine = Engine(base, shelf.load)
    asked = [Request("word " * 400, ref) for ref in refs for _ in range(16)]    # 64 rows of 256 tokens: 34 MB a hidden state, and several at once
    expected = engine.predict(asked)
    torch.cuda.empty_cache()
    room = (torch.cuda.memory_reserved() + 100 * 2**20) / torch.cuda.get_device_properties(base.device).total_memory
    torch.cuda.set_per_process_memory_fraction(room)
    try:
        found = engine.predict(asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "a batch of 64 rows needs more memory than there is: it is run in halves." in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert distance(numbers_of(one), numbers_of(other)) <= 1e-5 * max(1.0, float(np.abs(numbers_of(other)).max()))
    assert numbers(engine.predict(asked)) == numbers(expected)


def test_no_requests_give_no_outputs(shelf: Shelf) -> None:
    assert Engine(shelf.base, shelf.load).predict([]) == []


def test_after_threads_that_needed_more_together_no_more_adapters_than_slots_stay(shelf: Shelf) -> None:
    """Previously they stayed until something else was loaded."""
    engine, (a, b, c, *_) = Engine(shelf.base, shelf.load, slots_max=2), shelf.folders
    with engine.slots.hold([a, b]):
        with engine.slots.hold([b, c]):
            assert len(engine.slots.resident) == 3
        assert len(engine.slots.resident) == 3    # all are held, but for what was just used
    assert engine.slots.resident == (a, b)


# ---- requests that fail in part -------------------------------------------------------------------------------------


def damaged(shelf: Shelf, ref: AdapterRef) -> None:
    path = shelf.folders[ref][0] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("slots_max", [2, 64])
def test_a_file_that_is_damaged_while_a_request_runs_fails_its_own_rows(shelf: Shelf, slots_max: int) -> None:
    engine, refs = Engine(shelf.base, shelf.load, slots_max=slots_max), list(shelf.folders)
    asked = requests([None, *refs])
    expected = engine.predict(asked)
    for ref in refs:
        engine.evict(ref)

    def damage(*_: Any) -> None:
        handle.remove()
        damaged(shelf, refs[-1])    # its turn comes last; with places for all it is loaded by now

    handle = shelf.base.body.register_forward_pre_hook(damage)
    found = engine.answers(asked)
    for request, one, other in zip(asked, found, expected, strict=True):
        if slots_max == 2 and request.adapter == refs[-1]:
            assert isinstance(one, CorruptAdapter)
        else:
            assert isinstance(one, Output) and distance(numbers_of(one), numbers_of(other)) <= 1e-5
    assert not engine.slots._ahead


def test_a_damaged_adapter_is_read_once_for_a_request_and_the_rest_stays_one_request(shelf: Shelf) -> None:
    engine, (bad, *good) = Engine(shelf.base, shelf.load), shelf.folders
    damaged(shelf, bad)
    found = engine.answers(requests([good[0], bad, *good[1:]]))
    assert shelf.reads.count(bad) == 1 and {type(one) for one in found[len(TEXTS) : 2 * len(TEXTS)]} == {CorruptAdapter}
    rest = [one for one in found if isinstance(one, Output)]
    assert numbers(rest) == numbers(Engine(shelf.base, shelf.load).predict(requests(good)))
    with pytest.raises(CorruptAdapter):
        engine.predict(requests([good[0], bad]))
    with pytest.raises(InvalidInput, match="is not a generation setting"):
        engine.answers([], generation={"max_tokns": 3})


def test_a_file_that_went_is_asked_for_once_by_each_request_after_the_first_that_missed_it(shelf: Shelf) -> None:
    engine, (bad, *good) = Engine(shelf.base, shelf.load, slots_max=1), shelf.folders
    asked = requests([bad, *good[:2]])
    engine.predict(asked)
    damaged(shelf, bad)
    for _ in range(3):
        shelf.reads.clear()
        assert [isinstance(one, Output) for one in engine.answers(asked)] == [False] * 4 + [True] * 8
    assert shelf.reads.count(bad) == 1


def test_a_text_that_cannot_be_read_fails_its_own_row(shelf: Shelf) -> None:
    found = Engine(shelf.base, shelf.load).answers([Request(text, None) for text in ("a", "", "b", "c", " ")])
    assert [isinstance(one, Output) for one in found] == [True, False, True, True, False]


def test_what_was_read_ahead_for_a_request_that_failed_is_let_go(shelf: Shelf) -> None:
    """Previously it stayed in memory, and once there were as many as places nothing was read ahead any more."""
    engine, refs = Engine(shelf.base, shelf.load, slots_max=1), list(shelf.folders)
    for ref in refs:
        engine.slots.facts(ref)
    for error in (RuntimeError("the device is lost"), InvalidInput("nobody may see this.")):
        handle = shelf.base.body.register_forward_pre_hook(lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            engine.predict(requests(refs[:3]))
        handle.remove()
        assert not engine.slots._ahead
    engine.predict(requests(refs))
    assert not engine.slots._ahead


def test_a_version_that_is_purged_while_its_facts_are_read_has_them_all_the_same(shelf: Shelf) -> None:
    """Previously KeyError."""

    def purged_meanwhile(ref: AdapterRef) -> Adapter:
        adapter = shelf.load(ref)
        engine.evict(ref)
        return adapter

    engine, ref = Engine(shelf.base, purged_meanwhile), next(iter(shelf.folders))
    assert engine.slots.facts(ref).labels == ("a", "b") and engine.predict([Request("x", ref)])[0].label


def test_a_request_whose_adapters_do_not_fit_is_told_beforehand_what_it_loads(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(shelf.base, shelf.load, slots_max=2)
    a, b, c, _, d, e = shelf.folders    # the fourth is a DoRA, which does not mix
    mixed = [Request("x", Mixture.of([(one, 1), (other, 1)])) for one, other in ((a, b), (a, c), (b, c))]
    engine.predict([Request("x", a), Request("x", b)])
    assert not caplog.records
    for ref in (a, b, c):
        engine.slots.facts(ref)
    engine.predict([Request("x", d), Request("x", e)])    # none of the mixed is resident now
    shelf.reads.clear()
    engine.predict(mixed)
    [record] = caplog.records
    assert "the 3 adapters of this request" in record.message and "take turns in 2 places" in record.message
    assert f"up to {len(shelf.reads)} loads, 1 of them repeated" in record.message and len(shelf.reads) == 4
    assert engine.slots.load_ms.value > 0 and engine.row_ms.value > 0


# ---- sizes of requests ----------------------------------------------------------------------------------------------


def test_ten_thousand_rows_are_answered_as_each_is_alone(shelf: Shelf) -> None:
    engine, refs = Engine(shelf.base, shelf.load, slots_max=3), [None, *shelf.folders]
    asked = [Request(f"t{i % 700}", refs[i % 7]) for i in range(10_000)]
    found = engine.predict(asked)
    alone = {}
    for request, output in zip(asked, found, strict=True):
        if request not in alone and len(alone) < 70:
            [alone[request]] = engine.predict([request])
        if request in alone:
            assert distance(numbers_of(output), numbers_of(alone[request])) <= 1e-5
    assert len(found) == 10_000 and len(alone) == 70


def test_one_token_is_enough(shelf: Shelf) -> None:
    ref = next(iter(shelf.folders))
    [base_row, row] = Engine(shelf.base, shelf.load).predict([Request("x", None), Request("x", ref)])
    for output, folder, task in ((base_row, None, None), (row, shelf.folders[ref][0], "SEQ_CLS")):
        [expected] = references(shelf.base, folder, task, ["x"], 2)
        assert distance(numbers_of(output), expected) <= 1e-5


# ---- generation -----------------------------------------------------------------------------------------------------


def test_templates_and_settings_are_each_adapters_own_and_the_call_wins(llama: FrozenBase, tmp_path: Path) -> None:
    shelf = Shelf(llama, tmp_path)
    plain = shelf.put("plain", {"labels": None})
    short = shelf.put("short", {"labels": None, "generation": {"max_new_tokens": 2}, "prompt_template": "say {text} now"})
    engine = Engine(llama, shelf.load)
    asked = [Request("hello", plain), Request("hello", short), Request("hello", None)]
    outputs = engine.predict(asked)
    folder = shelf.folders[short][0]
    assert [outputs[1].text] == references(llama, folder, "CAUSAL_LM", ["say hello now"], max_new_tokens=2, do_sample=False)
    assert [outputs[0].text] == references(llama, shelf.folders[plain][0], "CAUSAL_LM", ["hello"], max_new_tokens=64, do_sample=False)
    called = engine.predict(asked, generation={"max_new_tokens": 5})
    assert [called[1].text] == references(llama, folder, "CAUSAL_LM", ["say hello now"], max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("shape", ["bert", "llama"])
def test_a_text_too_long_for_its_template_is_cut_and_the_template_stays_whole(tmp_path: Path, shape: str) -> None:
    """Previously the end of the prompt was cut, and with it what the template asks."""
    base = FrozenBase.load(tiny_model(tmp_path / shape, shape), max_tokens=48)
    shelf = Shelf(base, tmp_path)
    read = {"labels": None, "prompt_template": "Q: {text}\nAnswer:"}
    ref, fits = shelf.put("asks", read, task_type="CAUSAL_LM" if shape == "llama" else None), "word " * 3
    engine = Engine(base, shelf.load)
    facts = engine.slots.facts(ref)
    for text in ("word " * 400, "nospaces" * 4000, "\U0001f642 " * 90):
        [ids] = engine._encode([text], [facts], [engine._settings(facts, {"max_new_tokens": 8})])
        prompt = base.tokenizer.decode(ids.ids["input_ids"], skip_special_tokens=True)
        assert prompt.startswith("Q: " + text[:4]) and prompt.endswith("\nAnswer:") and ids.truncated
        assert 44 <= len(ids) <= 48 and max(end for _, end in ids.offsets) <= len(text)
    [ids] = engine._encode([fits], [facts], [engine._settings(facts, {"max_new_tokens": 8})])
    assert not ids.truncated
    assert engine.predict([Request("word " * 400, ref)], generation={"max_new_tokens": 4})[0].truncated


def test_a_template_without_room_for_a_text_and_settings_that_cannot_run_are_refused(llama: FrozenBase, tmp_path: Path) -> None:
    shelf = Shelf(llama, tmp_path)
    engine, folder = Engine(llama, shelf.load), shelf.folders[shelf.put("a", {"labels": None})][0]
    for read, fact in (
        ({"prompt_template": "word " * 400 + "{text}"}, "leaves no room for a text"),
        ({"generation": {"bad_words_ids": [[5]]}}, "'bad_words_ids' is not a generation setting"),
        ({"generation": {"max_new_tokens": 5000}}, "max_new_tokens=5000 leaves no room for a prompt"),
        ({"generation": {"temperature": "hot"}}, "temperature='hot' is not"),
        ({"generation": {"temperature": 2}}, "temperature=2.0 only matters with do_sample=True"),
    ):
        with pytest.raises(InvalidInput, match=fact):
            engine.check(read_adapter(folder, **read))
    with pytest.raises(InvalidInput, match="generation 1: int holds no settings"):
        engine.predict([Request("x", None)], generation=[1])    # type: ignore[arg-type]
    assert engine.check(read_adapter(folder, generation={"do_sample": True, "temperature": 2})) == {"do_sample": True, "temperature": 2.0}


def test_settings_of_a_manifest_from_elsewhere_are_checked_when_it_is_loaded(llama: FrozenBase, tmp_path: Path) -> None:
    shelf = Shelf(llama, tmp_path)
    ref = shelf.put("a", {"labels": None, "generation": {"bad_words_ids": [[5]]}})
    with pytest.raises(InvalidInput, match="the settings of a@1: 'bad_words_ids' is not a generation setting"):
        Engine(llama, shelf.load).predict([Request("x", ref)])


def test_sampling_with_a_seed_repeats_itself_and_leaves_the_callers_generator_alone(llama: FrozenBase, tmp_path: Path) -> None:
    engine = Engine(llama, Shelf(llama, tmp_path).load)
    settings = {"do_sample": True, "seed": 7, "max_new_tokens": 10}
    state = torch.random.get_rng_state()
    first, again = (engine.predict([Request("hello", None)], generation=settings)[0].text for _ in range(2))
    assert first == again and torch.equal(state, torch.random.get_rng_state())
    assert engine.predict([Request("hello", None)], generation={**settings, "seed": 8})[0].text != first


def test_what_a_row_samples_by_its_seed_is_its_own_whatever_stands_beside_it(llama: FrozenBase, tmp_path: Path) -> None:
    """Previously all rows of a batch drew from one state, so a neighbour changed a text."""
    engine = Engine(llama, Shelf(llama, tmp_path).load)
    for settings in ({}, {"num_beams": 2}, {"top_k": 5, "temperature": 2.0}):
        asked = {"do_sample": True, "seed": 7, "max_new_tokens": 10, **settings}
        alone = [engine.predict([Request(text, None)], generation=asked)[0].text for text in TEXTS]
        assert [output.text for output in engine.predict([Request(text, None) for text in TEXTS], generation=asked)] == alone


def test_sampling_without_a_seed_draws_anew_and_moves_no_generator_of_the_process(llama: FrozenBase, tmp_path: Path) -> None:
    engine, state = Engine(llama, Shelf(llama, tmp_path).load), torch.random.get_rng_state()
    outputs = engine.predict([Request("hello", None)] * 4, generation={"do_sample": True, "max_new_tokens": 12})
    assert len({output.text for output in outputs}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_draws_are_by_the_weights_that_were_given() -> None:
    """Held to the shares themselves."""
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0])
    with Draws([3], torch.device("cpu")):
        drawn = torch.cat([torch.multinomial(weights[None], num_samples=1)[0] for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - weights).abs().max() < 0.03 and shares[3] == 0


@pytest.mark.parametrize(("count", "replacement"), [(1, False), (1, True), (3, False), (3, True)])
def test_what_rows_draw_together_is_what_torch_draws_from_each_ones_generator(device: str, count: int, replacement: bool) -> None:
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)).to(device)
    alone = [torch.Generator(device).manual_seed(seed) for seed in range(5)]
    with Draws(range(5), torch.device(device)):
        together = [torch.multinomial(weights, count, replacement) for _ in range(20)]
    for drawn in together:
        rows = zip(weights, alone, strict=True)
        assert torch.equal(drawn, torch.stack([torch.multinomial(row, count, replacement, generator=one) for row, one in rows]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_weights_that_no_row_could_draw_from_are_refused_as_torch_refuses_them(bad: float) -> None:
    weights = torch.ones(3, 4)
    weights[1, 2] = bad
    for broken in (weights, torch.zeros(3, 4)):
        with Draws(range(3), torch.device("cpu")), pytest.raises(RuntimeError, match="probabilit"):
            torch.multinomial(broken, 1)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"max_new_token": 3}, "'max_new_token' is not a generation setting. Closest: 'max_new_tokens'."),
        ({"bogus": 3}, "'bogus' is not a generation setting. There are: max_new_tokens,"),
        ({"temperature": float("nan")}, "temperature=nan is not"),
        ({"top_p": 1.5}, "top_p=1.5 is not a share above 0, at most 1"),
        ({"min_p": 2}, "min_p=2 is not a share, 0 to 1"),
        ({"seed": 2**70}, "is not a whole number, for do_sample"),
        ({"seed": -1}, "seed=-1 is not"),
        ({"stop_strings": [3]}, "stop_strings=[3] is not texts"),
        ({"stop_strings": ""}, "stop_strings='' is not texts"),
        ({"max_new_tokens": 255}, "max_new_tokens=255 leaves no room for a prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True is not"),
        ({"temperature": 0}, "temperature=0 is not a number of at least 0.001"),
        ({"do_sample": 1}, "do_sample=1 is not true or false"),
        ({"top_p": "high"}, "top_p='high' is not"),
        ({"max_new_tokens": 256}, "leaves no room for a prompt"),
        ({"temperature": 0.7}, "temperature=0.7 only matters with do_sample=True. Give {\"do_sample\": true} as well, or leave it out."),
        ({"top_p": 0.9, "do_sample": False}, "top_p=0.9 only matters with do_sample=True."),
        ({"seed": 3}, "seed=3 only matters with do_sample=True."),
    ],
)
def test_an_impossible_setting_is_refused_by_name(llama: FrozenBase, tmp_path: Path, settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Engine(llama, Shelf(llama, tmp_path).load).predict([Request("hello", None)], generation=settings)
    assert fact in str(caught.value)


def test_what_an_adapter_samples_by_is_left_out_where_a_call_does_not_sample(llama: FrozenBase, tmp_path: Path) -> None:
    shelf = Shelf(llama, tmp_path)
    greedy, sampling = (shelf.put(name, {"labels": None}, task_type="CAUSAL_LM") for name in ("greedy", "sampling"))
    shelf.folders[sampling] = shelf.folders[greedy][0], {"labels": None, "generation": {"do_sample": True, "temperature": 3, "seed": 1}}
    engine = Engine(llama, shelf.load)
    plain, drawn = engine.predict([Request("hello", greedy), Request("hello", sampling)], generation={"do_sample": False, "max_new_tokens": 12})
    assert plain.text == drawn.text
    with pytest.raises(InvalidInput, match=r"text 2 of 2, greedy@1: temperature=2\.0 only matters"):
        engine.predict([Request("hello", sampling), Request("hello", greedy)], generation={"temperature": 2})


@pytest.mark.parametrize("settings", [{"temperature": 2}, {"repetition_penalty": 2}, {"top_p": 1}, {"length_penalty": -1, "num_beams": 2}])
def test_a_whole_number_will_do_where_a_fraction_may_stand(llama: FrozenBase, tmp_path: Path, settings: dict[str, Any]) -> None:
    engine, more = Engine(llama, Shelf(llama, tmp_path).load), dict[str, Any]({"max_new_tokens": 4})
    more |= {} if "num_beams" in settings else {"do_sample": True, "seed": 1}
    whole, fraction = (
        engine.predict([Request("hello", None)], generation={**more, **{key: kind(value) for key, value in settings.items() if key != "num_beams"}})
        for kind in (int, float)
    )
    assert whole[0].text == fraction[0].text


def test_threads_that_sample_by_seed_each_get_their_own_text(llama: FrozenBase, tmp_path: Path) -> None:
    engine = Engine(llama, Shelf(llama, tmp_path).load)

    def sample(seed: int) -> str | None:
        return engine.predict([Request("hello", None)], generation={"do_sample": True, "seed": seed, "max_new_tokens": 8})[0].text

    seeds = [1, 2, 3] * 5
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(sample, seeds)) == [sample(seed) for seed in seeds]


def test_a_seq2seq_model_writes_as_many_tokens_as_it_has_positions_and_no_more(bert: FrozenBase, tmp_path: Path) -> None:
    folder = shutil.copytree(bert.path, tmp_path / "bart")
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    BartForConditionalGeneration(BartConfig(vocab_size=384, d_model=32, max_position_embeddings=64, **sizes, **tokens)).save_pretrained(folder)
    base = FrozenBase.load(folder, device=bert.device)
    shelf = Shelf(base, tmp_path)
    ref = shelf.put("a", {"labels": None})
    engine, asked = Engine(base, shelf.load), [Request("hello there", ref), Request("x", None)]
    settings = {"max_new_tokens": 64, "min_new_tokens": 64}
    for output, folder in zip(engine.predict(asked, generation=settings), (shelf.folders[ref][0], None), strict=True):
        text = "x" if folder is None else "hello there"
        assert [output.text] == references(base, folder, "SEQ_2_SEQ_LM", [text], do_sample=False, **settings)
    with pytest.raises(InvalidInput, match="max_new_tokens=65 is more than the model can write: it has 64 positions"):
        engine.predict(asked, generation={"max_new_tokens": 65})


def test_a_long_prompt_leaves_room_for_what_is_written(llama: FrozenBase, tmp_path: Path) -> None:
    [output] = Engine(llama, Shelf(llama, tmp_path).load).predict([Request("word " * 2_000, None)], generation={"max_new_tokens": 8})
    assert output.truncated and output.text is not None


def test_an_input_that_is_not_to_be_cut_is_refused_with_its_length_and_its_neighbours_are_answered(shelf: Shelf) -> None:
    engine, refs = Engine(shelf.base, shelf.load), list(shelf.folders)
    limit = shelf.base.max_tokens
    whole = [len(shelf.base.tokenizer("x " * n, verbose=False)["input_ids"]) for n in range(limit)]
    fits = max(n for n, tokens in enumerate(whole) if tokens <= limit)
    texts = ["short", "word " * 2_000, "x " * fits, "x " * (fits + 1)]
    found = engine.answers([Request(text, refs[0], truncate=False) for text in texts])
    assert [type(one) for one in found] == [Output, InvalidInput, Output, InvalidInput]
    assert numbers([o for o in found if isinstance(o, Output)]) == numbers(engine.predict([Request(texts[i], refs[0]) for i in (0, 2)]))
    fact = f"a0@1: the input has {whole[fits + 1]} tokens, and there is room for {limit}. "
    hint = "Shorten it, or let it be cut: truncate=True (`--truncate`)."
    assert str(found[3]) == fact + hint
    with pytest.raises(InvalidInput) as caught:
        engine.predict([Request("short", None), Request(texts[3], refs[0], truncate=False), Request(texts[1], None)])
    assert str(caught.value) == f"text 2 of 3, {fact}{hint}"


def test_a_prompt_that_is_not_to_be_cut_has_room_beside_what_is_to_be_written(llama: FrozenBase, tmp_path: Path) -> None:
    shelf = Shelf(llama, tmp_path)
    ref = shelf.put("writer", {"prompt_template": "Q: {text}\nA:", "labels": None}, task_type="CAUSAL_LM")
    text = "word " * 600
    whole = len(llama.tokenizer(f"Q: {text}\nA:", verbose=False)["input_ids"])
    [fault] = Engine(llama, shelf.load).answers([Request(text, ref, truncate=False)], generation={"max_new_tokens": 20})
    room = llama.tokens_limit - 20
    assert isinstance(fault, InvalidInput) and fault.fact == f"writer@1: the input has {whole} tokens, and there is room for {room}."
    assert fault.hint == "Shorten it, ask for fewer new tokens, or let it be cut: truncate=True (`--truncate`)."


def test_what_a_request_needs_is_read_once_where_places_are_few_and_lets_nobody_go_to_be_planned(shelf: Shelf) -> None:
    """Previously each was placed to be planned, so the places were empty of it when it ran: twice as many reads."""
    refs = list(shelf.folders)
    engine = Engine(shelf.base, shelf.load, slots_max=3)
    expected = Engine(shelf.base, shelf.load).predict(requests(list(refs)))
    shelf.reads.clear()
    for one, other in zip(engine.predict(requests(list(refs))), expected, strict=True):
        assert np.allclose(numbers_of(one), numbers_of(other), atol=1e-5)
    assert sorted(shelf.reads) == sorted(refs) and not engine.slots._ahead
    with pytest.raises(InvalidInput):    # what was read for a request that is refused is let go
        engine.predict([Request("x", ref) for ref in refs], generation={"bogus": 1})
    shelf.put("late")
    with pytest.raises(InvalidInput):
        engine.predict([Request("x", None), *requests(list(shelf.folders)), Request("", None)])
    assert not engine.slots._ahead
