"""The adapters that are resident: loaded once, each in a place of its form's table, least recently used out first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_hub.adapters.config import ProblemType, TaskType
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.generation import check_generation
from adapter_hub.engine.heads import Head, Heads
from adapter_hub.engine.lora_layers import MixedLayers
from adapter_hub.engine.merged import mergeable, merged
from adapter_hub.engine.plan import evictions, merge_tokens_min
from adapter_hub.engine.table import Form, Table
from adapter_hub.errors import HubError, InvalidInput
from adapter_hub.refs import AdapterRef


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter as the engine runs it."""

    table: Table
    place: int
    head: Head | None
    facts: Facts
    holders: int = 0         # running batches
    dropped: bool = False    # its place is given back when the last holder leaves


@dataclass(frozen=True, slots=True)
class Facts:
    """What planning needs of an adapter, kept when its weights are not."""

    task_type: TaskType | None
    labels: tuple[str, ...] | None
    prompt_template: str | None
    generation: Mapping[str, Any] = field(default_factory=dict)
    form: Form | None = None    # None: the base model
    bytes: int = 0              # that it takes while it is resident
    merge_from: float | None = None    # tokens from which a merged copy of the base pays; None: it cannot be merged
    problem_type: ProblemType | None = None    # SEQ_CLS


_Made = tuple[Facts, Mapping[Any, Any], Head | None]
_Read = tuple[int, Adapter, _Made]    # how often it was evicted before; as it came; as it is placed


def _bytes_of(adapter: Adapter) -> int:
    tensors = [tensor for delta in adapter.deltas.values() for tensor in (delta.a, delta.b)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *adapter.head.values()))


class Mean:
    """A running mean. Safe between threads."""

    def __init__(self) -> None:
        self._sum, self._count, self._lock = 0.0, 0, threading.Lock()

    def add(self, total: float, count: int = 1) -> None:
        with self._lock:
            self._sum, self._count = self._sum + total, self._count + count

    @property
    def value(self) -> float:
        """0 before anything was added."""
        with self._lock:
            return self._sum / max(self._count, 1)


class Slots:
    """At most `slots_max` adapters of `bytes_max` together, more only while running batches hold them. Safe between threads."""

    def __init__(
        self,
        base: FrozenBase,
        layers: MixedLayers,
        load: Callable[[AdapterRef], Adapter],
        slots_max: int,
        bytes_max: int,
        host_bytes_max: int = 0,
    ) -> None:
        self.slots_max, self.bytes_max, self.host_bytes_max = slots_max, bytes_max, host_bytes_max
        self._base, self._layers, self._load, self._heads = base, layers, load, Heads(base)
        self._merged: tuple[AdapterRef, PreTrainedModel] | None = None    # one at a time: it is as large as what it changes
        self._lock = threading.RLock()
        self._resident: OrderedDict[AdapterRef, Resident] = OrderedDict()    # least recently used first
        self._tables: dict[Form, Table] = {}
        self._facts: dict[AdapterRef, Facts] = {}
        self._evicted: dict[AdapterRef, int] = {}                     # how often
        self._ahead: dict[AdapterRef, Future[Adapter]] = {}           # read before they are asked for
        self._read_before: OrderedDict[AdapterRef, Adapter] = OrderedDict()    # as they came from their files, least recently used first
        self._pinned: dict[AdapterRef, Resident] = {}
        self.load_ms = Mean()    # of one adapter, from its files to its place
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter_hub read")

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """Least recently used first."""
        with self._lock:
            return tuple(self._resident)

    @property
    def bytes(self) -> int:
        """That the tables take, free places too."""
        with self._lock:
            return sum(table.bytes for table in self._tables.values())

    def facts(self, ref: AdapterRef, beside: Collection[AdapterRef] = ()) -> Facts:
        """Reads the adapter the first time it is asked for, and places it where none goes for it that is needed `beside` it.

        Where there is no such place it waits, read, for `hold`, as long as `read_ahead` would let it: `release` lets go of it.
        """
        with self._lock:
            if known := self._facts.get(ref):
                return known
            evicted, future = self._evicted.get(ref, 0), self._ahead.pop(ref, None)
        adapter = future.result() if future else self._read(ref)
        made = self._made(ref, adapter)
        with self._lock:
            if self._evicted.get(ref, 0) == evicted:    # else purged while it was read, and kept nowhere
                self._facts[ref] = made[0]
                if self._room_beside(made[0].bytes, beside):
                    self._leave(self._placed([ref], {ref: (evicted, adapter, made)}, beside)[ref])
                elif len(self._ahead) < self.slots_max:
                    self._ahead[ref] = Future()
                    self._ahead[ref].set_result(adapter)
        return made[0]

    def _room_beside(self, size: int, beside: Collection[AdapterRef]) -> bool:
        staying = [adapter.facts.bytes for ref, adapter in self._resident.items() if adapter.holders or ref in beside]
        return not staying or (len(staying) < self.slots_max and sum(staying) + size <= self.bytes_max)

    def sizes(self, refs: Iterable[AdapterRef]) -> dict[AdapterRef, int]:
        """Bytes of those that were loaded before. Loads nothing."""
        with self._lock:
            return {ref: self._facts[ref].bytes for ref in refs if ref in self._facts}

    def read_ahead(self, refs: Sequence[AdapterRef]) -> None:
        """Begin to read the files of those that are not resident; `hold` finds them read. Whoever asks releases them in the end."""
        with self._lock:
            for ref in refs:
                if ref not in self._resident and ref not in self._ahead and len(self._ahead) < self.slots_max:
                    self._ahead[ref] = self._reader.submit(self._read, ref)

    def release(self, refs: Iterable[AdapterRef]) -> None:
        """Let go of what was read ahead of these and not asked for: another request that waits for one reads it itself."""
        with self._lock:
            for ref in refs:
                if future := self._ahead.pop(ref, None):
                    future.cancel()

    def pin(self, refs: Sequence[AdapterRef]) -> None:
        """Keep these resident until `unpin`, or until they are purged. Raises InvalidInput where no place were left for others."""
        with self.hold(refs) as held, self._lock:
            pinned = self._pinned | dict(zip(refs, held, strict=True))
            if len(pinned) >= self.slots_max or sum(adapter.facts.bytes for adapter in pinned.values()) >= self.bytes_max:
                places = f"there are {self.slots_max}, of {self.bytes_max / 1e6:.1f} MB together"
                hint = "Pin fewer, or raise slots_max or bytes_max."
                raise InvalidInput(f"{len(pinned)} pinned adapters leave no place for others: {places}.", hint=hint)
            for ref, adapter in pinned.items():
                if ref not in self._pinned and not adapter.dropped:
                    self._pinned[ref] = adapter
                    adapter.holders += 1

    def unpin(self, refs: Sequence[AdapterRef]) -> None:
        """Those that are not pinned change nothing."""
        with self._lock:
            for ref in refs:
                if adapter := self._pinned.pop(ref, None):
                    self._leave(adapter)
            self._make_room(())

    def _read(self, ref: AdapterRef) -> Adapter:
        """From memory, where its files were read not long ago."""
        started = time.perf_counter()
        with self._lock:
            evicted, kept = self._evicted.get(ref, 0), self._read_before.pop(ref, None)
        try:
            adapter = kept or self._load(ref)
        except HubError:
            with self._lock:    # the next request learns of it before any of its rows has run
                self._facts.pop(ref, None)
            raise
        self.load_ms.add(1000 * (time.perf_counter() - started))
        with self._lock:
            if self._evicted.get(ref, 0) == evicted:
                self._read_before[ref] = adapter
            while self._read_before and sum(map(_bytes_of, self._read_before.values())) > self.host_bytes_max:
                self._read_before.popitem(last=False)
        return adapter

    @contextmanager
    def hold(self, refs: Sequence[AdapterRef]) -> Iterator[list[Resident]]:
        """The adapters, resident for as long as the context is open. Raises what `load` raises, before anything is evicted."""
        held = self._held(list(dict.fromkeys(refs)))
        try:
            yield [held[ref] for ref in refs]
        finally:
            with self._lock:
                for adapter in held.values():
                    self._leave(adapter)
                if held:    # what others brought while they ran goes now
                    self._make_room(held)

    def _held(self, refs: Sequence[AdapterRef]) -> dict[AdapterRef, Resident]:
        read: dict[AdapterRef, _Read] = {}
        while True:
            with self._lock:
                absent = [ref for ref in refs if ref not in self._resident and ref not in read]
                if not absent:
                    return self._placed(refs, {ref: one for ref, one in read.items() if ref not in self._resident}, refs)
                evicted = {ref: self._evicted.get(ref, 0) for ref in absent}
                ahead = {ref: self._ahead.pop(ref, None) for ref in absent}
            # Files are read and tensors made outside the lock, so that other batches go on.
            for ref, future in ahead.items():
                adapter = future.result() if future else self._read(ref)
                started = time.perf_counter()
                read[ref] = evicted[ref], adapter, self._made(ref, adapter)
                self.load_ms.add(1000 * (time.perf_counter() - started), 0)    # counted when they were read

    def _placed(self, refs: Sequence[AdapterRef], read: Mapping[AdapterRef, _Read], keep: Collection[AdapterRef]) -> dict[AdapterRef, Resident]:
        started = time.perf_counter()
        made = {ref: own for ref, (_, _, own) in read.items()}
        if made:
            self._make_room({*refs, *keep}, len(made), sum(facts.bytes for facts, *_ in made.values()))
        held = {}
        for ref in refs:
            if ref in made:
                facts, updates, head = made[ref]
                assert facts.form is not None
                table = self._tables.setdefault(facts.form, Table(facts.form))
                most = min(self.slots_max, self.bytes_max // max(facts.bytes, 1))
                adapter = Resident(table, table.put(updates, most), head, facts)
                # Purged while it was read: it serves this batch, and is not kept.
                adapter.dropped = self._evicted.get(ref, 0) != read[ref][0]
                if not adapter.dropped:
                    self._resident[ref], self._facts[ref] = adapter, facts
            else:
                adapter = self._resident[ref]
                self._resident.move_to_end(ref)
            adapter.holders += 1
            held[ref] = adapter
        if made:
            self.load_ms.add(1000 * (time.perf_counter() - started), 0)
        return held

    def _make_room(self, refs: Collection[AdapterRef], loads: int = 0, loads_bytes: int = 0) -> None:
        """Let the least recently used go that no batch holds, but for `refs`."""
        sizes = {ref: adapter.facts.bytes for ref, adapter in self._resident.items()}
        idle = [ref for ref, adapter in self._resident.items() if not adapter.holders and ref not in refs]
        for ref in evictions(sizes, idle, loads, loads_bytes, slots_max=self.slots_max, bytes_max=self.bytes_max):
            self._drop(ref)

    def _made(self, ref: AdapterRef, adapter: Adapter) -> _Made:
        generation = check_generation(adapter.generation, f"the settings of {ref}")    # a manifest may come from elsewhere
        form, updates = Form.of(adapter), self._layers.bind(adapter)
        size = sum(update.bytes(form.rank) for update in updates.values())
        merge_from = None
        if mergeable(self._base, updates, self.bytes_max):
            weights = sum(cast(Tensor, module.weight).numel() for module in updates)
            # Of an embedding's A a token looks one column up.
            widths = ((1 if isinstance(module, nn.Embedding) else update.a.shape[1]) + update.b.shape[1] for module, update in updates.items())
            merge_from = merge_tokens_min(weights, form.rank * sum(widths))
        facts = Facts(adapter.task_type, adapter.labels, adapter.prompt_template, generation, form, size, merge_from, adapter.problem_type)
        return facts, updates, self._heads.of(adapter) if adapter.head else None

    def merged(self, ref: AdapterRef, held: Resident) -> PreTrainedModel:
        """A copy of the base with this adapter, which the caller holds, in its weights. The last one is kept."""
        with self._lock:
            if self._merged is None or self._merged[0] != ref:
                self._merged = None    # before the next one takes memory
                own = merged(self._base, held.table.stacks.items(), held.place)
                if self._resident.get(ref) is not held:
                    return own
                self._merged = ref, own
            return self._merged[1]

    def evict(self, ref: AdapterRef) -> None:
        """Forget this adapter: its file is gone. A running batch keeps what it holds."""
        with self._lock:
            if self._merged is not None and self._merged[0] == ref:
                self._merged = None
            self._evicted[ref] = self._evicted.get(ref, 0) + 1
            for kept in (self._ahead, self._facts, self._read_before):
                kept.pop(ref, None)
            self.unpin([ref])
            if ref in self._resident:
                self._drop(ref)

    def _leave(self, adapter: Resident) -> None:
        adapter.holders -= 1
        if adapter.dropped and not adapter.holders:
            self._free(adapter)

    def _drop(self, ref: AdapterRef) -> None:
        adapter = self._resident.pop(ref)
        adapter.dropped = True
        if not adapter.holders:
            self._free(adapter)

    def _free(self, adapter: Resident) -> None:
        adapter.table.free(adapter.place)
        if adapter.table.empty:
            self._tables.pop(adapter.table.form, None)
