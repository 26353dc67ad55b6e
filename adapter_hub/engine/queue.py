"""Many small requests from many threads, gathered into batches. `plan.next_batch` says which; the engine answers them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from adapter_hub.chat import question_of
from adapter_hub.engine.engine import Engine, Output, Request
from adapter_hub.engine.generation import Settings, check_generation
from adapter_hub.engine.mixtures import canonical
from adapter_hub.engine.plan import BATCH_ROWS_MAX, next_batch
from adapter_hub.errors import HubError, InvalidInput, QueueFull
from adapter_hub.examples import text_fault
from adapter_hub.refs import AdapterRef

log = logging.getLogger("adapter_hub")


@dataclass(frozen=True, slots=True)
class _Asked:
    request: Request
    adapters: tuple[AdapterRef, ...]    # distinct; empty: the base model
    settings: Settings
    since: float    # seconds, of time.monotonic
    then: Callable[[Output], Any]


class RequestQueue:
    """At most `requests_max` requests wait for the next batch of an engine. Safe between threads; a context manager.

    What comes within `wait_ms` of the oldest is answered with it, as far as the slots hold its adapters (see `next_batch`), at most
    `rows_max` at once. Which requests share a batch depends on timing, so a result agrees with `Engine.predict` of that request
    alone within 1e-5 in float32 (in fewer bits as far as those reach: rarely another label wins), not byte for byte.
    """

    def __init__(self, engine: Engine, *, requests_max: int = 1024, rows_max: int = BATCH_ROWS_MAX, wait_ms: float = 3.0) -> None:
        if min(requests_max, rows_max) < 1 or wait_ms < 0:
            raise InvalidInput(f"a queue of requests_max={requests_max}, rows_max={rows_max} and wait_ms={wait_ms} answers nothing.")
        self._engine, self._requests_max, self._rows_max, self._wait_s = engine, requests_max, rows_max, wait_ms / 1000
        self._lock = threading.RLock()
        self._room, self._more = threading.Condition(self._lock), threading.Condition(self._lock)
        self._waiting: dict[Future[Any], _Asked] = {}    # oldest first
        self._working = self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="adapter_hub queue")

    def submit(
        self,
        request: Request,
        generation: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        then: Callable[[Output], Any] = lambda output: output,
    ) -> Future[Any]:
        """The future of the request's output, or of what `then` makes of it. Until it runs, `cancel` takes it out of the queue.

        Where the queue is full it waits for room, at most `timeout` seconds. A request that fails, e.g. because the files of its
        adapter are damaged or purged by then, says so in its own future; those that share its batch are answered.
        Raises QueueFull, InvalidInput for an empty text or an unknown generation setting, HubError where the queue is closed.
        """
        if fault := text_fault(question_of(request.text)):
            raise InvalidInput(f"the text {fault}.", hint="Write its text.")
        adapters, settings = tuple(ref for ref, _ in canonical(request.adapter)), check_generation(generation or {})
        future: Future[Any] = Future()
        with self._lock:
            if not self._room.wait_for(lambda: self._closed or len(self._waiting) < self._requests_max, timeout):
                hint = "Ask again later, wait longer (timeout), or let more wait (requests_max)."
                raise QueueFull(f"{len(self._waiting)} requests wait, as many as this queue holds.", hint=hint)
            if self._closed:
                raise HubError("this queue is closed.", hint="Open another, or ask the engine itself: predict.")
            if not self._working:
                self._worker.submit(self._work)
                self._working = True
            self._waiting[future] = _Asked(request, adapters, settings, time.monotonic(), then)
            if self._ready:
                self._more.notify()
        future.add_done_callback(self._leave)
        return future

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests; answer those that wait, or cancel them. Returns when the last batch is done."""
        with self._lock:
            self._closed = True
            for condition in (self._room, self._more):
                condition.notify_all()
            left = list(self._waiting) if cancel else []
        for future in left:
            future.cancel()
        self._worker.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error those that wait are cancelled."""
        self.close(cancel=kind is not None)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def _leave(self, future: Future[Any]) -> None:
        with self._lock:
            if self._waiting.pop(future, None):
                self._room.notify()

    @property
    def _ready(self) -> bool:
        """Nothing is gained by waiting longer."""
        return self._closed or len(self._waiting) >= min(self._rows_max, self._requests_max)

    def _work(self) -> None:
        batch: Mapping[Future[Any], _Asked] = {}
        try:
            while batch := self._taken():
                self._answer(batch)
        except BaseException as error:    # who waits would wait for ever; who comes next finds another worker
            with self._lock:
                left, self._working = [*batch, *self._waiting], False
            for future in left:
                _settle(future, error)

    def _answer(self, batch: Mapping[Future[Any], _Asked]) -> None:
        asked, found = list(batch.values()), list[Output | BaseException]()
        # Whatever is raised is told to those who wait: nobody else would hear of it.
        try:
            found += self._engine.answers([one.request for one in asked], generation=[one.settings for one in asked])
        except BaseException as error:
            found += [error] * len(batch)
        for (future, one), output in zip(batch.items(), found, strict=True):
            try:
                _settle(future, output if isinstance(output, BaseException) else one.then(output))
            except BaseException as error:
                _settle(future, error)

    def _taken(self) -> dict[Future[Any], _Asked]:
        """The next batch, taken out of the queue; empty where nobody waits: the worker is done until somebody comes."""
        with self._lock:
            while self._waiting:
                left_s = next(iter(self._waiting.values())).since + self._wait_s - time.monotonic()
                if left_s > 0 and not self._ready:
                    self._more.wait(left_s)
                    continue
                waiting, slots = [one.adapters for one in self._waiting.values()], self._engine.slots
                sizes = slots.sizes({ref for adapters in waiting for ref in adapters})
                places = next_batch(waiting, sizes, slots_max=slots.slots_max, bytes_max=slots.bytes_max, rows_max=self._rows_max)
                futures = list(self._waiting)
                taken = {futures[i]: self._waiting.pop(futures[i]) for i in places}
                self._room.notify(len(taken))
                if batch := {future: asked for future, asked in taken.items() if future.set_running_or_notify_cancel()}:
                    return batch
            self._working = False
            return {}


def _settle(future: Future[Any], result: Any) -> None:
    """Give a future its result or its error. What its callbacks raise is the log's: Future itself lets sys.exit through to the worker."""
    try:
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:    # cancelled meanwhile
        pass
    except BaseException:
        log.exception("a callback of a queued request's future raised.")
