"""The adapters that are resident: loaded once, bound to the base's modules, least recently used out first."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adapter_hub.adapters.config import TaskType
from adapter_hub.adapters.weights import Adapter
from adapter_hub.base_model import FrozenBase
from adapter_hub.engine.generation import check_generation
from adapter_hub.engine.heads import Head
from adapter_hub.engine.lora_layers import Bound, MixedLayers, Stack, stack_bound
from adapter_hub.engine.plan import missing
from adapter_hub.refs import AdapterRef

STACKS_KEPT = 4    # a job meets the same few sets of adapters again and again


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """An adapter as the engine runs it."""

    bound: Mapping[nn.Module, Bound]
    head: Head | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What planning needs of an adapter, kept when its weights are not."""

    task_type: TaskType | None
    labels: tuple[str, ...] | None
    prompt_template: str | None
    generation: Mapping[str, Any] = field(default_factory=dict)
    use_dora: bool = False


class Slots:
    """At most `slots_max` adapters, more only while running batches hold them. Safe between threads."""

    def __init__(self, base: FrozenBase, layers: MixedLayers, load: Callable[[AdapterRef], Adapter], slots_max: int) -> None:
        self.slots_max = slots_max
        self._base, self._layers, self._load = base, layers, load
        self._lock = threading.RLock()
        self._resident: OrderedDict[AdapterRef, Resident] = OrderedDict()    # least recently used first
        self._facts: dict[AdapterRef, Facts] = {}
        self._pins: Counter[AdapterRef] = Counter()
        self._stacks: OrderedDict[tuple[AdapterRef, ...], dict[nn.Module, Stack]] = OrderedDict()

    @property
    def resident(self) -> tuple[AdapterRef, ...]:
        """Least recently used first."""
        with self._lock:
            return tuple(self._resident)

    def facts(self, ref: AdapterRef) -> Facts:
        """Loads the adapter the first time it is asked for."""
        with self._lock:
            if ref not in self._facts:
                with self.hold([ref]):
                    pass
            return self._facts[ref]

    @contextmanager
    def hold(self, refs: Sequence[AdapterRef]) -> Iterator[list[Resident]]:
        """The adapters, resident for as long as the context is open."""
        with self._lock:
            # What another thread's batch holds cannot go: others must, or more than slots_max would stay.
            loads, evictions = missing([*refs, *(ref for ref in self._pins if ref in self._resident)], self.resident, self.slots_max)
            loaded = {ref: self._bind(ref) for ref in loads}    # a damaged file raises here, before anything is evicted
            for ref in evictions:
                self._drop(ref)
            self._resident |= loaded
            for ref in refs:
                self._resident.move_to_end(ref)
            held = [self._resident[ref] for ref in refs]
            self._pins.update(refs)
        try:
            yield held
        finally:
            with self._lock:
                self._pins.subtract(refs)
                self._pins += Counter()    # drops the zeros

    def stacks(self, refs: tuple[AdapterRef, ...], held: Sequence[Resident]) -> dict[nn.Module, Stack]:
        """The stacked weights of these adapters, remembered for the next batch of the same set."""
        with self._lock:
            if refs in self._stacks:
                self._stacks.move_to_end(refs)
                return self._stacks[refs]
            made = stack_bound([adapter.bound for adapter in held])
            # A batch may hold what was evicted while it ran: that is used this once, and not kept.
            if all(self._resident.get(ref) is adapter for ref, adapter in zip(refs, held, strict=True)):
                self._stacks[refs] = made
                while len(self._stacks) > STACKS_KEPT:
                    self._stacks.popitem(last=False)
            return made

    def evict(self, ref: AdapterRef) -> None:
        """Forget this adapter: its file is gone. A running batch keeps what it holds."""
        with self._lock:
            self._drop(ref)
            self._facts.pop(ref, None)

    def _drop(self, ref: AdapterRef) -> None:
        self._resident.pop(ref, None)
        for refs in [refs for refs in self._stacks if ref in refs]:
            del self._stacks[refs]

    def _bind(self, ref: AdapterRef) -> Resident:
        adapter = self._load(ref)
        generation = check_generation(adapter.generation, f"the settings of {ref}")    # a manifest may come from elsewhere
        self._facts[ref] = Facts(adapter.task_type, adapter.labels, adapter.prompt_template, generation, adapter.settings.use_dora)
        return Resident(self._layers.bind(adapter), Head(self._base, adapter) if adapter.head else None)
