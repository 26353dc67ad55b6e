"""Places for adapters' weights, allocated beforehand and stacked by module: what one batched product reads.

Adapters of one form share a table, so what a batch computes depends on its own adapters and never on who else is resident.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adapter_hub.adapters.weights import Adapter

# c places, i inputs of a module, o outputs, r rank of the form
RANK_MIN = 8
PLACES_MIN = 8


class Form(NamedTuple):
    """Adapters of one form are run by one product."""

    rank: int       # the greatest of its modules, rounded up to a power of two
    dora: bool

    @classmethod
    def of(cls, adapter: Adapter) -> Form:
        rank = max(delta.a.shape[0] for delta in adapter.deltas.values())
        return cls(max(RANK_MIN, 1 << (rank - 1).bit_length()), adapter.settings.use_dora)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One adapter's update of one module, on the base's device and in the module's type."""

    a: Tensor              # (rank, i)
    b: Tensor              # (rank, o), the scaling multiplied in
    gain: Tensor | None    # (o,), DoRA only
    shift: Tensor | None   # (o,), (1 - gain) · the module's bias

    def bytes(self, rank: int) -> int:
        """In a table of this rank."""
        rows = [self.a.shape[1] * rank, self.b.shape[1] * rank, *(part.numel() for part in (self.gain, self.shift) if part is not None)]
        return sum(rows) * self.a.element_size()


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The updates of one module by the adapters of a table."""

    a: Tensor              # (c, r, i)
    b: Tensor              # (c, r, o)
    gain: Tensor | None    # (c, 1, o)
    shift: Tensor | None   # (c, 1, o)

    @classmethod
    def empty(cls, places: int, form: Form, like: Update) -> Stack:
        """At each place the module is the base's: who is in the table already has no update of it."""

        def make(*shape: int) -> Tensor:
            return like.a.new_zeros(places, *shape)

        scaled = (make(1, like.b.shape[1]).fill_(1), make(1, like.b.shape[1])) if form.dora else (None, None)
        return cls(make(form.rank, like.a.shape[1]), make(form.rank, like.b.shape[1]), *scaled)

    def grown(self, places: int) -> Stack:
        def more(part: Tensor | None) -> Tensor | None:
            return None if part is None else torch.cat([part, part.new_zeros(places - len(part), *part.shape[1:])])

        return Stack(*(more(part) for part in (self.a, self.b, self.gain, self.shift)))  # type: ignore[arg-type]

    def write(self, place: int, update: Update | None) -> None:
        """Without an update the module is the base's."""
        rank = 0
        if update is not None:
            rank = len(update.a)
            self.a[place, :rank], self.b[place, :rank] = update.a, update.b
        self.a[place, rank:], self.b[place, rank:] = 0, 0
        if self.gain is not None and self.shift is not None:
            self.gain[place] = 1 if update is None or update.gain is None else update.gain
            self.shift[place] = 0 if update is None or update.shift is None else update.shift


class Table:
    """Not safe between threads by itself; what `stacks` returned stays as it was for those who hold it, places that are free aside."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.stacks: Mapping[nn.Module, Stack] = {}
        self._places = 0
        self._free: list[int] = []

    @property
    def bytes(self) -> int:
        parts = [part for stack in self.stacks.values() for part in (stack.a, stack.b, stack.gain, stack.shift) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def empty(self) -> bool:
        return len(self._free) == self._places

    @torch.inference_mode()
    def put(self, updates: Mapping[nn.Module, Update], places_max: int) -> int:
        """The place where this adapter is now. Places double, up to `places_max`; beyond that each one more is made alone."""
        if not self._free:
            places = max(self._places + 1, min(max(PLACES_MIN, 2 * self._places), places_max))
            self.stacks = {module: stack.grown(places) for module, stack in self.stacks.items()}
            self._free, self._places = list(range(self._places, places)), places
        if new := [module for module in updates if module not in self.stacks]:
            self.stacks = {**self.stacks, **{module: Stack.empty(self._places, self.form, updates[module]) for module in new}}
        place = heapq.heappop(self._free)
        for module, stack in self.stacks.items():
            stack.write(place, updates.get(module))
        return place

    def free(self, place: int) -> None:
        """Give a place back; the last one gives the memory back."""
        heapq.heappush(self._free, place)
        if self.empty:
            self.stacks, self._places, self._free = {}, 0, []
