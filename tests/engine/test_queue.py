"""A request that was queued gets what it gets alone, whoever shares its batch, and fails alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.mixtures import Mixture
from adapter_hub.engine.queue import RequestQueue
from adapter_hub.errors import CorruptAdapter, HubError, InvalidInput, QueueFull
from adapter_hub.refs import AdapterRef
from adapter_hub.testing import tiny_model
from tests.engine.reference import distance
from tests.engine.test_engine import Shelf

ONE_MOMENT_S = 60    # until a test gives up; nothing waits that long


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return FrozenBase.load(tiny_model(tmp_path_factory.mktemp("bert")))


class Gated(Shelf):
    """A shelf whose adapter "gate" is not read before `opened` is set: what is submitted meanwhile waits together."""

    def __init__(self, base: FrozenBase, root: Path) -> None:
        super().__init__(base, root)
        self.asked, self.opened = threading.Event(), threading.Event()

    def load(self, ref: AdapterRef) -> Adapter:
        if ref.name == "gate":
            self.asked.set()
            assert self.opened.wait(ONE_MOMENT_S)
        return super().load(ref)


@pytest.fixture
def shelf(bert: FrozenBase, tmp_path: Path) -> Gated:
    shelf = Gated(bert, tmp_path)
    shelf.put("gate")
    for i in range(6):
        shelf.put(f"a{i}", r=2 + i, use_dora=i == 3)
    return shelf


def refs_of(shelf: Shelf) -> list[AdapterRef]:
    return [ref for ref in shelf.folders if ref.name != "gate"]


@contextmanager
def held(shelf: Gated, queue: RequestQueue) -> Iterator[Future[Output]]:
    """While it is open the worker is busy, and the queue empty but for what is submitted."""
    future = queue.submit(Request("x", AdapterRef("gate", 1)))
    assert shelf.asked.wait(ONE_MOMENT_S)
    try:
        yield future
    finally:
        shelf.opened.set()


def gap(one: Output, other: Output) -> float:
    """Largest difference of two answers; infinity where they are not of one kind."""
    if one.vector is not None:
        return distance(one.vector, other.vector)
    return distance([*one.scores.values()], [*other.scores.values()]) if [*one.scores] == [*other.scores] else float("inf")


def test_what_waits_together_shares_a_batch_and_each_gets_what_it_gets_alone(shelf: Gated) -> None:
    engine = Engine(shelf.base, shelf.load)
    mixture = Mixture.of([(AdapterRef("a0", 1), 1), (AdapterRef("a1", 1), 2)])
    asked = [Request(f"text number {i}", adapter) for adapter in [None, mixture, *refs_of(shelf)] for i in range(3)]
    rows: list[int] = []
    handle = shelf.base.body.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    try:
        with RequestQueue(engine) as queue:
            with held(shelf, queue):
                futures = [queue.submit(request) for request in asked]
                assert len(queue) == len(asked) == 24
            found = [future.result(ONE_MOMENT_S) for future in futures]
    finally:
        handle.remove()
    assert rows == [1, 24]
    for request, output in zip(asked, found, strict=True):
        assert gap(output, engine.predict([request])[0]) <= 1e-5


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(shelf: Gated) -> None:
    request = Request("x", None)
    with RequestQueue(Engine(shelf.base, shelf.load), requests_max=2) as queue, ThreadPoolExecutor(1) as pool:
        with held(shelf, queue):
            first, second = queue.submit(request), queue.submit(request)
            for timeout in (0, 0.01):
                with pytest.raises(QueueFull, match=r"2 requests wait, as many as this queue holds\. Ask again later"):
                    queue.submit(request, timeout=timeout)
            assert first.cancel() and len(queue) == 1    # its place is free
            third = queue.submit(request, timeout=0)
            fourth = pool.submit(queue.submit, request)    # waits until there is room
        answered = [second.result(ONE_MOMENT_S), third.result(ONE_MOMENT_S), fourth.result(ONE_MOMENT_S).result(ONE_MOMENT_S)]
    assert first.cancelled() and all(gap(output, answered[0]) <= 1e-5 for output in answered)


def test_what_is_cancelled_before_it_runs_is_never_loaded(shelf: Gated) -> None:
    ref, *_ = refs_of(shelf)
    with RequestQueue(Engine(shelf.base, shelf.load)) as queue:
        with held(shelf, queue) as running:
            future = queue.submit(Request("x", ref))
            assert future.cancel() and not running.cancel()
        assert running.result(ONE_MOMENT_S).label
    assert ref not in shelf.reads


@pytest.mark.parametrize("cancel", [False, True])
def test_a_queue_that_closes_finishes_or_cancels_what_waits_and_takes_no_more(shelf: Gated, cancel: bool) -> None:
    queue, request = RequestQueue(Engine(shelf.base, shelf.load), requests_max=1), Request("x", None)
    with ThreadPoolExecutor(2) as pool:
        with held(shelf, queue) as running:
            waiting = queue.submit(request)
            blocked = pool.submit(queue.submit, request)
            closing = pool.submit(queue.close, cancel=cancel)
            with pytest.raises(HubError, match="this queue is closed"):    # not its own turn any more
                blocked.result(ONE_MOMENT_S).result(ONE_MOMENT_S)
        closing.result(ONE_MOMENT_S)
    assert running.result(0).label and waiting.cancelled() is cancel and (cancel or waiting.result(0).vector is not None)
    with pytest.raises(HubError, match=r"this queue is closed\. Open another"):
        queue.submit(request)


def test_an_error_within_the_context_cancels_what_waits(shelf: Gated) -> None:
    with pytest.raises(RuntimeError), RequestQueue(Engine(shelf.base, shelf.load)) as queue, held(shelf, queue):
        waiting = queue.submit(Request("x", None))
        raise RuntimeError
    assert waiting.cancelled() or waiting.result(0).vector is not None    # the worker may have been quicker


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_only(shelf: Gated) -> None:
    """Removed, damaged, and gone after it was run and had to make room; each with others in its batch."""
    engine = Engine(shelf.base, shelf.load, slots_max=5)
    removed, damaged, gone, *good = refs_of(shelf)
    engine.predict([Request("x", gone)])
    engine.predict([Request("x", ref) for ref in (*good, damaged, removed)])
    assert gone not in engine.slots.resident
    engine.evict(removed)
    engine.evict(damaged)
    for ref in (removed, damaged, gone):
        path = shelf.folders[ref][0] / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100]) if ref is damaged else path.unlink()
    asked = [Request("one text", adapter) for adapter in (removed, good[0], gone, damaged, None, good[1], gone, good[2])]
    with RequestQueue(engine) as queue:
        with held(shelf, queue):
            futures = [queue.submit(request) for request in asked]
    for request, future in zip(asked, futures, strict=True):
        if request.adapter in (removed, damaged, gone):
            assert isinstance(error := future.exception(0), CorruptAdapter) and str(request.adapter).partition("@")[0] in str(error)
        else:
            assert gap(future.result(0), engine.predict([request])[0]) <= 1e-5


def test_adapters_that_do_not_mix_fail_their_own_request_only(shelf: Gated) -> None:
    a, *_, dora = refs_of(shelf)[:4]
    with RequestQueue(Engine(shelf.base, shelf.load)) as queue:
        with held(shelf, queue):
            mixed, fine = queue.submit(Request("x", Mixture.of([(a, 1), (dora, 1)]))), queue.submit(Request("x", dora))
    assert "is a DoRA adapter" in str(mixed.exception(0)) and fine.result(0).label


def test_a_failure_of_the_machine_is_told_to_all_of_the_batch_and_the_next_is_answered(shelf: Gated) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    with RequestQueue(Engine(shelf.base, shelf.load)) as queue:
        handle = shelf.base.body.register_forward_pre_hook(broken)
        try:
            futures = [queue.submit(Request(text, None)) for text in "abc"]
            wait(futures, ONE_MOMENT_S)
        finally:
            handle.remove()
        assert {str(future.exception(0)) for future in futures} == {"the device is lost"}
        assert queue.submit(Request("a", None)).result(ONE_MOMENT_S).vector is not None
        assert isinstance(queue.submit(Request("a", None), then=lambda _: 1 / 0).exception(ONE_MOMENT_S), ZeroDivisionError)


def test_a_fault_of_any_kind_fails_its_own_request_only(shelf: Gated) -> None:
    """Previously what was raised and is no HubError was told to the whole batch."""
    engine, (bad, good, *_) = Engine(shelf.base, shelf.load), refs_of(shelf)
    asked = [Request("one text", ref) for ref in (good, bad, None, good)]
    engine.predict(asked)

    def broken(module: Any, args: Any, output: Any) -> None:
        if bad in engine.slots.resident and engine.slots._resident[bad].holders:
            raise ZeroDivisionError("the layer of one adapter")

    handle = shelf.base.body.register_forward_hook(broken)
    try:
        with RequestQueue(engine) as queue:
            with held(shelf, queue):
                futures = [queue.submit(request) for request in asked]
            wait(futures, ONE_MOMENT_S)
    finally:
        handle.remove()
    for request, future in zip(asked, futures, strict=True):
        if request.adapter == bad:
            assert isinstance(future.exception(0), ZeroDivisionError)
        else:
            assert gap(future.result(0), engine.predict([request])[0]) <= 1e-5


def test_a_callback_that_exits_ends_neither_its_batch_nor_the_queue(shelf: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """Previously the worker died of it: the rest of the batch, and what came later, waited for ever."""
    request = Request("x", None)
    with RequestQueue(Engine(shelf.base, shelf.load)) as queue:
        with held(shelf, queue):
            futures = [queue.submit(request) for _ in range(3)]
            futures[0].add_done_callback(lambda _: sys.exit(3))
        assert all(future.result(ONE_MOMENT_S).vector is not None for future in futures)
        assert queue.submit(request).result(ONE_MOMENT_S).vector is not None
    assert "a callback of a queued request's future raised" in caplog.text


def test_a_worker_that_fails_tells_who_waits_and_another_answers_the_next(shelf: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = Engine(shelf.base, shelf.load), Request("x", None)

    def broken(_: Any) -> Any:
        raise MemoryError("no room for a batch")

    with RequestQueue(engine) as queue:
        with monkeypatch.context() as patched:
            patched.setattr(engine.slots, "sizes", broken)
            futures = [queue.submit(request) for _ in range(3)]
            assert {str(future.exception(ONE_MOMENT_S)) for future in futures} == {"no room for a batch"}
        assert not len(queue) and queue.submit(request).result(ONE_MOMENT_S).vector is not None


def test_what_cannot_be_asked_is_refused_at_once(shelf: Gated) -> None:
    with RequestQueue(Engine(shelf.base, shelf.load)) as queue:
        for text in ("", " \n", None, b"x"):
            with pytest.raises(InvalidInput, match="the text is"):
                queue.submit(Request(text, None))    # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="'max_tokns' is not a generation setting"):
            queue.submit(Request("x", None), {"max_tokns": 3})
        assert not len(queue) and queue.submit(Request("word " * 2_000, None)).result(ONE_MOMENT_S).truncated
    for limits in ({"requests_max": 0}, {"rows_max": 0}, {"wait_ms": -1}):
        with pytest.raises(InvalidInput, match="answers nothing"):
            RequestQueue(Engine(shelf.base, shelf.load), **limits)    # type: ignore[arg-type]


def test_each_request_is_generated_by_its_own_settings(tmp_path: Path) -> None:
    base = FrozenBase.load(tiny_model(tmp_path / "llama", "llama"))
    engine = Engine(base, Shelf(base, tmp_path).load)
    sampled = {"do_sample": True, "seed": 7, "max_new_tokens": 5}
    settings: list[dict[str, Any]] = [{}, {"max_new_tokens": 3}, {"num_beams": 2, "max_new_tokens": 5}, sampled]
    asked = [(Request(text, None), each) for text in ("hello", "once upon a time") for each in settings]
    with RequestQueue(engine) as queue:
        futures = [queue.submit(request, generation=each) for request, each in asked]
    assert [future.result(0).text for future in futures] == [engine.predict([request], generation=each)[0].text for request, each in asked]


@pytest.mark.parametrize("slots_max", [1, 3])
def test_16_threads_that_predict_and_submit_never_get_anothers_answer(shelf: Gated, slots_max: int) -> None:
    shelf.opened.set()
    adapters: list[AdapterRef | None] = [None, *refs_of(shelf)]
    asked = [Request(f"text {i} of many", adapters[i % 7]) for i in range(96)]
    alone = Engine(shelf.base, shelf.load)
    expected = [alone.predict([request])[0] for request in asked]
    # Only then is 1e-5 a proof: no two of them answer a text alike.
    one_text = alone.predict([Request("text 0 of many", adapter) for adapter in adapters])
    assert min(gap(one, other) for i, one in enumerate(one_text) for other in one_text[:i]) > 1e-3
    engine = Engine(shelf.base, shelf.load, slots_max=slots_max)
    gate = threading.Barrier(16)

    def work(thread: int) -> None:
        gate.wait(ONE_MOMENT_S)
        own = range(thread, len(asked), 16)
        futures = {i: queue.submit(asked[i]) for i in own}
        predicted = engine.predict([asked[i] for i in own])
        for i, output in zip(own, predicted, strict=True):
            assert gap(output, expected[i]) <= 1e-5
            assert gap(futures[i].result(ONE_MOMENT_S), expected[i]) <= 1e-5

    with RequestQueue(engine, requests_max=20, rows_max=8) as queue, ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, thread) for thread in range(16)]:
            done.result(ONE_MOMENT_S)
    assert len(engine.slots.resident) <= slots_max and not engine.slots._ahead
